"""Train linear heads on frames: every fold and every seed in one loop, the frames read block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.sound_events import Events, Floats
from ..metrics import segments
from ..metrics.segments import Average, Bools
from ..models.linear import LinearHeads, binary_cross_entropy_gradient, normalised
from . import linear, training
from .training import HeadResult, Indices, OnEpoch, Rows, Selection, check_finite, generator, learning_rate, one_thread

_FRAMES_AT_ONCE = 512  # read, normalised and multiplied together: 1.5 MiB of 768 dimensions, which a cache holds


class Settings(training.Settings, Protocol):
    """With the weight of positives in the loss."""

    @property
    def positive_weight(self) -> float: ...


@dataclass(frozen=True)
class _Clips:
    """The clips of a set and their targets, by frame and by segment; a clip is read anew each time, and not kept."""

    frames: Sequence[npt.NDArray[Any]]
    times: Sequence[Floats]
    seconds: Sequence[float]
    events: Sequence[Events]
    classes: int
    segment_seconds: float
    hop_seconds: float | None

    def targets(self, clip: int) -> Bools:
        """(frames, classes)."""
        if self.hop_seconds is not None:
            return segments.xares_frame_targets(self.events[clip], len(self.frames[clip]), self.hop_seconds, self.classes)
        return segments.frame_targets(self.events[clip].within(self.seconds[clip]), self.times[clip], self.classes)

    def segment_targets(self, clip: int) -> Bools:
        """(segments, classes)."""
        if self.hop_seconds is not None:
            return segments.xares_segments(self.targets(clip), self.hop_seconds, self.segment_seconds)
        return segments.segment_targets(self.events[clip], self.seconds[clip], self.segment_seconds, self.classes)

    def segment_predictions(self, clip: int, active: Bools) -> Bools:
        """(segments, classes), from the `active` frames (frames, classes) of a head."""
        if self.hop_seconds is not None:
            return segments.xares_segments(active, self.hop_seconds, self.segment_seconds)
        return segments.segment_predictions(active, self.times[clip], self.seconds[clip], self.segment_seconds)

    def blocks(self, clips: Indices) -> Iterator[Tensor]:
        """The frames of some clips one after another, (block, dim) float32, normalised."""
        pieces: list[npt.NDArray[Any]] = []
        room = _FRAMES_AT_ONCE
        for clip in clips:
            frames = self.frames[clip]
            while len(frames):
                pieces.append(frames[:room])
                frames, room = frames[room:], room - len(pieces[-1])
                if not room:
                    yield _normalised(pieces)
                    pieces, room = [], _FRAMES_AT_ONCE
        if pieces:
            yield _normalised(pieces)


def _normalised(pieces: list[npt.NDArray[Any]]) -> Tensor:
    return normalised(torch.from_numpy(np.concatenate(pieces)).float())


class FrameHeads(LinearHeads):
    """Heads that fold the affine part of LayerNorm into their weights, because these are far smaller than their input.

    logits = (x scale + shift) W + b = x (scale W) + (shift W + b), so a block costs two matrix products, one forward and one
    backward, and no other work per value but the normalisation. For the gradient G at the logits, with M = x^T G and g = 1^T
    G, the chain rule gives scale M + shift g for W, g for b, and the sums over classes of W M and W g for scale and shift. M
    and g add up over the blocks of a batch.

    `models.ctc.CtcHead` has the same algebra with classes first, the faster layout for one head and a few long products. Its
    sums round differently, so the two are not one function.
    """

    def folded(self, head: int) -> tuple[Tensor, Tensor]:
        """(dim, classes) weight and (1, classes) bias that map normalised frames to logits."""
        return self.scale[head].T * self.weight[head], torch.addmm(self.bias[head], self.shift[head], self.weight[head])

    def fill_gradients(self, head: int, clips: _Clips, batch: Indices, positive_weight: float) -> None:
        """Fill a head's `gradients`, of the mean loss over all frames and classes of a batch of clips."""
        targets = torch.from_numpy(np.concatenate([clips.targets(clip) for clip in batch]))
        mean = torch.full((1, 1), 1 / len(targets))
        weight, bias = self.folded(head)
        moment, total = torch.zeros_like(weight), torch.zeros_like(bias)
        start = 0
        for x in clips.blocks(batch):
            logits = torch.addmm(bias, x, weight)[None]
            block = targets[None, start : start + len(x)]
            gradient = binary_cross_entropy_gradient(logits, block, mean, positive_weight)[0]
            moment.addmm_(x.T, gradient)
            total += gradient.sum(dim=0)
            start += len(x)
        for_scale, for_shift, for_weight, for_bias = (gradient[head] for gradient in self.gradients)
        torch.sum(self.weight[head] * moment, dim=1, out=for_scale[0])
        torch.sum(self.weight[head] * total, dim=1, out=for_shift[0])
        torch.addmm(moment * self.scale[head].T, self.shift[head].T, total, out=for_weight)
        for_bias.copy_(total)


