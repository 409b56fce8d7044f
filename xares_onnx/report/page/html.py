"""A board as one page that needs no network: styles, script, drawings and sounds are all in it.

All that a result holds is a stranger's text: the template escapes every value, control characters are made visible, and the
page's own policy lets no other script, style or request run. The same results give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ...errors import printable
from ...version import __version__
from ..board import Board, Model, Row
from ..curves import Curve
from ..profile import NOTE, Aspect, aspects
from ..remarks import costs, headline, noise, remarks, short, summary
from ..tables import grid_range
from ..taps import best_note
from ..units import data_size
from . import plots
from .listening import Listening, load_sounds
from .mistakes import Mistakes, find_mistakes

_DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class _Mistakes:
    """With a drawing for each confusion, empty where the classes are too many."""

    row: Row
    models: tuple[int, ...]
    confusions: tuple[Any, ...]
    drawings: tuple[Markup, ...]
    clips: tuple[Any, ...]
    note: str | None


def html(board: Board, *, data: Path | None = None, cache: Path | None = None) -> str:
    """The page. With `data`, the folder of the shards that were scored, the worst clips can be heard.

    Raises `DataError` where predictions are not those of their result, `DataMissingError` where there is no folder `data`.
    """
    found = [find_mistakes(board, row) for row in board.rows if row.method == "head"]
    found = [mistakes for mistakes in found if mistakes.clips or mistakes.confusions or mistakes.models]
    listening = load_sounds(found, data, cache) if data is not None else Listening({}, [])
    css, js = (_source(name) for name in ("page.css", "page.js"))
    remarked = [(number, lines) for number, model in enumerate(board.models) if (lines := remarks(model))]
    page = {
        "abouts": [_about(model) for model in board.models],
        "audible": _audible(data, listening),
        "board": board,
        "costs": costs(board),
        "css": Markup(css),
        "domains": list(_domains(board)),
        "drawings": [d for d in _cost_drawings(board) if d],
        "files": ", ".join(model.side.name for model in board.models),
        "gates": [(number, gate) for number, model in enumerate(board.models) for gate in model.result.gates],
        "headline": headline(board),
        "js": Markup(js),
        "layer_tables": [table for number in range(len(board.models)) for table in _layer_tables(board, number)],
        "layer_note": best_note(curve.best_on_test for curve in board.curves),
        "layers": list(_layers(board)),
        "lead": summary(board),
        "many": len(board.models) > 1,
        "methods": [(method, rows) for method in ("head", "knn") if (rows := [r for r in board.rows if r.method == method])],
        "mistake_notes": listening.notes,
        "mistakes": [_drawn(board, mistakes) for mistakes in found],
        "noise": noise(board),
        "notes": board.notes,
        "policy": _policy(css, js),
        "profile": list(_profile(board)),
        "profile_note": NOTE,
        "remarks": remarked,
        "shots": list(_shots(board)),
        "signs": plots.legend(board.models),
        "sounds": listening.sounds,
        "tuned": any(cell and grid_range(cell.record) for row in board.rows for cell in row.cells),
        "title": f"X-ARES scores of {_names(board)}",
        "version": __version__,
    }
    shown = {
        "headline": ("Averages", True),
        "tasks": ("Tasks", True),
        "profile": ("Profile", page["profile"]),
        "domains": ("By domain", page["domains"]),
        "costs": ("Score and cost", True),
        "layers": ("Layer by layer", page["layers"]),
        "shots": ("Few clips", page["shots"]),
        "mistakes": ("Mistakes", found),
        "remarks": ("What to know", remarked or page["gates"]),
        "settings": ("Contract and settings", True),
    }
    sections = [(anchor, name) for anchor, (name, there) in shown.items() if there]
    return _environment().from_string(_source("page.html.jinja")).render(page, sections=sections)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.filters |= {
        "score": lambda value: "" if value is None else f"{value:.3f}",
        "span": lambda ci95: f"{ci95[0]:.3f}{_DASH}{ci95[1]:.3f}" if ci95 else "",
        "size": data_size,
    }
    environment.filters["grid"] = grid_range
    return environment


def _source(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _policy(css: str, js: str) -> str:
    """Nothing but this page's own style and script, and sounds and the icon that are in it."""
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (css, js))
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; media-src data:; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _names(board: Board) -> str:
    names = [model.label for model in board.models]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _audible(data: Path | None, listening: Listening) -> str:
    if data is None:
        return "Their sound is not in this page; `report --data DIR` puts it there."
    return "Of each the first 6 s can be heard, mono at 16 kHz." if listening.sounds else ""


