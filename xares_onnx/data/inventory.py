"""How much of a task's data is on disk, and whether it is intact."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from ..errors import DataError, DataMissingError
from ..files import BEAT_BYTES, TEMPORARY_SUFFIX, file_checksum
from ..progress import Observer, Progress, ignore
from . import catalog
from .manifest import Manifest, read_manifest
from .shards import index_shard
from .task import Task


class Damage(msgspec.Struct, frozen=True):
    shard: str
    reason: str


class Check(msgspec.Struct):
    """Shards that were read: compared with their checksums if they were downloaded, else header by header.

    `clips` and `unusable` count those of the latter.
    """

    by_checksum: int = 0
    by_headers: int = 0
    clips: int = 0
    unusable: int = 0
    damaged: list[Damage] = []


class Holding(msgspec.Struct):
    """The data of one task on disk. Downloaded data have `record_bytes` and `license`; `verified` adds `check`."""

    task: str
    on_disk: str
    shards: int = 0
    bytes: int = 0
    lacking: list[str] = []
    unfinished_bytes: int = 0
    record_bytes: int | None = None
    license: str | None = None
    check: Check | None = None


def holding(task: Task, folder: Path) -> Holding:
    """What is on disk of a task's data, by names and sizes."""
    home = folder / task.name
    parts = catalog.shards_on_disk(task, folder)
    shards = {path for paths in parts.values() for path in paths}
    manifest = read_manifest(home)
    return Holding(
        task=task.name,
        on_disk=catalog.on_disk(task, folder),
        shards=len(shards),
        bytes=sum(path.stat().st_size for path in shards),
        lacking=[] if task.domain == "synthetic" else [part for part, paths in parts.items() if not paths],
        unfinished_bytes=sum(path.stat().st_size for path in home.glob(f"*{TEMPORARY_SUFFIX}") if path.is_file()),
        record_bytes=sum(manifest.wanted.values()) if manifest else None,
        license=manifest.license if manifest else None,
    )


def verified(task: Task, folder: Path, observer: Observer = ignore) -> Holding:
    """What is on disk of a task's data, with every shard read. A downloaded shard that is gone counts as damaged."""
    held = holding(task, folder)
    home = folder / task.name
    manifest = read_manifest(home) or Manifest("")
    paths = sorted({path for each in catalog.shards_on_disk(task, folder).values() for path in each})
    check, before = Check(), 0
    for path in paths:
        size, beats = path.stat().st_size, itertools.count()

        def beat(before: int = before, size: int = size, beats: Iterator[int] = beats) -> None:
            observer(Progress("verify", task.name, before + min(next(beats) * BEAT_BYTES, size), held.bytes))

        beat()
        if reason := _fault(path, home, manifest, check, beat):
            check.damaged.append(Damage(str(path.relative_to(home)), reason))
        before += size
    observer(Progress("verify", task.name, held.bytes, held.bytes))
    gone = sorted(name for name in manifest.files if not (home / name).exists())
    check.damaged += [Damage(name, "it was downloaded and is gone") for name in gone]
    held.check = check
    return held


def faults(tasks: Sequence[tuple[Task, Holding]], folder: Path, *, complete: bool = False) -> list[DataError]:
    """An error for each task with damaged shards; with `complete`, also for each that lacks some."""
    errors: list[DataError] = []
    for task, held in tasks:
        damaged = held.check.damaged if held.check else []
        if damaged:
            manifest = read_manifest(folder / task.name)
            downloaded = manifest is not None and all(one.shard in manifest.files for one in damaged)
            remedy = f"`xares-onnx download {task.name}` fetches them again" if downloaded else "replace them by intact ones"
            fault = f"{len(damaged)} damaged, first {damaged[0].shard}: {damaged[0].reason}"
            errors.append(DataError(f"{task.name}: {fault}; {remedy}"))
        elif complete and held.lacking:
            errors.append(DataMissingError(catalog.missing_data(task, folder)))
    return errors


def _fault(path: Path, home: Path, manifest: Manifest, check: Check, beat: Callable[[], None]) -> str | None:
    held = manifest.files.get(str(path.relative_to(home)))
    try:
        if held is not None:
            check.by_checksum += 1
            if path.stat().st_size != held.size:
                return f"it has {path.stat().st_size} bytes, but had {held.size} when it was downloaded"
            checksum = file_checksum(path, held.algorithm, beat)
            return None if checksum == held.checksum else f"its checksum is no longer {held.checksum}"
        check.by_headers += 1
        index = index_shard(path)
        check.clips += len(index.samples)
        check.unusable += len(index.drops)
        return index.damage or (None if index.samples else "it has no clip with audio and json")
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except DataError as error:
        return str(error)
