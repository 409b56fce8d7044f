"""A task's shards on their way into the store: the jobs of those that are not there yet, and how far they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ..data.selection import TaskData
from ..data.shards import index_shard
from ..data.task import Task
from ..embedding.embed import EmbedSpec, ShardReport, shard_specs, used_samples
from ..embedding.pieces import cut, shard_of
from ..embedding.store import Store
from ..encoder.encoder import Encoder, Reach
from ..engine.jobs import EmbedJob
from ..errors import MachineError
from ..files import make_private
from ..progress import Progress
from ..scoring.kinds import kind_of
from ..scoring.protocol import Protocol

_BYTES_PER_VALUE = 4  # of pooled embeddings; frames are mapped, and not read as a whole


def model_reach(selection: Iterable[tuple[Task, Path]], folders: Sequence[Path], cache: Path) -> Reach:
    """What a model's process reads and writes to embed the tasks of a selection, whose shards lie in `folders`.

    The store is made, since a process can be given only what is there when it starts.
    """
    store = cache / "store"
    with suppress(MachineError):  # whoever writes there will say so
        make_private(store)
    return Reach([cache, *(folder / task.name for task, folder in selection), *folders], [store])


@dataclass
class TaskShards:
    """The shards of a task.

    `keys` holds for each tap the store's name of every shard, and `specs` the work of each, by the first tap's name. `clips`
    holds the number of clips of each shard that was not stored, or of each of its pieces, and `told` how many are done.
    """

    task: str
    keys: list[dict[Path, str]]
    specs: dict[str, EmbedSpec]
    stored_clips: int = 0
    clips: dict[str, int] = field(default_factory=dict)
    told: dict[str, int] = field(default_factory=dict)
    reports: list[ShardReport] = field(default_factory=list)

    def progress(self) -> Progress:
        done = self.stored_clips + sum(self.told.values())
        return Progress("embed", self.task, done, self.stored_clips + sum(self.clips.values()))

    def missing(self, store: Store, own: Mapping[Path, frozenset[int]] | None = None) -> list[EmbedJob]:
        """The jobs of shards that are not in the store, of equal shards once.

        Args:
            store: The store. Pieces of a shard that are there are no jobs.
            own: Numbers of the pieces to embed of each shard; all by default.
        """
        jobs: dict[str, list[EmbedJob]] = {}
        numbers: dict[str, set[int]] = {}
        for path, key in self.keys[0].items():
            numbers.setdefault(key, set()).update(() if own is None else own[path])
        for path, key in self.keys[0].items():
            header = store.header(key)
            if header is not None and all(of_tap[path] in store for of_tap in self.keys):
                self.stored_clips += header.expected
            elif key not in jobs:
                jobs[key] = self._jobs(key, store, None if own is None else numbers[key])
        return [job for of_shard in jobs.values() for job in of_shard]

    def stored_bytes(self, store: Store) -> int:
        """What the embeddings take in the store once all are there: those that are missing, as far as the others tell."""
        stored = sum(store.size(key) for of_tap in self.keys for key in of_tap.values())
        missing = sum(self.clips.values())
        if self.stored_clips:
            return int(stored * (1 + missing / self.stored_clips))
        spec = next(iter(self.specs.values()))
        return missing * sum(_BYTES_PER_VALUE * tap.contract.dim for tap in spec.model.info.taps)

    def again(self, lacking: Iterable[str], store: Store) -> list[EmbedJob]:
        """The jobs of shards that are gone from the store, or damaged there."""
        jobs = []
        for key in lacking:
            counted = key in self.clips
            of_shard = self._jobs(key, store, None)
            jobs += of_shard
            for job in of_shard:
                self.told.pop(job.key, None)
            self.stored_clips -= 0 if counted else sum(clips for name, clips in self.clips.items() if shard_of(name) == key)
        return jobs

    def _jobs(self, key: str, store: Store, own: set[int] | None) -> list[EmbedJob]:
        """One job for a shard; or one for each of its pieces that is not stored, and one that joins all."""
        spec = self.specs[key]
        samples = used_samples(index_shard(spec.shard), spec.selected)
        weights = [float(sample.audio.size) for sample in samples]
        pieces = cut([sample.audio.size for sample in samples], spec.piece_bytes)
        embedding = [(number, piece) for number, piece in enumerate(pieces) if own is None or number in own]
        if not embedding:
            return []
        if len(pieces) == 1:
            self.clips[key] = len(samples) if spec.selected is None else len(spec.selected)
            return [EmbedJob(key=key, spec=spec, clips=self.clips[key], weight=sum(weights))]
        jobs = []
        taps = [spec.key(tap) for tap in range(len(self.keys))]
        for _, piece in embedding:
            name, clips = piece.name(key), piece.stop - piece.first
            self.clips[name] = clips
            if all(piece.name(of_tap) in store for of_tap in taps):
                self.told[name] = clips
                continue
            of_piece = msgspec.structs.replace(spec, piece=piece)
            # The mean of all, so that an encoder takes one piece after another of a shard that it has indexed.
            jobs.append(EmbedJob(key=name, spec=of_piece, clips=clips, weight=sum(weights) / len(pieces)))
        self.clips[key] = 0  # a join embeds none
        join = EmbedJob(
            key=key,
            spec=spec,
            clips=0,
            weight=sum(weights),
            needs=tuple(job.key for job in jobs),
            joins=tuple(pieces),
            complete=len(embedding) == len(pieces),
        )
        return [*jobs, join]


def task_shards(encoder: Encoder, data: TaskData, protocol: Protocol, store: Store) -> TaskShards:
    """The shards of a task, as this encoder embeds them."""
    task = data.task
    plans, frames = list(data.plans.values()), kind_of(task).needs_frames
    specs = shard_specs(encoder, task.name, plans, protocol.crops(task), store, frames=frames)
    keys = [{path: spec.key(tap) for path, spec in specs.items()} for tap in range(len(encoder.info.taps))]
    return TaskShards(task.name, keys, {keys[0][path]: spec for path, spec in specs.items()})
