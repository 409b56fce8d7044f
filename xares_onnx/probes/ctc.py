"""Train transcript heads on stored frames, by connectionist temporal classification, and decode greedily.

Each head trains in its own loop: heads see different clips at a step, so they share no work, and none depends on the others,
to the last bit. Frames are read clip by clip when needed, so memory holds one batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..data import text
from ..errors import ScoreUndefinedError
from ..metrics.statistics import word_accuracy
from ..metrics.words import character_errors, word_errors
from ..models.ctc import CtcHead, Workspace, collapse, ctc_gradient
from ..models.linear import normalised
from ..models.standardised import Standardisation, pool_of
from .sweep import Clock, Sweep, swept
from .training import (
    RUNAWAY,
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

SWEEP = Sweep(rates=(1e-3, 1e-2, 3e-2, 1e-1), batch_size=8, epochs=100, patience=8)
_ROWS_READ_AT_ONCE = 64  # small enough to stay in the cache from the conversion to the normalisation
_ROWS_SCORED_AT_ONCE = 4096


def why_not(frame_counts: Sequence[int], seconds: Sequence[float], transcripts: Sequence[str]) -> str | None:
    """Why the encoder's frames cannot spell the transcripts, or None if they can.

    A frame writes at most one character. The task is not applicable if more than half of the clips have fewer frames than
    characters.

    Args:
        frame_counts: Frames of each clip.
        seconds: Duration of each clip.
        transcripts: Normalised text of each clip.

    Returns:
        A sentence with the rates of frames and characters in the clips that are short of frames.
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
    settings: Settings | Sweep,
    seeds: Sequence[int],
    *,
    on_epoch: OnEpoch = lambda epoch: None,
) -> list[HeadResult]:
    """Train len(folds) x len(seeds) heads on every frame of the clips.

    A head's classes are the blank and the characters of its fold's training transcripts, in the order of code points.
    The loss is the mean over a batch's clips of the CTC loss per character; clips with too few frames for their text add
    nothing to it. The chosen epoch is the first with the lowest character error rate of the validation clips: the word
    error rate stays at 1 for many epochs, while words are nearly right.

    Args:
        frames: An array (frames, dim) per clip.
        transcripts: Text of each clip, normalised and not empty.
        folds: Clip numbers.
        settings: With `Settings`, every head trains at one rate for a fixed number of epochs. With a `Sweep`, frames are
            standardised by the mean and deviation of the fold's training frames, and rates and epochs are chosen on the
            validation clips.
        seeds: One head each per fold.
        on_epoch: Called with the number of epochs, or of a sweep's steps, done.

    Returns:
        Results sorted by fold and seed; `predictions` is a list of hypotheses, exactly as decoded.

    Raises:
        ScoreUndefinedError: A head gives NaN or infinity.
    """
    with one_thread(), torch.inference_mode():
        workspace = Workspace()
        if isinstance(settings, Sweep):
            clock = Clock(settings, len(folds), len(seeds), on_epoch)
            return [
                result
                for fold, rows in enumerate(folds)
                for result in _swept(frames, transcripts, rows, fold, settings, seeds, workspace, clock)
            ]
        learners = [
            _Learner(frames, transcripts, rows, settings.batch_size, generator(seed, fold), workspace)
            for fold, rows in enumerate(folds)
            for seed in sorted(seeds)
        ]
        for epoch in range(1, settings.epochs + 1):
            for learner in learners:
                learner.rate = learning_rate(epoch, settings.epochs, settings.learning_rate)
                learner.train()
                if learner.selection.better(learner.valid_score(), epoch):
                    learner.keep()
            on_epoch(epoch)
        results = []
        for learner, (fold, seed) in zip(learners, itertools.product(range(len(folds)), sorted(seeds)), strict=True):
            learner.finish()
            chosen = learner.selection
            results.append(HeadResult(fold, seed, *learner.predict(), chosen.epoch, chosen.score))
        return results


def _swept(
    frames: Sequence[Frames],
    transcripts: Sequence[str],
    rows: Rows,
    fold: int,
    plan: Sweep,
    seeds: Sequence[int],
    workspace: Workspace,
    clock: Clock,
) -> Iterator[HeadResult]:
    with np.errstate(invalid="ignore", over="ignore"), pool_of(1) as pool:
        standardisation = Standardisation.of(_Clips(frames, rows.train), pool)
    if not standardisation.finite:
        raise ScoreUndefinedError(RUNAWAY)
    affine = torch.from_numpy(standardisation.mean).float(), torch.from_numpy(standardisation.inverse).float()

    def learner(seed: int, rate: float) -> _Learner:
        rng = generator(seed, fold)
        return _Learner(frames, transcripts, rows, plan.batch_size, rng, workspace, rate=rate, affine=affine)

    return swept(learner, fold, rows, seeds, plan, clock)


class _Clips:
    """The frames of some clips, as `standardised.Blocks`: a clip per block."""

    def __init__(self, frames: Sequence[Frames], clips: Indices) -> None:
        self.blocks = len(clips)
        self.count = max(1, sum(len(frames[clip]) for clip in clips))
        self._frames, self._clips = frames, clips

    def block(self, number: int) -> npt.NDArray[np.float32]:
        return np.array(self._frames[self._clips[number]], np.float32)


