"""Captions: an audio and a text tower, scored by recall at 1, the mean of both directions.

`corrected` trains the vocabulary on the training captions; X-ARES has BERT's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...data.task import Metric
from ...metrics.bootstrap import Array, Scorer, SumScorer
from ...metrics.statistics import per_clip, recall_both_ways
from ..folds import Fold
from ..protocol import Protocol
from .kind import Kept, Kind, Outcome, outcomes_of

# Columns of a prediction: [captions that rank the example first, captions, whether it ranks one of them first]; then, within
# 5 and within 10, how many captions rank it, and whether it ranks one of them.
_WITHIN = {1: (0, 2), 5: (3, 4), 10: (5, 6)}
_CAPTIONS = 1


class Captions(Kind):
    def why_undefined(self) -> str | None:
        if empty := super().why_undefined():
            return empty
        for fold in self.folds:
            if len(fold.test) < 2:
                return f"one test clip in fold {fold.name} ranks first whatever the encoder"
        return None

    def why_not_comparable(self) -> str | None:
        if self.protocol.corrected or self.tools.vocabulary is not None:
            return None
        return "X-ARES's captions use BERT's vocabulary; name its vocab.txt by --vocabulary to be comparable"

    def steps(self) -> int:
        from ...probes.retrieval import SWEEP

        return SWEEP.steps if self.protocol.corrected else super().steps()

    def train(self, seeds: int, on_step: Callable[[int], None]) -> list[Outcome]:
        from ...probes.retrieval import SWEEP, train_retrieval

        results = train_retrieval(
            self.dataset.embeddings,
            self.dataset.labels,
            self.dataset.clip_of_crop,
            self.crop_rows(),
            SWEEP if self.protocol.corrected else self.task.head,
            range(seeds),
            vocabulary=None if self.protocol.corrected else self.tools.vocabulary,
            arithmetic=self.protocol.name,
            on_epoch=on_step,
        )
        return outcomes_of(results)

    @classmethod
    def scorer(cls, seeds: Sequence[Kept], clips: int, metric: Metric, protocol: Protocol) -> Scorer:
        statistics = [per_clip(_ranked(kept.columns["recall"], 1), kept.clip_of_example, np.arange(clips)) for kept in seeds]
        return SumScorer(np.stack(statistics), recall_both_ways)

    def more(self, fold: Fold, outcomes: Sequence[Outcome]) -> dict[str, float]:
        sums = {
            within: np.stack([_ranked(outcome.predictions, within).sum(axis=0) for outcome in outcomes])
            for within in _WITHIN
        }
        text_to_audio, audio_to_text = sums[1][:, 0] / sums[1][:, 1], sums[1][:, 2] / sums[1][:, 3]
        return {
            "text_to_audio_recall_at_1": float(text_to_audio.mean()),
            "audio_to_text_recall_at_1": float(audio_to_text.mean()),
            "recall_at_5": float(recall_both_ways(sums[5]).mean()),
            "recall_at_10": float(recall_both_ways(sums[10]).mean()),
        }

    def columns(self, outcome: Outcome) -> dict[str, npt.NDArray[Any]]:
        """Captions that rank the example first, its captions, and whether it ranks one of them first."""
        return {"recall": outcome.predictions[:, :3].astype(np.int32)}


def _ranked(recall: npt.NDArray[Any], within: int) -> Array:
    """(examples, 4), as `recall_both_ways` sums them."""
    to_audio, to_text = _WITHIN[within]
    columns = [recall[:, to_audio], recall[:, _CAPTIONS], recall[:, to_text], np.ones(len(recall))]
    return np.stack(columns, axis=1).astype(np.float64)
