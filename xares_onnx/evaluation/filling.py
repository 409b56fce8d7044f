"""The verb `embed`: fill the store with a share of the shards, and nothing else.

Each part finds its share alone, from the names and sizes of the shards, so the parts of a job array need not talk to each
other. Large shards are shared by their pieces. `evaluate` then finds all embeddings in the store.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ..data import audio
from ..data.catalog import (
    Digests,
    build_synthetic,
    cache_folder,
    choose_tasks,
    find_parts,
    has_data,
    missing_data,
    shard_folders,
)
from ..data.selection import prepare
from ..data.shards import index_shard, read_extent
from ..data.task import Task
from ..embedding import pieces
from ..embedding.embed import ShardReport
from ..embedding.store import Store
from ..encoder.encoder import Encoder, open_encoder
from ..encoder.spec import ModelOptions
from ..encoder.worker import Tell
from ..engine.engine import Desk, Planned, Unplanned, drive
from ..engine.jobs import AnyJob, AnyReport, EmbedJob
from ..engine.opening import check_engine, open_engine
from ..engine.scheduler import Scheduler
from ..errors import ClipError, DataError, MachineError, ModelError, UsageError, XaresError
from ..progress import Doing, Event, Note, Observer, Progress, ignore
from ..scoring.kinds import kind_of
from ..scoring.mixing import model_taps
from ..scoring.protocol import Protocol, ProtocolName
from .shards import TaskShards, model_reach, task_shards

_SAMPLED_CLIPS = 24
_DISK_SECONDS = 900.0  # longest silence while a slow disk is read
_MOST_PARTS = 100_000
_Unit = TypeVar("_Unit", str, tuple[str, int])


@dataclass(frozen=True)
class Part:
    """Part `number` of `of`, counted from 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read "I/N". Raises `UsageError`."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        number, of = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= of <= _MOST_PARTS:
            raise UsageError(f"--part {text!r} must read I/N, such as 1/4 for the first of four parts")
        return cls(number, of)


@dataclass
class Filled:
    """What `embed` did: shards of this part, those that it embedded, hours of audio of this part, errors of failed tasks.

    A shard of which the part has pieces counts as one.
    """

    part: Part
    shards: int = 0
    embedded: int = 0
    all_shards: int = 0
    hours: float = 0.0
    errors: list[XaresError] = field(default_factory=list)


def shares(weights: Mapping[_Unit, float], parts: int) -> list[list[_Unit]]:
    """Divide units of work, by their names in order, into runs of about equal weight.

    The division depends on nothing else, so that everyone finds the same. A part is a run because each shard that it has a
    piece of is read for its digest.
    """
    divided: list[list[_Unit]] = [[] for _ in range(parts)]
    total, before = sum(weights[name] for name in sorted(weights)), 0.0
    for name in sorted(weights):
        divided[min(parts - 1, int(before / total * parts)) if total else 0].append(name)
        before += weights[name]
    return divided


def embed(
    model: str | Path,
    tasks: Sequence[str] = (),
    *,
    part: Part = Part(),
    suite: str | None = None,
    data: Path | None = None,
    cache: Path | None = None,
    protocol: ProtocolName = "corrected",
    limit: int | None = None,
    contract: Sequence[str] = (),
    device: str = "auto",
    threads: int | None = None,
    workers: int | None = None,
    engine: str = "local",
    taps: Sequence[str] = (),
    trust: bool = False,
    observer: Observer = ignore,
) -> Filled:
    """Embed a part of the shards that `evaluate` with the same arguments needs.

    Args:
        part: Which part; the parts have about equal hours of audio.
        model, tasks, suite, data, cache, protocol, limit, contract, device, threads, workers, engine, taps, trust, observer:
            As for `evaluate`.

    Returns:
        What was done. An error in the data ends its task and is kept in `errors`; one of the model or the machine ends all.

    Raises:
        UsageError, ModelError, DataMissingError, MachineError: As `evaluate`.
    """
    options = ModelOptions(
        device=device,
        threads=threads,
        workers=workers,
        engine=engine,
        contract=tuple(contract),
        taps=model_taps(taps),
        trust=trust,
    )
    check_engine(engine)
    if protocol not in ("corrected", "xares"):
        raise UsageError(f"protocol {protocol!r} must be corrected or xares")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} must be 1 or more")
    cache = cache_folder(cache).absolute()
    selection = choose_tasks(tasks, suite, data, cache, observer)
    folders = shard_folders(selection)
    with (
        open_encoder(
            model, options, cache=cache, reach=model_reach(selection, folders, cache), observer=observer
        ) as encoder,
        open_engine(encoder, options, cache, folders) as running,
    ):
        filling = _Filling(encoder, part, Protocol(protocol), limit, cache, observer)
        usable = list(filling.usable(selection))
        drive(running, Scheduler(running.slots), functools.partial(filling.plan, usable, filling.share(usable)), filling)
    return filling.filled


