"""One or many results side by side: a row a task and method, a column a model, who is best, and what is within noise.

This is all that a page, a Markdown file or a table knows of results. Where taps were scored, a model stands for its first
tap, and `curves` has the others. A difference is within noise if its paired interval (the same resamples of the same clips
for both) holds zero, or if it may be chance among so many differences (Benjamini and Hochberg); without predictions, if two
intervals overlap, which says less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import msgspec
import numpy as np

from ..data.catalog import in_group, shipped_tasks
from ..errors import DataMissingError, UsageError, printable
from ..evaluation.averages import published_averages
from ..evaluation.differences import (
    SIGNIFICANT,
    Side,
    check_alike,
    check_heads_alike,
    check_settings,
    groups_of,
    paired,
    verified,
)
from ..evaluation.record import SHOWN_GROUPS, Interval, Result, TaskResult
from ..metrics.bootstrap import Array, Indices
from ..metrics.intervals import Estimate, Scale, adjusted, average, estimates, interval, p_value
from ..scoring.scoring import clips_of, generator, groups_of_clips
from .curves import Curve, Method, method_of, shot_curves, tap_curves
from .tables import METRIC_NAMES

MAX_MODELS = 100
_MAX_NUMBER, _MAX_SIZE = 1e9, 1 << 60
_ROUNDING = 1e-9

Standing = Literal["best", "within_noise", "behind", "unclear"]
Basis = Literal["paired", "intervals"]
_METHODS: tuple[Method, ...] = ("head", "knn")


@dataclass(frozen=True)
class Verdict:
    """How a score stands beside the best of its row. `behind` is the paired interval of what it lacks, 0 or more at best.

    `p` is corrected for all differences of the board's rows.
    """

    standing: Standing
    basis: Basis | None = None
    behind: Interval | None = None
    p: float | None = None


@dataclass(frozen=True)
class Cell:
    """`verdict` is None where there is nothing to compare with."""

    record: TaskResult
    verdict: Verdict | None = None

    @property
    def score(self) -> float | None:
        return self.record.score


@dataclass(frozen=True)
class Row:
    """One task by one method; `cells` has an entry a model, None where it was not asked."""

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
        return METRIC_NAMES.get(self.metric, printable(self.metric))

    @property
    def record(self) -> TaskResult:
        """Any model's record of it."""
        return next(cell.record for cell in self.cells if cell is not None)


@dataclass(frozen=True)
class AverageCell:
    weighted: float
    mean: float
    ci95: Interval | None
    verdict: Verdict | None


@dataclass(frozen=True)
class AverageRow:
    """The average of a group over `tasks`, those that every model has a comparable score of; the group has `of`."""

    group: str
    method: Method
    tasks: tuple[str, ...]
    of: int
    cells: tuple[AverageCell, ...]
    published: dict[str, float]


@dataclass(frozen=True)
class Model:
    """`label` is unique in its board. `side` holds the records of the model's output alone, `result` all."""

    label: str
    side: Side
    result: Result

    @property
    def main(self) -> list[TaskResult]:
        return self.side.result.tasks

    def declared(self, name: str) -> object:
        """A value of the contract, None where it has none."""
        return self.result.encoder.contract.get(name, {}).get("value")

    @property
    def rtf(self) -> float | None:
        """Seconds of embedding a second of audio, over all tasks that were embedded in that run."""
        measured = {record.task: record for record in self.main if record.rtf is not None and record.audio_hours > 0}
        hours = sum(record.audio_hours for record in measured.values())
        return sum(r.audio_hours * (r.rtf or 0.0) for r in measured.values()) / hours if hours else None

    @property
    def hop_ms(self) -> float | None:
        hop, rate = self.declared("hop_samples"), self.declared("sample_rate")
        if not (isinstance(hop, int | float) and isinstance(rate, int | float)):
            return None
        return 1000 * hop / rate if 0 < hop <= _MAX_NUMBER and 0 < rate <= _MAX_NUMBER else None


