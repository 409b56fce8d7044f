"""The interface between evaluation and a kind of task: how its head is trained, and how its predictions are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from ...data.task import Metric, Task
from ...metrics.bootstrap import Scorer
from ...probes.tuning import Tuning
from ..dataset import Dataset
from ..folds import Fold, Indices
from ..protocol import Protocol

if TYPE_CHECKING:  # torch takes seconds to import: only to train
    from ...models.llm import LanguageModel
    from ...probes.convex import ConvexResult, FoldRows
    from ...probes.training import HeadResult, Rows
    from ...probes.wordpiece import WordPiece


@dataclass(frozen=True)
class Outcome:
    """Predictions of one seed's head (or of a kNN) for the test examples of one fold, a row each."""

    fold: int
    seed: int
    examples: Indices
    predictions: Any
    tuning: Tuning | None = None


@dataclass(frozen=True)
class Kept:
    """The stored part of an `Outcome`: columns with a row per example, and each example's test clip."""

    columns: Mapping[str, npt.NDArray[Any]]
    clip_of_example: Indices


@dataclass(frozen=True)
class Tools:
    """Inputs of some heads beside the data.

    `hop_seconds` is the encoder's hop, `vocabulary` BERT's, `checkpoints` a folder for long trainings, in which `identity`
    names this encoder's embeddings of this task's data. `threads` share the work of heads that converge; any number of them
    gives the same bytes. Large fits of convex heads and searches of neighbours run on the torch `device`, if there is one.
    `layers` are the names of those whose embeddings lie side by side, for a head on their mix.
    """

    hop_seconds: float | None = None
    vocabulary: WordPiece | None = None
    language_model: LanguageModel | None = None
    checkpoints: Path | None = None
    identity: str = ""
    threads: int = 1
    layers: tuple[str, ...] = ()
    device: str | None = None


class Kind(ABC):
    """One task with its data and folds. An example is a clip, or under X-ARES's protocol a crop."""

    needs_frames: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    """Whether the head of `corrected` can learn a mix of layers."""

    def __init__(self, task: Task, protocol: Protocol, dataset: Dataset, folds: Sequence[Fold], tools: Tools) -> None:
        self.task = task
        self.protocol = protocol
        self.dataset = dataset
        self.folds = folds
        self.tools = tools

    @classmethod
    def strata(cls, labels: Sequence[Any]) -> Indices:
        """(clips,) the stratum of each clip; every stratum is held out in the same proportion."""
        return np.zeros(len(labels), np.int64)

    def why_undefined(self) -> str | None:
        """Why these folds can give no score, or None."""
        for fold in self.folds:
            for part, clips in (("training", fold.train), ("test", fold.test)):
                if not len(clips):
                    return f"there are no {part} clips in fold {fold.name}"
        return None

    def why_not_applicable(self) -> str | None:
        """Why this encoder's embeddings cannot serve this task, or None."""
        return None

    def why_not_comparable(self) -> str | None:
        """How this head departs from the protocol, so that its score is not comparable, or None."""
        return None

    def steps(self) -> int:
        """The number of steps that `train` counts: fits of a convex head, epochs of another."""
        return self.task.head.epochs

    @abstractmethod
    def train(self, seeds: int, on_step: Callable[[int], None]) -> list[Outcome]:
        """Train the head in every fold, and predict the test examples.

        Args:
            seeds: Number of seeds, for heads that draw.
            on_step: Called with the number of steps done.

        Returns:
            An outcome per fold, and per seed if the head draws.

        Raises:
            ScoreUndefinedError: A head gives NaN or infinity.
        """

    def search(self) -> list[Outcome]:
        """Predict the test examples by a kNN, for kinds that have one."""
        raise NotImplementedError(f"there is no kNN for {self.task.kind}")

    def search_selection(self) -> float | None:
        """The kNN's score on the selection clips, to choose between taps; higher is better, None without such clips."""
        return None

    @classmethod
    @abstractmethod
    def scorer(cls, seeds: Sequence[Kept], clips: int, metric: Metric, protocol: Protocol) -> Scorer:
        """The scorer of one fold from its kept predictions alone, so that a stored result can be scored again.

        Args:
            seeds: Kept predictions of each seed.
            clips: Number of test clips.
            metric: Metric of the task.
            protocol: Protocol of the run.
        """

    def more(self, fold: Fold, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Further metrics of one fold, the mean over its seeds."""
        return {}

    @abstractmethod
    def columns(self, outcome: Outcome) -> dict[str, npt.NDArray[Any]]:
        """The arrays to keep of an outcome, with a row per example, beside its key, fold and seed."""

    @property
    def examples_of_crops(self) -> Indices:
        """(crops,) the example that each crop belongs to."""
        clips = self.dataset.clip_of_crop
        return clips if self.protocol.corrected else np.arange(len(clips))

    def clips_of(self, examples: Indices) -> Indices:
        """The clip of each example. In tasks on frames, every clip is one crop."""
        return examples if self.protocol.corrected or self.needs_frames else self.dataset.clip_of_crop[examples]

    def crop_rows(self) -> list[Rows]:
        """The folds in crops."""
        from ...probes.training import Rows

        return [Rows(*(self.dataset.crops_of(part) for part in (fold.train, fold.valid, fold.test))) for fold in self.folds]

    def convex_rows(self) -> list[FoldRows]:
        """The folds for a convex head, in crops; in clips if it sees frames."""
        from ...probes.convex import FoldRows

        rows = (lambda clips: clips) if self.needs_frames else self.dataset.crops_of
        return [FoldRows(*map(rows, (fold.train, fold.valid, fold.test, fold.held_out))) for fold in self.folds]

    def clip_rows(self) -> list[Rows]:
        """The folds in clips."""
        from ...probes.training import Rows

        return [Rows(fold.train, fold.valid, fold.test) for fold in self.folds]


def outcomes_of(results: Sequence[HeadResult] | Sequence[ConvexResult]) -> list[Outcome]:
    return [Outcome(result.fold, result.seed, result.examples, result.predictions, result.tuning) for result in results]
