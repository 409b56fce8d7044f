"""Peak resident memory of the worker that embeds 5,000 clips, against 500.

python bench/memory.py MODEL.onnx
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

import psutil
from embedding import KINDS, embed, write_shard

from xares_onnx.encoder import load_encoder

COUNTS = (500, 5000)
CLIPS_A_SHARD = 1000


def peak(model: Path, folder: Path, store: Path) -> float:
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
            embed(encoder, shard, store)
        stop.set()
        watcher.join()
    return highest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.folder:
        with tempfile.TemporaryDirectory() as store:
            print(json.dumps(peak(given.model, given.folder, Path(store))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        peaks = []
        for count in COUNTS:
            folder = Path(scratch) / str(count)
            folder.mkdir()
            for first in range(0, count, CLIPS_A_SHARD):
                shard = folder / f"{first:05d}.tar"
                write_shard(shard, next(iter(KINDS)), min(CLIPS_A_SHARD, count - first), seed=first)
            done = subprocess.run(
                [sys.executable, __file__, str(given.model), "--folder", str(folder)], check=True, capture_output=True
            )
            peaks.append(float(json.loads(done.stdout)))
    few, many = peaks
    print(
        f"peak resident memory, {given.model.stem}: {many / few:.3f}x for {COUNTS[1]} clips ({many / 1e6:.0f} MB) "
        f"against {COUNTS[0]} ({few / 1e6:.0f} MB)"
    )


if __name__ == "__main__":
    main()
