"""One class per clip: a linear head and a kNN, scored by accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...data.task import Metric
from ...errors import quoted
from ...metrics.bootstrap import Scorer, SumScorer
from ...metrics.statistics import accuracy_statistics, class_metrics, ratio
from ..folds import Fold, Indices
from ..protocol import Protocol
from .kind import Kept, Outcome
from .pooled import PooledKind

if TYPE_CHECKING:  # torch takes seconds to import: only to train
    from ...probes import convex, linear


class Classes(PooledKind):
    @classmethod
    def strata(cls, labels: Sequence[int]) -> Indices:
        return np.array(labels, np.int64)

    @cached_property
    def classes(self) -> Indices:
        """(clips,) class indices."""
        return np.array(self.dataset.labels, np.int64)

    def why_undefined(self) -> str | None:
        if empty := super().why_undefined():
            return empty
        for fold in self.folds:
            known, tested = np.unique(self.classes[fold.train]), np.unique(self.classes[fold.test])
            if len(known) < 2:
                return f"the training clips of fold {fold.name} are all of one class"
            unknown = np.setdiff1d(tested, known)
            if len(unknown) and not self.dataset.limited:
                names = self.task.target.class_names
                return f"class {quoted(names[unknown[0]])} is tested in fold {fold.name} but has no training clip"
        return None

    def converged(self) -> convex.Classes:
        from ...probes import convex

        return convex.Classes(self.classes[self.dataset.clip_of_crop], len(self.task.target.class_names))

    def trained(self) -> linear.Classification:
        from ...probes import linear

        return linear.Classification(self.classes[self.dataset.clip_of_crop], len(self.task.target.class_names))

    def search(self) -> list[Outcome]:
        """Search all training clips, including those held out for a head's selection: a kNN selects nothing."""
        return [
            Outcome(number, 0, *self._nearest(np.concatenate([fold.train, fold.held_out]), fold.test))
            for number, fold in enumerate(self.folds)
        ]

    def search_selection(self) -> float | None:
        """Search the training clips without those held out. None under `xares`, which may select on test clips."""
        if not self.protocol.corrected or not all(len(fold.valid) for fold in self.folds):
            return None
        by_fold = [self._nearest(fold.train, fold.valid) for fold in self.folds]
        return float(np.mean([(self.classes[clips] == predictions).mean() for clips, predictions in by_fold]))

    def _nearest(self, train: Indices, test: Indices) -> tuple[Indices, Indices]:
        """(examples, their predicted classes) of the test clips among the training clips."""
        from ...probes.knn import knn_cosine, knn_xares

        labels, examples = self.classes[self.dataset.clip_of_crop], self.examples_of_crops
        embeddings = self.dataset.embeddings
        train_crops, test_crops = self.dataset.crops_of(train), self.dataset.crops_of(test)
        searched = embeddings[train_crops], labels[train_crops], embeddings[test_crops], examples[test_crops]
        return knn_cosine(*searched, self.tools.device) if self.protocol.corrected else knn_xares(*searched)

    @classmethod
    def scorer(cls, seeds: Sequence[Kept], clips: int, metric: Metric, protocol: Protocol) -> Scorer:
        statistics = [
            accuracy_statistics(kept.columns["target"] == kept.columns["prediction"], kept.clip_of_example, np.arange(clips))
            for kept in seeds
        ]
        return SumScorer(np.stack(statistics), ratio)

    def more(self, fold: Fold, outcomes: Sequence[Outcome]) -> dict[str, float]:
        by_seed = [class_metrics(self.classes[self.clips_of(o.examples)], o.predictions) for o in outcomes]
        return {name: float(np.mean([metrics[name] for metrics in by_seed])) for name in by_seed[0]}

    def columns(self, outcome: Outcome) -> dict[str, npt.NDArray[Any]]:
        targets = self.classes[self.clips_of(outcome.examples)]
        return {"target": targets.astype(np.int32), "prediction": outcome.predictions.astype(np.int32)}
