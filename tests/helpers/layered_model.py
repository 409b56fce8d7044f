"""A small encoder of residual layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from corpus import DIM, write_encoder
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnx_models import value

FLOAT = TensorProto.FLOAT


def layered(
    path: Path, layers: int = 3, *, output: str = "stream3", more: Sequence[NodeProto] = (), outputs: Sequence[str] = ()
) -> Path:
    """Frames every 10 ms; `layers` of them, each x + W2 relu(W1 x).

    `write_encoder`'s filters (tensor `stream0`), then residual layers with outputs `stream1` and on. `more` nodes may
    read any, and `outputs` are outputs beside `output`, which goes by the name of embeddings.
    """
    bank = onnx.load(write_encoder(path))
    rng = np.random.default_rng(3)
    nodes = [node for node in bank.graph.node if "embeddings" not in node.output]
    nodes.append(helper.make_node("Transpose", ["levels"], ["stream0"], perm=[0, 2, 1]))
    weights = list(bank.graph.initializer)
    for i in range(layers):
        for name in (f"in{i}", f"out{i}"):
            weights.append(numpy_helper.from_array((0.4 * rng.standard_normal((DIM, DIM))).astype(np.float32), name))
        nodes += [
            helper.make_node("MatMul", [f"stream{i}", f"in{i}"], [f"inner{i}"]),
            helper.make_node("Relu", [f"inner{i}"], [f"active{i}"]),
            helper.make_node("MatMul", [f"active{i}", f"out{i}"], [f"branch{i}"]),
            helper.make_node("Add", [f"stream{i}", f"branch{i}"], [f"stream{i + 1}"]),
        ]
    nodes += [helper.make_node("Tanh", [output], ["embeddings"]), *more]
    described = [value("embeddings", FLOAT, ["batch", "frames", DIM]), *(value(name, FLOAT, None) for name in outputs)]
    graph = helper.make_graph(nodes, "layered", list(bank.graph.input), described, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {entry.key: entry.value for entry in bank.metadata_props})
    onnx.save(model, path)
    return path
