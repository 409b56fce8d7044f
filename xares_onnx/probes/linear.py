"""Train linear heads on pooled embeddings: every fold and every seed at once, in one batched loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..metrics.average_precision import AveragePrecisionScorer
from ..metrics.bootstrap import point
from ..models.linear import LinearHeads, binary_cross_entropy_gradient, cross_entropy_gradient, normalised
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

_VALUES_AT_ONCE = 1 << 24  # most embedding values or logits held at once when scoring, 64 MiB


class Objective(Protocol):
    """The loss, the prediction and the score of a linear head. `targets` has a row per crop."""

    outputs: int
    targets: npt.NDArray[Any]

    def gradient(self, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the loss at the logits (n, batch, outputs); each crop's loss counts `weight` (n, batch) times."""

    def activation(self, logits: Tensor) -> Tensor:
        """Values (crops, outputs) whose mean over an example's crops decides its prediction."""

    def decide(self, means: Tensor) -> npt.NDArray[Any]:
        """Predictions, a row per example, from the means of their crops' activations (examples, outputs)."""

    def score(self, predictions: npt.NDArray[Any], targets: npt.NDArray[Any]) -> float:
        """The score that selects the epoch; higher is better, nan if it is not defined."""


class Classification:
    """Cross-entropy; the class of the largest mean probability; accuracy. `targets` (crops,) class indices."""

    def __init__(self, targets: Indices, classes: int) -> None:
        self.targets, self.outputs = targets, classes

    def gradient(self, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy_gradient(logits, targets, weight)

    def activation(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=1)

    def decide(self, means: Tensor) -> Indices:
        decided: Indices = means.argmax(dim=1).numpy()
        return decided

    def score(self, predictions: Indices, targets: Indices) -> float:
        return float((predictions == targets).mean())


class Tagging:
    """Binary cross-entropy for each class; probabilities; macro average precision. `targets` (crops, classes) bool."""

    def __init__(self, targets: npt.NDArray[np.bool_], positive_weight: float, *, present_only: bool) -> None:
        self.targets, self.outputs = targets, targets.shape[1]
        self._positive_weight = positive_weight
        self._present_only = present_only

    def gradient(self, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return binary_cross_entropy_gradient(logits, targets, weight, self._positive_weight)

    def activation(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def decide(self, means: Tensor) -> npt.NDArray[np.float32]:
        decided: npt.NDArray[np.float32] = means.numpy()
        return decided

    def score(self, predictions: npt.NDArray[np.float32], targets: npt.NDArray[np.bool_]) -> float:
        examples = np.arange(len(targets))
        scorer = AveragePrecisionScorer(predictions[None], targets, examples, len(examples), present_only=self._present_only)
        return float(point([scorer])[0, 0])


class Regression:
    """Squared error; numbers. `targets` (crops,). With `bounds`, trained on their scale 0..1, and clipped to them."""

    outputs = 1

    def __init__(self, targets: npt.NDArray[np.float64], bounds: tuple[float, float] | None) -> None:
        self.targets = targets
        self._bounds = bounds
        self._low, self._range = (bounds[0], bounds[1] - bounds[0]) if bounds else (0.0, 1.0)

    def gradient(self, logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        scaled = ((targets - self._low) / self._range).to(logits.dtype)
        return (logits - scaled[:, :, None]).mul_(2 * weight[:, :, None])

    def activation(self, logits: Tensor) -> Tensor:
        return logits

    def decide(self, means: Tensor) -> npt.NDArray[np.float64]:
        numbers: npt.NDArray[np.float64] = means[:, 0].double().numpy() * self._range + self._low
        return np.clip(numbers, *self._bounds) if self._bounds else numbers

    def score(self, predictions: npt.NDArray[np.float64], targets: npt.NDArray[np.float64]) -> float:
        return -float(((predictions - targets) ** 2).mean())


def train_linear(
    embeddings: npt.NDArray[np.float32],
    objective: Objective,
    examples: Indices,
    folds: Sequence[Rows],
    settings: Settings,
    seeds: Sequence[int],
    *,
    on_epoch: OnEpoch = lambda epoch: None,
) -> list[HeadResult]:
    """Train len(folds) x len(seeds) heads on crops.

    Args:
        embeddings: (crops, dim).
        objective: Loss, prediction and score.
        examples: (crops,) the example of each crop; its prediction comes from the mean over its crops.
        folds: Crop numbers.
        settings: Epochs, batch size and learning rate.
        seeds: One head each per fold.
        on_epoch: Called with the number of the epoch that ended.

    Returns:
        Results sorted by fold and seed.

    Raises:
        ScoreUndefinedError: A head gives NaN or infinity, or an embedding is not finite.
    """
    with one_thread(), torch.inference_mode():
        x = normalised(torch.from_numpy(np.ascontiguousarray(embeddings)))
        check_finite(x)
        y = torch.from_numpy(objective.targets)
        # Heads with more batches come first, so that the heads still in training are always the leading ones.
        order = sorted(((f, s) for f in range(len(folds)) for s in seeds), key=lambda head: -len(folds[head[0]].train))
        generators = [generator(seed, fold) for fold, seed in order]
        heads = LinearHeads(x.shape[1], objective.outputs, generators)
        adam = BatchedAdam(heads)
        selections = [Selection() for _ in order]
        best_state = [parameter.clone() for parameter in heads.parameters]
        for epoch in range(1, settings.epochs + 1):
            rate = learning_rate(epoch, settings.epochs, settings.learning_rate)
            orders = [rng.permutation(folds[fold].train) for rng, (fold, _) in zip(generators, order, strict=True)]
            for index, weight in _batches(orders, settings.batch_size):
                batch = x.index_select(0, index.flatten()).view(*index.shape, -1)
                heads.backward(batch, objective.gradient(heads.logits(batch), y[index], weight))
                adam.step(len(index), rate)
            for h, (fold, _) in enumerate(order):
                if selections[h].better(_validate(heads, h, x, objective, examples, folds[fold].valid), epoch):
                    for kept, parameter in zip(best_state, heads.parameters, strict=True):
                        kept[h] = parameter[h]
            on_epoch(epoch)
        for parameter, kept in zip(heads.parameters, best_state, strict=True):
            parameter.copy_(kept)
        results = []
        for h, (fold, seed) in enumerate(order):
            prediction = _predict(heads, h, x, objective, examples, folds[fold].test)
            results.append(HeadResult(fold, seed, *prediction, selections[h].epoch, selections[h].score))
        return sorted(results, key=lambda result: (result.fold, result.seed))


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


class BatchedAdam:
    """torch's fused Adam over stacked parameters; only the first n heads take a step.

    To the optimiser, each head's slice is a parameter of its own: so a head without a batch stays as it is (with a zero
    gradient its momentum would still move it) and counts its own steps.
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


def _predict(
    heads: LinearHeads, head: int, x: Tensor, objective: Objective, examples: Indices, crops: Indices
) -> tuple[Indices, npt.NDArray[Any]]:
    """The examples of some crops, sorted, and their predictions, by the mean of the crops' activations."""
    unique, positions, counts = np.unique(examples[crops], return_inverse=True, return_counts=True)
    outputs = heads.bias.shape[2]
    totals = torch.zeros(len(unique), outputs)
    rows = max(1, _VALUES_AT_ONCE // max(outputs, x.shape[1]))
    for start in range(0, len(crops), rows):
        index = torch.from_numpy(crops[start : start + rows])
        activation = objective.activation(heads.logits_of(head, x[index]))
        totals.index_add_(0, torch.from_numpy(positions[start : start + rows]), activation)
    check_finite(totals)
    return unique, objective.decide(totals / torch.from_numpy(counts)[:, None])


def _validate(heads: LinearHeads, head: int, x: Tensor, objective: Objective, examples: Indices, crops: Indices) -> float:
    if not len(crops):
        return math.nan
    unique, predictions = _predict(heads, head, x, objective, examples, crops)
    targets = np.empty((len(unique), *objective.targets.shape[1:]), objective.targets.dtype)
    targets[np.searchsorted(unique, examples[crops])] = objective.targets[crops]
    return objective.score(predictions, targets)
