"""A frame head on hours of frames, as MAESTRO has them: time of an epoch, and memory for all hours against one.

    python bench/frames.py [--hours N] [--seeds N] [--dim N]

Frames are float16 in a mapped file, 25 a second, in recordings of ten minutes; events are notes. Memory is what the process
has of its own (RssAnon): pages of the mapped file come and go. Reading is timed alone: a pass over the file, block by block.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from xares_onnx.data.sound_events import Events
from xares_onnx.data.task import Head
from xares_onnx.probes.frames import train_frames
from xares_onnx.probes.training import Rows

RATE, SECONDS, CLASSES, NOTES_A_SECOND, FRAMES_AT_ONCE = 25, 600, 88, 10, 512
FRAMES = RATE * SECONDS  # of one recording


def write(path: Path, hours: float, dim: int) -> None:
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((FRAMES, dim)).astype(np.float16)
    with path.open("wb") as file:
        for _ in range(max(2, round(hours * 3600 / SECONDS))):
            file.write(np.roll(noise, int(rng.integers(FRAMES)), axis=0).tobytes())


def anonymous() -> float:
    """MB of memory that belong to this process alone."""
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1e3


def measure(path: Path, dim: int, seeds: int) -> dict[str, float]:
    """Seconds of one epoch, and of reading its frames, and the peak of the memory, of training on all recordings but one."""
    stored = np.memmap(path, np.float16, "r").reshape(-1, FRAMES, dim)
    rng, clips = np.random.default_rng(1), np.arange(len(stored))
    events = []
    for _ in clips:
        onsets = np.sort(rng.uniform(0, SECONDS - 1, NOTES_A_SECOND * SECONDS))
        lengths, notes = rng.uniform(0.1, 1, len(onsets)), rng.integers(0, CLASSES, len(onsets))
        events.append(Events(onsets, onsets + lengths, notes))
    times = [(np.arange(FRAMES) + 0.5) / RATE] * len(clips)

    started = time.perf_counter()
    for frames in stored[:-1]:
        for start in range(0, FRAMES, FRAMES_AT_ONCE):
            frames[start : start + FRAMES_AT_ONCE].copy()
    read = time.perf_counter() - started

    highest, stop = 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.wait(0.01):
            highest = max(highest, anonymous())

    ended: list[float] = []
    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    train_frames(
        list(stored),
        times,
        [float(SECONDS)] * len(clips),
        events,
        [Rows(clips[:-1], clips[:0], clips[-1:])],
        CLASSES,
        Head(epochs=1, batch_size=1, positive_weight=10),
        range(seeds),
        segment_seconds=0.1,
        average="micro",
        on_epoch=lambda epoch: ended.append(time.perf_counter()),
    )
    stop.set()
    watcher.join()
    return {"epoch": (ended[0] - started) / seeds, "read": read, "memory": highest}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hours", type=float, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--file", type=Path)
    given = parser.parse_args()
    if given.file:
        print(json.dumps(measure(given.file, given.dim, given.seeds)))
        return
    found = []
    for hours in (1, given.hours):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "frames"
            write(path, hours, given.dim)
            command = [sys.executable, __file__, "--file", str(path), "--dim", str(given.dim), "--seeds", str(given.seeds)]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    few, many = found
    print(f"an epoch of {given.hours:g} h, {given.dim} dimensions, {CLASSES} classes: {many['epoch']:.1f} s a seed")
    print(f"reading alone, file in memory: {many['read']:.1f} s, {many['read'] / many['epoch']:.0%}")
    print(
        f"peak anonymous memory: {many['memory'] / few['memory']:.3f}x for {given.hours:g} h ({many['memory']:.0f} MB) "
        f"against 1 h ({few['memory']:.0f} MB)"
    )


if __name__ == "__main__":
    main()
