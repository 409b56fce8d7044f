"""A model's graph by tensor name, and the float operators that its nodes stand for.

Quantizers and exporters write one operator in many ways: a product of matrices may be MatMul, Gemm with its bias, or six
nodes around MatMulInteger; a normalisation one node or nine. A `Step` is the operator, whatever the nodes: what it reads
and writes are float tensors that two versions of a model have in common. Runs in the worker process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError

if TYPE_CHECKING:
    import onnx

FLOATS = frozenset({1, 10, 11, 16})  # float32, float16, double, bfloat16 of `TensorProto.DataType`
_PASSING = frozenset({"Cast", "Identity", "Dropout", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_NOT_FLOAT = {
    *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not", "Xor", "IsNaN", "IsInf"),
    *("Shape", "Size", "NonZero", "ArgMax", "ArgMin"),
    *("QuantizeLinear", "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear"),
}
_RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"})
# Operators whose output moves values only: what goes wrong in them shows in the next operator.
MOVING = frozenset(["Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Split", "Slice", "Gather", "Expand", "Pad"])
_SAME = {
    "DynamicQuantizeLSTM": "LSTM",
    "DynamicQuantizeMatMul": "MatMul",
    "FastGelu": "Gelu",
    "Gemm": "MatMul",
    "MatMulIntegerToFloat": "MatMul",
    "MatMulInteger": "MatMul",
    "MatMulNBits": "MatMul",
    "ConvInteger": "Conv",
    "QAttention": "Attention",
}
_INTEGER = {
    *("MatMulInteger", "ConvInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    *("DynamicQuantizeLSTM", "QAttention", "MatMulNBits"),
}
_BIASED = frozenset({"MatMul", "Conv"})


@dataclass(frozen=True)
class Step:
    """One float operator of a graph.

    `operator` is its float name, `name` that of its main node, `inputs` the float tensors it reads, `weights` its constant
    ones, `nodes` the numbers of the nodes that make it up. `integer` says whether it multiplies integers, or reads or holds
    what was quantised.
    """

    operator: str
    name: str
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    nodes: tuple[int, ...]
    integer: bool

    @property
    def output(self) -> str:
        return self.outputs[0]

    @property
    def weighted(self) -> bool:
        return bool(self.weights)

    @property
    def measured(self) -> bool:
        return self.operator not in MOVING


class Graph:
    """The nodes of a model's main graph in topological order, with the maker and the readers of each tensor.

    Raises `ModelError` if they are out of order.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        graph = model.graph
        self.nodes = list(graph.node)
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        for node in self.nodes:
            for value in node.attribute if node.op_type == "Constant" else ():
                if value.name == "value":
                    self.tensors[node.output[0]] = value.t
        self.fed = [value.name for value in graph.input if value.name not in self.tensors]
        self.outputs = [value.name for value in graph.output]
        self.reads = [tuple(dict.fromkeys(names_read(node))) for node in self.nodes]
        self.maker: dict[str, int] = {}
        self.readers: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in self.reads[i]:
                self.readers.setdefault(name, []).append(i)
                if name not in self.maker and name not in self.tensors and name not in self.fed:
                    raise ModelError("the nodes of the graph are out of order, so they cannot be compared; export it again")
            self.maker.update({name: i for name in node.output if name})
        self.constants, self.data = self._kinds()

    @property
    def opset(self) -> int:
        return max((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), default=0)

    def _kinds(self) -> tuple[set[str], set[str]]:
        """Tensors that depend on no input, and float tensors that carry what was put in (shapes of it do not)."""
        constants = set(self.tensors)
        data = {value.name for value in self.model.graph.input if value.type.tensor_type.elem_type in FLOATS}
        data -= constants
        for i, node in enumerate(self.nodes):
            names = self.reads[i]
            if all(name in constants for name in names) and node.op_type not in _RANDOM:
                constants.update(name for name in node.output if name)
            elif node.op_type == "Cast":
                if attribute(node, "to", 0) in FLOATS and (names[0] in data or self._comes_of_product(names[0])):
                    data.update(node.output)
            elif node.op_type == "DequantizeLinear" or (
                node.op_type not in _NOT_FLOAT and any(name in data for name in names)
            ):
                data.update(name for name in node.output if name)
        return constants, data

    def _comes_of_product(self, name: str) -> bool:
        return name in self.maker and self.nodes[self.maker[name]].op_type in ("MatMulInteger", "ConvInteger")

    def source(self, name: str) -> str:
        """The float tensor that a tensor is a cast or quantised copy of."""
        while name in self.maker and self.nodes[self.maker[name]].op_type in _PASSING:
            node = self.nodes[self.maker[name]]
            if node.op_type == "DynamicQuantizeLinear" and name != node.output[0]:
                return name
            if node.op_type == "Cast" and self._comes_of_product(node.input[0]):
                return name
            name = node.input[0]
        return name

    def is_quantized(self, name: str) -> bool:
        """Whether a tensor went through integers on the way from the operator that computes it."""
        while name in self.maker and self.nodes[self.maker[name]].op_type in _PASSING | MOVING:
            node = self.nodes[self.maker[name]]
            if node.op_type in ("DequantizeLinear", "DynamicQuantizeLinear"):
                return True
            if not node.input:
                break
            name = node.input[0]
        return False

    def sole_reader(self, name: str, *operators: str) -> int | None:
        """The only node that reads a tensor, or its quantised copy, if its operator is one of `operators`."""
        while True:
            readers = self.readers.get(name, [])
            if len(readers) != 1 or name in self.outputs:
                return None
            node = self.nodes[readers[0]]
            if node.op_type in operators:
                return readers[0]
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                return None
            name = node.output[0]

    def made_by(self, name: str, *operators: str) -> onnx.NodeProto | None:
        """The node that makes a tensor, or the one that it is a copy of, if its operator is one of `operators`."""
        name = self.source(name)
        node = self.nodes[self.maker[name]] if name in self.maker else None
        return node if node is not None and node.op_type in operators else None

    def constant(self, name: str, folder: str = "") -> npt.NDArray[Any] | None:
        """The value of a constant tensor, dequantised or transposed as in the graph; None if it is made otherwise."""
        from onnx import numpy_helper

        if name in self.tensors:
            return numpy_helper.to_array(self.tensors[name], folder)
        node = self.nodes[self.maker[name]] if name in self.maker else None
        if node is None or name not in self.constants:
            return None
        if node.op_type == "Identity" or node.op_type == "Cast":
            return self.constant(node.input[0], folder)
        values = [self.constant(each, folder) if each else None for each in node.input]
        if not values or values[0] is None:
            return None
        if node.op_type == "Transpose":
            order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
            return values[0].transpose(order)
        if node.op_type == "DequantizeLinear" and values[1] is not None:
            zero = values[2] if len(values) > 2 and values[2] is not None else np.zeros((), values[0].dtype)
            return dequantized(values[0], values[1], zero, attribute(node, "axis", 1))
        return None

    @cached_property
    def steps(self) -> list[Step]:
        """The float operators on the way to the outputs, in topological order of their main nodes."""
        return _Reader(self).steps()

    @cached_property
    def step_of(self) -> dict[str, int]:
        """The number of the step that makes each float tensor."""
        return {name: i for i, step in enumerate(self.steps) for name in step.outputs}


