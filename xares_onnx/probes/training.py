"""What the training of every head shares: who trains, the learning rate, the choice of the epoch, what comes out.

The arithmetic by `Settings` is X-ARES's: Adam without weight decay, epoch e of N at lr x (0.55 + 0.45 cos(pi (e-1)/N)), the
last short batch kept, and the first strict maximum of the validation score chosen. `sweep` has the other one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ScoreUndefinedError
from .tuning import Tuning

Indices = npt.NDArray[np.int64]
OnEpoch = Callable[[int], None]  # called with the number of the epoch that ended, counted from 1

RUNAWAY = "the trained head gives NaN or infinity, so there is no score; the embeddings may be too large for it"


class Settings(Protocol):
    """What a task says of the training of its head (`task.Head`)."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...


@dataclass(frozen=True)
class Rows:
    """Row numbers of one fold: crops where a head sees pooled vectors, clips where it sees frames."""

    train: Indices
    valid: Indices
    test: Indices


@dataclass(frozen=True)
class HeadResult:
    """One head's predictions for the fold's test `examples` (sorted, unique), and how it was chosen.

    `predictions` has a row an example; what a row is depends on the kind of head. `valid_score` is nan where the fold has no
    validation rows: the last epoch was taken.
    """

    fold: int
    seed: int
    examples: Indices
    predictions: Any
    best_epoch: int
    valid_score: float
    tuning: Tuning | None = None


class Selection:
    """The choice of the epoch: the first strict maximum of the validation score; without scores (nan) the last epoch.

    With losses, the lower one decides between equal scores; `improved` is the last epoch in which either was at its best.
    """

    def __init__(self) -> None:
        self.score, self.loss, self.epoch = -math.inf, math.inf, 0
        self.lowest_loss, self.improved = math.inf, 0

    def better(self, score: float, epoch: int, loss: float = 0.0) -> bool:
        """Whether this epoch is to be kept instead of the one before."""
        if loss < self.lowest_loss:
            self.lowest_loss, self.improved = loss, epoch
        if not math.isnan(score) and not (score, -loss) > (self.score, -self.loss):
            return False
        self.score, self.loss, self.epoch = score, loss, epoch
        self.improved = epoch
        return True

    def exceeds(self, other: Selection) -> bool:
        return (self.score, -self.loss) > (other.score, -other.loss)


def learning_rate(epoch: int, epochs: int, base: float) -> float:
    """X-ARES's curve; `epoch` counts from 1."""
    return base * (0.55 + 0.45 * math.cos(math.pi * (epoch - 1) / epochs))


def generator(seed: int, fold: int) -> np.random.Generator:
    """Where every draw of one head comes from: first its weights, then the order of its rows in every epoch."""
    return np.random.default_rng([seed, fold])


def uniform(rng: np.random.Generator, shape: tuple[int, ...], bound: float) -> Tensor:
    """float32 values within `bound` of 0, as torch draws the weights of a layer."""
    return torch.from_numpy(rng.uniform(-bound, bound, shape)).float()


def check_finite(outputs: Tensor) -> None:
    """`ScoreUndefinedError` where a head gives NaN or infinity: whatever is made of those is no score."""
    if not bool(torch.isfinite(outputs).all()):
        raise ScoreUndefinedError(RUNAWAY)


@contextmanager
def one_thread() -> Iterator[None]:
    """The products are small: threads that wait for each other on a busy machine cost up to ten times the work.

    Nor may the result depend on the number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
