"""Compare two encoders, or their results: what the second loses, gains and costs against the first, and how sure that is."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from ..data.catalog import Digests, cache_folder, choose_tasks, has_data, shipped_tasks
from ..data.selection import prepare
from ..data.task import Task, load_task
from ..embedding.drift import Drift, find_drift
from ..embedding.embed import shard_specs
from ..embedding.store import EmbeddedShard, Store
from ..encoder.encoder import Encoder, open_encoder
from ..encoder.model_file import find_model
from ..encoder.spec import ModelOptions
from ..encoder.speed import measure_together
from ..errors import DataError, UsageError, XaresError, printable, quoted
from ..progress import Event, Note, Observer, Progress, ignore
from ..scoring.kinds import kind_of
from ..scoring.protocol import Protocol, ProtocolName
from .differences import TOLERANCE, Differences, Side, check_tolerance, find_differences
from .evaluation import Evaluation, evaluate_with
from .gates import Gates
from .record import Result
from .settings import METHODS, Method, Settings, checked_settings
from .verdict import Comparison, Failure, Memory, Model, Speed, outcome_of, verdict


def compare(
    a: str | Path,
    b: str | Path,
    tasks: Sequence[str] = (),
    *,
    suite: str | None = None,
    data: Path | None = None,
    cache: Path | None = None,
    methods: Sequence[Method] | None = None,
    protocol: ProtocolName | None = None,
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
    trust: bool = False,
    tolerance: float = TOLERANCE,
    observer: Observer = ignore,
) -> Comparison:
    """Compare two models, two results, or a model with a result: how much B gains and loses against A.

    Models are evaluated with the same settings through the same store; a model beside a result is evaluated as the result
    was. Embeddings, speed and memory are compared only between two models.

    Args:
        a: The present model or result (`*.json`).
        b: Its replacement.
        tasks: Tasks, as for `evaluate`; of two results, those that both hold by default.
        tolerance: The tolerated loss, as a fraction.
        suite, data, cache, methods, protocol, seeds, limit, contract, device, threads, workers, engine, allow_drops, heads,
            lm, vocabulary, trust, observer: As for `evaluate`.

    Returns:
        The comparison. Its differences are positive if B is better.

    Raises:
        UsageError: An argument is invalid, or A and B were scored in different ways.
        DataError: They were scored on different data.
        ModelError: A model cannot be used.

    Example:
        >>> compare("fp32.onnx", "int8.onnx", ["esc50"], data=Path("data")).verdict
    """
    check_tolerance(tolerance)
    paths = (Path(a), Path(b))
    notes: list[str] = []
    stored = [Side.read(path) if path.suffix == ".json" else None for path in paths]
    for path, side in zip(paths, stored, strict=True):
        if side is None:
            find_model(path)

    def observe(event: Event) -> None:
        if isinstance(event, Note) and event.text not in notes:
            notes.append(event.text)
        observer(event)

    requested: dict[str, Any] = {"protocol": protocol, "seeds": seeds, "limit": limit, "heads": list(heads)}
    if all(stored):
        for name, value in {"suite": suite, **requested, "contract": contract}.items():
            if value:
                raise UsageError(f"both are results, so there is nothing to evaluate with --{name}; leave it out")
        first, second = (_chosen(side, tasks) for side in stored if side)
        differences = find_differences(first, second, tolerance)
        return _comparison(first.result, second.result, differences, tolerance, notes, [])
    names, gates = list(tasks), Gates()
    requested["methods"] = methods
    for path, side in zip(paths, stored, strict=True):
        if side is not None:
            names, requested = _as_scored(side, path, names, suite, requested, observe)
            gates = Gates(side, tolerance)
    requested |= {"protocol": requested["protocol"] or "corrected", "methods": requested["methods"] or METHODS}
    options = ModelOptions(
        device=device, threads=threads, workers=workers, engine=engine, contract=tuple(contract), trust=trust
    )
    settings = checked_settings(options, **requested, allow_drops=allow_drops, lm=lm, vocabulary=vocabulary)
    where: dict[str, Any] = {"suite": suite, "data": data, "cache": cache_folder(cache)}
    with ExitStack() as stack:
        encoders = []
        for path, side in zip(paths, stored, strict=True):  # an unusable model shows before hours of work
            watch = _labelled(path, observe)
            encoder = None if side else open_encoder(path, options, cache=where["cache"], observer=watch)
            encoders.append(stack.enter_context(encoder) if encoder else None)
        sides: list[Side] = []
        failures: list[Failure] = []
        for path, side in zip(paths, stored, strict=True):
            if side is None:
                watch = _labelled(path, observe)
                evaluation = evaluate_with(options, settings, gates, path, names, **where, observer=watch)
                failures += _failures(path, evaluation)
                side = evaluation.side(str(path) if paths[0].name == paths[1].name else path.name)
            sides.append(side)
        differences = find_differences(sides[0], sides[1], tolerance)
        costs: dict[str, Any] = {}
        if all(encoders) and not any(failure.exit_code in (3, 5) for failure in failures):
            one, other = (encoder for encoder in encoders if encoder)
            selection = choose_tasks(names, suite, data, where["cache"], ignore)
            costs["drift"] = list(_drifts(one, other, selection, settings, where["cache"]))
            costs |= _measured_costs(one, other, observe)
    return _comparison(sides[0].result, sides[1].result, differences, tolerance, notes, failures, **costs)


def _comparison(
    a: Result,
    b: Result,
    differences: Differences,
    tolerance: float,
    notes: Sequence[str],
    failures: Sequence[Failure],
    *,
    drift: list[Drift] | None = None,
    speed: Speed | None = None,
    memory: Memory | None = None,
) -> Comparison:
    if not differences.tasks and not failures:
        raise UsageError("A and B have no score of the same task and method; name tasks that both have")
    remarks = list(notes)
    if drift is None and not failures:
        remarks.append("embeddings and memory are compared of models only, not of results")
        speed = _recorded_speed(a, b)
    remarks += _environment_remarks(a, b)
    blank = Comparison(
        verdict="",
        outcome=outcome_of(differences.tasks),
        a=_model(a),
        b=_model(b),
        settings={name: a.settings.get(name) for name in ("protocol", "seeds", "limit")},
        tolerance=tolerance,
        tasks=differences.tasks,
        averages=differences.averages,
        unpaired=differences.unpaired,
        drift=drift,
        speed=speed,
        memory=memory,
        notes=remarks,
        failures=list(failures),
    )
    return msgspec.structs.replace(blank, verdict=verdict(blank))


def _environment_remarks(a: Result, b: Result) -> Iterator[str]:
    """How the machines of two results differ, as far as scores may depend on it."""
    if a.environment.get("provider") != b.environment.get("provider"):
        yield f"A ran on {a.environment.get('provider')} and B on {b.environment.get('provider')}"
    sets = [_instruction_sets(result) for result in (a, b)]
    if None not in sets and sets[0] != sets[1]:
        only = [sorted(set(one or ()) - set(other or ())) for one, other in (sets, sets[::-1])]
        yield "the processors differ, and the numbers of a model in 8 bits may depend on them: " + "; ".join(
            f"only {side}'s has {', '.join(names)}" for side, names in zip("AB", only, strict=True) if names
        )
    versions = [dict(result.environment.get("versions") or {}) for result in (a, b)]
    if differing := sorted(name for name in versions[0] if versions[0][name] != versions[1].get(name)):
        yield f"A and B were scored with different versions of {', '.join(differing)}"


def _model(result: Result) -> Model:
    encoder = result.encoder
    return Model(
        file=encoder.file,
        sha256=encoder.sha256,
        bytes=encoder.bytes,
        parameters=encoder.parameters,
        dim=encoder.contract.get("dim", {}).get("value"),
        provider=result.environment.get("provider"),
        instruction_sets=_instruction_sets(result),
    )


def _instruction_sets(result: Result) -> list[str] | None:
    machine = result.environment.get("machine")
    listed = machine.get("instruction_sets") if isinstance(machine, dict) else None
    return [printable(name) for name in listed if isinstance(name, str)] if isinstance(listed, list) else None


def _chosen(side: Side, names: Sequence[str]) -> Side:
    """The side with the records of `names` (tasks, patterns or task files); with all, if `names` is empty."""
    if not names:
        return side
    patterns = [load_task(Path(name)).name if name.endswith(".toml") else name for name in names]
    kept = []
    for pattern in patterns:
        of_pattern = [record for record in side.result.tasks if fnmatch.fnmatchcase(record.task, pattern)]
        if not of_pattern:
            raise UsageError(f"{side.name} holds no task {quoted(pattern)}")
        kept += [record for record in of_pattern if record not in kept]
    return Side(side.name, msgspec.structs.replace(side.result, tasks=kept), side.predictions_of)


def _as_scored(
    side: Side, path: Path, names: list[str], suite: str | None, requested: Mapping[str, Any], observer: Observer
) -> tuple[list[str], dict[str, Any]]:
    """Tasks and settings for a model that is compared with a stored result: as requested, else as the result has them."""
    recorded = side.result.settings
    settings = {
        name: requested[name] if requested[name] is not None else recorded.get(name)
        for name in ("protocol", "seeds", "limit", "methods")
    }
    heads = requested["heads"] or [f"{task}={kind}" for task, kind in recorded.get("heads", {}).items()]
    if not names and suite is None:
        scored = list(dict.fromkeys(record.task for record in side.scored().values()))
        names = [task for task in scored if task in shipped_tasks()]
        if own := [task for task in scored if task not in names]:
            observer(Note(f"{path.name} has a task of its own, {own[0]}, which is left out; name its file by --tasks"))
        heads = [pair for pair in heads if pair.partition("=")[0] in names]
    return names, {**settings, "heads": heads}


def _labelled(path: Path, observer: Observer) -> Observer:
    """An observer that adds the model's name to each event."""

    def observe(event: Event) -> None:
        match event:
            case Note(text):
                observer(Note(f"{path.name}: {text}"))
            case Progress(stage, task, done, total) if stage in ("embed", "train"):
                observer(Progress(stage, f"{task} of {path.name}", done, total))
            case _:
                observer(event)

    return observe