def dequantized(
    values: npt.NDArray[Any], scale: npt.NDArray[Any], zero: npt.NDArray[Any], axis: int
) -> npt.NDArray[np.float32] | None:
    """DequantizeLinear with one scale, or one per index of `axis`; None for blocks of scales."""
    if scale.ndim > 1 or (scale.size > 1 and values.shape[axis] != scale.size):
        return None
    along = [-1 if index == axis % max(values.ndim, 1) else 1 for index in range(values.ndim)]
    scale, zero = (part.reshape(along if part.size > 1 else ()) for part in (scale, zero))
    result: npt.NDArray[np.float32] = (values.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)
    return result


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(each.i) for each in node.attribute if each.name == name), default)


def inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for each in node.attribute:
        if each.HasField("g"):
            yield each.g
        yield from each.graphs


def names_read(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node reads, and those that its inner graphs read from outside."""
    yield from (name for name in node.input if name)
    for graph in inner_graphs(node):
        own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        for inner in graph.node:
            yield from (name for name in names_read(inner) if name not in own)
            own.update(inner.output)
        yield from (value.name for value in graph.output if value.name not in own)


class _Reader:
    """Reads steps: first those that are several nodes, then the rest."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._taken: dict[int, int] = {}  # node -> main node of its step
        self._last: dict[int, int] = {}  # main node -> the node that makes the step's output
        self._float_name: dict[int, str] = {}

    def steps(self) -> list[Step]:
        graph = self._graph
        needed = ancestors(graph, graph.outputs)
        for i, node in enumerate(graph.nodes):
            if i in needed and i not in self._taken:
                match node.op_type:
                    case "MatMulInteger" | "ConvInteger":
                        self._integer_product(i)
                    case "Div":
                        self._normalisation(i)
                    case "Erf":
                        self._gelu(i)
        for i, node in enumerate(graph.nodes):
            if i in needed and self._name_of(i, node) in _BIASED:
                self._bias(i)
        of_main: dict[int, list[int]] = {}
        for i in sorted(needed):
            of_main.setdefault(self._taken.get(i, i), []).append(i)
        steps = [self._step(main, nodes) for main, nodes in of_main.items()]
        return sorted((step for step in steps if step is not None), key=lambda step: step.nodes[-1])

    def _name_of(self, i: int, node: onnx.NodeProto) -> str:
        return self._float_name.get(i) or _SAME.get(node.op_type, node.op_type)

    def _step(self, main: int, nodes: Sequence[int]) -> Step | None:
        graph, node = self._graph, self._graph.nodes[main]
        if node.op_type in _PASSING or node.op_type == "Constant":
            return None
        last = graph.nodes[self._last.get(main, main)]
        outputs = tuple(name for name in last.output if name in graph.data)
        own = {name for i in nodes for name in graph.nodes[i].output}
        read = [name for i in nodes for name in graph.reads[i] if name not in own]
        inputs = tuple(dict.fromkeys(s for name in read if (s := graph.source(name)) in graph.data and s not in own))
        if not outputs or not inputs:
            return None
        weights = tuple(name for i in nodes for name in graph.reads[i] if name in graph.constants)
        quantized = node.op_type in _INTEGER or any(graph.is_quantized(name) for name in read)
        return Step(self._name_of(main, node), node.name or outputs[0], outputs, inputs, weights, tuple(nodes), quantized)

    def _take(self, main: int, nodes: Sequence[int], last: int, name: str | None = None) -> None:
        self._taken.update(dict.fromkeys(nodes, main))
        self._last[main] = last
        if name:
            self._float_name[main] = name

    def _integer_product(self, i: int) -> None:
        graph = self._graph
        cast = graph.sole_reader(graph.nodes[i].output[0], "Cast")
        product = graph.sole_reader(graph.nodes[cast].output[0], "Mul") if cast is not None else None
        if cast is None or product is None:
            return
        nodes = [i, cast, product]
        for name in graph.nodes[product].input:
            scale = graph.maker.get(name)
            if scale is not None and graph.nodes[scale].op_type == "Mul" and name not in graph.data:
                nodes.append(scale)
        self._take(i, nodes, product)

    def _bias(self, i: int) -> None:
        graph = self._graph
        last = self._last.get(i, i)
        add = graph.sole_reader(graph.nodes[last].output[0], "Add")
        if add is None or not any(name in graph.constants for name in graph.nodes[add].input):
            return
        self._take(i, [i, add], add)

    def _normalisation(self, i: int) -> None:
        """(x - mean) / sqrt(variance + epsilon), with weight and bias if they follow."""
        graph = self._graph
        node = graph.nodes[i]
        centred = graph.made_by(node.input[0], "Sub")
        root = graph.made_by(node.input[1], "Sqrt")
        total = graph.made_by(root.input[0], "Add") if root is not None else None
        if centred is None or root is None or total is None:
            return
        mean = graph.made_by(centred.input[1], "ReduceMean")
        variance = next((v for name in total.input if (v := graph.made_by(name, "ReduceMean"))), None)
        square = graph.made_by(variance.input[0], "Pow", "Mul") if variance is not None else None
        if mean is None or square is None or graph.source(mean.input[0]) != graph.source(centred.input[0]):
            return
        other = graph.made_by(graph.source(square.input[0]), "Sub")
        if variance is None or other is None or _sources(graph, other) != _sources(graph, centred):
            return
        parts = (centred, root, total, mean, variance, square, other)
        nodes = [i, *(graph.maker[part.output[0]] for part in parts)]
        last = i
        for operator in ("Mul", "Add"):
            reader = graph.sole_reader(graph.nodes[last].output[0], operator)
            if reader is not None and any(name in graph.constants for name in graph.nodes[reader].input):
                nodes.append(reader)
                last = reader
        self._take(i, nodes, last, "LayerNormalization")

    def _gelu(self, i: int) -> None:
        """x * (1 + erf(x / sqrt 2)) / 2."""
        graph = self._graph
        scaled = graph.made_by(graph.nodes[i].input[0], "Div", "Mul")
        add = graph.sole_reader(graph.nodes[i].output[0], "Add")
        product = graph.sole_reader(graph.nodes[add].output[0], "Mul") if add is not None else None
        if scaled is None or add is None or product is None:
            return
        nodes, last = [i, graph.maker[scaled.output[0]], add, product], product
        names = _sources(graph, graph.nodes[product])
        other = next((name for name in names if name != graph.nodes[add].output[0]), "")
        half = graph.made_by(other, "Mul")
        if half is not None and set(_sources(graph, half)) & set(_sources(graph, scaled)) & graph.data:
            nodes.append(graph.maker[other])
        elif (reader := graph.sole_reader(graph.nodes[product].output[0], "Mul")) is not None:
            nodes.append(reader)
            last = reader
        self._take(i, nodes, last, "Gelu")


def _sources(graph: Graph, node: onnx.NodeProto) -> list[str]:
    return [graph.source(name) for name in node.input]


def ancestors(graph: Graph, names: Sequence[str], stops: Callable[[str], bool] = lambda _: False) -> set[int]:
    """The nodes that make tensors, back to the inputs or to the first tensors at which `stops` is true."""
    waiting = list(names)
    nodes: set[int] = set()
    while waiting:
        name = waiting.pop()
        maker = graph.maker.get(name)
        if maker is None or maker in nodes:
            continue
        nodes.add(maker)
        waiting.extend(read for read in graph.reads[maker] if not stops(read))
    return nodes
