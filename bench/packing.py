"""Packing and scoring 1,000 files of one's own, and the peak memory of packing 100,000 clips against 1,000: files, and rows
of a parquet file.

python bench/packing.py MODEL.onnx
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path

import numpy as np

from xares_onnx.evaluation.evaluation import evaluate
from xares_onnx.packing import pack

FILES, FILE_SECONDS, RATE = 1000, 3.0, 16_000
COUNTS, CLIP_SECONDS = (1000, 100_000), 0.03
CLASSES = 50

_PEAK = """
import sys
from pathlib import Path
from xares_onnx.packing import pack
pack(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2] else None, Path(sys.argv[3]))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    model = parser.parse_args().model
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        table = write_clips(folder / "files", FILES, FILE_SECONDS)
        begun = time.perf_counter()
        pack(folder / "files", table, folder / "packed")
        packed = time.perf_counter()
        evaluate(model, [str(folder / "packed/mine.toml")], data=folder / "packed", cache=folder / "cache", save=False)
        scored = time.perf_counter()
        took = f"{packed - begun:.1f} s to pack, {scored - packed:.1f} s to score {model.stem}"
        print(f"{FILES} files of {FILE_SECONDS:g} s: {took}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        table = write_clips(folder / "files", COUNTS[1], CLIP_SECONDS)
        lines = table.read_text().splitlines(keepends=True)
        parts = {count: folder / f"{count}.csv" for count in COUNTS}
        for count, part in parts.items():
            part.write_text("".join(lines[: count + 1]))
        _compare("files", [(folder / "files", part, folder / f"packed-{count}") for count, part in parts.items()])
        sets = {count: write_data_set(folder / f"rows-{count}", folder / "files", lines[1 : count + 1]) for count in COUNTS}
        _compare("rows of parquet", [(path, "", folder / f"packed-rows-{count}") for count, path in sets.items()])


def _compare(what: str, runs: list[tuple[Path, Path | str, Path]]) -> None:
    """Print time and peak memory of packing few clips and many."""
    peaks, seconds = [], []
    for arguments in runs:
        begun = time.perf_counter()
        command = [sys.executable, "-c", _PEAK, *map(str, arguments)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True).stdout) / 1e3)
        seconds.append(time.perf_counter() - begun)
    few, many = peaks
    print(
        f"peak memory of packing {COUNTS[1]} {what} ({many:.0f} MB, {seconds[1]:.0f} s) against {COUNTS[0]} "
        f"({few:.0f} MB, {seconds[0]:.1f} s): {many / few:.2f}x"
    )


def write_data_set(folder: Path, files: Path, lines: list[str]) -> Path:
    """A parquet file with the files in its rows, a thousand per row group, as a data set on the hub has them."""
    import pyarrow
    import pyarrow.parquet

    audio = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("audio", audio), ("label", pyarrow.string())])
    folder.mkdir()
    with pyarrow.parquet.ParquetWriter(folder / "train.parquet", schema) as writer:
        for start in range(0, len(lines), 1000):
            cells = [line.strip().split(",") for line in lines[start : start + 1000]]
            rows = [{"audio": {"bytes": (files / path).read_bytes(), "path": path}, "label": name} for path, name in cells]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    return folder


def write_clips(folder: Path, count: int, seconds: float) -> Path:
    """Noise below a tone whose pitch is the class, a thousand files a folder, and a table of them."""
    rng = np.random.default_rng(0)
    times = np.arange(round(seconds * RATE)) / RATE
    table = folder.with_suffix(".csv")
    folder.mkdir()
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label"])
        for number in range(count):
            label = number % CLASSES
            path = Path(f"{number // 1000:03}", f"{number:06}.wav")
            (folder / path.parent).mkdir(exist_ok=True)
            signal = 0.1 * np.sin(2 * np.pi * 200 * 2 ** (label / 12) * times) + 0.05 * rng.standard_normal(len(times))
            with wave.open(str(folder / path), "wb") as audio:
                audio.setnchannels(1)
                audio.setsampwidth(2)
                audio.setframerate(RATE)
                audio.writeframes((signal * 2**15).astype("<i2").tobytes())
            rows.writerow([path.as_posix(), f"class {label}"])
    return table


if __name__ == "__main__":
    main()
