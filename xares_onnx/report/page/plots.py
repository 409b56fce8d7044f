"""Drawings of a board as inline SVG. All text in them is escaped; colours are classes of the page's style sheet.

Each drawing has a name and a description for screen readers, and the page has its numbers in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup

from ...errors import printable
from ...evaluation.record import Interval
from ...metrics.bootstrap import Array
from ..board import Board, Model, Row
from ..curves import Curve

SERIES = 8  # colours of models; further models repeat them with other shapes
_EMPTY = Markup("")
_LABEL_WIDTH = 170  # of the names of rows
_LINE_HEIGHT = 26
_SHADES = 8
_MAX_NAMED = 12  # points


def marker(series: int, x: float, y: float, title: str = "", size: float = 5.0) -> Markup:
    """A model's sign at (x, y). Shape and colour both tell models apart, so that either is enough."""
    r = size
    shape = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:g}"/>',
        f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:g}" height="{2 * r:g}"/>',
        f'<path d="M{x:.1f} {y - 1.2 * r:.1f}l{1.2 * r:.1f} {2.2 * r:.1f}h{-2.4 * r:.1f}z"/>',
        f'<path d="M{x:.1f} {y - 1.4 * r:.1f}l{1.4 * r:.1f} {1.4 * r:.1f}l{-1.4 * r:.1f} {1.4 * r:.1f}'
        f'l{-1.4 * r:.1f} {-1.4 * r:.1f}z"/>',
    )[(series + series // SERIES) % 4]
    name = Markup("<title>{}</title>").format(title) if title else _EMPTY
    return Markup('<g class="series s{}">{}{}</g>').format(series % SERIES, name, Markup(shape))


def legend(models: Sequence[Model]) -> list[Markup]:
    """A small drawing of each model's sign, to stand beside its name."""
    return [
        Markup('<svg class="key" width="16" height="16" viewBox="0 0 16 16" aria-hidden="true">{}</svg>').format(
            marker(number, 8, 8)
        )
        for number in range(len(models))
    ]


def dumbbells(board: Board, rows: Sequence[Row], name: str) -> Markup:
    """A line per task from the worst to the best of the first eight models, with intervals and published scores as strokes.

    All scores are in 0..1.
    """
    width, right, top = 720, 20, 26
    height = top + _LINE_HEIGHT * len(rows) + 8
    span = width - _LABEL_WIDTH - right

    def at(score: float) -> float:
        return _LABEL_WIDTH + span * min(1.0, max(0.0, score))

    parts = [axis_x(at, (0, 0.2, 0.4, 0.6, 0.8, 1), top - 4, height - 8)]
    for i, row in enumerate(rows):
        y = top + _LINE_HEIGHT * (i + 0.5)
        cells = enumerate(row.cells[:SERIES])
        scored = [(m, c.score, c.record.ci95) for m, c in cells if c is not None and c.score is not None]
        parts.append(text_at(_LABEL_WIDTH - 8, y + 4, cut(row.title, 25), "end"))
        for encoder, score in row.published.items():
            title = f"{printable(encoder)}, published: {score:.3f}"
            parts.append(
                Markup('<path class="published" d="M{:.1f} {:.1f}v12"><title>{}</title></path>').format(
                    at(score), y - 6, title
                )
            )
        if len(scored) > 1:
            low, high = min(s for _, s, _ in scored), max(s for _, s, _ in scored)
            parts.append(Markup('<path class="span" d="M{:.1f} {:.1f}H{:.1f}"/>').format(at(low), y, at(high)))
        shift = min(5.0, 16 / max(1, len(scored)))
        for place, (model, score, ci95) in enumerate(scored):
            dy = y + shift * (place - (len(scored) - 1) / 2)
            if ci95:
                parts.append(
                    Markup('<path class="ci s{}" d="M{:.1f} {:.1f}H{:.1f}"/>').format(
                        model % SERIES, at(ci95[0]), dy, at(ci95[1])
                    )
                )
            parts.append(marker(model, at(score), dy, f"{board.models[model].label}: {score:.3f}{_interval(ci95)}", 4.5))
    description = (
        "A line per task from 0 to 1, with each model's score and 95 % interval; short strokes are published scores."
    )
    return svg(width, height, name, description, parts)


def costs(board: Board, values: Sequence[float | None], name: str, unit: str) -> Markup:
    """The headline average against a cost on a logarithmic axis; the line connects the models that no cheaper one beats."""
    headline = board.headline
    points = [(i, v, headline.cells[i]) for i, v in enumerate(values) if v is not None and v > 0 and headline is not None]
    if not points:
        return _EMPTY
    width, height, left, bottom, top = 460, 290, 52, 44, 12
    xs = [math.log10(v) for _, v, _ in points]
    low, high = min(xs) - 0.15, max(xs) + 0.15
    ends = [end for _, _, cell in points for end in (cell.ci95 or (cell.weighted, cell.weighted))]
    bottom_score, top_score = max(0.0, min(ends) - 0.03), min(1.0, max(ends) + 0.03)

    def x_of(value: float) -> float:
        return left + (width - left - 16) * (math.log10(value) - low) / (high - low)

    def y_of(score: float) -> float:
        return top + (height - top - bottom) * (1 - (score - bottom_score) / max(1e-9, top_score - bottom_score))

    parts = [axis_y(y_of, round_ticks(bottom_score, top_score), left, width - 16)]
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(left, height - bottom, width - 16))
    for tick in _decades(low, high):
        parts.append(text_at(x_of(tick), height - bottom + 17, f"{tick:g}", "middle"))
    parts.append(text_at((left + width - 16) / 2, height - 8, unit, "middle"))
    best, path = -1.0, ""
    for _, value, cell in sorted(points, key=lambda point: (point[1], -point[2].weighted)):
        if cell.weighted > best:
            step = (
                f"H{x_of(value):.1f}V{y_of(cell.weighted):.1f}" if path else f"M{x_of(value):.1f} {y_of(cell.weighted):.1f}"
            )
            path, best = path + step, cell.weighted
    parts.append(Markup('<path class="front" d="{}"/>').format(path))
    names = _Names(width)
    for model, value, cell in points:
        x, y = x_of(value), y_of(cell.weighted)
        if cell.ci95:
            d = f"M{x:.1f} {y_of(cell.ci95[0]):.1f}V{y_of(cell.ci95[1]):.1f}"
            parts.append(Markup('<path class="ci s{}" d="{}"/>').format(model % SERIES, d))
        label = board.models[model].label
        parts.append(marker(model, x, y, f"{label}: {cell.weighted:.3f} at {value:.3g} {unit}"))
        if len(points) <= _MAX_NAMED:
            parts.append(names.beside(x, y, cut(label, 24)))
    return svg(
        width, height, name, "Each model's average with its 95 % interval; upwards is better, leftwards is cheaper.", parts
    )


class _Names:
    """Names beside points, moved up or down if two would overlap."""

    def __init__(self, width: float) -> None:
        self._width = width
        self._placed: list[tuple[float, float, float]] = []

    def beside(self, x: float, y: float, name: str) -> Markup:
        left = x > 0.7 * self._width
        start, end = (x - 9 - 7 * len(name), x - 9) if left else (x + 9, x + 9 + 7 * len(name))
        moves = (-7, 14, -21, 28, -35)
        free = (y + by for by in moves if all(e < start or s > end or abs(h - y - by) > 12 for s, e, h in self._placed))
        height = next(free, y - 7)
        self._placed.append((start, end, height))
        return text_at(end if left else start, height, name, "end" if left else "start")


def curves(board: Board, lines: Sequence[Curve], name: str, axis: str) -> Markup:
    """Scores of one task and method step by step, a line per model; `axis` says what the steps are."""
    width, height, left, bottom, top, right = 340, 200, 44, 40, 12, 12
    shown = [s for line in lines for s in line.scores if s is not None]
    ends = [e for line in lines for ci in line.ci95 if ci for e in ci] + shown
    low, high = min(ends), max(ends)
    margin = 0.05 * (high - low) or 0.05
    low, high = low - margin, high + margin

    def x_of(step: int, of: int) -> float:
        return left + (width - left - right) * (step / (of - 1) if of > 1 else 0.5)

    def y_of(score: float) -> float:
        return top + (height - top - bottom) * (1 - (score - low) / (high - low))

    parts = [axis_y(y_of, round_ticks(low, high), left, width - right)]
    parts.append(text_at(left, height - 22, cut(lines[0].steps[0], 18), "start"))
    parts.append(text_at(width - right, height - 22, cut(lines[0].steps[-1], 18), "end"))
    parts.append(text_at((left + width - right) / 2, height - 6, axis, "middle"))
    for line in lines:
        points = [
            (x_of(i, len(line.steps)), y_of(s), s, line.ci95[i], step)
            for i, (s, step) in enumerate(zip(line.scores, line.steps, strict=True))
            if s is not None
        ]
        d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y, *_ in points)
        parts.append(Markup('<path class="curve s{}" d="{}"/>').format(line.model % SERIES, d))
        for x, y, score, ci95, step in points:
            if ci95:
                d = f"M{x:.1f} {y_of(ci95[0]):.1f}V{y_of(ci95[1]):.1f}"
                parts.append(Markup('<path class="ci s{}" d="{}"/>').format(line.model % SERIES, d))
            label = board.models[line.model].label
            parts.append(marker(line.model, x, y, f"{label}, {printable(step)}: {score:.3f}{_interval(ci95)}", 3.5))
    return svg(width, height, name, f"A line per model; {axis}.", parts)


