"""Train linear heads on stored embeddings: every fold and every seed at once, in one batched loop.

The arithmetic is X-ARES's: Adam without weight decay, epoch e of N at lr x (0.55 + 0.45 cos(pi (e-1)/N)), the last short
batch kept, and the first strict maximum of the validation accuracy chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .models.linear import LinearHeads, cross_entropy_gradient, normalised
from .task import Head

Indices = npt.NDArray[np.int64]
_VALUES_AT_ONCE = 1 << 24  # most embedding values or logits held at once when scoring, 64 MiB


@dataclass(frozen=True)
class CropFold:
    """Crop indices of one fold."""

    train: Indices
    valid: Indices
    test: Indices


@dataclass(frozen=True)
class HeadResult:
    """One head's test predictions, a class for each of the fold's `examples` (sorted, unique), and how it was chosen."""

    fold: int
    seed: int
    examples: Indices
    predictions: Indices
    best_epoch: int
    valid_accuracy: float


def learning_rate(epoch: int, epochs: int, base: float) -> float:
    """X-ARES's curve; `epoch` counts from 1."""
    return base * (0.55 + 0.45 * math.cos(math.pi * (epoch - 1) / epochs))


def train_linear(
    embeddings: npt.NDArray[np.float32],
    labels: Indices,
    examples: Indices,
    folds: Sequence[CropFold],
    classes: int,
    settings: Head,
    seeds: Sequence[int],
    *,
    on_epoch: Callable[[int], None] = lambda epoch: None,
) -> list[HeadResult]:
    """Train len(folds) x len(seeds) heads on crops.

    `embeddings` (crops, dim), `labels` (crops,) class indices, `examples` (crops,) the example that a crop is scored with:
    an example's prediction is the class of the largest mean probability over its crops.
    """
    with _one_thread(), torch.inference_mode():
        x = normalised(torch.from_numpy(np.ascontiguousarray(embeddings)))
        y = torch.from_numpy(labels)
        # Heads with more batches come first, so that those which still train are always the leading ones.
        order = sorted(((f, s) for f in range(len(folds)) for s in seeds), key=lambda head: -len(folds[head[0]].train))
        generators = [np.random.default_rng([seed, fold]) for fold, seed in order]
        heads = LinearHeads(x.shape[1], classes, generators)
        adam = _BatchedAdam(heads)
        best = [(-1.0, 0)] * len(order)
        best_state = [parameter.clone() for parameter in heads.parameters]
        for epoch in range(1, settings.epochs + 1):
            rate = learning_rate(epoch, settings.epochs, settings.learning_rate)
            orders = [rng.permutation(folds[fold].train) for rng, (fold, _) in zip(generators, order, strict=True)]
            for index, weight in _batches(orders, settings.batch_size):
                batch = x.index_select(0, index.flatten()).view(*index.shape, -1)
                heads.backward(batch, cross_entropy_gradient(heads.logits(batch), y[index], weight))
                adam.step(len(index), rate)
            for h, (fold, _) in enumerate(order):
                accuracy = _accuracy(heads, h, x, labels, examples, folds[fold].valid)
                # Without validation clips the last epoch is taken.
                if accuracy > best[h][0] or math.isnan(accuracy):
                    best[h] = (accuracy, epoch)
                    for kept, parameter in zip(best_state, heads.parameters, strict=True):
                        kept[h] = parameter[h]
            on_epoch(epoch)
        for parameter, kept in zip(heads.parameters, best_state, strict=True):
            parameter.copy_(kept)
        results = []
        for h, (fold, seed) in enumerate(order):
            tested, predictions = _predict(heads, h, x, examples, folds[fold].test)
            results.append(HeadResult(fold, seed, tested, predictions, best[h][1], best[h][0]))
        return sorted(results, key=lambda result: (result.fold, result.seed))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The products are small: threads that wait for each other on a busy machine cost up to ten times the work.

    Nor may the result depend on the number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batches(orders: list[Indices], size: int) -> list[tuple[Tensor, Tensor]]:
    """For each step: crop indices (active heads, batch), and each crop's weight in its head's mean loss.

    A short last batch is filled up with crops of weight 0.
    """
    steps = math.ceil(len(orders[0]) / size)
    padded = np.zeros((len(orders), steps * size), np.int64)
    weights = np.zeros((len(orders), steps * size), np.float32)
    for row, order in enumerate(orders):
        padded[row, : len(order)] = order
        weights[row, : len(order)] = 1
    batches = []
    for step in range(steps):
        active = sum(len(order) > step * size for order in orders)
        index = padded[:active, step * size : (step + 1) * size]
        weight = weights[:active, step * size : (step + 1) * size]
        batches.append((torch.from_numpy(index), torch.from_numpy(weight / weight.sum(axis=1, keepdims=True))))
    return batches


class _BatchedAdam:
    """torch's fused Adam over stacked parameters, of which only the first n heads take a step.

    Each head's slice is a parameter of its own to the optimiser, so that a head without a batch is left as it is (a zero
    gradient would still move it, by its momentum) and counts its own steps.
    """

    def __init__(self, heads: LinearHeads) -> None:
        self._slices = [
            [(nn.Parameter(part), part_gradient) for part, part_gradient in zip(parameter, gradient, strict=True)]
            for parameter, gradient in zip(heads.parameters, heads.gradients, strict=True)
        ]
        self._adam = torch.optim.Adam([part for parts in self._slices for part, _ in parts], fused=True)

    def step(self, active: int, rate: float) -> None:
        for parts in self._slices:
            for h, (part, gradient) in enumerate(parts):
                part.grad = gradient if h < active else None
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()


def _predict(heads: LinearHeads, head: int, x: Tensor, examples: Indices, crops: Indices) -> tuple[Indices, Indices]:
    """(examples, their predicted classes) over some crops, by the mean of the crops' probabilities."""
    found, positions = np.unique(examples[crops], return_inverse=True)
    classes = heads.bias.shape[2]
    totals = torch.zeros(len(found), classes)
    rows = max(1, _VALUES_AT_ONCE // max(classes, x.shape[1]))
    for start in range(0, len(crops), rows):
        index = torch.from_numpy(crops[start : start + rows])
        probabilities = heads.logits_of(head, x[index]).softmax(dim=1)
        totals.index_add_(0, torch.from_numpy(positions[start : start + rows]), probabilities)
    return found, totals.argmax(dim=1).numpy()


def _accuracy(heads: LinearHeads, head: int, x: Tensor, labels: Indices, examples: Indices, crops: Indices) -> float:
    if not len(crops):
        return math.nan
    found, predictions = _predict(heads, head, x, examples, crops)
    truth = np.empty(len(found), np.int64)
    truth[np.searchsorted(found, examples[crops])] = labels[crops]
    return float((predictions == truth).mean())
