"""Convex heads on pooled embeddings: fitted until they converge, without any draw, so that the embeddings decide the score.

One fold is one call, a pure function of its arrays, so that several may run at once. Rows are standardised by the mean and
deviation of the crops that a head is fitted on. A head is fitted for every strength of a grid on the training crops; the
strength with the best score on the selection clips wins (of equal ones the lower log loss, then the stronger), and with it
the head is fitted anew on training and held-out crops, standardised by those. The test score of each strength's fit on the
training crops is reported and decides nothing.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from ..errors import ScoreUndefinedError
from ..metrics.average_precision import AveragePrecisionScorer
from ..metrics.bootstrap import point
from ..models import ridge
from ..models.logistic import MAX_ITERATIONS, Loss, Multinomial, OneOfTwo, OneVersusRest, Solution, path
from ..models.standardised import Design, Head, MatrixRows, Pool, Rows, pool_of, rows_at_once
from . import tuning
from .training import Indices
from .training import Rows as RowNumbers

Floats = npt.NDArray[np.float64]
Result = TypeVar("Result")

# Of the mean loss on standardised rows: scikit-learn's C is 1 / (strength x crops). Eleven values over eight decades.
LOGISTIC_STRENGTHS = tuple(float(f"{10 ** (1 - 0.8 * step):.3g}") for step in range(11))
# Of the mean squared error: scikit-learn's alpha is strength x crops. They cost next to nothing: 21 values over ten decades.
RIDGE_STRENGTHS = tuple(float(f"{10 ** (4 - 0.5 * step):.3g}") for step in range(21))
# Of the relative gradient norm. Over random divisions of the class tasks of `make realdata`, 94 % of the heads chose the
# strength that they choose at the optimum, and 4 % of the test scores were more than 0.02 from the score then (at 1e-2: 78 %
# and 6 to 9 %, for 0.86 of the passes; at 1e-3: 96 % and 2 %, for 1.38). Refining only the strengths that may win saved
# nothing. In the last fit 1 of 860 decisions differed from the optimum (at 1e-4 none, for 1.1 times the passes).
SELECTION_TOLERANCE = 3e-3
TOLERANCE = 3e-4
PATH_TOLERANCE = 3e-2  # of the stronger fits that lead to the last one
LEAST_PROBABILITY = 1e-15  # in log losses


@dataclass(frozen=True)
class FoldRows(RowNumbers):
    """Crops of one fold; `held_out` are those of training clips that select, which the last fit is trained on too."""

    held_out: Indices


@dataclass(frozen=True)
class Convergence:
    """See `logistic.Solution`."""

    relative_gradient_norm: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Fit:
    """A head, the strength of its penalty, and how well it converged; `axes` speed up the next fit on similar rows.

    Of a head on a mix of layers, `shares` are their weights, by name.
    """

    head: Head
    strength: float
    convergence: Convergence
    axes: Floats | None = None
    shares: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Tried:
    """A strength with its scores and its mean log loss on the selection examples; nan if they are not defined."""

    strength: float
    selection: float
    log_loss: float
    test: float
    convergence: Convergence


@dataclass(frozen=True)
class ConvexResult:
    """Predictions for the fold's test `examples` (sorted, unique), a row each, and how the head was chosen.

    `chosen` is an index of `tried`; `convergence`, the `train` score and the `shares` of mixed layers are those of the last
    fit, which predicts.
    """

    fold: int
    examples: Indices
    predictions: Any
    tried: Sequence[Tried]
    chosen: int
    convergence: Convergence
    train: float
    seed: int = 0
    shares: Mapping[str, float] | None = None

    @property
    def valid_score(self) -> float:
        return self.tried[self.chosen].selection

    @property
    def tuning(self) -> tuning.Tuning:
        """How the strength was chosen, for the record; an undefined score is None."""
        return tuning.Tuning(
            setting="L2 strength",
            tried=[
                tuning.Trial(
                    setting=tried.strength,
                    selection=tuning.finite_or_none(tried.selection),
                    test=tuning.finite_or_none(tried.test),
                )
                for tried in self.tried
            ],
            chosen=[self.tried[self.chosen].strength],
            convergence=tuning.Convergence(
                iterations=self.convergence.iterations,
                limit_reached=not all(c.converged for c in (self.convergence, *(t.convergence for t in self.tried))),
                relative_gradient_norm=self.convergence.relative_gradient_norm,
            ),
            train=tuning.finite_or_none(self.train),
            mix=None if self.shares is None else {layer: [share] for layer, share in self.shares.items()},
        )


class Objective(Protocol):
    """The fit, the prediction and the score of a convex head. `targets` has a row per crop."""

    targets: npt.NDArray[Any]
    strengths: Sequence[float]
    without_selection: float  # the strength in the absence of selection clips

    def fits(self, rows: Rows, pool: Pool) -> Iterator[Fit]:
        """A fit for each strength, from the strongest on."""

    def refit(self, rows: Rows, pool: Pool, near: Fit) -> Fit:
        """A fit with the strength of `near`, which was fitted on similar rows."""

    def activation(self, head: Head, block: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Values (crops, outputs) whose mean over an example's crops decides its prediction; may overwrite the crops."""

    def decide(self, means: Floats) -> npt.NDArray[Any]:
        """Predictions, a row per example, from the means of their crops' activations (examples, outputs)."""

    def log_loss(self, means: Floats, targets: npt.NDArray[Any]) -> float:
        """Sum of the log losses of some examples."""

    def score(self, predictions: npt.NDArray[Any], targets: npt.NDArray[Any]) -> float:
        """The score that selects the strength; higher is better, nan if it is not defined."""


