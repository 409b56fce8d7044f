"""Peak resident memory of the worker: 5,000 clips against 500, and 12 recordings of 10 minutes, frames kept, against 2.

python bench/memory.py MODEL.onnx
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import soundfile
from clips import KINDS, embed, write_shard

from xares_onnx.encoder.encoder import load_encoder

COUNTS = (500, 5000)
CLIPS_A_SHARD = 1000
RECORDINGS = (2, 12)
RECORDING_SECONDS, RECORDING_RATE = 600, 44_100


def peak(model: Path, folder: Path, store: Path, *, frames: bool) -> float:
    """Peak resident bytes of the worker over every shard in a folder."""
    highest = 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.is_set():
            for child in psutil.Process().children():
                try:
                    highest = max(highest, child.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.01)

    with load_encoder(model, device="cpu", threads=2) as encoder:
        watcher = threading.Thread(target=watch)
        watcher.start()
        for shard in sorted(folder.glob("*.tar")):
            embed(encoder, shard, store, frames=frames)
        stop.set()
        watcher.join()
    return highest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--frames", action="store_true")
    given = parser.parse_args()
    if given.folder:
        with tempfile.TemporaryDirectory() as store:
            print(json.dumps(peak(given.model, given.folder, Path(store), frames=given.frames)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        for counts, write, what, options in (
            (COUNTS, write_clips, "clips", ()),
            (RECORDINGS, write_recordings, "recordings of 10 minutes, frames kept", ("--frames",)),
        ):
            peaks = []
            for count in counts:
                folder = Path(scratch) / f"{what}-{count}"
                folder.mkdir()
                write(folder, count)
                command = [sys.executable, __file__, str(given.model), "--folder", str(folder), *options]
                peaks.append(float(json.loads(subprocess.run(command, check=True, capture_output=True).stdout)))
            few, many = peaks
            print(
                f"peak resident memory, {given.model.stem}: {many / few:.3f}x for {counts[1]} {what} ({many / 1e6:.0f} MB) "
                f"against {counts[0]} ({few / 1e6:.0f} MB)"
            )


def write_clips(folder: Path, count: int) -> None:
    for first in range(0, count, CLIPS_A_SHARD):
        write_shard(folder / f"{first:05d}.tar", next(iter(KINDS)), min(CLIPS_A_SHARD, count - first), seed=first)


def write_recordings(folder: Path, count: int) -> None:
    samples = 0.1 * np.random.default_rng(0).standard_normal(RECORDING_SECONDS * RECORDING_RATE).astype(np.float32)
    flac = io.BytesIO()
    soundfile.write(flac, samples, RECORDING_RATE, format="FLAC")
    with tarfile.open(folder / "recordings.tar", "w") as shard:
        for number in range(count):
            for extension, data in (("flac", flac.getvalue()), ("json", b"[]")):
                member = tarfile.TarInfo(f"{number:03}.{extension}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


if __name__ == "__main__":
    main()
