"""Folders of audio and tables of labels to pack: the small tasks of `kind_makers`, as a user would have them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from corpus import tones
from kind_makers import SIZES, clips_of
from shard_makers import RATE, encoded

Rows = list[dict[str, Any]]


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """csv, tsv, jsonl or parquet, by the name."""
    columns = list(rows[0])
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, "excel-tab" if path.suffix == ".tsv" else "excel")
            writer.writerows([columns, *([row[column] for column in columns] for row in rows)])
    return path


def short(seed: int, seconds: float = 0.05) -> bytes:
    """A little wav that no other seed gives."""
    return encoded(0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE)), RATE, subtype="PCM_16")


def write_tones(folder: Path, count: int = 64, *, noise: float = 0.5, seed: int = 5) -> Rows:
    """Tones of four classes below `folder`, and their rows."""
    rows: Rows = []
    for key, (audio, label) in tones(count, seed, noise=noise).items():
        write_files(folder, {f"{key[-1]}/{key}.wav": audio})
        rows.append({"path": f"{key[-1]}/{key}.wav", "label": label["label"]})
    return rows


def write_kind(folder: Path, kind: str) -> Rows:
    """Audio of every split of a kind, and a row a clip as a user would write it."""
    rows: Rows = []
    for number, (split, count) in enumerate(SIZES.items()):
        for key, (audio, label) in clips_of(kind, split, count, seed=number).items():
            write_files(folder, {f"{key}.wav": audio})
            rows += _ROWS[kind](f"{key}.wav", label, split)
    return rows


def _tags(path: str, label: Any, split: str) -> Rows:
    return [{"path": path, "labels": label["tags"].replace(";", ","), "split": split}]


def _events(path: str, label: Any, split: str) -> Rows:
    events = label if isinstance(label, list) else label["events"]
    return [
        {"filename": path, "onset": e["onset"], "offset": e["offset"], "event_label": e["label"], "split": split}
        for e in events
    ]


def _captions(path: str, label: Any, split: str) -> Rows:
    return [{"path": path, "caption": text, "split": split} for text in label.values()]


def _transcript(path: str, label: Any, split: str) -> Rows:
    return [{"path": path, "transcript": label["trans"], "split": split}]


def _number(path: str, label: Any, split: str) -> Rows:
    return [{"path": path, "score": label["score"], "split": split}]


_ROWS = {"tags": _tags, "events": _events, "captions": _captions, "transcript": _transcript, "number": _number}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, but the record of how it was packed, which names lines of the table."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "packed.json"
    }


def paths_of(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    return {row["path"] for row in rows}
