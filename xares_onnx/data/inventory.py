"""What lies on disk of a task's data, what is known of its record, and whether it is still what it was."""

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
    """Shards that were read: against the checksums of their record, or header by header where nothing else is known.

    `clips` and `unusable` are of the latter.
    """

    by_checksum: int = 0
    by_headers: int = 0
    clips: int = 0
    unusable: int = 0
    damaged: list[Damage] = []


class Holding(msgspec.Struct):
    """`record_bytes` and `license` are known of what was downloaded; `check` where it was asked for."""

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
    """What is there, to go by names and sizes."""
    home = folder / task.name
    found = catalog.shards_on_disk(task, folder)
    shards = {path for paths in found.values() for path in paths}
    manifest = read_manifest(home)
    return Holding(
        task=task.name,
        on_disk=catalog.on_disk(task, folder),
        shards=len(shards),
        bytes=sum(path.stat().st_size for path in shards),
        lacking=[] if task.domain == "synthetic" else [part for part, paths in found.items() if not paths],
        unfinished_bytes=sum(path.stat().st_size for path in home.glob(f"*{TEMPORARY_SUFFIX}") if path.is_file()),
        record_bytes=sum(manifest.wanted.values()) if manifest else None,
        license=manifest.license if manifest else None,
    )


def verified(task: Task, folder: Path, observer: Observer = ignore) -> Holding:
    """What is there, every shard read. One that was downloaded and is gone counts as damaged."""
    found = holding(task, folder)
    home = folder / task.name
    manifest = read_manifest(home) or Manifest("")
    paths = sorted({path for each in catalog.shards_on_disk(task, folder).values() for path in each})
    check, before = Check(), 0
    for path in paths:
        size, beats = path.stat().st_size, itertools.count()

        def beat(before: int = before, size: int = size, beats: Iterator[int] = beats) -> None:
            observer(Progress("verify", task.name, before + min(next(beats) * BEAT_BYTES, size), found.bytes))

        beat()
        if reason := _fault(path, home, manifest, check, beat):
            check.damaged.append(Damage(str(path.relative_to(home)), reason))
        before += size
    observer(Progress("verify", task.name, found.bytes, found.bytes))
    gone = sorted(name for name in manifest.files if not (home / name).exists())
    check.damaged += [Damage(name, "it was downloaded and is gone") for name in gone]
    found.check = check
    return found


def faults(tasks: Sequence[tuple[Task, Holding]], folder: Path, *, complete: bool = False) -> list[DataError]:
    """A sentence for every task with damaged shards; with `complete`, for every one that lacks some too."""
    errors: list[DataError] = []
    for task, found in tasks:
        damaged = found.check.damaged if found.check else []
        if damaged:
            known = read_manifest(folder / task.name)
            again = known is not None and all(one.shard in known.files for one in damaged)
            how = f"`xares-onnx download {task.name}` fetches them again" if again else "replace them by good ones"
            said = f"{len(damaged)} damaged, first {damaged[0].shard}: {damaged[0].reason}"
            errors.append(DataError(f"{task.name}: {said}; {how}"))
        elif complete and found.lacking:
            errors.append(DataMissingError(catalog.missing_data(task, folder)))
    return errors


def _fault(path: Path, home: Path, manifest: Manifest, check: Check, beat: Callable[[], None]) -> str | None:
    held = manifest.files.get(str(path.relative_to(home)))
    try:
        if held is not None:
            check.by_checksum += 1
            if path.stat().st_size != held.size:
                return f"it has {path.stat().st_size} bytes, and had {held.size} when it was downloaded"
            found = file_checksum(path, held.algorithm, beat)
            return None if found == held.checksum else f"its checksum is not {held.checksum} any more"
        check.by_headers += 1
        index = index_shard(path)
        check.clips += len(index.samples)
        check.unusable += len(index.drops)
        return index.damage or (None if index.samples else "it holds no clip with audio and json")
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except DataError as error:
        return str(error)
