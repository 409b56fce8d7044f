"""Averages of scores over tasks: ours with intervals, and those of X-ARES's published scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from ..data.catalog import in_group, shipped_tasks
from ..data.task import Task
from ..metrics.intervals import Estimate, average, interval
from .record import GROUPS, Average, Averages, TaskResult


def averages(
    results: Iterable[TaskResult],
    estimates: Mapping[tuple[str, str], Estimate],
    own_tasks: Sequence[Task] = (),
    protocol: str = "corrected",
) -> Averages:
    """Averages by group and method, weighted as the tasks say and plain, over the tasks that have a score.

    `estimates` holds each score with its spread by (task, method): tasks are independent, so an average's interval comes
    from averaging them. A task without a weight, or whose score is not comparable, is in no average. `own_tasks`
    may hold a user's: they make a group `own`, and are in no other, so that the others mean the same for everybody. Under
    the protocol `xares` tasks that X-ARES's runs skip are in none.
    """
    shipped = shipped_tasks()
    tasks = {**shipped, **{task.name: task for task in own_tasks}}
    weight_of = {name: task.weight_under(protocol) for name, task in tasks.items()}
    scored = [r for r in results if r.score is not None and r.comparable and weight_of[r.task] is not None]
    found: Averages = {}
    for group in GROUPS:
        of_group = [t for t in tasks.values() if (in_group(t, group) if t.name in shipped else group == "own")]
        members = [task for task in of_group if weight_of[task.name] is not None]
        names = {task.name for task in members}
        for method in ("head", "knn"):
            mine = [r for r in scored if r.task in names and (r.method == "knn") == (method == "knn")]
            if not mine:
                continue
            weights = np.array([weight_of[r.task] for r in mine], dtype=np.float64)
            scores = np.array([r.score for r in mine], dtype=np.float64)
            total = weights.sum()
            share = weights / total if total else np.full(len(mine), 1 / len(mine))
            drawn = [estimates.get((r.task, r.method)) for r in mine]
            known = [estimate for estimate in drawn if estimate is not None]
            has = {r.task for r in mine}
            missing = [t.name for t in members if t.name not in has and (method == "head" or t.knn)]
            found.setdefault(group, {})[method] = Average(
                weighted=float(share @ scores),
                mean=float(scores.mean()),
                ci95=interval(average(share, known)) if len(known) == len(drawn) else None,
                tasks=len(mine),
                complete=not missing,
                missing=missing,
            )
    return found


def published_averages(results: Iterable[TaskResult], method: Literal["head", "knn"]) -> dict[str, float]:
    """Weighted averages of published scores by encoder, over those of `results` that have a score of the method: of the
    encoders that all of these tasks have a published score of.

    They are computed from the published columns: the averages that X-ARES's README prints under its MLP columns (0.699,
    0.490, 0.632, 0.598 over the public tasks) are not those of the columns and weights (0.694, 0.484, 0.626, 0.593).
    """
    rows = [
        r for r in results if r.score is not None and r.published and r.weight and (r.method == "knn") == (method == "knn")
    ]
    encoders = [name for name in (rows[0].published if rows else {}) if all(name in row.published for row in rows)]
    total = sum(row.weight or 0 for row in rows)
    return {name: sum((row.weight or 0) * row.published[name] for row in rows) / total for name in encoders}
