"""Results as one flat table, a row per model, task, method and tap: for pandas, polars, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError, foreign
from ..evaluation.differences import Side
from ..evaluation.record import Result, TaskResult
from .board import Board, Cell, Model, make_board
from .remarks import short
from .tables import grid_range

if TYPE_CHECKING:
    from ..evaluation.evaluation import Evaluation

Table = list[dict[str, Any]]

# Characters that start a formula in a spreadsheet; the last four are as wide as East Asian ones, and some read them alike.
_FORMULA = tuple(
    "=+-@\t\r\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH HYPHEN-MINUS}\N{FULLWIDTH COMMERCIAL AT}"
)


def table(results: str | Path | Result | Evaluation | Iterable[str | Path | Result | Evaluation]) -> Table:
    """Put results into flat rows: one per model, task, method and tap.

    `best` is True for the best model of a task and method, `within_noise` for models that cannot be told from it.
    `compared_by` says how: `paired` by a paired bootstrap over the test clips, `intervals` by whether intervals overlap,
    for a bare `Result` and for files without predictions beside them. The three are None if there is nothing to compare,
    and for every tap but the first.

    Args:
        results: One or several paths of result files, `Result`s, or what `evaluate` returned.

    Returns:
        Rows of texts, numbers, booleans and None, all with the same keys.

    Raises:
        UsageError: If a source is not a result, or if protocols, settings or task definitions differ.
        DataError: If the data of a task differ, or if predictions do not give the score of their result.

    Example:
        >>> import pandas
        >>> pandas.DataFrame(table(["small.json", "large.json"]))  # doctest: +SKIP
    """
    sources = [results] if isinstance(results, str | Path | Result) or hasattr(results, "side") else results
    sides = [_side(source, number) for number, source in enumerate(sources)]  # type: ignore[arg-type]
    return board_table(make_board(sides))


def _side(source: str | Path | Result | Evaluation, number: int) -> Side:
    if isinstance(source, str | Path):
        return Side.read(Path(source))
    if isinstance(source, Result):
        return Side.of_result(f"result {number + 1}", source)
    if hasattr(source, "side"):
        return source.side(f"result {number + 1}")
    raise UsageError(f"a {type(source).__name__} is not a result; pass paths of result files, or what `evaluate` returned")


def board_table(board: Board) -> Table:
    """The rows of a board, model by model."""
    cells = {
        (number, row.task, row.method): cell
        for row in board.rows
        for number, cell in enumerate(row.cells)
        if cell is not None
    }
    return [
        _row(model, record, cells.get((number, record.task, record.family)), board.published)
        for number, model in enumerate(board.models)
        for record in model.result.tasks
    ]


def _row(model: Model, record: TaskResult, cell: Cell | None, published: Sequence[str]) -> dict[str, Any]:
    encoder, settings = model.result.encoder, model.result.settings
    verdict = cell.verdict if cell is not None and record.tap is None else None
    low, high = record.ci95 or (None, None)
    lowest, highest = grid_range(record) or (None, None)
    spread = float(np.std(record.per_seed, ddof=1)) if len(record.per_seed) > 1 else None
    return {
        "model": model.label,
        "file": encoder.file,
        "sha256": encoder.sha256,
        "bytes": encoder.bytes,
        "parameters": encoder.parameters,
        "dim": _plain(model.declared("dim")),
        "hop_ms": model.hop_ms,
        "protocol": _plain(settings.get("protocol")),
        "seeds": _plain(settings.get("seeds")),
        "limit": _plain(settings.get("limit")),
        "task": record.task,
        "title": record.title,
        "domain": record.domain,
        "method": record.method,
        "tap": record.tap,
        "metric": record.metric,
        "higher_is_better": record.higher_is_better,
        "status": record.status,
        "reason": record.reason,
        "score": record.score,
        "ci_low": low,
        "ci_high": high,
        "sd_over_seeds": spread,
        "grid_low": lowest,
        "grid_high": highest,
        "best": verdict.standing == "best" if verdict else None,
        "within_noise": verdict.standing == "within_noise" if verdict and verdict.standing != "unclear" else None,
        "compared_by": verdict.basis if verdict else None,
        "n_test": record.n_test,
        "clips_expected": record.clips.expected,
        "clips_read": record.clips.read,
        "clips_dropped": len(record.clips.dropped),
        "weight": record.weight,
        "comparable": record.comparable,
        "audio_hours": record.audio_hours,
        "rtf": record.rtf,
        **{f"published_{name}": record.published.get(name) for name in published},
    }


def _plain(value: Any) -> Any:
    """A value of a contract or of settings as one cell."""
    return value if isinstance(value, str | int | float | bool | None) else short(value)


def csv_text(rows: Table) -> str:
    """Rows as CSV with a heading: numbers in full, None empty, an apostrophe before texts that a spreadsheet would run."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(_csv_cell, rows[0] if rows else ()))
    writer.writerows([_csv_cell(value) for value in row.values()] for row in rows)
    return buffer.getvalue()


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = foreign(str(value))
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