class _Filling:
    """A part on its way into the store."""

    def __init__(
        self, encoder: Encoder, part: Part, protocol: Protocol, limit: int | None, cache: Path, observer: Observer
    ) -> None:
        self._encoder = encoder
        self._protocol = protocol
        self._limit = limit
        self._digests = Digests(cache)
        self._store = Store(cache / "store")
        self._observer = observer
        self._in_progress: dict[str, TaskShards] = {}
        self._embedded: set[Path] = set()
        self.filled = Filled(part)

    def usable(self, selection: Sequence[tuple[Task, Path]]) -> Iterator[tuple[Task, Path]]:
        """The tasks that have data, and that this encoder can serve."""
        for task, folder in selection:
            if not has_data(task, folder):
                self._observer(Note(missing_data(task, folder)))
            elif kind_of(task).needs_frames and all(tap.contract.clip_only for tap in self._encoder.info.taps):
                self._observer(Note(f"{task.name} is left out: it needs frames, and this encoder gives one vector per clip"))
            else:
                yield task, folder.absolute()

    def share(self, selection: Sequence[tuple[Task, Path]]) -> dict[Path, frozenset[int]]:
        """The shards of this part, and the numbers of their pieces."""
        paths: dict[str, Path] = {}
        weights: dict[tuple[str, int], float] = {}
        for task, folder in selection:
            if task.domain == "synthetic":
                build_synthetic(task, folder, self._observer)
            parts = find_parts(task, folder) or {}
            sizes = {path: path.stat().st_size for path in sorted({path for paths in parts.values() for path in paths})}
            largest = max(sizes, key=lambda path: (sizes[path], path.name))
            try:
                rate = self._encoder.call(seconds_per_byte, largest, returns=float) if self.filled.part.of > 1 else 1.0
            except DataError:  # it is met again where the shard is embedded
                rate = 1.0
            for path, size in sizes.items():
                name = f"{task.name}/{path.relative_to(folder).as_posix()}"
                paths[name] = path
                count = pieces.most_pieces(size, pieces.PIECE_BYTES)
                weights |= {(name, number): size * rate / count for number in range(count)}
        own: dict[Path, set[int]] = {}
        for name, number in shares(weights, self.filled.part.of)[self.filled.part.number - 1]:
            own.setdefault(paths[name], set()).add(number)
        self.filled.shards, self.filled.all_shards = len(own), len(paths)
        return {path: frozenset(numbers) for path, numbers in own.items()}

    def plan(
        self, selection: Sequence[tuple[Task, Path]], share: Mapping[Path, frozenset[int]], desk: Desk
    ) -> Iterator[Planned | Unplanned]:
        for task, folder in selection:

            def watch(event: Event) -> None:
                desk.tell(functools.partial(self._observer, event))

            try:
                data = prepare(task, folder, self._digests, self._limit, watch, only=share)
                shards = task_shards(self._encoder, data, self._protocol, self._store)
                missing = shards.missing(self._store, share)
            except (DataError, ModelError, MachineError) as error:
                yield Unplanned(task.name, error)
                continue
            self._in_progress[task.name] = shards
            if shards.specs:
                watch(shards.progress())
            yield Planned(missing)

    def told(self, job: AnyJob, event: Event) -> None:
        if not isinstance(event, Progress):
            self._observer(event)
            return
        for shards in self._shards_with(job):
            shards.told[job.key] = event.done
            self._observer(shards.progress())

    def done(self, job: AnyJob, report: AnyReport) -> Iterable[AnyJob]:
        assert isinstance(report, ShardReport)
        assert isinstance(job, EmbedJob)
        if report.audio_seconds or not job.joins:
            self._embedded.add(job.spec.shard)
        self.filled.embedded = len(self._embedded)
        self.filled.hours += report.audio_seconds / 3600
        for shards in self._shards_with(job):
            shards.told[job.key] = shards.clips[job.key]
            self._observer(shards.progress())
        return []

    def failed(self, groups: set[str], error: XaresError) -> None:
        self.filled.errors.append(error)

    def lost(self, job: AnyJob, error: BaseException) -> None:
        self._observer(Note(f"{job.group}: {error}; a new process goes on with it"))

    def _shards_with(self, job: AnyJob) -> list[TaskShards]:
        return [shards for shards in list(self._in_progress.values()) if job.key in shards.clips]


def seconds_per_byte(path: Path, *, tell: Tell) -> float:
    """Seconds of audio per byte of it, of clips at equal steps through the shard. Runs in the worker."""
    tell(Doing("reading the shard", _DISK_SECONDS))
    samples = index_shard(path).samples
    seconds, size = 0.0, 0
    for sample in samples[:: max(1, len(samples) // _SAMPLED_CLIPS)]:
        try:
            seconds += audio.duration(read_extent(path, sample.audio))
        except ClipError:
            continue
        size += sample.audio.size
    return seconds / size if size else 1.0
