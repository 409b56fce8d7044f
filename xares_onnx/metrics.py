"""Metrics, and the bootstrap interval of any of them.

A metric is a function of sums of per-clip statistics, so that one resampling routine serves all. Accuracy's statistics are
(examples right, examples): an example is a clip, or a crop under `--protocol xares`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
FromSums = Callable[[Array], Array]

RESAMPLES = 2000
LEVEL = 0.95
_DRAWS_AT_ONCE = 1 << 22


def accuracy_statistics(right: npt.NDArray[np.bool_], clips: Indices, order: Indices) -> Array:
    """(clips, 2): examples right and examples of each clip in `order`, from each example's outcome and clip."""
    position = np.searchsorted(order, clips)
    statistics = np.zeros((len(order), 2))
    np.add.at(statistics[:, 0], position, right)
    np.add.at(statistics[:, 1], position, 1)
    return statistics


def accuracy(sums: Array) -> Array:
    """(..., 2) sums of statistics to accuracies (...)."""
    return sums[..., 0] / sums[..., 1]


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


def bootstrap(statistics: Sequence[Array], from_sums: FromSums, rng: np.random.Generator) -> Array:
    """(2000,) replicates of a score: clips resampled within each fold, the mean over folds, then over seeds.

    `statistics` holds one array (seeds, clips, k) a fold; all seeds of a fold share a resample.
    """
    total = np.zeros(RESAMPLES)
    for fold in statistics:
        seeds, clips, k = fold.shape
        flat = fold.transpose(1, 0, 2).reshape(clips, seeds * k)
        rows = max(1, _DRAWS_AT_ONCE // clips)
        for start in range(0, RESAMPLES, rows):
            n = min(rows, RESAMPLES - start)
            drawn = rng.integers(0, clips, (n, clips)) + clips * np.arange(n)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=n * clips).reshape(n, clips)
            sums = (counts @ flat).reshape(n, seeds, k)
            total[start : start + n] += from_sums(sums).mean(axis=1)
    return total / len(statistics)


def interval(replicates: Array) -> tuple[float, float]:
    """The central 95 % of bootstrap replicates (percentile method)."""
    low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