@dataclass(frozen=True)
class Board:
    """`models` are sorted by their headline average, the best first. `notes` say what could not be done as it should.

    `curves` are scores by tap, `shots` by the number of training clips per class.
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
        """The average that models are ranked by: of the widest group, by head where there is one."""
        return self.averages[0] if self.averages else None

    @property
    def settings(self) -> dict[str, object]:
        return self.models[0].result.settings


def make_board(sides: Sequence[Side]) -> Board:
    """Put results side by side.

    Raises `UsageError` where they were scored by another protocol or settings, or a task is defined otherwise; `DataError`
    where a task's data differ, or predictions are not those of their result.
    """
    if not sides:
        raise UsageError("there is no result to report; name result files of `xares-onnx evaluate`")
    if len(sides) > MAX_MODELS:
        raise UsageError(f"{len(sides)} results are more than a report holds; name at most {MAX_MODELS}")
    for side in sides:
        _check_numbers(side)
    check_comparable(sides)
    models = _ranked([Model(label, _main(side), side.result) for label, side in zip(_labels(sides), sides, strict=True)])
    draws = _Draws(models)
    rows = tuple(_corrected(list(_rows(models, draws))))
    averages = tuple(_averages(models, draws))
    published = dict.fromkeys(name for row in rows for name in row.published)
    notes = (*_missing_notes(models), *_published_notes(rows), *draws.notes())
    results = [model.result for model in models]
    curves, shots = tuple(tap_curves(results)), tuple(shot_curves(results))
    return Board(models, rows, averages, curves, shots, tuple(published), notes)


def check_comparable(sides: Sequence[Side]) -> None:
    """`UsageError` for other settings or another definition of a task, `DataError` for other data, of any two results."""
    for a, b in combinations(map(_main, sides), 2):
        ours, theirs = a.scored(), b.scored()
        common = [name for name in ours if name in theirs]
        check_settings(a, b.name, b.result.settings, {method for _, method, _ in common})
        for name in common:
            check_alike(a, ours[name], b.name, theirs[name].definition_digest, theirs[name].data_digest)
            check_heads_alike(a, ours[name], b.name, theirs[name])


def _check_numbers(side: Side) -> None:
    """A file may hold any number; what is drawn and averaged must be one that an evaluation can give."""
    encoder = side.result.encoder
    if not (0 <= encoder.bytes <= _MAX_SIZE and 0 <= encoder.parameters <= _MAX_SIZE):
        raise UsageError(f"{side.name} holds a size of its encoder that no file has; evaluate again")
    for record in side.result.tasks:
        signed = [record.score, *(record.ci95 or ()), *record.per_seed, *record.published.values()]
        signed += [value for row in record.shots for value in (row.clips_per_class, row.score, *(row.ci95 or ()))]
        signed += [trial.test for trial in record.tuning.tried] if record.tuning else []
        positive = [record.weight, record.rtf, record.audio_hours]
        in_range = all(value is None or abs(value) <= _MAX_NUMBER for value in signed)
        if not (in_range and all(value is None or 0 <= value <= _MAX_NUMBER for value in positive)):
            raise UsageError(f"{side.name} holds a number of {record.task} that no evaluation gives; evaluate again")


def _main(side: Side) -> Side:
    """The result as if no taps had been asked for: the records of the first."""
    mine = [record for record in side.result.tasks if record.tap is None]
    return Side(side.name, msgspec.structs.replace(side.result, tasks=mine), side.predictions_of)


def _labels(sides: Sequence[Side]) -> list[str]:
    """What to call each model: its file's stem, with the start of its digest and its result's name where that is needed."""
    encoders = [side.result.encoder for side in sides]
    stems = [printable(encoder.file.removesuffix(".onnx"))[:60] or "?" for encoder in encoders]
    longer = [f"{stem} {printable(encoder.sha256[:8])}" for stem, encoder in zip(stems, encoders, strict=True)]
    longest = [f"{name} ({printable(side.name)})" for name, side in zip(longer, sides, strict=True)]
    labels = []
    for i in range(len(sides)):
        unique = (names[i] for names in (stems, longer, longest) if names.count(names[i]) == 1)
        labels.append(next(unique, f"{longest[i]} {i + 1}"))
    return labels


def _ranked(models: Sequence[Model]) -> tuple[Model, ...]:
    """The best headline average first."""
    _, method, tasks = next(_groups(models), ("", "head", ()))
    return tuple(sorted(models, key=lambda model: (-_weighted(_records(model, method, tasks))[0], model.label)))


def _records(model: Model, method: Method, tasks: Sequence[str]) -> list[TaskResult]:
    """A model's records of `tasks`, in their order."""
    mine = {record.task: record for record in model.main if method_of(record) == method and record.score is not None}
    return [mine[task] for task in tasks]


def _rows(models: Sequence[Model], draws: _Draws) -> Iterator[Row]:
    found: dict[tuple[str, Method], list[TaskResult | None]] = {}
    for number, model in enumerate(models):
        for record in model.main:
            found.setdefault((record.task, method_of(record)), [None] * len(models))[number] = record
    order = list(shipped_tasks())
    order += [task for task, _ in found if task not in order]
    for task, method in sorted(found, key=lambda name: (_METHODS.index(name[1]), order.index(name[0]))):
        records = found[task, method]
        first = next(record for record in records if record is not None)
        verdicts = _verdicts(draws, records, first.higher_is_better)
        yield Row(
            task=task,
            title=first.title,
            domain=first.domain,
            method=method,
            metric=first.metric,
            higher_is_better=first.higher_is_better,
            weight=first.weight,
            cells=tuple(Cell(r, v) if r is not None else None for r, v in zip(records, verdicts, strict=True)),
            published=next((r.published for r in records if r is not None and r.published), {}),
        )


