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
from ..embedding.embed import EmbedSpec
from ..embedding.store import EmbeddedShard, Frames, Store
from ..encoder.exposure import ALL_LAYERS
from ..encoder.spec import Tap
from ..errors import ContractError, UsageError
from ..files import disk_error
from .dataset import Dataset, assemble
from .kinds import kind_of

MIX = "mix"
"""The name of the mix among taps."""


class NotMixedError(Exception):
    """Why the taps cannot be mixed for a task."""


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


def check_names(taps: Sequence[Tap]) -> None:
    """Raise `ContractError` if a tap goes by the name of the mix."""
    if any(tap.name == MIX for tap in taps):
        raise ContractError(f"the model has a tap {MIX!r}, as the mix of taps is called; rename that tensor in the model")


def mixed(data: TaskData, specs: Mapping[Path, EmbedSpec], store: Store, taps: Sequence[Tap], cache: Path) -> Mix:
    """Put the stored embeddings of a task's taps side by side, those with the most common number of dimensions.

    Frames stay in the store and are read when they are needed; means go through a temporary file, so that memory holds one
    shard of all taps.

    Args:
        data: The task.
        specs: The unit of work of each shard, all embedded.
        store: Where embeddings are kept.
        taps: All taps of the encoder.
        cache: Folder of the temporary file.

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
    shards = _SideBySide(specs, store, chosen, [taps[number].name for number in chosen])
    with _Spool(cache) as spool:
        dataset = assemble(data, shards, spool)
    return Mix(tuple(taps[number].name for number in chosen), dataset, notes)


def _chosen(task: Task, taps: Sequence[Tap]) -> tuple[list[int], list[str]]:
    """The numbers of the taps that can be mixed, and a note on the others."""
    frames = kind_of(task).needs_frames
    shapes = [(tap.contract.dim, _times(tap) if frames else None) for tap in taps]
    usable = [number for number, tap in enumerate(taps) if not (frames and tap.contract.clip_only)]
    if len(usable) < 2:
        raise NotMixedError("fewer than two taps give frames, so there is nothing to mix")
    common = Counter(shapes[number] for number in usable).most_common(1)[0][0]
    chosen = [number for number in usable if shapes[number] == common]
    if len(chosen) < 2:
        raise NotMixedError("no two taps have the same number of dimensions, so there is nothing to mix")
    left = [tap.name for number, tap in enumerate(taps) if number not in chosen]
    form = f"{common[0]} dimensions" + (" and the same frame times" if frames else "")
    return chosen, [f"{', '.join(left)} are not in the mix, whose layers have {form}"] if left else []


def _times(tap: Tap) -> tuple[Any, ...]:
    """What decides when its frames are."""
    contract = tap.contract
    return contract.hop_samples, contract.first_frame_center_samples


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

    def __init__(self, specs: Mapping[Path, EmbedSpec], store: Store, taps: Sequence[int], names: Sequence[str]) -> None:
        self._specs, self._store, self._taps, self._names = specs, store, taps, names

    def __len__(self) -> int:
        return len(self._specs)

    def __iter__(self) -> Iterator[Path]:
        return iter(self._specs)

    def __getitem__(self, path: Path) -> EmbeddedShard:
        parts = []
        for tap in self._taps:
            part = self._store.read(self._specs[path].key(tap))
            if part is None:
                raise RuntimeError("the store lost embeddings right after they were written")
            parts.append(part)
        first, keys = parts[0], [clip.key for clip in parts[0].clips]
        for part, name in zip(parts, self._names, strict=True):
            if [clip.key for clip in part.clips] != keys:
                raise NotMixedError(f"{name} dropped other clips than {self._names[0]} did, so they cannot be mixed")
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
