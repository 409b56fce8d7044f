"""A number a clip: a linear head, scored by mean squared error, with Pearson's correlation beside it.

`corrected` trains on the scale of the task's bounds and cuts predictions off at them; X-ARES trains on the number itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ..folds import Fold
from ..metrics import Scorer, SumScorer, correlation, error_statistics, mean_squared_error, per_clip
from ..targets import NumberTarget
from .kind import Kind, Outcome, outcomes_of


class Number(Kind):
    @cached_property
    def numbers(self) -> npt.NDArray[np.float64]:
        """(clips,) the true number of each clip."""
        return np.array(self.dataset.labels, np.float64)

    def train(self, seeds: int, on_epoch: Callable[[int], None]) -> list[Outcome]:
        from ..probes.linear import Regression, train_linear

        target = self.task.target
        assert isinstance(target, NumberTarget)
        bounds = (target.low, target.high) if self.protocol.corrected else None
        objective = Regression(self.numbers[self.dataset.clip_of_crop], bounds)
        rows, examples = self.crop_rows(), self.examples_of_crops
        results = train_linear(
            self.dataset.embeddings, objective, examples, rows, self.task.head, range(seeds), on_epoch=on_epoch
        )
        return outcomes_of(results)

    def _statistics(self, fold: Fold, outcomes: Sequence[Outcome]) -> npt.NDArray[np.float64]:
        tested = np.sort(fold.test)
        statistics = []
        for outcome in outcomes:
            clips = self.clips_of(outcome.examples)
            statistics.append(per_clip(error_statistics(outcome.predictions, self.numbers[clips]), clips, tested))
        return np.stack(statistics)

    def scorer(self, fold: Fold, outcomes: Sequence[Outcome]) -> Scorer:
        return SumScorer(self._statistics(fold, outcomes), mean_squared_error)

    def more(self, fold: Fold, outcomes: Sequence[Outcome]) -> dict[str, float]:
        sums = self._statistics(fold, outcomes).sum(axis=1)
        return {"pearson": float(correlation(sums).mean()), "mean_absolute_error": float((sums[:, 1] / sums[:, 2]).mean())}

    def columns(self, outcome: Outcome) -> dict[str, npt.NDArray[Any]]:
        return {"target": self.numbers[self.clips_of(outcome.examples)], "prediction": outcome.predictions}
