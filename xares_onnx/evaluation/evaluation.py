"""Evaluate an encoder: embed each task's shards, train heads and a kNN on the embeddings, score, and record the result."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from ..data import audio
from ..data.catalog import Digests, cache_folder, choose_tasks, has_data, shard_folders
from ..data.selection import prepare
from ..data.task import Task
from ..embedding.store import Store
from ..encoder.encoder import Encoder, onnxruntime_distributions, open_encoder
from ..encoder.model_file import find_model
from ..encoder.processor import instruction_sets
from ..encoder.spec import ModelOptions, ModelSpec
from ..engine import local
from ..engine.engine import Engine
from ..engine.opening import check_engine, open_engine
from ..errors import XaresError
from ..files import indented
from ..progress import Event, Note, Observer, ignore
from ..scoring.kinds import kind_of
from ..scoring.mixing import MIX, check_names, model_taps
from ..scoring.protocol import Protocol, ProtocolName
from ..scoring.scoring import Predictions
from ..version import __version__
from . import record as results
from .differences import Side
from .gates import Gates
from .planning import Plan, make_plan
from .record import Result, TaskResult
from .run import Run
from .settings import METHODS, Method, Settings, checked_settings, with_heads
from .shards import model_reach
from .task_scores import ToolSettings, describe_tools, method_by_tap

_BY_CONTENT = ("lm", "vocabulary")  # recorded by the content of their files, which is known once they are loaded
_CUDA_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


@dataclass
class Evaluation:
    """A result, with per-clip predictions by (task, method) and the errors of failed tasks.

    Predictions of a further tap are by (task, "method.1"), with the tap's number. `path` is the saved file; None if the
    result was not saved.
    """

    result: Result
    predictions: dict[tuple[str, str], Predictions] = field(default_factory=dict)
    errors: list[XaresError] = field(default_factory=list)
    path: Path | None = None

    def side(self, name: str) -> Side:
        """The result with its predictions, for a comparison that calls it `name`."""
        return Side(name, self.result, self._predictions_of)

    def _predictions_of(self, record: TaskResult) -> Predictions:
        taps = [*self.result.encoder.taps, MIX]
        tap = taps.index(record.tap) if record.tap is not None else 0
        return self.predictions[record.task, method_by_tap(record.method, tap)]

    def json(self) -> str:
        return indented(self.result).decode()


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
    workers: int | None = None,
    engine: str = "local",
    allow_drops: bool = False,
    heads: Sequence[str] = (),
    lm: str | None = None,
    vocabulary: Path | None = None,
    taps: Sequence[str] = (),
    shots: Sequence[int] = (),
    baseline: Path | None = None,
    tolerance: float | None = None,
    fail_under: Sequence[str] = (),
    trust: bool = False,
    observer: Observer = ignore,
) -> Evaluation:
    """Score a model on tasks, or on a suite; without either, on every task whose data are there.

    A task that fails is recorded and the others go on. If the model or the machine fails, the run ends, and the result holds
    the tasks before.

    Args:
        model: An `.onnx` file, or a folder that holds one.
        tasks: Names or patterns of shipped tasks, or `.toml` files of your own.
        suite: Name of a group of tasks.
        data: Folder of the shards, one folder per task.
        cache: Folder that keeps embeddings and measurements.
        output: Where to write the result.
        save: Whether to write it without `output` too, to `results/<model>-<digest8>.json`.
        methods: `head`, `knn`, or both.
        protocol: `corrected`, or `xares` for X-ARES's own choices.
        seeds: Trainings of each head; the protocol's number by default.
        limit: Most clips of each split; the scores are then not comparable with others.
        contract: Declarations about the model, as "KEY=VALUE".
        device: `auto`, `cpu`, `cuda`, `cuda:N`, `cuda:0,cuda:1`, `cuda:all`, or the name of an ONNX Runtime provider.
        threads: Number of threads, of all encoders together (on Ray, of each); the number of usable cores by default.
        workers: Number of encoders that embed at once, each in a process of its own; by default what is fastest. No score
            depends on it.
        engine: What runs the work: processes of this machine (`local`), a Ray cluster started for this run (`ray`), or one
            that is joined (`ray:auto`, `ray:HOST:PORT`). No score depends on it.
        allow_drops: Whether to score a task that lost too many clips.
        heads: Heads that replace the tasks' own, as "TASK=KIND".
        lm: Folder of the language model for the `llm` head.
        vocabulary: BERT's `vocab.txt`, for captions under X-ARES's protocol.
        shots: Numbers of training clips per class with which class tasks are scored as well.
        taps: Outputs or inner tensors to score in one pass, the first in place of the model's output; or `all-layers`. With
            `mix`, also their weighted sum with learned weights; `mix` alone is that of all layers.
        baseline: A result that no score may fall behind by more than `tolerance`.
        tolerance: The tolerated loss against the baseline, as a fraction; 0.01 by default.
        fail_under: Lowest accepted scores, as "TASK[:METHOD]=SCORE".
        trust: Whether to lift the limits on the model's size, memory and time.
        observer: Receives notes and progress.

    Returns:
        The evaluation; `result.gates` holds what became of `baseline` and `fail_under`.

    Raises:
        UsageError: An argument is invalid, or the baseline was scored in another way.
        ModelError: The model cannot be used.
        DataMissingError: A named task has no data.
        DataError: The baseline was scored on other data.
        MachineError: This machine cannot run the model or write the result.

    Example:
        >>> evaluation = evaluate("model.onnx", ["esc50"], data=Path("data"))
        >>> evaluation.result.tasks[0].score
    """
    options = ModelOptions(
        device=device,
        threads=threads,
        workers=workers,
        engine=engine,
        contract=tuple(contract),
        taps=tuple(taps),
        trust=trust,
    )
    gates = Gates.read(baseline, tolerance, fail_under)
    settings = checked_settings(
        options,
        protocol=protocol,
        seeds=seeds,
        methods=methods,
        limit=limit,
        allow_drops=allow_drops,
        heads=heads,
        lm=lm,
        vocabulary=vocabulary,
        shots=shots,
    )
    return evaluate_with(
        options,
        settings,
        gates,
        model,
        tasks,
        suite=suite,
        data=data,
        cache=cache,
        output=output,
        save=save,
        observer=observer,
    )


def evaluate_with(
    options: ModelOptions,
    settings: Settings,
    gates: Gates,
    model: str | Path,
    tasks: Sequence[str],
    *,
    suite: str | None = None,
    data: Path | None = None,
    cache: Path | None = None,
    output: Path | None = None,
    save: bool = False,
    observer: Observer = ignore,
) -> Evaluation:
    """`evaluate` with its options in records."""
    find_model(Path(model))  # a wrong path is reported before anything else
    check_engine(options.engine)
    cache = cache_folder(cache)
    notes: list[str] = []

    def observe(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        observer(event)

    selection = with_heads(choose_tasks(tasks, suite, data, cache, observe), settings)
    _check_gates(gates, selection, settings, cache, observe)
    if len(installed := onnxruntime_distributions()) > 1:
        both = " and ".join(f"{name} {version}" for name, version in installed.items())
        observe(Note(f"{both} are both installed and overwrite each other; uninstall both and install one"))
    folders = shard_folders(selection)
    reach = model_reach(selection, folders, cache)
    with open_encoder(model, _for_model(options), cache=cache, reach=reach, observer=observe) as encoder:
        if settings.mix:
            check_names([tap.name for tap in encoder.info.taps])
        if save and output is None:
            output = default_output(Path(encoder.info.path), encoder.info.scan.sha256)
        if output is not None:
            results.make_room(output)
        tools = _tools(selection, settings, encoder.spec, encoder.spec.device, cache, observe)
        described = {
            **msgspec.json.decode(msgspec.json.encode(settings)),  # as it will be read back
            **_described_tools(tools),
        }
        gates.check_settings([task for task, _ in selection], described)
        with open_engine(encoder, options, cache, folders) as engine:
            run = Run(encoder, settings, tools, cache, output, observer)
            run.all(selection, engine)
        evaluation = Evaluation(
            Result(
                encoder=_encoder_record(encoder),
                environment=environment(encoder, engine),
                settings={
                    **described,
                    "suite": suite,
                    "tasks": [task.name for task, _ in selection],
                    **gates.described(),
                },
                notes=list(dict.fromkeys([*notes, *run.notes])),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                tasks=run.results,
                averages=run.averages(0),
                averages_by_tap=run.averages_by_tap() if options.taps else {},
            ),
            run.predictions,
            run.errors,
            output,
        )
    try:
        judged = gates.judge(evaluation.side("this run"))
        evaluation.result = msgspec.structs.replace(evaluation.result, gates=judged)
    except XaresError as error:  # the baseline may have vanished meanwhile; the result is worth keeping
        evaluation.errors.append(error)
    if output is not None:
        results.write_result(output, evaluation.result, evaluation.predictions)
    return evaluation


def _check_gates(
    gates: Gates, selection: Sequence[tuple[Task, Path]], settings: Settings, cache: Path, observer: Observer
) -> None:
    """Before hours of embedding, raise if the gates cannot be judged, or if the baseline is of other data."""
    known_settings = {key: value for key, value in msgspec.to_builtins(settings).items() if key not in _BY_CONTENT}
    gates.check([task for task, _ in selection], known_settings)
    if gates.baseline is None:
        return
    scored = {record.task for record in gates.baseline.scored().values()}
    for task, folder in selection:
        if task.name in scored and has_data(task, folder):
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
    """Estimate what `evaluate` with the same arguments would read and write, and how long it would take.

    Raises:
        UsageError, ModelError, DataMissingError, DataError, MachineError: As `evaluate`.
    """
    options = ModelOptions(device=device, threads=threads, contract=tuple(contract), taps=tuple(taps), trust=trust)
    settings = checked_settings(
        options, protocol=protocol, seeds=seeds, limit=limit, heads=heads, lm=lm, vocabulary=vocabulary
    )
    cache = cache_folder(cache)
    selection = with_heads(choose_tasks(tasks, suite, data, cache, observer), settings)
    reach = model_reach(selection, shard_folders(selection), cache)
    with open_encoder(model, _for_model(options), cache=cache, reach=reach, observer=observer) as encoder:
        planned = []
        for task, folder in selection:
            if kind_of(task).needs_frames and all(tap.contract.clip_only for tap in encoder.info.taps):
                observer(Note(f"{task.name} is not planned: it needs frames, and this encoder gives one vector per clip"))
                continue
            if has_data(task, folder):
                crops = Protocol(protocol).crops(task)
                planned.append((prepare(task, folder, Digests(cache), limit, observer), crops))
        return make_plan(
            encoder,
            planned,
            Store(cache / "store"),
            protocol=Protocol(protocol),
            seeds=settings.seeds,
            mix=settings.mix,
            observer=observer,
        )


def _for_model(options: ModelOptions) -> ModelOptions:
    return replace(options, taps=model_taps(options.taps))


def default_output(model: Path, sha256: str) -> Path:
    return Path("results") / f"{model.stem}-{sha256[:8]}.json"


def _tools(
    selection: Sequence[tuple[Task, Path]],
    settings: Settings,
    spec: ModelSpec,
    device: str,
    cache: Path,
    observer: Observer,
) -> ToolSettings:
    """The vocabulary and language model that heads need."""
    if settings.vocabulary is not None and settings.protocol != "xares":
        observer(Note("--vocabulary is not used: only --protocol xares has BERT's, this one trains its own"))
    has_llm = any(task.head.kind == "llm" for task, _ in selection)
    if settings.lm is not None and not has_llm:
        observer(Note("no task has the llm head, so --lm is not used; --head librispeech=llm chooses it"))
    return ToolSettings(
        vocabulary=None if settings.vocabulary is None else Path(settings.vocabulary).absolute(),
        language_model=_language_model(settings.lm) if has_llm and settings.lm else None,
        language_device=_torch_device(device, spec.info.provider),
        checkpoints=cache / "checkpoints",
        threads=spec.threads,
        device=_heads_device(device, spec.info.provider),
    )


def _language_model(source: str) -> str:
    """A folder, which a head's process may see from elsewhere; or a name in the cache of such models."""
    return str(Path(source).absolute()) if Path(source).is_dir() else source


