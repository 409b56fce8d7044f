"""The clips that tensors are compared on: some of the tasks' own, by key hash, decoded in the worker process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import msgspec
import numpy as np

from ..data import audio
from ..data.selection import TaskData, key_hash
from ..data.shards import index_shard, open_shard
from ..encoder.worker import Array, Beat, Tell
from ..errors import ClipError

_LONGEST = 30.0  # seconds of one clip that are kept


class ShardClips(msgspec.Struct, frozen=True):
    """A shard, and the keys to choose from; None for all."""

    path: Path
    keys: frozenset[str] | None


def shards_of(tasks: Sequence[TaskData]) -> list[ShardClips]:
    """The shards of tasks, each once, in the order of the tasks and of their names."""
    plans = {plan.path: ShardClips(plan.path, plan.selected) for task in tasks for _, plan in sorted(task.plans.items())}
    return list(plans.values())


def read_clips(shards: list[ShardClips], count: int, rate: int, least: int, *, tell: Tell) -> list[Array]:
    """Decode `count` clips, as many of each shard as may be, at `rate` Hz; those that cannot be decoded are passed over.

    A clip of fewer than `least` samples is repeated until it is as long.
    """
    ranked = []
    for number, shard in enumerate(shards):
        tell(Beat())
        samples = [s for s in index_shard(shard.path).samples if shard.keys is None or s.key in shard.keys]
        samples.sort(key=lambda sample: key_hash(sample.key))
        ranked += [(place, number, sample) for place, sample in enumerate(samples[: 2 * count])]
    ranked.sort(key=lambda entry: entry[:2])
    clips: list[Array] = []
    for _, number, sample in ranked:
        if len(clips) == count:
            break
        tell(Beat())
        try:
            with open_shard(shards[number].path) as reader:
                waveform, _ = audio.load(reader.read(sample.audio), rate, nullcontext())
        except ClipError:
            continue
        if not len(waveform) or not waveform.any():
            continue
        waveform = waveform[: round(_LONGEST * rate)]
        repeats = -(-least // len(waveform))
        clips.append(Array.of(waveform if repeats <= 1 else np.tile(waveform, repeats)))
    return clips
