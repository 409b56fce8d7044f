"""Evaluate an encoder: embed each task's shards, train heads and a kNN on the embeddings, score, and keep the record."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from . import audio, results, scoring, synthetic
from .catalog import Digests, cache_folder, data_folder, find_parts, missing_data, named_tasks, shipped_tasks, suite_tasks
from .dataset import Dataset, TaskData, assemble, check_drops, prepare
from .differences import Side
from .embed import EmbedSpec, embed_shards, shard_specs, shards_of_tap
from .encoder import Encoder, load_encoder, onnxruntime_distributions
from .errors import (
    DataError,
    DataMissingError,
    MachineError,
    ModelError,
    ScoreUndefinedError,
    UsageError,
    XaresError,
)
from .events import Event, Note, Observer, Progress, ignore
from .folds import Protocol, ProtocolName, make_folds
from .gates import Gates
from .kinds import Kind, Tools, kind_of
from .model_file import find_model
from .planning import Plan, check_disk, make_plan
from .results import Clips, Predictions, Result, Seconds, Status, TaskResult, averages, prediction_file
from .settings import METHODS, Method, Settings, checked_settings, with_heads
from .store import Store
from .task import Task
from .version import __version__

_BY_CONTENT = ("lm", "vocabulary")  # recorded by what the files hold, which is known once they are loaded


@dataclass
class Evaluation:
    """A result with what does not fit in it: per-clip predictions by (task, method), and the errors of failed tasks.

    Predictions from tap number 1 and on are by (task, "method.1"). `path` is where the result was saved, if it was.
    """

    result: Result
    predictions: dict[tuple[str, str], Predictions] = field(default_factory=dict)
    errors: list[XaresError] = field(default_factory=list)
    path: Path | None = None

    def side(self, name: str) -> Side:
        """The result with its predictions, to be compared."""
        return Side(name, self.result, self._predictions_of)

    def _predictions_of(self, record: TaskResult) -> Predictions:
        tap = self.result.encoder.taps.index(record.tap) if record.tap is not None else 0
        return self.predictions[record.task, method_by_tap(record.method, tap)]

    def json(self) -> str:
        return results.indented(self.result).decode()


def evaluate(
    model: str | Path,
    tasks: Sequence[str] = (),
    *,
    suite: str | None = None,
    data: Path | None = None,
    cache: Path | None = None,
    output: Path | None = None,
    save: bool = False,
    methods: Sequence[Method] = METHODS,
    protocol: ProtocolName = "corrected",
    seeds: int | None = None,
    limit: int | None = None,
    contract: Sequence[str] = (),
    device: str = "auto",
    threads: int | None = None,
    allow_drops: bool = False,
    heads: Sequence[str] = (),
    lm: str | None = None,
    vocabulary: Path | None = None,
    taps: Sequence[str] = (),
    baseline: Path | None = None,
    tolerance: float | None = None,
    fail_under: Sequence[str] = (),
    trust: bool = False,
    observer: Observer = ignore,
) -> Evaluation:
    """Score a model on tasks by name, pattern or file, or on a suite; without either, on every task whose data are there.

    A task that fails is recorded and the others go on; a model or machine that fails ends the run with what is done.
    With `output` or `save` the record is written, to `results/<model>-<digest8>.json` where no path is given. `heads`
    chooses heads other than the tasks' own, as "TASK=KIND"; `lm` is the language model's folder for the `llm` head, and
    `vocabulary` is BERT's vocab.txt for captions under X-ARES's protocol. `taps` are outputs or inner tensors, scored in one
    pass, the first as the model's, or `all-layers`. Gates are judged in `result.gates`: `baseline` is a result that no score
    may fall behind by more than `tolerance`, `fail_under` holds "TASK[:METHOD]=SCORE". `trust` lifts the limits on a model's
    size, memory and time. Raises `UsageError`, `ModelError`, `DataMissingError`, `MachineError`, and `DataError` for a
    baseline of other data.
    """
    gates = Gates.read(baseline, tolerance, fail_under)
    settings = checked_settings(protocol, seeds, methods, limit, allow_drops, heads, lm, vocabulary, taps, trust)
    find_model(Path(model))  # a wrong path is said before anything else
    cache = cache_folder(cache)
    notes: list[str] = []

    def observe(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        observer(event)

    selection = with_heads(choose_tasks(tasks, suite, data, observe), settings)
    _check_gates(gates, selection, settings, cache, observe)
    if len(installed := onnxruntime_distributions()) > 1:
        both = " and ".join(f"{name} {version}" for name, version in installed.items())
        observe(Note(f"{both} are both installed and overwrite each other; uninstall both and install one"))
    with load_encoder(
        model,
        device=device,
        threads=threads,
        contract=contract,
        taps=taps,
        cache=cache,
        trust=trust,
        observer=observe,
    ) as encoder:
        if save and output is None:
            output = default_output(Path(encoder.info.path), encoder.info.scan.sha256)
        if output is not None:
            results.make_room(output)
        tools = _load_tools(selection, settings, _torch_device(device, encoder.info.provider), cache, observe)
        described = {
            **msgspec.json.decode(msgspec.json.encode(settings)),  # as it will be read back
            "lm": tools.language_model and tools.language_model.described(),
            "vocabulary": tools.vocabulary and tools.vocabulary.digest,
        }
        gates.check_settings([task for task, _ in selection], described)
        run = _Run(encoder, settings, tools, cache, output, observe)
        run.all(selection)
        evaluation = Evaluation(
            Result(
                encoder=_encoder_record(encoder),
                environment=environment(encoder),
                settings={
                    **described,
                    "suite": suite,
                    "tasks": [task.name for task, _ in selection],
                    **gates.described(),
                },
                notes=list(dict.fromkeys(notes)),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                tasks=run.results,
                averages=run.averages(0),
                averages_by_tap={tap.name: run.averages(i) for i, tap in enumerate(encoder.info.taps)} if taps else {},
            ),
            run.predictions,
            run.errors,
            output,
        )
    try:
        judged = gates.judge(evaluation.side("this run"))
        evaluation.result = msgspec.structs.replace(evaluation.result, gates=judged)
    except XaresError as error:  # the baseline may be gone by now; the result is worth keeping
        evaluation.errors.append(error)
    if output is not None:
        results.write_result(output, evaluation.result, evaluation.predictions)
    return evaluation


def _check_gates(
    gates: Gates, selection: Sequence[tuple[Task, Path]], settings: Settings, cache: Path, observer: Observer
) -> None:
    """Before hours of embedding: whether the gates can be judged, and whether the data are those of the baseline."""
    known = {key: value for key, value in msgspec.to_builtins(settings).items() if key not in _BY_CONTENT}
    gates.check([task for task, _ in selection], known)
    if gates.baseline is None:
        return
    scored = {record.task for record in gates.baseline.scored().values()}
    for task, folder in selection:
        if task.name in scored:
            if task.domain == "synthetic":
                folder = synthetic_data(task, cache, observer)
            if find_parts(task, folder):
                gates.check_data(task, prepare(task, folder, Digests(cache), None, observer).digest())


def plan(
    model: str | Path,
    tasks: Sequence[str] = (),
    *,
    suite: str | None = None,
    data: Path | None = None,
    cache: Path | None = None,
    protocol: ProtocolName = "corrected",
    seeds: int | None = None,
    limit: int | None = None,
    contract: Sequence[str] = (),
    device: str = "auto",
    threads: int | None = None,
    heads: Sequence[str] = (),
    lm: str | None = None,
    vocabulary: Path | None = None,
    taps: Sequence[str] = (),
    trust: bool = False,
    observer: Observer = ignore,
) -> Plan:
    """What `evaluate` with the same arguments would read, write and take."""
    settings = checked_settings(protocol, seeds, METHODS, limit, False, heads, lm, vocabulary, taps, trust)
    cache = cache_folder(cache)
    with load_encoder(
        model,
        device=device,
        threads=threads,
        contract=contract,
        taps=taps,
        cache=cache,
        trust=trust,
        observer=observer,
    ) as encoder:
        found = []
        for task, folder in with_heads(choose_tasks(tasks, suite, data, observer), settings):
            if kind_of(task).needs_frames and all(tap.contract.clip_only for tap in encoder.info.taps):
                observer(Note(f"{task.name} is not planned: it needs frames, and this encoder gives one vector a clip"))
                continue
            if task.domain == "synthetic":
                folder = synthetic_data(task, cache, observer)
            if find_parts(task, folder):
                crops = Protocol(protocol).crops(task)
                found.append((prepare(task, folder, Digests(cache), limit, observer), crops))
        return make_plan(encoder, found, Store(cache / "store"), seeds=settings.seeds, observer=observer)


def default_output(model: Path, sha256: str) -> Path:
    return Path("results") / f"{model.stem}-{sha256[:8]}.json"


def choose_tasks(names: Sequence[str], suite: str | None, data: Path | None, observer: Observer) -> list[tuple[Task, Path]]:
    """The tasks to score, each with the folder that holds its data. A named task without data is an error at once."""
    if names and suite:
        raise UsageError("--tasks and --suite exclude each other")
    if names:
        chosen = named_tasks(names)
    elif suite:
        chosen = suite_tasks(suite)
    else:
        chosen = [task for task in shipped_tasks().values() if task.domain != "synthetic"]
    if all(task.domain == "synthetic" for task in chosen):
        return [(task, Path()) for task in chosen]
    folder = data_folder(data)
    missing = [task for task in chosen if task.domain != "synthetic" and not find_parts(task, folder)]
    present = [task for task in chosen if task not in missing]
    if names and missing:
        raise DataMissingError(missing_data(missing[0], folder))
    if suite and not present:
        raise DataMissingError(f"no task of suite {suite} has data: {missing_data(chosen[0], folder)}")
    if not present and data is not None:
        raise DataMissingError(f"{folder} holds no task's data; `xares-onnx tasks --data {folder}` shows what is looked for")
    if not present:
        observer(Note(f"no data in {folder}, so the built-in synthetic suite is scored; --data names another folder"))
        return [(task, Path()) for task in suite_tasks("synthetic")]
    return [(task, folder) for task in (chosen if suite or names else present)]


class _Run:
    """One evaluation in progress."""

    def __init__(
        self, encoder: Encoder, settings: Settings, tools: Tools, cache: Path, output: Path | None, observer: Observer
    ) -> None:
        self._encoder = encoder
        self._tools = tools
        self._settings = settings
        self._protocol = Protocol(settings.protocol)
        self._cache = cache
        self._store = Store(cache / "store")
        self._digests = Digests(cache)
        self._output = output
        self._observer = observer
        self.results: list[TaskResult] = []
        self.predictions: dict[tuple[str, str], Predictions] = {}
        self.errors: list[XaresError] = []
        self._tasks: list[Task] = []
        self._replicates: list[dict[tuple[str, str], npt.NDArray[np.float64]]] = [{} for _ in encoder.info.taps]

    def averages(self, tap: int) -> results.Averages:
        """The averages by tap number `tap`."""
        name = self._name(tap)
        return averages([r for r in self.results if r.tap == name], self._replicates[tap], self._tasks)

    def _name(self, tap: int) -> str | None:
        """What a record calls tap number `tap`: nothing the first, which is the model's output or stands in for it."""
        return self._encoder.info.taps[tap].name if tap else None

    def all(self, selection: Sequence[tuple[Task, Path]]) -> None:
        self._tasks = [task for task, _ in selection]
        for number, (task, folder) in enumerate(selection):
            if task.domain != "synthetic" and not find_parts(task, folder):  # of a suite: a named task was looked for before
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
        if task.domain == "synthetic":
            folder = synthetic_data(task, self._cache, self._observer)
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
        embedded = sum(report.audio_seconds for report in reports)
        common: dict[str, Any] = {
            "data_digest": data.digest(),
            "rtf": sum(report.seconds for report in reports) / embedded if embedded else None,
            "seconds": Seconds(embed=embed_seconds, train=0, score=0),
        }
        for number, tap in enumerate(taps):
            if number:
                shards = shards_of_tap(specs, self._store, number)
            of_tap = {**common, "tap": self._name(number)}
            if frames and tap.contract.clip_only:
                self._without_score(task, "not_applicable", _no_frames(task), of_tap)
            else:
                self._score_tap(data, assemble(data, shards), number, specs, of_tap)

    def _score_tap(
        self, data: TaskData, dataset: Dataset, number: int, specs: Mapping[Path, EmbedSpec], common: dict[str, Any]
    ) -> None:
        """Every method on the embeddings by tap number `number`."""
        task = data.task
        kind_of_task = kind_of(task)
        common |= {"clips": dataset.clips, "audio_hours": dataset.audio_seconds / 3600}
        losses = []
        try:
            check_drops(dataset)
        except DataError as error:
            if not self._settings.allow_drops:
                self.errors.append(error)
                self._without_score(task, "failed", str(error), common)
                return
            losses = [f"{len(dataset.clips.dropped)} of {dataset.clips.expected} clips were dropped", *dataset.damage]
        common["comparable"] = self._settings.limit is None and not losses
        strata = kind_of_task.strata(dataset.labels)
        folds, notes = make_folds(self._protocol, task, dataset.parts, data.shard_digests(), dataset.keys, strata)
        if outside := dataset.clips.events_outside:
            notes = [*notes, f"{outside} events are of no class of the vocabulary, and are left out"]
        common["notes"] = [*losses, *notes]
        for note in common["notes"]:
            self._observer(Note(f"{task.name}: {note}"))
        kind = kind_of_task(task, self._protocol, dataset, folds, self._tools_of(task, specs.values(), number))
        if undefined := kind.why_undefined():
            self._undefined(task, self._methods(task), undefined, common)
        elif unsuited := kind.why_not_applicable():
            self._without_score(task, "not_applicable", unsuited, common)
        else:
            for method in self._methods(task):
                self._score(kind, method, number, common)

    def _tools_of(self, task: Task, specs: Iterable[EmbedSpec], tap: int) -> Tools:
        contract, protocol = self._encoder.info.taps[tap].contract, self._settings.protocol
        identity = msgspec.json.encode([task.digest(), protocol, [spec.key(tap) for spec in specs]])
        return replace(
            self._tools,
            hop_seconds=contract.hop_samples / contract.sample_rate if contract.hop_samples else None,
            identity=hashlib.sha256(identity).hexdigest(),
        )

    def _score(self, kind: Kind, method: Method, tap: int, common: dict[str, Any]) -> None:
        started = time.perf_counter()
        task = kind.task
        try:
            if method == "head":
                epochs = task.head.epochs
                self._observer(Progress("train", task.name, 0, epochs))
                outcomes = kind.train(
                    self._settings.seeds, lambda epoch: self._observer(Progress("train", task.name, epoch, epochs))
                )
            else:
                outcomes = kind.search()
            trained = time.perf_counter()
            scored = scoring.score(kind, method, outcomes)
        except ScoreUndefinedError as error:
            self._undefined(task, [method], str(error), common)
            return
        name = task.head.kind if method == "head" else "knn"
        notes = list(common["notes"])
        if method == "head" and (otherwise := kind.why_not_comparable()):
            notes.append(otherwise)
            self._observer(Note(f"{task.name}: {otherwise}"))
            common = {**common, "comparable": False, "notes": notes}
        by = method_by_tap(name, tap)
        self.predictions[task.name, by] = scored.predictions
        self._replicates[tap][task.name, name] = scored.replicates
        seconds = Seconds(embed=common["seconds"].embed, train=trained - started, score=time.perf_counter() - trained)
        self.results.append(
            _task_result(
                task,
                method,
                status="ok",
                score=scored.score,
                ci95=scored.ci95,
                metrics=scored.metrics,
                per_fold=scored.per_fold,
                per_seed=scored.per_seed,
                n_test=scored.n_test,
                predictions=prediction_file(self._output, task.name, by) if self._output else None,
                **{**common, "seconds": seconds},
            )
        )

    def _undefined(self, task: Task, methods: Sequence[Method], reason: str, common: dict[str, Any]) -> None:
        self.errors.append(ScoreUndefinedError(f"{task.name} has no score: {reason}"))
        self.results += [_task_result(task, method, status="undefined", reason=reason, **common) for method in methods]

    def _methods(self, task: Task) -> list[Method]:
        return [method for method in self._settings.methods if method == "head" or task.knn]

    def _without_score(self, task: Task, status: Status, reason: str, common: dict[str, Any] | None = None) -> None:
        """Record why there is none: by the tap that `common` has, else by every tap."""
        several = [common] if common else [{"tap": self._name(tap)} for tap in range(len(self._encoder.info.taps))]
        for fields in several:
            self.results += [
                _task_result(task, method, status=status, reason=reason, **fields) for method in self._methods(task)
            ]


