"""A number a clip: a linear head, scored by mean squared error, with Pearson's correlation beside it.

`corrected` trains on the scale of the task's bounds and cuts predictions off at them; X-ARES trains on the number itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ...data.targets import NumberTarget
from ...data.task import Metric
from ...metrics.bootstrap import Scorer, SumScorer
from ...metrics.statistics import correlation, error_statistics, mean_squared_error, per_clip
from ..folds import Fold
from ..protocol import Protocol
from .kind import Kept, Kind, Outcome, outcomes_of


class Number(Kind):
    @cached_property
    def numbers(self) -> npt.NDArray[np.float64]:
        """(clips,) the true number of each clip."""
        return np.array(self.dataset.labels, np.float64)

    def train(self, seeds: int, on_epoch: Callable[[int], None]) -> list[Outcome]:
        from ...probes.linear import Regression, train_linear

        target = self.task.target
        assert isinstance(target, NumberTarget)
        bounds = (target.low, target.high) if self.protocol.corrected else None
        objective = Regression(self.numbers[self.dataset.clip_of_crop], bounds)
        rows, examples = self.crop_rows(), self.examples_of_crops
        results = train_linear(
            self.dataset.embeddings, objective, examples, rows, self.task.head, range(seeds), on_epoch=on_epoch
        )
        return outcomes_of(results)

    @classmethod
    def scorer(cls, seeds: Sequence[Kept], clips: int, metric: Metric, protocol: Protocol) -> Scorer:
        statistics = [
            per_clip(
                error_statistics(kept.columns["prediction"], kept.columns["target"]), kept.clip_of_example, np.arange(clips)
            )
            for kept in seeds
        ]
        return SumScorer(np.stack(statistics), mean_squared_error)

    def more(self, fold: Fold, outcomes: Sequence[Outcome]) -> dict[str, float]:
        targets = self.numbers[self.clips_of(outcomes[0].examples)]
        sums = np.stack([error_statistics(outcome.predictions, targets).sum(axis=0) for outcome in outcomes])
        return {"pearson": float(correlation(sums).mean()), "mean_absolute_error": float((sums[:, 1] / sums[:, 2]).mean())}

    def columns(self, outcome: Outcome) -> dict[str, npt.NDArray[Any]]:
        return {"target": self.numbers[self.clips_of(outcome.examples)], "prediction": outcome.predictions}
