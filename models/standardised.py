"""Rows of numbers, standardised by their own mean and deviation and rotated to the axes of their covariance.

A linear head with an unpenalised bias, trained on standardised rows, does not depend on a constant added to a dimension or a
factor that scales it. Along the axes of the covariance the curvature of its loss is nearly diagonal, which makes
`logistic.path` short.

The products are numpy's: on an AMD core its OpenBLAS multiplied these shapes at 75 GFLOP/s in float32, torch's MKL at 45.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:  # torch takes seconds to import: only for a device
    from .device import DeviceRows
    from .logistic import Loss

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Result = TypeVar("Result")

ROWS_AT_ONCE = 1024
_BLOCK_VALUES = 1 << 22
# A dimension whose deviation is a smaller share of its mean holds little but the rounding of float32 (6e-8): it is left out.
LEAST_DEVIATION = 1e-6
_SMALLEST = 1e-37  # below it the inverse leaves float32
_LEAST_VARIANCE = 1e-12  # as a share of the largest along an axis; anything smaller is rounding
_VALUES_KEPT = 1 << 24  # of standardised rows, 64 MiB; larger sets are standardised anew in every pass


def rows_at_once(dim: int) -> int:
    """Rows per block, fewer if they are long: a block then stays at 16 MiB, and in a processor's cache."""
    return max(1, min(ROWS_AT_ONCE, _BLOCK_VALUES // max(1, dim)))


class Blocks(Protocol):
    """Rows that are read in blocks; a block is the same whenever it is read."""

    count: int
    blocks: int

    def block(self, number: int) -> Singles:
        """(rows, dim) float32, which the caller may overwrite."""


class Rows(Blocks, Protocol):
    """Rows with their targets."""

    dim: int

    def targets(self, number: int) -> npt.NDArray[Any]:
        """The targets of a block, a row each."""


class MatrixRows:
    """Some rows of a matrix (…, dim); `targets` has a row for each row of the matrix."""

    def __init__(self, matrix: Singles, index: Indices, targets: npt.NDArray[Any]) -> None:
        self.count, self.dim = len(index), matrix.shape[1]
        self._rows_at_once = rows_at_once(self.dim)
        self.blocks = -(-self.count // self._rows_at_once)
        self._matrix, self._index, self._targets = matrix, index, targets

    def _rows(self, number: int) -> Indices:
        return self._index[number * self._rows_at_once : (number + 1) * self._rows_at_once]

    def block(self, number: int) -> Singles:
        return self._matrix[self._rows(number)]

    def targets(self, number: int) -> npt.NDArray[Any]:
        return np.asarray(self._targets[self._rows(number)])


class Standardisation:
    """Mean and inverse deviation of rows, (dim,) float64; the inverse is 0 for a dimension that does not vary."""

    def __init__(self, mean: Floats, inverse: Floats) -> None:
        self.mean, self.inverse = mean, inverse
        self._mean, self._inverse = mean.astype(np.float32), inverse.astype(np.float32)

    @classmethod
    def of(cls, rows: Blocks, pool: Pool) -> Standardisation:
        """Measure some rows, in two passes, in float64. NaN and infinity pass through, and make `finite` false."""
        mean = sum(pool.map(lambda n: rows.block(n).sum(axis=0, dtype=np.float64), rows.blocks)) / rows.count

        def squares(number: int) -> Floats:
            distance = rows.block(number) - mean
            return np.asarray(np.einsum("ij,ij->j", distance, distance))

        deviation = np.sqrt(sum(pool.map(squares, rows.blocks)) / rows.count)
        varies = deviation > np.maximum(LEAST_DEVIATION * np.abs(mean), _SMALLEST)
        inverse = np.divide(1, deviation, out=np.zeros_like(deviation), where=varies | ~np.isfinite(deviation))
        return cls(np.asarray(mean), inverse)

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.mean).all() and np.isfinite(self.inverse).all())

    def apply(self, block: Singles) -> Singles:
        """Standardise a block (rows, dim) in place."""
        block -= self._mean
        block *= self._inverse
        return block


class Head:
    """A linear head on standardised rows: weight (dim, outputs) float32 and bias (outputs,) float64."""

    def __init__(self, standardisation: Standardisation, weight: npt.NDArray[Any], bias: Floats) -> None:
        self.standardisation, self.bias = standardisation, bias
        self.weight: Singles = np.asarray(weight, np.float32)

    def logits(self, block: Singles) -> Singles:
        """Rows (rows, dim) to logits (rows, outputs); overwrites the rows."""
        return self.standardisation.apply(block) @ self.weight + self.bias.astype(np.float32)


class Design:
    """Standardised rows in the coordinates of the axes of their covariance.

    `variances` (rank,) float64 are those of the rows along each axis. There are at most as many axes as rows. A small set is
    kept in these coordinates; a large one is read and standardised anew in every pass, block by block, and the weights are
    rotated instead.
    """

    def __init__(self, rows: Rows, pool: Pool, axes: Floats | None = None) -> None:
        """`axes` of a similar set save computing them; they are used only if they span every dimension."""
        self.rows, self.pool = rows, pool
        self.standardisation = Standardisation.of(rows, pool)
        self._kept: Singles | None = None
        self._on_device: DeviceRows | None = None
        self._starts = [0]
        if not self.standardisation.finite:
            self.axes, self.variances = np.zeros((rows.dim, 0)), np.zeros(0)
            return
        if rows.count * min(rows.count, rows.dim) <= _VALUES_KEPT:
            parts = list(pool.map(self.standardised, rows.blocks))
            self._starts = [0, *np.cumsum([len(part) for part in parts]).tolist()]
            whole = np.concatenate(parts)
            if axes is None or axes.shape[1] < rows.dim:
                self.axes, self.variances, self._kept = _rotated(whole)
            else:
                self.axes, self._kept = axes, whole @ axes.astype(np.float32)
                self.variances = np.einsum("ij,ij->j", self._kept, self._kept, dtype=np.float64) / rows.count
        else:
            self.axes, self.variances = main_axes(np.asarray(sum(pool.map(self._moment, rows.blocks))) / rows.count)

    def standardised(self, number: int) -> Singles:
        """A block of rows, standardised."""
        return self.standardisation.apply(self.rows.block(number))

    def _moment(self, number: int) -> Floats:
        block = self.standardised(number).astype(np.float64)
        return block.T @ block

    def on_device(self, loss: Loss) -> DeviceRows | None:
        """The rows on the pool's device, for one loss; None if the pool has none, or if so small a pass does not pay."""
        if self.pool.device is None:
            return None
        from .device import DeviceRows, pays, torch_device
        from .logistic import LossOnDevice

        if self._on_device is None and isinstance(loss, LossOnDevice) and pays(self.rows.count, self.rows.dim, loss.outputs):
            self._on_device = DeviceRows(self, loss, torch_device(self.pool.device))
        return self._on_device

    @property
    def reusable_axes(self) -> Floats | None:
        """The axes if they may serve another design: a large one computes its own."""
        return None if self._kept is None else self.axes

    @property
    def rank(self) -> int:
        return len(self.variances)

    def head(self, theta: npt.NDArray[Any]) -> Head:
        """The head of `theta` (rank + 1, outputs), the bias last."""
        weight = self.axes.astype(theta.dtype, copy=False) @ theta[:-1]
        return Head(self.standardisation, weight, theta[-1].astype(np.float64))

    def moments(
        self, step: Callable[[Singles, npt.NDArray[Any]], tuple[Singles, Floats]], theta: npt.NDArray[Any]
    ) -> tuple[Floats, Floats]:
        """One pass over the rows.

        Args:
            step: Computes a value R per output, and sums, from the outputs of a block, which it may overwrite, and its
                targets.
            theta: (rank + 1, outputs), the bias last.

        Returns:
            The sum over all rows of x^T R, with that of R as the last row, (rank + 1, outputs); and the total of the sums.
        """
        weight = np.asarray(theta[:-1] if self._kept is not None else self.axes @ theta[:-1], np.float32)
        bias = theta[-1].astype(np.float32)
        starts = self._starts

        def part(number: int) -> tuple[Singles, Floats, Floats]:
            block = self.standardised(number) if self._kept is None else self._kept[starts[number] : starts[number + 1]]
            outputs = block @ weight
            outputs += bias
            values, sums = step(outputs, self.rows.targets(number))
            return block.T @ values, values.sum(axis=0, dtype=np.float64), sums

        parts = self.pool.map(part, self.rows.blocks)
        product, total, sums = next(parts)
        moment = np.empty((len(product) + 1, len(total)))
        moment[:-1] = product
        for product, more, more_sums in parts:
            moment[:-1] += product
            total += more
            sums += more_sums
        if self._kept is None:
            moment[:-1] = self.axes.T @ moment[:-1]
        moment[-1] = total
        return moment, sums


def _rotated(rows: Singles) -> tuple[Floats, Floats, Singles]:
    """Axes (dim, rank) and variances (rank,) of standardised rows, and the rows along the axes (rows, rank)."""
    count, dim = rows.shape
    exact = rows.astype(np.float64)
    if count > dim:
        axes, variances = main_axes(exact.T @ exact / count)
        return axes, variances, rows @ axes.astype(np.float32)
    variances, left = np.linalg.eigh(exact @ exact.T / count)
    kept = variances > _LEAST_VARIANCE * max(variances[-1], 0)
    variances, left = variances[kept], left[:, kept]
    lengths = np.sqrt(count * variances)
    return exact.T @ left / lengths, variances, (left * lengths).astype(np.float32)


def main_axes(covariance: Floats) -> tuple[Floats, Floats]:
    """All axes, so that rotating loses nothing."""
    variances, axes = np.linalg.eigh(covariance)
    return axes, np.maximum(variances, 0)


class Pool:
    """Maps a function over numbers; results come in order, so that their sum is the same with any number of threads.

    `device` is the torch device for large passes over rows; None if the CPU makes them all.
    """

    def __init__(self, executor: ThreadPoolExecutor | None, threads: int, device: str | None = None) -> None:
        self._executor, self._threads, self.device = executor, threads, device

    def map(self, function: Callable[[int], Result], count: int) -> Iterator[Result]:
        if self._executor is None:
            yield from map(function, range(count))
            return
        ahead = self._threads + 1  # results may be large: few wait
        waiting = [self._executor.submit(function, number) for number in range(min(count, ahead))]
        for number in range(count):
            yield waiting.pop(0).result()
            if number + ahead < count:
                waiting.append(self._executor.submit(function, number + ahead))


@contextmanager
def pool_of(threads: int, device: str | None = None) -> Iterator[Pool]:
    """A pool in which each thread multiplies alone: a product's bytes may depend on how many threads share it.

    With the name of a torch `device`, large passes over rows are made there.
    """
    with threadpool_limits(1, user_api="blas"):
        if threads == 1:
            yield Pool(None, 1, device)
        else:
            with ThreadPoolExecutor(threads) as executor:
                yield Pool(executor, threads, device)
