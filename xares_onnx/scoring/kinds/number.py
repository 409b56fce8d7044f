"""A number per clip: a linear head, scored by mean squared error, with Pearson's correlation beside it.

`corrected` clips predictions to the task's bounds; X-ARES does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...data.targets import NumberTarget
from ...data.task import Metric
from ...metrics.bootstrap import Scorer, SumScorer
from ...metrics.statistics import correlation, error_statistics, mean_squared_error, per_clip
from ..folds import Fold
from ..protocol import Protocol
from .kind import Kept, Outcome
from .pooled import PooledKind

if TYPE_CHECKING:  # torch takes seconds to import: only to train
    from ...probes import convex, linear


class Number(PooledKind):
    @cached_property
    def numbers(self) -> npt.NDArray[np.float64]:
        """(clips,) the true number of each clip."""
        return np.array(self.dataset.labels, np.float64)

    def converged(self) -> convex.Numbers:
        from ...probes import convex

        target = self.task.target
        assert isinstance(target, NumberTarget)
        return convex.Numbers(self.numbers[self.dataset.clip_of_crop], (target.low, target.high))

    def trained(self) -> linear.Regression:
        from ...probes import linear

        return linear.Regression(self.numbers[self.dataset.clip_of_crop], None)

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
