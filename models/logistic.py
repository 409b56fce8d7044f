"""L2-regularised logistic regression to a stated tolerance, over falling strengths, each extrapolated from the last.

The objective of a strength s is mean loss over rows + s/2 ||W||^2 on standardised rows, the bias free of it: scikit-learn's
C is 1 / (s rows), and s means the same at every size.

The method is L-BFGS whose first guess of the curvature is c_k v_j + s for axis j (variance v_j) and output k, with c_k the
mean of p(1 - p) over the rows, taken anew in every step. On 1,440 rows, 768 dimensions and 50 classes, eleven strengths over
eight decades take some 90 passes over the rows to a relative gradient norm of 1e-3. Two things make the weakest strengths
as fast as the others, though separable rows drive their weights far out: residuals and losses are computed without
cancellation, so that those of 1e-9 are right in float32 (with cancellation, L-BFGS ended in thousands of failing line
searches); and a strength starts at 2 t1 - t2 of the two solutions before it, on the path if the steps of log s are equal.
The remembered steps are carried from strength to strength: only their share of the penalty changes, which is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from .standardised import Design, Floats, Indices, Singles

if TYPE_CHECKING:
    from torch import Tensor

MAX_ITERATIONS = 500
Dot = Callable[[npt.NDArray[Any], npt.NDArray[Any]], Floats]  # (groups,) dot products of two (rank + 1, outputs)
_MEMORY = 5  # steps that L-BFGS remembers; 8 took as many passes
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


@runtime_checkable
class LossOnDevice(Loss, Protocol):
    """A loss that passes on a device know too."""

    def outputs_of(self, targets: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The targets of a block in terms of outputs, as `step_on_device` takes them."""

    def step_on_device(self, logits: Tensor, targets: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """`step` in torch; the sums are float64."""


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
        curvature = (np.ones(len(weights), np.float32) @ weights).astype(np.float64)
        curvature -= np.einsum("ij,ij->j", weights, weights)
        curvature += np.bincount(targets, (of_true / total * wrong).astype(np.float64), self.outputs)
        weights[rows, targets] = -wrong
        sums = np.stack([np.zeros(self.outputs), curvature])
        sums[0, 0] = loss.sum()
        return weights, sums

    def outputs_of(self, targets: Indices) -> Indices:
        return np.asarray(self._output_of[targets])

    def step_on_device(self, logits: Tensor, targets: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        at = targets[:, None]
        logits -= logits.amax(dim=1, keepdim=True)
        true = logits.gather(1, at).double()
        weights = logits.exp_()
        of_true = weights.gather(1, at)
        weights.scatter_(1, at, 0.0)
        others = weights.sum(dim=1, keepdim=True)
        total = others + of_true
        loss = others.double().log1p().where(true == 0, total.double().log() - true)
        weights /= total
        wrong = others / total
        curvature = (weights - weights * weights).scatter_(1, at, of_true / total * wrong)
        sums = curvature.sum(dim=0, dtype=true.dtype).repeat(2, 1)
        sums[0] = 0
        sums[0, 0] = loss.sum()
        return weights.scatter_(1, at, -wrong), sums


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

    def _positive(self, targets: npt.NDArray[Any], classes: Indices) -> npt.NDArray[np.bool_]:
        """(rows, classes) whether a row has a class."""
        return np.asarray(targets[:, classes])

    def step(self, logits: Singles, targets: npt.NDArray[Any], columns: Indices) -> tuple[Singles, Floats]:
        positive = self._positive(targets, self.taught[columns])
        distance = np.where(positive, logits, -logits)  # from the boundary, on the right side
        small = np.exp(-np.abs(distance))
        weight = np.where(positive, np.float32(self._positive_weight), np.float32(1))
        loss = weight * (np.log1p(small) + np.maximum(-distance, 0))
        wrong = np.where(distance > 0, small, np.float32(1)) / (1 + small)
        residual = weight * np.where(positive, -wrong, wrong)
        curvature = weight * small / np.square(1 + small)
        return residual, np.stack([loss.sum(axis=0, dtype=np.float64), curvature.sum(axis=0, dtype=np.float64)])

    def outputs_of(self, targets: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        return self._positive(targets, self.taught)

    def step_on_device(self, logits: Tensor, targets: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        positive = targets.index_select(1, columns)
        distance = logits.where(positive, -logits)
        small = (-distance.abs()).exp()
        weight = small.new_tensor(self._positive_weight).where(positive, small.new_tensor(1.0))
        loss = weight * (small.log1p() + (-distance).clamp_min(0))
        wrong = small.where(distance > 0, 1.0) / (1 + small)
        residual = weight * (-wrong).where(positive, wrong)
        curvature = weight * small / (1 + small).square()
        double = loss.new_empty((2, loss.shape[1])).double()
        double[0], double[1] = (values.sum(dim=0, dtype=double.dtype) for values in (loss, curvature))
        return residual, double


class OneOfTwo(OneVersusRest):
    """Cross-entropy of the only two classes that have a row, with one output: the second against the first.

    `counts` (classes,) are the rows of each class; targets are (rows,) class indices. With an output for each class the two
    weights would be opposite halves of this one, whose penalty counts half: scikit-learn's strength would be another.
    """

    def __init__(self, counts: Indices) -> None:
        _, second = np.flatnonzero(counts)
        super().__init__(np.where(np.arange(len(counts)) == second, counts, 0), int(counts.sum()), 1.0)

    def _positive(self, targets: Indices, classes: Indices) -> npt.NDArray[np.bool_]:
        return np.asarray(targets[:, None] == classes)


@dataclass(frozen=True)
class Solution:
    """`theta` (rank + 1, outputs) in the design's coordinates, the bias last, float32; of ridge regression float64.

    `relative_gradient_norm` is the largest over the groups of ||gradient|| / ||W||, the gradient measured by the inverse of
    the curvature and W by the curvature, so that it estimates the relative error of W whether the loss or the penalty bends
    the objective. `converged` says whether it is at most the tolerance; it is not if `iterations` reached the limit, or if
    float32 could go no further.
    """

    strength: float
    theta: npt.NDArray[Any]
    relative_gradient_norm: float
    iterations: int
    converged: bool


def path(
    design: Design,
    loss: Loss,
    strengths: Sequence[float],
    tolerance: float,
    max_iterations: int = MAX_ITERATIONS,
    *,
    last_tolerance: float | None = None,
) -> Iterator[Solution]:
    """The solution of each strength, from the strongest on, which starts at zero weights.

    Args:
        design: Standardised rows.
        loss: Loss over their outputs.
        strengths: Falling by equal factors.
        tolerance: Of the relative gradient norm.
        max_iterations: Per strength.
        last_tolerance: Of the last strength, if not the same.
    """
    descent = _Descent(design, loss)
    theta = np.concatenate([np.zeros((design.rank, loss.outputs)), loss.start(design)[None]]).astype(np.float32)
    ahead: Singles | None = None
    for number, strength in enumerate(strengths, 1):
        if last_tolerance is not None and number == len(strengths):
            tolerance = last_tolerance
        descent.begin(strength, theta if ahead is None else theta + ahead)
        ahead = None
        solution = descent.solve(tolerance, max_iterations)
        if number > 1:
            ahead = solution.theta - theta
        theta = solution.theta
        yield solution


@dataclass
class _Point:
    """The result of a pass over the rows at `theta` (rank + 1, outputs), without the penalty.

    As the solver holds several of these and of its steps at once, theta and gradient are float32, as the passes are.

    The mean loss (outputs,), its gradient, and the mean second derivative at the logits (outputs,), `bend`; of the weights
    the sum of squares (outputs,), `size`, and that of squares times the variances, `spread`.
    """

    theta: Singles
    gradient: Singles
    loss: Floats
    bend: Floats
    size: Floats
    spread: Floats

    def _arrays(self) -> tuple[npt.NDArray[Any], ...]:
        return self.theta, self.gradient, self.loss, self.bend, self.size, self.spread

    def with_columns(self, columns: Indices, other: _Point) -> _Point:
        """Replace some outputs by those of `other`, a point of just these outputs, in order."""
        if len(columns) == len(self.loss):
            return other
        copies = [array.copy() for array in self._arrays()]
        for copy, array in zip(copies, other._arrays(), strict=True):
            copy[..., columns] = array
        return _Point(*copies)

    def of(self, columns: Indices) -> _Point:
        """The point of some outputs only."""
        if len(columns) == len(self.loss):
            return self
        return _Point(*(array[..., columns] for array in self._arrays()))


class _Descent:
    """The descent to one strength after another: where it is, and the last steps that it took."""

    def __init__(self, design: Design, loss: Loss) -> None:
        self._design, self._loss, self._strength = design, loss, 0.0
        self._variances = np.append(design.variances, 1.0)[:, None]
        self._groups = int(loss.groups.max()) + 1
        self._every = np.arange(loss.outputs)
        self._point: _Point | None = None
        self._steps: list[_Step] = []

    def _per_group(self, values: Floats) -> Floats:
        """(outputs,) to (groups,) sums."""
        if self._groups == 1:
            return np.array([values.sum()])
        return np.asarray(np.bincount(self._loss.groups, values, self._groups), np.float64)

    def _per_output(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(groups,) values to (outputs,), or (1,) if there is one group."""
        return values if self._groups == 1 else values[self._loss.groups]

    def _dot(self, a: npt.NDArray[Any], b: npt.NDArray[Any]) -> Floats:
        """(groups,) dot products of two (rank + 1, outputs)."""
        if self._groups == 1:
            return np.array([np.vdot(a, b)], np.float64)
        return self._per_group(np.einsum("ij,ij->j", a, b))

    def _evaluate(self, theta: Singles, columns: Indices) -> _Point:
        """The point at `theta` (rank + 1, columns) of some outputs, which are whole groups."""

        def step(logits: Singles, targets: npt.NDArray[Any]) -> tuple[Singles, Floats]:
            return self._loss.step(logits, targets, columns)

        if (on_device := self._design.on_device(self._loss)) is not None:
            gradient, sums = on_device.moments(theta, columns)
        else:
            gradient, sums = self._design.moments(step, theta)
        gradient /= self._design.rows.count
        sums /= self._design.rows.count
        squares = np.square(theta[:-1], dtype=np.float64)
        spread = self._design.variances @ squares
        return _Point(theta, gradient.astype(np.float32), sums[0], sums[1], squares.sum(axis=0), spread)

    def _objective(self, point: _Point) -> Floats:
        """(outputs,)"""
        return point.loss + self._strength / 2 * point.size

    def _gradient(self, point: _Point) -> Singles:
        gradient = np.float32(self._strength) * point.theta
        gradient[-1] = 0  # the bias is free
        gradient += point.gradient
        return gradient

    def _inverse_curvature(self, bend: Floats) -> Singles:
        """(rank + 1, outputs) guess of the diagonal of the inverse Hessian."""
        curvature = (self._variances * bend).astype(np.float32)
        curvature[:-1] += np.float32(self._strength)
        return np.divide(1, curvature, out=curvature)

    def _relative_norm(self, point: _Point, bend: Floats, squares: Floats) -> Floats:
        """(groups,), given the `squares` of the gradient. A share of the bias keeps it finite if nothing can be learnt."""
        size = self._per_group(bend * point.spread + self._strength * point.size)
        bias = self._per_group(bend * np.square(point.theta[-1]) + bend)
        return np.asarray(np.sqrt(squares / np.maximum(size, 1e-8 * bias + _TINY)))

    def begin(self, strength: float, start: Singles) -> None:
        """Go on with another strength, at `start`; in the groups in which the last point has the lower objective, there."""
        self._strength = strength
        for step in self._steps:
            step.change_strength(strength, self._dot)
        before, self._point = self._point, self._evaluate(start, self._every)
        if before is None:
            return
        self._remember(before, self._point)
        back = self._per_group(self._objective(before)) < self._per_group(self._objective(self._point))
        if back.any():
            columns = np.flatnonzero(back[self._loss.groups])
            self._point = self._point.with_columns(columns, before.of(columns))

    def solve(self, tolerance: float, max_iterations: int) -> Solution:
        """Descend to the tolerance, or as far as float32 and the iterations go."""
        assert self._point is not None
        stuck = np.zeros(self._groups, bool)
        iterations = 0
        while True:
            gradient = self._gradient(self._point)
            bend = np.maximum(self._point.bend, LEAST_CURVATURE)
            inverse = self._inverse_curvature(bend)
            norms = self._relative_norm(self._point, bend, self._dot(gradient, gradient * inverse))
            active = (norms > tolerance) & ~stuck
            if not active.any() or iterations == max_iterations:
                break
            direction = self._direction(gradient, inverse)
            if not active.all():
                direction *= active[self._loss.groups]
            slope = self._dot(gradient, direction)
            del gradient, inverse  # of a large head they are larger than what a pass needs
            new, moved = self._search(self._point, direction, slope, active)
            if not moved[active].all():
                # With a fresh guess of the curvature a step may still go down; if not even that does, float32 ends.
                if not self._steps:
                    stuck |= active & ~moved
                self._steps.clear()
            if moved.any():
                self._remember(self._point, new)
            self._point = new
            del new
            iterations += 1
        worst = float(norms.max())
        return Solution(self._strength, self._point.theta, worst, iterations, worst <= tolerance)

    def _remember(self, old: _Point, new: _Point) -> None:
        step, change = new.theta - old.theta, new.gradient - old.gradient
        change[:-1] += np.float32(self._strength) * step[:-1]
        self._steps.append(_Step(self._strength, step, change, self._dot))
        del self._steps[:-_MEMORY]

    def _direction(self, gradient: Singles, inverse_curvature: Singles) -> Singles:
        """L-BFGS's two loops, each group by itself."""
        direction, steps = -gradient, self._steps
        shares = []
        for step in reversed(steps):
            share = step.inverse * self._dot(step.step, direction)
            shares.append(share)
            direction -= self._per_output(share.astype(np.float32)) * step.change
        direction *= inverse_curvature
        if steps:
            last = steps[-1]
            size = self._dot(last.change, last.change * inverse_curvature)
            fit = np.divide(1, last.inverse * size, out=np.ones(self._groups), where=(last.inverse > 0) & (size > 0))
            direction *= self._per_output(fit.astype(np.float32))
        for step, share in zip(steps, reversed(shares), strict=True):
            share = share - step.inverse * self._dot(step.change, direction)
            direction += self._per_output(share.astype(np.float32)) * step.step
        return direction

    def _search(
        self, point: _Point, direction: Singles, slope: Floats, active: npt.NDArray[np.bool_]
    ) -> tuple[_Point, npt.NDArray[np.bool_]]:
        """Move each active group far enough down along its direction; returns the new point and (groups,) what moved.

        Far enough is Armijo's rule; or, if the fall is lost in the rounding of the loss, a slope that is not steeper.
        """
        groups = self._loss.groups
        level = self._per_group(self._objective(point))
        begin = point.theta
        scale = np.ones(self._groups)
        pending = active & (slope < 0)
        moved = np.zeros(self._groups, bool)
        for _ in range(_MAX_TRIALS):
            if not pending.any():
                break
            if pending.all():
                columns = self._every
                trial = self._evaluate(begin + np.asarray(self._per_output(scale), np.float32) * direction, columns)
                rise = self._per_group(self._objective(trial)) - level
            else:
                columns = np.flatnonzero(pending[groups])
                scales = scale[groups[columns]].astype(np.float32)
                trial = self._evaluate(begin[:, columns] + scales * direction[:, columns], columns)
                rise = np.bincount(groups[columns], self._objective(trial), self._groups) - level
            down = pending & (rise <= 1e-4 * scale * slope)
            flat = pending & ~down & (np.abs(rise) <= 1e-6 * np.abs(level))
            if flat.any():
                slopes = np.einsum("ij,ij->j", self._gradient(trial), direction[:, columns])
                end = np.bincount(groups[columns], slopes, self._groups)
                down |= flat & (np.abs(end) <= np.abs(slope))
            taken = down[groups[columns]]
            if taken.any():
                point = point.with_columns(columns[taken], trial.of(np.flatnonzero(taken)))
            del trial  # before the next one is made
            moved |= down
            pending &= ~down
            bow = 2 * (rise - scale * slope)
            least = np.divide(-slope * scale, bow, out=np.full(self._groups, 0.5), where=pending & (bow > 0))
            scale = np.where(pending, scale * least.clip(0.1, 0.5), scale)
        return point, moved


class _Step:
    """A step and the change of the gradient along it, (rank + 1, outputs), and 1 / their dot product, (groups,).

    The inverse is 0 for a group that did not move, or whose gradient shows no positive curvature.
    """

    def __init__(self, strength: float, step: Singles, change: Singles, dot: Dot) -> None:
        self.step, self.change = step, change
        self._strength = strength
        self._invert(dot)

    def _invert(self, dot: Dot) -> None:
        product = dot(self.step, self.change)
        self.inverse = np.divide(1, product, out=np.zeros_like(product), where=product > _TINY)

    def change_strength(self, strength: float, dot: Dot) -> None:
        """Make the change of the gradient what it would be with another penalty."""
        self.change[:-1] += np.float32(strength - self._strength) * self.step[:-1]
        self._strength = strength
        self._invert(dot)
