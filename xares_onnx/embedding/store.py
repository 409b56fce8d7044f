"""The embedding store: one safetensors file per source shard, with a `.jsonl` beside it.

A file's name is a digest of everything that shapes its numbers, so a file that exists is right and whole: both parts are
written under other names, and the tensors are renamed into place last. Two processes may write to the same store. The pieces
of a shard that is embedded in pieces (`pieces`) lie beside it under longer names until they are joined (`joining`).

Frames may be larger than memory: they are written as they come, and mapped when they are read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from ..data.shards import Drop
from ..errors import UsageError
from ..files import TEMPORARY_SUFFIX, disk_error, is_own, made_aside, make_private, remove_own, write_aside
from ..foreign import ForeignFileError, NoFileError, open_regular, read_small
from .pieces import shard_of
from .tensors import HEADER_BYTES, Tensor, tensors_header, tensors_of

STORE_VERSION = 2
_FLOAT16_MAX = 65504.0
_BLUR = 0.01  # float16's largest error in a frame, as a share of the frame's own spread
_COPIED_AT_ONCE = 1 << 22
_MAX_HEADER_LINE = 1 << 20
_MAX_ROWS = 16 << 30
# A folder with this file is a store, and only there does `prune` remove anything. Backups know its first line, and skip it.
_MARKER = "CACHEDIR.TAG"
_MARKER_TEXT = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# Embeddings of xares-onnx; `xares-onnx cache prune` removes files here by their names.\n"
)
_FOLDER = re.compile("[0-9a-f]{2}")
_FILE = re.compile(r"([0-9a-f]{40}(?:\.[0-9]{1,9}-[0-9]{1,9})?)\.(?:safetensors|jsonl)(?:\.[0-9a-f]{8}\.part)?")


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


class _Row(msgspec.Struct, frozen=True):
    """A further line of the `.jsonl`: one of the two."""

    clip: Clip | None = None
    drop: Drop | None = None


_decode_row = msgspec.json.Decoder(_Row).decode


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
        self._make_folder(key)
        write_aside(self._rows(key), b"\n".join(lines) + b"\n", anew=True)
        tensors: dict[str, npt.NDArray[Any]] = {"pooled": shard.pooled, "clip_of_crop": shard.clip_of_crop}
        if spool is not None:
            spool.finish(tensors, self._tensors(key))
        else:
            names = {name: (array.dtype, array.shape) for name, array in tensors.items()}
            data = tensors_header(names) + b"".join(array.tobytes() for array in tensors.values())
            write_aside(self._tensors(key), data, anew=True)

    def spool(self, key: str, dim: int) -> FrameSpool:
        """A file for the frames of a shard, before the shard is whole."""
        self._make_folder(key)
        return FrameSpool(self._tensors(key), dim)

    def copy_frames(self, key: str, spool: FrameSpool) -> None:
        """Append the frames of a stored piece to a spool. Raises `PieceGoneError` if they cannot be read."""
        try:
            with open_regular(self._tensors(key)) as file:
                tensors = tensors_of(file)
                spool.copy(file, tensors["frames"], tensors["offsets"].load(file), tensors["times"].load(file))
        except (ForeignFileError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise PieceGoneError(key) from error

    def read(self, key: str, *, frames: bool = True) -> EmbeddedShard | None:
        """The shard, or None if it is missing or was damaged after it was written.

        Without `frames` these are checked and left where they are: a model's process has no room to map them.
        """
        path = self._tensors(key)
        try:
            with open_regular(path) as file:  # a pipe would be waited for
                tensors = tensors_of(file)
                arrays = {name: tensor.load(file) for name, tensor in tensors.items() if name != "frames"}
            first, *lines = read_small(self._rows(key), _MAX_ROWS).splitlines()
            header = msgspec.json.decode(first, type=Header)
            rows = [_decode_row(line) for line in lines]
            clips = [row.clip for row in rows if row.clip is not None]
            drops = [row.drop for row in rows if row.drop is not None]
            pooled, clip_of_crop = arrays["pooled"], arrays["clip_of_crop"]
            whole = len(clips) + len(drops) == header.expected and len(pooled) == len(clip_of_crop)
            whole = whole and pooled.ndim == 2 and pooled.dtype == np.float32 and bool(np.isfinite(pooled).all())
            whole = whole and set(clip_of_crop.tolist()) == set(range(len(clips)))
            kept = None
            if "offsets" in arrays:
                offsets, times = arrays["offsets"], arrays["times"]
                ends = len(pooled) + 1, len(times), len(times)
                whole = whole and ends == (len(offsets), tensors["frames"].shape[0], int(offsets[-1]))
                kept = Frames(tensors["frames"].mapped(path), offsets, times) if frames else None
        except (ForeignFileError, OSError, ValueError, KeyError, IndexError, TypeError, RecursionError):
            return None
        if not whole or header.store_version != STORE_VERSION:
            return None
        return EmbeddedShard(header, pooled, clip_of_crop, clips, drops, kept)

    def header(self, key: str) -> Header | None:
        """The header of a shard, without reading the rest; None if the shard is missing."""
        if key not in self:
            return None
        try:
            with open_regular(self._rows(key)) as file:
                header = msgspec.json.decode(file.readline(_MAX_HEADER_LINE), type=Header)
        except (ForeignFileError, OSError, msgspec.MsgspecError, RecursionError):
            return None
        return header if header.store_version == STORE_VERSION else None

    def size(self, key: str) -> int:
        """Bytes of a shard's tensors, frames included; 0 if it is missing."""
        try:
            return self._tensors(key).stat().st_size
        except OSError:
            return 0

    def entries(self) -> Iterator[tuple[str, Header, int, float]]:
        """Of every shard, and every piece of one, its key, header, bytes and the time of its last use (since the epoch)."""
        own = dict(self._own_files())
        for tensors, status in own.items():
            rows = tensors.with_suffix(".jsonl")
            if tensors.suffix != ".safetensors" or rows not in own:
                continue
            try:
                with open_regular(rows, links=False) as file:
                    header = msgspec.json.decode(file.readline(_MAX_HEADER_LINE), type=Header)
                yield tensors.stem, header, status.st_size + own[rows].st_size, status.st_mtime
            except (ForeignFileError, OSError, msgspec.MsgspecError, RecursionError):
                continue

    def touch(self, key: str) -> None:
        """Mark a shard as used now, for `cache prune --older-than`."""
        try:
            os.utime(self._tensors(key))
        except OSError:
            pass  # a store on a read-only disk still works

    def remove(self, key: str) -> int:
        """Remove a shard; the bytes that this freed."""
        return sum(remove_own(path) for path in (self._tensors(key), self._rows(key)))

    def pieces(self, key: str) -> list[str]:
        """The names of the pieces of a shard that are there."""
        names = (_FILE.fullmatch(entry.name) for entry in _entries(self._rows(key).parent))
        pieces = {name[1] for name in names if name and shard_of(name[1]) == key != name[1]}
        return sorted(piece for piece in pieces if piece in self)

    def remove_pieces(self, key: str) -> None:
        """Remove the pieces of a shard, which have been joined."""
        for piece in self.pieces(key):
            self.remove(piece)

    def remove_leftovers(self, older_than_seconds: float = 3600) -> int:
        """Remove what killed runs left: parts of files, and pieces of a shard that is there. Younger ones may be in use.

        Returns:
            The bytes that this freed.
        """
        freed, now = 0, time.time()
        known = {key for key, *_ in self.entries()}
        joined = {key for key in known if shard_of(key) != key and shard_of(key) in known}
        for path, status in self._own_files():
            if path.suffix != TEMPORARY_SUFFIX and path.stem in known - joined:
                continue
            if now - status.st_mtime > older_than_seconds:
                freed += remove_own(path)
        return freed

    def check_marked(self) -> None:
        """Raise `UsageError` if files are there and no mark of a store, so that nothing may be removed."""
        try:
            marked = read_small(self.root / _MARKER, links=False) == _MARKER_TEXT
        except NoFileError:
            marked = not _entries(self.root)
        except ForeignFileError:
            marked = False
        if not marked:
            raise UsageError(
                f"{self.root} is not marked as a store of embeddings, so nothing is removed from it; if an earlier version "
                "wrote it, the next `evaluate` that embeds something there marks it"
            )

    def _own_files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """The files that a store writes, with their status: of this user, by their names, and never through a link."""
        for folder in _entries(self.root):
            if not (_FOLDER.fullmatch(folder.name) and folder.is_dir(follow_symlinks=False)):
                continue
            for entry in _entries(folder.path):
                name = _FILE.fullmatch(entry.name)
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:  # another process has renamed or removed it
                    continue
                if name and name[1].startswith(folder.name) and is_own(status):
                    yield self.root / folder.name / entry.name, status

    def _make_folder(self, key: str) -> None:
        make_private(self._rows(key).parent)
        if not (self.root / _MARKER).exists():
            with made_aside(self.root / _MARKER, anew=True) as aside:
                aside.write_bytes(_MARKER_TEXT)

    def _tensors(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.safetensors"

    def _rows(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.jsonl"


class PieceGoneError(Exception):
    """A piece that is being read is gone or damaged."""


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

    def copy(self, source: BinaryIO, frames: Tensor, offsets: npt.NDArray[np.int64], times: npt.NDArray[np.float64]) -> None:
        """Append crops as they are in an open file, not rounded again. Raises `PieceGoneError` if it ends early."""
        if frames.dtype == np.float32 and self._dtype is np.float16:
            self._widen()
        self._copy(source, frames.first_byte, frames.count, frames.dtype)
        self._times.append(times)
        self._offsets += (offsets[1:] + self._frames).tolist()
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
            self._file.write(tensors_header(shapes, HEADER_BYTES))
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
            file.seek(HEADER_BYTES)
        except OSError as error:
            raise disk_error(error, self._path) from error
        return file

    def _end_of_frames(self) -> int:
        return HEADER_BYTES + self._frames * self._dim * np.dtype(self._dtype).itemsize

    def _widen(self) -> None:
        """Replace the file of float16 by one of float32."""
        narrow = self._file
        self._file, self._dtype = self._open(), np.float32
        try:
            self._copy(narrow, HEADER_BYTES, self._frames * self._dim, np.dtype(np.float16))
        except PieceGoneError as error:
            raise disk_error(OSError(errno.EIO, "the file became shorter while it was read"), self._path) from error
        finally:
            self._discard(narrow)

    def _copy(self, source: BinaryIO, first_byte: int, count: int, dtype: np.dtype[Any]) -> None:
        """Append `count` values of another file, in this one's dtype."""
        left = count * dtype.itemsize
        try:
            source.seek(first_byte)
        except OSError as error:
            raise PieceGoneError from error
        while left:
            try:
                block = source.read(min(left, _COPIED_AT_ONCE))
            except OSError as error:
                raise PieceGoneError from error
            if not block:
                raise PieceGoneError
            left -= len(block)
            try:
                self._file.write(np.frombuffer(block, dtype).astype(self._dtype, copy=False).data)
            except OSError as error:
                raise disk_error(error, self._path) from error

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

    Raises:
        UsageError: The folder is not a store.
    """
    store.check_marked()
    removed, freed = set(), store.remove_leftovers()
    for key, header, _, used in list(store.entries()):
        old = older_than_days is None or time.time() - used > older_than_days * 86_400
        named = model is None or header.model == model or header.model_sha256.startswith(model)
        if everything or ((older_than_days is not None or model is not None) and old and named):
            freed += store.remove(key)
            removed.add(shard_of(key))
    return len(removed), freed


def _entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name; nothing if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []
