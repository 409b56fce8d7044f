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
from scipy import sparse

from .threads import one_thread

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


class AveragePrecisionScorer:
    """Macro average precision: over the classes with positives, or over all (X-ARES), where one without positives has 0.

    `scores` (seeds, examples, classes), `targets` (examples, classes) bool, `clip_of_example` (examples,) in 0..clips-1.
    Average precision is the sum over thresholds of precision times the recall that the threshold adds; examples of equal
    score share a threshold (as scikit-learn's average_precision_score).
    """

    def __init__(
        self,
        scores: npt.NDArray[np.float32],
        targets: npt.NDArray[np.bool_],
        clip_of_example: Indices,
        clips: int,
        *,
        present_only: bool,
    ) -> None:
        self.clips = clips
        self._present_only = present_only
        self._classes = targets.shape[1]
        self._seeds = len(scores)
        present = float(targets.any(axis=0).mean())
        self.limits: tuple[float, float] | None = (0.0, 1.0 if present_only else present)
        self._ranked = [
            (seed, _Ranking(scores[seed, :, c], targets[:, c], clip_of_example, clips))
            for c in range(self._classes)
            if targets[:, c].any()
            for seed in range(self._seeds)
        ]

    def __call__(self, counts: Array) -> Array:
        total, present = np.zeros((len(counts), self._seeds)), np.zeros((len(counts), self._seeds))
        weights = np.ascontiguousarray(counts.T, np.float32)
        for seed, ranking in self._ranked:
            precision = ranking.average_precision(weights)
            found = ~np.isnan(precision)
            total[found, seed] += precision[found]
            present[found, seed] += 1
        with np.errstate(invalid="ignore"):
            return total / (present if self._present_only else self._classes)


class _Ranking:
    """One class's examples in the order of falling score, cut after every threshold that adds a positive."""

    def __init__(
        self, scores: npt.NDArray[np.float32], targets: npt.NDArray[np.bool_], clip_of: Indices, clips: int
    ) -> None:
        order = np.argsort(-scores, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)) + 1  # of runs of equal scores
        hits = np.cumsum(targets[order])[ends - 1]
        ends = ends[np.diff(hits, prepend=0) > 0]
        bounds = np.concatenate([[0], ends])
        order = order[: bounds[-1]]
        # Rows are thresholds, columns clips: the product with clips' weights sums the weights between thresholds.
        self._examples = _rows_of(clip_of[order], bounds, clips)
        positive = targets[order]
        self._positives = _rows_of(clip_of[order][positive], np.concatenate([[0], np.cumsum(positive)[ends - 1]]), clips)

    def average_precision(self, weights: npt.NDArray[np.float32]) -> Array:
        """(n,) from the weights of the clips, (clips, n); nan where no positive has a weight."""
        positives = (self._positives @ weights).astype(np.float64)
        above, hits = np.cumsum(self._examples @ weights, axis=0, dtype=np.float64), np.cumsum(positives, axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.where(above > 0, hits / above, 0.0)
            result: Array = (positives * precision).sum(axis=0) / hits[-1]
        return result


def _rows_of(columns: Indices, bounds: Indices, width: int) -> sparse.csr_array:
    rows: sparse.csr_array = sparse.csr_array(
        (np.ones(len(columns), np.float32), columns, bounds), shape=(len(bounds) - 1, width)
    )
    return rows


def per_clip(values: Array, clips: Indices, order: Indices) -> Array:
    """(clips, k) sums over each clip's examples, clips as in `order` (sorted), from values (examples, k) and their clips."""
    statistics = np.zeros((len(order), values.shape[1]))
    np.add.at(statistics, np.searchsorted(order, clips), values)
    return statistics


def accuracy_statistics(right: npt.NDArray[np.bool_], clips: Indices, order: Indices) -> Array:
    """(clips, 2): examples right and examples of each clip in `order`, from each example's outcome and clip."""
    return per_clip(np.stack([right, np.ones(len(right))], axis=1), clips, order)


def ratio(sums: Array) -> Array:
    """(..., 2) sums of (part, whole) to shares (...): accuracy."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def word_accuracy(sums: Array) -> Array:
    """(..., 2) sums of (word errors, words) to max(0, 1 - word error rate) (...)."""
    return np.maximum(0, 1 - ratio(sums))


def recall_both_ways(sums: Array) -> Array:
    """(..., 4) sums of (captions that rank their clip first, captions, clips that rank a caption of theirs first, clips).

    The mean of text-to-audio and audio-to-text recall.
    """
    return (ratio(sums[..., :2]) + ratio(sums[..., 2:])) / 2


def error_statistics(predictions: Array, targets: Array) -> Array:
    """(examples, 8) of numbers: squared error, absolute error, 1, and the moments that a correlation needs."""
    # Moments of large numbers would cancel out. About its median a constant leaves exactly nothing; its mean may be rounded.
    x, y = predictions - np.median(predictions), targets - np.median(targets)
    error = predictions - targets
    return np.stack([error**2, np.abs(error), np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def mean_squared_error(sums: Array) -> Array:
    return sums[..., 0] / sums[..., 2]


def correlation(sums: Array) -> Array:
    """Pearson's correlation from sums of `error_statistics`; nan where either side does not vary."""
    n, x, y, xx, yy, xy = (sums[..., i] for i in (2, 3, 4, 5, 6, 7))
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Array = (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))
    return result


def class_metrics(targets: Indices, predictions: Indices) -> dict[str, float]:
    """Macro F1 and balanced accuracy over the classes that the targets hold."""
    present = np.unique(targets)
    classes = int(max(targets.max(), predictions.max())) + 1
    counts = (
        np.bincount(which, minlength=classes)[present] for which in (targets[targets == predictions], targets, predictions)
    )
    hits, true, claimed = counts
    return {
        "macro_f1": float((2 * hits / (true + claimed)).mean()),
        "balanced_accuracy": float((hits / true).mean()),
    }


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
