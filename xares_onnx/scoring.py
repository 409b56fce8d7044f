"""Outcomes to a score: the score itself, its spread over folds and seeds, its interval, and what is kept of each clip."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import ScoreUndefinedError
from .kinds import Kind, Outcome
from .metrics import Array, bootstrap, interval, point


@dataclass(frozen=True)
class Scored:
    score: float
    ci95: tuple[float, float] | None
    metrics: dict[str, float]
    per_fold: list[float]
    per_seed: list[float]
    n_test: int
    replicates: Array  # (2000,) bootstrap scores
    predictions: dict[str, npt.NDArray[Any]]  # one row an example and seed


def score(kind: Kind, method: str, outcomes: Sequence[Outcome]) -> Scored:
    """Mean over folds, then over seeds; the interval resamples test clips within folds, the same for every seed.

    Raises `ScoreUndefinedError` where a fold has no score.
    """
    by_fold = [[outcome for outcome in outcomes if outcome.fold == number] for number in range(len(kind.folds))]
    scorers = [kind.scorer(fold, mine) for fold, mine in zip(kind.folds, by_fold, strict=True)]
    scores = point(scorers)  # (folds, seeds)
    if not np.isfinite(scores).all():
        raise ScoreUndefinedError(f"the {kind.task.score.metric} of its test clips is not defined")
    # The task and the method name the generator, so that a task's interval depends on no other task.
    name = hashlib.sha256(f"{kind.task.name}/{method}".encode()).digest()
    replicates = bootstrap(scorers, np.random.default_rng(list(name)))
    more = [kind.more(fold, mine) for fold, mine in zip(kind.folds, by_fold, strict=True)]
    metrics = {key: float(np.mean([values[key] for values in more])) for key in more[0]}
    return Scored(
        score=float(scores.mean()),
        ci95=interval(replicates),
        metrics={key: value for key, value in metrics.items() if math.isfinite(value)},
        per_fold=[float(value) for value in scores.mean(axis=1)],
        per_seed=[float(value) for value in scores.mean(axis=0)],
        n_test=int(sum(len(fold.test) for fold in kind.folds)),
        replicates=replicates,
        predictions=_predictions(kind, by_fold),
    )


def _predictions(kind: Kind, by_fold: Sequence[Sequence[Outcome]]) -> dict[str, npt.NDArray[Any]]:
    keys = np.array(kind.dataset.keys)
    rows = []
    for fold, outcomes in zip(kind.folds, by_fold, strict=True):
        for outcome in outcomes:
            n = len(outcome.examples)
            about = {
                "key": keys[kind.clips_of(outcome.examples)],
                "fold": np.array([fold.name] * n),
                "seed": np.full(n, outcome.seed),
            }
            rows.append({**about, **kind.columns(outcome)})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
