"""Problems that pooled heads learn, and the plainest torch that learns them: the reference of the tests."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from torch import nn

from xares_onnx.data.task import Head
from xares_onnx.probes.training import Rows

DIM = 8
NAMES = ("wind", "rain", "dog", "tram", "bell", "hum")
LOW, HIGH = 20.0, 60.0
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Indices = NDArray[np.int64]
ScoreOf = Callable[[NDArray[Any], NDArray[Any]], float]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- the reference


def precision_of_present(scores: NDArray[Any], targets: Bools) -> float:
    present = targets.any(axis=0)
    return float(average_precision_score(targets[:, present], scores[:, present])) if present.any() else math.nan


def precision_of_all(scores: NDArray[Any], targets: Bools) -> float:
    """X-ARES's: every class counts, one without positives 0."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No positive class found")
        return float(average_precision_score(targets, scores))


def minus_squared_error(numbers: Floats, targets: Floats) -> float:
    return -float(np.mean((numbers - targets) ** 2))


@dataclass
class Reference:
    """What one plain head does. `outputs` are of the chosen epoch, an example of the test part each."""

    outputs: NDArray[Any] = field(default_factory=lambda: np.empty(0))
    epoch: int = 0
    valid_scores: list[float] = field(default_factory=list)
    moved: float = 0.0  # furthest that a weight went


def train_one(
    embeddings: NDArray[np.float32],
    learnt: NDArray[Any],
    loss: nn.Module,
    examples: Indices,
    rows: Rows,
    valid_score: Callable[[NDArray[Any], Indices], float],
    head: Head,
    draws: tuple[int, int],
    activation: Callable[[torch.Tensor], torch.Tensor] = lambda outputs: outputs,
) -> Reference:
    """LayerNorm and Linear by autograd and Adam, from weights drawn for (seed, fold): weight, bias, an order an epoch.

    `learnt` (crops, outputs) is what the loss sees, `valid_score` is given outputs and the examples that they are of.
    """
    draw, outputs = rng(list(draws)), learnt.shape[1]  # type: ignore[arg-type]
    model = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, outputs))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor(draw.uniform(-(DIM**-0.5), DIM**-0.5, (DIM, outputs)).T))
        model[1].bias.copy_(torch.tensor(draw.uniform(-(DIM**-0.5), DIM**-0.5, (1, outputs))[0]))
    x, y = torch.from_numpy(embeddings), torch.from_numpy(learnt).float()
    start = model[1].weight.detach().clone()

    def predict(crops: Indices) -> tuple[NDArray[Any], Indices]:
        with torch.no_grad():
            values = activation(model(x[crops])).numpy()
        owners = np.unique(examples[crops])
        return np.stack([values[examples[crops] == owner].mean(axis=0) for owner in owners]), owners

    adam = torch.optim.Adam(model.parameters())
    found = Reference()
    for epoch in range(1, head.epochs + 1):
        for group in adam.param_groups:
            group["lr"] = head.learning_rate * (0.55 + 0.45 * math.cos(math.pi * (epoch - 1) / head.epochs))
        order = draw.permutation(rows.train)
        for first in range(0, len(order), head.batch_size):
            batch = order[first : first + head.batch_size]
            adam.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            adam.step()
        value = valid_score(*predict(rows.valid)) if len(rows.valid) else math.nan
        if math.isnan(value) or not found.epoch or value > max(found.valid_scores):
            found.epoch, found.outputs = epoch, predict(rows.test)[0]
        found.valid_scores.append(value)
    found.moved = float((model[1].weight.detach() - start).abs().max())
    return found


# ---------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    embeddings: NDArray[np.float32]  # (crops, dim)
    examples: Indices  # (crops,)
    tags: Bools  # (examples, classes)
    numbers: Floats  # (examples,)
    folds: list[Rows]


def problem(sizes: Sequence[tuple[int, int, int]], *, crops: int = 3, seed: int = 0, noise: float = 1.0) -> Problem:
    """Folds of (train, valid, test) examples of 1 to `crops` crops. Rarer classes come last, and the last never."""
    draw = rng(seed)
    count = max(sum(size) for size in sizes)
    tags = draw.random((count, len(NAMES))) < [0.5, 0.4, 0.3, 0.2, 0.15, 0]
    examples = np.repeat(np.arange(count), draw.integers(1, crops + 1, count))
    directions = draw.standard_normal((len(NAMES), DIM))
    clean = tags @ directions + 0.5 * draw.standard_normal((count, DIM))
    embeddings = clean[examples] + noise * draw.standard_normal((len(examples), DIM))
    embeddings = embeddings * draw.uniform(0.5, 20, (len(examples), 1)) + 3  # LayerNorm must matter
    numbers = np.clip(41 + 8 * (clean @ directions[0]) / np.linalg.norm(directions[0]), LOW, HIGH)
    folds = []
    for train, valid, test in sizes:
        order = draw.permutation(count)
        parts = np.split(order[: train + valid + test], [train, train + valid])
        folds.append(Rows(*(np.flatnonzero(np.isin(examples, part)) for part in parts)))
    return Problem(embeddings.astype(np.float32), examples, tags, numbers, folds)


UNEQUAL = [(40, 12, 30), (61, 15, 20), (23, 20, 40)]  # last batches short, epochs of different lengths
HEAD = Head(epochs=7, batch_size=16, learning_rate=0.03)


def replace_head(head: Head, **changes: Any) -> Head:
    named = {name: getattr(head, name) for name in head.__struct_fields__}
    return Head(**{**named, **changes})
