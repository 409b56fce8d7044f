"""Parts of models as models: cut out of a graph, put side by side, or put into another graph. Runs in the worker process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..encoder.limits import limits
from ..encoder.model_guard import check_model
from ..errors import ModelError, UsageError
from .graph import Graph, ancestors, inner_graphs, names_read

if TYPE_CHECKING:
    import onnx

_MOST_BYTES = (1 << 31) - (1 << 20)  # of one protobuf
# Of each operator on quantised tensors: its float operator, where the (values, scale, zero point) of each operand are, where
# the scale and zero point of the result, and where a bias in 32 bits.
_QLINEAR = {
    "QLinearConv": ("Conv", [(0, 1, 2), (3, 4, 5)], (6, 7), 8),
    "QLinearMatMul": ("MatMul", [(0, 1, 2), (3, 4, 5)], (6, 7), None),
    "QLinearAdd": ("Add", [(0, 1, 2), (3, 4, 5)], (6, 7), None),
    "QLinearMul": ("Mul", [(0, 1, 2), (3, 4, 5)], (6, 7), None),
    "QLinearSigmoid": ("Sigmoid", [(0, 1, 2)], (3, 4), None),
    "QLinearLeakyRelu": ("LeakyRelu", [(0, 1, 2)], (3, 4), None),
    "QLinearSoftmax": ("Softmax", [(0, 1, 2)], (3, 4), None),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", [(0, 1, 2)], (3, 4), None),
    "QLinearAveragePool": ("AveragePool", [(0, 1, 2)], (3, 4), None),
    "QGemm": ("Gemm", [(0, 1, 2), (3, 4, 5)], (7, 8), 6),
}
_NOT_OF_FLOAT = {"channels_last", "opset"}  # attributes of the quantised operator alone


def load(path: Path, *, trust: bool = False) -> onnx.ModelProto:
    """A model with its weights, its functions inlined, and operators on quantised tensors as float ones between
    QuantizeLinear and DequantizeLinear.

    Raises:
        ModelError: It holds what is refused, or is larger than one protobuf.
    """
    import onnx
    from onnx import inliner

    model = onnx.load_model(path, format="protobuf", load_external_data=False)
    check_model(path, model, limits(trust))
    onnx.load_external_data_for_model(model, str(path.absolute().parent))
    if model.functions:
        model = inliner.inline_local_functions(model)
    _dequantize_operators(model)
    nodes = _ordered(model.graph.node)  # ONNX Runtime takes them in any order, and converters use that
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _dequantize_operators(model: onnx.ModelProto) -> None:
    from onnx import helper

    nodes = []
    for node in model.graph.node:
        if node.op_type not in _QLINEAR or len(node.output) != 1:
            nodes.append(node)
            continue
        operator, operands, result, bias = _QLINEAR[node.op_type]
        axes = 0 if operator == "Conv" else 1
        stem = node.output[0]
        inputs = []
        for number, places in enumerate(operands):
            read = [node.input[place] for place in places if place < len(node.input)]
            inputs.append(f"{stem}/operand{number}")
            nodes.append(helper.make_node("DequantizeLinear", read, [inputs[-1]], axis=axes if number else 1))
        if bias is not None and bias < len(node.input) and node.input[bias]:
            scale = f"{stem}/bias_scale"
            nodes.append(helper.make_node("Mul", [node.input[place[1]] for place in operands], [scale]))
            inputs.append(f"{stem}/bias")
            nodes.append(helper.make_node("DequantizeLinear", [node.input[bias], scale], [inputs[-1]], axis=0))
        plain = helper.make_node(operator, inputs, [f"{stem}/float"], name=node.name)
        plain.attribute.extend(each for each in node.attribute if each.name not in _NOT_OF_FLOAT)
        nodes.append(plain)
        scaled = [f"{stem}/float", *(node.input[place] for place in result if place < len(node.input))]
        nodes.append(helper.make_node("QuantizeLinear", scaled, [stem]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def cut_out(graph: Graph, outputs: Sequence[str], types: Mapping[str, int] | None = None) -> onnx.ModelProto:
    """The part of a graph that makes `outputs` of its inputs, or of the tensors in `types` (`TensorProto` types by name)."""
    types = types or {}
    own = ancestors(graph, [name for name in outputs if name not in types], types.__contains__)
    return _model(graph, [graph.nodes[i] for i in sorted(own)], outputs, types)


def side_by_side(graph: Graph, outputs: Mapping[str, str], types: Mapping[str, int]) -> onnx.ModelProto:
    """Every part by itself: each of `outputs` (new names by tensor) as the graph makes it of the tensors in `types`.

    A tensor of `types` that is also an output is made in its own part and read in the others.
    """
    nodes: list[onnx.NodeProto] = []
    for output, new_name in outputs.items():
        own = ancestors(graph, [output], types.__contains__)
        names = {name for i in own for name in graph.nodes[i].output if name}
        mapping = {name: f"{new_name}/{name}" for name in names} | {output: new_name}
        part = [renamed(graph.nodes[i], mapping) for i in sorted(own)]
        for number, node in enumerate(part):
            node.name = f"{new_name}/{number}"
        nodes += part
    return _model(graph, nodes, list(outputs.values()), types)


def spliced(
    b: Graph, a: Graph, tensors: Mapping[str, str], chosen: Iterable[str], types: tuple[Mapping[str, int], Mapping[str, int]]
) -> onnx.ModelProto:
    """B with the operators that make some tensors as they are in A.

    Args:
        b: The graph to change.
        a: The graph that the operators are taken from, of the same opset.
        tensors: Float tensors of A by those of B that are theirs.
        chosen: Tensors of B, of those in `tensors`.
        types: The types of these tensors in A and in B; where they differ, the values are cast.

    Returns:
        The new model. What B computes for those tensors alone is gone, with its weights.
    """
    from onnx import helper

    of_b = {name: own for own, name in tensors.items()}
    inputs = dict(zip(a.fed, b.fed, strict=False))
    replaced: dict[str, str] = {}
    nodes = list(b.nodes)
    weights: dict[str, onnx.TensorProto] = {}
    for number, output in enumerate(chosen):
        theirs = tensors[output]
        own = ancestors(a, [theirs], lambda name: name in of_b or name in inputs)
        read = {name for i in own for name in a.reads[i]}
        mapping = {name: f"float/{name}" for name in read & a.tensors.keys()}
        weights |= {new: _named(a.tensors[name], new) for name, new in sorted(mapping.items())}
        mapping |= {name: inputs[name] for name in read if name in inputs}
        mapping |= {name: f"float{number}/{name}" for i in own for name in a.nodes[i].output if name not in a.tensors}
        for name in sorted(read & of_b.keys() - mapping.keys()):
            mapping[name] = of_b[name]
            if types[0].get(name, 1) != types[1].get(of_b[name], 1):
                mapping[name] = f"float{number}/read/{name}"
                nodes.append(helper.make_node("Cast", [of_b[name]], [mapping[name]], to=types[0].get(name, 1)))
        part = [renamed(a.nodes[i], mapping) for i in sorted(own) if a.nodes[i].op_type != "Constant"]
        for place, node in enumerate(part):
            node.name = f"float{number}/{place}"
        nodes += part
        replaced[output] = mapping[theirs]
        if types[0].get(theirs, 1) != types[1].get(output, 1):
            replaced[output] = f"float{number}/written"
            nodes.append(helper.make_node("Cast", [mapping[theirs]], [replaced[output]], to=types[1].get(output, 1)))
    return _rewired(b, nodes, replaced, list(weights.values()))


def _rewired(
    b: Graph, nodes: Sequence[onnx.NodeProto], replaced: Mapping[str, str], weights: Sequence[onnx.TensorProto]
) -> onnx.ModelProto:
    """B with more nodes and weights, and every reader of a replaced tensor given the new one."""
    import onnx
    from onnx import helper

    rewired = [renamed(node, replaced, outputs=False) for node in nodes]
    for output in sorted(replaced.keys() & set(b.outputs)):
        for node in rewired:
            for place, name in enumerate(node.output):
                if name == output:
                    node.output[place] = f"{output}.before"
        rewired.append(helper.make_node("Identity", [replaced[output]], [output], name=f"{output}.float"))
    model = onnx.ModelProto()
    model.CopyFrom(b.model)
    del model.graph.node[:]
    model.graph.node.extend(_ordered(rewired))
    model.graph.initializer.extend(weights)
    whole = cut_out(Graph(model), b.outputs)
    del whole.graph.output[:]
    whole.graph.output.extend(b.model.graph.output)
    whole.metadata_props.extend(b.model.metadata_props)
    domains = {node.domain for node in whole.graph.node} - {"", "ai.onnx"}
    for domain in sorted(domains - {entry.domain for entry in whole.opset_import}):
        whole.opset_import.append(helper.make_opsetid(domain, 1))
    return whole


def _ordered(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Nodes in topological order, otherwise as they are."""
    makers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    ordered: list[onnx.NodeProto] = []
    done: set[int] = set()
    for start in range(len(nodes)):
        waiting = [start]
        while waiting:
            i = waiting[-1]
            before = [makers[name] for name in names_read(nodes[i]) if name in makers and makers[name] not in done]
            if i in done or not before:
                waiting.pop()
                if i not in done:
                    done.add(i)
                    ordered.append(nodes[i])
            elif len(waiting) > len(nodes):
                raise ModelError("the nodes of the spliced graph form a circle; the two graphs cannot be mixed there")
            else:
                waiting += before
    return ordered


