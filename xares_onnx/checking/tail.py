"""The end of a model's graph: what gives the output, back to the last linear layer. Arithmetic on the file: nothing runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..encoder.integer_products import Scope, input_of, number_of

if TYPE_CHECKING:
    import onnx

__all__ = ["Tail", "read_tail"]

_ACTIVATIONS = {"HardSigmoid", "LogSoftmax", "Sigmoid", "Softmax"}
# Place of the weights among the inputs, and whether the output's width is the first of their axes.
_LINEAR = {
    "Conv": (1, True),
    "ConvInteger": (1, True),
    "DynamicQuantizeMatMul": (1, False),
    "FusedMatMul": (1, False),
    "Gemm": (1, False),
    "MatMul": (1, False),
    "MatMulInteger": (1, False),
    "MatMulIntegerToFloat": (1, False),
    "QGemm": (3, False),
    "QLinearConv": (3, True),
    "QLinearMatMul": (3, False),
}
_MOVES = {
    "Cast",
    "DequantizeLinear",
    "Dropout",
    "DynamicQuantizeLinear",
    "Flatten",
    "GlobalAveragePool",
    "Identity",
    "QuantizeLinear",
    "ReduceMax",
    "ReduceMean",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
_ELEMENTWISE = {"Add", "Clip", "Div", "Mul", "Sub"}
_MOST_STEPS = 50


@dataclass(frozen=True)
class Tail:
    """`activation` that gives the output, if one of probabilities does; and, if a linear layer comes before it or gives the
    output itself, its widths `before` and `after`, and the tensor `features` that enters it.
    """

    activation: str = ""
    before: int = 0
    after: int = 0
    features: str = ""


def read_tail(model: onnx.ModelProto, output: str) -> Tail:
    """The tail of one output of a model that `check_model` has passed."""
    scope = Scope(model.graph, None)
    activation, name = "", output
    for _ in range(_MOST_STEPS):
        node = scope.makers.get(name)
        if node is None:
            break
        if node.op_type in _LINEAR:
            before, after = _widths(node, scope)
            return Tail(activation, before, after, _origin(input_of(node, 0), scope)) if after else Tail(activation)
        if node.op_type in _ACTIVATIONS:
            activation = activation or node.op_type
            name = input_of(node, 0)
        elif node.op_type in _MOVES:
            name = input_of(node, 0)
        elif node.op_type in _ELEMENTWISE:
            name = _computed(node, scope)
        else:
            break
    return Tail(activation)


def _widths(node: onnx.NodeProto, scope: Scope) -> tuple[int, int]:
    """How wide the input and the output of a linear layer are; zeros if its weights are no constant matrix."""
    place, first = _LINEAR[node.op_type]
    name, turned = input_of(node, place), bool(number_of(node, "transB", 0))
    for _ in range(_MOST_STEPS):
        if name in scope.tensors:
            break
        maker = scope.maker(name, "Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Transpose")
        if maker is None:
            return 0, 0
        turned ^= maker.op_type == "Transpose"
        name = input_of(maker, 0)
    else:
        return 0, 0
    shape = tuple(scope.tensors[name].dims)
    if len(shape) < 2:
        return 0, 0
    if first:
        return shape[1], shape[0]
    return (shape[-1], shape[-2]) if turned else (shape[-2], shape[-1])


def _computed(node: onnx.NodeProto, scope: Scope) -> str:
    """The operand of an elementwise node that is not constant; of two the product of bytes that the other scales."""
    names = [name for name in node.input if name and name not in scope.tensors and name in scope.makers]
    if len(names) > 1:
        names = [name for name in names if _is_product_of_bytes(name, scope)]
    return names[0] if len(names) == 1 else ""


def _is_product_of_bytes(name: str, scope: Scope) -> bool:
    cast = scope.maker(name, "Cast")
    return cast is not None and scope.maker(input_of(cast, 0), "ConvInteger", "MatMulInteger") is not None


def _origin(name: str, scope: Scope) -> str:
    """A tensor before it was quantised."""
    for _ in range(_MOST_STEPS):
        maker = scope.maker(name, "DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear")
        if maker is None:
            break
        name = input_of(maker, 0)
    return name
