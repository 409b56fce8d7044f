"""A rerun of five tasks whose embeddings are in the store, as a user runs it; and the share of it that is imports.

python bench/rerun.py MODEL.onnx
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TASKS = "synthetic_pitch,synthetic_timbre,synthetic_vowel,synthetic_colour,synthetic_tempo"


def run(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as scratch:
        folders = ("--cache", scratch, "--output", str(Path(scratch) / "result.json"))
        command = ("-m", "xares_onnx", "evaluate", str(model), "--tasks", TASKS, *folders)
        first = run(*command)
        again = min(run(*command) for _ in range(3))
        imports = min(run("-c", "import sklearn.neighbors, xares_onnx.evaluation.evaluation") for _ in range(3))
    print(f"rerun of 5 tasks: {again:.1f} s ({again / first:.2f}x of the first run, {imports / again:.0%} of it imports)")


if __name__ == "__main__":
    main()