def _corrected(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows of which each was judged alone, judged together: a paired difference that may be chance is within noise."""
    paired = [cell.verdict for row in rows for cell in row.cells if cell and cell.verdict and cell.verdict.p is not None]
    corrected = iter(adjusted([verdict.p for verdict in paired if verdict.p is not None]))
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


def _verdicts(draws: _Draws, records: Sequence[TaskResult | None], higher_is_better: bool) -> list[Verdict | None]:
    sign = 1.0 if higher_is_better else -1.0
    scored = {i: sign * r.score for i, r in enumerate(records) if r is not None and r.score is not None}
    comparable = {i: score for i, score in scored.items() if (record := records[i]) is not None and record.comparable}
    scored = comparable or scored  # after --limit none is
    if len(scored) < 2:
        return [None] * len(records)
    best = max(scored, key=lambda i: scored[i])
    first = records[best]
    verdicts: list[Verdict | None] = []
    for i, record in enumerate(records):
        if record is None or first is None or i not in scored:
            verdicts.append(None)
        elif scored[i] == scored[best]:
            verdicts.append(Verdict("best"))
        else:
            verdicts.append(_verdict(draws.behind(best, first, i, record), first.ci95, record.ci95, higher_is_better))
    return verdicts


def _verdict(lacking: Estimate | None, best: Interval | None, other: Interval | None, higher_is_better: bool) -> Verdict:
    """`lacking` is what the other lacks of the best, clips paired; None where that is not known."""
    behind = interval(lacking) if lacking is not None else None
    if lacking is not None and behind is not None:
        return Verdict("behind" if behind[0] > _ROUNDING else "within_noise", "paired", behind, p_value(lacking))
    if best is None or other is None:
        return Verdict("unclear")
    apart = other[1] < best[0] if higher_is_better else best[1] < other[0]
    return Verdict("behind" if apart else "within_noise", "intervals")


def _groups(models: Sequence[Model]) -> Iterator[tuple[str, Method, tuple[str, ...]]]:
    """Group, method and the tasks that every model has a comparable score of; groups of the same tasks once."""
    told: set[tuple[str, ...]] = set()
    for method in _METHODS:
        usable = [
            {
                record.task: None
                for record in model.main
                if method_of(record) == method
                and record.score is not None
                and record.comparable
                and record.weight is not None
            }
            for model in models
        ]
        common = [task for task in usable[0] if all(task in tasks for tasks in usable)]
        for group in SHOWN_GROUPS:
            tasks = tuple(task for task in common if group in groups_of(task))
            if tasks and (method, *tasks) not in told:
                told.add((method, *tasks))
                yield group, method, tasks


def _weighted(records: Sequence[TaskResult]) -> tuple[float, float]:
    """The weighted average and the plain mean; 0 of nothing."""
    if not records:
        return 0.0, 0.0
    scores = np.array([record.score for record in records], np.float64)
    return float(_shares(records) @ scores), float(scores.mean())


def _shares(records: Sequence[TaskResult]) -> Array:
    weights = np.array([record.weight for record in records], np.float64)
    shares: Array = weights / weights.sum() if weights.sum() > 0 else np.full(len(weights), 1 / len(weights))
    return shares


def _averages(models: Sequence[Model], draws: _Draws) -> Iterator[AverageRow]:
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
                behind = draws.average_behind(best, i, records, shares)
                mine, other = intervals[best], intervals[i]
                same = scores[i][0] == scores[best][0]
                verdicts[i] = Verdict("best") if same else _verdict(behind, mine, other, True)
        protocol = models[0].result.settings.get("protocol", "corrected")
        shipped = [t for t in shipped_tasks().values() if in_group(t, group) and t.weight_under(protocol) is not None]
        yield AverageRow(
            group=group,
            method=method,
            tasks=tasks,
            of=len([t for t in shipped if method == "head" or t.knn]) or len(tasks),
            cells=tuple(AverageCell(*s, ci, v) for s, ci, v in zip(scores, intervals, verdicts, strict=True)),
            published=published_averages(records[0], method) if all(r.published for r in records[0]) else {},
        )


def _recorded(model: Model, group: str, method: Method, tasks: int, weighted: float) -> Interval | None:
    """The interval that the result has of its own average, where that is of the same tasks."""
    average = model.result.averages.get(group, {}).get(method)
    same = average is not None and average.tasks == tasks and abs(average.weighted - weighted) < 1e-9
    return average.ci95 if average is not None and same else None


@dataclass(frozen=True)
class _Draw:
    """Keys of the test clips and their groups by fold, and the score with its spread."""

    clips: dict[str, list[str]]
    groups: list[Indices] | None
    estimate: Estimate

    def pairs_with(self, other: _Draw) -> bool:
        """Whether the same clips, or groups of them, were resampled."""
        if self.clips != other.clips or (self.groups is None) != (other.groups is None):
            return False
        return all(np.array_equal(a, b) for a, b in zip(self.groups or (), other.groups or (), strict=True))


def _lacking(best: Estimate, other: Estimate, higher_is_better: bool) -> Estimate:
    return best.minus(other) if higher_is_better else other.minus(best)


class _Draws:
    """Scores with their spread, from the predictions beside each result.

    What resamples the clips of a task and method is seeded by their names, so that replicates of two models on the same
    clips are paired, whoever draws them.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = models
        self._drawn: dict[tuple[int, str, Method], _Draw | None] = {}
        self._lacking: dict[str, str] = {}

    def notes(self) -> list[str]:
        return [
            f"{label}: {why}; its differences are told by whether intervals overlap, which misses small ones"
            for label, why in self._lacking.items()
        ]

    def behind(self, best: int, first: TaskResult, other: int, record: TaskResult) -> Estimate | None:
        """What the other lacks of the best, None where predictions are not at hand."""
        a, b = self._draw(best, first), self._draw(other, record)
        if a is None or b is None:
            return None
        if a.pairs_with(b):
            return _lacking(a.estimate, b.estimate, first.higher_is_better)
        return paired(self._alone(other, record), record, self._alone(best, first), first)  # of the clips that both have

    def average(self, model: int, records: Sequence[TaskResult], shares: Array) -> Estimate | None:
        """A weighted average; None for a model alone, whose result has its interval."""
        if len(self._models) < 2:
            return None
        drawn = [self._draw(model, record) for record in records]
        known = [d.estimate for d in drawn if d is not None]
        return average(shares, known) if len(known) == len(drawn) else None

    def average_behind(
        self, best: int, other: int, records: Sequence[Sequence[TaskResult]], shares: Array
    ) -> Estimate | None:
        pairs = [(self._draw(best, a), self._draw(other, b)) for a, b in zip(records[best], records[other], strict=True)]
        lacking = [
            _lacking(a.estimate, b.estimate, record.higher_is_better)
            for (a, b), record in zip(pairs, records[best], strict=True)
            if a is not None and b is not None and a.pairs_with(b)
        ]
        return average(shares, lacking) if len(lacking) == len(pairs) else None

    def _alone(self, model: int, record: TaskResult) -> Side:
        side = self._models[model].side
        return Side(side.name, msgspec.structs.replace(side.result, tasks=[record]), side.predictions_of)

    def _draw(self, model: int, record: TaskResult) -> _Draw | None:
        name = model, record.task, method_of(record)
        if name not in self._drawn:
            side = self._models[model].side
            try:
                predictions, scorers = verified(side, record)
            except DataMissingError as error:
                self._lacking.setdefault(self._models[model].label, str(error))
                self._drawn[name] = None
            else:
                groups = groups_of_clips(predictions)
                scale: Scale = "share" if record.higher_is_better else "error"
                (estimate,) = estimates([scorers], generator(record.task, name[2]), groups, scale)
                self._drawn[name] = _Draw(clips_of(predictions), groups, estimate)
        return self._drawn[name]


def _missing_notes(models: Sequence[Model]) -> Iterator[str]:
    """Which tasks some models have and others do not: these are in no average."""
    for method in _METHODS:
        scored = [{r.task for r in m.main if method_of(r) == method and r.score is not None} for m in models]
        everything = dict.fromkeys(r.task for m in models for r in m.main if method_of(r) == method and r.score is not None)
        for model, mine in zip(models, scored, strict=True):
            if lacking := [task for task in everything if task not in mine]:
                few = ", ".join(map(printable, lacking[:6])) + (f" and {len(lacking) - 6} more" if len(lacking) > 6 else "")
                yield f"{model.label} has no {method} score of {few}, so the averages here leave out what others have there"


def _published_notes(rows: Sequence[Row]) -> Iterator[str]:
    """What must be known of X-ARES's scores where they are shown."""
    tasks = shipped_tasks()
    for name in dict.fromkeys(row.task for row in rows if row.published and row.task in tasks):
        of_task = tasks[name].published
        if of_task and of_task.note:
            yield f"{name}, published {of_task.note}"
