"""A board as one page that needs no network: styles, script, drawings and sounds are all in it.

A result may hold a stranger's text: the template escapes every value and makes control characters visible, and the page's
policy blocks every other script, style and request. The same results give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ...errors import foreign, printable, sentences
from ...evaluation.settings import METHODS
from ...version import __version__
from ..board import Board, Model, Row
from ..curves import Curve
from ..profile import NOTE, Aspect, aspects
from ..remarks import costs, headline, listed, noise, remarks, short, summary
from ..tables import grid_range
from ..taps import MIX_NOTE, best_note
from ..units import data_size
from . import plots
from .listening import Listening, load_sounds
from .mistakes import Mistakes, find_mistakes

_DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class _Mistakes:
    """`Mistakes` with a drawing per confusion, empty if there are too many classes."""

    row: Row
    models: tuple[int, ...]
    confusions: tuple[Any, ...]
    drawings: tuple[Markup, ...]
    clips: tuple[Any, ...]
    note: str | None


def html(board: Board, *, data: Path | None = None, cache: Path | None = None) -> str:
    """A board as an HTML page.

    Args:
        board: From `make_board`.
        data: Folder of the shards that were scored. With it, the worst clips can be heard.
        cache: Folder of the digests of shards and of the synthetic suite.

    Returns:
        The text of the page, a few MiB with sounds.

    Raises:
        DataError: If predictions do not give the score of their result.
        DataMissingError: If the folder `data` does not exist.
    """
    by_task = [find_mistakes(board, row) for row in board.rows if row.method == "head"]
    shown_mistakes = [mistakes for mistakes in by_task if mistakes.clips or mistakes.confusions or mistakes.models]
    listening = load_sounds(shown_mistakes, data, cache) if data is not None else Listening({}, [])
    css, js = (source(name) for name in ("page.css", "page.js"))
    remarks_by_model = [(number, lines) for number, model in enumerate(board.models) if (lines := remarks(model))]
    page = {
        "abouts": [_about(model) for model in board.models],
        "audible": _audible(data, listening),
        "board": board,
        "costs": costs(board),
        "css": Markup(css),
        "domains": list(_domains(board)),
        "drawings": [drawing for drawing in _cost_drawings(board) if drawing],
        "files": ", ".join(model.side.name for model in board.models),
        "gates": [(number, gate) for number, model in enumerate(board.models) for gate in model.result.gates],
        "headline": headline(board),
        "js": Markup(js),
        "layer_tables": [table for number in range(len(board.models)) for table in _layer_tables(board, number)],
        "mix_note": MIX_NOTE if any(curve.mix for curve in board.curves) else "",
        "layer_note": best_note(curve.best_on_test for curve in board.curves),
        "layers": list(_layers(board)),
        "lead": summary(board),
        "many": len(board.models) > 1,
        "methods": [(method, rows) for method in METHODS if (rows := [r for r in board.rows if r.method == method])],
        "mistake_notes": listening.notes,
        "mistakes": [_drawn(board, mistakes) for mistakes in shown_mistakes],
        "noise": noise(board),
        "notes": board.notes,
        "policy": policy(css, js),
        "profile": list(_profile(board)),
        "profile_note": NOTE,
        "remarks": remarks_by_model,
        "shots": list(_shots(board)),
        "signs": plots.legend(board.models),
        "sounds": {clip: Markup(uri) for clip, uri in listening.sounds.items()},  # base64, and longer than any text
        "tuned": any(cell and grid_range(cell.record) for row in board.rows for cell in row.cells),
        "title": f"X-ARES scores of {listed([model.label for model in board.models])}",
        "version": __version__,
    }
    titles = {
        "headline": ("Averages", True),
        "tasks": ("Tasks", True),
        "profile": ("Profile", page["profile"]),
        "domains": ("By domain", page["domains"]),
        "costs": ("Score and cost", True),
        "layers": ("Layer by layer", page["layers"]),
        "shots": ("Few clips", page["shots"]),
        "mistakes": ("Mistakes", shown_mistakes),
        "remarks": ("What to know", remarks_by_model or page["gates"]),
        "settings": ("Contract and settings", True),
    }
    sections = [(anchor, name) for anchor, (name, present) in titles.items() if present]
    return environment().from_string(source("page.html.jinja")).render(page, sections=sections)


def environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: sentences(value) if type(value) is str else value,
    )
    filters: dict[str, Callable[..., Any]] = {
        "foreign": lambda value: foreign(str(value)),
        "score": lambda value: "" if value is None else f"{value:.3f}",
        "span": lambda ci95: f"{ci95[0]:.3f}{_DASH}{ci95[1]:.3f}" if ci95 else "",
        "size": data_size,
        "grid": grid_range,
    }
    environment.filters |= filters
    return environment


def source(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def policy(css: str, js: str) -> str:
    """A content security policy that allows this page's own style and script, its sounds and its icon."""
    style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (css, js))
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; media-src data:; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _audible(data: Path | None, listening: Listening) -> str:
    if data is None:
        return "Their sound is not in this page; `report --data DIR` includes it."
    return "The first 6 s of each can be heard, mono at 16 kHz." if listening.sounds else ""