def _failures(path: Path, evaluation: Evaluation) -> list[Failure]:
    return [Failure(model=path.name, message=str(error), exit_code=error.exit_code) for error in evaluation.errors]


def _drifts(
    a: Encoder, b: Encoder, selection: Sequence[tuple[Task, Path]], settings: Settings, cache: Path
) -> Iterator[Drift]:
    """The drift of every task that both encoders have embedded."""
    store, protocol = Store(cache / "store"), Protocol(settings.protocol)
    for task, folder in selection:
        if not has_data(task, folder):
            continue
        try:
            plans = list(prepare(task, folder, Digests(cache), settings.limit, ignore).plans.values())
        except DataError:  # it has no score either, and the evaluation has said why
            continue
        frames = kind_of(task).needs_frames
        pairs = [
            [
                spec.key()
                for spec in shard_specs(encoder, task.name, plans, protocol.crops(task), store, frames=frames).values()
            ]
            for encoder in (a, b)
        ]
        drift = find_drift(task.name, _shards(store, zip(*pairs, strict=True)))
        if drift.clips:
            yield drift


def _shards(store: Store, keys: Iterator[tuple[str, str]]) -> Iterator[tuple[EmbeddedShard, EmbeddedShard]]:
    for key_a, key_b in keys:
        a, b = store.read(key_a), store.read(key_b)
        if a is not None and b is not None:
            yield a, b


