"""What it costs to adapt a model's input and output, against one run of the model on a chunk of 10 s.

    python bench/adapters.py MODEL.onnx

The model is run as it is; each adapter is timed by itself, on inputs and outputs of the model's own size.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from xares_onnx.encoder.adapter import Adapter
from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.encoder.session import Session

# Changes of the contract, and the type of its inputs.
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "canonical": ({}, "tensor(float)"),
    "[B,1,T], [B,D,T]": ({"input_layout": "B1T", "output_layout": "BDT"}, "tensor(float)"),
    "[T], [T,D]": ({"input_layout": "T", "output_layout": "TD"}, "tensor(float)"),
    "float64": ({}, "tensor(double)"),
    "float16, int16 amplitude, lengths, mask": (
        {"amplitude": "int16", "lengths_input": "lengths", "mask_input": "mask"},
        "tensor(float16)",
    ),
}
SECONDS = 10


def fastest(run: Callable[[], object], times: int) -> float:
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def main(model: Path) -> None:
    with load_encoder(model, device="cpu", threads=1) as encoder:
        plain = encoder.contract
    session = Session(model, "cpu")
    audio = (0.1 * np.random.default_rng(0).standard_normal((1, SECONDS * plain.sample_rate))).astype(np.float32)
    frames = session.run(audio, plain)
    whole = fastest(lambda: session.run(audio, plain), 5)
    for name, (changes, kind) in FORMS.items():
        contract = msgspec.structs.replace(plain, **changes)
        adapter = Adapter(contract, {plain.input: kind, "lengths": "tensor(int64)", "mask": "tensor(int64)"})
        output = {"BTD": frames, "BDT": frames.transpose(0, 2, 1), "TD": frames[0]}[contract.output_layout]
        output = output.astype(np.float16 if "16" in kind else np.float64 if "double" in kind else np.float32)

        def adapt(adapter: Adapter = adapter, output: Any = output) -> None:
            adapter.feeds(audio)
            adapter.frames(output, 1)

        cost = fastest(adapt, 50)
        print(f"{name}: {1000 * cost:.3f} ms, {100 * cost / whole:.3f} % of {model.stem}'s {1000 * whole:.0f} ms")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
