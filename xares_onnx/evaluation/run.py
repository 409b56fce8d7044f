"""One evaluation in progress: its tasks become jobs, an engine runs them, and their outcomes are collected."""

from __future__ import annotations

import functools
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..data.catalog import Digests, has_data, missing_data
from ..data.selection import TaskData, prepare
from ..data.task import Task
from ..embedding.embed import ShardReport
from ..embedding.store import Store
from ..encoder.encoder import Encoder
from ..encoder.worker import Worker
from ..engine.engine import Desk, Engine, Planned, Unplanned, drive
from ..engine.jobs import AnyJob, AnyReport, HeadJob
from ..engine.scheduler import Scheduler
from ..errors import DataError, MachineError, ModelError, XaresError
from ..metrics.intervals import Estimate
from ..progress import Event, Note, Observer, Progress
from ..scoring.kinds import kind_of
from ..scoring.mixing import MIX
from ..scoring.protocol import Protocol
from ..scoring.scoring import Predictions
from . import record as results
from .averages import averages
from .planning import check_disk, head_weight
from .record import TaskResult, prediction_file
from .settings import Settings
from .shards import TaskShards, task_shards
from .task_scores import (
    Outcome,
    ScoreSpec,
    Shared,
    TapShards,
    ToolSettings,
    identity,
    method_by_tap,
    no_frames,
    read_outcome,
    score_task,
    without_score,
)

_OLD_SECONDS = 7 * 86_400.0
_MOST_LACKING = 3  # times that a task's embeddings may vanish from the store between two jobs


@dataclass
class _TaskInProgress:
    """A task that has jobs."""

    shards: TaskShards
    head: HeadJob
    outcome: Path
    times_lacking: int = 0