# ---------------------------------------------------------------- one fold


def fit_fold(
    embeddings: npt.NDArray[np.float32],
    objective: Objective,
    examples: Indices,
    rows: FoldRows,
    *,
    fold: int = 0,
    threads: int = 1,
    device: str | None = None,
    on_fit: Callable[[], None] = lambda: None,
) -> ConvexResult:
    """Choose the strength, fit, and predict the test examples of one fold.

    Args:
        embeddings: (crops, dim).
        objective: Fit, prediction and score.
        examples: (crops,) the example of each crop; its prediction comes from the mean over its crops.
        rows: Crops of the fold.
        fold: Number of the fold, for the result.
        threads: Share the passes over the rows; any number gives the same bytes.
        device: torch device for large passes; the CPU makes all of them by default.
        on_fit: Called after each fit.

    Raises:
        ScoreUndefinedError: An embedding or a prediction is not finite.
    """
    with np.errstate(all="ignore"), pool_of(threads, device) as pool:
        scoring = _Scoring(embeddings, objective, examples, pool)
        tried: list[Tried] = []
        near: Fit | None = None
        chosen = 0
        for fit in objective.fits(MatrixRows(embeddings, rows.train, objective.targets), pool):
            (selection, log_loss), (test, _) = (scoring.score(fit.head, crops) for crops in (rows.valid, rows.test))
            tried.append(Tried(fit.strength, selection, log_loss, test, fit.convergence))
            default = objective.without_selection if not len(rows.valid) else None
            if near is None or better(tried[-1], tried[chosen], default):
                near, chosen = fit, len(tried) - 1
            del fit  # so that its head is gone before the next is made
            on_fit()
        assert near is not None
        all_train = np.concatenate([rows.train, rows.held_out])
        last = objective.refit(MatrixRows(embeddings, all_train, objective.targets), pool, near)
        tested, predictions, _ = scoring.predict(last.head, rows.test)
        train, _ = scoring.score(last.head, all_train)
        on_fit()
        return ConvexResult(fold, tested, predictions, tried, chosen, last.convergence, train, shares=last.shares)


def train_convex(
    embeddings: npt.NDArray[np.float32],
    objective: Objective,
    examples: Indices,
    folds: Sequence[FoldRows],
    *,
    threads: int = 1,
    device: str | None = None,
    on_fit: Callable[[int], None] = lambda fits: None,
) -> list[ConvexResult]:
    """`fit_fold` of every fold, several at once; `on_fit` is called with the number of `fits` done."""

    def fit(fold: int, threads: int, fitted: Callable[[], None]) -> ConvexResult:
        return fit_fold(
            embeddings, objective, examples, folds[fold], fold=fold, threads=threads, device=device, on_fit=fitted
        )

    return over_folds(fit, len(folds), threads, on_fit)


