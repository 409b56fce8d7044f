"""Which clips of which shards a task uses."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..errors import DataMissingError, printable
from ..files import Stamp
from ..progress import Observer
from .catalog import Digests, Parts, build_synthetic, find_parts, missing_data
from .shards import index_shard
from .task import Task


class ShardPlan(msgspec.Struct, frozen=True):
    """One shard of a task: its content digest, and the keys to embed (None: all)."""

    path: Path
    digest: str
    stamp: Stamp
    selected: frozenset[str] | None


def key_hash(key: str) -> bytes:
    """What clips are sorted by, for a pseudo-random order that is the same on every machine."""
    return hashlib.sha256(key.encode()).digest()


_Selected = frozenset[tuple[Path, str]]  # (shard, key) of the clips chosen by --limit


@dataclass(frozen=True)
class TaskData:
    """A task with its shards: those of each part, their digests, and which of their clips are used.

    `selected` holds for each part the chosen (shard, key) pairs, None for all; `folder` is `<data folder>/<task name>`.
    """

    task: Task
    folder: Path
    parts: Parts
    plans: dict[Path, ShardPlan]
    selected: dict[str, _Selected | None]

    def key(self, shard: Path, key: str) -> str:
        """A clip's key, unique in the task: keys may repeat in other shards, and shards' names in other folders."""
        return _global_key(self.folder, shard, key)

    def digest(self) -> str:
        """Hex digest of the content of all parts."""
        digests = [[part, [self.plans[path].digest for path in paths]] for part, paths in sorted(self.parts.items())]
        return hashlib.sha256(msgspec.json.encode(digests)).hexdigest()

    def shard_digests(self) -> dict[str, frozenset[str]]:
        """Content digests of each part's shards: parts with a digest in common share its clips."""
        return {part: frozenset(self.plans[path].digest for path in paths) for part, paths in self.parts.items()}


def prepare(
    task: Task,
    folder: Path,
    digests: Digests,
    limit: int | None,
    observer: Observer,
    only: Collection[Path] | None = None,
) -> TaskData:
    """Find a task's shards, digest them, and choose which of their clips to use.

    Args:
        task: A synthetic task's shards are built if they are not there.
        folder: Holds `<task name>/`, as `choose_tasks` returns it.
        digests: Of shards read before.
        limit: Clips per part, chosen by key hash; None for all.
        observer: Receives progress of stage `prepare`.
        only: Shards to plan; the others are not digested. All by default.

    Raises:
        DataMissingError: A part has no shard.
        DataError: A shard cannot be read.
        MachineError: A synthetic task or a digest cannot be written.
    """
    if task.domain == "synthetic":
        build_synthetic(task, folder, observer)
    parts = find_parts(task, folder)
    if parts is None:
        raise DataMissingError(missing_data(task, folder))
    folder = folder / task.name
    planned = {part: [path for path in paths if only is None or path in only] for part, paths in parts.items()}
    stamped = digests.of_parts(task.name, planned, observer)
    selected: dict[str, _Selected | None] = dict.fromkeys(parts)
    if limit is not None:
        for part, paths in parts.items():
            clips = [(path, sample.key) for path in paths for sample in index_shard(path).samples]
            selected[part] = frozenset(sorted(clips, key=lambda clip: key_hash(_global_key(folder, *clip)))[:limit])
    plans = {}
    for path, (digest, stamp) in stamped.items():
        wanted = None
        if limit is not None:
            chosen = [selected[part] or frozenset() for part, paths in parts.items() if path in paths]
            wanted = frozenset(key for of_part in chosen for shard, key in of_part if shard == path)
        plans[path] = ShardPlan(path, digest, stamp, wanted)
    return TaskData(task, folder, parts, plans, selected)


def _global_key(folder: Path, shard: Path, key: str) -> str:
    return f"{printable(shard.relative_to(folder).as_posix())}/{key}"
