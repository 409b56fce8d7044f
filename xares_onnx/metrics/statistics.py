"""Per-clip statistics whose sums give a score: accuracy, error rates, recall, squared error, correlation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .bootstrap import Array, Indices


def per_clip(values: Array, clips: Indices, order: Indices) -> Array:
    """Sums (clips, k) over the examples of each clip.

    `values` (examples, k) and `clips` (examples,) belong together; `order` (clips,) holds the clips, sorted.
    """
    statistics = np.zeros((len(order), values.shape[1]))
    np.add.at(statistics, np.searchsorted(order, clips), values)
    return statistics


def accuracy_statistics(right: npt.NDArray[np.bool_], clips: Indices, order: Indices) -> Array:
    """(clips, 2): right examples and all examples of each clip in `order`, from each example's outcome and clip."""
    return per_clip(np.stack([right, np.ones(len(right))], axis=1), clips, order)


def ratio(sums: Array) -> Array:
    """Shares (...) from sums (..., 2) of part and whole: accuracy, error rates."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def word_accuracy(sums: Array) -> Array:
    """max(0, 1 - word error rate) (...) from sums (..., 2) of word errors and words."""
    return np.maximum(0, 1 - ratio(sums))


def recall_both_ways(sums: Array) -> Array:
    """The mean (...) of text-to-audio and audio-to-text recall.

    From sums (..., 4) of captions that rank their clip first, captions, clips that rank one of their captions first, and
    clips.
    """
    return (ratio(sums[..., :2]) + ratio(sums[..., 2:])) / 2


def error_statistics(predictions: Array, targets: Array) -> Array:
    """(examples, 8): squared error, absolute error, 1, and the moments that a correlation needs."""
    # About the median, moments of large numbers do not cancel out, and a constant becomes exactly 0; a mean may be rounded.
    x, y = predictions - np.median(predictions), targets - np.median(targets)
    error = predictions - targets
    return np.stack([error**2, np.abs(error), np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def mean_squared_error(sums: Array) -> Array:
    return sums[..., 0] / sums[..., 2]


def correlation(sums: Array) -> Array:
    """Pearson's correlation (...) from sums of `error_statistics` (..., 8); nan if either side does not vary."""
    # Not scipy's pearsonr: it differs in the last digits that results record, and warns of a side that does not vary.
    n, x, y, xx, yy, xy = (sums[..., i] for i in (2, 3, 4, 5, 6, 7))
    with np.errstate(invalid="ignore", divide="ignore"):
        coefficient: Array = (n * xy - x * y) / np.sqrt((n * xx - x * x) * (n * yy - y * y))
    return coefficient


def class_metrics(targets: Indices, predictions: Indices) -> dict[str, float]:
    """Macro F1 and balanced accuracy of (examples,) class numbers, over the classes that the targets hold."""
    from sklearn.metrics import precision_recall_fscore_support  # a second to import, needed only for classes

    present = np.unique(targets)
    _, recall, f1, _ = precision_recall_fscore_support(
        targets, predictions, labels=present, average="macro", zero_division=0
    )
    return {"macro_f1": float(f1), "balanced_accuracy": float(recall)}
