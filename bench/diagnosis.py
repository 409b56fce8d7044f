"""Planted faults that `diagnose` finds and misses: four families, two opsets, four precisions, six faults, each in layer 2.

    PYTHONPATH=tests/helpers python bench/diagnosis.py [FAMILY | PRECISION ...]

A fault is found if the first suspect lies where it was planted. Prints a row per family, opset and precision.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from planted_faults import FAMILIES, FAULTS, save_as

from xares_onnx.diagnosis.diagnosing import suspects
from xares_onnx.diagnosis.figures import Measurement
from xares_onnx.diagnosis.tensors import measure
from xares_onnx.encoder.encoder import open_encoder
from xares_onnx.encoder.spec import ModelOptions

PRECISIONS = ("float32", "float16", "dynamic", "static")
LAYER = 2


def main(chosen: list[str]) -> None:
    families = [family for family in FAMILIES if family in chosen] or list(FAMILIES)
    precisions = [precision for precision in PRECISIONS if precision in chosen] or list(PRECISIONS)
    import numpy as np

    rng = np.random.default_rng(0)
    clips = [(0.1 * rng.standard_normal(16_000)).astype(np.float32) for _ in range(4)]
    found = total = 0
    print(f"| family | opset | precision | {' | '.join(FAULTS)} |")
    print("|---" * (3 + len(FAULTS)) + "|")
    options = ModelOptions(device="cpu", threads=1)
    for family in families:
        for opset in (13, 17):
            with tempfile.TemporaryDirectory() as folder:
                reference = save_as(FAMILIES[family](opset), Path(folder) / "a.onnx", "float32")
                with open_encoder(reference, options) as a:
                    for precision in precisions:
                        if (family, precision) == ("lstm", "float16"):  # ONNX Runtime dies while it loads one
                            continue
                        cells = []
                        for fault, plant in FAULTS.items():
                            model = FAMILIES[family](opset)
                            place = plant(model, LAYER)
                            started = time.perf_counter()
                            try:
                                path = save_as(
                                    model, Path(folder) / f"{precision}-{fault.replace(' ', '-')}.onnx", precision
                                )
                                with open_encoder(path, options) as b:
                                    infos = (a.info, b.info)
                                    result = a.call(
                                        measure, infos, 1, False, clips, returns=Measurement, observer=lambda event: None
                                    )
                                ranked = suspects(result.steps)
                                first = result.steps[ranked[0]] if ranked else None
                            except Exception as error:
                                cells.append(f"failed: {str(error)[:60]}")
                                total += 1
                                continue
                            right = first is not None and (
                                first.name.startswith(place) or (first.place.layer == LAYER and place == f"{LAYER}.")
                            )
                            found += right
                            total += 1
                            said = "nothing" if first is None else f"{first.name} {first.pattern}"
                            cells.append(("yes" if right else f"NO ({said})") + f" {time.perf_counter() - started:.0f} s")
                        print(f"| {family} | {opset} | {precision} | {' | '.join(cells)} |", flush=True)
    print(f"\n{found} of {total}")


if __name__ == "__main__":
    main(sys.argv[1:])
