"""Multiply-adds of a model by precision, counted from what ONNX Runtime ran: an operator of the file says little of them,
because ONNX Runtime fuses some quantised operators and runs others in float.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from .kernels import Kernel, Tensor

__all__ = ["in_full", "multiply_adds", "precision_of", "shares"]

_PRODUCTS = {
    "DynamicQuantizeMatMul",
    "FusedMatMul",
    "FusedMatMulActivation",
    "MatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QLinearMatMul",
}
_GENERAL_PRODUCTS = {"FusedGemm", "Gemm", "QGemm"}
_PACKED = "MatMulNBits"
_CONVOLUTIONS = {"Conv", "ConvInteger", "FusedConv", "NhwcConv", "NhwcFusedConv", "QLinearConv"}
_TRANSPOSED = "ConvTranspose"
_GATES = {"DynamicQuantizeLSTM": 4, "GRU": 3, "LSTM": 4, "RNN": 1}
_PROJECTED_ATTENTION = {"Attention", "QAttention"}  # of com.microsoft: the projections are inside
_IN_BYTES = {
    "ConvInteger",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QAttention",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
}


def shares(kernels: Iterable[Kernel]) -> dict[str, float]:
    """The share of the multiply-adds that each precision has, the largest first; empty if there are none."""
    counts: Counter[str] = Counter()
    for kernel in kernels:
        if products := multiply_adds(kernel):
            counts[precision_of(kernel)] += products
    total = sum(counts.values())
    return {precision: count / total for precision, count in counts.most_common()}


def in_full(precision: str) -> bool:
    """Whether it is no less than that of float32."""
    return precision in {"float32", "float64"}


def precision_of(kernel: Kernel) -> str:
    """What a kernel multiplies in: `int8`, a float type, or `N-bit weights`, which it takes apart as it goes."""
    if kernel.operator in _IN_BYTES:
        return "int8"
    if kernel.operator == _PACKED and len(kernel.inputs) > 1:
        weights = kernel.inputs[0].shape[-1] * kernel.outputs[0].shape[-1]
        bits = max(1, 8 * kernel.inputs[1].values // weights)  # more than there are, if the last block is filled up
        return f"{1 << bits.bit_length() - 1}-bit weights"
    return kernel.inputs[0].type


def multiply_adds(kernel: Kernel) -> int:
    """Of products of matrices, convolutions, recurrences and attention; 0 for any other kernel."""
    if not kernel.inputs or not kernel.outputs or not all(kernel.inputs[0].shape) or not all(kernel.outputs[0].shape):
        return 0
    operator, data, output = kernel.operator, kernel.inputs[0], kernel.outputs[0]
    if operator in _PRODUCTS:
        return output.values * _summed(kernel, data.shape, output.shape)
    if operator == _PACKED or operator == "Einsum":
        return output.values * data.shape[-1] if data.shape else 0
    if operator in _GENERAL_PRODUCTS:
        return data.values * output.shape[-1] if output.shape else 0
    if operator in _CONVOLUTIONS or operator == _TRANSPOSED:
        weights = _weights(kernel)
        per_value = math.prod(weights.shape[1:]) if weights else 0
        return (data if operator == _TRANSPOSED else output).values * per_value
    if operator in _GATES:
        return _recurrent(_GATES[operator], data.shape, output.shape)
    if operator in _PROJECTED_ATTENTION and len(data.shape) == len(output.shape) == 3:
        batch, steps, size = data.shape
        width = output.shape[-1]
        return batch * steps * (3 * size * width + 2 * steps * width)
    if operator in {"Attention", "MultiHeadAttention"} and len(kernel.inputs) > 2:
        return _attention(*(tensor.shape for tensor in kernel.inputs[:3]))
    return 0


def _summed(kernel: Kernel, data: tuple[int, ...], output: tuple[int, ...]) -> int:
    """The length of the axis that a product sums. FusedMatMul may transpose its operands."""
    if len(data) < 2 or len(output) < 2:
        return data[-1] if data else 0
    return data[-1] * data[-2] // output[-2] if kernel.operator == "FusedMatMul" else data[-1]


def _weights(kernel: Kernel) -> Tensor | None:
    """The second tensor of as many axes as the first: scales and zero points are between them."""
    axes = len(kernel.inputs[0].shape)
    return next((tensor for tensor in kernel.inputs[1:] if len(tensor.shape) == axes), None)


def _recurrent(gates: int, data: tuple[int, ...], output: tuple[int, ...]) -> int:
    """`output` is (steps, directions, batch, size), or the last step alone."""
    if len(data) != 3 or len(output) < 3:
        return 0
    steps, batch, size = data
    directions, width = output[-3], output[-1]
    return steps * batch * directions * gates * width * (size + width)


def _attention(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> int:
    """(batch, steps, width) or (batch, heads, steps, width) each, the number of heads being that of the query."""
    if not len(query) == len(key) == len(value) >= 3:
        return 0
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
