"""A task's embedded shards to arrays: the clips that a head can be trained and tested on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..data.selection import TaskData
from ..data.shards import MAX_DROP_SHARE, MAX_DROPS, Clips, Drop, parse_label
from ..data.sound_events import Events
from ..data.task import Task
from ..embedding.store import EmbeddedShard
from ..errors import DataError, LabelError, printable
from .folds import Indices

MIN_GROUPED_SHARE = (
    0.9  # of the clips; if fewer name their group, the keys are probably not of the form that the task expects
)


@dataclass(frozen=True)
class Dataset:
    """The usable clips of a task. `keys` are unique over all shards; `parts` are clip indices.

    `labels` has each clip's json as the task's target encodes it. `frames` and `times` hold, for a task that needs them,
    each clip's frames (frames, dim), mapped from the store, and their centres (frames,) in seconds. `groups` names each
    clip's group, such as its speaker, which no division should split: if the task has groups and at least 90 % of the clips
    name theirs. The others are groups of their own. `group_note` says that too few name one.
    """

    embeddings: npt.NDArray[np.float32]  # (crops, dim)
    clip_of_crop: Indices  # (crops,)
    labels: list[Any]
    keys: list[str]
    parts: dict[str, Indices]
    clips: Clips
    audio_seconds: float
    damage: list[str]
    limited: bool = False  # to a few clips per part, by --limit
    seconds: list[float] = field(default_factory=list)
    frames: list[npt.NDArray[Any]] = field(default_factory=list)
    times: list[npt.NDArray[np.float64]] = field(default_factory=list)
    groups: list[str] | None = None
    group_note: str | None = None

    @cached_property
    def group_of_clip(self) -> Indices | None:
        """(clips,) the number of each clip's group, in the order of the groups' names."""
        if self.groups is None:
            return None
        return np.unique(self.groups, return_inverse=True)[1].astype(np.int64)

    def crops_of(self, clips: Indices) -> Indices:
        """The crops of some clips, ascending."""
        wanted = np.zeros(len(self.keys), bool)
        wanted[clips] = True
        return np.flatnonzero(wanted[self.clip_of_crop])


class Spool(Protocol):
    """Takes rows (crops, dim) shard by shard, and gives them as one matrix that memory need not hold."""

    def append(self, rows: npt.NDArray[np.float32]) -> None: ...

    def matrix(self) -> npt.NDArray[np.float32]: ...


def assemble(data: TaskData, shards: Mapping[Path, EmbeddedShard], spool: Spool | None = None) -> Dataset:
    """Concatenate a task's shards; a clip with a label outside the task's vocabulary is one more named drop.

    Args:
        data: The task, its parts, and which clips are selected.
        shards: Embeddings of every shard, by its path.
        spool: Takes the pooled embeddings, if memory should not.

    Returns:
        The clips of all shards, in the order of `shards`.
    """
    chosen: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]] = []
    owners: list[Indices] = []
    labels: list[Any] = []
    seconds: list[float] = []
    frames: list[npt.NDArray[Any]] = []
    times: list[npt.NDArray[np.float64]] = []
    keys: list[str] = []
    groups: list[str | None] = []
    drops: list[Drop] = []
    damage: list[str] = []
    members: dict[str, list[int]] = {part: [] for part in data.parts}
    expected, audio_seconds, outside = 0, 0.0, 0
    for path, shard in shards.items():
        expected += shard.header.expected
        audio_seconds += shard.header.audio_seconds
        drops += [Drop(data.key(path, drop.key), drop.reason) for drop in shard.drops]
        if shard.header.damage:
            damage.append(f"{printable(path.name)}: {shard.header.damage}")
        new_index = np.full(len(shard.clips), -1, np.int64)
        for i, clip in enumerate(shard.clips):
            key = data.key(path, clip.key)
            try:
                label = parse_label(clip.label)
                encoded = data.task.encode(label)
            except LabelError as error:
                drops.append(Drop(key, str(error)))
                continue
            new_index[i] = len(keys)
            for part, paths in data.parts.items():
                selected = data.selected[part]
                if path in paths and (selected is None or (path, clip.key) in selected):
                    members[part].append(len(keys))
            outside += encoded.outside if isinstance(encoded, Events) else 0
            labels.append(encoded)
            seconds.append(clip.seconds)
            keys.append(key)
            groups.append(data.task.data.group_of(clip.key, label))
        owner = new_index[shard.clip_of_crop]
        if spool is None:
            chosen.append((shard.pooled, owner >= 0))
        else:
            spool.append(shard.pooled[owner >= 0])
        owners.append(owner[owner >= 0])
        if shard.frames is not None:
            for crop in np.flatnonzero(owner >= 0):
                rows = slice(shard.frames.offsets[crop], shard.frames.offsets[crop + 1])
                frames.append(shard.frames.values[rows])
                times.append(shard.frames.times[rows])
    named, group_note = _usable_groups(data.task, keys, groups)
    return Dataset(
        embeddings=_stacked(chosen) if spool is None else spool.matrix(),
        clip_of_crop=np.concatenate(owners),
        labels=labels,
        keys=keys,
        parts={part: np.array(clips, np.int64) for part, clips in members.items()},
        clips=Clips(expected=expected, read=len(keys), dropped=drops, events_outside=outside),
        audio_seconds=audio_seconds,
        damage=damage,
        limited=any(chosen is not None for chosen in data.selected.values()),
        seconds=seconds,
        frames=frames,
        times=times,
        groups=named,
        group_note=group_note,
    )


def _stacked(shards: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]]) -> npt.NDArray[np.float32]:
    """The chosen rows of all shards, which are mapped from files: in memory are the matrix and the rows of one shard."""
    counts = [int(rows.sum()) for _, rows in shards]
    matrix = np.empty((sum(counts), shards[0][0].shape[1]), np.float32)
    for end, count, (pooled, rows) in zip(np.cumsum(counts), counts, shards, strict=True):
        matrix[end - count : end] = pooled[rows]
    return matrix


def _usable_groups(task: Task, keys: list[str], groups: list[str | None]) -> tuple[list[str] | None, str | None]:
    """The group of each clip, or a note that too few clips have one."""
    if task.data.group is None:
        return None, None
    grouped = len(groups) - groups.count(None)
    if grouped < MIN_GROUPED_SHARE * len(groups):
        named = repr(task.data.group)
        source = f"a key of the form {named}" if "{group}" in task.data.group else f"{named} in their json"
        return None, (
            f"only {grouped} of {len(groups)} clips have {source}, which names their group, so clips are taken one by one"
        )
    return [key if group is None else group for key, group in zip(keys, groups, strict=True)], None


def check_drops(dataset: Dataset) -> None:
    """Raise `DataError` if so many clips are lost that the score would not be that of the data set."""
    lost, expected = len(dataset.clips.dropped), dataset.clips.expected
    remedy = "repair the data, or accept the loss by --allow-drops"
    if dataset.damage:
        raise DataError(f"a shard is damaged, so clips are lost that nobody can count ({dataset.damage[0]}); {remedy}")
    if lost > MAX_DROPS and lost > MAX_DROP_SHARE * expected:
        first = dataset.clips.dropped[0]
        raise DataError(f"{lost} of {expected} clips were dropped, the first {first.key}: {first.reason}; {remedy}")