def renamed(node: onnx.NodeProto, mapping: Mapping[str, str], *, outputs: bool = True) -> onnx.NodeProto:
    """A copy of a node with other names of tensors, in its inner graphs too."""
    import onnx

    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    _rename(copy, mapping, outputs=outputs)
    return copy


def _rename(node: onnx.NodeProto, mapping: Mapping[str, str], *, outputs: bool = True) -> None:
    for i, name in enumerate(node.input):
        node.input[i] = mapping.get(name, name)
    if outputs:
        for i, name in enumerate(node.output):
            node.output[i] = mapping.get(name, name)
    for graph in inner_graphs(node):
        own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        own.update(name for inner in graph.node for name in inner.output)
        outside = {name: new for name, new in mapping.items() if name not in own}
        for inner in graph.node:
            _rename(inner, outside, outputs=False)
        for value in graph.output:
            value.name = outside.get(value.name, value.name)


def _model(
    graph: Graph, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str], types: Mapping[str, int]
) -> onnx.ModelProto:
    import onnx
    from onnx import helper

    read = {name for node in nodes for name in names_read(node)} | set(outputs)
    made = {name for node in nodes for name in node.output}
    inputs = [value for value in graph.model.graph.input if value.name in read and value.name not in graph.tensors]
    inputs = [value for value in inputs if value.name not in types]
    inputs += [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items() if name in read - made]
    model = onnx.ModelProto(ir_version=graph.model.ir_version)
    model.opset_import.extend(graph.model.opset_import)
    model.graph.name = graph.model.graph.name or "part"
    model.graph.node.extend(nodes)
    model.graph.input.extend(inputs)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    known = {tensor.name for tensor in graph.model.graph.initializer}
    model.graph.initializer.extend(graph.tensors[name] for name in sorted(read & known))
    constants = sorted(read & graph.tensors.keys() - known - made)
    model.graph.initializer.extend(_named(graph.tensors[name], name) for name in constants)
    return model


def _named(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    import onnx

    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def serialized(model: onnx.ModelProto) -> bytes:
    """Raises `UsageError` if a model is larger than one protobuf may be."""
    if model.ByteSize() > _MOST_BYTES:
        raise UsageError("a model of more than 2 GB cannot be diagnosed; diagnose a smaller one of the same family")
    content: bytes = model.SerializeToString()
    return content
