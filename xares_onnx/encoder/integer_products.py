"""Products of 8-bit numbers in a model's graph, and those that a CPU without VNNI gets wrong, by arithmetic on the graph.

On x86-64 with AVX2 or AVX-512 and without VNNI, ONNX Runtime multiplies unsigned by signed bytes with vpmaddubsw, which adds
two neighbouring products in 16 bits and saturates: -32,768 to 32,767. Whether two weights can get there is arithmetic:

    unsigned activations, 0 to 255:     255 * (w1 + w2) is past 32,767 if two weights of one sign have |w1| + |w2| > 128
    signed activations, -128 to 127:    -128 * (w1 + w2) is past -32,768 if two unsigned weights have w1 + w2 > 256

So 7 bits, -64 to 64, are always right: 2 * 64 * 255 = 32,640. Neighbours are rows 2i and 2i+1 along the axis of the sum.

These types meet that instruction (MLAS's platform.cpp and qgemm.h, and ONNX Runtime 1.31.1 run under an emulated Haswell):
unsigned activations by signed weights, in every operator named here but depthwise QLinearConv; between QuantizeLinear and
DequantizeLinear around a float operator signed activations too, because ONNX Runtime makes them unsigned on x86-64; and
unsigned weights by signed activations in ConvInteger, which passes its weights first. Unsigned by unsigned is multiplied in
16 bits and added in 32, and signed by signed has a portable kernel: both are exact.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx

__all__ = [
    "LARGEST",
    "Product",
    "Scope",
    "computes_in_integers",
    "initializer",
    "input_of",
    "integer_products",
    "largest_pair_sum",
    "number_of",
    "scopes",
]

LARGEST = 32_767  # of 16 bits
_SMALLEST = -32_768
_UNSIGNED, _SIGNED = 2, 3  # TensorProto's types of a byte
_RANGES = {_UNSIGNED: (0, 255), _SIGNED: (-128, 127)}
_BYTES = {_UNSIGNED: np.uint8, _SIGNED: np.int8}

# Places of the first and the second operand among an operator's inputs.
_MATRIX_PRODUCTS = {
    "DynamicQuantizeMatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "MatMulIntegerToFloat": (0, 1),
    "QAttention": (0, 1),
    "QGemm": (0, 3),
    "QLinearMatMul": (0, 3),
}
_CONVOLUTIONS = {"ConvInteger": (0, 1), "QLinearConv": (0, 3)}
_BETWEEN_DEQUANTIZED = {"Conv", "Gemm", "MatMul"}
_RECURRENT = {"DynamicQuantizeLSTM"}  # activations are made unsigned inside; weights are inputs 1 and 2
_MADE_UNSIGNED = {"DynamicQuantizeLSTM", "DynamicQuantizeMatMul"}
_OTHERS = {"DynamicQuantizeLinear", "MatMulNBits", "QLinearAdd", "QLinearMul", "QuantizeLinear"}
_IN_INTEGERS = {*_MATRIX_PRODUCTS, *_CONVOLUTIONS, *_RECURRENT, *_OTHERS}
_ZERO_POINTS = {
    "QLinearConv": 7,
    "QLinearMatMul": 7,
    "QGemm": 8,
    "QuantizeLinear": 2,
}  # the input that has the type of the output
_KERNEL = 1_000  # in place of an axis: all of a convolution's kernel is summed
_DEEPEST = 50  # most operators between a tensor and the one that determines its type


@dataclass(frozen=True)
class Product:
    """One product of bytes.

    `largest` is the greatest sum of two neighbouring products, for the worst activations, and `share` the share of pairs of
    weights that can exceed 16 bits; both are 0 if the types never saturate. `constant` says whether the weights are known:
    if both operands are computed, the worst is assumed.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    largest: int
    share: float
    constant: bool = True

    @property
    def saturates(self) -> bool:
        """Whether some activations make it wrong."""
        return self.share > 0


def computes_in_integers(model: onnx.ModelProto) -> bool:
    """Whether a graph quantises activations, so that its numbers depend on how the processor multiplies bytes."""
    return any(node.op_type in _IN_INTEGERS for scope in scopes(model) for node in scope.nodes)


def integer_products(model: onnx.ModelProto, folder: Path) -> Iterator[Product]:
    """Every product of bytes in a model, without expanding its functions.

    Args:
        model: A model that `check_model` has passed.
        folder: Of the model's external weights, which are read one by one.
    """
    for scope in scopes(model):
        for node in scope.nodes:
            for first, second, axes, unsigned in _operands(node, scope):
                yield _product(node, scope, folder, first, second, axes, made_unsigned=unsigned)


