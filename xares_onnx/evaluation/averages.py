"""Averages of scores over tasks: of our scores, with intervals, and of X-ARES's published scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ..data.catalog import in_group, shipped_tasks
from ..data.task import Task
from ..metrics.bootstrap import Array
from ..metrics.intervals import Estimate, average, interval
from .record import GROUPS, Average, Averages, TaskResult
from .settings import METHODS, Method


def averages(
    results: Iterable[TaskResult],
    estimates: Mapping[tuple[str, str], Estimate],
    own_tasks: Sequence[Task] = (),
    protocol: str = "corrected",
) -> Averages:
    """Weighted and plain averages by group and method, over the tasks that have a comparable score and a weight.

    A user's own tasks form the group `own` and enter no other, so that the other groups mean the same for everybody. Under
    the protocol `xares`, the tasks that X-ARES's runs skip enter none.

    Args:
        results: Records of one tap.
        estimates: Each score with its spread, by (task, method). Tasks are independent, so an average's interval comes from
            averaging these.
        own_tasks: Tasks that may not be shipped ones.
        protocol: Whose weights apply.

    Returns:
        Averages by group and method, without empty ones.
    """
    shipped = shipped_tasks()
    tasks = {**shipped, **{task.name: task for task in own_tasks}}
    weight_of = {name: task.weight_under(protocol) for name, task in tasks.items()}
    scored = [r for r in results if r.score is not None and r.comparable and weight_of[r.task] is not None]
    by_group: Averages = {}
    for group in GROUPS:
        of_group = [t for t in tasks.values() if (in_group(t, group) if t.name in shipped else group == "own")]
        members = [task for task in of_group if weight_of[task.name] is not None]
        names = {task.name for task in members}
        for method in METHODS:
            records = [r for r in scored if r.task in names and r.family == method]
            if not records:
                continue
            shares = weight_shares([weight_of[r.task] for r in records])
            scores = np.array([r.score for r in records], dtype=np.float64)
            drawn = [estimates.get((r.task, r.method)) for r in records]
            known = [estimate for estimate in drawn if estimate is not None]
            scored_tasks = {r.task for r in records}
            missing = [t.name for t in members if t.name not in scored_tasks and (method == "head" or t.knn)]
            by_group.setdefault(group, {})[method] = Average(
                weighted=float(shares @ scores),
                mean=float(scores.mean()),
                ci95=interval(average(shares, known)) if len(known) == len(drawn) else None,
                tasks=len(records),
                complete=not missing,
                missing=missing,
            )
    return by_group


def weight_shares(weights: Sequence[float | None]) -> Array:
    """Each task's share of an average (tasks,): in proportion to its weight, or equal if all weights are 0.

    Shares add up to 1, so `shares @ scores` is the weighted average.
    """
    values = np.array(weights, np.float64)
    total = values.sum()
    shares: Array = values / total if total > 0 else np.full(len(values), 1 / len(values))
    return shares


def published_averages(results: Iterable[TaskResult], method: Method) -> dict[str, float]:
    """Weighted averages of published scores, over the results that have a score by the method.

    They hold the encoders with a published score of each of these tasks. They come from the published columns: the averages
    that X-ARES's README prints under its MLP columns (0.699, 0.490, 0.632, 0.598 over the public tasks) do not follow from
    the columns and weights, which give 0.694, 0.484, 0.626, 0.593.
    """
    rows = [r for r in results if r.score is not None and r.published and r.weight and r.family == method]
    encoders = [name for name in (rows[0].published if rows else {}) if all(name in row.published for row in rows)]
    if not rows:
        return {}
    shares = weight_shares([row.weight for row in rows])
    return {name: float(shares @ [row.published[name] for row in rows]) for name in encoders}