def fits(strengths: Sequence[float], folds: int) -> int:
    """The number of fits: for each fold one per strength, and the last one."""
    return folds * (len(strengths) + 1)


def over_folds(
    fit: Callable[[int, int, Callable[[], None]], Result], folds: int, threads: int, on_fit: Callable[[int], None]
) -> list[Result]:
    """Call `fit(fold, threads, fitted)` for every fold; returns the results in order.

    As many folds run at once as there are threads; if there are more threads than folds, each fold has a share. This thread
    calls `on_fit` with the number of calls of `fitted` so far. The first error ends every fold.
    """
    events: SimpleQueue[Future[Result] | None] = SimpleQueue()
    stopped = threading.Event()

    def fitted() -> None:
        if stopped.is_set():
            raise _StoppedError
        events.put(None)

    workers = min(threads, folds)
    with pool_of(1), ThreadPoolExecutor(workers) as executor:  # one limit for all folds, because BLAS has one per process
        futures = [executor.submit(fit, fold, threads // workers, fitted) for fold in range(folds)]
        for future in futures:
            future.add_done_callback(events.put)
        done, running = 0, folds
        try:
            while running:
                event = events.get()
                if event is None:
                    done += 1
                    on_fit(done)
                else:
                    event.result()
                    running -= 1
        except BaseException:
            stopped.set()
            executor.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


class _StoppedError(Exception):
    """Another fold failed, or the run was interrupted."""


def better(new: Tried, best: Tried, default: float | None) -> bool:
    """Whether a new trial beats the best one so far.

    Between equal scores, undefined ones too, the lower log loss wins; between equal losses the stronger, which came first.
    With a `default` strength, for want of selection clips, the strength nearest to it wins.
    """
    if default is not None:
        return abs(math.log(new.strength / default)) < abs(math.log(best.strength / default))
    scores = [-np.inf if np.isnan(tried.selection) else tried.selection for tried in (new, best)]
    return scores[0] > scores[1] or (scores[0] == scores[1] and new.log_loss < best.log_loss)


class _Scoring:
    """Predicts and scores examples from their crops, in parts, so that memory never holds a matrix of all outputs."""

    def __init__(self, embeddings: npt.NDArray[np.float32], objective: Objective, examples: Indices, pool: Pool) -> None:
        self._embeddings, self._objective, self._examples, self._pool = embeddings, objective, examples, pool

    def score(self, head: Head, crops: Indices) -> tuple[float, float]:
        """(score, mean log loss); nan without crops."""
        if not len(crops):
            return math.nan, math.nan
        examples, predictions, log_loss = self.predict(head, crops)
        targets = np.empty((len(examples), *self._objective.targets.shape[1:]), self._objective.targets.dtype)
        targets[np.searchsorted(examples, self._examples[crops])] = self._objective.targets[crops]
        return self._objective.score(predictions, targets), log_loss / len(examples)

    def predict(self, head: Head, crops: Indices) -> tuple[Indices, npt.NDArray[Any], float]:
        """(examples, their predictions, the sum of their log losses)."""
        crops = crops[np.argsort(self._examples[crops], kind="stable")]
        examples, starts = np.unique(self._examples[crops], return_index=True)
        bounds = np.append(starts, len(crops))
        # Each part begins with the first example that starts behind another `rows_at_once` crops.
        firsts = np.unique(np.searchsorted(starts, np.arange(0, len(crops), rows_at_once(self._embeddings.shape[1]))))
        firsts = np.append(firsts[firsts < len(examples)], len(examples))

        def part(number: int) -> tuple[npt.NDArray[Any], float]:
            first, last = firsts[number : number + 2]
            block = self._embeddings[crops[bounds[first] : bounds[last]]]
            if not np.isfinite(block).all():
                raise undefined()
            activation = self._objective.activation(head, block)
            means = _means(activation, bounds[first : last + 1] - bounds[first])
            if not np.isfinite(means).all():
                raise undefined()
            targets = self._objective.targets[crops[bounds[first:last]]]
            return self._objective.decide(means), self._objective.log_loss(means, targets)

        parts = list(self._pool.map(part, len(firsts) - 1))
        return examples, np.concatenate([predictions for predictions, _ in parts]), sum(loss for _, loss in parts)


def _means(activation: npt.NDArray[Any], bounds: Indices) -> npt.NDArray[Any]:
    """Means of the rows from each bound to the next; the mean of equal rows is exactly that row."""
    counts = np.diff(bounds)
    if (counts == 1).all():
        return activation
    first = activation[bounds[:-1]].astype(np.float64)
    distances = activation - np.repeat(first, counts, axis=0)
    return np.asarray(first + np.add.reduceat(distances, bounds[:-1], axis=0) / counts[:, None])


def undefined() -> ScoreUndefinedError:
    return ScoreUndefinedError(
        "the trained head gives NaN or infinity, so there is no score; the embeddings may be too large for it"
    )


def standardised_design(rows: Rows, pool: Pool, axes: Floats | None = None) -> Design:
    """The design of some rows. Raises `ScoreUndefinedError` if one is not finite."""
    design = Design(rows, pool, axes)
    if not design.standardisation.finite:
        raise undefined()
    return design


# ---------------------------------------------------------------- objectives


class Logistic:
    """The base of classes, tags and events. Classes that the rows cannot teach are left out of the fit."""

    strengths: Sequence[float] = LOGISTIC_STRENGTHS
    without_selection = 1e-3
    outputs: int

    def loss(self, rows: Rows) -> tuple[Loss, Floats]:
        """The loss, and biases (classes,) for the classes that it leaves out."""
        raise NotImplementedError

    def fits(self, rows: Rows, pool: Pool) -> Iterator[Fit]:
        design = standardised_design(rows, pool)
        loss, bias = self.loss(rows)
        if not (loss.outputs and design.variances.any()):
            yield from (_constant(design, loss, bias, strength) for strength in self.strengths)
            return
        for solution in path(design, loss, self.strengths, SELECTION_TOLERANCE, MAX_ITERATIONS):
            yield self._fit(design, loss, solution, bias)

    def refit(self, rows: Rows, pool: Pool, near: Fit) -> Fit:
        design = standardised_design(rows, pool, near.axes)
        loss, bias = self.loss(rows)
        if not (loss.outputs and design.variances.any()):
            return _constant(design, loss, bias, near.strength)
        # Start not at the weights of `near`, because held-out rows lie far on the wrong side of some of its boundaries; nor
        # a few strengths above: at ESC-50's size that took 1.1 times the passes from four above, 1.5 times from one.
        strengths = [*(s for s in self.strengths if s > near.strength), near.strength]
        *_, solution = path(design, loss, strengths, PATH_TOLERANCE, MAX_ITERATIONS, last_tolerance=TOLERANCE)
        return self._fit(design, loss, solution, bias)

    def _fit(self, design: Design, loss: Loss, solution: Solution, bias: Floats) -> Fit:
        solved = design.head(solution.theta)
        weight = np.zeros((design.rows.dim, self.outputs), np.float32)
        weight[:, loss.taught] = solved.weight
        bias = bias.copy()
        bias[loss.taught] = solved.bias
        convergence = Convergence(solution.relative_gradient_norm, solution.iterations, solution.converged)
        return Fit(Head(design.standardisation, weight, bias), solution.strength, convergence, design.reusable_axes)


def _constant(design: Design, loss: Loss, bias: Floats, strength: float) -> Fit:
    """The fit if nothing tells the rows apart: each output's probability is its frequency."""
    bias = bias.copy()
    bias[loss.taught] = loss.start(design)
    head = Head(design.standardisation, np.zeros((design.rows.dim, len(bias))), bias)
    return Fit(head, strength, Convergence(0.0, 0, True))


class Classes(Logistic):
    """Multinomial, or of two classes binary; the class of the largest mean probability; accuracy.

    `targets` are (crops,) class indices. A class without a training crop is never predicted.
    """

    def __init__(self, targets: Indices, classes: int) -> None:
        self.targets, self.outputs = targets, classes

    def loss(self, rows: Rows) -> tuple[Loss, Floats]:
        counts = np.asarray(sum(np.bincount(rows.targets(number), minlength=self.outputs) for number in range(rows.blocks)))
        bias = np.full(self.outputs, -np.inf)
        if np.count_nonzero(counts) != 2:
            return Multinomial(counts), bias
        bias[np.flatnonzero(counts)[0]] = 0.0  # against which the other class is measured
        return OneOfTwo(counts), bias

    def activation(self, head: Head, block: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        logits = head.logits(block)
        logits -= logits.max(axis=1, keepdims=True)
        weights = np.exp(logits, out=logits)
        return np.asarray(weights / weights.sum(axis=1, keepdims=True))

    def decide(self, means: Floats) -> Indices:
        return np.asarray(means.argmax(axis=1))

    def log_loss(self, means: Floats, targets: Indices) -> float:
        true = means[np.arange(len(means)), targets].astype(np.float64)
        return -float(np.log(np.maximum(true, LEAST_PROBABILITY)).sum())

    def score(self, predictions: Indices, targets: Indices) -> float:
        return float((predictions == targets).mean())


class OneAgainstTheRest(Logistic):
    """The base of tags and events: a class that no training row has, or every one, gets the probability 0 or 1."""

    def __init__(self, classes: int, positive_weight: float) -> None:
        self.outputs, self._positive_weight = classes, positive_weight

    def loss(self, rows: Rows) -> tuple[Loss, Floats]:
        positives = np.asarray(sum(rows.targets(number).sum(axis=0) for number in range(rows.blocks)))
        loss = OneVersusRest(positives, rows.count, self._positive_weight)
        return loss, np.where(positives > 0, np.inf, -np.inf)


class Tags(OneAgainstTheRest):
    """Probabilities; macro average precision. `targets` (crops, classes) bool."""

    def __init__(self, targets: npt.NDArray[np.bool_], positive_weight: float, *, present_only: bool = True) -> None:
        super().__init__(targets.shape[1], positive_weight)
        self.targets = targets
        self._present_only = present_only

    def activation(self, head: Head, block: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.asarray(expit(head.logits(block)))

    def decide(self, means: Floats) -> npt.NDArray[np.float32]:
        return means.astype(np.float32)

    def log_loss(self, means: Floats, targets: npt.NDArray[np.bool_]) -> float:
        means = means.astype(np.float64)
        true = np.where(targets, means, 1 - means)
        return -float(np.log(np.maximum(true, LEAST_PROBABILITY)).mean(axis=1).sum())

    def score(self, predictions: npt.NDArray[np.float32], targets: npt.NDArray[np.bool_]) -> float:
        examples = np.arange(len(targets))
        scorer = AveragePrecisionScorer(predictions[None], targets, examples, len(examples), present_only=self._present_only)
        return float(point([scorer])[0, 0])


class Numbers:
    """Ridge; numbers, clipped to the `bounds`; minus the mean squared error. `targets` (crops,)."""

    strengths: Sequence[float] = RIDGE_STRENGTHS
    without_selection = 1.0

    def __init__(self, targets: Floats, bounds: tuple[float, float] | None) -> None:
        self.targets, self._bounds = targets, bounds

    def fits(self, rows: Rows, pool: Pool) -> Iterator[Fit]:
        return self._fits(rows, pool, self.strengths)

    def refit(self, rows: Rows, pool: Pool, near: Fit) -> Fit:
        return next(self._fits(rows, pool, [near.strength]))

    def _fits(self, rows: Rows, pool: Pool, strengths: Sequence[float]) -> Iterator[Fit]:
        design = standardised_design(rows, pool)
        for solution in ridge.solutions(design, strengths):
            convergence = Convergence(solution.relative_gradient_norm, solution.iterations, solution.converged)
            yield Fit(design.head(solution.theta), solution.strength, convergence)

    def activation(self, head: Head, block: npt.NDArray[np.float32]) -> Floats:
        products = head.standardisation.apply(block) @ head.weight
        return np.asarray(products.astype(np.float64) + head.bias)

    def decide(self, means: Floats) -> Floats:
        numbers = means[:, 0]
        return np.clip(numbers, *self._bounds) if self._bounds else numbers

    def log_loss(self, means: Floats, targets: Floats) -> float:
        """Sum of squared errors: the log loss of a normal distribution, up to constants."""
        return float(np.square(self.decide(means) - targets).sum())

    def score(self, predictions: Floats, targets: Floats) -> float:
        return -float(((predictions - targets) ** 2).mean())
