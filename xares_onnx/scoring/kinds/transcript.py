"""Transcripts: a CTC head on the frames, or X-ARES's adapter into a language model; scored by 1 - word error rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...data import text
from ...data.task import Metric
from ...metrics import words
from ...metrics.bootstrap import Scorer, SumScorer
from ...metrics.statistics import per_clip, ratio, word_accuracy
from ..folds import Fold
from ..protocol import Protocol
from .kind import Kept, Kind, Outcome, outcomes_of

if TYPE_CHECKING:  # torch takes seconds to import: only to train
    from ...probes.sweep import Sweep


class Transcript(Kind):
    needs_frames = True

    @cached_property
    def transcripts(self) -> list[str]:
        """Transcripts in the form that is compared: normalised, or under X-ARES's protocol in lower case."""
        return [self._compared(transcript) for transcript in self.dataset.labels]

    @cached_property
    def _normalised(self) -> list[str]:
        return [text.normalise(transcript) for transcript in self.dataset.labels]

    def _compared(self, transcript: str) -> str:
        return text.normalise(transcript) if self.protocol.corrected else text.lower_cased(transcript)

    def why_not_applicable(self) -> str | None:
        if self.task.head.kind != "ctc":
            return None
        from ...probes.ctc import why_not

        return why_not([len(frames) for frames in self.dataset.frames], self.dataset.seconds, self._normalised)

    def why_not_comparable(self) -> str | None:
        if self.protocol.corrected or self.task.head.kind == "llm":
            return None
        return "X-ARES transcribes with a language model; name Qwen2.5-0.5B's folder by --lm to be comparable"

    def steps(self) -> int:
        plan = self._plan
        return plan.steps if plan else super().steps()

    @property
    def _plan(self) -> Sweep | None:
        """The head's sweep; None under X-ARES's protocol."""
        if not self.protocol.corrected:
            return None
        if self.task.head.kind == "llm":
            from ...probes import llm

            return llm.SWEEP
        from ...probes import ctc

        return ctc.SWEEP

    def train(self, seeds: int, on_step: Callable[[int], None]) -> list[Outcome]:
        if self.task.head.kind == "llm":
            return self._train_llm(seeds, on_step)
        from ...probes.ctc import train_ctc

        rows, settings = self.clip_rows(), self._plan or self.task.head
        return outcomes_of(train_ctc(self.dataset.frames, self._normalised, rows, settings, range(seeds), on_epoch=on_step))

    def _train_llm(self, seeds: int, on_step: Callable[[int], None]) -> list[Outcome]:
        from ...probes.llm import train_llm

        assert self.tools.language_model is not None
        results = train_llm(
            self.dataset.frames,
            self.dataset.labels,
            self.clip_rows(),
            self._plan or self.task.head,
            range(seeds),
            language_model=self.tools.language_model,
            checkpoints=self.tools.checkpoints,
            name=self.tools.identity,
            least_score=-math.inf if self.protocol.corrected else 0.0,
            on_epoch=on_step,
        )
        return outcomes_of(results)

    def _errors(self, outcome: Outcome) -> npt.NDArray[np.int64]:
        references = [self.transcripts[clip] for clip in outcome.examples]
        return words.word_errors(references, [self._compared(hypothesis) for hypothesis in outcome.predictions])

    @classmethod
    def scorer(cls, seeds: Sequence[Kept], clips: int, metric: Metric, protocol: Protocol) -> Scorer:
        statistics = [
            per_clip(kept.columns["word_errors"].astype(np.float64), kept.clip_of_example, np.arange(clips))
            for kept in seeds
        ]
        return SumScorer(np.stack(statistics), word_accuracy)

    def more(self, fold: Fold, outcomes: Sequence[Outcome]) -> dict[str, float]:
        word_counts = np.stack([self._errors(outcome).sum(axis=0) for outcome in outcomes]).astype(np.float64)
        characters = []
        for outcome in outcomes:
            references = [self.transcripts[clip] for clip in outcome.examples]
            errors = words.character_errors(references, [self._compared(hypothesis) for hypothesis in outcome.predictions])
            characters.append(ratio(errors.sum(axis=0).astype(np.float64)))
        return {"word_error_rate": float(ratio(word_counts).mean()), "character_error_rate": float(np.mean(characters))}

    def columns(self, outcome: Outcome) -> dict[str, npt.NDArray[Any]]:
        return {
            "target": np.array([self.transcripts[clip] for clip in outcome.examples], dtype=np.str_),
            "prediction": np.array([self._compared(hypothesis) for hypothesis in outcome.predictions], dtype=np.str_),
            "word_errors": self._errors(outcome).astype(np.int32),
        }
