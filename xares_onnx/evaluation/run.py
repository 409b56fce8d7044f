"""One evaluation in progress: its tasks become jobs, an engine runs them, and their outcomes are collected."""

from __future__ import annotations

import functools
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ..data.catalog import Digests, has_data, missing_data
from ..data.selection import TaskData, prepare
from ..data.shards import index_shard
from ..data.task import Task
from ..embedding.embed import EmbedSpec, ShardReport, shard_specs
from ..embedding.store import Store
from ..encoder.encoder import Encoder
from ..encoder.worker import Worker
from ..engine.engine import Desk, Engine, Planned, Unplanned, drive
from ..engine.jobs import AnyJob, AnyReport, EmbedJob, HeadJob, HeadReport
from ..engine.scheduler import Scheduler
from ..errors import DataError, MachineError, ModelError, XaresError
from ..metrics.intervals import Estimate
from ..progress import Event, Note, Observer, Progress
from ..scoring.kinds import kind_of
from ..scoring.protocol import Protocol
from ..scoring.scoring import Predictions
from . import record as results
from .averages import averages
from .planning import check_disk, head_weight
from .record import TaskResult, prediction_file
from .settings import Settings
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

_MOST_LACKING = 3  # times that a task's embeddings may vanish from the store between two jobs


@dataclass
class _TaskInProgress:
    """A task that has jobs.

    `clips` holds the number of each shard that is not stored yet, by the shard's key, and `told` how many of them a running
    job has done.
    """

    task: Task
    specs: dict[str, EmbedSpec]
    head: HeadJob
    outcome: Path
    clips: dict[str, int]
    stored_clips: int
    told: dict[str, int] = field(default_factory=dict)
    reports: list[ShardReport] = field(default_factory=list)
    times_lacking: int = 0

    def progress(self) -> Progress:
        done = self.stored_clips + sum(self.told.values())
        return Progress("embed", self.task.name, done, self.stored_clips + sum(self.clips.values()))


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
        self._estimates: list[dict[tuple[str, str], Estimate]] = [{} for _ in encoder.info.taps]

    def averages(self, tap: int) -> results.Averages:
        """The averages over the tasks, of the embeddings by tap number `tap`."""
        name = self._name(tap)
        of_tap = [record for record in self.results if record.tap == name]
        return averages(of_tap, self._estimates[tap], list(self._tasks.values()), self._settings.protocol)

    def _name(self, tap: int) -> str | None:
        """The name of tap number `tap` in a record: None for the first, which is the model's output or stands in for it."""
        return self._encoder.info.taps[tap].name if tap else None

    def all(self, selection: Sequence[tuple[Task, Path]], engine: Engine) -> None:
        """Evaluate every task, each given with the folder of its data.

        An error in the data ends its task; one of the model or the machine ends the run, except for the heads of tasks that
        are embedded already. `errors` keeps both, and every task has its records in `results` nonetheless.
        """
        self._tasks = {task.name: task for task, _ in selection}
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
                planned = self._jobs(task, prepare(task, folder.absolute(), self._digests, self._settings.limit, watch), watch)
            except (DataError, ModelError, MachineError) as error:
                yield Unplanned(task.name, error)
            else:
                yield Planned(planned)

    def _tell(self, desk: Desk, task: Task, event: Event) -> None:
        desk.tell(functools.partial(self._heard, task.name, event))

    def _jobs(self, task: Task, data: TaskData, watch: Observer) -> list[AnyJob]:
        """The jobs of a task: one per shard that is not stored, and its head's."""
        taps = self._encoder.info.taps
        frames, crops = kind_of(task).needs_frames, self._protocol.crops(task)
        specs = shard_specs(self._encoder, task.name, list(data.plans.values()), crops, self._store, frames=frames)
        if frames and len(taps) > 1:
            with Worker() as reader:
                check_disk(Encoder(self._encoder.spec, reader), data, specs, self._store, watch)
        keys = [{path: spec.key(tap) for path, spec in specs.items()} for tap in range(len(taps))]
        shards: list[EmbedJob] = []
        stored_clips = 0
        for path, spec in specs.items():
            header = self._store.header(keys[0][path])
            if header is not None and all(of_tap[path] in self._store for of_tap in keys):
                stored_clips += header.expected
            else:
                shards.append(_embed_job(keys[0][path], spec))
        shards = list({job.key: job for job in reversed(shards)}.values())[::-1]  # equal shards of a task are one
        outcome = self._scratch / f"{task.name}.npz"
        score = ScoreSpec(
            data=data,
            taps=tuple(
                TapShards(name=self._name(number), contract=tap.contract, keys=keys[number])
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
            memory=sum(self._store.size(key) for of_tap in keys for key in of_tap.values()),
            needs=tuple(job.key for job in shards),
        )
        self._in_progress[task.name] = progress = _TaskInProgress(
            task,
            {keys[0][path]: spec for path, spec in specs.items()},
            head,
            outcome,
            {job.key: job.clips for job in shards},
            stored_clips,
        )
        watch(progress.progress())
        return [*shards, head]

    # ---------------------------------------------------------------- what the driver reports

    def told(self, job: AnyJob, event: Event) -> None:
        if isinstance(job, HeadJob):
            self._all_embedded(self._in_progress[job.group])
        if isinstance(job, HeadJob) or not isinstance(event, Progress):  # a head's notes are in its outcome too
            self._observer(event)
            return
        for of_task in self._tasks_of(job):
            of_task.told[job.key] = event.done
            self._observer(of_task.progress())

    def _all_embedded(self, of_task: _TaskInProgress) -> None:
        """Say so, if a shard was stored while the task was planned, by another task or another run."""
        if of_task.told != of_task.clips:
            of_task.told = dict(of_task.clips)
            self._observer(of_task.progress())

    def _heard(self, task: str, event: Event) -> None:
        if isinstance(event, Note):
            self._task_notes.setdefault(task, []).append(event.text)
        self._observer(event)

    def done(self, job: AnyJob, report: AnyReport) -> Iterable[AnyJob]:
        if isinstance(job, EmbedJob):
            assert isinstance(report, ShardReport)
            for of_task in self._tasks_of(job):
                of_task.told[job.key] = of_task.clips[job.key]
                self._observer(of_task.progress())
            self._in_progress[job.group].reports.append(report)
            return []
        assert isinstance(report, HeadReport)
        of_task = self._in_progress[job.group]
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
        for of_task in self._tasks_of(job):
            of_task.told.pop(job.key, None)
        what = "embedded" if isinstance(job, EmbedJob) else "trained"
        self._observer(Note(f"{job.group}: {error}; what it worked on is {what} again"))

    def _again(self, of_task: _TaskInProgress, lacking: Sequence[str]) -> list[AnyJob]:
        """The jobs for shards whose embeddings are gone from the store, or damaged there, and the head's again."""
        of_task.times_lacking += 1
        if of_task.times_lacking > _MOST_LACKING:
            raise RuntimeError(f"the store lost {lacking[0]} right after it was written")
        shards = [_embed_job(key, of_task.specs[key]) for key in lacking]
        for job in shards:
            if job.key not in of_task.clips:
                of_task.stored_clips -= job.clips
            of_task.clips[job.key] = job.clips
            of_task.told.pop(job.key, None)
        of_task.head = msgspec.structs.replace(of_task.head, needs=tuple(lacking))
        return [*shards, of_task.head]

    def _tasks_of(self, job: AnyJob) -> list[_TaskInProgress]:
        """The tasks that need a shard, or a head's own."""
        if isinstance(job, HeadJob):
            return []
        return [of_task for of_task in self._in_progress.values() if job.key in of_task.clips]

    # ---------------------------------------------------------------- results

    def _collect(self, task: Task) -> None:
        outcome = self._outcomes.get(task.name)
        if outcome is None:
            assert self._end is not None
            name, error = self._end
            outcome = self._unscored(task, "skipped", f"not run, because the run ended at {name}: {error}")
        in_progress = self._in_progress.get(task.name)
        reports = in_progress.reports if in_progress else []
        embed_seconds, audio = sum(r.seconds for r in reports), sum(r.audio_seconds for r in reports)
        taps = [self._name(number) for number in range(len(self._encoder.info.taps))]
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
        taps = [Shared(self._name(tap)) for tap in range(len(self._encoder.info.taps))]
        return Outcome(without_score(task, self._settings, taps, status, reason))


def _embed_job(key: str, spec: EmbedSpec) -> EmbedJob:
    samples = index_shard(spec.shard).samples
    chosen = [sample for sample in samples if spec.selected is None or sample.key in spec.selected]
    clips = len(samples) if spec.selected is None else len(spec.selected)
    return EmbedJob(key=key, spec=spec, clips=clips, weight=float(sum(sample.audio.size for sample in chosen)))
