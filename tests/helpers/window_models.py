"""Models of windows of features, one vector each: tanh of a weighted sum over the window, in ONNX and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

BANDS, WINDOW_DIM = 32, 5
FLOAT = TensorProto.FLOAT


def _weights(frames: int, bands: int) -> NDArray[np.float32]:
    rng = np.random.default_rng([frames, bands])
    weights: NDArray[np.float32] = (rng.standard_normal((frames, bands, WINDOW_DIM)) / (8 * frames)).astype(np.float32)
    return weights


def vector_of(features: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """(frames, bands) to (dim,), in double precision."""
    vector: NDArray[np.float64] = np.tanh(np.einsum("tf,tfd->d", features.astype(np.float64), _weights(*features.shape)))
    return vector


def window_model(
    frames: int,
    *,
    bands: int = BANDS,
    layout: str = "BTF",
    batch: int | str = "batch",
    out: str = "BD",
    coupled: bool = False,
    sizes: dict[str, Any] | None = None,
) -> ModelProto:
    """It takes `features` in a layout such as BTF1 and gives `embeddings` as BD, B11D or, one per frame of the window, BTD.

    A coupled one divides by the loudest value of the batch. `sizes` are axes in the graph's input.
    """
    letters = layout.replace("1", "")
    shape = {"B": batch, "T": frames, "F": bands, "1": 1} | (sizes or {})
    singles = [axis for axis, letter in enumerate(layout) if letter == "1"]
    constants = {"weights": _weights(frames, bands).reshape(frames * bands, WINDOW_DIM)}
    constants |= {"singles": np.array(singles), "first": np.array([0]), "flat": np.array([-1, frames * bands])}
    constants |= {"four": np.array([0, 1, 1, WINDOW_DIM]), "row": np.array([0, 1, WINDOW_DIM]), "vector": np.array([-1])}
    source, nodes = "features", []
    if singles:
        nodes.append(helper.make_node("Squeeze", [source, "singles"], ["squeezed"]))
        source = "squeezed"
    if "B" not in letters:
        nodes.append(helper.make_node("Unsqueeze", [source, "first"], ["batched"]))
        source, letters = "batched", "B" + letters
    nodes += [
        helper.make_node("Transpose", [source], ["ordered"], perm=[letters.index(axis) for axis in "BTF"]),
        helper.make_node("Reshape", ["ordered", "flat"], ["row_of_window"]),
        helper.make_node("MatMul", ["row_of_window", "weights"], ["sums"]),
        helper.make_node("Tanh", ["sums"], ["vectors"]),
    ]
    last = "vectors"
    if coupled:
        nodes += [
            helper.make_node("Abs", [last], ["sizes"]),
            helper.make_node("ReduceMax", ["sizes"], ["loudest"], keepdims=0),
            helper.make_node("Div", [last, "loudest"], ["divided"]),
        ]
        last = "divided"
    if "B" not in layout:
        nodes.append(helper.make_node("Reshape", [last, "vector"], ["embeddings"]))
    elif out == "BTD":
        nodes += [
            helper.make_node("Reshape", [last, "row"], ["rows"]),
            helper.make_node("Slice", ["ordered", "first", "one_band", "last_axis"], ["band"]),
            helper.make_node("Add", ["rows", "band"], ["embeddings"]),
        ]
        constants |= {"one_band": np.array([1]), "last_axis": np.array([2])}
    elif out == "B11D":
        nodes.append(helper.make_node("Reshape", [last, "four"], ["embeddings"]))
    else:
        nodes.append(helper.make_node("Identity", [last], ["embeddings"]))
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "window",
        [helper.make_tensor_value_info("features", FLOAT, [shape[axis] for axis in layout])],
        [helper.make_tensor_value_info("embeddings", FLOAT, None)],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items() if name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
