"""The embedding store: one safetensors file per source shard, with a `.jsonl` beside it.

A file's name is a digest of everything that shapes its numbers, so a file that exists is right and whole: both parts are
written under other names, and the tensors are renamed into place last. Two processes may write to the same store.

Frames may be larger than memory: they are written as they come, and mapped when they are read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from ..data.shards import Drop
from ..files import TEMPORARY_SUFFIX, disk_error, write_aside

STORE_VERSION = 2
_HEADER_BYTES = 4096  # reserved for the header, so that frames can be written before it; a page, which mapping needs
_FLOAT16_MAX = 65504.0
_BLUR = 0.01  # float16's largest error in a frame, as a share of the frame's own spread
_COPIED_AT_ONCE = 1 << 22


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """First line of the `.jsonl`: what was embedded, for people, and the shard's counts."""

    store_version: int
    model: str
    model_sha256: str
    task: str
    shard: str
    expected: int
    damage: str | None
    audio_seconds: float


class Clip(msgspec.Struct, frozen=True):
    """An embedded clip: its key within the shard, its seconds, and the text of its json."""

    key: str
    seconds: float
    label: str


@dataclass(frozen=True)
class Frames:
    """Frames of all crops: `values` (frames, dim) float16 or float32, `times` (frames,) in seconds from the clip's start.

    Crop i has the rows from offsets[i] to offsets[i + 1]. A store maps `values` instead of loading them.
    """

    values: npt.NDArray[np.float16] | npt.NDArray[np.float32]
    offsets: npt.NDArray[np.int64]  # (crops + 1,)
    times: npt.NDArray[np.float64]


@dataclass(frozen=True)
class EmbeddedShard:
    """`pooled` (crops, dim) float32, `clip_of_crop` (crops,) int64 into `clips`, dropped clips, and frames if kept."""

    header: Header
    pooled: npt.NDArray[np.float32]
    clip_of_crop: npt.NDArray[np.int64]
    clips: list[Clip]
    drops: list[Drop]
    frames: Frames | None = None


def store_key(shaping: dict[str, Any]) -> str:
    """Digest of everything that shapes the numbers."""
    content = {"store_version": STORE_VERSION, **shaping}
    return hashlib.sha256(msgspec.json.encode(content, order="deterministic")).hexdigest()[:40]


