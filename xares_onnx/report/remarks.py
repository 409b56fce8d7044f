"""What a report says in words: the settings in one line, what is left out, and what to know of each run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import printable
from .board import Board, Model, Row
from .profile import NOTE, aspects

MAX_LINES = 60  # of remarks a model
_MAX_VALUE, _MAX_DEPTH = 300, 4
_BY = {"head": "trained heads", "knn": "nearest neighbours"}


@dataclass(frozen=True)
class Cost:
    """`small` and `fast`: no model that is smaller, or faster, has a higher average."""

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
    """Protocol, seeds and how much was scored, in one line."""
    settings = board.settings
    tasks = len({row.task for row in board.rows if any(cell and cell.score is not None for cell in row.cells)})
    count = len(board.models)
    seeds = settings.get("seeds")
    limit = f", at most {short(settings['limit'])} clips a split" if settings.get("limit") else ""
    return (
        f"{count} model{'' if count == 1 else 's'}, {tasks} task{'' if tasks == 1 else 's'}; protocol "
        f"{short(settings.get('protocol'))}, {short(seeds)} seed{'' if seeds == 1 else 's'}{limit}. Scores are fractions."
    )


def headline(board: Board) -> str:
    """Who is best by how much, in one sentence; of a model alone, its average."""
    row = board.headline
    if row is None:
        profiled = aspects({of_task.task for of_task in board.rows})
        return f"There is no average{f': {NOTE}' if profiled else ''}."
    first, best = row.cells[0], board.models[0].label
    of = f"the weighted average of {len(row.tasks)} of {row.of} {row.group} tasks by {_BY[row.method]}"
    span = f" (95 %: {first.ci95[0]:.3f} to {first.ci95[1]:.3f})" if first.ci95 else ""
    if len(board.models) == 1:
        return f"{best} has {first.weighted:.3f}{span}, {of}."
    near = [
        m.label for m, c in zip(board.models, row.cells, strict=True) if c.verdict and c.verdict.standing == "within_noise"
    ]
    tied = f" {_listed(near)} {'is' if len(near) == 1 else 'are'} within noise of it." if near else ""
    others = "" if near else f", ahead of {board.models[1].label} with {row.cells[1].weighted:.3f}"
    return f"{best} is best with {first.weighted:.3f}{span}, {of}{others}.{tied}"


def noise(board: Board) -> str:
    """How differences were told from noise."""
    bases = {cell.verdict.basis for row in board.rows for cell in row.cells if cell is not None and cell.verdict is not None}
    said = []
    if "paired" in bases:
        said.append(
            "A score is within noise of the best if the 95 % interval of their difference holds zero (a paired bootstrap "
            "over the same test clips, which is finer than to see whether two intervals overlap, with what seeds differ "
            "by), or if among all differences shown it may be chance (Benjamini and Hochberg's correction)."
        )
    if "intervals" in bases:
        said.append(
            "Where predictions were not at hand, a score counts as within noise if its interval overlaps the best one's."
        )
    return " ".join(said)


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
    """Tasks without a score and why, clips that were dropped, and the notes of the run."""
    lines: list[str] = []
    for record in model.main:
        if record.status != "ok":
            lines.append(f"{record.task}, {record.method}: {record.status.replace('_', ' ')}: {record.reason}")
        elif record.clips.dropped:
            drop = record.clips.dropped[0]
            lines.append(
                f"{record.task}: {len(record.clips.dropped)} of {record.clips.expected} clips dropped, the first "
                f"{drop.key}: {drop.reason}"
            )
    for record in model.main:
        lines += [f"{record.task}: {note}" for note in record.notes]
    lines += model.result.notes
    told = list(dict.fromkeys(short(line) for line in lines))
    return told[:MAX_LINES] + ([f"and {len(told) - MAX_LINES} more"] if len(told) > MAX_LINES else [])


def short(value: Any, depth: int = 0) -> str:
    """A value of a contract or setting on one line, cut where it is long or nested deeply."""
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
    text = printable(str(value))
    return text if len(text) <= _MAX_VALUE else f"{text[: _MAX_VALUE - 1]}…"


def plain_score(row: Row, number: int) -> str:
    """A score as text with its marks: `0.856 ★`, `0.850 ≈`, `0.100*`; the status where there is none."""
    cell = row.cells[number]
    if cell is None:
        return ""
    if cell.score is None:
        return cell.record.status.replace("_", " ")
    mark = {"best": " ★", "within_noise": " ≈"}.get(cell.verdict.standing if cell.verdict else "", "")
    return f"{cell.score:.3f}{'' if cell.record.comparable else '*'}{mark}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _unbeaten(i: int, costs: Sequence[float | None], averages: Sequence[float | None]) -> bool:
    mine, cost = averages[i], costs[i]
    if mine is None or cost is None:
        return False
    return not any(
        other is not None and average is not None and other < cost and average >= mine
        for other, average in zip(costs, averages, strict=True)
    )


def _machine(model: Model) -> str:
    environment = model.result.environment
    machine = environment.get("machine")
    named = machine.get("processor") if isinstance(machine, dict) else None
    provider = str(environment.get("provider", "")).removesuffix("ExecutionProvider")
    return ", ".join(short(part) for part in (provider, named) if part)