def method_by_tap(method: str, tap: int) -> str:
    """What predictions are called by: tap 0 is the model's output, or the first of those that were named."""
    return f"{method}.{tap}" if tap else method


def _no_frames(task: Task) -> str:
    return f"{task.kind} are learnt from frames, and this encoder gives one vector a clip"


def _load_tools(
    selection: Sequence[tuple[Task, Path]], settings: Settings, device: str, cache: Path, observer: Observer
) -> Tools:
    """What some heads need, at once: a folder that holds none of it is better said before hours of embedding."""
    vocabulary, language_model = None, None
    if settings.vocabulary is not None:
        from .wordpiece import WordPiece

        vocabulary = WordPiece.from_file(Path(settings.vocabulary))
        if settings.protocol != "xares":
            observer(Note("--vocabulary is not used: only --protocol xares has BERT's, this one trains its own"))
    if any(task.head.kind == "llm" for task, _ in selection):
        from .models.llm import LanguageModel

        assert settings.lm is not None
        language_model = LanguageModel(settings.lm, device)
    elif settings.lm is not None:
        observer(Note("no task has the llm head, so --lm is not used; --head librispeech=llm chooses it"))
    return Tools(vocabulary=vocabulary, language_model=language_model, checkpoints=cache / "checkpoints")


