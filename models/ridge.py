"""Ridge regression of one number, in closed form for every strength."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .logistic import Solution
from .standardised import Design, Floats, Singles


def solutions(design: Design, strengths: Sequence[float]) -> Iterator[Solution]:
    """A solution for each strength s of mean squared error + s ||W||^2; the targets are (rows,) numbers.

    scikit-learn's `alpha` is s times the rows. The design must have computed its own axes, so that the rows are uncorrelated
    along them: then one pass gives all strengths, and one more per strength measures its gradient.
    """
    blocks = [np.asarray(design.rows.targets(number), np.float64) for number in range(design.rows.blocks)]
    targets = np.concatenate(blocks)
    mean = float(targets.mean())
    scale = float(np.abs(targets - mean).max()) or 1.0  # so that float32 holds every number that float64 does

    def distance(outputs: Singles, targets: npt.NDArray[Any]) -> tuple[Singles, Floats]:
        return ((targets[:, None] - mean) / scale - outputs).astype(np.float32), np.zeros(1)

    moment = design.moments(distance, np.zeros((design.rank + 1, 1)))[0][:-1] / design.rows.count
    for strength in strengths:
        curvature = (design.variances + strength)[:, None]
        weight = moment / curvature
        theta = np.concatenate([weight, np.zeros((1, 1))])
        left = design.moments(distance, theta)[0] / design.rows.count
        gradient = np.append(strength * weight - left[:-1], -left[-1:], axis=0)
        size = float((curvature * weight**2).sum())
        norm = float((gradient[:-1] ** 2 / curvature).sum() + gradient[-1, 0] ** 2) / max(size, 1e-8)
        theta *= scale
        theta[-1] += mean
        yield Solution(strength, theta, norm**0.5, 0, True)
