"""Scores by tap: a row an output or layer, a column a task and method, and which tap is best."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from ..errors import printable
from ..evaluation.record import Result, TaskResult
from .tables import empty_table

_COLUMN = 13  # characters of a column, at least: as many as fit stand in one table


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
        best = [_best(records) for _, records in some]
        output = result.encoder.taps[0]
        for tap in taps:
            cells = (_cell(tap, output, records, first) for (_, records), first in zip(some, best, strict=True))
            table.add_row(printable(tap), *cells)
        table.add_section()
        table.add_row("best", *(printable(record.tap or output) if record else "" for record in best))
        console.print(table, soft_wrap=False)
    console.print("the best tap is chosen on the test clips themselves, so its score flatters it")


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
    return [(kind, records) for (_, kind), records in found.items() if any(r.score is not None for r in records)]


def _best(records: Sequence[TaskResult]) -> TaskResult | None:
    scored = [record for record in records if record.score is not None]
    sign = 1 if records[0].higher_is_better else -1
    return max(scored, key=lambda record: sign * (record.score or 0.0), default=None)


def _cell(tap: str, output: str, records: Sequence[TaskResult], best: TaskResult | None) -> Text | str:
    for record in records:
        if (record.tap or output) != tap:
            continue
        if record.score is None:
            return Text(record.status.replace("_", " "), style="yellow")
        return Text(f"{record.score:.3f}", style="bold" if record is best else "")
    return ""
