"""Scores of one task in steps: tap by tap, or by the number of training clips per class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import foreign
from ..evaluation.record import Interval, Result, TaskResult
from ..evaluation.settings import Method
from ..scoring.mixing import MIX
from .taps import best_tap, mix_weights, ordered_taps


@dataclass(frozen=True)
class Curve:
    """Scores of one model on one task, step by step.

    `steps` are taps from the input to the output, or numbers of training clips per class; `scores` and `ci95` have an entry
    per step. `model` is the index of the result, `best` the index of the best step, if one was chosen, and `best_on_test`
    whether it was chosen on the test clips themselves. `mix` is the record of the mix of the taps, if one was asked for,
    and `weights` those of the steps in it, None for a step that it leaves out; empty if the mix has no score.
    """

    task: str
    title: str
    method: Method
    metric: str
    higher_is_better: bool
    model: int
    steps: tuple[str, ...]
    scores: tuple[float | None, ...]
    ci95: tuple[Interval | None, ...]
    best: int | None = None
    best_on_test: bool = False
    mix: TaskResult | None = None
    weights: tuple[float | None, ...] = ()


def tap_curves(results: Sequence[Result]) -> Iterator[Curve]:
    """A curve per task, method and result with several taps."""
    for number, result in enumerate(results):
        taps = ordered_taps(result)
        if len(taps) < 2:
            continue
        by_task: dict[tuple[str, Method], dict[str, TaskResult]] = {}
        for record in result.tasks:
            by_task.setdefault((record.task, record.family), {})[record.tap or result.encoder.taps[0]] = record
        for (task, method), by_tap in by_task.items():
            records = [by_tap.get(tap) for tap in taps]
            known = [record for record in records if record is not None]
            best = best_tap(known)
            if best is None:
                continue
            mix = by_tap.get(MIX)
            weights = mix_weights(mix)
            yield Curve(
                task=task,
                title=foreign(known[0].title),
                method=method,
                metric=known[0].metric,
                higher_is_better=known[0].higher_is_better,
                model=number,
                steps=tuple(map(foreign, taps)),
                scores=tuple(record.score if record else None for record in records),
                ci95=tuple(record.ci95 if record else None for record in records),
                best=next(i for i, record in enumerate(records) if record is best.record),
                best_on_test=best.on_test,
                mix=mix,
                weights=tuple(weights.get(tap) for tap in taps) if weights else (),
            )


def shot_curves(results: Sequence[Result]) -> Iterator[Curve]:
    """A curve per task and result with scores on few training clips per class; all curves of a task have the same steps."""
    by_task: dict[str, dict[int, TaskResult]] = {}
    for number, result in enumerate(results):
        for record in result.tasks:
            if record.shots and record.tap is None:
                by_task.setdefault(record.task, {})[number] = record
    for task, records in by_task.items():
        counts = sorted({row.clips_per_class for record in records.values() for row in record.shots})
        for number, record in records.items():
            rows = {row.clips_per_class: row for row in record.shots}
            if all(row.score is None for row in rows.values()):
                continue
            by_count = [rows.get(count) for count in counts]
            yield Curve(
                task=task,
                title=foreign(record.title),
                method="head",
                metric=record.metric,
                higher_is_better=record.higher_is_better,
                model=number,
                steps=tuple(map(str, counts)),
                scores=tuple(row.score if row else None for row in by_count),
                ci95=tuple(row.ci95 if row else None for row in by_count),
            )