class _Learner:
    """One head in training. `affine` is the mean and inverse deviation that standardise frames, if they are standardised."""

    def __init__(
        self,
        frames: Sequence[Frames],
        transcripts: Sequence[str],
        rows: Rows,
        batch_size: int,
        rng: np.random.Generator,
        workspace: Workspace,
        *,
        rate: float = math.nan,
        affine: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._frames, self._transcripts, self._rows = frames, transcripts, rows
        self._batch_size, self._rng, self._workspace, self._affine = batch_size, rng, workspace, affine
        self._alphabet = sorted(set().union(*(transcripts[clip] for clip in rows.train)))
        self._classes = {character: number for number, character in enumerate(self._alphabet, start=1)}
        self._dim = frames[0].shape[1]
        self._head = CtcHead(self._dim, 1 + len(self._alphabet), rng)
        self._adam = torch.optim.Adam([nn.Parameter(parameter) for parameter in self._head.parameters], fused=True)
        for parameter, gradient in zip(self._adam.param_groups[0]["params"], self._head.gradients, strict=True):
            parameter.grad = gradient
        self._best = [parameter.clone() for parameter in self._head.parameters]
        self.rate, self.epoch, self.selection = rate, 0, Selection()

    def train(self) -> None:
        self._adam.param_groups[0]["lr"] = self.rate
        order = self._rng.permutation(self._rows.train)
        for start in range(0, len(order), self._batch_size):
            x, _, gradient = self._losses(order[start : start + self._batch_size])
            self._head.backward(x, gradient)
            self._adam.step()

    def _losses(self, clips: Indices) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised frames of a batch, losses (clips,), and the gradient at the logits; the next call overwrites them."""
        frames = [self._frames[clip] for clip in clips]
        targets = [np.array([self._classes[character] for character in self._transcripts[clip]]) for clip in clips]
        x = self._normalised(frames)
        losses, gradient = ctc_gradient(self._head.logits(x), [len(clip) for clip in frames], targets, self._workspace)
        return x, losses, gradient

    def selected(self) -> tuple[float, float]:
        return self.valid_score(), self._valid_loss()

    def valid_score(self) -> float:
        if not len(self._rows.valid):
            return math.nan
        references = [self._transcripts[clip] for clip in self._rows.valid]
        errors, characters = character_errors(references, self._hypotheses(self._rows.valid)).sum(axis=0).tolist()
        return 1 - float(errors / characters)

    def _valid_loss(self) -> float:
        """Mean over the clips whose characters the head knows."""
        clips = np.array([clip for clip in self._rows.valid if set(self._transcripts[clip]) <= self._classes.keys()], int)
        if not len(clips):
            return math.nan if not len(self._rows.valid) else 0.0
        batches = [clips[start : start + self._batch_size] for start in range(0, len(clips), self._batch_size)]
        return sum(float(self._losses(batch)[1].sum()) for batch in batches) / len(clips)

    def keep(self) -> None:
        for kept, parameter in zip(self._best, self._head.parameters, strict=True):
            kept.copy_(parameter)

    def save(self) -> None:
        """Keep no checkpoint: a training is short."""

    def finish(self) -> None:
        for kept, parameter in zip(self._best, self._head.parameters, strict=True):
            parameter.copy_(kept)

    def score(self, rows: Indices) -> float:
        """1 - word error rate, not below 0."""
        references = [text.normalise(self._transcripts[clip]) for clip in rows]
        hypotheses = [text.normalise(hypothesis) for hypothesis in self._hypotheses(rows)]
        return float(word_accuracy(word_errors(references, hypotheses).sum(axis=0).astype(np.float64)))

    def predict(self) -> tuple[Indices, list[str]]:
        examples = np.unique(self._rows.test)
        return examples, self._hypotheses(examples)

    def _hypotheses(self, clips: Indices) -> list[str]:
        texts = []
        for clip in clips:
            frames, path = self._frames[clip], [np.empty(0, np.int64)]
            for start in range(0, len(frames), _ROWS_SCORED_AT_ONCE):
                logits = self._head.logits(self._normalised([frames[start : start + _ROWS_SCORED_AT_ONCE]]))
                check_finite(logits)
                path.append(logits.argmax(dim=1).numpy())
            texts.append("".join(self._alphabet[number - 1] for number in collapse(np.concatenate(path))))
        return texts

    def _normalised(self, clips: Sequence[Frames]) -> Tensor:
        """The clips' frames one after another (frames, dim), standardised if the head is swept, then normalised, in float32.

        The next call overwrites them.
        """
        x = self._workspace.take("frames", sum(map(len, clips)), self._dim)
        end = 0
        for clip in clips:
            for start in range(0, len(clip), _ROWS_READ_AT_ONCE):
                # A copy, because torch rejects read-only memory; torch's conversion, because numpy's is slow.
                part = torch.from_numpy(np.array(clip[start : start + _ROWS_READ_AT_ONCE])).float()
                if self._affine is not None:
                    mean, inverse = self._affine
                    part.sub_(mean).mul_(inverse)
                x[end : end + len(part)] = normalised(part)
                end += len(part)
        return x
