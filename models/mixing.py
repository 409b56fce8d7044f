"""A learned weighted sum of layers under a linear head: SUPERB's featurizer, solved jointly with the head.

With the standardised rows Z_l of each layer, the head sees M = sum of w_l Z_l, w = softmax(a), standardised as for any head.
The head minimises the mean loss of M W + b plus s/2 ||W||^2, over a, W and b at once. M must be standardised: of the sum as
it is, the penalty would favour weights that make it loud, which are those of one layer alone. For given weights the problem
is convex. Over all it is not, so the start matters: equal weights, with the head that is best for them, found along the
`logistic.path`. From there L-BFGS (scipy's) goes down, scaled by the curvature at the start. Nothing is drawn.

The gradient of w_l is <Z_l, R W^T> for the residuals R of the head, one product whatever the number of layers; a pass costs
little more than reading the layers twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import OptimizeResult, minimize
from scipy.special import softmax

from .logistic import LEAST_CURVATURE, Loss
from .standardised import Design, Floats, Head, Indices, Pool, Rows, Singles, Standardisation, main_axes

MAX_ITERATIONS = 1000
# Of the relative gradient norm over head and weights. Between 1e-2 and 1e-3 the weights of seven layers moved by 0.02 to 0.2
# in sum, at three times the iterations.
SELECTION_TOLERANCE = 1e-2
TOLERANCE = 1e-3
_MEMORY = 20  # steps that L-BFGS remembers
_VALUES_KEPT = 1 << 25  # of standardised layers, 128 MiB; larger sets are standardised anew in every pass
_ROTATED_KEPT = 1 << 24
_LEAST_VARIANCE = 1e-10  # of a sum of layers, as a share of theirs; anything smaller is rounding


class Layers:
    """Rows of several layers side by side, (rows, layers x dim), standardised each by its own mean and deviation."""

    def __init__(self, rows: Rows, layers: int, pool: Pool) -> None:
        self.rows, self.layers, self.pool = rows, layers, pool
        self.dim = rows.dim // layers
        self.standardisation = Standardisation.of(rows, pool)
        self._kept: list[Singles] | None = None
        if not self.finite:
            return
        if rows.count * rows.dim <= _VALUES_KEPT:
            self._kept = list(pool.map(self._read, rows.blocks))
        self.correlations = np.asarray(sum(pool.map(self._products, rows.blocks))) / rows.count
        """(dim, layers, layers) of each dimension of one layer with the same of another."""

    @property
    def finite(self) -> bool:
        return self.standardisation.finite

    def variance(self, weights: Floats) -> Floats:
        """(dim,) of the layers' sum with these weights."""
        return np.maximum((self.correlations @ weights) @ weights, 0)

    def _products(self, number: int) -> Floats:
        columns = self.block(number).reshape(self.layers, -1, self.dim).transpose(2, 0, 1)
        return np.asarray(columns @ columns.transpose(0, 2, 1), np.float64)

    def block(self, number: int) -> Singles:
        """(layers, rows x dim), for reading only."""
        return self._read(number) if self._kept is None else self._kept[number]

    def _read(self, number: int) -> Singles:
        block = self.standardisation.apply(self.rows.block(number))
        by_layer = block.reshape(len(block), self.layers, self.dim).transpose(1, 0, 2)
        return np.ascontiguousarray(by_layer).reshape(self.layers, -1)


