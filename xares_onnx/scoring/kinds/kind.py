"""What evaluation needs to know of a kind of task: how it is learnt, and how what was learnt is scored."""

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

if TYPE_CHECKING:  # torch takes seconds to import: only where something is trained
    from ...models.llm import LanguageModel
    from ...probes.convex import ConvexResult, FoldRows
    from ...probes.training import HeadResult, Rows
    from ...probes.wordpiece import WordPiece


@dataclass(frozen=True)
class Outcome:
    """What one seed's head (or a kNN) predicts for the test examples of one fold; a row of `predictions` each."""

    fold: int
    seed: int
    examples: Indices
    predictions: Any
    tuning: Tuning | None = None


@dataclass(frozen=True)
class Kept:
    """What is kept of an `Outcome`: columns with a row an example, and which of the test clips, from 0, each is of."""

    columns: Mapping[str, npt.NDArray[Any]]
    clip_of_example: Indices


@dataclass(frozen=True)
class Tools:
    """What some heads need beside the data.

    `hop_seconds` is the encoder's; `vocabulary` BERT's; `checkpoints` a folder for long trainings, and `identity` what
    names this encoder's embeddings of this task's data in it. `threads` share the work of heads that converge, which gives
    the same bytes for any number.
    """

    hop_seconds: float | None = None
    vocabulary: WordPiece | None = None
    language_model: LanguageModel | None = None
    checkpoints: Path | None = None
    identity: str = ""
    threads: int = 1


class Kind(ABC):
    """One task with its data and folds. An example is a clip, or under X-ARES's protocol a crop."""

    needs_frames: ClassVar[bool] = False

    def __init__(self, task: Task, protocol: Protocol, dataset: Dataset, folds: Sequence[Fold], tools: Tools) -> None:
        self.task = task
        self.protocol = protocol
        self.dataset = dataset
        self.folds = folds
        self.tools = tools

    @classmethod
    def strata(cls, labels: Sequence[Any]) -> Indices:
        """(clips,) the stratum of each clip, in which held-out clips are chosen in the same proportion."""
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
        """What this head does otherwise than the protocol says, or None."""
        return None

    def steps(self) -> int:
        """How many steps `train` counts: fits of a head that converges, epochs of one that is trained."""
        return self.task.head.epochs

    @abstractmethod
    def train(self, seeds: int, on_step: Callable[[int], None]) -> list[Outcome]:
        """Train the head in every fold, and predict the test examples; with every seed, if the head draws.

        `on_step` is called with the number of steps done. Raises `ScoreUndefinedError` if a head gives NaN or infinity.
        """

    def search(self) -> list[Outcome]:
        """The same by a kNN, for kinds that know one."""
        raise NotImplementedError(f"there is no kNN for {self.task.kind}")

    def search_selection(self) -> float | None:
        """The kNN's score on the selection clips, higher is better, by which taps are chosen; None without such clips."""
        return None

    @classmethod
    @abstractmethod
    def scorer(cls, seeds: Sequence[Kept], clips: int, metric: Metric, protocol: Protocol) -> Scorer:
        """The score of one fold of so many test clips from what is kept of its predictions, an entry a seed.

        It is given nothing else, so that a stored result is scored by the arithmetic of the run that wrote it.
        """

    def more(self, fold: Fold, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Further metrics of one fold, the mean over its seeds."""
        return {}

    @abstractmethod
    def columns(self, outcome: Outcome) -> dict[str, npt.NDArray[Any]]:
        """What is kept of an outcome: arrays with a row an example, beside its key, fold and seed."""

    @property
    def examples_of_crops(self) -> Indices:
        """(crops,) the example that each crop is scored with."""
        clips = self.dataset.clip_of_crop
        return clips if self.protocol.corrected else np.arange(len(clips))

    def clips_of(self, examples: Indices) -> Indices:
        """The clip of each example. Where frames are learnt from, every clip is one crop."""
        return examples if self.protocol.corrected or self.needs_frames else self.dataset.clip_of_crop[examples]

    def crop_rows(self) -> list[Rows]:
        """The folds in crops."""
        from ...probes.training import Rows

        return [Rows(*(self.dataset.crops_of(part) for part in (fold.train, fold.valid, fold.test))) for fold in self.folds]

    def convex_rows(self) -> list[FoldRows]:
        """The folds for a head that converges, in crops; in clips if it sees frames."""
        from ...probes.convex import FoldRows

        rows = (lambda clips: clips) if self.needs_frames else self.dataset.crops_of
        return [FoldRows(*map(rows, (fold.train, fold.valid, fold.test, fold.held_out))) for fold in self.folds]

    def clip_rows(self) -> list[Rows]:
        """The folds in clips."""
        from ...probes.training import Rows

        return [Rows(fold.train, fold.valid, fold.test) for fold in self.folds]


def outcomes_of(results: Sequence[HeadResult] | Sequence[ConvexResult]) -> list[Outcome]:
    return [Outcome(result.fold, result.seed, result.examples, result.predictions, result.tuning) for result in results]
