"""Shared by the training of every head: rows, learning rate, generator, the choice of the epoch, the result.

The arithmetic by `Settings` is X-ARES's: Adam without weight decay, epoch e of N at lr x (0.55 + 0.45 cos(pi (e-1)/N)), the
last short batch kept, and the first strict maximum of the validation score chosen. Heads of `corrected` follow `sweep`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ScoreUndefinedError
from .tuning import Tuning

if TYPE_CHECKING:  # more than a second to import, and only some heads need it
    from torch import Tensor

Indices = npt.NDArray[np.int64]
OnEpoch = Callable[[int], None]  # called with the number of the epoch that ended, counted from 1

RUNAWAY = "the trained head gives NaN or infinity, so there is no score; the embeddings may be too large for it"


class Settings(Protocol):
    """A task's settings for the training of its head (`task.Head`)."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...


@dataclass(frozen=True)
class Rows:
    """Row numbers of one fold: crops for heads on pooled vectors, clips for heads on frames."""

    train: Indices
    valid: Indices
    test: Indices


@dataclass(frozen=True)
class HeadResult:
    """One head's predictions for the fold's test `examples` (sorted, unique), and how it was chosen.

    `predictions` has a row per example; a row's content depends on the kind of head. `valid_score` is nan if the fold has no
    validation rows: then the last epoch was chosen.
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
        """Whether this epoch replaces the best one so far."""
        if loss < self.lowest_loss:
            self.lowest_loss, self.improved = loss, epoch
        if not math.isnan(score) and not (score, -loss) > (self.score, -self.loss):
            return False
        self.score, self.loss, self.epoch = score, loss, epoch
        self.improved = epoch
        return True


def learning_rate(epoch: int, epochs: int, base: float) -> float:
    """X-ARES's curve; `epoch` counts from 1."""
    return base * (0.55 + 0.45 * math.cos(math.pi * (epoch - 1) / epochs))


def generator(seed: int, fold: int) -> np.random.Generator:
    """The generator of all draws of one head: first its weights, then the order of its rows in every epoch."""
    return np.random.default_rng([seed, fold])


def check_finite(outputs: Tensor) -> None:
    """Raise `ScoreUndefinedError` if a head gives NaN or infinity."""
    import torch

    if not bool(torch.isfinite(outputs).all()):
        raise ScoreUndefinedError(RUNAWAY)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that the result does not depend on their number.

    The products are small: on a busy machine, threads that wait for each other cost up to ten times the work.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
