"""Train transcript heads on stored frames, by connectionist temporal classification, and decode greedily.

Heads are trained side by side, epoch by epoch, but each in its own loop: every head sees other clips at a step, so they have
nothing to share, and what one learns cannot depend on the others, to the last bit. Frames are read clip by clip
as they are needed, so memory holds one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..metrics.words import character_errors
from ..models.ctc import CtcHead, Workspace, collapse, ctc_gradient
from ..models.linear import normalised
from .training import (
    HeadResult,
    Indices,
    OnEpoch,
    Rows,
    Selection,
    Settings,
    check_finite,
    generator,
    learning_rate,
    one_thread,
)

Frames = npt.NDArray[np.floating[Any]]  # of one clip (frames, dim), float16 or float32

_ROWS_READ_AT_ONCE = 64  # small enough to stay in the cache from the conversion to the normalisation
_ROWS_SCORED_AT_ONCE = 4096


def why_not(frame_counts: Sequence[int], seconds: Sequence[float], transcripts: Sequence[str]) -> str | None:
    """Why the encoder's frames cannot spell the transcripts, or None where they can.

    A frame writes at most one character. The task is not applicable where more than half of the clips, given by their
    numbers of frames, durations and transcripts, have fewer frames than characters; the sentence gives the rates of those.
    """
    clips = list(zip(frame_counts, seconds, map(len, transcripts), strict=True))
    short = [clip for clip in clips if clip[0] < clip[2]]
    if 2 * len(short) <= len(clips):
        return None
    frames, duration, characters = map(sum, zip(*short, strict=True))
    return (
        f"the encoder gives fewer frames than characters: {frames / duration:.1f} a second against "
        f"{characters / duration:.1f} characters a second"
    )


def train_ctc(
    frames: Sequence[Frames],
    transcripts: Sequence[str],
    folds: Sequence[Rows],
    settings: Settings,
    seeds: Sequence[int],
    *,
    on_epoch: OnEpoch = lambda epoch: None,
) -> list[HeadResult]:
    """Train len(folds) x len(seeds) heads on every frame of the clips; results are sorted by fold and seed.

    `frames` holds one array (frames, dim) a clip, `transcripts` its text, normalised and not empty; folds have clip numbers.
    A head's classes are the blank and the characters of its fold's training transcripts, in the order of code points.
    The loss is the mean over a batch's clips of the CTC loss by character; clips with too few frames for their text add
    nothing to it. The chosen epoch is the first with the least character error rate of the validation clips: the word
    error rate stays at 1 for many epochs, while words are nearly right.
    `predictions` is a list of hypotheses, exactly as decoded. `ScoreUndefinedError` where a head gives NaN or infinity.
    """
    with one_thread(), torch.inference_mode():
        workspace = Workspace()
        learners = [
            _Learner(frames, transcripts, rows, settings, fold, seed, workspace)
            for fold, rows in enumerate(folds)
            for seed in sorted(seeds)
        ]
        for epoch in range(1, settings.epochs + 1):
            for learner in learners:
                learner.train(learning_rate(epoch, settings.epochs, settings.learning_rate))
                learner.select(epoch)
            on_epoch(epoch)
        return [learner.result() for learner in learners]


class _Learner:
    """One head, while it is trained."""

    def __init__(
        self,
        frames: Sequence[Frames],
        transcripts: Sequence[str],
        rows: Rows,
        settings: Settings,
        fold: int,
        seed: int,
        workspace: Workspace,
    ) -> None:
        self._frames, self._transcripts, self._rows = frames, transcripts, rows
        self._fold, self._seed, self._batch_size, self._workspace = fold, seed, settings.batch_size, workspace
        self._alphabet = sorted(set().union(*(transcripts[clip] for clip in rows.train)))
        self._classes = {character: number for number, character in enumerate(self._alphabet, start=1)}
        self._rng = generator(seed, fold)
        self._dim = frames[0].shape[1]
        self._head = CtcHead(self._dim, 1 + len(self._alphabet), self._rng)
        self._adam = torch.optim.Adam([nn.Parameter(parameter) for parameter in self._head.parameters], fused=True)
        for parameter, gradient in zip(self._adam.param_groups[0]["params"], self._head.gradients, strict=True):
            parameter.grad = gradient
        self._selection = Selection()
        self._best = [parameter.clone() for parameter in self._head.parameters]

    def train(self, rate: float) -> None:
        """One epoch."""
        self._adam.param_groups[0]["lr"] = rate
        order = self._rng.permutation(self._rows.train)
        for start in range(0, len(order), self._batch_size):
            clips = [self._frames[clip] for clip in order[start : start + self._batch_size]]
            texts = [self._transcripts[clip] for clip in order[start : start + self._batch_size]]
            targets = [np.array([self._classes[character] for character in text]) for text in texts]
            x = self._normalised(clips)
            _, gradient = ctc_gradient(self._head.logits(x), [len(clip) for clip in clips], targets, self._workspace)
            self._head.backward(x, gradient)
            self._adam.step()

    def select(self, epoch: int) -> None:
        """Keep the head of this epoch if it is the best on the validation clips, or if there are none."""
        score = float("nan")
        if len(self._rows.valid):
            references = [self._transcripts[clip] for clip in self._rows.valid]
            errors, characters = character_errors(references, self._hypotheses(self._rows.valid)).sum(axis=0).tolist()
            score = 1 - errors / characters
        if self._selection.better(score, epoch):
            for kept, parameter in zip(self._best, self._head.parameters, strict=True):
                kept.copy_(parameter)

    def result(self) -> HeadResult:
        """The test clips' hypotheses by the chosen epoch's head, which replaces the last."""
        for kept, parameter in zip(self._best, self._head.parameters, strict=True):
            parameter.copy_(kept)
        tested = np.unique(self._rows.test)
        hypotheses = self._hypotheses(tested)
        return HeadResult(self._fold, self._seed, tested, hypotheses, self._selection.epoch, self._selection.score)

    def _hypotheses(self, clips: Indices) -> list[str]:
        texts = []
        for clip in clips:
            frames, best = self._frames[clip], [np.empty(0, np.int64)]
            for start in range(0, len(frames), _ROWS_SCORED_AT_ONCE):
                logits = self._head.logits(self._normalised([frames[start : start + _ROWS_SCORED_AT_ONCE]]))
                check_finite(logits)
                best.append(logits.argmax(dim=1).numpy())
            texts.append("".join(self._alphabet[number - 1] for number in collapse(np.concatenate(best))))
        return texts

    def _normalised(self, clips: Sequence[Frames]) -> Tensor:
        """The clips' frames one after another (frames, dim), normalised in float32; the next call overwrites them."""
        x = self._workspace.take("frames", sum(map(len, clips)), self._dim)
        end = 0
        for clip in clips:
            for start in range(0, len(clip), _ROWS_READ_AT_ONCE):
                # A copy, as torch takes no memory that is read-only; and torch's conversion, as numpy's is slow.
                part = torch.from_numpy(np.array(clip[start : start + _ROWS_READ_AT_ONCE]))
                x[end : end + len(part)] = normalised(part.float())
                end += len(part)
        return x