def _domains(board: Board) -> Iterator[tuple[str, Markup]]:
    rows = [row for row in board.rows if row.method == "head" and row.higher_is_better and _has_score(row)]
    for domain in dict.fromkeys(row.domain for row in rows):
        of_domain = [row for row in rows if row.domain == domain]
        yield domain, plots.dumbbells(board, of_domain, f"Scores of the {printable(domain)} tasks")


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
        yield plots.costs(board, rtfs, "Average against speed", "seconds of embedding per second of audio")


def _layers(board: Board) -> Iterator[dict[str, Any]]:
    """A drawing per task and method, with a line per model."""
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
    """A table of one model's scores by tap, if it has several taps."""
    curves = [curve for curve in board.curves if curve.model == number]
    if not curves:
        return
    rows = [
        (
            tap,
            [
                (curve.scores[i], i == curve.best, curve.best_on_test, curve.weights[i] if curve.weights else None)
                for curve in curves
            ],
        )
        for i, tap in enumerate(curves[0].steps)
    ]
    yield {
        "model": number,
        "headings": [f"{curve.title}, {curve.method}" for curve in curves],
        "rows": rows,
        "mix": [curve.mix for curve in curves] if any(curve.mix for curve in curves) else [],
        "weights": [
            (curve.title, plots.bars(curve.steps, curve.weights, f"Weights in the mix of {printable(curve.title)}"))
            for curve in curves
            if curve.weights
        ],
    }


def _drawn(board: Board, mistakes: Mistakes) -> _Mistakes:
    drawings = tuple(
        plots.heat_map(
            confusion.matrix,
            confusion.classes,
            f"Confusions of {board.models[confusion.model].label} in {printable(mistakes.row.title)}",
        )
        if confusion.matrix is not None
        else Markup("")
        for confusion in mistakes.confusions
    )
    return _Mistakes(mistakes.row, mistakes.models, mistakes.confusions, drawings, mistakes.clips, mistakes.note)


def _about(model: Model) -> dict[str, Any]:
    encoder = model.result.encoder
    contract = [
        (foreign(name), short(field.get("value")), short(field.get("source", "")))
        for name, field in sorted(encoder.contract.items())
    ]
    facts = [("model", foreign(encoder.file)), ("sha256", foreign(encoder.sha256))]
    facts += [("result", foreign(model.side.name)), ("scored", foreign(model.result.created))]
    facts += [(foreign(name), short(value)) for name, value in model.result.settings.items()]
    facts += [(foreign(name), short(value)) for name, value in model.result.environment.items()]
    return {"contract": contract, "facts": facts}
