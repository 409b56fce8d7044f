"""Average precision of any resample of the clips."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .bootstrap import Array, Indices

if TYPE_CHECKING:
    from scipy import sparse


class AveragePrecisionScorer:
    """Macro average precision: the mean over the classes with positives, or over all classes, as X-ARES computes it.

    Average precision is the sum over thresholds of the precision times the recall that the threshold adds. Examples of equal
    score share a threshold, as in scikit-learn's `average_precision_score`.

    Args:
        scores: (seeds, examples, classes); a larger score means that the class is more likely.
        targets: (examples, classes).
        clip_of_example: (examples,) numbers of clips.
        clips: Number of clips.
        present_only: Whether to leave out classes without positives; else these count as 0.
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
            defined = ~np.isnan(precision)
            total[defined, seed] += precision[defined]
            present[defined, seed] += 1
        with np.errstate(invalid="ignore"):
            return total / (present if self._present_only else self._classes)


class _Ranking:
    """The examples of one class by falling score, cut after each threshold that adds a positive."""

    def __init__(
        self, scores: npt.NDArray[np.float32], targets: npt.NDArray[np.bool_], clip_of: Indices, clips: int
    ) -> None:
        order = np.argsort(-scores, kind="stable")
        ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)) + 1  # of each run of equal scores
        hits = np.cumsum(targets[order])[ends - 1]
        ends = ends[np.diff(hits, prepend=0) > 0]
        bounds = np.concatenate([[0], ends])
        order = order[: bounds[-1]]
        # Rows are thresholds, columns clips: the product with clips' weights sums the weights between thresholds.
        self._examples = _rows_of(clip_of[order], bounds, clips)
        positive = targets[order]
        self._positives = _rows_of(clip_of[order][positive], np.concatenate([[0], np.cumsum(positive)[ends - 1]]), clips)

    def average_precision(self, weights: npt.NDArray[np.float32]) -> Array:
        """(n,) from weights of the clips (clips, n); nan if no positive has a weight."""
        positives = (self._positives @ weights).astype(np.float64)
        above, hits = np.cumsum(self._examples @ weights, axis=0, dtype=np.float64), np.cumsum(positives, axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.where(above > 0, hits / above, 0.0)
            result: Array = (positives * precision).sum(axis=0) / hits[-1]
        return result


def _rows_of(columns: Indices, bounds: Indices, width: int) -> sparse.csr_array:
    from scipy import sparse  # needed only for tags

    rows: sparse.csr_array = sparse.csr_array(
        (np.ones(len(columns), np.float32), columns, bounds), shape=(len(bounds) - 1, width)
    )
    return rows
