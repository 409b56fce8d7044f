"""One or several results side by side: a row per task and method, a column per model, the best, and what is within noise.

Pages, Markdown files and tables read results from here only. If several taps were scored, the first represents the model,
and `curves` has the others. A difference is within noise if its paired interval (the same resamples of the same clips for
both) contains zero, or if it may be chance among so many differences (Benjamini and Hochberg). Without predictions, it is
within noise if the two intervals overlap, a weaker test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import msgspec
import numpy as np

from ..data.catalog import in_group, shipped_tasks
from ..errors import UsageError, foreign, printable
from ..evaluation.averages import published_averages, weight_shares
from ..evaluation.differences import (
    SIGNIFICANT,
    Side,
    check_alike,
    check_heads_alike,
    check_settings,
    groups_of,
)
from ..evaluation.record import SHOWN_GROUPS, Interval, Result, TaskResult
from ..evaluation.settings import METHODS, Method
from ..metrics.bootstrap import Array
from ..metrics.intervals import Estimate, adjusted, interval, p_value
from .curves import Curve, shot_curves, tap_curves
from .draws import Draws
from .tables import METRIC_NAMES

MAX_MODELS = 100
_MAX_NUMBER = 1e9
_ROUNDING = 1e-9

Standing = Literal["best", "within_noise", "behind", "unclear"]
Basis = Literal["paired", "intervals"]


@dataclass(frozen=True)
class Verdict:
    """How a score compares with the best of its row.

    `behind` is the paired interval of how much worse it is; `p` is corrected for all differences in the board's rows.
    """

    standing: Standing
    basis: Basis | None = None
    behind: Interval | None = None
    p: float | None = None


@dataclass(frozen=True)
class Cell:
    """A model's score in a row; `verdict` is None if there is nothing to compare it with."""

    record: TaskResult
    verdict: Verdict | None = None

    @property
    def score(self) -> float | None:
        return self.record.score


@dataclass(frozen=True)
class Row:
    """One task by one method; `cells` has an entry per model, None if the model was not scored on it."""

    task: str
    title: str
    domain: str
    method: Method
    metric: str
    higher_is_better: bool
    weight: float | None
    cells: tuple[Cell | None, ...]
    published: dict[str, float]

    @property
    def metric_name(self) -> str:
        return METRIC_NAMES.get(self.metric, foreign(self.metric))

    @property
    def record(self) -> TaskResult:
        """The first model's record of the row."""
        return next(cell.record for cell in self.cells if cell is not None)


@dataclass(frozen=True)
class AverageCell:
    weighted: float
    mean: float
    ci95: Interval | None
    verdict: Verdict | None


@dataclass(frozen=True)
class AverageRow:
    """The average over `tasks`, those of the group with a comparable score from every model; the group has `group_size`."""

    group: str
    method: Method
    tasks: tuple[str, ...]
    group_size: int
    cells: tuple[AverageCell, ...]
    published: dict[str, float]


@dataclass(frozen=True)
class Model:
    """A model of a board, by a unique label. `side` holds only the records of the first tap, `result` all records."""

    label: str
    side: Side
    result: Result

    @property
    def main(self) -> list[TaskResult]:
        return self.side.result.tasks

    def declared(self, name: str) -> object:
        """A value of the contract, None if absent."""
        return self.result.encoder.contract.get(name, {}).get("value")

    @property
    def rtf(self) -> float | None:
        """Seconds of embedding per second of audio, over all tasks that were embedded in that run."""
        measured = {record.task: record for record in self.main if record.rtf is not None and record.audio_hours > 0}
        hours = sum(record.audio_hours for record in measured.values())
        return sum(record.audio_hours * (record.rtf or 0.0) for record in measured.values()) / hours if hours else None

    @property
    def hop_ms(self) -> float | None:
        """Milliseconds from one frame to the next; None for a clip-only model, or if the contract has no usable numbers."""
        hop, rate = self.declared("hop_samples"), self.declared("sample_rate")
        if not (isinstance(hop, int | float) and isinstance(rate, int | float)):
            return None
        return 1000 * hop / rate if 0 < hop <= _MAX_NUMBER and 0 < rate <= _MAX_NUMBER else None