def train_frames(
    frames: Sequence[npt.NDArray[Any]],
    times: Sequence[Floats],
    seconds: Sequence[float],
    events: Sequence[Events],
    folds: Sequence[Rows],
    classes: int,
    settings: Settings,
    seeds: Sequence[int],
    *,
    segment_seconds: float,
    average: Average,
    hop_seconds: float | None = None,
    on_epoch: OnEpoch = lambda epoch: None,
) -> list[HeadResult]:
    """Train len(folds) x len(seeds) heads on the frames of clips, by binary cross-entropy for each class.

    A batch is `batch_size` clips; its loss is the mean over all their frames and classes, in which a positive counts
    `positive_weight` times. The epoch is chosen by the F1 over segments of the validation clips.

    Args:
        frames: (frames, dim) float16 or float32 per clip, at least one frame; read anew whenever needed, so they may be
            mapped from a file.
        times: (frames,) centres of each clip's frames in seconds, ascending.
        seconds: Duration of each clip.
        events: Events of each clip.
        folds: Clip numbers.
        classes: Number of classes.
        settings: Epochs, batch size, learning rate and weight of positives.
        seeds: One head each per fold.
        segment_seconds: Length of a segment.
        average: Of the F1, over classes or over segments.
        hop_seconds: With it, frames and segments lie on X-ARES's raster; without, on the clock.
        on_epoch: Called with the number of the epoch that ended.

    Returns:
        Results sorted by fold and seed; `predictions` are the `segment_counts` of the test clips, (clips, classes, 3) int64.

    Raises:
        ScoreUndefinedError: A head gives NaN or infinity.
    """
    clips = _Clips(frames, times, seconds, events, classes, segment_seconds, hop_seconds)
    with one_thread(), torch.inference_mode():
        # Heads with more batches come first, so that the heads still in training are always the leading ones.
        order = sorted(((f, s) for f in range(len(folds)) for s in seeds), key=lambda head: -len(folds[head[0]].train))
        generators = [generator(seed, fold) for fold, seed in order]
        heads = FrameHeads(frames[0].shape[1], classes, generators)
        adam = linear.BatchedAdam(heads)
        selections = [Selection() for _ in order]
        best_state = [parameter.clone() for parameter in heads.parameters]
        for epoch in range(1, settings.epochs + 1):
            rate = learning_rate(epoch, settings.epochs, settings.learning_rate)
            orders = [rng.permutation(folds[fold].train) for rng, (fold, _) in zip(generators, order, strict=True)]
            for start in range(0, len(orders[0]), settings.batch_size):
                batches = [rows[start : start + settings.batch_size] for rows in orders if start < len(rows)]
                for h, batch in enumerate(batches):
                    heads.fill_gradients(h, clips, batch, settings.positive_weight)
                adam.step(len(batches), rate)
            counts = _count(heads, clips, [folds[fold].valid for fold, _ in order])
            for h, (_, by_clip) in enumerate(counts):
                f1 = segments.segment_f1(by_clip.sum(axis=0), average, present_only=hop_seconds is None)
                if selections[h].better(float(f1) if len(by_clip) else math.nan, epoch):
                    for kept, parameter in zip(best_state, heads.parameters, strict=True):
                        kept[h] = parameter[h]
            on_epoch(epoch)
        for parameter, kept in zip(heads.parameters, best_state, strict=True):
            parameter.copy_(kept)
        tested = _count(heads, clips, [folds[fold].test for fold, _ in order])
        results = [
            HeadResult(fold, seed, *tested[h], selections[h].epoch, selections[h].score)
            for h, (fold, seed) in enumerate(order)
        ]
        return sorted(results, key=lambda result: (result.fold, result.seed))


def _count(heads: FrameHeads, clips: _Clips, chosen: Sequence[Indices]) -> list[tuple[Indices, Indices]]:
    """Each head's chosen clips, sorted, and their segment counts (clips, classes, 3). A clip is read once for all heads."""
    examples = [np.unique(rows) for rows in chosen]
    counts = [np.zeros((len(rows), clips.classes, 3), np.int64) for rows in examples]
    folded = [heads.folded(h) for h in range(len(chosen))]
    for clip in np.unique(np.concatenate(examples)):
        active_heads = [h for h, rows in enumerate(examples) if clip in rows]
        active = np.empty((len(active_heads), len(clips.frames[clip]), clips.classes), np.bool_)
        start = 0
        for x in clips.blocks(np.array([clip])):
            for row, h in enumerate(active_heads):
                weight, bias = folded[h]
                logits = torch.addmm(bias, x, weight)
                check_finite(logits)
                active[row, start : start + len(x)] = (logits > 0).numpy()
            start += len(x)
        targets = clips.segment_targets(clip)
        for row, h in enumerate(active_heads):
            predictions = clips.segment_predictions(clip, active[row])
            counts[h][np.searchsorted(examples[h], clip)] = segments.segment_counts(targets, predictions)
    return list(zip(examples, counts, strict=True))
