"""Compare two encoders, or their results: what the second loses, gains and costs against the first, and how sure that is."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
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
from ..encoder.encoder import Encoder, load_encoder
from ..encoder.model_file import find_model
from ..encoder.speed import measure_together
from ..errors import DataError, UsageError, XaresError, printable
from ..progress import Event, Note, Observer, Progress, ignore
from ..scoring.kinds import kind_of
from ..scoring.protocol import Protocol, ProtocolName
from .differences import TOLERANCE, Differences, Side, check_tolerance, find_differences
from .evaluation import Evaluation, evaluate
from .record import Result
from .settings import METHODS, Method
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
    allow_drops: bool = False,
    heads: Sequence[str] = (),
    lm: str | None = None,
    vocabulary: Path | None = None,
    trust: bool = False,
    tolerance: float = TOLERANCE,
    observer: Observer = ignore,
) -> Comparison:
    """`a` and `b` are results (`*.json`) or models, which are evaluated with the same settings through the same store.

    A model beside a result is evaluated as the result was. Of two results `tasks` chooses among those that they hold.
    Embeddings, speed and memory are compared where both are models. Raises `UsageError` where they were scored in different
    ways, `DataError` where on different data, `ModelError` where a model cannot be used.
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

    scoring: dict[str, Any] = {"suite": suite, "protocol": protocol, "seeds": seeds, "limit": limit, "heads": list(heads)}
    if all(stored):
        for name, value in {**scoring, "contract": contract}.items():
            if value:
                raise UsageError(f"both are results, so there is nothing to evaluate with --{name}; leave it out")
        first, second = (_chosen(side, tasks) for side in stored if side)
        found = find_differences(first, second, tolerance)
        return _comparison(first.result, second.result, found, tolerance, notes, [])
    machine: dict[str, Any] = {"cache": cache_folder(cache), "device": device, "threads": threads, "contract": contract}
    machine["trust"] = trust
    scoring |= {"data": data, "methods": methods, "allow_drops": allow_drops, "lm": lm, "vocabulary": vocabulary}
    names = list(tasks)
    for path, side in zip(paths, stored, strict=True):
        if side is not None:
            names, scoring = _as_scored(side, path, names, scoring, observe)
            scoring |= {"baseline": path, "tolerance": tolerance}
    scoring |= {"protocol": scoring["protocol"] or "corrected", "methods": scoring["methods"] or METHODS}
    with ExitStack() as stack:
        encoders = []
        for path, side in zip(paths, stored, strict=True):  # a model that cannot be used is known before hours of work
            watch = _labelled(path, observe)
            encoders.append(None if side else stack.enter_context(load_encoder(path, **machine, observer=watch)))
        sides: list[Side] = []
        failures: list[Failure] = []
        for path, side in zip(paths, stored, strict=True):
            if side is None:
                done = evaluate(path, names, **scoring, **machine, observer=_labelled(path, observe))
                failures += _failures(path, done)
                side = done.side(str(path) if paths[0].name == paths[1].name else path.name)
            sides.append(side)
        found = find_differences(sides[0], sides[1], tolerance)
        more: dict[str, Any] = {}
        if all(encoders) and not any(failure.exit_code in (3, 5) for failure in failures):
            one, other = (encoder for encoder in encoders if encoder)
            selection = choose_tasks(names, suite, data, machine["cache"], ignore)
            more["drift"] = list(_drifts(one, other, selection, scoring, machine["cache"]))
            more |= _measured(one, other, observe)
    return _comparison(sides[0].result, sides[1].result, found, tolerance, notes, failures, **more)


def _comparison(
    a: Result,
    b: Result,
    found: Differences,
    tolerance: float,
    notes: Sequence[str],
    failures: Sequence[Failure],
    *,
    drift: list[Drift] | None = None,
    speed: Speed | None = None,
    memory: Memory | None = None,
) -> Comparison:
    if not found.tasks and not failures:
        raise UsageError("A and B have no score of the same task and method; name tasks that both have")
    said = list(notes)
    if drift is None and not failures:
        said.append("embeddings and memory are compared of models only, not of results")
        speed = _recorded_speed(a, b)
    if a.environment.get("provider") != b.environment.get("provider"):
        said.append(f"A ran on {a.environment.get('provider')} and B on {b.environment.get('provider')}")
    held = [_instruction_sets(result) for result in (a, b)]
    if None not in held and held[0] != held[1]:
        only = [sorted(set(one or ()) - set(other or ())) for one, other in (held, held[::-1])]
        said.append(
            "the processors differ, on which the numbers of a model in 8 bits may depend: "
            + "; ".join(f"only {side}'s has {', '.join(names)}" for side, names in zip("AB", only, strict=True) if names)
        )
    versions = [dict(result.environment.get("versions") or {}) for result in (a, b)]
    if differ := sorted(name for name in versions[0] if versions[0][name] != versions[1].get(name)):
        said.append(f"A and B were scored with other versions of {', '.join(differ)}")
    blank = Comparison(
        verdict="",
        outcome=outcome_of(found.tasks),
        a=_model(a),
        b=_model(b),
        settings={name: a.settings.get(name) for name in ("protocol", "seeds", "limit")},
        tolerance=tolerance,
        tasks=found.tasks,
        averages=found.averages,
        unpaired=found.unpaired,
        drift=drift,
        speed=speed,
        memory=memory,
        notes=said,
        failures=list(failures),
    )
    return msgspec.structs.replace(blank, verdict=verdict(blank))


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
    """The side with the records of the tasks that are named, by name, pattern or file; all, where none is."""
    if not names:
        return side
    patterns = [load_task(Path(name)).name if name.endswith(".toml") else name for name in names]
    kept = []
    for pattern in patterns:
        of_pattern = [record for record in side.result.tasks if fnmatch.fnmatchcase(record.task, pattern)]
        if not of_pattern:
            raise UsageError(f"{side.name} holds no task {pattern!r}")
        kept += [record for record in of_pattern if record not in kept]
    return Side(side.name, msgspec.structs.replace(side.result, tasks=kept), side.predictions_of)