@dataclass(frozen=True)
class Board:
    """Results side by side. `models` are sorted by their headline average, the best first.

    `curves` are scores by tap, `shots` by the number of training clips per class. `notes` say which comparisons are
    incomplete or weaker than usual, and what to know of published scores.
    """

    models: tuple[Model, ...]
    rows: tuple[Row, ...]
    averages: tuple[AverageRow, ...]
    curves: tuple[Curve, ...]
    shots: tuple[Curve, ...]
    published: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def headline(self) -> AverageRow | None:
        """The average that ranks the models: of the widest group, by head if possible; None without averages."""
        return self.averages[0] if self.averages else None

    @property
    def settings(self) -> dict[str, object]:
        """The settings that all results share, as the first result has them."""
        return self.models[0].result.settings


def make_board(sides: Sequence[Side]) -> Board:
    """Put results side by side.

    Args:
        sides: Results with the predictions beside them, at most `MAX_MODELS`.

    Raises:
        UsageError: If there are none or too many, if their protocols, settings or task definitions differ, or if a result
            holds numbers that no evaluation gives.
        DataError: If the data of a task differ, or if predictions do not give the score of their result.
    """
    if not sides:
        raise UsageError("there is no result to report; name result files of `xares-onnx evaluate`")
    if len(sides) > MAX_MODELS:
        raise UsageError(f"{len(sides)} results are more than a report holds; name at most {MAX_MODELS}")
    check_comparable(sides)
    models = _ranked([Model(label, _main(side), side.result) for label, side in zip(_labels(sides), sides, strict=True)])
    draws = Draws({model.label: model.side for model in models})
    rows = tuple(_corrected(list(_rows(models, draws))))
    averages = tuple(_averages(models, draws))
    published = dict.fromkeys(name for row in rows for name in row.published)
    notes = (*_missing_notes(models), *_published_notes(rows), *draws.notes())
    results = [model.result for model in models]
    curves, shots = tuple(tap_curves(results)), tuple(shot_curves(results))
    return Board(models, rows, averages, curves, shots, tuple(published), notes)


def check_comparable(sides: Sequence[Side]) -> None:
    """Check that any two of the results were scored alike.

    Raises:
        UsageError: If their protocols, settings, heads or task definitions differ.
        DataError: If the data of a task differ.
    """
    for a, b in combinations(map(_main, sides), 2):
        ours, theirs = a.scored(), b.scored()
        common = [name for name in ours if name in theirs]
        check_settings(a, b.name, b.result.settings, {method for _, method, _ in common})
        for name in common:
            check_alike(a, ours[name], b.name, theirs[name].definition_digest, theirs[name].data_digest)
            check_heads_alike(a, ours[name], b.name, theirs[name])


def _main(side: Side) -> Side:
    """The result as if no taps had been asked for: the records of the first."""
    records = [record for record in side.result.tasks if record.tap is None]
    return Side(side.name, msgspec.structs.replace(side.result, tasks=records), side.predictions_of)


def _labels(sides: Sequence[Side]) -> list[str]:
    """Unique labels: the file's stem, followed by the start of its digest and the result's name if that is needed."""
    encoders = [side.result.encoder for side in sides]
    stems = [printable(encoder.file.removesuffix(".onnx"))[:60] or "?" for encoder in encoders]
    longer = [f"{stem} {printable(encoder.sha256[:8])}" for stem, encoder in zip(stems, encoders, strict=True)]
    longest = [f"{name} ({foreign(side.name)})" for name, side in zip(longer, sides, strict=True)]
    labels = []
    for i in range(len(sides)):
        unique = (names[i] for names in (stems, longer, longest) if names.count(names[i]) == 1)
        labels.append(next(unique, f"{longest[i]} {i + 1}"))
    return labels


def _ranked(models: Sequence[Model]) -> tuple[Model, ...]:
    """The best headline average first."""
    headline: tuple[str, Method, tuple[str, ...]] = next(_groups(models), ("", "head", ()))
    _, method, tasks = headline
    return tuple(sorted(models, key=lambda model: (-_weighted(_records(model, method, tasks))[0], model.label)))


