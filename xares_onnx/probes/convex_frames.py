"""Convex heads on frames: as `convex`, with a decision threshold that the selection clips choose too.

Frames are read anew in every pass, block by block, so they may be mapped from a file and memory does not grow with the hours
of audio. They are standardised by the mean and deviation of the training frames. Every strength has the threshold with its
best F1 over segments of the selection clips; the strength with the best of those wins (of equal ones the lower log loss per
frame, then the stronger), and with it the head is fitted anew on training and held-out clips and decides at its threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.special import expit

from ..data.sound_events import Events, Floats
from ..metrics import segments
from ..metrics.segments import Average, Bools
from ..models.standardised import Head, Pool, pool_of, rows_at_once
from .convex import LEAST_PROBABILITY, ConvexResult, Fit, FoldRows, OneAgainstTheRest, Tried, better, over_folds, undefined
from .mix import MixedFits
from .training import Indices
from .tuning import Tuning

THRESHOLDS = tuple(step / 20 for step in range(1, 20))
WITHOUT_SELECTION = 0.5


@dataclass(frozen=True)
class Clips:
    """The clips of a task, with events of so many `classes`.

    Per clip: `frames` (frames, dim) float16 or float32, at least one; `times` (frames,) their centres in seconds, ascending;
    its duration in `seconds`; its `events`.
    """

    frames: Sequence[npt.NDArray[Any]]
    times: Sequence[Floats]
    seconds: Sequence[float]
    events: Sequence[Events]
    classes: int

    def targets(self, clip: int) -> Bools:
        """(frames, classes)."""
        return segments.frame_targets(self.events[clip].within(self.seconds[clip]), self.times[clip], self.classes)


class FrameRows:
    """The frames of some clips one after another, as `standardised.Rows`; a block may begin and end within a clip."""

    def __init__(self, clips: Clips, chosen: Indices) -> None:
        lengths = np.array([len(clips.frames[clip]) for clip in chosen], np.int64)
        self.count, self.dim = int(lengths.sum()), clips.frames[0].shape[1]
        self._rows_at_once = rows_at_once(self.dim)
        self.blocks = -(-self.count // self._rows_at_once)
        self._clips, self._chosen = clips, chosen
        self._bounds = np.append(0, np.cumsum(lengths))

    def _pieces(self, number: int) -> list[tuple[int, slice]]:
        start, stop = number * self._rows_at_once, min((number + 1) * self._rows_at_once, self.count)
        first, last = np.searchsorted(self._bounds, [start, stop], side="right") - 1
        pieces = []
        for position in range(int(first), min(int(last), len(self._chosen) - 1) + 1):
            offset = int(self._bounds[position])
            rows = slice(max(start - offset, 0), min(stop, int(self._bounds[position + 1])) - offset)
            if rows.start < rows.stop:
                pieces.append((int(self._chosen[position]), rows))
        return pieces

    def block(self, number: int) -> npt.NDArray[np.float32]:
        return np.concatenate([self._clips.frames[clip][rows].astype(np.float32) for clip, rows in self._pieces(number)])

    def targets(self, number: int) -> Bools:
        return np.concatenate([self._clips.targets(clip)[rows] for clip, rows in self._pieces(number)])


@dataclass(frozen=True)
class EventsResult(ConvexResult):
    """`predictions` are `segments.segment_counts` of each test clip, (clips, classes, 3) int64, at the `threshold`."""

    threshold: float = WITHOUT_SELECTION

    @property
    def tuning(self) -> Tuning:
        return msgspec.structs.replace(super().tuning, thresholds=[self.threshold])


def fit_frames(
    clips: Clips,
    rows: FoldRows,
    positive_weight: float,
    *,
    segment_seconds: float,
    average: Average,
    layers: Sequence[str] = (),
    fold: int = 0,
    threads: int = 1,
    device: str | None = None,
    on_fit: Callable[[], None] = lambda: None,
) -> EventsResult:
    """Choose strength and threshold, fit, and predict the test clips of one fold.

    Args:
        clips: Of the task.
        rows: Clip numbers of the fold.
        positive_weight: How many times a positive counts in the loss.
        segment_seconds: Length of a segment.
        average: Of the F1 over segments, which selects and scores.
        layers: Names of the layers whose frames lie side by side, if the head is to see a mix of them.
        fold: Number of the fold, for the result.
        threads: Share the passes over the frames; any number gives the same bytes.
        device: torch device for large passes; the CPU makes all of them by default.
        on_fit: Called after each fit.

    Raises:
        ScoreUndefinedError: A frame is not finite.
    """
    one_layer = OneAgainstTheRest(clips.classes, positive_weight)
    objective = MixedFits(one_layer, layers) if layers else one_layer
    with np.errstate(all="ignore"), pool_of(threads, device) as pool:
        counting = _Counting(clips, segment_seconds, average, pool)
        tried: list[Tried] = []
        near: Fit | None = None
        chosen, threshold = 0, WITHOUT_SELECTION
        for fit in objective.fits(FrameRows(clips, rows.train), pool):
            selection, log_loss, own = counting.choose(fit.head, rows.valid)
            test = counting.f1(counting.counts(fit.head, rows.test, [own])[0][:, 0])
            tried.append(Tried(fit.strength, selection, log_loss, test, fit.convergence))
            default = objective.without_selection if not len(rows.valid) else None
            if near is None or better(tried[-1], tried[chosen], default):
                near, chosen, threshold = fit, len(tried) - 1, own
            on_fit()
        assert near is not None
        all_train = np.concatenate([rows.train, rows.held_out])
        last = objective.refit(FrameRows(clips, all_train), pool, near)
        examples = np.unique(rows.test)
        predictions = counting.counts(last.head, examples, [threshold])[0][:, 0]
        train = counting.f1(counting.counts(last.head, all_train, [threshold])[0][:, 0])
        on_fit()
        return EventsResult(
            fold, examples, predictions, tried, chosen, last.convergence, train, shares=last.shares, threshold=threshold
        )


def train_convex_frames(
    clips: Clips,
    folds: Sequence[FoldRows],
    positive_weight: float,
    *,
    segment_seconds: float,
    average: Average,
    layers: Sequence[str] = (),
    threads: int = 1,
    device: str | None = None,
    on_fit: Callable[[int], None] = lambda fits: None,
) -> list[EventsResult]:
    """`fit_frames` of every fold, several at once; `on_fit` is called with the number of `convex.fits` done."""

    def fit(fold: int, threads: int, fitted: Callable[[], None]) -> EventsResult:
        return fit_frames(
            clips,
            folds[fold],
            positive_weight,
            segment_seconds=segment_seconds,
            average=average,
            layers=layers,
            fold=fold,
            threads=threads,
            device=device,
            on_fit=fitted,
        )

    return over_folds(fit, len(folds), threads, on_fit)


class _Counting:
    """Counts the segments that heads get right and wrong, clip by clip."""

    def __init__(self, clips: Clips, segment_seconds: float, average: Average, pool: Pool) -> None:
        self._clips, self._segment_seconds, self._average, self._pool = clips, segment_seconds, average, pool

    def f1(self, counts: Indices) -> float:
        """F1 of counts (clips, classes, 3); nan without clips."""
        if not len(counts):
            return math.nan
        return float(segments.segment_f1(counts.sum(axis=0), self._average, present_only=True))

    def choose(self, head: Head, chosen: Indices) -> tuple[float, float, float]:
        """(best F1, mean log loss, its threshold: of equal ones the nearest to one half); nan and one half without clips."""
        if not len(chosen):
            return math.nan, math.nan, WITHOUT_SELECTION
        counts, log_loss = self.counts(head, chosen, THRESHOLDS)
        scores = [self.f1(counts[:, number]) for number in range(len(THRESHOLDS))]
        order = sorted(range(len(THRESHOLDS)), key=lambda number: abs(THRESHOLDS[number] - 0.5))
        best = max(order, key=lambda number: -math.inf if math.isnan(scores[number]) else scores[number])
        return scores[best], log_loss, THRESHOLDS[best]

    def counts(self, head: Head, chosen: Indices, thresholds: Sequence[float]) -> tuple[Indices, float]:
        """Segment counts (clips, thresholds, classes, 3), and the mean log loss over frames and classes."""
        clips = self._clips

        def of_clip(position: int) -> tuple[Indices, float, int]:
            clip = int(chosen[position])
            frames = clips.frames[clip]
            pieces = []
            step = rows_at_once(frames.shape[1])
            for start in range(0, len(frames), step):
                block = frames[start : start + step].astype(np.float32)
                if not np.isfinite(block).all():
                    raise undefined()
                pieces.append(expit(head.logits(block)))
            probabilities = np.concatenate(pieces)
            true = np.where(clips.targets(clip), probabilities, 1 - probabilities)
            loss = -float(np.log(np.maximum(true, LEAST_PROBABILITY)).sum(dtype=np.float64))
            times, seconds = clips.times[clip], clips.seconds[clip]
            targets = segments.segment_targets(clips.events[clip], seconds, self._segment_seconds, clips.classes)
            counts = [
                segments.segment_counts(
                    targets, segments.segment_predictions(probabilities > threshold, times, seconds, self._segment_seconds)
                )
                for threshold in thresholds
            ]
            return np.stack(counts), loss, true.size

        parts = list(self._pool.map(of_clip, len(chosen)))
        return np.stack([counts for counts, _, _ in parts]), sum(loss for _, loss, _ in parts) / sum(n for *_, n in parts)