def heat_map(matrix: Array, classes: Sequence[str], name: str) -> Markup:
    """Shares of each true class's answers, `matrix` (true, predicted): darker is more, right answers are on the diagonal."""
    n = len(classes)
    cell = max(5, min(22, 420 // n))
    named = cell >= 9 and max(map(len, classes)) <= 24
    left = 8 + (min(24, max(map(len, classes))) * 6 if named else 14)
    below = left if named else 18
    shades: list[list[str]] = [[] for _ in range(_SHADES)]
    for row, column in zip(*np.nonzero(matrix), strict=True):
        shade = min(_SHADES - 1, int(matrix[row, column] * _SHADES))
        shades[shade].append(f"M{left + column * cell} {4 + row * cell}h{cell}v{cell}h{-cell}z")
    parts = [Markup('<rect class="field" x="{}" y="4" width="{}" height="{}"/>').format(left, n * cell, n * cell)]
    for shade, paths in enumerate(shades):
        if paths:
            parts.append(Markup('<path class="heat h{}" d="{}"/>').format(shade, Markup("".join(paths))))
    for i, label in enumerate(classes if named else ()):
        middle = 4 + (i + 0.5) * cell
        parts.append(text_at(left - 5, middle + 3.5, label, "end", "small"))
        x = left + (i + 0.5) * cell + 3.5
        parts.append(
            Markup('<text class="small" text-anchor="end" transform="translate({:.1f} {}) rotate(-90)">{}</text>').format(
                x, 8 + n * cell, label
            )
        )
    if not named:
        parts.append(text_at(left + n * cell / 2, n * cell + 18, "predicted", "middle", "small"))
        parts.append(
            Markup(
                '<text class="small" text-anchor="middle" transform="translate({} {:.1f}) rotate(-90)">true</text>'
            ).format(left - 6, 4 + n * cell / 2)
        )
    description = "Rows are true classes, columns predicted ones; the darker a field, the larger its share of the row."
    return svg(left + n * cell + 8, n * cell + below + 8, name, description, parts)


def bars(names: Sequence[str], shares: Sequence[float | None], name: str) -> Markup:
    """A bar per name, as long as its share of 0..1; names without a share are left out."""
    width, left, line = 340, 130, 20
    shown = [(text, share) for text, share in zip(names, shares, strict=True) if share is not None]
    parts = []
    for i, (text, share) in enumerate(shown):
        y = line * i + 4
        length = (width - left - 50) * min(1.0, max(0.0, share))
        parts.append(text_at(left - 8, y + 12, cut(text, 18), "end", "small"))
        parts.append(
            Markup('<rect class="bar" x="{}" y="{}" width="{:.1f}" height="{}"/>').format(left, y, length, line - 5)
        )
        parts.append(text_at(left + length + 6, y + 12, f"{100 * share:.0f} %", "start", "small"))
    description = "; ".join(f"{printable(text)} {100 * share:.0f} %" for text, share in shown)
    return svg(width, line * len(shown) + 8, name, description, parts)


def svg(width: float, height: float, name: str, description: str, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="plot" viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" height="{1:.0f}" role="img" '
        'aria-label="{2}. {3}">{4}</svg>'
    ).format(width, height, name, description, _EMPTY.join(parts))


def text_at(x: float, y: float, text: str, anchor: str, kind: str = "label") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(kind, x, y, anchor, text)


def axis_x(at: Callable[[float], float], ticks: Sequence[float], top: float, bottom: float) -> Markup:
    lines = [Markup('<path class="grid" d="M{:.1f} {}V{}"/>').format(at(t), top, bottom) for t in ticks]
    return _EMPTY.join([*lines, *(text_at(at(t), top - 6, f"{t:g}", "middle") for t in ticks)])


def axis_y(at: Callable[[float], float], ticks: Sequence[float], left: float, right: float) -> Markup:
    lines = [Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(left, at(t), right) for t in ticks]
    return _EMPTY.join([*lines, *(text_at(left - 6, at(t) + 4, f"{t:g}", "end") for t in ticks)])


def round_ticks(low: float, high: float) -> list[float]:
    """Round values from low to high, about five."""
    span = max(high - low, 1e-9)
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 6)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Round values on a logarithmic axis from 10^low to 10^high."""
    steps = (1, 2, 5) if high - low < 2.5 else (1,)
    return [
        s * 10.0**d
        for d in range(math.floor(low), math.ceil(high) + 1)
        for s in steps
        if low <= math.log10(s * 10.0**d) <= high
    ]


def cut(text: str, limit: int) -> str:
    text = printable(text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _interval(ci95: Interval | None) -> str:
    return f", 95 % {ci95[0]:.3f} to {ci95[1]:.3f}" if ci95 else ""
