"""Scores by tap: a row per output or layer, a column per task and method, and the best tap.

The best tap is the one with the best score on the selection clips, so that its test score is not flattered by the choice.
If a tap has no such score, the best is chosen on the test clips, and marked. The mix of all taps, which is no layer, stands
beside the best with the weights that it gave them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from ..errors import foreign
from ..evaluation.record import Result, TaskResult
from ..evaluation.settings import Method
from ..scoring.mixing import MIX
from .tables import empty_table

_COLUMN_WIDTH = 13  # least characters per column, which decides how many columns fit into a table
_ON_TEST = " (test)"
MIX_NOTE = f"{MIX}: the learned weighted sum of the taps; a percentage is the weight of a tap in it"


@dataclass(frozen=True)
class Best:
    """The record of the best tap, and whether it was chosen on the test clips."""

    record: TaskResult
    on_test: bool


def selection_score(record: TaskResult) -> float | None:
    """The score on the selection clips, higher is better: of kNN, or of the best setting of a head.

    Returns:
        The score, or None if it was not recorded.
    """
    if record.family == "knn":
        return record.selection
    tried = record.tuning.tried if record.tuning else []
    scores = [trial.selection for trial in tried if trial.selection is not None]
    return max(scores, default=None)


def best_tap(records: Iterable[TaskResult]) -> Best | None:
    """The best tap of one task and method.

    Args:
        records: The task's records by one method, one per tap.

    Returns:
        The best, the first of equal ones, without the mix; None if no record has a score.
    """
    scored = [record for record in records if record.score is not None and record.tap != MIX]
    if not scored:
        return None
    selection = [score for record in scored if (score := selection_score(record)) is not None]
    if len(selection) == len(scored):
        return Best(scored[selection.index(max(selection))], on_test=False)
    sign = 1 if scored[0].higher_is_better else -1
    return Best(max(scored, key=lambda record: sign * (record.score or 0.0)), on_test=True)


def mix_weights(record: TaskResult | None) -> dict[str, float]:
    """The weight of each layer in a mix, the mean over heads; empty if the record is of no mix, or has no score."""
    mix = record.tuning.mix if record and record.tuning and record.score is not None else None
    return {layer: sum(weights) / len(weights) for layer, weights in (mix or {}).items()}


def best_note(on_test: Iterable[bool]) -> str:
    """A sentence on how the best taps were chosen; `on_test` says per best tap whether it was chosen on the test clips."""
    choices = set(on_test)
    parts = []
    if False in choices:
        parts.append("the best tap is the best on the selection clips")
    if True in choices:
        parts.append(f"{_ON_TEST.strip()}: the best on the test clips themselves, so its score flatters it")
    return "; ".join(parts)


def print_taps(result: Result, console: Console) -> None:
    """Print the scores of every tap; nothing if there is only one."""
    taps = ordered_taps(result)
    if len(taps) < 2:
        return
    columns = _columns(result)
    mixed = any(record.tap == MIX for record in result.tasks)
    fit = max(1, (console.width - max(len(tap) for tap in taps) - 2) // _COLUMN_WIDTH)
    for start in range(0, len(columns), fit):
        shown = columns[start : start + fit]
        table = empty_table(console, ("tap",), [f"{foreign(records[0].title)} {method}" for method, records in shown])
        for column in table.columns[1:]:
            column.no_wrap = False
        best_taps = [best_tap(records) for _, records in shown]
        output = result.encoder.taps[0]
        for tap in taps:
            cells = (_cell(tap, output, records, best) for (_, records), best in zip(shown, best_taps, strict=True))
            table.add_row(foreign(tap), *cells)
        table.add_section()
        table.add_row("best", *(_name(best, output) for best in best_taps))
        if mixed:
            table.add_row(MIX, *(_cell(MIX, output, records, None) for _, records in shown))
        console.print(table, soft_wrap=False)
    notes = [best_note(best.on_test for _, records in columns if (best := best_tap(records)))]
    if mixed:
        notes.append(MIX_NOTE)
    console.print("; ".join(note for note in notes if note))


def ordered_taps(result: Result) -> list[str]:
    """The taps of a result, from the model's input to its output."""
    taps = result.encoder.taps
    if len(taps) > 1 and all(tap.startswith("layer.") for tap in taps[1:]):
        return [*taps[1:], taps[0]]  # the model's output comes after its layers
    return taps


def _columns(result: Result) -> list[tuple[Method, list[TaskResult]]]:
    """(method, records of every tap) per task and method with a score."""
    by_column: dict[tuple[str, Method], list[TaskResult]] = {}
    for record in result.tasks:
        by_column.setdefault((record.task, record.family), []).append(record)
    taps = [*ordered_taps(result), MIX]
    for records in by_column.values():
        records.sort(key=lambda record: taps.index(record.tap or result.encoder.taps[0]))
    return [(method, records) for (_, method), records in by_column.items() if any(r.score is not None for r in records)]


def _name(best: Best | None, output: str) -> str:
    return f"{foreign(best.record.tap or output)}{_ON_TEST if best.on_test else ''}" if best else ""


def _cell(tap: str, output: str, records: Sequence[TaskResult], best: Best | None) -> Text | str:
    weight = next((weights.get(tap) for record in records if (weights := mix_weights(record))), None)
    for record in records:
        if (record.tap or output) != tap:
            continue
        if record.score is None:
            return Text(record.status.replace("_", " "), style="yellow")
        score = Text(f"{record.score:.3f}", style="bold" if best and record is best.record else "")
        return score if weight is None else score.append(f" {100 * weight:3.0f} %", style="dim not bold")
    return ""
