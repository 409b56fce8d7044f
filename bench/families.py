"""Every family with a checkpoint at real size, random weights: parity with the publisher's pipeline at 10 s, and speed.

Usage: PYTHONPATH=tests/helpers python bench/families.py [FAMILY...]; takes minutes and 5 GB of memory.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import transformers
from dasheng_reference import BASE as DASHENG_BASE
from dasheng_reference import Reference, save
from random_checkpoints import Plain, save_model

from xares_onnx.exporters import export

SAMPLES = 160_000
THREADS = 2
TOLERANCE = 1e-4
BASE = {
    "wav2vec2": transformers.Wav2Vec2Config(mask_time_prob=0.0),
    "hubert": transformers.HubertConfig(mask_time_prob=0.0),
    "wavlm": transformers.WavLMConfig(mask_time_prob=0.0),
    "data2vec": transformers.Data2VecAudioConfig(mask_time_prob=0.0),
    "whisper": transformers.WhisperConfig(
        d_model=512,
        encoder_layers=6,
        encoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_layers=1,
        decoder_attention_heads=8,
    ),
}


def seconds(run: Callable[[], object], times: int = 5) -> float:
    """The fastest of several, as other work may share the machine."""
    run()
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def make(family: str, folder: Path) -> Callable[[Path], torch.nn.Module]:
    """A random checkpoint, and what runs it as its publisher does."""
    if family == "dasheng":
        save(folder, DASHENG_BASE)
        return Reference
    save_model(BASE[family], folder)
    whisper = family == "whisper"
    extractor = transformers.WhisperFeatureExtractor() if whisper else transformers.Wav2Vec2FeatureExtractor()
    extractor.save_pretrained(folder)
    return Plain


def main(families: list[str]) -> None:
    torch.set_num_threads(THREADS)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    worst = 0.0
    for family in families or [*BASE, "dasheng"]:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name, family)
            publisher = make(family, folder)
            start = time.perf_counter()
            report = export(family, str(folder), Path(name, f"{family}.onnx"))
            took = time.perf_counter() - start
            session = onnxruntime.InferenceSession(report.path, options, providers=["CPUExecutionProvider"])
            plain = publisher(folder).eval()
            audio = 0.1 * torch.randn(1, SAMPLES, generator=torch.Generator().manual_seed(0))
            feeds = {"audio": audio.numpy()}
            with torch.inference_mode():
                expected = plain(audio).numpy()
                error = float(np.abs(session.run(None, feeds)[0] - expected).max() / np.abs(expected).max())
                ratio = seconds(lambda: session.run(None, feeds)) / seconds(lambda: plain(audio))  # noqa: B023
        worst = max(worst, error)
        print(
            f"{family:9} {report.parameters / 1e6:5.1f} M, exported and checked in {took:.0f} s; at {SAMPLES / 16_000:g} s "
            f"{error:.1e} of the largest value from the publisher's pipeline, {ratio:.2f}x its time",
            flush=True,
        )
    sys.exit(f"more than {TOLERANCE} apart" if worst > TOLERANCE else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
