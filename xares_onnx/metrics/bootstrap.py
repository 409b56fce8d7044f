"""Metrics, and the bootstrap interval of any of them.

A score of one fold is a function of how often each of its test clips counts: once each for the score itself, as drawn for a
bootstrap resample. Most metrics are functions of sums of per-clip statistics (`SumScorer`): accuracy's are (examples right,
examples), where an example is a clip, or a crop under `--protocol xares`. Average precision ranks, so it has a scorer of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
FromSums = Callable[[Array], Array]

RESAMPLES = 2000
LEVEL = 0.95
_DRAWS_AT_ONCE = 1 << 22


class Scorer(Protocol):
    """The score of one fold's `clips` test clips, for every seed.

    `limits` is None, except where a metric favours repeated clips: a clip ranked beside its own copies ranks too well. Then
    it is the least and the greatest score that these clips can have.
    """

    clips: int
    limits: tuple[float, float] | None

    def __call__(self, counts: Array) -> Array:
        """How often each clip counts, (n, clips), to scores (n, seeds)."""


class SumScorer:
    """A score that is a function of the sums of per-clip statistics (seeds, clips, k)."""

    limits: tuple[float, float] | None = None

    def __init__(self, statistics: Array, from_sums: FromSums) -> None:
        seeds, self.clips, k = statistics.shape
        self._shape = seeds, k
        self._flat = statistics.transpose(1, 0, 2).reshape(self.clips, seeds * k).astype(np.float64)
        self._from_sums = from_sums

    def __call__(self, counts: Array) -> Array:
        return self._from_sums((counts @ self._flat).reshape(len(counts), *self._shape))


def point(scorers: Sequence[Scorer]) -> Array:
    """(folds, seeds): the scores themselves, every clip counted once."""
    return np.stack([scorer(np.ones((1, scorer.clips)))[0] for scorer in scorers])


def bootstrap(scorers: Sequence[Scorer], rng: np.random.Generator) -> Array:
    """(2000,) replicates of a score: clips resampled within each fold, the mean over folds, then over seeds.

    All seeds of a fold share a resample. Where a metric favours repeated clips (with few positives, average precision may be
    higher in every resample than in the sample), the replicates are moved so that their mean is the score.
    """
    replicates: Array = bootstrap_together([scorers], rng)[0]
    return replicates


def bootstrap_together(models: Sequence[Sequence[Scorer]], rng: np.random.Generator) -> Array:
    """(models, 2000) replicates, as `bootstrap` makes them, of several models' scores of the same clips.

    Every resample serves all models, so that their replicates differ by what the models do and not by what was drawn.
    """
    total = np.zeros((len(models), RESAMPLES))
    for fold in zip(*models, strict=True):
        (clips,) = {scorer.clips for scorer in fold}
        rows = max(1, _DRAWS_AT_ONCE // clips)
        replicates = np.empty((len(models), RESAMPLES))
        for start in range(0, RESAMPLES, rows):
            n = min(rows, RESAMPLES - start)
            drawn = rng.integers(0, clips, (n, clips)) + clips * np.arange(n)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=n * clips).reshape(n, clips).astype(np.float64)
            for mine, scorer in zip(replicates, fold, strict=True):
                mine[start : start + n] = scorer(counts).mean(axis=1)
        for mine, scorer in zip(replicates, fold, strict=True):
            if scorer.limits:
                mine += scorer(np.ones((1, clips))).mean() - np.nanmean(mine)
                mine.clip(*scorer.limits, out=mine)
        total += replicates
    return total / len(models[0])


def interval(replicates: Array) -> tuple[float, float] | None:
    """The central 95 % of bootstrap replicates (percentile method), of those that are defined; None where most are not."""
    defined = replicates[np.isfinite(replicates)]
    if 2 * len(defined) < len(replicates):
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
