"""A bank of six filters as an encoder, in ONNX and by hand.

It gives |W x window| over windows of 400 samples, 160 apart, and the root of 0.9 plus the window's mean, which is no number
where a clip lies below -0.9.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from onnx import TensorProto, helper, numpy_helper
from shard_makers import Samples

WINDOW, HOP, BANDS = 400, 160, 6
WEIGHTS = (np.random.default_rng(3).standard_normal((BANDS, WINDOW)) / 20).astype(np.float32)


def write_model(path: Path, *, slow: bool = False, clip_only: bool = False) -> Path:
    """A slow one takes its frames through a product with the identity of 1024 dimensions; a clip-only one averages them."""
    nodes = [
        helper.make_node("Unsqueeze", ["audio", "channel"], ["signal"]),
        helper.make_node("Conv", ["signal", "weights"], ["bands"], strides=[HOP]),
        helper.make_node("Abs", ["bands"], ["levels"]),
        helper.make_node("AveragePool", ["signal"], ["mean"], kernel_shape=[WINDOW], strides=[HOP]),
        helper.make_node("Add", ["mean", "offset"], ["lifted"]),
        helper.make_node("Sqrt", ["lifted"], ["root"]),
        helper.make_node("Concat", ["levels", "root"], ["both"], axis=1),
        helper.make_node("Transpose", ["both"], ["frames_first"], perm=[0, 2, 1]),
    ]
    values = {"channel": np.array([1]), "weights": WEIGHTS[:, None], "offset": np.array([0.9], np.float32)}
    if slow:
        values["out"] = np.eye(BANDS + 1, 1024, dtype=np.float32)
        values["across"] = np.eye(1024, dtype=np.float32)
        values["back"] = np.eye(1024, BANDS + 1, dtype=np.float32)
        steps = ["frames_first", "wide", "wide again", "embeddings"]
        nodes += [
            helper.make_node("MatMul", [source, weights], [target])
            for (source, target), weights in zip(pairwise(steps), ["out", "across", "back"], strict=True)
        ]
    elif clip_only:
        nodes.append(helper.make_node("ReduceMean", ["frames_first"], ["embeddings"], axes=[1], keepdims=0))
    else:
        nodes[-1].output[0] = "embeddings"
    dims = ["batch", BANDS + 1] if clip_only else ["batch", "frames", BANDS + 1]
    graph = helper.make_graph(
        nodes,
        "bank",
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["batch", "samples"])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, dims)],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def frames_of(chunk: Samples) -> npt.NDArray[np.float64]:
    windows = sliding_window_view(chunk.astype(np.float64), WINDOW)[::HOP]
    return np.concatenate([np.abs(windows @ WEIGHTS.T), np.sqrt(0.9 + windows.mean(axis=1, keepdims=True))], axis=1)