class Run:
    """One evaluation: runs tasks by `all`, and holds their results, predictions, notes and errors, in the tasks' order."""

    def __init__(
        self,
        encoder: Encoder,
        settings: Settings,
        tools: ToolSettings,
        cache: Path,
        output: Path | None,
        observer: Observer,
    ) -> None:
        self._encoder = encoder
        self._tools = tools
        self._settings = settings
        self._protocol = Protocol(settings.protocol)
        cache = cache.absolute()  # jobs run in other processes, which may be in other folders
        self._store = Store(cache / "store")
        self._scratch = cache / "scratch" / secrets.token_hex(8)
        self._digests = Digests(cache)
        self._output = output
        self._observer = observer
        self.results: list[TaskResult] = []
        self.predictions: dict[tuple[str, str], Predictions] = {}
        self.notes: list[str] = []
        self.errors: list[XaresError] = []
        self._tasks: dict[str, Task] = {}
        self._in_progress: dict[str, _TaskInProgress] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._task_notes: dict[str, list[str]] = {}
        self._end: tuple[str, XaresError] | None = None
        self._taps = [tap.name for tap in encoder.info.taps] + [MIX] * settings.mix
        self._estimates: list[dict[tuple[str, str], Estimate]] = [{} for _ in self._taps]

    def averages(self, tap: int) -> results.Averages:
        """The averages over the tasks, of the embeddings by tap number `tap`."""
        name = self._name(tap)
        of_tap = [record for record in self.results if record.tap == name]
        return averages(of_tap, self._estimates[tap], list(self._tasks.values()), self._settings.protocol)

    def averages_by_tap(self) -> dict[str, results.Averages]:
        """The same for every tap, the mix included."""
        return {name: self.averages(tap) for tap, name in enumerate(self._taps)}

    def _name(self, tap: int) -> str | None:
        """The name of tap number `tap` in a record: None for the first, which is the model's output or stands in for it."""
        return self._taps[tap] if tap else None

    def all(self, selection: Sequence[tuple[Task, Path]], engine: Engine) -> None:
        """Evaluate every task, each given with the folder of its data.

        An error in the data ends its task; one of the model or the machine ends the run, except for the heads of tasks that
        are embedded already. `errors` keeps both, and every task has its records in `results` nonetheless.
        """
        self._tasks = {task.name: task for task, _ in selection}
        _remove_old(self._scratch.parent)
        try:
            drive(engine, Scheduler(engine.slots), functools.partial(self._plan, selection), self)
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
        for task, _ in selection:
            self._collect(task)

    # ---------------------------------------------------------------- planning, in a thread of its own

    def _plan(self, selection: Sequence[tuple[Task, Path]], desk: Desk) -> Iterator[Planned | Unplanned]:
        for task, folder in selection:
            if not has_data(task, folder):  # only in a suite: the data of named tasks were checked before
                self._outcomes[task.name] = self._unscored(task, "skipped", missing_data(task, folder))
                continue
            frames = kind_of(task).needs_frames
            if frames and all(tap.contract.clip_only for tap in self._encoder.info.taps):
                self._outcomes[task.name] = self._unscored(task, "not_applicable", no_frames(task))
                continue
            watch = functools.partial(self._tell, desk, task)
            try:
                planned = self._jobs(
                    task, prepare(task, folder.absolute(), self._digests, self._settings.limit, watch), watch
                )
            except (DataError, ModelError, MachineError) as error:
                yield Unplanned(task.name, error)
            else:
                yield Planned(planned)

    def _tell(self, desk: Desk, task: Task, event: Event) -> None:
        desk.tell(functools.partial(self._heard, task.name, event))

    def _jobs(self, task: Task, data: TaskData, watch: Observer) -> list[AnyJob]:
        """The jobs of a task: one per shard that is not stored, and its head's."""
        taps = self._encoder.info.taps
        shards = task_shards(self._encoder, data, self._protocol, self._store)
        if kind_of(task).needs_frames and len(taps) > 1:
            specs = {spec.shard: spec for spec in shards.specs.values()}
            with Worker(self._encoder.worker.walls) as reader:
                check_disk(Encoder(self._encoder.spec, reader), data, specs, self._store, watch)
        missing = shards.missing(self._store)
        outcome = self._scratch / f"{task.name}.npz"
        score = ScoreSpec(
            data=data,
            taps=tuple(
                TapShards(name=self._name(number), contract=tap.contract, keys=shards.keys[number])
                for number, tap in enumerate(taps)
            ),
            settings=self._settings,
            tools=self._tools,
            store=self._store.root,
            outcome=outcome,
        )
        head = HeadJob(
            key=identity(score),
            group=task.name,
            function=score_task,
            arguments=(score,),
            weight=head_weight(data, len(taps)),
            memory=shards.stored_bytes(self._store),
            needs=tuple(job.key for job in missing if job.key in shards.specs),  # a join needs its pieces
        )
        self._in_progress[task.name] = _TaskInProgress(shards, head, outcome)
        watch(shards.progress())
        return [*missing, head]

    # ---------------------------------------------------------------- what the driver reports

    def told(self, job: AnyJob, event: Event) -> None:
        if isinstance(job, HeadJob):
            self._all_embedded(self._in_progress[job.group].shards)
        if isinstance(job, HeadJob) or not isinstance(event, Progress):  # a head's notes are in its outcome too
            self._observer(event)
            return
        for shards in self._shards_with(job):
            shards.told[job.key] = event.done
            self._observer(shards.progress())

    def _all_embedded(self, shards: TaskShards) -> None:
        """Say so, if a shard was stored while the task was planned, by another task or another run."""
        if shards.told != shards.clips:
            shards.told = dict(shards.clips)
            self._observer(shards.progress())

    def _heard(self, task: str, event: Event) -> None:
        if isinstance(event, Note):
            self._task_notes.setdefault(task, []).append(event.text)
        self._observer(event)

    def done(self, job: AnyJob, report: AnyReport) -> Iterable[AnyJob]:
        of_task = self._in_progress[job.group]
        if isinstance(report, ShardReport):
            for shards in self._shards_with(job):
                shards.told[job.key] = shards.clips[job.key]
                self._observer(shards.progress())
            of_task.shards.reports.append(report)
            return []
        if report.lacking:
            return self._again(of_task, report.lacking)
        self._outcomes[job.group] = read_outcome(of_task.outcome)
        of_task.outcome.unlink()
        return []

    def failed(self, groups: set[str], error: XaresError) -> None:
        for name in groups - self._outcomes.keys():
            self._outcomes[name] = self._unscored(self._tasks[name], "failed", str(error))
            self._outcomes[name].errors.append(error)
            if not isinstance(error, DataError):
                self._end = self._end or (name, error)

    def lost(self, job: AnyJob, error: BaseException) -> None:
        for shards in self._shards_with(job):
            shards.told.pop(job.key, None)
        self._observer(Note(f"{job.group}: {error}; a new process goes on with it"))  # no score depends on it: not recorded

    def _again(self, of_task: _TaskInProgress, lacking: Sequence[str]) -> list[AnyJob]:
        """The jobs for shards whose embeddings are gone from the store, or damaged there, and the head's again."""
        of_task.times_lacking += 1
        if of_task.times_lacking > _MOST_LACKING:
            raise RuntimeError(f"the store lost {lacking[0]} right after it was written")
        names = f"{len(lacking)} shard{'' if len(lacking) == 1 else 's'}"
        told = f"{of_task.shards.task}: the stored embeddings of {names} were damaged or gone, and are made anew"
        self._observer(Note(told))  # no score depends on it: not recorded
        of_task.head = msgspec.structs.replace(of_task.head, needs=tuple(lacking))
        return [*of_task.shards.again(lacking, self._store), of_task.head]

    def _shards_with(self, job: AnyJob) -> list[TaskShards]:
        """The shards of each task that waits for this one."""
        return [of_task.shards for of_task in list(self._in_progress.values()) if job.key in of_task.shards.clips]

    # ---------------------------------------------------------------- results

    def _collect(self, task: Task) -> None:
        outcome = self._outcomes.get(task.name)
        if outcome is None:
            assert self._end is not None
            name, error = self._end
            outcome = self._unscored(task, "skipped", f"not run, because the run ended at {name}: {error}")
        in_progress = self._in_progress.get(task.name)
        reports = in_progress.shards.reports if in_progress else []
        embed_seconds, audio = sum(r.seconds for r in reports), sum(r.audio_seconds for r in reports)
        taps = [self._name(number) for number in range(len(self._taps))]
        for record in outcome.results:
            name = method_by_tap(record.method, taps.index(record.tap))
            kept = self._output is not None and name in outcome.predictions
            self.results.append(
                msgspec.structs.replace(
                    record,
                    seconds=msgspec.structs.replace(record.seconds, embed=embed_seconds),
                    rtf=embed_seconds / audio if audio else None,
                    predictions=prediction_file(self._output, task.name, name) if self._output and kept else None,
                )
            )
        self.predictions |= {(task.name, name): arrays for name, arrays in outcome.predictions.items()}
        for of_tap, estimates in zip(self._estimates, outcome.estimates, strict=False):
            of_tap |= {(task.name, method): estimate for method, estimate in estimates.items()}
        self.notes += [*self._task_notes.get(task.name, []), *outcome.notes]
        self.errors += [error for error in outcome.errors if error not in self.errors]

    def _unscored(self, task: Task, status: results.Status, reason: str) -> Outcome:
        """The outcome of a task that has no score by any tap."""
        taps = [Shared(self._name(tap)) for tap in range(len(self._taps))]
        return Outcome(without_score(task, self._settings, taps, status, reason))


def _remove_old(scratch: Path) -> None:
    """Remove what killed runs left; a younger folder may belong to a present run."""
    for folder in scratch.glob("*"):
        try:
            if time.time() - folder.stat().st_mtime > _OLD_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # another run has removed it
            continue
