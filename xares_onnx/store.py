"""The embedding store (DESIGN section 8): one safetensors file a source shard, with a `.jsonl` beside it.

A file's name is a digest of everything that shapes its numbers, so a name that exists is right and whole: both parts are
written aside, and the tensors are renamed into place last. Two processes may write the same store.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from .files import TEMPORARY_SUFFIX, disk_error, write_aside
from .shards import Drop

STORE_VERSION = 1


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """First line of the `.jsonl`: what these embeddings are, for people, and the counts of the shard."""

    store_version: int
    model: str
    model_sha256: str
    task: str
    shard: str
    expected: int
    damage: str | None
    audio_seconds: float


class Clip(msgspec.Struct, frozen=True):
    """A clip that was embedded: its key within the shard, its seconds, the text of its json."""

    key: str
    seconds: float
    label: str


@dataclass(frozen=True)
class EmbeddedShard:
    """`pooled` (crops, dim) float32; `clip_of_crop` (crops,) int64 into `clips`; what was lost."""

    header: Header
    pooled: npt.NDArray[np.float32]
    clip_of_crop: npt.NDArray[np.int64]
    clips: list[Clip]
    drops: list[Drop]


def store_key(shaping: dict[str, Any]) -> str:
    """Digest of everything that shapes the numbers."""
    named = {"store_version": STORE_VERSION, **shaping}
    return hashlib.sha256(msgspec.json.encode(named, order="deterministic")).hexdigest()[:40]


class Store:
    """A folder of embedded shards."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __contains__(self, key: str) -> bool:
        return self._tensors(key).exists() and self._rows(key).exists()

    def write(self, key: str, shard: EmbeddedShard) -> None:
        """Raises `DiskFullError` or `MachineError`; nothing half-written is ever visible."""
        tensors = safetensors.save({"pooled": shard.pooled, "clip_of_crop": shard.clip_of_crop})
        lines = [msgspec.json.encode(shard.header)]
        lines += [msgspec.json.encode({"clip": msgspec.to_builtins(clip)}) for clip in shard.clips]
        lines += [msgspec.json.encode({"drop": msgspec.to_builtins(drop)}) for drop in shard.drops]
        write_aside(self._rows(key), b"\n".join(lines) + b"\n")
        write_aside(self._tensors(key), tensors)

    def read(self, key: str) -> EmbeddedShard | None:
        """The shard, or None where it is not there or was damaged after it was written."""
        try:
            arrays = safetensors.load_file(self._tensors(key))
            first, *lines = self._rows(key).read_bytes().splitlines()
            header = msgspec.json.decode(first, type=Header)
            rows = [json.loads(line) for line in lines]
            clips = [msgspec.convert(row["clip"], Clip) for row in rows if "clip" in row]
            drops = [msgspec.convert(row["drop"], Drop) for row in rows if "drop" in row]
            pooled, clip_of_crop = arrays["pooled"], arrays["clip_of_crop"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, msgspec.MsgspecError):
            return None
        whole = len(clips) + len(drops) == header.expected and len(pooled) == len(clip_of_crop)
        whole = whole and set(clip_of_crop.tolist()) == set(range(len(clips)))
        if not whole or header.store_version != STORE_VERSION:
            return None
        return EmbeddedShard(header, pooled, clip_of_crop, clips, drops)

    def entries(self) -> Iterator[tuple[str, Header, int, float]]:
        """(key, header, bytes, last used as a time stamp) of every shard."""
        for tensors in sorted(self.root.glob("*/*.safetensors")):
            rows = tensors.with_suffix(".jsonl")
            try:
                with rows.open("rb") as file:
                    header = msgspec.json.decode(file.readline(), type=Header)
                size = tensors.stat().st_size + rows.stat().st_size
                yield tensors.stem, header, size, tensors.stat().st_mtime
            except (OSError, msgspec.MsgspecError):
                continue

    def touch(self, key: str) -> None:
        """Mark as used, for `cache prune --older-than`."""
        try:
            os.utime(self._tensors(key))
        except OSError:
            pass  # a store on a read-only disk still serves

    def remove(self, key: str) -> int:
        """Bytes freed."""
        return sum(_unlink(path) for path in (self._tensors(key), self._rows(key)))

    def remove_leftovers(self, older_than_seconds: float = 3600) -> int:
        """Bytes freed of parts that a killed run left; younger ones may belong to a run that goes on."""
        freed, now = 0, time.time()
        known = {key for key, *_ in self.entries()}
        for path in self.root.glob("*/*"):
            if path.suffix != TEMPORARY_SUFFIX and path.stem in known:
                continue
            try:
                age = now - path.stat().st_mtime
            except FileNotFoundError:  # another process has put it in place, or removed it
                continue
            if age > older_than_seconds:
                freed += _unlink(path)
        return freed

    def _tensors(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.safetensors"

    def _rows(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.jsonl"


def prune(
    store: Store, *, older_than_days: int | None = None, model: str | None = None, everything: bool = False
) -> tuple[int, int]:
    """(shards removed, bytes freed): the chosen embeddings, and whatever killed runs left.

    An age and a model together choose what fits both; neither chooses nothing.
    """
    removed, freed = 0, store.remove_leftovers()
    for key, header, _, used in list(store.entries()):
        old = older_than_days is None or time.time() - used > older_than_days * 86_400
        named = model is None or header.model == model or header.model_sha256.startswith(model)
        if everything or ((older_than_days is not None or model is not None) and old and named):
            freed += store.remove(key)
            removed += 1
    return removed, freed


def _unlink(path: Path) -> int:
    try:
        size = path.stat().st_size
        path.unlink()
        return size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise disk_error(error, path) from error
