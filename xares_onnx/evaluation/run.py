"""One evaluation in progress: task after task is embedded, trained, scored and kept."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from ..data.catalog import Digests, has_data, missing_data
from ..data.selection import TaskData, prepare
from ..data.shards import Clips
from ..data.task import Task
from ..embedding.embed import EmbedSpec, embed_shards, shard_specs, shards_of_tap
from ..embedding.store import Store
from ..encoder.encoder import Encoder
from ..errors import DataError, MachineError, ModelError, ScoreUndefinedError, XaresError
from ..metrics.intervals import Estimate
from ..probes.tuning import remarks
from ..progress import Note, Observer, Progress
from ..scoring import scoring
from ..scoring.dataset import Dataset, assemble, check_drops
from ..scoring.folds import make_folds
from ..scoring.kinds import Kind, Tools, kind_of
from ..scoring.kinds.classes import Classes
from ..scoring.mixing import MIX, NotMixedError, StoredTap, mixed
from ..scoring.protocol import Protocol, ProtocolName
from ..scoring.scoring import Predictions
from ..scoring.shots import Shots, score_shots
from . import record as results
from .averages import averages
from .planning import check_disk
from .record import Seconds, Status, TaskResult, prediction_file
from .settings import Method, Settings

_NO_CLIPS = Clips(expected=0, read=0, dropped=[])


@dataclass(frozen=True)
class _Shared:
    """What all records of a task and tap share, as far as it is known when a record is made."""

    tap: str | None
    data_digest: str | None = None
    rtf: float | None = None
    embed_seconds: float = 0
    clips: Clips = _NO_CLIPS
    audio_hours: float = 0.0
    comparable: bool = True
    notes: tuple[str, ...] = ()


class Run:
    """One evaluation: runs tasks by `all`, and holds their results, predictions and errors."""

    def __init__(
        self, encoder: Encoder, settings: Settings, tools: Tools, cache: Path, output: Path | None, observer: Observer
    ) -> None:
        self._encoder = encoder
        self._tools = tools
        self._settings = settings
        self._protocol = Protocol(settings.protocol)
        self._store = Store(cache / "store")
        self._digests = Digests(cache)
        self._output = output
        self._observer = observer
        self.results: list[TaskResult] = []
        self.predictions: dict[tuple[str, str], Predictions] = {}
        self.errors: list[XaresError] = []
        self._tasks: list[Task] = []
        self._taps = [tap.name for tap in encoder.info.taps] + [MIX] * settings.mix
        self._estimates: list[dict[tuple[str, str], Estimate]] = [{} for _ in self._taps]

    def averages(self, tap: int) -> results.Averages:
        """The averages over the tasks, of the embeddings by tap number `tap`."""
        name = self._name(tap)
        return averages(
            [r for r in self.results if r.tap == name], self._estimates[tap], self._tasks, self._settings.protocol
        )

    def averages_by_tap(self) -> dict[str, results.Averages]:
        """The same for every tap, the mix included."""
        return {name: self.averages(tap) for tap, name in enumerate(self._taps)}

    def _name(self, tap: int) -> str | None:
        """The name of tap number `tap` in a record: None for the first, which is the model's output or stands in for it."""
        return self._taps[tap] if tap else None

    def all(self, selection: Sequence[tuple[Task, Path]]) -> None:
        """Evaluate every task, each given with the folder of its data.

        An error in the data ends its task; one of the model or the machine ends the run. `errors` keeps both, and every
        task has its records in `results` nonetheless.
        """
        self._tasks = [task for task, _ in selection]
        for number, (task, folder) in enumerate(selection):
            if not has_data(task, folder):  # only in a suite: the data of named tasks were checked before
                self._without_score(task, "skipped", missing_data(task, folder))
                continue
            try:
                self._evaluate(task, folder)
            except DataError as error:
                self.errors.append(error)
                self._without_score(task, "failed", str(error))
            except (ModelError, MachineError) as error:  # no further task can succeed
                self.errors.append(error)
                self._without_score(task, "failed", str(error))
                for later, _ in selection[number + 1 :]:
                    self._without_score(later, "skipped", f"not run, because the run ended at {task.name}: {error}")
                return

    def _evaluate(self, task: Task, folder: Path) -> None:
        started = time.perf_counter()
        taps = self._encoder.info.taps
        frames = kind_of(task).needs_frames
        if frames and all(tap.contract.clip_only for tap in taps):
            self._without_score(task, "not_applicable", _no_frames(task))
            return
        data = prepare(task, folder, self._digests, self._settings.limit, self._observer)
        plans, crops = list(data.plans.values()), self._protocol.crops(task)
        specs = shard_specs(self._encoder, task.name, plans, crops, self._store, frames=frames)
        if frames and len(taps) > 1:
            check_disk(self._encoder, data, specs, self._store, self._observer)
        shards, reports = embed_shards(self._encoder, specs, self._store, self._observer)
        embed_seconds = time.perf_counter() - started
        data_digest = data.digest()
        audio_seconds = sum(report.audio_seconds for report in reports)
        rtf = sum(report.seconds for report in reports) / audio_seconds if audio_seconds else None
        for number, tap in enumerate(taps):
            if number:
                shards = shards_of_tap(specs, self._store, number)
            shared = _Shared(self._name(number), data_digest, rtf, embed_seconds)
            if frames and tap.contract.clip_only:
                self._without_score(task, "not_applicable", _no_frames(task), shared)
            else:
                self._score_tap(data, assemble(data, shards), number, self._tools_of(task, specs.values(), number), shared)
        if self._settings.mix:
            self._score_mix(data, specs, replace(shared, tap=MIX))

    def _score_mix(self, data: TaskData, specs: Mapping[Path, EmbedSpec], shared: _Shared) -> None:
        """Score the head on the mix of all taps, which comes after the last of them."""
        taps = [
            StoredTap(tap.name, tap.contract, {path: spec.key(number) for path, spec in specs.items()})
            for number, tap in enumerate(self._encoder.info.taps)
        ]
        try:
            mix = mixed(data, taps, self._store)
        except NotMixedError as error:
            self._without_score(data.task, "not_applicable", str(error), shared)
            return
        self._note(data.task, mix.notes)
        tools = replace(self._tools, layers=mix.layers)
        self._score_tap(data, mix.dataset, len(taps), tools, replace(shared, notes=tuple(mix.notes)))

    def _score_tap(self, data: TaskData, dataset: Dataset, number: int, tools: Tools, shared: _Shared) -> None:
        """Score every method on the embeddings by tap number `number`."""
        task = data.task
        kind_of_task = kind_of(task)
        shared = replace(shared, clips=dataset.clips, audio_hours=dataset.audio_seconds / 3600)
        losses = []
        try:
            check_drops(dataset)
        except DataError as error:
            if not self._settings.allow_drops:
                self.errors.append(error)
                self._without_score(task, "failed", str(error), shared)
                return
            losses = [f"{len(dataset.clips.dropped)} of {dataset.clips.expected} clips were dropped", *dataset.damage]
        strata = kind_of_task.strata(dataset.labels)
        shards = data.shard_digests()
        folds, notes = make_folds(self._protocol, task, dataset.parts, shards, dataset.keys, strata, dataset.groups)
        if dataset.group_note:
            notes = [*notes, dataset.group_note]
        if outside := dataset.clips.events_outside:
            notes = [*notes, f"{outside} events are of no class of the vocabulary, and are left out"]
        notes = [*losses, *notes]
        self._note(task, notes)
        notes = [*shared.notes, *notes]
        shared = replace(shared, comparable=self._settings.limit is None and not losses, notes=tuple(notes))
        kind = kind_of_task(task, self._protocol, dataset, folds, tools)
        if reason := kind.why_undefined():
            self._undefined(task, self._methods(task, shared.tap), reason, shared)
        elif reason := kind.why_not_applicable():
            self._without_score(task, "not_applicable", reason, shared)
        else:
            for method in self._methods(task, shared.tap):
                self._score(kind, method, number, shared)
            self._compare_methods(kind, number)

    def _tools_of(self, task: Task, specs: Iterable[EmbedSpec], tap: int) -> Tools:
        contract, protocol = self._encoder.info.taps[tap].contract, self._settings.protocol
        identity = msgspec.json.encode([task.digest(), protocol, [spec.key(tap) for spec in specs]])
        return replace(
            self._tools,
            hop_seconds=contract.hop_samples / contract.sample_rate if contract.hop_samples else None,
            identity=hashlib.sha256(identity).hexdigest(),
        )

    def _score(self, kind: Kind, method: Method, tap: int, shared: _Shared) -> None:
        started = time.perf_counter()
        task = kind.task
        try:
            if method == "head":
                steps = kind.steps()
                self._observer(Progress("train", task.name, 0, steps))
                outcomes = kind.train(
                    self._settings.seeds, lambda step: self._observer(Progress("train", task.name, step, steps))
                )
            else:
                outcomes = kind.search()
            trained = time.perf_counter()
            scored = scoring.score(kind, method, outcomes)
        except ScoreUndefinedError as error:
            self._undefined(task, [method], str(error), shared)
            return
        before = remarks(scored.tuning) if scored.tuning else []
        after = [deviation] if method == "head" and (deviation := kind.why_not_comparable()) else []
        self._note(task, [*before, *after])
        shared = replace(shared, comparable=shared.comparable and not after, notes=(*before, *shared.notes, *after))
        method_name = task.head.kind if method == "head" else "knn"
        prediction_name = method_by_tap(method_name, tap)
        self.predictions[task.name, prediction_name] = scored.predictions
        self._estimates[tap][task.name, method_name] = scored.estimate
        train_seconds, score_seconds = trained - started, time.perf_counter() - trained
        shots = self._shots(kind) if method == "head" else []
        several = len(self._encoder.info.taps) > 1
        self.results.append(
            _task_result(
                task,
                method,
                self._settings.protocol,
                shared,
                train_seconds,
                score_seconds,
                status="ok",
                score=scored.score,
                ci95=scored.ci95,
                test_groups=scored.test_groups,
                metrics=scored.metrics,
                per_fold=scored.per_fold,
                per_seed=scored.per_seed,
                n_test=scored.n_test,
                selection=kind.search_selection() if method == "knn" and several else None,
                shots=shots,
                predictions=prediction_file(self._output, task.name, prediction_name) if self._output else None,
                tuning=scored.tuning,
            )
        )

    def _shots(self, kind: Kind) -> list[Shots]:
        """The head's scores with few training clips per class, if the settings ask for them."""
        if not (self._settings.shots and isinstance(kind, Classes)) or kind.tools.layers:
            return []
        name = kind.task.name
        shots = score_shots(
            kind, self._settings.shots, lambda fitted, of: self._observer(Progress("shots", name, fitted, of))
        )
        for row in shots:
            if row.note:
                self._observer(Note(f"{name}, {row.clips_per_class} clips per class: {row.note}"))
        return shots

    def _compare_methods(self, kind: Kind, tap: int) -> None:
        """Note on a task's head if its own kNN does better; only under `corrected`, whose heads belong to the embeddings."""
        task, name = kind.task, self._name(tap)
        methods = task.head.kind, "knn"
        head, knn = (self.predictions.get((task.name, method_by_tap(method, tap))) for method in methods)
        if head is None or knn is None or not self._protocol.corrected:
            return
        if note := scoring.below_neighbours(kind, head, knn):
            self._note(task, [note])
            self.results = [
                msgspec.structs.replace(record, notes=[note, *record.notes])
                if (record.task, record.method, record.tap) == (task.name, task.head.kind, name)
                else record
                for record in self.results
            ]

    def _note(self, task: Task, notes: Iterable[str]) -> None:
        for note in notes:
            self._observer(Note(f"{task.name}: {note}"))

    def _undefined(self, task: Task, methods: Sequence[Method], reason: str, shared: _Shared) -> None:
        self.errors.append(ScoreUndefinedError(f"{task.name} has no score: {reason}"))
        protocol = self._settings.protocol
        self.results += [
            _task_result(task, method, protocol, shared, status="undefined", reason=reason) for method in methods
        ]

    def _methods(self, task: Task, tap: str | None) -> list[Method]:
        return [method for method in self._settings.methods if method == "head" or (task.knn and tap != MIX)]

    def _without_score(self, task: Task, status: Status, reason: str, shared: _Shared | None = None) -> None:
        """Record why a task has no score: by the tap of `shared`, else by every tap."""
        taps = [shared] if shared else [_Shared(self._name(tap)) for tap in range(len(self._taps))]
        self.results += [
            _task_result(task, method, self._settings.protocol, of_tap, status=status, reason=reason)
            for of_tap in taps
            for method in self._methods(task, of_tap.tap)
        ]


def method_by_tap(method: str, tap: int) -> str:
    """The name of a method's predictions by one tap: tap 0 is the model's output, or the first of the named ones."""
    return f"{method}.{tap}" if tap else method


def _no_frames(task: Task) -> str:
    return f"{task.kind} are learnt from frames, and this encoder gives one vector a clip"


def _task_result(
    task: Task,
    method: Method,
    protocol: ProtocolName,
    shared: _Shared,
    train_seconds: float = 0,
    score_seconds: float = 0,
    **fields: Any,
) -> TaskResult:
    return TaskResult(
        task=task.name,
        title=task.title,
        domain=task.domain,
        method=task.head.kind if method == "head" else "knn",
        tap=shared.tap,
        metric=task.score.metric,
        higher_is_better=task.score.higher_is_better,
        weight=task.weight_under(protocol),
        comparable=shared.comparable,
        clips=shared.clips,
        notes=list(shared.notes),
        data_digest=shared.data_digest,
        definition_digest=task.digest(),
        seconds=Seconds(embed=shared.embed_seconds, train=train_seconds, score=score_seconds),
        audio_hours=shared.audio_hours,
        rtf=shared.rtf,
        published=task.published_scores(method),
        **fields,
    )