def _torch_device(device: str, provider: str) -> str:
    """Where torch runs what it has to: as asked for, or where the encoder runs if an ONNX Runtime provider was named."""
    if device.startswith(("auto", "cpu", "cuda")):
        return device
    return "cuda" if provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "cpu"


def synthetic_data(task: Task, cache: Path, observer: Observer) -> Path:
    """The folder that holds a synthetic task's shards, built where it is not there yet."""
    folder = cache / f"synthetic-{synthetic.VERSION}"
    if not synthetic.is_built(task.name, folder / task.name):
        observer(Progress("prepare", task.name, 0, 1))
        synthetic.build(task.name, folder / task.name)
        observer(Progress("prepare", task.name, 1, 1))
    return folder


def environment(encoder: Encoder) -> dict[str, Any]:
    """Versions and machine: what may differ between two runs that ought to agree."""
    packages = ("numpy", "torch", "scikit-learn", "soundfile", "soxr")
    return {
        "versions": {
            "xares_onnx": __version__,
            "python": platform.python_version(),
            "onnxruntime": encoder.info.onnxruntime,
            "libsndfile": audio.decoder_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "provider": encoder.info.provider,
        **({} if encoder.info.batch_difference is None else {"batch_difference": encoder.info.batch_difference}),
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "threads": encoder.spec.threads,
        },
    }


def _encoder_record(encoder: Encoder) -> results.Encoder:
    info = encoder.info
    return results.Encoder(
        file=Path(info.path).name,
        sha256=info.scan.sha256,
        bytes=info.scan.bytes,
        parameters=info.scan.parameters,
        contract=info.contract.described(),
        taps=[tap.name for tap in info.taps],
    )


def _task_result(task: Task, method: Method, **fields: Any) -> TaskResult:
    base: dict[str, Any] = {
        "task": task.name,
        "title": task.title,
        "domain": task.domain,
        "method": task.head.kind if method == "head" else "knn",
        "metric": task.score.metric,
        "higher_is_better": task.score.higher_is_better,
        "published": {} if task.published is None else getattr(task.published, "linear" if method == "head" else "knn"),
        "weight": task.weight,
        "definition_digest": task.digest(),
        "clips": Clips(expected=0, read=0, dropped=[]),
        "seconds": Seconds(embed=0, train=0, score=0),
    }
    return TaskResult(**{**base, **fields})
