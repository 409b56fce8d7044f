"""From a task's shards to arrays: what is to be embedded, and what of it a head can be trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.selection import TaskData
from ..data.shards import MAX_DROP_SHARE, MAX_DROPS, Clips, Drop, parse_label
from ..data.sound_events import Events
from ..data.task import Task
from ..embedding.store import EmbeddedShard
from ..errors import DataError, LabelError, printable
from .folds import Indices

MIN_GROUPED_SHARE = 0.9  # of the clips; where fewer tell their group, the keys are not those that the task means


@dataclass(frozen=True)
class Dataset:
    """The usable clips of a task. `keys` are unique over all shards; `parts` are clip indices.

    `labels` has what the task's target makes of each clip's json. `frames` and `times` hold, for a task that needs them,
    each clip's frames (frames, dim), mapped from the store, and their centres (frames,) in seconds. `groups` names for each
    clip what must not be split, such as its speaker, if the task says so and at least 90 % of the clips tell; those that do
    not tell are groups of their own. `group_note` says if too few tell.
    """

    embeddings: npt.NDArray[np.float32]  # (crops, dim)
    clip_of_crop: Indices  # (crops,)
    labels: list[Any]
    keys: list[str]
    parts: dict[str, Indices]
    clips: Clips
    audio_seconds: float
    damage: list[str]
    limited: bool = False  # to a few clips a part, by --limit
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
        wanted = np.zeros(len(self.keys), bool)
        wanted[clips] = True
        return np.flatnonzero(wanted[self.clip_of_crop])


def assemble(data: TaskData, shards: Mapping[Path, EmbeddedShard]) -> Dataset:
    """Put the shards together; a clip whose label is not of the task's vocabulary is one more named drop."""
    matrices: list[npt.NDArray[np.float32]] = []
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
                chosen = data.selected[part]
                if path in paths and (chosen is None or (path, clip.key) in chosen):
                    members[part].append(len(keys))
            outside += encoded.outside if isinstance(encoded, Events) else 0
            labels.append(encoded)
            seconds.append(clip.seconds)
            keys.append(key)
            groups.append(data.task.data.group_of(clip.key, label))
        owner = new_index[shard.clip_of_crop]
        matrices.append(shard.pooled[owner >= 0])
        owners.append(owner[owner >= 0])
        if shard.frames is not None:
            for crop in np.flatnonzero(owner >= 0):
                rows = slice(shard.frames.offsets[crop], shard.frames.offsets[crop + 1])
                frames.append(shard.frames.values[rows])
                times.append(shard.frames.times[rows])
    named, group_note = _usable_groups(data.task, keys, groups)
    return Dataset(
        embeddings=np.concatenate(matrices),
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


def _usable_groups(task: Task, keys: list[str], groups: list[str | None]) -> tuple[list[str] | None, str | None]:
    """The group of each clip, or why the task's are not used."""
    if task.data.group is None:
        return None, None
    grouped = len(groups) - groups.count(None)
    if grouped < MIN_GROUPED_SHARE * len(groups):
        named = repr(task.data.group)
        what = f"a key of the form {named}" if "{group}" in task.data.group else f"{named} in their json"
        return None, (
            f"only {grouped} of {len(groups)} clips have {what}, which names their group, so clips are taken one by one"
        )
    return [key if group is None else group for key, group in zip(keys, groups, strict=True)], None


def check_drops(dataset: Dataset) -> None:
    """`DataError` where so much is lost that the score would not be that of the data set."""
    lost, expected = len(dataset.clips.dropped), dataset.clips.expected
    remedy = "repair the data, or accept the loss by --allow-drops"
    if dataset.damage:
        raise DataError(f"a shard is damaged, so clips are lost that nobody can count ({dataset.damage[0]}); {remedy}")
    if lost > MAX_DROPS and lost > MAX_DROP_SHARE * expected:
        first = dataset.clips.dropped[0]
        raise DataError(f"{lost} of {expected} clips were dropped, the first {first.key}: {first.reason}; {remedy}")
