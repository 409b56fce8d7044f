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

from ..threads import one_thread

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


def bootstrap(
    scorers: Sequence[Scorer], rng: np.random.Generator, groups: Sequence[Indices] | None = None, resamples: int = RESAMPLES
) -> Array:
    """(2000,) replicates of a score: clips resampled within each fold, the mean over folds, then over seeds.

    If `groups` (clips,) are given by fold, whole groups of clips are resampled: clips of a speaker are right together.

    All seeds of a fold share a resample. Where a metric favours repeated clips (with few positives, average precision may be
    higher in every resample than in the sample), the replicates are moved so that their mean is the score.
    """
    replicates: Array = bootstrap_together([scorers], rng, groups, resamples)[0]
    return replicates


def bootstrap_together(
    models: Sequence[Sequence[Scorer]],
    rng: np.random.Generator,
    groups: Sequence[Indices] | None = None,
    resamples: int = RESAMPLES,
) -> Array:
    """(models, 2000) replicates, as `bootstrap` makes them, of several models' scores of the same clips.

    Every resample serves all models, so that their replicates differ by what the models do and not by what was drawn.
    """
    total = np.zeros((len(models), resamples))
    with one_thread():
        for number, fold in enumerate(zip(*models, strict=True)):
            total += _of_fold(fold, rng, None if groups is None else groups[number], resamples)
    return total / len(models[0])


def _of_fold(fold: Sequence[Scorer], rng: np.random.Generator, groups: Indices | None, resamples: int) -> Array:
    """(models, resamples) replicates of one fold's score."""
    (clips,) = {scorer.clips for scorer in fold}
    names, group_of_clip = (None, None) if groups is None else np.unique(groups, return_inverse=True)
    units = clips if names is None else len(names)
    replicates = np.empty((len(fold), resamples))
    rows = max(1, _DRAWS_AT_ONCE // clips)
    for start in range(0, resamples, rows):
        n = min(rows, resamples - start)
        drawn = rng.integers(0, units, (n, units)) + units * np.arange(n)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=n * units).reshape(n, units).astype(np.float64)
        if group_of_clip is not None:
            counts = counts[:, group_of_clip]
        for of_model, scorer in zip(replicates, fold, strict=True):
            of_model[start : start + n] = scorer(counts).mean(axis=1)
    for of_model, scorer in zip(replicates, fold, strict=True):
        if scorer.limits:
            of_model += scorer(np.ones((1, clips))).mean() - np.nanmean(of_model)
            of_model.clip(*scorer.limits, out=of_model)
    return replicates