class Mixture(Design):
    """Layers summed with fixed weights (layers,), along every axis of the sum's covariance.

    The sum is standardised too. All axes are there, however few the rows: other weights span another space.
    """

    def __init__(self, layers: Layers, weights: Floats) -> None:
        self.layers, self.weights = layers, weights
        variance = layers.variance(weights)
        self._varies = variance > _LEAST_VARIANCE
        self._inverse = np.divide(1, np.sqrt(variance), out=np.zeros_like(variance), where=self._varies)
        self.rows, self.pool, self.standardisation = layers.rows, layers.pool, layers.standardisation
        self._kept, self._starts, self._on_device = None, [0], None
        self.axes, self.variances = main_axes(
            np.asarray(sum(self.pool.map(self._moment, self.rows.blocks))) / self.rows.count
        )
        if self.rows.count * layers.dim <= _ROTATED_KEPT:
            axes = self.axes.astype(np.float32)
            parts = list(self.pool.map(lambda number: self.standardised(number) @ axes, self.rows.blocks))
            self._starts = [0, *np.cumsum([len(part) for part in parts]).tolist()]
            self._kept = np.concatenate(parts)

    def on_device(self, loss: Loss) -> None:
        """None: a mixture is read on the CPU."""

    def standardised(self, number: int) -> Singles:
        return self.mixed(self.layers.block(number), self.weights) * self._inverse.astype(np.float32)

    def weight(self, theta: Floats) -> Floats:
        """(dim, outputs), of the layers' sum before it is standardised."""
        return self._inverse[:, None] * (self.axes @ theta[:-1])

    def penalty(self, theta: Floats, weights: Floats) -> tuple[float, Floats, Floats]:
        """||W||^2 of the head on the standardised sum, with half its gradient by theta and by the layers' weights."""
        square = np.square(weight := self.weight(theta)).sum(axis=1)
        variance, slopes = self.layers.variance(weights), self.layers.correlations @ weights  # (dim,), (dim, layers)
        of_theta = self.axes.T @ (self._inverse[:, None] * (variance[:, None] * weight))
        return float(variance @ square), of_theta, square @ slopes

    def mixed(self, block: Singles, weights: Floats) -> Singles:
        """A block of `Layers` as (rows, dim)."""
        return np.asarray(weights.astype(np.float32) @ block).reshape(-1, self.layers.dim)

    def head_of(self, theta: Floats, weights: Floats) -> Head:
        """The head on all layers side by side of `theta` (dim + 1, outputs), the bias last, and `weights` (layers,)."""
        weight = self.weight(theta)
        return Head(self.standardisation, np.concatenate([share * weight for share in weights]), theta[-1].copy())

    def joint_moments(
        self, step: Callable[[Singles, npt.NDArray[Any]], tuple[Singles, Floats]], theta: Floats, weights: Floats
    ) -> tuple[Floats, Floats, Floats]:
        """As `moments`, at other weights, and the sum over all rows of <Z_l, R W^T> for every layer, (layers,)."""
        weight, bias = self.weight(theta).astype(np.float32), theta[-1].astype(np.float32)

        def part(number: int) -> tuple[Singles, Floats, Floats, Singles]:
            block = self.layers.block(number)
            mixed = self.mixed(block, weights)
            outputs = mixed @ weight
            outputs += bias
            values, sums = step(outputs, self.rows.targets(number))
            along = (values @ weight.T).ravel()
            return mixed.T @ values, values.sum(axis=0, dtype=np.float64), sums, block @ along

        parts = self.pool.map(part, self.rows.blocks)
        product, total, sums, along_layers = next(parts)
        moment, of_layers = product.astype(np.float64), along_layers.astype(np.float64)
        for product, more, more_sums, along_layers in parts:
            moment += product
            total += more
            sums += more_sums
            of_layers += along_layers
        return np.concatenate([self.axes.T @ (self._inverse[:, None] * moment), total[None]]), sums, of_layers


class Squares:
    """Half the squared error of one number; targets are (rows,), measured from `mean` in units of `scale`."""

    outputs = 1
    groups = taught = np.zeros(1, np.int64)

    def __init__(self, mean: float, scale: float) -> None:
        self._mean, self._scale = mean, scale

    def start(self, design: Design) -> Floats:
        return np.zeros(1)

    def step(self, logits: Singles, targets: npt.NDArray[Any], columns: Indices) -> tuple[Singles, Floats]:
        residual = (logits - ((targets[:, None] - self._mean) / self._scale)).astype(np.float32)
        exact = residual.astype(np.float64)
        return residual, np.array([[0.5 * np.vdot(exact, exact)], [float(len(residual))]])


@dataclass(frozen=True)
class JointSolution:
    """`theta` (dim + 1, outputs) in the mixture's coordinates, the bias last, and the layers' weights, which sum to 1.

    `relative_gradient_norm` is as in `logistic.Solution`, over all variables, by the curvature at the start.
    """

    strength: float
    theta: Floats
    weights: Floats
    relative_gradient_norm: float
    iterations: int
    converged: bool


