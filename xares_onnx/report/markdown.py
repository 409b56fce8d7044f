"""A board as Markdown, for a pull request, a step summary or a model card."""

from __future__ import annotations

from collections.abc import Sequence

from ..evaluation.record import Interval
from ..evaluation.settings import METHODS
from .board import AverageCell, AverageRow, Board, Row
from .ci import markdown_cell
from .curves import Curve
from .profile import aspects
from .remarks import headline, mark, noise, plain_score, summary


def markdown(board: Board) -> str:
    """A board as Markdown: averages, then a table per method of tasks by models, with the published scores beside them."""
    models = [model.label for model in board.models]
    several = len(models) > 1
    parts = [f"## X-ARES scores of {', '.join(map(markdown_cell, models[:3]))}{' and more' if len(models) > 3 else ''}"]
    parts.append(markdown_cell(f"{headline(board)} {summary(board)}"))
    if board.averages:
        headings = [f"{row.group}, {row.method} ({len(row.tasks)} of {row.group_size})" for row in board.averages]
        lines = [[label, *(_average(row.cells[i]) for row in board.averages)] for i, label in enumerate(models)]
        lines += [
            [f"{name}, published", *(_published_average(row, name) for row in board.averages)] for name in board.published
        ]
        parts.append(_table(["weighted average", *headings], lines, words=1))
    for method in METHODS:
        rows = [row for row in board.rows if row.method == method]
        if rows:
            headings = [f"by {method}", "metric", *models, *(f"{name}, published" for name in board.published)]
            parts.append(_table(headings, [_cells(row, board) for row in rows], words=2))
    if profile := _profile(board):
        headings = ["what is kept", "by the task", "metric", "chance", *models]
        parts.append(_table(headings, profile, words=3))
    if board.shots:
        counts = sorted({step for curve in board.shots for step in curve.steps}, key=int)
        headings = ["by training clips per class", *(["model"] if several else []), *counts]
        lines = [[curve.title, *([models[curve.model]] if several else []), *_shots(curve, counts)] for curve in board.shots]
        parts.append(_table(headings, lines, words=2 if several else 1))
    remarks = ["★ best, ≈ within noise of the best. " + noise(board)] if several else []
    if any(not row.higher_is_better for row in board.rows):
        remarks.append("↓ lower is better.")
    if any(cell and not cell.record.comparable for row in board.rows for cell in row.cells):
        remarks.append("* not comparable with other results, and in no average.")
    remarks += [f"{note}." for note in board.notes]
    parts.append("\n".join(f"- {markdown_cell(line)}" for line in remarks))
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(row: Row, board: Board) -> list[str]:
    scores = []
    for number, cell in enumerate(row.cells):
        ci95 = cell.record.ci95 if cell is not None and cell.score is not None else None
        scores.append(plain_score(row, number) + _interval(ci95))
    published = [f"{row.published[name]:.3f}" if name in row.published else "" for name in board.published]
    return [row.title, row.metric_name + ("" if row.higher_is_better else " ↓"), *scores, *published]


def _profile(board: Board) -> list[list[str]]:
    """The synthetic suite aspect by aspect, by head."""
    rows = {row.task: row for row in board.rows if row.method == "head"}
    return [
        [
            aspect.kept,
            aspect.title,
            aspect.metric,
            "" if aspect.chance is None else f"{aspect.chance:.3f}",
            *(plain_score(rows[aspect.task], number) for number in range(len(board.models))),
        ]
        for aspect in aspects(rows)
    ]


def _shots(curve: Curve, counts: Sequence[str]) -> list[str]:
    scores = {
        step: f"{score:.3f}{_interval(ci95)}"
        for step, score, ci95 in zip(curve.steps, curve.scores, curve.ci95, strict=True)
        if score is not None
    }
    return [scores.get(count, "") for count in counts]


def _average(cell: AverageCell) -> str:
    return f"{cell.weighted:.3f}{mark(cell.verdict)}{_interval(cell.ci95)}"


def _interval(ci95: Interval | None) -> str:
    return f" ({ci95[0]:.3f}-{ci95[1]:.3f})" if ci95 else ""


def _published_average(row: AverageRow, name: str) -> str:
    return f"{row.published[name]:.3f}" if name in row.published else ""


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, words: int) -> str:
    aligned = ["---"] * words + ["---:"] * (len(headings) - words)
    lines = [
        [markdown_cell(heading) for heading in headings],
        aligned,
        *([markdown_cell(cell) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
