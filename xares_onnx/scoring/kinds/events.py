"""Events in time: a linear head on every frame, scored by F1 over segments.

`corrected` puts targets on the encoder's measured frame times and cuts segments on the clock, so that the score means the
same for every hop. X-ARES counts in frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...data.task import Metric
from ...metrics.bootstrap import Array, Scorer, SumScorer
from ...metrics.segments import segment_f1
from ...metrics.statistics import per_clip
from ..folds import Fold
from ..protocol import Protocol
from .kind import Kept, Kind, Outcome, outcomes_of

Average = Literal["macro", "micro"]


class EventsKind(Kind):
    needs_frames = True
    mixes = True

    @property
    def average(self) -> Average:
        return _average(self.task.score.metric)

    def why_undefined(self) -> str | None:
        if empty := super().why_undefined():
            return empty
        for fold in self.folds:
            for part, clips in (("training", fold.train), ("test", fold.test)):
                if not any(len(self.dataset.labels[clip].classes) for clip in clips):
                    return f"the {part} clips of fold {fold.name} have no events"
        return None

    def steps(self) -> int:
        if not self.protocol.corrected:
            return super().steps()
        from ...probes.convex import LOGISTIC_STRENGTHS, fits

        return fits(LOGISTIC_STRENGTHS, len(self.folds))

    def train(self, seeds: int, on_step: Callable[[int], None]) -> list[Outcome]:
        data, segment_seconds, head = self.dataset, self.task.score.segment_seconds, self.task.head
        assert segment_seconds is not None
        clips = data.frames, data.times, data.seconds, data.labels
        classes = len(self.task.target.class_names)
        if self.protocol.corrected:
            from ...probes.convex_frames import Clips, train_convex_frames

            return outcomes_of(
                train_convex_frames(
                    Clips(*clips, classes),
                    self.convex_rows(),
                    head.positive_weight,
                    segment_seconds=segment_seconds,
                    average=self.average,
                    layers=self.tools.layers,
                    threads=self.tools.threads,
                    device=self.tools.device,
                    on_fit=on_step,
                )
            )
        from ...probes.frames import train_frames

        results = train_frames(
            *clips,
            self.clip_rows(),
            classes,
            head,
            range(seeds),
            segment_seconds=segment_seconds,
            average=self.average,
            hop_seconds=self.tools.hop_seconds,
            on_epoch=on_step,
        )
        return outcomes_of(results)

    @classmethod
    def scorer(cls, seeds: Sequence[Kept], clips: int, metric: Metric, protocol: Protocol) -> Scorer:
        statistics = []
        for kept in seeds:
            segments = kept.columns["segments"]  # (clips, classes, 3)
            flat = segments.reshape(len(segments), -1).astype(np.float64)
            statistics.append(per_clip(flat, kept.clip_of_example, np.arange(clips)))
        f1 = partial(_f1, average=_average(metric), present_only=protocol.corrected)
        return SumScorer(np.stack(statistics), f1)

    def more(self, fold: Fold, outcomes: Sequence[Outcome]) -> dict[str, float]:
        other: Average = "micro" if self.average == "macro" else "macro"
        sums = np.stack([outcome.predictions.sum(axis=0) for outcome in outcomes])
        hits, false, missed = sums.sum(axis=1).T.astype(np.float64)
        with np.errstate(invalid="ignore"):
            return {
                f"segment_f1_{other}": float(
                    _f1(sums.reshape(len(sums), -1), average=other, present_only=self.protocol.corrected).mean()
                ),
                "segment_precision": float((hits / (hits + false)).mean()),
                "segment_recall": float((hits / (hits + missed)).mean()),
            }

    def columns(self, outcome: Outcome) -> dict[str, npt.NDArray[Any]]:
        """Segments of each class: hits, false alarms, misses."""
        return {"segments": outcome.predictions.astype(np.int32)}


def _average(metric: Metric) -> Average:
    return "macro" if metric == "segment_f1_macro" else "micro"


def _f1(sums: Array, *, average: Average, present_only: bool) -> Array:
    counts = sums.reshape(*sums.shape[:-1], -1, 3)
    return np.asarray(segment_f1(counts, average, present_only=present_only))
