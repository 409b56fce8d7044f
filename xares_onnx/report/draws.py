"""Scores with their spread, resampled from the predictions beside each result, and the differences between models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from ..errors import DataMissingError
from ..evaluation.differences import Side, paired, verified
from ..evaluation.record import TaskResult
from ..evaluation.settings import Method
from ..metrics.bootstrap import Array, Indices
from ..metrics.intervals import Estimate, Scale, average, estimates
from ..scoring.scoring import clips_of, generator, groups_of_clips


@dataclass(frozen=True)
class _Draw:
    """Keys of the test clips and their groups by fold, and the score with its spread."""

    clips: dict[str, list[str]]
    groups: list[Indices] | None
    estimate: Estimate

    def pairs_with(self, other: _Draw) -> bool:
        """Whether the same clips, or groups of them, were resampled."""
        if self.clips != other.clips or (self.groups is None) != (other.groups is None):
            return False
        return all(np.array_equal(a, b) for a, b in zip(self.groups or (), other.groups or (), strict=True))


class Draws:
    """Resampled scores of several models, drawn when first asked for and kept.

    The generator that resamples the clips of a task and method is seeded by their names. Replicates of two models on the
    same clips are therefore paired, whoever draws them.

    Args:
        sides: Each model's result with its predictions, by the model's label; methods refer to models by their position.
    """

    def __init__(self, sides: Mapping[str, Side]) -> None:
        self._labels = list(sides)
        self._sides = list(sides.values())
        self._drawn: dict[tuple[int, str, Method], _Draw | None] = {}
        self._missing: dict[str, str] = {}

    def notes(self) -> list[str]:
        """A sentence per model whose predictions were asked for and are missing."""
        return [
            f"{label}: {reason}; its differences are judged by whether intervals overlap, which misses small ones"
            for label, reason in self._missing.items()
        ]

    def behind(self, best: int, best_record: TaskResult, other: int, other_record: TaskResult) -> Estimate | None:
        """By how much the other model's score is worse than the best; None if predictions are missing."""
        a, b = self._draw(best, best_record), self._draw(other, other_record)
        if a is None or b is None:
            return None
        if a.pairs_with(b):
            return _shortfall(a.estimate, b.estimate, best_record.higher_is_better)
        # The clips differ: compare on those that both models have.
        return paired(self._alone(other, other_record), other_record, self._alone(best, best_record), best_record)

    def average(self, model: int, records: Sequence[TaskResult], shares: Array) -> Estimate | None:
        """A weighted average; None if predictions are missing, or for a single model, whose result has the interval."""
        if len(self._sides) < 2:
            return None
        draws = [self._draw(model, record) for record in records]
        known = [draw.estimate for draw in draws if draw is not None]
        return average(shares, known) if len(known) == len(draws) else None

    def average_behind(
        self, best: int, other: int, records: Sequence[Sequence[TaskResult]], shares: Array
    ) -> Estimate | None:
        """By how much the other model's weighted average is below the best; None unless all tasks have the same clips."""
        pairs = [(self._draw(best, a), self._draw(other, b)) for a, b in zip(records[best], records[other], strict=True)]
        shortfalls = [
            _shortfall(a.estimate, b.estimate, record.higher_is_better)
            for (a, b), record in zip(pairs, records[best], strict=True)
            if a is not None and b is not None and a.pairs_with(b)
        ]
        return average(shares, shortfalls) if len(shortfalls) == len(pairs) else None

    def _alone(self, model: int, record: TaskResult) -> Side:
        side = self._sides[model]
        return Side(side.name, msgspec.structs.replace(side.result, tasks=[record]), side.predictions_of)

    def _draw(self, model: int, record: TaskResult) -> _Draw | None:
        key = model, record.task, record.family
        if key not in self._drawn:
            try:
                predictions, scorers = verified(self._sides[model], record)
            except DataMissingError as error:
                self._missing.setdefault(self._labels[model], str(error))
                self._drawn[key] = None
            else:
                groups = groups_of_clips(predictions)
                scale: Scale = "share" if record.higher_is_better else "error"
                (estimate,) = estimates([scorers], generator(record.task, record.family), groups, scale)
                self._drawn[key] = _Draw(clips_of(predictions), groups, estimate)
        return self._drawn[key]


def _shortfall(best: Estimate, other: Estimate, higher_is_better: bool) -> Estimate:
    return best.minus(other) if higher_is_better else other.minus(best)
