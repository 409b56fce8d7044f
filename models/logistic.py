"""L2-regularised logistic regression to a stated tolerance, over falling strengths, each extrapolated from the last.

The objective of a strength s is mean loss over rows + s/2 ||W||^2 on standardised rows, the bias free of it: scikit-learn's
C is 1 / (s rows), and s means the same at every size.

The method is L-BFGS whose first guess of the curvature is c_k v_j + s for axis j (variance v_j) and output k, with c_k the
mean of p(1 - p) over the rows, taken anew in every step. On 1,440 rows, 768 dimensions and 50 classes, eleven strengths over
eight decades take some 90 passes over the rows to a relative gradient norm of 1e-3. Two things make the weakest strengths
as fast as the others, though separable rows drive their weights far out: residuals and losses are computed without
cancellation, so that those of 1e-9 are right in float32 (with cancellation, L-BFGS ended in thousands of failing line
searches); and a strength starts at 2 t1 - t2 of the two solutions before it, on the path if the steps of log s are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .standardised import Design, Floats, Indices, Singles

MAX_ITERATIONS = 500
_MEMORY = 8  # steps that L-BFGS remembers
_MAX_TRIALS = 12  # of the length of a step
_TINY = 1e-300
LEAST_CURVATURE = 1e-12


class Loss(Protocol):
    """A loss over outputs. `groups` (outputs,) numbers the outputs that depend on each other: each group is its own problem.

    `taught` (outputs,) is the class of each output; a class that the rows cannot teach has no output.
    """

    outputs: int
    groups: Indices
    taught: Indices

    def start(self, design: Design) -> Floats:
        """(outputs,) the best biases if the weights are 0."""

    def step(self, logits: Singles, targets: npt.NDArray[Any], columns: Indices) -> tuple[Singles, Floats]:
        """Residuals (rows, columns), dloss/dlogits, of a block, and sums (2, columns); may overwrite the logits.

        `columns` are the outputs of the logits. The sums are those of the loss, whose division within a group is arbitrary,
        and of its second derivative.
        """


class Multinomial:
    """Cross-entropy of the classes that have a row; targets are (rows,) class indices.

    `counts` (classes,) are the rows of each class; the outputs are the classes `taught`.
    """

    def __init__(self, counts: Indices) -> None:
        self.taught = np.flatnonzero(counts)
        self.outputs = len(self.taught)
        self.groups = np.zeros(self.outputs, np.int64)
        self._counts = counts[self.taught]
        self._output_of = np.cumsum(counts > 0) - 1

    def start(self, design: Design) -> Floats:
        logs = np.log(self._counts / self._counts.sum())
        return np.asarray(logs - logs.mean())

    def step(self, logits: Singles, targets: Indices, columns: Indices) -> tuple[Singles, Floats]:
        rows = np.arange(len(logits))
        targets = self._output_of[targets]
        logits -= logits.max(axis=1, keepdims=True)
        true = logits[rows, targets].astype(np.float64)
        weights = np.exp(logits, out=logits)
        of_true = weights[rows, targets]
        weights[rows, targets] = 0
        others = weights.sum(axis=1)
        total = others + of_true
        # If the true class leads, its logit is 0 and the loss log(1 + others), however small the others are.
        loss = np.where(true == 0, np.log1p(others.astype(np.float64)), np.log(total.astype(np.float64)) - true)
        weights /= total[:, None]
        wrong = others / total
        curvature = weights.sum(axis=0, dtype=np.float64) - np.einsum("ij,ij->j", weights, weights)
        curvature += np.bincount(targets, (of_true / total * wrong).astype(np.float64), self.outputs)
        weights[rows, targets] = -wrong
        sums = np.stack([np.zeros(self.outputs), curvature])
        sums[0, 0] = loss.sum()
        return weights, sums


class OneVersusRest:
    """Binary cross-entropy of each output by itself, that of a positive times `positive_weight`.

    Targets are (rows, classes) bool. `positives` (classes,) are the rows with each class, of all `rows`; the outputs are the
    classes `taught`, which some rows have and some lack.
    """

    def __init__(self, positives: Indices, rows: int, positive_weight: float) -> None:
        self.taught = np.flatnonzero((positives > 0) & (positives < rows))
        self.outputs = len(self.taught)
        self.groups = np.arange(self.outputs)
        self._positive_weight = positive_weight
        positives = positives[self.taught]
        self._start = np.log(positives * positive_weight / (rows - positives))

    def start(self, design: Design) -> Floats:
        return np.asarray(self._start)

    def step(self, logits: Singles, targets: npt.NDArray[np.bool_], columns: Indices) -> tuple[Singles, Floats]:
        positive = targets[:, self.taught[columns]]
        distance = np.where(positive, logits, -logits)  # from the boundary, on the right side
        small = np.exp(-np.abs(distance))
        weight = np.where(positive, np.float32(self._positive_weight), np.float32(1))
        loss = weight * (np.log1p(small) + np.maximum(-distance, 0))
        wrong = np.where(distance > 0, small, np.float32(1)) / (1 + small)
        residual = weight * np.where(positive, -wrong, wrong)
        curvature = weight * small / np.square(1 + small)
        return residual, np.stack([loss.sum(axis=0, dtype=np.float64), curvature.sum(axis=0, dtype=np.float64)])


@dataclass(frozen=True)
class Solution:
    """`theta` (rank + 1, outputs) in the design's coordinates, the bias last.

    `relative_gradient_norm` is the largest over the groups of ||gradient|| / ||W||, the gradient measured by the inverse of
    the curvature and W by the curvature, so that it estimates the relative error of W whether the loss or the penalty bends
    the objective. `converged` says whether it is at most the tolerance; it is not if `iterations` reached the limit, or if
    float32 could go no further.
    """

    strength: float
    theta: Floats
    relative_gradient_norm: float
    iterations: int
    converged: bool


def path(
    design: Design, loss: Loss, strengths: Sequence[float], tolerance: float, max_iterations: int = MAX_ITERATIONS
) -> Iterator[Solution]:
    """The solution of each strength, from the strongest on, which starts at zero weights.

    Args:
        design: Standardised rows.
        loss: Loss over their outputs.
        strengths: Falling by equal factors.
        tolerance: Of the relative gradient norm.
        max_iterations: Per strength.
    """
    theta = np.concatenate([np.zeros((design.rank, loss.outputs)), loss.start(design)[None]])
    before: _Point | None = None
    earlier: Floats | None = None
    for strength in strengths:
        start = theta if earlier is None else 2 * theta - earlier
        solution, end = _Problem(design, loss, strength).solve(start, tolerance, max_iterations, before)
        earlier = None if before is None else theta
        theta, before = solution.theta, end
        yield solution


def solve(
    design: Design, loss: Loss, strength: float, theta: Floats, tolerance: float, max_iterations: int = MAX_ITERATIONS
) -> Solution:
    """The solution of one strength, starting at `theta` (rank + 1, outputs)."""
    return _Problem(design, loss, strength).solve(theta, tolerance, max_iterations, None)[0]


@dataclass
class _Point:
    """The result of a pass over the rows at `theta` (rank + 1, outputs), without the penalty.

    The mean loss (outputs,), its gradient, and the mean second derivative at the logits (outputs,), `bend`.
    """

    theta: Floats
    loss: Floats
    gradient: Floats
    bend: Floats

    def take(self, columns: Indices, other: _Point) -> None:
        """Replace some outputs by those of `other`, a point of just these outputs, in order."""
        if len(columns) == len(self.loss):
            self.theta, self.loss, self.gradient, self.bend = other.theta, other.loss, other.gradient, other.bend
            return
        self.theta[:, columns], self.gradient[:, columns] = other.theta, other.gradient
        self.loss[columns], self.bend[columns] = other.loss, other.bend

    def of(self, columns: Indices) -> _Point:
        """The point of some outputs only."""
        if len(columns) == len(self.loss):
            return self
        return _Point(self.theta[:, columns], self.loss[columns], self.gradient[:, columns], self.bend[columns])


class _Problem:
    def __init__(self, design: Design, loss: Loss, strength: float) -> None:
        self._design, self._loss, self._strength = design, loss, strength
        self._penalty = np.append(np.full(design.rank, strength), 0.0)[:, None]
        self._variances = np.append(design.variances, 1.0)[:, None]
        self._groups = int(loss.groups.max()) + 1

    def _per_group(self, values: Floats) -> Floats:
        """(outputs,) to (groups,) sums."""
        return np.asarray(np.bincount(self._loss.groups, values, self._groups), np.float64)

    def _dot(self, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Floats:
        """(groups,) dot products of two (rank + 1, outputs)."""
        if self._groups == 1:
            return np.array([np.vdot(a, b)], np.float64)
        return self._per_group(np.einsum("ij,ij->j", a, b, dtype=np.float64))

    def _evaluate(self, theta: Floats, columns: Indices) -> _Point:
        """The point at `theta` (rank + 1, columns) of some outputs, which are whole groups."""

        def step(logits: Singles, targets: npt.NDArray[Any]) -> tuple[Singles, Floats]:
            return self._loss.step(logits, targets, columns)

        gradient, sums = self._design.moments(step, theta)
        gradient /= self._design.rows.count
        sums /= self._design.rows.count
        return _Point(theta, sums[0], gradient, sums[1])

    def _objective(self, point: _Point) -> Floats:
        """(outputs,)"""
        return np.asarray(point.loss + self._strength / 2 * np.square(point.theta[:-1]).sum(axis=0))

    def _gradient(self, point: _Point) -> Floats:
        return point.gradient + self._penalty * point.theta

    def _curvature(self, curvature: Floats) -> Floats:
        """(rank + 1, outputs) guess of the diagonal of the Hessian."""
        return np.asarray(np.maximum(curvature, LEAST_CURVATURE) * self._variances + self._penalty)

    def _relative_norm(self, theta: Floats, gradient: Floats, curvature: Floats) -> Floats:
        """(groups,). A share of the bias keeps it finite if nothing can be learnt from the rows."""
        size = self._dot(theta[:-1], curvature[:-1] * theta[:-1])
        bias = self._per_group(curvature[-1] * np.square(theta[-1]) + curvature[-1])
        return np.asarray(np.sqrt(self._dot(gradient, gradient / curvature) / np.maximum(size, 1e-8 * bias + _TINY)))

    def solve(self, start: Floats, tolerance: float, max_iterations: int, before: _Point | None) -> tuple[Solution, _Point]:
        """Start at `start`, or at `before` in the groups in which that has the lower objective."""
        groups = self._loss.groups
        point = self._evaluate(start.copy(), np.arange(self._loss.outputs))
        if before is not None:
            back = self._per_group(self._objective(before)) < self._per_group(self._objective(point))
            columns = np.flatnonzero(back[groups])
            point.take(columns, before.of(columns))
        steps: list[_Step] = []
        stuck = np.zeros(self._groups, bool)
        iterations = 0
        gradient = self._gradient(point)
        while True:
            curvature = self._curvature(point.bend)
            norms = self._relative_norm(point.theta, gradient, curvature)
            active = (norms > tolerance) & ~stuck
            if not active.any() or iterations == max_iterations:
                break
            direction = self._direction(gradient, curvature, steps) * active[groups]
            old = point.theta.copy()
            moved = self._search(point, direction, self._dot(gradient, direction), active)
            if not moved[active].all():
                # With a fresh guess of the curvature a step may still go down; if not even that does, float32 ends.
                if not steps:
                    stuck |= active & ~moved
                steps = []
            new = self._gradient(point)
            if moved.any():
                steps.append(_Step.of(point.theta - old, new - gradient, self._dot))
                del steps[:-_MEMORY]
            gradient = new
            iterations += 1
        worst = float(norms.max())
        return Solution(self._strength, point.theta, worst, iterations, worst <= tolerance), point

    def _direction(self, gradient: Floats, curvature: Floats, steps: list[_Step]) -> Floats:
        """L-BFGS's two loops, each group by itself."""
        groups = self._loss.groups
        inverse_curvature = (1 / curvature).astype(np.float32)
        direction = -gradient.astype(np.float32)
        shares = []
        for step in reversed(steps):
            share = step.inverse * self._dot(step.step, direction)
            shares.append(share)
            direction -= share.astype(np.float32)[groups] * step.change
        direction *= inverse_curvature
        if steps:
            last = steps[-1]
            size = self._dot(last.change, last.change * inverse_curvature)
            fit = np.divide(1, last.inverse * size, out=np.ones(self._groups), where=(last.inverse > 0) & (size > 0))
            direction *= fit.astype(np.float32)[groups]
        for step, share in zip(steps, reversed(shares), strict=True):
            share = share - step.inverse * self._dot(step.change, direction)
            direction += share.astype(np.float32)[groups] * step.step
        return direction.astype(np.float64)

    def _search(
        self, point: _Point, direction: Floats, slope: Floats, active: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """Move each active group far enough down along its direction; returns (groups,) whether it moved.

        Far enough is Armijo's rule; or, if the fall is lost in the rounding of the loss, a slope that is not steeper.
        """
        groups = self._loss.groups
        level = self._per_group(self._objective(point))
        begin = point.theta.copy()
        scale = np.ones(self._groups)
        pending = active & (slope < 0)
        moved = np.zeros(self._groups, bool)
        for _ in range(_MAX_TRIALS):
            if not pending.any():
                break
            columns = np.flatnonzero(pending[groups])
            trial = self._evaluate(begin[:, columns] + scale[groups[columns]] * direction[:, columns], columns)
            reached, end = np.zeros(self._groups), np.zeros(self._groups)
            np.add.at(reached, groups[columns], self._objective(trial))
            np.add.at(end, groups[columns], np.einsum("ij,ij->j", self._gradient(trial), direction[:, columns]))
            rise = reached - level
            flat = (np.abs(rise) <= 1e-6 * np.abs(level)) & (np.abs(end) <= np.abs(slope))
            down = pending & ((rise <= 1e-4 * scale * slope) | flat)
            taken = down[groups[columns]]
            point.take(columns[taken], trial.of(np.flatnonzero(taken)))
            moved |= down
            pending &= ~down
            bow = 2 * (rise - scale * slope)
            least = np.divide(-slope * scale, bow, out=np.full(self._groups, 0.5), where=pending & (bow > 0))
            scale = np.where(pending, scale * least.clip(0.1, 0.5), scale)
        return moved


@dataclass(frozen=True)
class _Step:
    """One iteration's step and change of the gradient, (rank + 1, outputs), and 1 / their dot product, (groups,).

    The inverse is 0 for a group that did not move, or whose gradient shows no positive curvature.
    """

    step: Singles
    change: Singles
    inverse: Floats

    @classmethod
    def of(cls, step: Floats, change: Floats, dot: Any) -> _Step:
        product = dot(step, change)
        inverse = np.divide(1, product, out=np.zeros_like(product), where=product > _TINY)
        return cls(step.astype(np.float32), change.astype(np.float32), inverse)
