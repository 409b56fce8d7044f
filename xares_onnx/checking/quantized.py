"""Quantised weights in a model's file: their scales, how many of them sit at the ends of their range, and float weights that
were quantised once and folded back. Arithmetic on the file: nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..encoder.integer_products import Scope, initializer, input_of, scopes

if TYPE_CHECKING:
    import onnx

__all__ = ["Folded", "Scales", "Weights", "folded_weights", "is_on_a_grid", "kept_matrices", "quantized"]

# Places among an operator's inputs: of a quantised tensor, and of its scales; None for the output's.
_SCALED: dict[str, tuple[tuple[int | None, int], ...]] = {
    "DequantizeLinear": ((0, 1),),
    "DynamicQuantizeLSTM": ((1, 8), (2, 10)),
    "DynamicQuantizeMatMul": ((1, 2),),
    "MatMulIntegerToFloat": ((0, 2), (1, 3)),
    "MatMulNBits": ((None, 2),),  # several weights in a byte
    "QAttention": ((0, 3), (1, 4)),
    "QGemm": ((0, 1), (3, 4), (None, 7)),
    "QLinearAdd": ((0, 1), (3, 4), (None, 6)),
    "QLinearConv": ((0, 1), (3, 4), (None, 6)),
    "QLinearMatMul": ((0, 1), (3, 4), (None, 6)),
    "QLinearMul": ((0, 1), (3, 4), (None, 6)),
    "QuantizeLinear": ((None, 1),),
}
_UNSCALED = {"ConvInteger": 1, "MatMulInteger": 1}  # their products are scaled by a Mul behind them
_BYTES = {2, 3}  # TensorProto's types of a byte
_SMALLER = {21, 22, 25, 26}  # and of 4 and 2 bits
_FLOATS = {1, 10, 11, 16}
_ENDS = {
    -128,
    -127,
    -64,
    -63,
    63,
    64,
    127,
    255,
}  # where quantizers to 8 and to 7 bits cut; 0 is the level of pruned weights too
_LEAST_PER_SCALE = 16  # weights; of fewer, the largest are a good part

_MULTIPLIED = {"Conv": 1, "ConvTranspose": 1, "FusedMatMul": 1, "GRU": 1, "Gemm": 1, "LSTM": 1, "MatMul": 1}
_SAMPLED = 4096  # weights of one column or one channel
_LEAST_SAMPLED = 300
_LEVELS = (32, 256)  # different values of a sample


@dataclass(frozen=True)
class Scales:
    """Constant scales called `name`, and how many of them are wrong in which way."""

    name: str
    count: int
    wrong: dict[str, int]


@dataclass(frozen=True)
class Weights:
    """8-bit weights. `saturated` is the share at the ends of their range, without the two that each scale may put there."""

    name: str
    saturated: float


@dataclass(frozen=True)
class Folded:
    """Float weights that products read: how many there are, and how many of them are multiples of one step."""

    weights: int = 0
    on_a_grid: int = 0


def kept_matrices(model: onnx.ModelProto) -> tuple[tuple[int, ...], ...]:
    """The shapes of the matrices that are kept in 8 bits or less."""
    return tuple(
        tuple(tensor.dims)
        for scope in scopes(model)
        for tensor in scope.tensors.maps[0].values()
        if len(tensor.dims) > 1 and tensor.data_type in _BYTES | _SMALLER
    )


def quantized(model: onnx.ModelProto, folder: Path) -> Iterator[Scales | Weights]:
    """Every constant scale and every matrix of bytes that an operator reads; each once.

    Args:
        model: A model that `check_model` has passed.
        folder: Of the model's external weights, which are read one by one.
    """
    for scope in scopes(model):
        seen: set[str] = set()
        for node in scope.nodes:
            for tensor, scales in _pairs(node, scope):
                values = initializer(scales, scope, folder) if scales and scales not in seen else None
                if values is not None:
                    yield Scales(scales, values.size, _faults(values))
                seen.add(scales)
                if tensor and tensor not in seen and _type(tensor, scope) in _BYTES:
                    weights = initializer(tensor, scope, folder)
                    count = scope.tensors[scales].dims if scales in scope.tensors else ()
                    if weights is not None and weights.ndim > 1:
                        groups = int(np.prod(count)) if scales else max(weights.shape[0], weights.shape[-1])
                        yield Weights(tensor, _saturated(weights, groups))
                seen.add(tensor)


def _pairs(node: onnx.NodeProto, scope: Scope) -> Iterator[tuple[str, str]]:
    """Names of the tensors that a node reads quantised, and of their scales; either may be empty."""
    for place, scales in _SCALED.get(node.op_type, ()):
        yield "" if place is None else input_of(node, place), input_of(node, scales)
    if node.op_type in _UNSCALED:
        yield input_of(node, _UNSCALED[node.op_type]), ""
    elif node.op_type == "Mul":
        for factor, other in ((0, 1), (1, 0)):
            maker = scope.maker(input_of(node, other), "Cast", "DynamicQuantizeLinear")
            if maker is not None and maker.op_type == "Cast":
                maker = scope.maker(input_of(maker, 0), *_UNSCALED)
            if maker is not None:
                yield "", input_of(node, factor)


def _faults(scales: npt.NDArray[Any]) -> dict[str, int]:
    values = scales.astype(np.float64)
    with np.errstate(invalid="ignore"):
        counts = {
            "NaN or infinite": np.count_nonzero(~np.isfinite(values)),
            "zero": np.count_nonzero(values == 0),
            "negative": np.count_nonzero(values < 0),
            "denormal": np.count_nonzero((values > 0) & (values < np.finfo(np.float32).tiny)),
        }
    return {fault: int(count) for fault, count in counts.items() if count}


def _saturated(weights: npt.NDArray[Any], scales: int) -> float:
    if weights.size < _LEAST_PER_SCALE * max(1, scales):
        return 0.0
    ends = _ENDS & {int(weights.min()), int(weights.max())}
    at_ends = sum(int(np.count_nonzero(weights == end)) for end in ends)
    return max(0, at_ends - 2 * scales) / weights.size


def folded_weights(model: onnx.ModelProto, folder: Path, beat: Callable[[], None] = lambda: None) -> Folded:
    """Look at one row and one column of every large float matrix that a product reads."""
    weights = on_a_grid = 0
    for scope in scopes(model):
        seen: set[str] = set()
        for node in scope.nodes:
            name = input_of(node, _MULTIPLIED[node.op_type]) if node.op_type in _MULTIPLIED else ""
            if not name or name in seen or _type(name, scope) not in _FLOATS:
                continue
            seen.add(name)
            shape = tuple(scope.tensors[name].dims)
            if len(shape) < 2 or np.prod(shape) < _LEAST_SAMPLED:
                continue
            values = initializer(name, scope, folder)
            beat()
            if values is None:
                continue
            weights += values.size
            rows = values.reshape(len(values), -1)
            if any(is_on_a_grid(part[:_SAMPLED]) for part in (rows[0], rows[:, 0], values.reshape(-1))):
                on_a_grid += values.size
    return Folded(weights, on_a_grid)


def is_on_a_grid(weights: npt.NDArray[Any]) -> bool:
    """Whether weights (values,) are whole multiples of one step, no more than 256 of them apart, as quantised ones are."""
    if len(weights) < _LEAST_SAMPLED:
        return False
    levels = np.unique(weights.astype(np.float64))
    if not _LEVELS[0] <= len(levels) <= _LEVELS[1] or not np.isfinite(levels).all():
        return False
    steps = np.diff(levels)
    multiples = steps / steps.min()
    return bool(multiples.sum() < _LEVELS[1] and (np.abs(multiples - np.rint(multiples)) < 1e-2).all())


def _type(name: str, scope: Scope) -> int:
    return int(scope.tensors[name].data_type) if name in scope.tensors else 0
