"""The mix of layers as one more tap: the embeddings of several taps side by side, for a head that learns their weights."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.selection import TaskData
from ..data.task import Task
from ..embedding.store import EmbeddedShard, Frames, Store
from ..encoder.contract.contract import Contract
from ..encoder.exposure import ALL_LAYERS
from ..errors import ContractError, UsageError
from ..files import disk_error
from .dataset import Dataset, assemble
from .kinds import kind_of

MIX = "mix"
"""The name of the mix among taps."""


class NotMixedError(Exception):
    """Why the taps cannot be mixed for a task."""


@dataclass(frozen=True)
class StoredTap:
    """A tap by its name, and the store's names of its embeddings, by shard."""

    name: str
    contract: Contract
    keys: Mapping[Path, str]


@dataclass(frozen=True)
class Mix:
    """The layers of a mix, by name, and their embeddings side by side; `notes` say which taps are left out."""

    layers: tuple[str, ...]
    dataset: Dataset
    notes: list[str]


def model_taps(taps: Sequence[str]) -> tuple[str, ...]:
    """The taps that the model must give: all layers, if the mix is asked for alone."""
    others = tuple(tap for tap in taps if tap != MIX)
    return others if others or MIX not in taps else (ALL_LAYERS,)


def check_mix(taps: Sequence[str], *, corrected: bool, heads: bool) -> None:
    """Raise `UsageError` if these taps ask for a mix that cannot be."""
    if MIX not in taps:
        return
    if not corrected:
        raise UsageError("--taps mix is not part of protocol xares; leave --protocol out")
    if not heads:
        raise UsageError("--taps mix learns its weights with a head, which --method knn leaves out; leave --method out")
    if len(others := model_taps(taps)) == 1 and others != (ALL_LAYERS,):
        raise UsageError(f"--taps {','.join(taps)} mixes one tap; name another, or mix alone for all layers")


def check_names(taps: Sequence[str]) -> None:
    """Raise `ContractError` if a tap goes by the name of the mix."""
    if MIX in taps:
        raise ContractError(f"the model has a tap {MIX!r}, as the mix of taps is called; rename that tensor in the model")


def mixed(data: TaskData, taps: Sequence[StoredTap], store: Store) -> Mix:
    """Put the stored embeddings of a task's taps side by side, those with the most common number of dimensions.

    Frames stay in the store and are read when they are needed; means go through a temporary file, so that memory holds one
    shard of all taps.

    Args:
        data: The task.
        taps: All taps of the encoder.
        store: Where their embeddings are kept, and the temporary file.

    Raises:
        NotMixedError: The task has no head that mixes, or the taps cannot be mixed.
        DiskFullError, MachineError: The temporary file cannot be written.
    """
    task = data.task
    if not kind_of(task).mixes:
        raise NotMixedError(
            f"the mix is learned with a head that converges, and that of {task.kind} is trained for a set time; "
            "choose a layer by its own score"
        )
    chosen, notes = _chosen(task, taps)
    with _Spool(store.root) as spool:
        dataset = assemble(data, _SideBySide(chosen, store), spool)
    return Mix(tuple(tap.name for tap in chosen), dataset, notes)


def _chosen(task: Task, taps: Sequence[StoredTap]) -> tuple[list[StoredTap], list[str]]:
    """The taps that can be mixed, and a note on the others."""
    frames = kind_of(task).needs_frames
    usable = [tap for tap in taps if not (frames and tap.contract.clip_only)]
    if len(usable) < 2:
        raise NotMixedError("fewer than two taps give frames, so there is nothing to mix")
    shape = _times_and_dim if frames else _dim
    common = Counter(shape(tap) for tap in usable).most_common(1)[0][0]
    chosen = [tap for tap in usable if shape(tap) == common]
    if len(chosen) < 2:
        raise NotMixedError("no two taps have the same number of dimensions, so there is nothing to mix")
    left = [tap.name for tap in taps if tap not in chosen]
    form = f"{chosen[0].contract.dim} dimensions" + (" and the same frame times" if frames else "")
    return chosen, [f"{', '.join(left)} are not in the mix, whose layers have {form}"] if left else []


def _dim(tap: StoredTap) -> tuple[float | None, ...]:
    return (tap.contract.dim,)


def _times_and_dim(tap: StoredTap) -> tuple[float | None, ...]:
    contract = tap.contract
    return contract.dim, contract.hop_samples, contract.first_frame_center_samples


class _Columns:
    """Frames of several taps side by side, (frames, taps x dim), which stay mapped until `astype` reads them."""

    def __init__(self, parts: Sequence[npt.NDArray[Any]]) -> None:
        self._parts = parts
        self.shape = len(parts[0]), sum(part.shape[1] for part in parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> _Columns:
        return _Columns([part[rows] for part in self._parts])

    def astype(self, dtype: type[np.float32]) -> npt.NDArray[np.float32]:
        return np.concatenate([part.astype(dtype) for part in self._parts], axis=1)


class _SideBySide(Mapping[Path, EmbeddedShard]):
    """Every shard with the embeddings of several taps side by side, read when it is asked for."""

    def __init__(self, taps: Sequence[StoredTap], store: Store) -> None:
        self._taps, self._store = taps, store

    def __len__(self) -> int:
        return len(self._taps[0].keys)

    def __iter__(self) -> Iterator[Path]:
        return iter(self._taps[0].keys)

    def __getitem__(self, path: Path) -> EmbeddedShard:
        parts = []
        for tap in self._taps:
            part = self._store.read(tap.keys[path])
            if part is None:
                raise RuntimeError(f"the store lost {tap.keys[path]} right after it was written")
            parts.append(part)
        first, keys = parts[0], [clip.key for clip in parts[0].clips]
        for part, tap in zip(parts, self._taps, strict=True):
            if [clip.key for clip in part.clips] != keys:
                raise NotMixedError(f"{tap.name} dropped other clips than {self._taps[0].name} did, so they cannot be mixed")
        frames = [part.frames for part in parts if part.frames is not None]
        if any(not np.array_equal(of_tap.offsets, frames[0].offsets) for of_tap in frames):
            raise NotMixedError("the taps give different numbers of frames, so they cannot be mixed")
        columns: Any = _Columns([of_tap.values for of_tap in frames]) if frames else None
        return replace(
            first,
            pooled=np.concatenate([part.pooled for part in parts], axis=1),
            frames=Frames(columns, frames[0].offsets, frames[0].times) if frames else None,
        )


class _Spool:
    """Rows (crops, columns) float32 in a temporary file, which is mapped at the end: a sink of `assemble`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shape = 0, 0

    def __enter__(self) -> _Spool:
        try:
            self._file = tempfile.TemporaryFile(dir=self._folder)
        except OSError as error:
            raise disk_error(error, self._folder) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # what is mapped stays

    def append(self, rows: npt.NDArray[np.float32]) -> None:
        try:
            self._file.write(np.ascontiguousarray(rows, np.float32).data)
            self._file.flush()
        except OSError as error:
            raise disk_error(error, self._folder) from error
        self._shape = self._shape[0] + len(rows), rows.shape[1]

    def matrix(self) -> npt.NDArray[np.float32]:
        if not all(self._shape):
            return np.empty(self._shape, np.float32)
        return np.memmap(self._file, np.float32, "r", shape=self._shape).view(np.ndarray)
