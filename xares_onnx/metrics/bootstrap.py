"""The bootstrap of any metric.

The score of a fold is a function of how often each of its test clips counts: once for the score itself, and as often as
drawn for a bootstrap resample. Most metrics are functions of sums of per-clip statistics (`SumScorer`). For accuracy these
are (examples right, examples); an example is a clip, or a crop under `--protocol xares`. Average precision ranks examples,
so it has a scorer of its own.
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
_WEIGHTS_TRIED = 8


class Scorer(Protocol):
    """The score of one fold's `clips` test clips, for every seed.

    `limits` is None for most metrics. A metric that ranks favours repeated clips, since a clip ranks well beside its own
    copies; for such a metric `limits` holds the least and the greatest score that these clips can have.
    """

    clips: int
    limits: tuple[float, float] | None

    def __call__(self, counts: Array) -> Array:
        """Scores (n, seeds) from how often each clip counts (n, clips)."""


class SumScorer:
    """A score that `from_sums` computes from sums of per-clip statistics (seeds, clips, k): (..., k) to (...)."""

    limits: tuple[float, float] | None = None

    def __init__(self, statistics: Array, from_sums: FromSums) -> None:
        seeds, self.clips, k = statistics.shape
        self._shape = seeds, k
        self._flat = statistics.transpose(1, 0, 2).reshape(self.clips, seeds * k).astype(np.float64)
        self._from_sums = from_sums

    def __call__(self, counts: Array) -> Array:
        return self._from_sums((counts @ self._flat).reshape(len(counts), *self._shape))


def point(scorers: Sequence[Scorer]) -> Array:
    """The scores themselves (folds, seeds), with every clip counted once."""
    return np.stack([scorer(np.ones((1, scorer.clips)))[0] for scorer in scorers])


def scored_alike(a: Sequence[Scorer], b: Sequence[Scorer], rng: np.random.Generator) -> bool:
    """Whether two models, given by their scorers by fold, score every clip alike with every seed.

    Then their scores are equal however much each clip counts. Equal means over seeds are no sign of it: one seed may lose
    what another wins.

    Args:
        a: One model's scorers.
        b: The other's, of the same clips.
        rng: Source of the weights that are tried; equality under a few of them by chance has the probability 0.
    """
    with one_thread():
        for scorer, other in zip(a, b, strict=True):
            weights = rng.exponential(size=(_WEIGHTS_TRIED, scorer.clips))
            if not np.array_equal(scorer(weights), other(weights), equal_nan=True):
                return False
    return True


def bootstrap(
    scorers: Sequence[Scorer], rng: np.random.Generator, groups: Sequence[Indices] | None = None, resamples: int = RESAMPLES
) -> Array:
    """Replicates of a score: the mean over folds and seeds, of clips resampled within each fold.

    All seeds of a fold share a resample. If a metric favours repeated clips, its replicates are shifted so that their mean
    is the score: with few positives, average precision may be higher in every resample than in the sample.

    Args:
        scorers: One per fold.
        rng: Source of the random draws.
        groups: For each fold, the group (clips,) of each clip; then whole groups are resampled, since clips of one speaker
            tend to be right together.
        resamples: Number of replicates.

    Returns:
        Replicates (resamples,).
    """
    replicates: Array = bootstrap_together([scorers], rng, groups, resamples)[0]
    return replicates


def bootstrap_together(
    models: Sequence[Sequence[Scorer]],
    rng: np.random.Generator,
    groups: Sequence[Indices] | None = None,
    resamples: int = RESAMPLES,
) -> Array:
    """Replicates (models, resamples) of several models' scores of the same clips, as `bootstrap` makes them.

    Every resample serves all models, so their replicates differ by the models alone and not by the draw. `models` holds each
    model's scorers by fold.
    """
    total = np.zeros((len(models), resamples))
    with one_thread():
        for number, fold in enumerate(zip(*models, strict=True)):
            total += _fold_replicates(fold, rng, None if groups is None else groups[number], resamples)
    return total / len(models[0])


def _fold_replicates(fold: Sequence[Scorer], rng: np.random.Generator, groups: Indices | None, resamples: int) -> Array:
    """Replicates (models, resamples) of one fold's score."""
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
        for row, scorer in zip(replicates, fold, strict=True):
            row[start : start + n] = scorer(counts).mean(axis=1)
    for row, scorer in zip(replicates, fold, strict=True):
        if scorer.limits:
            row += scorer(np.ones((1, clips))).mean() - np.nanmean(row)
            row.clip(*scorer.limits, out=row)
    return replicates