def _measured_costs(a: Encoder, b: Encoder, observer: Observer) -> dict[str, Any]:
    """`speed` and `memory`, as far as they can be measured."""
    try:
        turns = measure_together(a, b, observer)
    except XaresError as error:  # the scores stand without it
        observer(Note(f"speed and memory could not be measured: {error}"))
        return {}
    speed = Speed(rtf_a=turns.rtf_a, rtf_b=turns.rtf_b, ratio=turns.ratio, low=turns.low, high=turns.high, together=True)
    if turns.peak_bytes_a is None or turns.peak_bytes_b is None:
        return {"speed": speed}
    return {"speed": speed, "memory": Memory(bytes_a=turns.peak_bytes_a, bytes_b=turns.peak_bytes_b)}


def _recorded_speed(a: Result, b: Result) -> Speed | None:
    """Speed as the two results recorded it, perhaps on different machines, over the tasks that both embedded."""
    rtfs: list[dict[str, tuple[float, float]]] = []
    for result in (a, b):
        rtfs.append({record.task: (record.rtf, record.audio_hours) for record in result.tasks if record.rtf})
    common = [task for task in rtfs[0] if task in rtfs[1]]
    hours = sum(rtfs[0][task][1] for task in common)
    if not hours:
        return None
    rtf_a, rtf_b = (sum(by_task[task][0] * rtfs[0][task][1] for task in common) / hours for by_task in rtfs)
    return Speed(rtf_a=rtf_a, rtf_b=rtf_b, ratio=rtf_a / rtf_b, together=False)