class Store:
    """A folder of embedded shards."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __contains__(self, key: str) -> bool:
        return self._tensors(key).exists() and self._rows(key).exists()

    def write(self, key: str, shard: EmbeddedShard, spool: FrameSpool | None = None) -> None:
        """Put a shard into the store, with the frames of `spool`. A partly written shard is never visible.

        Raises:
            DiskFullError: The disk is full.
            MachineError: The disk cannot be written to.
        """
        lines = [msgspec.json.encode(shard.header)]
        lines += [msgspec.json.encode({"clip": msgspec.to_builtins(clip)}) for clip in shard.clips]
        lines += [msgspec.json.encode({"drop": msgspec.to_builtins(drop)}) for drop in shard.drops]
        write_aside(self._rows(key), b"\n".join(lines) + b"\n")
        tensors: dict[str, npt.NDArray[Any]] = {"pooled": shard.pooled, "clip_of_crop": shard.clip_of_crop}
        if spool is not None:
            spool.finish(tensors, self._tensors(key))
        else:
            names = {name: (array.dtype, array.shape) for name, array in tensors.items()}
            write_aside(self._tensors(key), _header(names) + b"".join(array.tobytes() for array in tensors.values()))

    def spool(self, key: str, dim: int) -> FrameSpool:
        """A file for the frames of a shard, before the shard is whole."""
        return FrameSpool(self._tensors(key), dim)

    def read(self, key: str) -> EmbeddedShard | None:
        """The shard, or None if it is missing or was damaged after it was written."""
        path = self._tensors(key)
        try:
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys() if name != "frames"}  # noqa: SIM118
            first, *lines = self._rows(key).read_bytes().splitlines()
            header = msgspec.json.decode(first, type=Header)
            rows = [json.loads(line) for line in lines]
            clips = [msgspec.convert(row["clip"], Clip) for row in rows if "clip" in row]
            drops = [msgspec.convert(row["drop"], Drop) for row in rows if "drop" in row]
            pooled, clip_of_crop = arrays["pooled"], arrays["clip_of_crop"]
            frames = Frames(_mapped_frames(path), arrays["offsets"], arrays["times"]) if "offsets" in arrays else None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, msgspec.MsgspecError):
            return None
        whole = len(clips) + len(drops) == header.expected and len(pooled) == len(clip_of_crop)
        whole = whole and set(clip_of_crop.tolist()) == set(range(len(clips)))
        if frames is not None:
            ends = len(pooled) + 1, len(frames.times), len(frames.times)
            whole = whole and ends == (len(frames.offsets), len(frames.values), int(frames.offsets[-1]))
        if not whole or header.store_version != STORE_VERSION:
            return None
        return EmbeddedShard(header, pooled, clip_of_crop, clips, drops, frames)

    def header(self, key: str) -> Header | None:
        """The header of a shard, without reading the rest; None if the shard is missing."""
        if key not in self:
            return None
        try:
            with self._rows(key).open("rb") as file:
                header = msgspec.json.decode(file.readline(), type=Header)
        except (OSError, msgspec.MsgspecError):
            return None
        return header if header.store_version == STORE_VERSION else None

    def size(self, key: str) -> int:
        """Bytes of a shard's tensors, frames included; 0 if it is missing."""
        try:
            return self._tensors(key).stat().st_size
        except OSError:
            return 0

    def entries(self) -> Iterator[tuple[str, Header, int, float]]:
        """Of every shard its key, header, bytes and the time of its last use (seconds since the epoch)."""
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
        """Mark a shard as used now, for `cache prune --older-than`."""
        try:
            os.utime(self._tensors(key))
        except OSError:
            pass  # a store on a read-only disk still works

    def remove(self, key: str) -> int:
        """Remove a shard; the bytes that this freed."""
        return sum(_unlink(path) for path in (self._tensors(key), self._rows(key)))

    def remove_leftovers(self, older_than_seconds: float = 3600) -> int:
        """Remove the parts that killed runs left; the bytes that this freed. Younger parts may belong to a present run."""
        freed, now = 0, time.time()
        known = {key for key, *_ in self.entries()}
        for path in self.root.glob("*/*"):
            if path.suffix != TEMPORARY_SUFFIX and path.stem in known:
                continue
            try:
                age = now - path.stat().st_mtime
            except FileNotFoundError:  # another process has renamed or removed it
                continue
            if age > older_than_seconds:
                freed += _unlink(path)
        return freed

    def _tensors(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.safetensors"

    def _rows(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.jsonl"


class FrameSpool:
    """Frames of one shard on their way into the store: a file that is renamed into place when the shard is whole.

    Frames are rounded to float16, except the chunks of a clip in which float16 would overflow, or would change more than one
    frame in a hundred by 1 % of its spread or more. As a context manager it removes an unfinished file.
    """

    def __init__(self, path: Path, dim: int) -> None:
        self._path = path
        self._dim = dim
        self._dtype: type[np.float16] | type[np.float32] = np.float16
        self._times: list[npt.NDArray[np.float64]] = []
        self._frames = 0
        self._offsets = [0]
        self._file = self._open()

    def add(self, values: npt.NDArray[np.float32], times: npt.NDArray[np.float64]) -> None:
        """Append frames (frames, dim) to the crop in progress, with their times (frames,) in seconds."""
        fits = _fits_float16(values)
        if not fits and self._dtype is np.float16:
            self._widen()
        # Rounded in a float32 file too: a clip's frames must not depend on whether a neighbour needed float32.
        rounded = values.astype(np.float16) if fits else values
        try:
            self._file.write(np.ascontiguousarray(rounded, self._dtype).data)
        except OSError as error:
            raise disk_error(error, self._path) from error
        self._times.append(times)
        self._frames += len(times)

    def end_crop(self) -> None:
        self._offsets.append(self._frames)

    def drop_from(self, crop: int) -> None:
        """Remove crop number `crop` and every later one."""
        self._frames = self._offsets[crop]
        times = np.concatenate([*self._times, np.empty(0)])
        self._times = [times[: self._frames]]
        self._offsets = self._offsets[: crop + 1]
        self._file.seek(self._end_of_frames())
        self._file.truncate()

    def finish(self, others: dict[str, npt.NDArray[Any]], path: Path) -> None:
        """Append the other tensors, write the header at the start, and rename the file to `path`."""
        times, offsets = np.concatenate([*self._times, np.empty(0)]), np.array(self._offsets, np.int64)
        tensors = {"times": times, "offsets": offsets, **others}
        shapes = {"frames": (np.dtype(self._dtype), (self._frames, self._dim))}
        shapes |= {name: (array.dtype, array.shape) for name, array in tensors.items()}
        try:
            for array in tensors.values():
                self._file.write(array.tobytes())
            self._file.seek(0)
            self._file.write(_header(shapes, _HEADER_BYTES))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._file.name, path)
        except OSError as error:
            raise disk_error(error, path) from error

    def __enter__(self) -> FrameSpool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._discard(self._file)

    def _open(self) -> BinaryIO:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}").open("w+b")
            file.seek(_HEADER_BYTES)
        except OSError as error:
            raise disk_error(error, self._path) from error
        return file

    def _end_of_frames(self) -> int:
        return _HEADER_BYTES + self._frames * self._dim * np.dtype(self._dtype).itemsize

    def _widen(self) -> None:
        """Replace the file of float16 by one of float32."""
        narrow, left = self._file, self._end_of_frames() - _HEADER_BYTES
        self._file, self._dtype = self._open(), np.float32
        narrow.seek(_HEADER_BYTES)
        try:
            while left > 0:
                block = narrow.read(min(left, _COPIED_AT_ONCE))
                if not block:
                    raise OSError(errno.EIO, "the file became shorter while it was read")
                self._file.write(np.frombuffer(block, np.float16).astype(np.float32).data)
                left -= len(block)
        except OSError as error:
            raise disk_error(error, self._path) from error
        finally:
            self._discard(narrow)

    @staticmethod
    def _discard(file: BinaryIO) -> None:
        try:
            file.close()  # flushes, on a disk that may be full
        except OSError:
            pass
        Path(file.name).unlink(missing_ok=True)


