"""A diagnosis as one page that needs no network: the drift along the depth, the points regained, every table."""

from __future__ import annotations

import math

from markupsafe import Markup

from ...diagnosis.figures import StepFigures
from ...diagnosis.findings import Diagnosis, Regained
from ...errors import printable
from ...version import __version__
from ..diagnosis import decibels, remarks, tables
from . import plots
from .html import environment, policy, source

_BEST, _WORST = 100.0, -10.0  # decibels that the drawing reaches
_LAYERS_NAMED = 24


def page(diagnosis: Diagnosis) -> str:
    """The text of the page. All that a stranger named is escaped in it."""
    css = source("page.css")
    values = {
        "css": Markup(css),
        "drift": _drift(diagnosis.steps) if diagnosis.steps else "",
        "lead": diagnosis.verdict,
        "policy": policy(css, ""),
        "regained": _regained(diagnosis.regained),
        "remarks": list(remarks(diagnosis)),
        "tables": [(title, [*words, *numbers, *more], rows) for title, (words, numbers, more), rows in tables(diagnosis)],
        "title": f"{diagnosis.b} diagnosed against {diagnosis.a}",
        "version": __version__,
    }
    return environment().from_string(source("page.diagnosis.jinja")).render(values)


def _drift(steps: list[StepFigures]) -> Markup:
    """A line of every tensor's signal-to-noise ratio, and a point for every operator's own."""
    width, height, left, bottom, top, right = 720, 280, 44, 40, 12, 12

    def x_of(number: int) -> float:
        return left + (width - left - right) * (number / max(len(steps) - 1, 1))

    def y_of(ratio: float) -> float:
        return top + (height - top - bottom) * (1 - (min(max(ratio, _WORST), _BEST) - _WORST) / (_BEST - _WORST))

    parts = [plots.axis_y(y_of, [0, 20, 40, 60, 80, 100], left, width - right)]
    starts = [i for i, step in enumerate(steps) if not i or step.place.layer != steps[i - 1].place.layer]
    for start in starts:
        parts.append(Markup('<path class="grid" d="M{:.1f} {}V{}"/>').format(x_of(start), top, height - bottom))
        if len(starts) <= _LAYERS_NAMED:
            parts.append(
                plots.text_at(x_of(start) + 2, height - bottom + 14, str(steps[start].place.layer), "start", "small")
            )
    line = "L".join(f"{x_of(i):.1f} {y_of(_ratio(step.noise)):.1f}" for i, step in enumerate(steps))
    parts.append(Markup('<path class="curve s0" d="M{}"/>').format(line))
    for i, step in enumerate(steps):
        if step.local_noise:
            label = f"{printable(step.title)}: own {decibels(step.local_noise)}, drift {decibels(step.noise)}"
            parts.append(plots.marker(1, x_of(i), y_of(_ratio(step.local_noise)), label, 3.0))
    parts.append(plots.text_at((left + width) / 2, height - 6, "operators from input to output, by layer; dB", "middle"))
    description = (
        "The line is the drift of each tensor, a square an operator's own error; higher is nearer to the reference."
    )
    return plots.svg(width, height, "Signal-to-noise ratio along the depth", description, parts)


def _ratio(noise: float) -> float:
    return -10 * math.log10(noise) if 0 < noise < math.inf else (_BEST if noise == 0 else _WORST)


def _regained(entries: list[Regained]) -> Markup:
    """A bar per scored group, from 0 to its points, with the interval."""
    scored = [entry for entry in entries if entry.points is not None]
    if not scored:
        return Markup("")
    width, left, line = 720, 250, 26
    ends = [end for entry in scored if entry.points for end in (entry.points.ci95 or ()) + (entry.points.points, 0.0)]
    low, high = min(ends), max(ends)

    def x_of(points: float) -> float:
        return left + (width - left - 20) * (points - low) / max(high - low, 1e-9)

    parts = [plots.axis_x(x_of, plots.round_ticks(low, high), 26, 26 + line * len(scored))]
    for i, entry in enumerate(scored):
        assert entry.points is not None
        y, ends_at = 30 + line * i, sorted((x_of(0.0), x_of(entry.points.points)))
        parts.append(plots.text_at(left - 8, y + 13, plots.cut(entry.title, 34), "end"))
        parts.append(
            Markup('<rect class="bar" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>').format(
                ends_at[0], y, ends_at[1] - ends_at[0], line - 8
            )
        )
        if entry.points.ci95:
            span = f"M{x_of(entry.points.ci95[0]):.1f} {y + 9}H{x_of(entry.points.ci95[1]):.1f}"
            parts.append(Markup('<path class="ci s1" d="{}"/>').format(span))
    description = "; ".join(f"{printable(entry.title)} {entry.points.text}" for entry in scored if entry.points)
    return plots.svg(width, 34 + line * len(scored), "Points regained by groups in float", description, parts)
