"""One task from stored embeddings to its records: what a head job does, in a process of its own.

Everything comes from a `ScoreSpec` and the files that it names, and goes to one file, so that it may run anywhere.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from .. import errors
from ..data.selection import TaskData
from ..data.shards import Clips
from ..data.task import Task
from ..embedding.store import EmbeddedShard, Store
from ..encoder.contract.contract import Contract
from ..encoder.worker import Tell
from ..engine.jobs import HeadReport
from ..errors import DataError, MachineError, ScoreUndefinedError, XaresError
from ..files import made_aside
from ..metrics.intervals import Estimate, Scale
from ..probes.tuning import remarks
from ..progress import Note, Progress
from ..scoring import scoring
from ..scoring.dataset import Dataset, assemble, check_drops
from ..scoring.folds import make_folds
from ..scoring.kinds import Kind, Tools, kind_of
from ..scoring.kinds.classes import Classes
from ..scoring.mixing import MIX, NotMixedError, StoredTap, mixed
from ..scoring.protocol import Protocol, ProtocolName
from ..scoring.scoring import Predictions
from ..scoring.shots import Shots, score_shots
from .record import Seconds, Status, TaskResult
from .settings import Method, Settings

_NO_CLIPS = Clips(expected=0, read=0, dropped=[])


class ToolSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Where the tools of some heads are found: a head's process loads them.

    `language_model` is a folder, and `language_device` the torch device that it runs on. `threads` share the work of heads
    that converge, of which large fits run on `device`, if there is one.
    """

    vocabulary: Path | None = None
    language_model: str | None = None
    language_device: str = "cpu"
    checkpoints: Path
    threads: int = 1
    device: str | None = None

    def load(self) -> Tools:
        """Load the tools. Raises `UsageError` or `MachineError` if one cannot be used."""
        return Tools(
            vocabulary=None if self.vocabulary is None else _vocabulary(self.vocabulary),
            language_model=None
            if self.language_model is None
            else _language_model(self.language_model, self.language_device),
            checkpoints=self.checkpoints,
            threads=self.threads,
            device=self.device,
        )


class TapShards(msgspec.Struct, frozen=True, kw_only=True):
    """A tap, and the store's names of its embeddings, by shard. `name` is None for the model's output."""

    name: str | None
    contract: Contract
    keys: dict[Path, str]


class ScoreSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `score_task` needs. `outcome` is the file that it writes."""

    data: TaskData
    taps: tuple[TapShards, ...]
    settings: Settings
    tools: ToolSettings
    store: Path
    outcome: Path


@dataclass
class Outcome:
    """A task's records, with predictions by `method_by_tap`, estimates by tap and method, notes and errors."""

    results: list[TaskResult] = field(default_factory=list)
    predictions: dict[str, Predictions] = field(default_factory=dict)
    estimates: list[dict[str, Estimate]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: list[XaresError] = field(default_factory=list)


@dataclass(frozen=True)
class Shared:
    """What all records of a task and tap share, as far as it is known when a record is made."""

    tap: str | None
    data_digest: str | None = None
    clips: Clips = _NO_CLIPS
    audio_hours: float = 0.0
    comparable: bool = True
    notes: tuple[str, ...] = ()


def score_task(spec: ScoreSpec, *, tell: Tell) -> HeadReport:
    """Score every method on the embeddings by every tap, and write the outcome.

    Returns:
        Store names of the first tap for the shards whose embeddings are missing or damaged; nothing is written then.

    Raises:
        DataError: The task's data cannot be used.
        MachineError: The memory or the disk does not suffice.
    """
    store = Store(spec.store)
    shards = {path: store.read(key) for path, key in spec.taps[0].keys.items()}
    lacking = {spec.taps[0].keys[path] for path, shard in shards.items() if shard is None}
    for tap in spec.taps[1:]:
        lacking |= {spec.taps[0].keys[path] for path, key in tap.keys.items() if key not in store}
    if lacking:
        return HeadReport(tuple(sorted(lacking)))
    for tap in spec.taps:
        for key in tap.keys.values():
            store.touch(key)
    try:
        scores = _Scores(spec, tell)
        for number, tap in enumerate(spec.taps):
            of_tap = shards if number == 0 else {path: store.read(key) for path, key in tap.keys.items()}
            if damaged := [spec.taps[0].keys[path] for path, shard in of_tap.items() if shard is None]:
                return HeadReport(tuple(damaged))
            scores.tap(number, {path: shard for path, shard in of_tap.items() if shard is not None})
        if spec.settings.mix:
            scores.mix(store)
        write_outcome(spec.outcome, scores.outcome)
    except MemoryError as error:
        raise MachineError(
            f"{spec.data.task.name}: the memory of this machine does not suffice to train its heads"
        ) from error
    return HeadReport()


def identity(spec: ScoreSpec) -> str:
    """A digest of what an outcome depends on."""
    causes = [spec.data.task.digest(), spec.settings, [list(tap.keys.values()) for tap in spec.taps]]
    return hashlib.sha256(msgspec.json.encode(causes, order="deterministic")).hexdigest()


def why_no_device(name: str | None) -> str | None:
    """Why heads cannot run on a torch device, if one is named: known in their own process alone, which has torch."""
    if name is None:
        return None
    from ..models.device import torch_device

    try:
        torch_device(name)
    except MachineError as error:
        return str(error)
    return None


class _Scores:
    """The outcome of a task, tap by tap."""

    def __init__(self, spec: ScoreSpec, tell: Tell) -> None:
        self._spec = spec
        self._data = spec.data
        self._task = spec.data.task
        self._settings = spec.settings
        self._protocol = Protocol(spec.settings.protocol)
        self._tell = tell
        self.outcome = Outcome(estimates=[{} for _ in range(len(spec.taps) + spec.settings.mix)])
        self._tools = spec.tools.load()
        if reason := why_no_device(spec.tools.device):
            self._note([f"heads and kNN run on the CPU, though the encoder runs on CUDA: {reason}"])
            self._tools = replace(self._tools, device=None)

    def tap(self, number: int, shards: Mapping[Path, EmbeddedShard]) -> None:
        """Score every method on the embeddings by tap number `number`."""
        tap, kind_of_task = self._spec.taps[number], kind_of(self._task)
        shared = Shared(tap.name, self._data.digest())
        if kind_of_task.needs_frames and tap.contract.clip_only:
            self._without_score("not_applicable", no_frames(self._task), shared)
            return
        self._score_methods(assemble(self._data, shards), number, self._tools_of(tap), shared)

    def mix(self, store: Store) -> None:
        """Score the head on the mix of all taps, which comes after the last of them."""
        taps = [StoredTap(tap.name or tap.contract.output, tap.contract, tap.keys) for tap in self._spec.taps]
        shared = Shared(MIX, self._data.digest())
        try:
            mix = mixed(self._data, taps, store)
        except NotMixedError as error:
            self._without_score("not_applicable", str(error), shared)
            return
        self._note(f"{self._task.name}: {note}" for note in mix.notes)
        tools = replace(self._tools, layers=mix.layers)
        self._score_methods(mix.dataset, len(taps), tools, replace(shared, notes=tuple(mix.notes)))

    def _score_methods(self, dataset: Dataset, number: int, tools: Tools, shared: Shared) -> None:
        """Score every method on a data set: of tap number `number`, or of the mix."""
        kind_of_task = kind_of(self._task)
        shared = replace(shared, clips=dataset.clips, audio_hours=dataset.audio_seconds / 3600)
        losses = []
        try:
            check_drops(dataset)
        except DataError as error:
            if not self._settings.allow_drops:
                self.outcome.errors.append(error)
                self._without_score("failed", str(error), shared)
                return
            losses = [f"{len(dataset.clips.dropped)} of {dataset.clips.expected} clips were dropped", *dataset.damage]
        strata = kind_of_task.strata(dataset.labels)
        digests = self._data.shard_digests()
        folds, notes = make_folds(self._protocol, self._task, dataset.parts, digests, dataset.keys, strata, dataset.groups)
        if dataset.group_note:
            notes = [*notes, dataset.group_note]
        if outside := dataset.clips.events_outside:
            notes = [*notes, f"{outside} events are of no class of the vocabulary, and are left out"]
        notes = [*losses, *notes]
        self._note(f"{self._task.name}: {note}" for note in notes)
        notes = [*shared.notes, *notes]
        shared = replace(shared, comparable=self._settings.limit is None and not losses, notes=tuple(notes))
        kind = kind_of_task(self._task, self._protocol, dataset, folds, tools)
        if reason := kind.why_undefined():
            self._undefined(methods_of(self._task, self._settings, shared.tap), reason, shared)
        elif reason := kind.why_not_applicable():
            self._without_score("not_applicable", reason, shared)
        else:
            for method in methods_of(self._task, self._settings, shared.tap):
                self._score(kind, method, number, shared)
            self._compare_methods(kind, number, shared.tap)

    def _tools_of(self, tap: TapShards) -> Tools:
        contract = tap.contract
        name = msgspec.json.encode([self._task.digest(), self._settings.protocol, list(tap.keys.values())])
        return replace(
            self._tools,
            hop_seconds=contract.hop_samples / contract.sample_rate if contract.hop_samples else None,
            identity=hashlib.sha256(name).hexdigest(),
        )

    def _score(self, kind: Kind, method: Method, tap: int, shared: Shared) -> None:
        started = time.perf_counter()
        task = self._task
        try:
            if method == "head":
                steps = kind.steps()
                self._tell(Progress("train", task.name, 0, steps))
                outcomes = kind.train(
                    self._settings.seeds, lambda step: self._tell(Progress("train", task.name, step, steps))
                )
            else:
                outcomes = kind.search()
            trained = time.perf_counter()
            scored = scoring.score(kind, method, outcomes)
        except ScoreUndefinedError as error:
            self._undefined([method], str(error), shared)
            return
        before = remarks(scored.tuning) if scored.tuning else []
        after = [deviation] if method == "head" and (deviation := kind.why_not_comparable()) else []
        self._note(f"{task.name}: {note}" for note in (*before, *after))
        shared = replace(shared, comparable=shared.comparable and not after, notes=(*before, *shared.notes, *after))
        method_name = task.head.kind if method == "head" else "knn"
        self.outcome.predictions[method_by_tap(method_name, tap)] = scored.predictions
        self.outcome.estimates[tap][method_name] = scored.estimate
        seconds = Seconds(embed=0, train=trained - started, score=time.perf_counter() - trained)
        self.outcome.results.append(
            task_result(
                task,
                method,
                self._settings.protocol,
                shared,
                seconds,
                status="ok",
                score=scored.score,
                ci95=scored.ci95,
                test_groups=scored.test_groups,
                metrics=scored.metrics,
                per_fold=scored.per_fold,
                per_seed=scored.per_seed,
                n_test=scored.n_test,
                selection=kind.search_selection() if method == "knn" and len(self._spec.taps) > 1 else None,
                shots=self._shots(kind) if method == "head" else [],
                tuning=scored.tuning,
            )
        )

    def _shots(self, kind: Kind) -> list[Shots]:
        """The head's scores with few training clips per class, if the settings ask for them."""
        if not (self._settings.shots and isinstance(kind, Classes)) or kind.tools.layers:
            return []
        name = self._task.name
        shots = score_shots(kind, self._settings.shots, lambda fitted, of: self._tell(Progress("shots", name, fitted, of)))
        self._note(f"{name}, {row.clips_per_class} clips per class: {row.note}" for row in shots if row.note)
        return shots

    def _compare_methods(self, kind: Kind, tap: int, name: str | None) -> None:
        """Note on a task's head if its own kNN does better; only under `corrected`, whose heads belong to the embeddings."""
        methods = self._task.head.kind, "knn"
        head, knn = (self.outcome.predictions.get(method_by_tap(method, tap)) for method in methods)
        if head is None or knn is None or not self._protocol.corrected:
            return
        if note := scoring.below_neighbours(kind, head, knn):
            self._note([f"{self._task.name}: {note}"])
            self.outcome.results = [
                msgspec.structs.replace(record, notes=[note, *record.notes])
                if (record.method, record.tap) == (self._task.head.kind, name)
                else record
                for record in self.outcome.results
            ]

    def _note(self, notes: Iterable[str]) -> None:
        for note in notes:
            self.outcome.notes.append(note)
            self._tell(Note(note))

    def _undefined(self, methods: Sequence[Method], reason: str, shared: Shared) -> None:
        self.outcome.errors.append(ScoreUndefinedError(f"{self._task.name} has no score: {reason}"))
        protocol = self._settings.protocol
        self.outcome.results += [
            task_result(self._task, method, protocol, shared, status="undefined", reason=reason) for method in methods
        ]

    def _without_score(self, status: Status, reason: str, shared: Shared) -> None:
        self.outcome.results += without_score(self._task, self._settings, [shared], status, reason)


# ---------------------------------------------------------------- records


def methods_of(task: Task, settings: Settings, tap: str | None) -> list[Method]:
    """The methods that score a task by a tap; the mix is learned by a head."""
    return [method for method in settings.methods if method == "head" or (task.knn and tap != MIX)]


def method_by_tap(method: str, tap: int) -> str:
    """The name of a method's predictions by one tap: tap 0 is the model's output, or the first of the named ones."""
    return f"{method}.{tap}" if tap else method


def no_frames(task: Task) -> str:
    """Why a task on frames has no score by an encoder without them."""
    return f"{task.kind} are learnt from frames, and this encoder gives one vector a clip"


def without_score(task: Task, settings: Settings, taps: Iterable[Shared], status: Status, reason: str) -> list[TaskResult]:
    """The records of a task that has no score by these taps, and why."""
    return [
        task_result(task, method, settings.protocol, shared, status=status, reason=reason)
        for shared in taps
        for method in methods_of(task, settings, shared.tap)
    ]


def task_result(
    task: Task,
    method: Method,
    protocol: ProtocolName,
    shared: Shared,
    seconds: Seconds | None = None,
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
        seconds=seconds or Seconds(embed=0, train=0, score=0),
        audio_hours=shared.audio_hours,
        published=task.published_scores(method),
        **fields,
    )


# ---------------------------------------------------------------- an outcome's file


class _EstimateRecord(msgspec.Struct, frozen=True):
    score: float
    clips: float
    freedom: float
    scale: Scale
    seeds: int


class _OutcomeRecord(msgspec.Struct, frozen=True):
    """An outcome without its arrays."""

    results: list[TaskResult]
    columns: dict[str, list[str]]
    estimates: list[dict[str, _EstimateRecord]]
    notes: list[str]
    errors: list[tuple[str, str]]


def write_outcome(path: Path, outcome: Outcome) -> None:
    """Write an outcome as one npz file, whole or not at all. Raises `MachineError` if the disk cannot be written to."""
    arrays: dict[str, Any] = {}
    for name, predictions in outcome.predictions.items():
        arrays |= {f"prediction {name} {column}": array for column, array in predictions.items()}
    for number, by_method in enumerate(outcome.estimates):
        for method, estimate in by_method.items():
            arrays[f"replicates {number} {method}"] = estimate.replicates
            arrays |= {f"seeds {number} {method} {i}": seeds for i, seeds in enumerate(estimate.seeds)}
    record = _OutcomeRecord(
        outcome.results,
        {name: list(predictions) for name, predictions in outcome.predictions.items()},
        [
            {method: _EstimateRecord(e.score, e.clips, e.freedom, e.scale, len(e.seeds)) for method, e in by_method.items()}
            for by_method in outcome.estimates
        ],
        outcome.notes,
        [(type(error).__name__, str(error)) for error in outcome.errors],
    )
    arrays["record"] = np.frombuffer(msgspec.msgpack.encode(record), np.uint8)
    with made_aside(path) as aside, aside.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_outcome(path: Path) -> Outcome:
    """Read what `write_outcome` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        record = msgspec.msgpack.decode(arrays["record"].tobytes(), type=_OutcomeRecord)
        return Outcome(
            record.results,
            {
                name: {column: arrays[f"prediction {name} {column}"] for column in columns}
                for name, columns in record.columns.items()
            },
            [
                {
                    method: Estimate(
                        e.score,
                        arrays[f"replicates {number} {method}"],
                        tuple(arrays[f"seeds {number} {method} {i}"] for i in range(e.seeds)),
                        e.clips,
                        e.freedom,
                        e.scale,
                    )
                    for method, e in by_method.items()
                }
                for number, by_method in enumerate(record.estimates)
            ],
            record.notes,
            [getattr(errors, name)(message) for name, message in record.errors],
        )


# ---------------------------------------------------------------- tools, loaded once per process


@functools.lru_cache(maxsize=1)
def _vocabulary(path: Path) -> Any:
    from ..probes.wordpiece import WordPiece

    return WordPiece.from_file(path)


@functools.lru_cache(maxsize=1)
def _language_model(folder: str, device: str) -> Any:
    from ..models.llm import LanguageModel

    return LanguageModel(folder, device)


def describe_tools(tools: ToolSettings, *, tell: Tell) -> dict[str, Any]:
    """What a record says of the tools, by their content: `lm` and `vocabulary`. Raises as `ToolSettings.load`."""
    loaded = tools.load()
    return {
        "lm": loaded.language_model and loaded.language_model.described(),
        "vocabulary": loaded.vocabulary and loaded.vocabulary.digest,
    }