def _as_scored(
    side: Side, path: Path, names: list[str], scoring: dict[str, Any], observer: Observer
) -> tuple[list[str], dict[str, Any]]:
    """What to evaluate a model with, to be compared with a result: what was asked for, and where nothing was, as it was."""
    settings = side.result.settings
    made = dict(scoring)
    for name in ("protocol", "seeds", "limit", "methods"):
        made[name] = made[name] if made[name] is not None else settings.get(name)
    made["heads"] = made["heads"] or [f"{task}={kind}" for task, kind in settings.get("heads", {}).items()]
    if not names and made["suite"] is None:
        scored = list(dict.fromkeys(record.task for record in side.scored().values()))
        names = [task for task in scored if task in shipped_tasks()]
        if own := [task for task in scored if task not in names]:
            observer(Note(f"{path.name} has a task of its own, {own[0]}, which is left out; name its file by --tasks"))
        made["heads"] = [pair for pair in made["heads"] if pair.partition("=")[0] in names]
    return names, made


def _labelled(path: Path, observer: Observer) -> Observer:
    """Tells of which model an event is."""

    def observe(event: Event) -> None:
        match event:
            case Note(text):
                observer(Note(f"{path.name}: {text}"))
            case Progress(stage, task, done, total) if stage in ("embed", "train"):
                observer(Progress(stage, f"{task} of {path.name}", done, total))
            case _:
                observer(event)

    return observe


def _failures(path: Path, done: Evaluation) -> list[Failure]:
    return [Failure(model=path.name, message=str(error), exit_code=error.exit_code) for error in done.errors]


def _drifts(
    a: Encoder, b: Encoder, selection: Sequence[tuple[Task, Path]], scoring: dict[str, Any], cache: Path
) -> Iterator[Drift]:
    """Of every task that both encoders have embedded."""
    store, protocol = Store(cache / "store"), Protocol(scoring["protocol"])
    for task, folder in selection:
        if not has_data(task, folder):
            continue
        try:
            plans = list(prepare(task, folder, Digests(cache), scoring["limit"], ignore).plans.values())
        except DataError:  # it has no score either, and why is told there
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
    for mine, other in keys:
        first, second = store.read(mine), store.read(other)
        if first is not None and second is not None:
            yield first, second


def _measured(a: Encoder, b: Encoder, observer: Observer) -> dict[str, Any]:
    try:
        found = measure_together(a, b, observer)
    except XaresError as error:  # the scores stand without it
        observer(Note(f"speed and memory could not be measured: {error}"))
        return {}
    made: dict[str, Any] = {
        "speed": Speed(
            rtf_a=found.rtf_a,
            rtf_b=found.rtf_b,
            ratio=found.ratio,
            low=found.low,
            high=found.high,
            together=True,
        )
    }
    if found.peak_bytes_a is not None and found.peak_bytes_b is not None:
        made["memory"] = Memory(bytes_a=found.peak_bytes_a, bytes_b=found.peak_bytes_b)
    return made


def _recorded_speed(a: Result, b: Result) -> Speed | None:
    """From the runs that made the results, over the tasks that both embedded then: on whatever machine that was."""
    rtfs: list[dict[str, tuple[float, float]]] = []
    for result in (a, b):
        rtfs.append({record.task: (record.rtf, record.audio_hours) for record in result.tasks if record.rtf})
    common = [task for task in rtfs[0] if task in rtfs[1]]
    hours = sum(rtfs[0][task][1] for task in common)
    if not hours:
        return None
    mine, other = (sum(of[task][0] * rtfs[0][task][1] for task in common) / hours for of in rtfs)
    return Speed(rtf_a=mine, rtf_b=other, ratio=mine / other, together=False)


# ---------------------------------------------------------------- in words