def _records(model: Model, method: Method, tasks: Sequence[str]) -> list[TaskResult]:
    """A model's records of `tasks`, in their order."""
    by_task = {record.task: record for record in model.main if record.family == method and record.score is not None}
    return [by_task[task] for task in tasks]


def _rows(models: Sequence[Model], draws: Draws) -> Iterator[Row]:
    by_row: dict[tuple[str, Method], list[TaskResult | None]] = {}
    for number, model in enumerate(models):
        for record in model.main:
            by_row.setdefault((record.task, record.family), [None] * len(models))[number] = record
    order = list(shipped_tasks())
    order += [task for task, _ in by_row if task not in order]
    for task, method in sorted(by_row, key=lambda key: (METHODS.index(key[1]), order.index(key[0]))):
        records = by_row[task, method]
        first = next(record for record in records if record is not None)
        verdicts = _verdicts(draws, records, first.higher_is_better)
        yield Row(
            task=task,
            title=foreign(" ".join(first.title.split())),
            domain=foreign(first.domain),
            method=method,
            metric=first.metric,
            higher_is_better=first.higher_is_better,
            weight=first.weight,
            cells=tuple(Cell(r, v) if r is not None else None for r, v in zip(records, verdicts, strict=True)),
            published=next((_published(r) for r in records if r is not None and r.published), {}),
        )


def _published(record: TaskResult) -> dict[str, float]:
    """Published scores by the names that they are shown by."""
    return {foreign(name): score for name, score in record.published.items()}


def _corrected(rows: Sequence[Row]) -> Iterator[Row]:
    """Verdicts that hold for all rows together: a paired difference that may be chance among so many is within noise."""
    verdicts = [cell.verdict for row in rows for cell in row.cells if cell and cell.verdict and cell.verdict.p is not None]
    corrected = iter(adjusted([verdict.p for verdict in verdicts if verdict.p is not None]))
    for row in rows:
        cells: list[Cell | None] = []
        for cell in row.cells:
            verdict = cell.verdict if cell else None
            if cell and verdict and verdict.p is not None:
                p = next(corrected)
                standing: Standing = verdict.standing if p <= SIGNIFICANT else "within_noise"
                cell = replace(cell, verdict=replace(verdict, standing=standing, p=p))
            cells.append(cell)
        yield replace(row, cells=tuple(cells))


def _verdicts(draws: Draws, records: Sequence[TaskResult | None], higher_is_better: bool) -> list[Verdict | None]:
    sign = 1.0 if higher_is_better else -1.0
    scored = {i: sign * r.score for i, r in enumerate(records) if r is not None and r.score is not None}
    comparable = {i: score for i, score in scored.items() if (record := records[i]) is not None and record.comparable}
    scored = comparable or scored  # after --limit, no score is comparable
    if len(scored) < 2:
        return [None] * len(records)
    best = max(scored, key=lambda i: scored[i])
    best_record = records[best]
    verdicts: list[Verdict | None] = []
    for i, record in enumerate(records):
        if record is None or best_record is None or i not in scored:
            verdicts.append(None)
        elif scored[i] == scored[best]:
            verdicts.append(Verdict("best"))
        else:
            shortfall = draws.behind(best, best_record, i, record)
            verdicts.append(_verdict(shortfall, best_record.ci95, record.ci95, higher_is_better))
    return verdicts


def _verdict(shortfall: Estimate | None, best: Interval | None, other: Interval | None, higher_is_better: bool) -> Verdict:
    """`shortfall` is how much worse the other is than the best, clips paired; None if predictions are missing."""
    behind = interval(shortfall) if shortfall is not None else None
    if shortfall is not None and behind is not None:
        return Verdict("behind" if behind[0] > _ROUNDING else "within_noise", "paired", behind, p_value(shortfall))
    if best is None or other is None:
        return Verdict("unclear")
    apart = other[1] < best[0] if higher_is_better else best[1] < other[0]
    return Verdict("behind" if apart else "within_noise", "intervals")


