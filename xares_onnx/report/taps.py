"""Scores by tap: a row per output or layer, a column per task and method, and the best tap.

The best tap is the one with the best score on the selection clips, so that its score on the test clips does not flatter it.
Where a tap has no such score, the best is chosen on the test clips, and marked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from ..errors import printable
from ..evaluation.record import Result, TaskResult
from .tables import empty_table

_COLUMN = 13  # characters of a column, at least: as many as fit stand in one table
_ON_TEST = " (test)"


@dataclass(frozen=True)
class Best:
    """The record of the best tap, and whether it was chosen on the test clips."""

    record: TaskResult
    on_test: bool


def selection_score(record: TaskResult) -> float | None:
    """The score on the selection clips, higher is better: a kNN's, or a head's by the best of its settings; None without."""
    if record.method == "knn":
        return record.selection
    tried = record.tuning.tried if record.tuning else []
    scores = [trial.selection for trial in tried if trial.selection is not None]
    return max(scores, default=None)


def best_tap(records: Iterable[TaskResult]) -> Best | None:
    """The best of one task and method by tap; the first of equal ones. None without a score."""
    scored = [record for record in records if record.score is not None]
    if not scored:
        return None
    selection = [score for record in scored if (score := selection_score(record)) is not None]
    if len(selection) == len(scored):
        return Best(scored[selection.index(max(selection))], on_test=False)
    sign = 1 if scored[0].higher_is_better else -1
    return Best(max(scored, key=lambda record: sign * (record.score or 0.0)), on_test=True)


def best_note(on_test: Iterable[bool]) -> str:
    """How the best taps were chosen."""
    kinds = set(on_test)
    parts = ["the best tap is the best on the selection clips"] if False in kinds else []
    parts += (
        [f"{_ON_TEST.strip()}: the best on the test clips themselves, so its score flatters it"] if True in kinds else []
    )
    return "; ".join(parts)


def print_taps(result: Result, console: Console) -> None:
    """The scores of every tap; nothing where there is only one."""
    taps = ordered_taps(result)
    if len(taps) < 2:
        return
    columns = _columns(result)
    fit = max(1, (console.width - max(len(tap) for tap in taps) - 2) // _COLUMN)
    for start in range(0, len(columns), fit):
        some = columns[start : start + fit]
        table = empty_table(console, ("tap",), [f"{printable(records[0].title)} {kind}" for kind, records in some])
        for column in table.columns[1:]:
            column.no_wrap = False
        best = [best_tap(records) for _, records in some]
        output = result.encoder.taps[0]
        for tap in taps:
            cells = (_cell(tap, output, records, first) for (_, records), first in zip(some, best, strict=True))
            table.add_row(printable(tap), *cells)
        table.add_section()
        table.add_row("best", *(_name(first, output) for first in best))
        console.print(table, soft_wrap=False)
    console.print(best_note(first.on_test for _, records in columns if (first := best_tap(records))))


def ordered_taps(result: Result) -> list[str]:
    """Taps from the input to the output."""
    taps = result.encoder.taps
    if len(taps) > 1 and all(tap.startswith("layer.") for tap in taps[1:]):
        return [*taps[1:], taps[0]]  # the model's output is behind its layers
    return taps


def _columns(result: Result) -> list[tuple[str, list[TaskResult]]]:
    """(head or knn, records of every tap), for each task and method that has a score."""
    found: dict[tuple[str, str], list[TaskResult]] = {}
    for record in result.tasks:
        found.setdefault((record.task, "knn" if record.method == "knn" else "head"), []).append(record)
    taps = ordered_taps(result)
    for records in found.values():
        records.sort(key=lambda record: taps.index(record.tap or result.encoder.taps[0]))
    return [(kind, records) for (_, kind), records in found.items() if any(r.score is not None for r in records)]


def _name(best: Best | None, output: str) -> str:
    return f"{printable(best.record.tap or output)}{_ON_TEST if best.on_test else ''}" if best else ""


def _cell(tap: str, output: str, records: Sequence[TaskResult], best: Best | None) -> Text | str:
    for record in records:
        if (record.tap or output) != tap:
            continue
        if record.score is None:
            return Text(record.status.replace("_", " "), style="yellow")
        return Text(f"{record.score:.3f}", style="bold" if best and record is best.record else "")
    return ""
