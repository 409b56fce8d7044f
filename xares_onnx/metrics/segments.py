"""Events in time to active frames, and active frames to the segments that are scored.

There are two ways. On the clock, the default: a frame is an instant and a segment an interval, so neither the number of
segments nor their targets depend on the encoder. X-ARES's way counts in frames (`xares_…`).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..data.sound_events import TOLERANCE_SECONDS, Events, Floats, Indices

Bools = npt.NDArray[np.bool_]
Average = Literal["macro", "micro"]


# ---------------------------------------------------------------- on the clock


def frame_targets(events: Events, times: Floats, classes: int) -> Bools:
    """(frames, classes): a frame is active where an event covers its centre, onset <= time < offset.

    `times` (frames,) are the centres in seconds, ascending, at least one. An event that covers no centre marks the frame
    whose centre is nearest to its middle (the earlier of two). So leave out events beyond the clip first, by
    `Events.within`.
    """
    starts, stops = (np.searchsorted(times + TOLERANCE_SECONDS, instants) for instants in (events.onsets, events.offsets))
    nearest = _nearest(times, (events.onsets + events.offsets) / 2)
    missed = starts == stops
    return _painted(len(times), classes, np.where(missed, nearest, starts), np.where(missed, nearest + 1, stops), events)


def segment_count(seconds: float, segment_seconds: float) -> int:
    """Number of segments of a clip, at least one; a short last one counts unless it is 1 us or less, which is rounding."""
    return max(1, int(np.ceil((seconds - TOLERANCE_SECONDS) / segment_seconds)))


def segment_targets(events: Events, seconds: float, segment_seconds: float, classes: int) -> Bools:
    """(segments, classes): a segment is active if an event overlaps it by more than 1 us.

    Segment k is [k L, (k+1) L), cut off at the clip's end. An event without such an overlap counts for the segment in which
    it begins.
    """
    events = events.within(seconds)
    count = segment_count(seconds, segment_seconds)
    starts = _segment_of(events.onsets, segment_seconds, count)
    stops = np.ceil((events.offsets - TOLERANCE_SECONDS) / segment_seconds).astype(np.int64)
    return _painted(count, classes, starts, np.maximum(stops, starts + 1), events)


def segment_predictions(active: Bools, times: Floats, seconds: float, segment_seconds: float) -> Bools:
    """(segments, classes): a segment is active if a frame is whose centre lies in it.

    `active` (frames, classes), `times` as for `frame_targets`. A segment without a centre takes the frame whose centre is
    nearest to its middle, so a hop may be longer than a segment. A centre past the clip's end counts for the last segment.
    """
    count = segment_count(seconds, segment_seconds)
    # The first frame of each segment, and the end: the frames of segment k are bounds[k] .. bounds[k + 1].
    bounds = np.searchsorted(_segment_of(times, segment_seconds, count), np.arange(count + 1))
    filled = np.flatnonzero(bounds[:-1] < bounds[1:])
    segments = np.empty((count, active.shape[1]), np.bool_)
    segments[filled] = np.logical_or.reduceat(active, bounds[filled], axis=0)
    empty = np.flatnonzero(bounds[:-1] == bounds[1:])
    # A short last segment has another middle; but if it is empty, the last frame is nearest to either.
    segments[empty] = active[_nearest(times, (empty.astype(np.float64) + 0.5) * segment_seconds)]
    return segments


def _segment_of(instants: Floats, segment_seconds: float, count: int) -> Indices:
    """The tolerance keeps an instant on a boundary out of the segment that ends there: 0.3 s / 0.1 s is less than 3."""
    return np.floor((instants + TOLERANCE_SECONDS) / segment_seconds).astype(np.int64).clip(0, count - 1)


def _nearest(times: Floats, instants: Floats) -> Indices:
    """Indices of the times nearest to each instant, the earlier of two."""
    return np.searchsorted((times[:-1] + times[1:]) / 2, instants)


def _painted(rows: int, classes: int, starts: Indices, stops: Indices, events: Events) -> Bools:
    """(rows, classes), true from each event's start to its stop."""
    painted = np.zeros((rows, classes), np.bool_)
    for start, stop, number in zip(starts.tolist(), stops.tolist(), events.classes.tolist(), strict=True):
        painted[start:stop, number] = True
    return painted


# ---------------------------------------------------------------- X-ARES


def xares_frame_targets(events: Events, frames: int, hop_seconds: float, classes: int) -> Bools:
    """(frames, classes): an event covers the frames ceil(onset / hop) to ceil(offset / hop), exclusive.

    An event between two multiples of the hop is lost, as in X-ARES.
    """
    starts, stops = (
        np.ceil(instants / hop_seconds).astype(np.int64).clip(0, frames) for instants in (events.onsets, events.offsets)
    )
    return _painted(frames, classes, starts, stops, events)


def xares_segments(active: Bools, hop_seconds: float, segment_seconds: float) -> Bools:
    """(segments, classes): whether any of its ceil(segment / hop) frames is active. `active` is (frames, classes).

    Frames after the last whole segment are dropped.
    """
    width = int(np.ceil(segment_seconds / hop_seconds))
    count = len(active) // width
    return np.asarray(active[: count * width].reshape(count, width, active.shape[1]).any(axis=1))


# ---------------------------------------------------------------- the score


def segment_counts(targets: Bools, predictions: Bools) -> Indices:
    """(classes, 3): true positives, false positives and false negatives. Both arguments are (segments, classes)."""
    columns = (targets & predictions, ~targets & predictions, targets & ~predictions)
    return np.stack([column.sum(axis=0, dtype=np.int64) for column in columns], axis=1)


def segment_f1(counts: npt.NDArray[Any], average: Average, *, present_only: bool) -> Floats:
    """F1 = 2 TP / (2 TP + FP + FN) from counts (..., classes, 3), to (...): the mean over classes (macro) or pooled (micro).

    F1 is 0 without positives and predictions, as with scikit-learn's `zero_division=0`. With `present_only` the macro mean
    is over the classes that have positives, and either average is nan if no class has one.
    """
    present = counts[..., 0] + counts[..., 2] > 0
    if average == "micro":
        counts = counts.sum(axis=-2, keepdims=True)
        present = present.any(axis=-1, keepdims=True)
    hits, claimed, missed = np.moveaxis(counts.astype(np.float64), -1, 0)
    total = 2 * hits + claimed + missed
    f1 = np.divide(2 * hits, total, out=np.zeros_like(total), where=total > 0)
    weight = present.astype(np.float64) if present_only else np.ones_like(f1)
    with np.errstate(invalid="ignore"):
        mean: Floats = np.asarray((f1 * weight).sum(axis=-1) / weight.sum(axis=-1))
    return mean