def _fits_float16(values: npt.NDArray[np.float32]) -> bool:
    """Whether frames (frames, dim) survive float16: none overflows, and at most one in a hundred is blurred."""
    if not values.size:
        return True
    if not np.abs(values).max() <= _FLOAT16_MAX:  # NaN included
        return False
    error = values - values.astype(np.float16)
    blurred = np.abs(error).max(axis=1) > _BLUR * values.std(axis=1)
    return bool(blurred.mean() <= _BLUR)


# ---------------------------------------------------------------- the safetensors format
#
# A file is the length of its header (8 bytes, little-endian), the header (JSON, padded with spaces), and the bytes of the
# tensors one after another. The header gives each tensor's dtype, shape, and where its bytes begin and end, counted from the
# end of the header.

_LENGTH_BYTES = 8
_ALIGNMENT = 8
_DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64"}
_FRAME_DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}


def _header(tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], least_bytes: int = 0) -> bytes:
    """Length and header of a file with these tensors (dtype, shape) in order, padded to `least_bytes` in all."""
    entries, start = {}, 0
    for name, (dtype, shape) in tensors.items():
        stop = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": _DTYPES[dtype.name], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = msgspec.json.encode(entries)
    aligned = math.ceil(len(text) / _ALIGNMENT) * _ALIGNMENT
    text = text.ljust(max(aligned, least_bytes - _LENGTH_BYTES))
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _mapped_frames(path: Path) -> npt.NDArray[Any]:
    """The tensor `frames` of a file, mapped. Raises `ValueError` or `KeyError` if this store did not write the file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        entry = json.loads(file.read(min(length, _HEADER_BYTES)))["frames"]
    dtype, shape = _FRAME_DTYPES[entry["dtype"]], tuple(entry["shape"])
    if not np.prod(shape, dtype=np.int64):  # an empty file part cannot be mapped
        return np.empty(shape, dtype)
    first_byte = _LENGTH_BYTES + length + entry["data_offsets"][0]
    return np.memmap(path, dtype, "r", first_byte, shape).view(np.ndarray)


def prune(
    store: Store, *, older_than_days: int | None = None, model: str | None = None, everything: bool = False
) -> tuple[int, int]:
    """Remove the chosen embeddings, and the parts that killed runs left.

    Args:
        store: The store.
        older_than_days: Choose shards that were not used for so long.
        model: Choose shards of this model, by file name or the start of its SHA-256.
        everything: Choose every shard.

    Returns:
        Shards removed, and bytes freed. With an age and a model only shards that fit both are removed; with neither, none.
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
