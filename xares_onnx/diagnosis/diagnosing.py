"""The verb `diagnose`: two models are opened, paired, measured, and their difference is put down to operators in points."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from math import inf, isfinite, log10
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
import numpy.typing as npt

from ..data.catalog import Digests, cache_folder, choose_tasks
from ..data.selection import prepare
from ..encoder.encoder import Encoder, open_encoder
from ..encoder.spec import ModelOptions
from ..encoder.worker import Array
from ..errors import DataError, UsageError
from ..evaluation.differences import TOLERANCE, Difference, check_tolerance, find_differences
from ..evaluation.settings import checked_settings
from ..progress import Event, Note, Observer, ignore
from ..scoring.protocol import ProtocolName
from .attribution import Judge, points_of
from .clips import ShardClips, read_clips, shards_of
from .figures import Measurement, StepFigures
from .findings import Departure, Diagnosis, Fix, Points, Regained
from .fixing import fix_within
from .groups import Trials, groups_of, try_groups
from .process import Process
from .reference_tensors import NamedFigures, compare_tensors, read_tensors
from .running import clip_samples
from .tensors import measure

OWN_TASKS = ("synthetic_pitch", "synthetic_vowel", "synthetic_tempo")
"""What is scored and heard if no data are named: tasks whose clips the program makes itself."""
CLIPS, LIMIT, GROUPS = 32, 200, 4
SUSPECT_DECIBELS = 10.0


def diagnose(
    a: str | Path,
    b: str | Path,
    tasks: Sequence[str] = (),
    *,
    suite: str | None = None,
    data: Path | None = None,
    cache: Path | None = None,
    fix: Path | None = None,
    budget: float = 0.5,
    points: bool = True,
    groups: int = GROUPS,
    clips: int = CLIPS,
    limit: int | None = LIMIT,
    seeds: int | None = None,
    protocol: ProtocolName = "corrected",
    contract: Sequence[str] = (),
    threads: int | None = None,
    trust: bool = False,
    tolerance: float = TOLERANCE,
    observer: Observer = ignore,
) -> Diagnosis:
    """Find where B departs from A, what that costs in points of the tasks, and what gets them back.

    Args:
        a: The reference: a model, or a `.npz` of named inner tensors (see `reference_tensors`).
        b: Its copy: quantised, in half precision, exported again.
        tasks: Tasks that are scored, as for `evaluate`; three synthetic ones if no suite and no `data` are named either.
        suite, data, cache, seeds, protocol, contract, threads, trust, observer: As for `evaluate`. Models run on the CPU.
        fix: Where to write the cheapest file within `budget` of A.
        budget: Points that the fixed file may lose.
        points: Whether tasks are scored at all.
        groups: How many groups of operators are scored.
        clips: How many clips tensors are compared on.
        limit: Most clips of each split that are scored; None for all.
        tolerance: As for `compare`.

    Returns:
        The diagnosis.

    Raises:
        UsageError: An argument is invalid.
        ModelError: A model cannot be used, or the two are not versions of one encoder.
        DataMissingError: A named task has no data.

    Example:
        >>> diagnose("fp32.onnx", "int8.onnx", ["esc50"], data=Path("env")).verdict
    """
    check_tolerance(tolerance)
    if not 0 <= budget < 100:
        raise UsageError(f"--budget {budget:g} must be at least 0 and below 100 points")
    if fix is not None and not points:
        raise UsageError("--fix needs the points, to know what the file loses; leave out --no-points")
    if Path(a).suffix == ".npz":
        if fix is not None:
            raise UsageError("--fix takes operators from A, so A must be a model and not a .npz")
        return _against_tensors(Path(a), Path(b), contract, threads, trust, cache_folder(cache), observer)
    notes: list[str] = []

    def observe(event: Event) -> None:
        if isinstance(event, Note) and event.text not in notes:
            notes.append(event.text)
        observer(event)

    cache = cache_folder(cache)
    if not tasks and suite is None and data is None:
        tasks = OWN_TASKS
        observe(Note(f"no --data, --tasks or --suite: the program's own audio is used ({', '.join(OWN_TASKS)})"))
    selection = choose_tasks(tasks, suite, data, cache, observe)
    options = ModelOptions(device="cpu", threads=threads, contract=tuple(contract), trust=trust)
    settings = checked_settings(
        options, protocol=protocol, seeds=seeds, limit=limit, heads=(), lm=None, vocabulary=None, methods=("head",)
    )
    with ExitStack() as stack:
        encoder_a, encoder_b = (
            stack.enter_context(open_encoder(path, options, cache=cache, observer=observe)) for path in (a, b)
        )
        _check_alike(encoder_a, encoder_b)
        prepared = [prepare(task, folder, Digests(cache), limit, observe) for task, folder in selection]
        infos = (encoder_a.info, encoder_b.info)
        process = stack.enter_context(Process(infos, trust, observe))
        waveforms = _waveforms(encoder_a, encoder_b, process, shards_of(prepared), clips)
        measurement = process.call(measure, infos, encoder_a.spec.threads, trust, waveforms, returns=Measurement)
        chosen = groups_of(measurement)
        trials = Trials(noise=measurement.steps[-1].noise, trials=[], notes=[])
        if chosen and points:
            trials = process.call(
                try_groups,
                infos,
                encoder_a.spec.threads,
                trust,
                measurement,
                chosen,
                waveforms,
                returns=Trials,
            )
        lost: Points | None = None
        differences: list[Difference] = []
        regained: list[Regained] = []
        written: Fix | None = None
        if points:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="xares-onnx-diagnose-")))
            where = {"suite": suite, "data": data, "cache": cache}
            names = [] if suite else [task.name for task, _ in selection] if not tasks else list(tasks)
            judge = Judge(
                encoder_a, encoder_b, process, options, settings, names, where, folder, measurement, waveforms, observe
            )
            side_a, side_b = judge.side(Path(a), "A"), judge.side(Path(b), "B")
            lost = points_of(side_b, side_a)
            differences = find_differences(side_a, side_b, tolerance).tasks
            regained = judge.regained(trials, side_b, groups)
            if fix is not None:
                written = fix_within(judge, side_a, side_b, regained, Path(fix), budget, tolerance)
    ranked = suspects(measurement.steps)
    result = Diagnosis(
        verdict="",
        a=Path(encoder_a.info.path).name,
        b=Path(encoder_b.info.path).name,
        bytes_a=encoder_a.info.scan.bytes,
        bytes_b=encoder_b.info.scan.bytes,
        tasks=[task.name for task, _ in selection],
        clips=measurement.clips,
        seconds=measurement.seconds,
        layers=measurement.layers,
        lost=lost,
        differences=differences,
        output_noise=trials.noise,
        suspects=ranked,
        departure=_departure(measurement.steps),
        steps=measurement.steps,
        unpaired_a=measurement.unpaired_a,
        unpaired_b=measurement.unpaired_b,
        regained=regained,
        fix=written,
        notes=[*notes, *measurement.notes, *trials.notes],
    )
    return msgspec.structs.replace(result, verdict=verdict_of(result))


def suspects(steps: Sequence[StepFigures]) -> list[int]:
    """Numbers of the operators whose own error is far above that of their kind, worst first."""
    ranked = sorted(range(len(steps)), key=lambda number: -steps[number].excess)
    return [number for number in ranked if steps[number].excess > SUSPECT_DECIBELS]


def verdict_of(diagnosis: Diagnosis) -> str:
    """One line: what is lost, the worst suspect, and what regains the most."""
    parts = []
    if diagnosis.lost is not None:
        parts.append(
            f"B scores {Points(points=-diagnosis.lost.points, ci95=diagnosis.lost.ci95, by_task={}).text} against A"
        )
    if diagnosis.suspects:
        step = diagnosis.steps[diagnosis.suspects[0]]
        how = step.pattern or f"{step.excess:.0f} dB more error than its kind"
        parts.append(f"suspect: {step.title} ({how})")
    elif any(step.differs for step in diagnosis.steps):
        parts.append("no operator has much more error than its kind")
    else:
        parts.append("every paired operator computes the same")
    scored = [entry for entry in diagnosis.regained if entry.points is not None and entry.points.points > 0]
    if scored and diagnosis.lost is not None and diagnosis.lost.points > 0:
        best = scored[0]
        assert best.points is not None
        parts.append(f"{best.title} in float: {best.points.text}")
    return "; ".join(parts)


def _departure(steps: Sequence[StepFigures]) -> Departure | None:
    """The first operator in topological order that does what its kind does not."""
    for step in steps:
        if step.excess > SUSPECT_DECIBELS:
            noise = step.local_noise
            snr = -10 * log10(noise) if noise and isfinite(noise) else None
            return Departure(tensor=step.tensor_b, title=step.title, pattern=step.pattern, cosine=step.cosine, snr=snr)
    return None


def _against_tensors(
    a: Path, b: Path, contract: Sequence[str], threads: int | None, trust: bool, cache: Path, observer: Observer
) -> Diagnosis:
    """The diagnosis of B against named inner tensors."""
    reference = read_tensors(a)
    notes: list[str] = []

    def observe(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        observer(event)

    options = ModelOptions(device="cpu", threads=threads, contract=tuple(contract), trust=trust)
    with ExitStack() as stack:
        encoder = stack.enter_context(open_encoder(b, options, cache=cache, observer=observe))
        process = stack.enter_context(Process((encoder.info,), trust, observer))
        if encoder.contract.sample_rate != reference.rate:
            raise UsageError(
                f"{a} is of {reference.rate} Hz and B takes {encoder.contract.sample_rate} Hz; write tensors of B's rate"
            )
        arguments = (encoder.info, encoder.spec.threads, trust, reference.waveforms, reference.tensors)
        named = process.call(compare_tensors, *arguments, returns=list[NamedFigures])
        first = next((figures for figures in named if not figures.right and figures.tensor is not None), None)
        right = sum(figures.right for figures in named)
        verdict = f"{right} of {len(named)} tensors are right"
        if first is not None:
            verdict = f"wrong from {first.name} on ({first.title}): {first.pattern or 'everywhere'}; {verdict}"
        return Diagnosis(
            verdict=verdict,
            a=a.name,
            b=Path(encoder.info.path).name,
            bytes_a=a.stat().st_size,
            bytes_b=encoder.info.scan.bytes,
            tasks=[],
            clips=len(reference.waveforms),
            seconds=reference.waveforms.size / reference.rate,
            layers=0,
            lost=None,
            differences=[],
            output_noise=named[-1].noise,
            suspects=[],
            departure=None if first is None else _departure_of(first),
            steps=[],
            unpaired_a=[figures.name for figures in named if figures.tensor is None],
            unpaired_b=[],
            regained=[],
            fix=None,
            named=named,
            notes=notes,
        )


def _departure_of(figures: NamedFigures) -> Departure:
    snr = -10 * log10(figures.noise) if 0 < figures.noise < inf else None
    return Departure(
        tensor=figures.tensor or "", title=figures.title, pattern=figures.pattern, cosine=figures.cosine, snr=snr
    )


def _check_alike(a: Encoder, b: Encoder) -> None:
    if a.contract.sample_rate != b.contract.sample_rate:
        raise UsageError(
            f"A takes {a.contract.sample_rate} Hz and B {b.contract.sample_rate} Hz, so they are two encoders; "
            "declare the right one by --contract sample_rate=N"
        )


def _waveforms(
    a: Encoder, b: Encoder, process: Process, shards: list[ShardClips], count: int
) -> list[npt.NDArray[np.float32]]:
    least = min(max(a.contract.min_samples, b.contract.min_samples), clip_samples(a.contract, b.contract))
    rate = a.contract.sample_rate
    arrays = process.call(read_clips, shards, count, rate, least, returns=list[Array])
    if not arrays:
        raise DataError("no clip of these tasks could be decoded, so there is nothing to compare tensors on")
    return [array.numpy() for array in arrays]
