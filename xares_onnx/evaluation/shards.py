"""A task's shards on their way into the store: the jobs of those that are not there yet, and how far they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..data.selection import TaskData
from ..data.shards import index_shard
from ..data.task import Task
from ..embedding.embed import EmbedSpec, ShardReport, shard_specs
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
    holds the number of clips of each shard that was not stored, and `told` how many of them are done.
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

    def missing(self, store: Store) -> list[EmbedJob]:
        """The jobs of shards that are not in the store, of equal shards one."""
        jobs: dict[str, EmbedJob] = {}
        for path, key in self.keys[0].items():
            header = store.header(key)
            if header is not None and all(of_tap[path] in store for of_tap in self.keys):
                self.stored_clips += header.expected
            elif key not in jobs:
                jobs[key] = self._job(key)
        return list(jobs.values())

    def stored_bytes(self, store: Store) -> int:
        """What the embeddings take in the store once all are there: those that are missing, as far as the others tell."""
        stored = sum(store.size(key) for of_tap in self.keys for key in of_tap.values())
        missing = sum(self.clips.values())
        if self.stored_clips:
            return int(stored * (1 + missing / self.stored_clips))
        spec = next(iter(self.specs.values()))
        return missing * sum(_BYTES_PER_VALUE * tap.contract.dim for tap in spec.model.info.taps)

    def again(self, lacking: Iterable[str]) -> list[EmbedJob]:
        """The jobs of shards that are gone from the store, or damaged there."""
        jobs = []
        for key in lacking:
            counted = key in self.clips
            jobs.append(self._job(key))
            self.told.pop(key, None)
            self.stored_clips -= 0 if counted else self.clips[key]
        return jobs

    def _job(self, key: str) -> EmbedJob:
        spec = self.specs[key]
        samples = index_shard(spec.shard).samples
        chosen = [sample for sample in samples if spec.selected is None or sample.key in spec.selected]
        self.clips[key] = len(samples) if spec.selected is None else len(spec.selected)
        weight = float(sum(sample.audio.size for sample in chosen))
        return EmbedJob(key=key, spec=spec, clips=self.clips[key], weight=weight)


def task_shards(encoder: Encoder, data: TaskData, protocol: Protocol, store: Store) -> TaskShards:
    """The shards of a task, as this encoder embeds them."""
    task = data.task
    plans, frames = list(data.plans.values()), kind_of(task).needs_frames
    specs = shard_specs(encoder, task.name, plans, protocol.crops(task), store, frames=frames)
    keys = [{path: spec.key(tap) for path, spec in specs.items()} for tap in range(len(encoder.info.taps))]
    return TaskShards(task.name, keys, {keys[0][path]: spec for path, spec in specs.items()})
