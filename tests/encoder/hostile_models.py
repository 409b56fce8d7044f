"""Models that mean harm, made on the spot: bombs, endless loops, foreign operators, random numbers. Each does what its name
says once ONNX Runtime is let near it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx_models import BOOL, FLOAT, INT64, constant, encoder, nested_functions, value

# ---------------------------------------------------------------- memory


def asks_for(count: int, *, at_load: bool) -> ModelProto:
    """Fills `count` float32 with zeros: of a shape that is known when it loads, or only when it runs."""
    nodes = [
        helper.make_node("Shape", ["audio"], ["size"]),
        helper.make_node("ReduceMin", ["size"], ["small"], keepdims=1),  # the batch
        constant("many", [count]),
        helper.make_node("Mul", ["small", "many"], ["wanted"]),
    ]
    return with_zeros([constant("wanted", [count])] if at_load else nodes)


def with_zeros(nodes: Sequence[NodeProto]) -> ModelProto:
    """The encoder plus the sum of as many zeros as `wanted` says."""
    return encoder(
        extra=[
            *nodes,
            helper.make_node("ConstantOfShape", ["wanted"], ["zeros"]),
            helper.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=0),
            helper.make_node("Add", ["frames_first", "sum"], ["embeddings"]),
        ]
    )


def grows_for_ever() -> ModelProto:
    """Makes a tensor eight times as long per turn of a loop, and touches all of it: full before a busy machine is silent."""
    body = [
        helper.make_node("Identity", ["going"], ["goes_on"]),
        helper.make_node("Concat", ["carried"] * 8, ["carries_on"], axis=0),
    ]
    return looping(body, [helper.make_node("ReduceMean", ["grown"], ["embeddings"], axes=[3], keepdims=0)])


def gives_vectors_of(dim: int) -> ModelProto:
    """One vector a clip, of any size."""
    extra = [
        helper.make_node("ReduceMean", ["frames_first"], ["level"], axes=[1, 2], keepdims=0),
        constant("level_axis", [1]),
        helper.make_node("Unsqueeze", ["level", "level_axis"], ["column"]),
        constant("width", [1, dim]),
        helper.make_node("Expand", ["column", "width"], ["embeddings"]),
    ]
    return encoder(output_layout="any", extra=extra)


def sparse_bomb() -> ModelProto:
    """One value in a sparse tensor of 4 TB."""
    model = encoder()
    values = helper.make_tensor("sparse", FLOAT, [1], [1.0])
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, helper.make_tensor("i", INT64, [1], [3]), [1 << 40])
    )
    return model


# ---------------------------------------------------------------- time


def looping(body_nodes: Sequence[NodeProto], after: Sequence[NodeProto], times: str = "") -> ModelProto:
    """Carries the frames, with an axis more, through a loop to `grown`; `times` names its count, and "" is no end."""
    body = helper.make_graph(
        list(body_nodes),
        "body",
        [value("i", INT64, []), value("going", BOOL, []), value("carried", FLOAT, None)],
        [value("goes_on", BOOL, []), value("carries_on", FLOAT, None)],
    )
    extra = [
        constant("fourth", [0]),
        helper.make_node("Unsqueeze", ["frames_first", "fourth"], ["start"]),
        helper.make_node("Constant", [], ["true"], value=helper.make_tensor("true_value", BOOL, [], [True])),
        helper.make_node("Loop", [times, "true", "start"], ["grown"], body=body),
        *after,
    ]
    return encoder(output_layout="any", extra=extra)


def slow(times: int) -> ModelProto:
    """Right, after adding nothing very often."""
    body = [
        helper.make_node("Identity", ["going"], ["goes_on"]),
        helper.make_node("Neg", ["carried"], ["other"]),
        helper.make_node("Neg", ["other"], ["carries_on"]),
    ]
    model = looping(body, [helper.make_node("Squeeze", ["grown", "fourth"], ["embeddings"])], times="times")
    model.graph.node.insert(0, constant("times", times))
    return model


# ---------------------------------------------------------------- functions and operators


def function(name: str, calls: Sequence[NodeProto], domain: str = "nested") -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("nested", 1), helper.make_opsetid("vendor", 1)]
    return helper.make_function(domain, name, ["x"], ["y"], list(calls), opsets)


def call(name: str, source: str = "x", target: str = "y", domain: str = "nested") -> NodeProto:
    return helper.make_node(name, [source], [target], domain=domain)


def calling(functions: Sequence[onnx.FunctionProto], name: str) -> ModelProto:
    model = encoder(extra=[call(name, "frames_first", "embeddings")])
    model.functions.extend(functions)
    model.opset_import.append(helper.make_opsetid("nested", 1))
    return model


def calls_itself(through: int) -> ModelProto:
    """A function that calls itself through so many others."""
    functions = [function(f"f{i}", [call(f"f{(i + 1) % (through + 1)}")]) for i in range(through + 1)]
    return calling(functions, "f0")


def chain(depth: int) -> ModelProto:
    """Functions that call one another, one each, so deep that a careless reader runs out of stack."""
    functions = [function(f"f{i}", [call(f"f{i + 1}")]) for i in range(depth)]
    return calling([*functions, function(f"f{depth}", [helper.make_node("Neg", ["x"], ["y"])])], "f0")


def bomb_in_a_branch(depth: int) -> ModelProto:
    """Each function has an `If`, and both of its branches call the function below."""
    functions = [function("f0", [helper.make_node("Neg", ["x"], ["y"])])]
    for level in range(1, depth):
        branches = {
            side: helper.make_graph([call(f"f{level - 1}", "x", side)], side, [], [value(side, FLOAT, None)])
            for side in ("then", "else")
        }
        yes = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("yes_value", BOOL, [], [True]))
        choice = helper.make_node("If", ["yes"], ["y"], then_branch=branches["then"], else_branch=branches["else"])
        functions.append(function(f"f{level}", [yes, choice]))
    return calling(functions, f"f{depth - 1}")


def defined_twice() -> ModelProto:
    """A bomb and a harmless function, under one name."""
    model = nested_functions(2)
    model.functions.append(function("level_1", [helper.make_node("Neg", ["x"], ["y"])]))
    return model


def hands_on_graphs(depth: int) -> ModelProto:
    """A function that runs the graph it is given twice, called with a graph that calls it with a graph ..."""
    body = [helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("yes_value", BOOL, [], [True]))]
    for source, target in (("x", "half"), ("half", "y")):
        node = helper.make_node("If", ["yes"], [target])
        for branch in ("then_branch", "else_branch"):
            node.attribute.add(name=branch, ref_attr_name="given", type=onnx.AttributeProto.GRAPH)
        body += [helper.make_node("Identity", [source], [f"seen_{source}"]), node]
    twice = function("twice", body)
    twice.attribute.append("given")
    given = helper.make_graph([helper.make_node("Neg", ["frames_first"], ["g0"])], "g0", [], [value("g0", FLOAT, None)])
    for level in range(1, depth):
        node = helper.make_node("twice", ["frames_first"], [f"g{level}"], domain="nested", given=given)
        given = helper.make_graph([node], f"g{level}", [], [value(f"g{level}", FLOAT, None)])
    model = calling([twice], "twice")
    call_of = next(node for node in model.graph.node if node.op_type == "twice")
    call_of.attribute.append(helper.make_attribute("given", given))
    return model


def foreign_operator(where: str) -> ModelProto:
    """An operator that only a library could bring: in the graph, in a branch, in a function that is called or not."""
    foreign = call("Steal", domain="vendor")
    match where:
        case "graph":
            return encoder(extra=[call("Steal", "frames_first", "embeddings", domain="vendor")])
        case "branch":
            branch = helper.make_graph(
                [call("Steal", "frames_first", "out", domain="vendor")], "b", [], [value("out", FLOAT, None)]
            )
            yes = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("yes_value", BOOL, [], [True]))
            return encoder(
                extra=[yes, helper.make_node("If", ["yes"], ["embeddings"], then_branch=branch, else_branch=branch)]
            )
        case "default":
            steals = helper.make_graph([call("Steal", domain="vendor")], "b", [], [value("y", FLOAT, None)])
            holder = function("f", [helper.make_node("Neg", ["x"], ["y"])])
            holder.attribute_proto.append(helper.make_attribute("given", steals))
            return calling([holder], "f")
        case "function":
            return calling([function("f", [foreign])], "f")
        case _:
            model = encoder()
            model.functions.append(function("f", [foreign]))
            return model


def compiled_part(domain: str = "com.microsoft") -> ModelProto:
    """A part for one machine, read from a file that it names."""
    node = call("EPContext", "frames_first", "embeddings", domain=domain)
    node.attribute.extend(
        [
            helper.make_attribute("embed_mode", 0),
            helper.make_attribute("ep_cache_context", "../../etc/passwd"),
            helper.make_attribute("main_context", 1),
        ]
    )
    return encoder(extra=[node])


# ---------------------------------------------------------------- outputs


def random_values(output_layout: str = "any", samples: int | str = "samples") -> ModelProto:
    """Adds noise of its own, other noise in every run."""
    extra = [
        helper.make_node("RandomNormalLike", ["frames_first"], ["noise"], scale=0.1),
        helper.make_node("Add", ["frames_first", "noise"], ["noisy"]),
    ]
    if output_layout == "BD":
        return encoder(
            output_layout="any",
            samples=samples,
            extra=[*extra, helper.make_node("ReduceMean", ["noisy"], ["embeddings"], axes=[1], keepdims=0)],
        )
    return encoder(
        output_layout="any", samples=samples, extra=[*extra, helper.make_node("Identity", ["noisy"], ["embeddings"])]
    )


def dropout_left_on() -> ModelProto:
    extra = [
        helper.make_node("Constant", [], ["ratio"], value=helper.make_tensor("ratio_value", FLOAT, [], [0.3])),
        helper.make_node("Constant", [], ["training"], value=helper.make_tensor("training_value", BOOL, [], [True])),
        helper.make_node("Dropout", ["frames_first", "ratio", "training"], ["embeddings"]),
    ]
    return encoder(output_layout="any", extra=extra)


def random_frames() -> ModelProto:
    """Another number of frames in almost every run, and other values in all."""
    extra = [
        constant("one", [1]),
        helper.make_node("RandomUniform", [], ["chance"], shape=[1], low=1.0, high=60.0),
        helper.make_node("Cast", ["chance"], ["kept"], to=INT64),
        constant("zero", [0]),
        helper.make_node("RandomNormalLike", ["frames_first"], ["noise"]),
        helper.make_node("Slice", ["noise", "zero", "kept", "one"], ["embeddings"]),
    ]
    return encoder(output_layout="any", extra=extra)


def crowded_window(samples: int) -> ModelProto:
    """More frames than there are samples in its window."""
    frames = (samples - 400) // 160 + 1
    extra = [
        constant("repeats", [1, samples // frames + 1, 1]),
        helper.make_node("Tile", ["frames_first", "repeats"], ["embeddings"]),
    ]
    return encoder(output_layout="any", samples=samples, extra=extra)


def many_outputs(count: int, length: int) -> ModelProto:
    """As many outputs with frames, each with a name of so many characters."""
    names = [f"layer_{i}".ljust(length, "x") for i in range(count)]
    return encoder(
        output_layout="any",
        extra=[helper.make_node("Identity", ["frames_first"], [name]) for name in ("embedding", *names)]
        + [helper.make_node("ReduceMean", ["frames_first"], ["embeddings"], axes=[1], keepdims=0)],
        extra_outputs=[value(name, FLOAT, None) for name in names],
    )


# ---------------------------------------------------------------- bytes


def wide(nodes: int) -> ModelProto:
    """So many nodes in a row."""
    names = ["frames_first", *(f"n{i}" for i in range(nodes - 1)), "embeddings"]
    return encoder(extra=[helper.make_node("Neg", [a], [b]) for a, b in pairwise(names)])


def empty_nodes(count: int) -> bytes:
    """Two bytes a node in the file, a hundred in memory."""
    data = b"\x0a\x00" * count
    length, size = len(data), b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return encoder().SerializeToString() + b"\x3a" + size + bytes([length]) + data


def external(name: str, values: np.ndarray, entries: dict[str, str]) -> ModelProto:  # type: ignore[type-arg]
    """The encoder with one more tensor, kept where `entries` say."""
    model = encoder()
    tensor = numpy_helper.from_array(values, name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in entries.items():
        tensor.external_data.add(key=key, value=text)
    model.graph.initializer.append(tensor)
    return model