def _groups(models: Sequence[Model]) -> Iterator[tuple[str, Method, tuple[str, ...]]]:
    """Group, method, and the tasks with a comparable score from every model; a group with the same tasks is left out."""
    listed: set[tuple[str, ...]] = set()
    for method in METHODS:
        usable = [
            {
                record.task: None
                for record in model.main
                if record.family == method and record.score is not None and record.comparable and record.weight is not None
            }
            for model in models
        ]
        common = [task for task in usable[0] if all(task in tasks for tasks in usable)]
        for group in SHOWN_GROUPS:
            tasks = tuple(task for task in common if group in groups_of(task))
            if tasks and (method, *tasks) not in listed:
                listed.add((method, *tasks))
                yield group, method, tasks


def _weighted(records: Sequence[TaskResult]) -> tuple[float, float]:
    """The weighted average and the plain mean; 0 without records."""
    if not records:
        return 0.0, 0.0
    scores = np.array([record.score for record in records], np.float64)
    return float(_shares(records) @ scores), float(scores.mean())


def _shares(records: Sequence[TaskResult]) -> Array:
    return weight_shares([record.weight for record in records])


def _averages(models: Sequence[Model], draws: Draws) -> Iterator[AverageRow]:
    for group, method, tasks in _groups(models):
        records = [_records(model, method, tasks) for model in models]
        scores = [_weighted(of_model) for of_model in records]
        shares = _shares(records[0])
        drawn = [draws.average(i, of_model, shares) for i, of_model in enumerate(records)]
        intervals = [
            interval(estimate) if estimate is not None else _recorded(model, group, method, len(tasks), weighted)
            for estimate, model, (weighted, _) in zip(drawn, models, scores, strict=True)
        ]
        best = max(range(len(models)), key=lambda i: scores[i][0])
        verdicts: list[Verdict | None] = [None] * len(models)
        if len(models) > 1:
            for i in range(len(models)):
                shortfall = draws.average_behind(best, i, records, shares)
                tied = scores[i][0] == scores[best][0]
                verdicts[i] = Verdict("best") if tied else _verdict(shortfall, intervals[best], intervals[i], True)
        protocol = models[0].result.settings.get("protocol", "corrected")
        shipped = [t for t in shipped_tasks().values() if in_group(t, group) and t.weight_under(protocol) is not None]
        yield AverageRow(
            group=group,
            method=method,
            tasks=tasks,
            group_size=len([t for t in shipped if method == "head" or t.knn]) or len(tasks),
            cells=tuple(AverageCell(*s, ci, v) for s, ci, v in zip(scores, intervals, verdicts, strict=True)),
            published=published_averages(records[0], method) if all(r.published for r in records[0]) else {},
        )


def _recorded(model: Model, group: str, method: Method, tasks: int, weighted: float) -> Interval | None:
    """The interval that the result itself gives for the average, if that is over the same tasks."""
    average = model.result.averages.get(group, {}).get(method)
    if average is not None and average.tasks == tasks and abs(average.weighted - weighted) < 1e-9:
        return average.ci95
    return None


def _missing_notes(models: Sequence[Model]) -> Iterator[str]:
    """The tasks that some models lack, which are therefore left out of the averages."""
    for method in METHODS:
        scored = [{r.task for r in m.main if r.family == method and r.score is not None} for m in models]
        all_tasks = dict.fromkeys(r.task for m in models for r in m.main if r.family == method and r.score is not None)
        for model, own_tasks in zip(models, scored, strict=True):
            if lacking := [task for task in all_tasks if task not in own_tasks]:
                few = ", ".join(map(foreign, lacking[:6])) + (f" and {len(lacking) - 6} more" if len(lacking) > 6 else "")
                yield f"{model.label} has no {method} score for {few}, so the averages here leave these tasks out"


def _published_notes(rows: Sequence[Row]) -> Iterator[str]:
    """Notes on the published scores that are shown."""
    tasks = shipped_tasks()
    for name in dict.fromkeys(row.task for row in rows if row.published and row.task in tasks):
        published = tasks[name].published
        if published and published.note:
            yield f"{name}, published {published.note}"
