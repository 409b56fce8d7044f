"""Evaluate an encoder: embed each task's shards, train heads and a kNN on the embeddings, score, and keep the record."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from ..data import audio
from ..data.catalog import Digests, cache_folder, choose_tasks, has_data
from ..data.selection import prepare
from ..data.task import Task
from ..embedding.store import Store
from ..encoder.encoder import Encoder, load_encoder, onnxruntime_distributions
from ..encoder.model_file import find_model
from ..encoder.processor import instruction_sets
from ..encoder.spec import ModelSpec
from ..errors import XaresError
from ..files import indented
from ..progress import Event, Note, Observer, ignore
from ..scoring.kinds import Tools, kind_of
from ..scoring.protocol import Protocol, ProtocolName
from ..scoring.scoring import Predictions
from ..version import __version__
from . import record as results
from .differences import Side
from .gates import Gates
from .planning import Plan, make_plan
from .record import Result, TaskResult
from .run import Run, method_by_tap
from .settings import METHODS, Method, Settings, checked_settings, with_heads

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
    """Score a model on tasks by name, pattern or file, or on a suite; without either, on every task whose data are there.

    A task that fails is recorded and the others go on; a model or machine that fails ends the run with what is done.
    With `output` or `save` the record is written, to `results/<model>-<digest8>.json` where no path is given. `heads`
    chooses heads other than the tasks' own, as "TASK=KIND"; `lm` is the language model's folder for the `llm` head, and
    `vocabulary` is BERT's vocab.txt for captions under X-ARES's protocol. `taps` are outputs or inner tensors, scored in one
    pass, the first as the model's, or `all-layers`. With `shots` the heads of class tasks are scored with that many training
    clips per class as well. Gates are judged in `result.gates`: `baseline` is a result that no score may fall behind by more
    than `tolerance`, `fail_under` holds "TASK[:METHOD]=SCORE". `trust` lifts the limits on a model's
    size, memory and time. Raises `UsageError`, `ModelError`, `DataMissingError`, `MachineError`, and `DataError` for a
    baseline of other data.
    """
    gates = Gates.read(baseline, tolerance, fail_under)
    settings = checked_settings(protocol, seeds, methods, limit, allow_drops, heads, lm, vocabulary, taps, trust, shots)
    find_model(Path(model))  # a wrong path is said before anything else
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
        tools = _load_tools(selection, settings, encoder.spec, device, cache, observe)
        described = {
            **msgspec.json.decode(msgspec.json.encode(settings)),  # as it will be read back
            "lm": tools.language_model and tools.language_model.described(),
            "vocabulary": tools.vocabulary and tools.vocabulary.digest,
        }
        gates.check_settings([task for task, _ in selection], described)
        run = Run(encoder, settings, tools, cache, output, observe)
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
        for task, folder in with_heads(choose_tasks(tasks, suite, data, cache, observer), settings):
            if kind_of(task).needs_frames and all(tap.contract.clip_only for tap in encoder.info.taps):
                observer(Note(f"{task.name} is not planned: it needs frames, and this encoder gives one vector a clip"))
                continue
            if has_data(task, folder):
                crops = Protocol(protocol).crops(task)
                found.append((prepare(task, folder, Digests(cache), limit, observer), crops))
        return make_plan(
            encoder,
            found,
            Store(cache / "store"),
            protocol=Protocol(protocol),
            seeds=settings.seeds,
            observer=observer,
        )


def default_output(model: Path, sha256: str) -> Path:
    return Path("results") / f"{model.stem}-{sha256[:8]}.json"


def _load_tools(
    selection: Sequence[tuple[Task, Path]],
    settings: Settings,
    spec: ModelSpec,
    device: str,
    cache: Path,
    observer: Observer,
) -> Tools:
    """What some heads need, at once: a folder that holds none of it is better said before hours of embedding."""
    vocabulary, language_model = None, None
    if settings.vocabulary is not None:
        from ..probes.wordpiece import WordPiece

        vocabulary = WordPiece.from_file(Path(settings.vocabulary))
        if settings.protocol != "xares":
            observer(Note("--vocabulary is not used: only --protocol xares has BERT's, this one trains its own"))
    if any(task.head.kind == "llm" for task, _ in selection):
        from ..models.llm import LanguageModel

        assert settings.lm is not None
        language_model = LanguageModel(settings.lm, _torch_device(device, spec.info.provider))
    elif settings.lm is not None:
        observer(Note("no task has the llm head, so --lm is not used; --head librispeech=llm chooses it"))
    return Tools(
        vocabulary=vocabulary, language_model=language_model, checkpoints=cache / "checkpoints", threads=spec.threads
    )


def _torch_device(device: str, provider: str) -> str:
    """Where torch runs what it has to: as asked for, or where the encoder runs if an ONNX Runtime provider was named."""
    if device.startswith(("auto", "cpu", "cuda")):
        return device
    return "cuda" if provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider") else "cpu"


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
            "instruction_sets": None if (held := instruction_sets()) is None else list(held),
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