def solve_jointly(
    mixture: Mixture, loss: Loss, strength: float, theta: Floats, tolerance: float, max_iterations: int = MAX_ITERATIONS
) -> JointSolution:
    """The weights and the head of one strength, starting at those of the mixture and at `theta` (dim + 1, outputs)."""
    problem = _Joint(mixture, loss, strength, theta)
    iterations = 0

    def after(intermediate_result: OptimizeResult) -> None:
        nonlocal iterations
        iterations += 1
        if problem.norm(intermediate_result.x) <= tolerance:
            raise StopIteration

    x = problem.start
    if problem.norm(x) > tolerance:
        options = {"maxcor": _MEMORY, "maxiter": max_iterations, "maxfun": 4 * max_iterations, "ftol": 0.0, "gtol": 0.0}
        x = minimize(problem, x, jac=True, method="L-BFGS-B", callback=after, options=options).x
    norm = problem.norm(x)
    end, weights = problem.variables(x)
    return JointSolution(strength, end, weights, norm, iterations, norm <= tolerance)


class _Joint:
    """The objective of all variables as a vector, scaled so that its curvature at the start is about 1 in each."""

    def __init__(self, mixture: Mixture, loss: Loss, strength: float, theta: Floats) -> None:
        self._mixture, self._loss, self._strength = mixture, loss, strength
        self._columns = np.arange(loss.outputs)
        self._shape = theta.shape
        penalty = np.append(np.full(len(theta) - 1, strength), 0.0)[:, None]
        _, sums, _ = mixture.joint_moments(self._step, theta, mixture.weights)
        bend = np.maximum(sums[1] / mixture.rows.count, LEAST_CURVATURE)
        curvature = bend * np.append(mixture.variances, 1.0)[:, None] + penalty
        size = float((curvature[:-1] * np.square(theta[:-1])).sum())
        # A layer's weight moves the logits by about its share of their own size.
        least = 1e-8 * float((curvature[-1] * (1 + np.square(theta[-1]))).sum()) + 1e-300
        of_weights = np.full(len(mixture.weights), 0.1 * max(size, least) / len(mixture.weights) ** 2)
        self._scale = np.sqrt(np.concatenate([curvature.ravel(), of_weights]))
        self._least = least
        self.start = np.concatenate([theta.ravel(), np.log(np.maximum(mixture.weights, 1e-30))]) * self._scale
        self._last: tuple[Floats, float, Floats] | None = None

    def _step(self, logits: Singles, targets: npt.NDArray[Any]) -> tuple[Singles, Floats]:
        return self._loss.step(logits, targets, self._columns)

    def variables(self, x: Floats) -> tuple[Floats, Floats]:
        """(theta, weights)"""
        values = x / self._scale
        size = self._shape[0] * self._shape[1]
        return values[:size].reshape(self._shape), softmax(values[size:])

    def __call__(self, x: Floats) -> tuple[float, Floats]:
        theta, weights = self.variables(x)
        moment, sums, of_layers = self._mixture.joint_moments(self._step, theta, weights)
        count = self._mixture.rows.count
        size, size_of_theta, size_of_layers = self._mixture.penalty(theta, weights)
        gradient = moment / count
        gradient[:-1] += self._strength * size_of_theta
        of_layers = of_layers / count + self._strength * size_of_layers
        of_logits = weights * (of_layers - weights @ of_layers)
        value = float(sums[0].sum()) / count + self._strength / 2 * size
        scaled = np.concatenate([gradient.ravel(), of_logits]) / self._scale
        self._last = x.copy(), value, scaled
        return value, scaled

    def norm(self, x: Floats) -> float:
        """The relative gradient norm at `x`."""
        gradient = self._last[2] if self._last is not None and np.array_equal(self._last[0], x) else self(x)[1]
        head = x[: (self._shape[0] - 1) * self._shape[1]]
        return float(np.sqrt(gradient @ gradient / max(float(head @ head), self._least)))
