"""Heads without an optimum: trained at several learning rates, each until it stops improving on the selection clips.

The first seed's head is trained at every rate and chooses one for its fold; the other seeds are trained at that rate. A
sweep by every seed would cost seeds times rates trainings, to choose among the same rates on the same few clips. Each
training stops on its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import ScoreUndefinedError
from .training import RUNAWAY, HeadResult, Indices, OnEpoch, Rows, Selection
from .tuning import Convergence, Trial, Tuning, finite_or_none

MOST_UPDATES = 150_000  # of one training: 42 epochs of 28,500 clips in batches of eight


@dataclass(frozen=True)
class Sweep:
    """The constant learning `rates` of a sweep, ascending, and when each training stops.

    A training ends after `patience` epochs without a new best score or a new lowest loss on the selection clips (a CTC head
    writes nothing for a while, though its loss falls), at an output or a loss that is not finite, or after `epochs`, or
    fewer if these are more than `MOST_UPDATES` batches. The best epoch has the highest score; of equal ones the lowest loss;
    of equals it is the first. The best rate is chosen likewise, the lower of equals. But a score that counts whole clips,
    right or wrong (`counts_clips`), often cannot tell rates apart if the clips are few, and the highest is luck: then the
    best rate has the lowest loss among those whose score is at most a standard error below the highest. Without selection
    clips the middle rate is taken, with all `epochs`.
    """

    rates: tuple[float, ...]
    batch_size: int
    epochs: int
    patience: int
    counts_clips: bool = False

    @property
    def steps(self) -> int:
        """Epochs of all rates; `Clock` counts up to this number."""
        return len(self.rates) * self.epochs

    def most_epochs(self, rows: int) -> int:
        """The most epochs of a training on so many rows."""
        return min(self.epochs, max(1, MOST_UPDATES // max(1, math.ceil(rows / self.batch_size))))


class Clock:
    """Reports the progress of all trainings to `on_epoch`, in the sweep's `steps`.

    A training that stops early counts with all its epochs.
    """

    def __init__(self, plan: Sweep, folds: int, seeds: int, on_epoch: OnEpoch) -> None:
        self._plan, self._on_epoch = plan, on_epoch
        self._trainings = folds * (len(plan.rates) + seeds - 1)
        self._before, self._steps = 0, 0

    def epoch_ended(self, epoch: int) -> None:
        """Report that an epoch of the training in progress ended, counted from 1."""
        steps = (self._before * self._plan.epochs + epoch) * self._plan.steps // (self._trainings * self._plan.epochs)
        if steps > self._steps:
            self._steps = steps
            self._on_epoch(steps)

    def trainings_ended(self, count: int = 1) -> None:
        """Report that so many trainings ended, or will not be needed."""
        self._before += count
        self.epoch_ended(0)


class Learner(Protocol):
    """One head, while it is trained at one rate."""

    epoch: int
    """The last trained epoch; above 0 from the start if it resumes an interrupted training."""
    selection: Selection

    def train(self) -> None:
        """Train one epoch."""

    def selected(self) -> tuple[float, float]:
        """Score and mean loss of the present weights on the selection clips; nan without any.

        Raises `ScoreUndefinedError` if an output is not finite.
        """

    def keep(self) -> None:
        """Remember the present weights as the best."""

    def save(self) -> None:
        """Write a checkpoint after this epoch, for heads that keep one."""

    def finish(self) -> None:
        """Restore the best weights, and free the memory that only training needs."""

    def score(self, rows: Indices) -> float:
        """Score of the present weights on some rows; higher is better, nan if it is not defined."""

    def predict(self) -> tuple[Indices, Any]:
        """Test examples and predictions by the present weights, as in `HeadResult`."""


def swept(
    make: Callable[[int, float], Learner], fold: int, rows: Rows, seeds: Sequence[int], plan: Sweep, clock: Clock
) -> Iterator[HeadResult]:
    """Train the heads of one fold, by ascending seed, one at a time; the first seed's heads are kept until one is chosen.

    Args:
        make: Makes a fresh learner from a seed and a rate.
        fold: Number of the fold.
        rows: Rows of the fold.
        seeds: At least one; the smallest chooses the rate.
        plan: Rates to try, and when a training stops.
        clock: Shared by all folds.

    Raises:
        ScoreUndefinedError: No rate gives a head with finite outputs, or the head at the chosen rate gives NaN or infinity
            on the test rows.
    """
    first, *others = sorted(seeds)
    rates = plan.rates if len(rows.valid) else (plan.rates[len(plan.rates) // 2],)
    trials: list[Trial] = []
    trained: list[_Trained] = []
    for rate in rates:
        learner = make(first, rate)
        limit_reached = _train(learner, rows, plan, clock)
        trials.append(_trial(learner, rate, rows))
        if learner.selection.epoch:
            trained.append(_Trained(rate, learner, limit_reached))
        del learner
    clock.trainings_ended(len(plan.rates) - len(rates))
    if not trained:
        raise ScoreUndefinedError(RUNAWAY)
    rate, learner, limit_reached = _best(trained, len(rows.valid) if plan.counts_clips else None)
    trained.clear()
    yield _result(learner, fold, first, rows, rate, trials, limit_reached)
    for seed in others:
        del learner
        learner = make(seed, rate)
        limit_reached = _train(learner, rows, plan, clock)
        if not learner.selection.epoch:
            raise ScoreUndefinedError(RUNAWAY)
        yield _result(learner, fold, seed, rows, rate, trials, limit_reached)


class _Trained(NamedTuple):
    rate: float
    learner: Learner
    limit_reached: bool


def _best(trained: Sequence[_Trained], clips: int | None) -> _Trained:
    """The lowest loss of the highest score, or of those that so many right or wrong clips cannot tell from it."""
    if len(trained) == 1:
        return trained[0]
    least = max(one.learner.selection.score for one in trained)
    if clips is not None:
        least -= math.sqrt(max(0.0, least * (1 - least)) / clips)
    return min((one for one in trained if one.learner.selection.score >= least), key=lambda one: one.learner.selection.loss)


def _train(learner: Learner, rows: Rows, plan: Sweep, clock: Clock) -> bool:
    """Train to the end; returns whether the last epoch allowed was reached while the head still improved."""
    selects, finite, epochs = len(rows.valid) > 0, True, plan.most_epochs(len(rows.train))
    while finite and learner.epoch < epochs:
        if selects and learner.epoch - learner.selection.improved >= plan.patience:
            break
        learner.epoch += 1
        learner.train()
        try:
            score, loss = learner.selected()
        except ScoreUndefinedError:
            score, loss = math.nan, math.inf
        finite = not math.isinf(loss) and math.isnan(loss) != selects
        if finite:
            if learner.selection.better(score, learner.epoch, loss):
                learner.keep()
            learner.save()
            clock.epoch_ended(learner.epoch)
    clock.trainings_ended()
    learner.finish()
    return selects and finite and learner.epoch - learner.selection.improved < plan.patience


def _trial(learner: Learner, rate: float, rows: Rows) -> Trial:
    if not learner.selection.epoch:
        return Trial(setting=rate, selection=None, test=None)
    return Trial(
        setting=rate, selection=finite_or_none(learner.selection.score), test=finite_or_none(_score(learner, rows.test))
    )


def _result(
    learner: Learner, fold: int, seed: int, rows: Rows, rate: float, trials: list[Trial], limit_reached: bool
) -> HeadResult:
    selection = learner.selection
    # As many rows as selection has, so that the two scores compare: a recall depends on the number of clips to confuse.
    count = min(len(rows.valid) or len(rows.test), len(rows.train))
    trained = rows.train[np.linspace(0, len(rows.train) - 1, count).astype(np.int64)]
    tuning = Tuning(
        setting="learning rate",
        tried=trials,
        chosen=[rate],
        convergence=Convergence(iterations=selection.epoch, limit_reached=limit_reached),
        train=finite_or_none(_score(learner, trained)),
    )
    return HeadResult(fold, seed, *learner.predict(), selection.epoch, selection.score, tuning)


def _score(learner: Learner, rows: Indices) -> float:
    try:
        return learner.score(rows)
    except ScoreUndefinedError:
        return math.nan