def _described_tools(tools: ToolSettings) -> dict[str, Any]:
    """The tools as the record names them. They are loaded for it: a wrong path shows before hours of embedding."""
    if tools.vocabulary is None and tools.language_model is None:
        return {"lm": None, "vocabulary": None}
    with local.HeadWorker() as process:
        return process.call(describe_tools, tools, returns=dict[str, Any], silence_limit=None, observer=ignore)


def _torch_device(device: str, provider: str) -> str:
    """The device of torch: `device` if torch has it, else the one that the ONNX Runtime provider runs on."""
    if device.startswith(("auto", "cpu", "cuda")):
        return device
    return "cuda" if provider in _CUDA_PROVIDERS else "cpu"


def _heads_device(device: str, provider: str) -> str | None:
    """The torch device of large heads and searches: the encoder's if that runs on CUDA; None for the CPU."""
    if provider not in _CUDA_PROVIDERS:
        return None
    return device if device.startswith("cuda") else "cuda"


def environment(encoder: Encoder, engine: Engine) -> dict[str, Any]:
    """Versions and machine: what may differ between two runs that should agree."""
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
            "instruction_sets": None if (names := instruction_sets()) is None else list(names),
            "threads": encoder.spec.threads,
            "walls": None if encoder.worker.standing is None else list(encoder.worker.standing),
            **engine.described(),
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
