"""Convex heads on a learned mix of layers: SUPERB's weighted sum, whose weights are learned with the head.

The rows of a mix are those of all layers side by side, (rows, layers x dim). Its head is one on these rows, in which the
weights of a layer are those of the head times its share; so `convex` and `convex_frames` choose, refit and score it as any
other. `models.mixing` has the objective. Each strength starts at equal shares; the last fit at the shares of the chosen one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..models.logistic import MAX_ITERATIONS, Loss, path
from ..models.mixing import SELECTION_TOLERANCE, TOLERANCE, JointSolution, Layers, Mixture, Squares, solve_jointly
from ..models.standardised import Head, Pool, Rows
from . import convex
from .convex import (
    PATH_TOLERANCE,
    Convergence,
    Fit,
    Floats,
    Logistic,
    Numbers,
    Objective,
    undefined,
)


class MixedFits:
    """The fits of an objective on the mix of `layers`, by name, whose rows lie side by side."""

    def __init__(self, base: Logistic | Numbers, layers: Sequence[str]) -> None:
        self._base, self._layers = base, layers
        self.strengths, self.without_selection = base.strengths, base.without_selection

    def fits(self, rows: Rows, pool: Pool) -> Iterator[Fit]:
        """A fit for each strength, from the strongest on. Raises `ScoreUndefinedError` if a row is not finite."""
        problem = _Problem(self._base, self._layers, rows, pool)
        mixture = problem.mixture(np.full(len(self._layers), 1 / len(self._layers)))
        if not problem.learnable(mixture):
            yield from (problem.constant(mixture, strength) for strength in self.strengths)
            return
        for start in path(mixture, problem.loss, self.strengths, convex.SELECTION_TOLERANCE, MAX_ITERATIONS):
            solution = solve_jointly(mixture, problem.loss, start.strength, start.theta, SELECTION_TOLERANCE)
            yield problem.fit(mixture, solution)

    def refit(self, rows: Rows, pool: Pool, near: Fit) -> Fit:
        """A fit with the strength of `near`, starting at its shares. Raises `ScoreUndefinedError` if a row is not finite."""
        problem = _Problem(self._base, self._layers, rows, pool)
        assert near.shares is not None
        mixture = problem.mixture(np.array(list(near.shares.values())))
        if not problem.learnable(mixture):
            return problem.constant(mixture, near.strength)
        strengths = [strength for strength in self.strengths if strength >= near.strength]
        *_, start = path(mixture, problem.loss, strengths, PATH_TOLERANCE, MAX_ITERATIONS)
        return problem.fit(mixture, solve_jointly(mixture, problem.loss, near.strength, start.theta, TOLERANCE))


class Mixed(MixedFits):
    """An objective on pooled embeddings, fitted on the mix of layers."""

    def __init__(self, base: Logistic | Numbers, scored_by: Objective, layers: Sequence[str]) -> None:
        super().__init__(base, layers)
        self._scored_by = scored_by
        self.targets = scored_by.targets

    def activation(self, head: Head, block: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        return self._scored_by.activation(head, block)

    def decide(self, means: Floats) -> npt.NDArray[Any]:
        return self._scored_by.decide(means)

    def log_loss(self, means: Floats, targets: npt.NDArray[Any]) -> float:
        return self._scored_by.log_loss(means, targets)

    def score(self, predictions: npt.NDArray[Any], targets: npt.NDArray[Any]) -> float:
        return self._scored_by.score(predictions, targets)


def mixed(objective: Objective, layers: Sequence[str]) -> Objective:
    """An objective on pooled embeddings, fitted on the mix of layers."""
    assert isinstance(objective, Logistic | Numbers)
    return Mixed(objective, objective, layers)


class _Problem:
    """What is to be fitted on some rows, and how a solution becomes a head."""

    def __init__(self, base: Logistic | Numbers, names: Sequence[str], rows: Rows, pool: Pool) -> None:
        self._names = names
        self._layers = Layers(rows, len(names), pool)
        if not self._layers.finite:
            raise undefined()
        self._scale = 1.0
        self.loss: Loss
        if isinstance(base, Numbers):
            targets = np.concatenate([np.asarray(rows.targets(number), np.float64) for number in range(rows.blocks)])
            mean = float(targets.mean())
            self._scale = float(np.abs(targets - mean).max()) or 1.0
            self.loss, self._bias = Squares(mean, self._scale), np.array([mean])
        else:
            self.loss, self._bias = base.loss(rows)

    def mixture(self, shares: Floats) -> Mixture:
        return Mixture(self._layers, shares)

    def learnable(self, mixture: Mixture) -> bool:
        return bool(self.loss.outputs and mixture.variances.any())

    def fit(self, mixture: Mixture, solution: JointSolution) -> Fit:
        solved = mixture.head_of(solution.theta, solution.weights)
        convergence = Convergence(solution.relative_gradient_norm, solution.iterations, solution.converged)
        return self._fit(solved.weight, solved.bias, solution.strength, convergence, solution.weights)

    def constant(self, mixture: Mixture, strength: float) -> Fit:
        """The fit if nothing tells the rows apart: each output's probability is its frequency."""
        weight = np.zeros((mixture.rows.dim, self.loss.outputs))
        return self._fit(weight, self.loss.start(mixture), strength, Convergence(0.0, 0, True), mixture.weights)

    def _fit(self, weight: npt.NDArray[Any], bias: Floats, strength: float, convergence: Convergence, shares: Floats) -> Fit:
        """Outputs that the rows cannot teach get the bias that says so."""
        whole, biases = np.zeros((len(weight), len(self._bias))), self._bias.copy()
        whole[:, self.loss.taught] = weight * self._scale
        if isinstance(self.loss, Squares):
            biases += bias * self._scale
        else:
            biases[self.loss.taught] = bias
        head = Head(self._layers.standardisation, whole, biases)
        return Fit(head, strength, convergence, shares=dict(zip(self._names, shares.tolist(), strict=True)))
