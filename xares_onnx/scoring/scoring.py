"""Outcomes to a score: the kept predictions, their score, its spread over folds and seeds, its interval.

A score is a function of the kept predictions alone, so the predictions stored beside a result can be scored again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.task import Metric
from ..errors import ScoreUndefinedError
from ..metrics.bootstrap import Indices, Scorer, point
from ..metrics.intervals import Estimate, Scale, estimates, interval
from ..probes.tuning import Tuning, pooled
from .kinds import Kept, Kind, Outcome, kind_scored_by
from .protocol import Protocol


@dataclass(frozen=True)
class Scored:
    """A method's score on a task, and everything that goes into its record."""

    score: float
    ci95: tuple[float, float] | None
    metrics: dict[str, float]
    per_fold: list[float]
    per_seed: list[float]
    n_test: int
    estimate: Estimate
    test_groups: int | None  # that are resampled whole; None if clips are
    predictions: Predictions  # one row per example and seed
    tuning: Tuning | None  # pooled over the heads of all folds and seeds; None for a kNN


def score(kind: Kind, method: str, outcomes: Sequence[Outcome]) -> Scored:
    """Score a method: the mean over folds, then over seeds.

    Args:
        kind: The task with its data and folds.
        method: Names the generator of the interval.
        outcomes: One per fold and seed.

    Returns:
        The score, with an interval that resamples test clips, or groups of them, within folds.

    Raises:
        ScoreUndefinedError: A fold has no score.
    """
    by_fold = [[outcome for outcome in outcomes if outcome.fold == number] for number in range(len(kind.folds))]
    predictions = _predictions(kind, by_fold)
    scorers = scorers_of(predictions, kind.task.score.metric, kind.protocol)
    scores = point(scorers)  # (folds, seeds)
    if not np.isfinite(scores).all():
        raise ScoreUndefinedError(f"the {kind.task.score.metric} of its test clips is not defined")
    groups = groups_of_clips(predictions)
    scale: Scale = "share" if kind.task.score.higher_is_better else "error"
    (estimate,) = estimates([scorers], generator(kind.task.name, method), groups, scale)
    more = [kind.more(fold, of_fold) for fold, of_fold in zip(kind.folds, by_fold, strict=True)]
    metrics = {key: float(np.mean([values[key] for values in more])) for key in more[0]}
    return Scored(
        score=float(scores.mean()),
        ci95=interval(estimate),
        metrics={key: value for key, value in metrics.items() if math.isfinite(value)},
        per_fold=[float(value) for value in scores.mean(axis=1)],
        per_seed=[float(value) for value in scores.mean(axis=0)],
        n_test=int(sum(len(fold.test) for fold in kind.folds)),
        estimate=estimate,
        test_groups=None if groups is None else sum(len(np.unique(fold_groups)) for fold_groups in groups),
        predictions=predictions,
        tuning=pooled(tunings) if len(tunings := [o.tuning for o in outcomes if o.tuning is not None]) else None,
    )


def below_neighbours(kind: Kind, head: Predictions, knn: Predictions) -> str | None:
    """A note on a head that scores worse than the kNN on the same test clips, by more than chance; None for others."""
    clips, metric = clips_of(head), kind.task.score.metric
    scorers = [scorers_of(predictions, metric, kind.protocol, clips) for predictions in (knn, head)]
    nearest, trained = estimates(scorers, generator(kind.task.name, "head"), groups_of_clips(head))
    ci95 = interval(nearest.minus(trained))
    if ci95 is None or ci95[0] <= 0:
        return None
    return (
        f"the head scores {nearest.score - trained.score:.3f} (95 %: {ci95[0]:.3f} to {ci95[1]:.3f}) below the kNN on the "
        "same clips, so these embeddings hold more than a linear head tells"
    )


def generator(task: str, method: str) -> np.random.Generator:
    """The generator that resamples the clips of a task and method: seeded by their names alone, so tasks are independent."""
    return np.random.default_rng(list(hashlib.sha256(f"{task}/{method}".encode()).digest()))


def clips_of(predictions: Predictions) -> dict[str, list[str]]:
    """Keys of the test clips by fold, each once, in the order of the predictions."""
    keys_of_fold: dict[str, dict[str, None]] = {}
    for fold, key in zip(predictions["fold"].tolist(), predictions["key"].tolist(), strict=True):
        keys_of_fold.setdefault(fold, {})[key] = None
    return {fold: list(keys) for fold, keys in keys_of_fold.items()}


def groups_of_clips(predictions: Predictions, clips: Mapping[str, Sequence[str]] | None = None) -> list[Indices] | None:
    """The group of each test clip, a number, as an array (clips,) per fold.

    Args:
        predictions: As `score` keeps them.
        clips: Keys by fold, if not all clips are meant.

    Returns:
        None if no groups were kept, or if a fold has fewer than two: these cannot show how groups differ.
    """
    if "group" not in predictions:
        return None
    rows = zip(*(predictions[name].tolist() for name in ("fold", "key", "group")), strict=True)
    named = {(fold, key): group for fold, key, group in rows}
    by_fold = [
        np.unique([named[fold, key] for key in keys], return_inverse=True)[1].astype(np.int64)
        for fold, keys in (clips_of(predictions) if clips is None else clips).items()
    ]
    return by_fold if all(groups.max(initial=0) >= 1 for groups in by_fold) else None


def scorers_of(
    predictions: Predictions, metric: Metric, protocol: Protocol, clips: Mapping[str, Sequence[str]] | None = None
) -> list[Scorer]:
    """The scorer of every fold, from kept predictions.

    Args:
        predictions: As `score` keeps them.
        metric: Metric of the task.
        protocol: Protocol of the run.
        clips: Keys by fold of the clips to score, in this order; all clips by default.

    Raises:
        KeyError, ValueError, TypeError, IndexError: The arrays do not belong to the metric.
    """
    kind = kind_scored_by(metric)
    columns = {name: array for name, array in predictions.items() if name not in ("key", "fold", "seed", "group")}
    scorers = []
    for fold, keys in (clips_of(predictions) if clips is None else clips).items():
        positions = {key: position for position, key in enumerate(keys)}
        of_fold = np.flatnonzero(predictions["fold"] == fold)
        clip = np.array([positions.get(key, -1) for key in predictions["key"][of_fold].tolist()], np.int64)
        seeds = []
        for seed in sorted(set(predictions["seed"][of_fold].tolist())):
            of_seed = (predictions["seed"][of_fold] == seed) & (clip >= 0)
            rows = of_fold[of_seed]
            seeds.append(Kept({name: array[rows] for name, array in columns.items()}, clip[of_seed]))
        if any(not np.array_equal(seed.clip_of_example, seeds[0].clip_of_example) for seed in seeds):
            raise ValueError(f"the seeds of fold {fold} are of different clips")
        scorers.append(kind.scorer(seeds, len(keys), metric, protocol))
    return scorers


def _predictions(kind: Kind, by_fold: Sequence[Sequence[Outcome]]) -> Predictions:
    keys = np.array(kind.dataset.keys)
    groups = None if kind.dataset.groups is None else np.array(kind.dataset.groups)
    rows = []
    for fold, outcomes in zip(kind.folds, by_fold, strict=True):
        for outcome in outcomes:
            n = len(outcome.examples)
            clips = kind.clips_of(outcome.examples)
            identity = {
                "key": keys[clips],
                "fold": np.array([fold.name] * n),
                "seed": np.full(n, outcome.seed),
                **({} if groups is None else {"group": groups[clips]}),
            }
            rows.append({**identity, **kind.columns(outcome)})
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


Predictions = dict[str, npt.NDArray[Any]]
