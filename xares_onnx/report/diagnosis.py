"""A diagnosis for people: tables in a terminal, Markdown, and cases for a build server."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from ..diagnosis.figures import StepFigures
from ..diagnosis.findings import Diagnosis, Fix, Regained
from ..diagnosis.reference_tensors import NamedFigures
from ..errors import printable
from .ci import Case, Status, markdown_cell
from .tables import empty_table
from .units import data_size

_SUSPECTS = ("suspect", "operator"), ("own SNR", "its kind", "excess"), ("pattern",)
_DEPTH = ("depth",), ("cosine", "SNR", "CKA"), ("", "worst operator there", "its own SNR")
_REGAINED = ("as in A",), ("operators", "points", "file", "time", "SNR of embeddings"), ()
_NAMED = ("tensor", "operator", "found by"), ("cosine", "SNR"), ("departs",)
_MOST_ROWS = 10
_MOST_UNPAIRED = 5
_FULL_BAR_DECIBELS = 60.0

Headings = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
Rows = list[tuple[str, ...]]


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """The verdict, then what departs, the drift along the depth, what regains points, and the file that was written."""
    console.print(Text(printable(diagnosis.verdict), style="bold"))
    for title, headings, rows in tables(diagnosis):
        console.print(Text(title))
        table = empty_table(console, *headings)
        for row in rows:
            table.add_row(*map(printable, row))
        console.print(table, soft_wrap=False)
    for line in remarks(diagnosis):
        console.print(Text(printable(line)))


def markdown(diagnosis: Diagnosis) -> str:
    """For a step summary or a comment."""
    parts = [f"### {markdown_cell(diagnosis.verdict)}"]
    for title, (words, numbers, more), rows in tables(diagnosis):
        aligned = ["---"] * len(words) + ["---:"] * len(numbers) + ["---"] * len(more)
        lines = [[*words, *numbers, *more], aligned, *([markdown_cell(cell) for cell in row] for row in rows)]
        parts += [f"**{title}**", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    parts += ["\n".join(f"- {markdown_cell(line)}" for line in remarks(diagnosis))]
    return "\n\n".join(parts) + "\n"


def cases(diagnosis: Diagnosis) -> list[Case]:
    """A case per score, a warning per suspect, and the fixed file."""
    listed = []
    failed = {id(difference) for difference in diagnosis.failed}
    for difference in diagnosis.differences:
        status: Status = "fail" if id(difference) in failed else "pass"
        message = f"B - A is {100 * difference.difference:+.1f} points"
        listed.append(Case("scores", f"{difference.task} {difference.method}", status, message))
    for number in diagnosis.suspects[:_MOST_ROWS]:
        step = diagnosis.steps[number]
        listed.append(Case("operators", step.title, "warn", _suspicion(step)))
    for figures in diagnosis.named:
        status = "pass" if figures.right else "fail" if figures.tensor is not None else "warn"
        listed.append(Case("tensors", figures.name, status, figures.pattern or f"SNR {decibels(figures.noise)}"))
    if diagnosis.fix is not None:
        listed.append(Case("fix", "file", "fail" if diagnosis.fix.path is None else "pass", diagnosis.fix.verdict))
    return sorted(listed, key=lambda case: ("fail", "warn", "pass", "skip").index(case.status))


def decibels(noise: float | None) -> str:
    """Noise as a share of power, as a signal-to-noise ratio."""
    if noise is None:
        return ""
    if noise == 0:
        return "exact"
    return f"{-10 * math.log10(noise) + 0.0:.1f} dB" if math.isfinite(noise) else "broken"


def _suspicion(step: StepFigures) -> str:
    how = f": {step.pattern}" if step.pattern else ""
    return f"its own error is at {decibels(_own(step))} where its kind has {decibels(step.expected)}{how}"


def _own(step: StepFigures) -> float | None:
    if step.local_shape is not None:
        return math.inf
    return step.local_noise if step.batch_noise is None else max(step.batch_noise, step.local_noise or 0.0)


def tables(diagnosis: Diagnosis) -> Iterator[tuple[str, Headings, Rows]]:
    if diagnosis.named:
        yield "The reference's tensors, in their order", _NAMED, [_named_cells(figures) for figures in diagnosis.named]
        return
    if diagnosis.suspects:
        rows = [_suspect_cells(diagnosis.steps[number]) for number in diagnosis.suspects[:_MOST_ROWS]]
        yield "Operators with more error of their own than their kind, fed with A's tensors", _SUSPECTS, rows
    yield "Drift along the depth: how far B's tensors are from A's", _DEPTH, list(_depth_rows(diagnosis))
    if diagnosis.regained:
        ranked = [entry for entry in diagnosis.regained if entry.points is not None]
        ranked += sorted((e for e in diagnosis.regained if e.points is None), key=_noise_of)
        yield "Put back to float", _REGAINED, [_regained_cells(entry) for entry in ranked[:_MOST_ROWS]]


def _named_cells(figures: NamedFigures) -> tuple[str, ...]:
    state = "" if figures.right else figures.pattern or "wrong"
    return figures.name, figures.title, figures.found_by, f"{figures.cosine:.5f}", decibels(figures.noise), state


def _noise_of(entry: Regained) -> float:
    return math.inf if entry.noise is None else entry.noise


def _suspect_cells(step: StepFigures) -> tuple[str, ...]:
    excess = f"{step.excess:.0f} dB" if math.isfinite(step.excess) else ""
    pattern = step.pattern or ("only where clips share a call" if step.batch_noise is not None else "")
    return step.place.text, f"{step.operator} {step.name}", decibels(_own(step)), decibels(step.expected), excess, pattern


def _depth_rows(diagnosis: Diagnosis) -> Iterator[tuple[str, ...]]:
    """A row per layer: the last of its tensors, and the operator of the greatest error of its own."""
    by_layer: dict[int, list[StepFigures]] = {}
    for step in diagnosis.steps:
        by_layer.setdefault(step.place.layer, []).append(step)
    for steps in by_layer.values():
        last, worst = steps[-1], max(steps, key=lambda step: _own(step) or 0.0)
        cka = "" if last.cka is None else f"{last.cka:.4f}"
        place = last.place.text.split("'")[0] or "all"
        worst_cells = (f"{worst.operator} {worst.name}", decibels(_own(worst))) if _own(worst) else ("", "")
        yield place, f"{last.cosine:.5f}", decibels(last.noise), cka, _bar(last.noise), *worst_cells


def _bar(noise: float) -> str:
    if noise <= 0:
        return ""
    ratio = -10 * math.log10(noise) if math.isfinite(noise) else 0.0
    return "=" * round(20 * min(1.0, max(0.0, 1 - ratio / _FULL_BAR_DECIBELS)))


def _regained_cells(entry: Regained) -> tuple[str, ...]:
    more = "" if entry.more_bytes is None else ("-" if entry.more_bytes < 0 else "+") + data_size(abs(entry.more_bytes))
    time = "" if entry.time_ratio is None else f"{entry.time_ratio:.2f}x"
    points = "" if entry.points is None else entry.points.text.removesuffix(" points")
    return (
        entry.title,
        str(len(entry.steps)),
        points,
        more,
        time,
        decibels(entry.noise) if entry.noise is not None else "does not fit",
    )


def remarks(diagnosis: Diagnosis) -> Iterator[str]:
    scored = f", scored on {', '.join(diagnosis.tasks)}" if diagnosis.lost is not None else ""
    yield (
        f"A {diagnosis.a} of {data_size(diagnosis.bytes_a)}, B {diagnosis.b} of {data_size(diagnosis.bytes_b)}; "
        f"{len(diagnosis.steps)} operators on {diagnosis.clips} clips of {diagnosis.seconds / max(diagnosis.clips, 1):.1f} s"
        f"{scored}"
    )
    for side, names in (("A", diagnosis.unpaired_a), ("B", diagnosis.unpaired_b)):
        if names:
            more = f" and {len(names) - _MOST_UNPAIRED} more" if len(names) > _MOST_UNPAIRED else ""
            yield f"not paired in {side}: {', '.join(names[:_MOST_UNPAIRED])}{more}"
    if diagnosis.fix is not None:
        yield from _fix_lines(diagnosis.fix)
    yield from diagnosis.notes


def _fix_lines(fix: Fix) -> Iterator[str]:
    yield fix.verdict
    if fix.groups:
        yield f"in float: {', '.join(fix.groups)}"
    yield from fix.recipe
