"""Any number of classes per clip: a linear head with an output per class, scored by macro average precision.

`corrected` averages over the classes with positives among the test clips; X-ARES over all, those without positives
counting 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...data.task import Metric
from ...metrics.average_precision import AveragePrecisionScorer
from ...metrics.bootstrap import Scorer
from ..folds import Fold, Indices
from ..protocol import Protocol
from .kind import Kept, Outcome
from .pooled import PooledKind

if TYPE_CHECKING:  # torch takes seconds to import: only to train
    from ...probes import convex, linear


class Tags(PooledKind):
    @cached_property
    def present(self) -> npt.NDArray[np.bool_]:
        """(clips, classes) bool: the classes of each clip."""
        matrix = np.zeros((len(self.dataset.labels), len(self.task.target.class_names)), bool)
        for row, tags in zip(matrix, self.dataset.labels, strict=True):
            row[list(tags)] = True
        return matrix

    @classmethod
    def strata(cls, labels: Sequence[tuple[int, ...]]) -> Indices:
        """Each clip's stratum is its rarest tag."""
        flat = [tag for tags in labels for tag in tags]
        frequency = np.bincount(np.array(flat, np.int64), minlength=1)
        return np.array([min(tags, key=lambda tag: (frequency[tag], tag)) if tags else -1 for tags in labels], np.int64) + 1

    def why_undefined(self) -> str | None:
        if empty := super().why_undefined():
            return empty
        present = self.present
        for fold in self.folds:
            for part, clips in (("training", fold.train), ("test", fold.test)):
                if not present[clips].any():
                    return f"the {part} clips of fold {fold.name} have no tags"
        return None

    def converged(self) -> convex.Tags:
        from ...probes import convex

        return convex.Tags(self.present[self.dataset.clip_of_crop], self.task.head.positive_weight)

    def trained(self) -> linear.Tagging:
        from ...probes import linear

        targets, weight = self.present[self.dataset.clip_of_crop], self.task.head.positive_weight
        return linear.Tagging(targets, weight, present_only=False)

    @classmethod
    def scorer(cls, seeds: Sequence[Kept], clips: int, metric: Metric, protocol: Protocol) -> Scorer:
        return AveragePrecisionScorer(
            np.stack([kept.columns["prediction"] for kept in seeds]),
            seeds[0].columns["target"],
            seeds[0].clip_of_example,
            clips,
            present_only=protocol.corrected,
        )

    def more(self, fold: Fold, outcomes: Sequence[Outcome]) -> dict[str, float]:
        clips = self.clips_of(outcomes[0].examples)
        return {"classes_with_positives": float(self.present[clips].any(axis=0).sum())}

    def columns(self, outcome: Outcome) -> dict[str, npt.NDArray[Any]]:
        return {
            "target": self.present[self.clips_of(outcome.examples)],
            "prediction": outcome.predictions.astype(np.float32),
        }
