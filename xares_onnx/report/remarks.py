"""The sentences of a report: settings, who is best, how noise was judged, and what to know about each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import foreign
from .board import Board, Model, Row, Verdict
from .profile import NOTE, aspects

MAX_LINES = 60  # of remarks per model
_MAX_DEPTH = 4  # levels of nesting
_MARKS = {"best": " ★", "within_noise": " ≈"}
_METHOD_NAMES = {"head": "trained heads", "knn": "nearest neighbours"}


@dataclass(frozen=True)
class Cost:
    """What a model costs. `small` and `fast`: no smaller, or faster, model has as high an average.

    `rtf` is seconds of embedding per second of audio on `machine`.
    """

    average: float | None
    bytes: int
    parameters: int
    dim: str
    hop_ms: float | None
    rtf: float | None
    machine: str
    small: bool
    fast: bool


def summary(board: Board) -> str:
    """Protocol, seeds, and how many models and tasks were scored, in one line."""
    settings = board.settings
    tasks = len({row.task for row in board.rows if any(cell and cell.score is not None for cell in row.cells)})
    count = len(board.models)
    seeds = settings.get("seeds")
    limit = f", at most {short(settings['limit'])} clips per split" if settings.get("limit") else ""
    return (
        f"{count} model{'' if count == 1 else 's'}, {tasks} task{'' if tasks == 1 else 's'}; protocol "
        f"{short(settings.get('protocol'))}, {short(seeds)} seed{'' if seeds == 1 else 's'}{limit}. Scores are fractions."
    )


def headline(board: Board) -> str:
    """Which model is best and by how much; for a single model, its average."""
    row = board.headline
    if row is None:
        profile = aspects({task_row.task for task_row in board.rows})
        return f"There is no average{f': {NOTE}' if profile else ''}."
    first, best = row.cells[0], board.models[0].label
    scope = f"the weighted average of {len(row.tasks)} of {row.group_size} {row.group} tasks by {_METHOD_NAMES[row.method]}"
    span = f" (95 %: {first.ci95[0]:.3f} to {first.ci95[1]:.3f})" if first.ci95 else ""
    if len(board.models) == 1:
        return f"Model {best} has {first.weighted:.3f}{span}, {scope}."
    near = [
        model.label
        for model, cell in zip(board.models, row.cells, strict=True)
        if cell.verdict and cell.verdict.standing == "within_noise"
    ]
    tied = f" {listed(near)} {'is' if len(near) == 1 else 'are'} within noise of it." if near else ""
    runner_up = "" if near else f", ahead of {board.models[1].label} with {row.cells[1].weighted:.3f}"
    return f"Model {best} is best with {first.weighted:.3f}{span}, {scope}{runner_up}.{tied}"


def noise(board: Board) -> str:
    """How differences were told from noise; empty if nothing was compared."""
    bases = {cell.verdict.basis for row in board.rows for cell in row.cells if cell is not None and cell.verdict is not None}
    sentences = []
    if "paired" in bases:
        sentences.append(
            "A score is within noise of the best if the 95 % interval of their difference contains zero (a paired bootstrap "
            "over the same test clips, with the variation over seeds; it finds smaller differences than overlap of "
            "intervals does), or if it may be chance among all the differences shown (Benjamini and Hochberg's correction)."
        )
    if "intervals" in bases:
        sentences.append(
            "If predictions were missing, a score counts as within noise if its interval overlaps that of the best."
        )
    return " ".join(sentences)


def costs(board: Board) -> list[Cost]:
    """What each model costs, in the order of the board."""
    averages = [cell.weighted for cell in board.headline.cells] if board.headline else [None] * len(board.models)
    sizes = [float(model.result.encoder.bytes) for model in board.models]
    rtfs = [model.rtf for model in board.models]
    return [
        Cost(
            average=averages[i],
            bytes=model.result.encoder.bytes,
            parameters=model.result.encoder.parameters,
            dim=short(model.declared("dim")),
            hop_ms=model.hop_ms,
            rtf=rtfs[i],
            machine=_machine(model),
            small=_unbeaten(i, sizes, averages),
            fast=_unbeaten(i, rtfs, averages),
        )
        for i, model in enumerate(board.models)
    ]


def remarks(model: Model) -> list[str]:
    """What to know about a run: tasks without a score and why, dropped clips, and notes; at most `MAX_LINES` lines."""
    lines: list[str] = []
    for record in model.main:
        if record.status != "ok":
            status = foreign(record.status.replace("_", " "))
            lines.append(f"{foreign(record.task)}, {foreign(record.method)}: {status}: {foreign(record.reason or '')}")
        elif record.clips.dropped:
            drop = record.clips.dropped[0]
            lines.append(
                f"{foreign(record.task)}: {len(record.clips.dropped)} of {record.clips.expected} clips dropped, the first "
                f"{foreign(drop.key)}: {foreign(drop.reason)}"
            )
    for record in model.main:
        lines += [f"{foreign(record.task)}: {foreign(note)}" for note in record.notes]
    lines += map(foreign, model.result.notes)
    unique = list(dict.fromkeys(lines))
    return unique[:MAX_LINES] + ([f"and {len(unique) - MAX_LINES} more"] if len(unique) > MAX_LINES else [])


def short(value: Any, depth: int = 0) -> str:
    """A value of a contract or setting on one line, cut if it is long or deeply nested."""
    if depth > _MAX_DEPTH:
        return "…"
    if value is None or value in ([], {}, ()):
        value = "none"
    elif isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, dict):
        value = ", ".join(f"{name} {short(inner, depth + 1)}" for name, inner in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(short(inner, depth + 1) for inner in value)
    return foreign(str(value))


def plain_score(row: Row, number: int) -> str:
    """A score as text with its marks: `0.856 ★`, `0.850 ≈`, `0.100*`; the status without one."""
    cell = row.cells[number]
    if cell is None:
        return ""
    if cell.score is None:
        return cell.record.status.replace("_", " ")
    return f"{cell.score:.3f}{'' if cell.record.comparable else '*'}{mark(cell.verdict)}"


def mark(verdict: Verdict | None) -> str:
    """The sign behind a score: ` ★` for the best, ` ≈` within noise of it, else empty."""
    return _MARKS.get(verdict.standing, "") if verdict else ""


def listed(names: Sequence[str], limit: int = 3) -> str:
    """The first `limit` names and how many more there are: `a, b, c and 2 more`."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _unbeaten(i: int, costs: Sequence[float | None], averages: Sequence[float | None]) -> bool:
    """Whether every model that costs less than model `i` has a lower average."""
    average, cost = averages[i], costs[i]
    if average is None or cost is None:
        return False
    return not any(
        other_cost is not None and other_average is not None and other_cost < cost and other_average >= average
        for other_cost, other_average in zip(costs, averages, strict=True)
    )


def _machine(model: Model) -> str:
    environment = model.result.environment
    machine = environment.get("machine")
    processor = machine.get("processor") if isinstance(machine, dict) else None
    provider = str(environment.get("provider", "")).removesuffix("ExecutionProvider")
    return ", ".join(short(part) for part in (provider, processor) if part)
