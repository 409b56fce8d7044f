"""Encoder processes and threads: what the same shards cost with one worker and one thread, one and two, two and one each.

Usage: python bench/workers.py MODEL --data DIR --tasks NAMES [--rounds 3]; every round embeds anew, in turns. Wall time is
worth something on an idle machine alone; processor time shows what further workers add, and the ratio of both how busy the
cores were.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = {"1 worker, 1 thread": (1, 1), "1 worker, 2 threads": (1, 2), "2 workers, 1 thread each": (2, 2)}


def embed(model: Path, options: argparse.Namespace, workers: int, threads: int) -> tuple[float, float]:
    """Wall and processor seconds of one run with an empty store; the model's measurements are kept beside it."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "xares_onnx", "embed", str(model), "--data", str(options.data), "--quiet"]
        command += ["--tasks", options.tasks, "--cache", cache, "--device", "cpu"]
        command += ["--workers", str(workers), "--threads", str(threads)]
        subprocess.run([*command, "--part", "100000/100000"], check=True)  # measures the model, and embeds next to nothing
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, check=True)
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
    for _ in range(options.rounds):
        for name, (workers, threads) in SETTINGS.items():
            seconds[name].append(embed(options.model, options, workers, threads))
    first = seconds["1 worker, 1 thread"]
    print(f"{options.model.name}, {options.tasks}: medians of {options.rounds} rounds on {os.cpu_count()} cores")
    for name, rounds in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
        faster = statistics.median(one / other for (one, _), (other, _) in zip(first, rounds, strict=True))
        dearer = statistics.median(other / one for (_, one), (_, other) in zip(first, rounds, strict=True))
        times = f"wall {wall:7.1f} s ({faster:.2f}x as fast), processor {cpu:7.1f} s ({dearer:.2f}x)"
        print(f"{name:26} {times}, busy {cpu / wall:.2f}")


if __name__ == "__main__":
    main()