def largest_pair_sum(weights: npt.NDArray[Any], axis: int) -> tuple[int, float]:
    """The greatest sum of two neighbouring products, and the share of pairs of weights that can exceed 16 bits.

    Args:
        weights: Bytes, signed for unsigned activations or unsigned for signed ones.
        axis: Axis of the sum; if its length is odd, the last weight is a pair with 0.
    """
    rows = np.moveaxis(weights, axis, 0)
    least, most = _RANGES[_UNSIGNED if weights.dtype == np.int8 else _SIGNED]
    if len(rows) % 2:
        rows = np.concatenate([rows, np.zeros_like(rows[:1])])
    positive = _pair_sums(np.maximum(rows, 0))
    negative = _pair_sums(np.minimum(rows, 0))
    # Activations are independent, so the worst ones are at one end of their range for positive weights, at the other for
    # negative ones.
    high = most * positive + least * negative
    low = least * positive + most * negative
    largest = max(int(high.max()), -int(low.min()))
    return largest, float(((high > LARGEST) | (low < _SMALLEST)).mean())


def _pair_sums(rows: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    sums: npt.NDArray[np.int32] = np.add(rows[0::2], rows[1::2], dtype=np.int32)
    return sums


# ---------------------------------------------------------------- graphs


class Scope:
    """Nodes that see the same names, and the source of each name: an initializer, a node, or a declared type."""

    def __init__(self, graph: Any, outer: Scope | None) -> None:
        self.nodes: Sequence[onnx.NodeProto] = graph.node
        self.tensors: ChainMap[str, onnx.TensorProto] = outer.tensors.new_child() if outer else ChainMap()
        self.makers: ChainMap[str, onnx.NodeProto] = outer.makers.new_child() if outer else ChainMap()
        self.types: ChainMap[str, int] = outer.types.new_child() if outer else ChainMap()
        for tensor in getattr(graph, "initializer", ()):
            self.tensors[tensor.name] = tensor
        for value in (*getattr(graph, "value_info", ()), *(v for v in graph.input if not isinstance(v, str))):
            self.types[value.name] = value.type.tensor_type.elem_type
        for node in graph.node:
            for attribute in node.attribute if node.op_type == "Constant" else ():
                if attribute.name == "value":
                    self.tensors[node.output[0]] = attribute.t
            self.makers.update(dict.fromkeys(node.output, node))

    def maker(self, name: str, *operators: str) -> onnx.NodeProto | None:
        """The node that computes a tensor, if its operator is one of `operators`."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type in operators else None

    def type_of(self, name: str) -> int:
        """A tensor's type, from its source; 0 if that is unknown."""
        for _ in range(_DEEPEST):
            if name in self.tensors:
                return int(self.tensors[name].data_type)
            node = self.makers.get(name)
            if node is None:
                break
            if node.op_type == "DynamicQuantizeLinear":
                return _UNSIGNED
            if node.op_type in _ZERO_POINTS:
                name = input_of(node, _ZERO_POINTS[node.op_type])
                if not name:
                    return number_of(node, "output_dtype", _UNSIGNED)
            elif node.op_type == "Cast":
                return number_of(node, "to", 0)
            else:  # other operators move values and keep their type
                name = input_of(node, 0)
        return self.types.get(name, 0)


def scopes(model: onnx.ModelProto) -> Iterator[Scope]:
    """The scopes of the graph, of its subgraphs, and of functions."""
    waiting = [Scope(model.graph, None), *(Scope(function, None) for function in model.functions)]
    while waiting:
        scope = waiting.pop()
        yield scope
        for node in scope.nodes:
            for attribute in node.attribute:
                graphs = (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs
                waiting.extend(Scope(graph, scope) for graph in graphs)


def _operands(node: onnx.NodeProto, scope: Scope) -> Iterator[tuple[str, str, tuple[int, int], bool]]:
    """A node's products of bytes: names of both operands, the axis of the sum in each, and whether ONNX Runtime makes signed
    activations unsigned."""
    kind = node.op_type
    if kind in _MATRIX_PRODUCTS:
        first, second = (input_of(node, place) for place in _MATRIX_PRODUCTS[kind])
        yield first, second, _summed(node), kind in _MADE_UNSIGNED
    elif kind in _CONVOLUTIONS:
        activations, weights = (input_of(node, place) for place in _CONVOLUTIONS[kind])
        operands = (weights, activations) if kind == "ConvInteger" else (activations, weights)
        yield *operands, (_KERNEL, _KERNEL), False
    elif kind in _RECURRENT:
        yield from ((input_of(node, 0), input_of(node, place), (1, 1), True) for place in (1, 2))
    elif kind in _BETWEEN_DEQUANTIZED:
        sources = [scope.maker(input_of(node, place), "DequantizeLinear") for place in (0, 1)]
        if all(sources):
            first, second = (input_of(source, 0) for source in sources if source is not None)
            if {scope.type_of(first), scope.type_of(second)} <= {0, *_BYTES}:
                yield first, second, (_KERNEL, _KERNEL) if kind == "Conv" else _summed(node), True


def _summed(node: onnx.NodeProto) -> tuple[int, int]:
    """The axes along which a matrix product sums its first and its second operand."""
    return (-2 if number_of(node, "transA", 0) else -1), (-1 if number_of(node, "transB", 0) else -2)


def _product(
    node: onnx.NodeProto,
    scope: Scope,
    folder: Path,
    first: str,
    second: str,
    axes: tuple[int, int],
    *,
    made_unsigned: bool,
) -> Product:
    name = node.name or (node.output[0] if node.output else "")
    # An unknown type is assumed to be the one that saturates.
    types = [scope.type_of(first) or _UNSIGNED, scope.type_of(second) or _SIGNED]
    constants = [_constant(operand, scope, folder) for operand in (first, second)]
    if made_unsigned and constants[0] is None:
        types[0] = _UNSIGNED
    weights, axis = (constants[0], axes[0]) if constants[0] is not None else (constants[1], axes[1])
    shape = () if weights is None else weights.shape
    if types != [_UNSIGNED, _SIGNED] or (weights is not None and _widened(node, weights)):
        return Product(name, node.op_type, shape, 0, 0.0)
    if weights is None:
        return Product(name, node.op_type, shape, 2 * 128 * 255, 1.0, constant=False)
    if node.op_type in {"Conv", "QLinearConv"}:
        weights = np.moveaxis(weights, 1, -1)  # the input's channels are innermost; in ConvInteger they are outermost
    if axis == _KERNEL:
        weights, axis = weights.reshape(len(weights), -1), 1
    largest, share = largest_pair_sum(weights, axis if weights.ndim > 1 else 0)
    return Product(name, node.op_type, shape, largest, share)


def _widened(node: onnx.NodeProto, weights: npt.NDArray[Any]) -> bool:
    """Whether ONNX Runtime adds in 32 bits nonetheless, as in depthwise convolutions, or there is nothing to add."""
    if not weights.size or not weights.ndim:
        return True
    depthwise = weights.shape[1:2] == (1,) and number_of(node, "group", 1) == len(weights) > 1
    return depthwise and node.op_type in {"Conv", "QLinearConv"}


def _constant(name: str, scope: Scope, folder: Path) -> npt.NDArray[Any] | None:
    """A constant tensor of bytes, transposed or quantised as in its graph; None if the tensor is computed."""
    if name in scope.tensors:
        return initializer(name, scope, folder)
    if (node := scope.maker(name, "Transpose")) is not None:
        values = _constant(input_of(node, 0), scope, folder)
        order = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
        return None if values is None else values.transpose(order)
    if (node := scope.maker(name, "QuantizeLinear")) is not None:
        values, scale = (initializer(input_of(node, place), scope, folder) for place in (0, 1))
        zero = initializer(input_of(node, 2), scope, folder)
        if values is not None and scale is not None:
            return _quantized(values, scale, np.zeros((), np.uint8) if zero is None else zero, number_of(node, "axis", 1))
    return None


def initializer(name: str, scope: Scope, folder: Path) -> npt.NDArray[Any] | None:
    from onnx import numpy_helper

    tensor = scope.tensors.get(name)
    return None if tensor is None else numpy_helper.to_array(tensor, str(folder))


def _quantized(
    values: npt.NDArray[Any], scale: npt.NDArray[Any], zero: npt.NDArray[Any], axis: int
) -> npt.NDArray[Any] | None:
    """QuantizeLinear with one scale, or one per index of `axis`; None for later opsets' blocks and for other types."""
    if zero.dtype not in (np.int8, np.uint8) or max(scale.ndim, zero.ndim) > 1:
        return None
    along = [-1 if index == axis % values.ndim else 1 for index in range(values.ndim)]
    scale, zero = (part.reshape(along if part.size > 1 else []) for part in (scale, zero))
    limits = np.iinfo(zero.dtype)
    whole: npt.NDArray[Any] = np.clip(np.rint(values / scale) + zero.astype(np.float32), limits.min, limits.max)
    return whole.astype(zero.dtype)


def input_of(node: onnx.NodeProto, place: int) -> str:
    return node.input[place] if place < len(node.input) else ""


def number_of(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)