def _domains(board: Board) -> Iterator[tuple[str, Markup]]:
    rows = [row for row in board.rows if row.method == "head" and row.higher_is_better and _has_score(row)]
    for domain in dict.fromkeys(row.domain for row in rows):
        mine = [row for row in rows if row.domain == domain]
        yield domain, plots.dumbbells(board, mine, f"Scores of the {printable(domain)} tasks")


def _profile(board: Board) -> Iterator[tuple[Aspect, Row]]:
    rows = {row.task: row for row in board.rows if row.method == "head"}
    return ((aspect, rows[aspect.task]) for aspect in aspects(rows))


def _has_score(row: Row) -> bool:
    return any(cell is not None and cell.score is not None for cell in row.cells)


def _cost_drawings(board: Board) -> Iterator[Markup]:
    if len(board.models) > 1:
        sizes = [model.result.encoder.bytes / 1e6 for model in board.models]
        yield plots.costs(board, sizes, "Average against file size", "MB")
        rtfs = [model.rtf for model in board.models]
        yield plots.costs(board, rtfs, "Average against speed", "seconds of embedding a second of audio")


def _layers(board: Board) -> Iterator[dict[str, Any]]:
    """A drawing a task and method, with a line a model."""
    groups: dict[tuple[str, str], list[Curve]] = {}
    for curve in board.curves:
        groups.setdefault((curve.task, curve.method), []).append(curve)
    for (_, method), lines in groups.items():
        first = lines[0]
        row = next(row for row in board.rows if (row.task, row.method) == (first.task, first.method))
        metric = row.metric_name + ("" if first.higher_is_better else ", lower is better")
        drawing = plots.curves(board, lines, f"{printable(first.title)} layer by layer, {method}", _taps(lines))
        yield {"drawing": drawing, "title": first.title, "method": method, "metric": metric}


def _taps(lines: Sequence[Curve]) -> str:
    return f"{max(len(line.steps) for line in lines)} taps, input to output"


def _shots(board: Board) -> Iterator[dict[str, Any]]:
    """A drawing and a table per task, with a line per model."""
    groups: dict[str, list[Curve]] = {}
    for curve in board.shots:
        groups.setdefault(curve.task, []).append(curve)
    for lines in groups.values():
        title = lines[0].title
        drawing = plots.curves(board, lines, f"{printable(title)} by training clips per class", "training clips per class")
        rows = [(line.model, list(zip(line.scores, line.ci95, strict=True))) for line in lines]
        yield {"drawing": drawing, "title": title, "counts": lines[0].steps, "rows": rows}


def _layer_tables(board: Board, number: int) -> Iterator[dict[str, Any]]:
    mine = [curve for curve in board.curves if curve.model == number]
    if not mine:
        return
    rows = [
        (tap, [(curve.scores[i], i == curve.best, curve.best_on_test) for curve in mine])
        for i, tap in enumerate(mine[0].steps)
    ]
    yield {"model": number, "headings": [f"{curve.title}, {curve.method}" for curve in mine], "rows": rows}


def _drawn(board: Board, found: Mistakes) -> _Mistakes:
    drawings = tuple(
        plots.heat_map(
            confusion.matrix,
            confusion.classes,
            f"Confusions of {board.models[confusion.model].label} in {printable(found.row.title)}",
        )
        if confusion.matrix is not None
        else Markup("")
        for confusion in found.confusions
    )
    return _Mistakes(found.row, found.models, found.confusions, drawings, found.clips, found.note)


def _about(model: Model) -> dict[str, Any]:
    encoder = model.result.encoder
    fields = [
        (name, short(field.get("value")), short(field.get("source", ""))) for name, field in sorted(encoder.contract.items())
    ]
    facts = [("model", encoder.file), ("sha256", encoder.sha256), ("result", model.side.name)]
    facts += [("scored", model.result.created)]
    facts += [(f"{name}", short(value)) for name, value in model.result.settings.items()]
    facts += [(f"{name}", short(value)) for name, value in model.result.environment.items()]
    return {"contract": fields, "facts": facts}
