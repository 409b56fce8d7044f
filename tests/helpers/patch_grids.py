"""A model's frames written as the tokens of a spectrogram transformer."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

Order = Literal["frequency", "time"]


def as_tokens(model: ModelProto, *, bands: int = 3, first: Order = "frequency", prefix: int = 2) -> ModelProto:
    """The model with `prefix + bands x frames` tokens in place of its frames.

    The patches of one time are the frame times 0.5 to 1.5, so that their mean is the frame. Each leading token is the mean
    of all frames times its number, from 1 on.
    """
    graph = model.graph
    (output,) = graph.output
    frames, dim = output.name, output.type.tensor_type.shape.dim[2].dim_value
    for node in graph.node:
        node.output[:] = ["frames_of_grid" if name == frames else name for name in node.output]
    shape = (1, bands, 1, 1) if first == "frequency" else (1, 1, bands, 1)
    tensors = {
        "grid_weights": np.linspace(0.5, 1.5, bands).reshape(shape).astype(np.float32),
        "grid_axis": np.array([1 if first == "frequency" else 2]),
        "grid_shape": np.array([0, -1, dim]),
        "prefix_numbers": np.arange(1, prefix + 1).reshape(1, prefix, 1).astype(np.float32),
    }
    graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in tensors.items())
    graph.node.extend(
        [
            helper.make_node("Unsqueeze", ["frames_of_grid", "grid_axis"], ["spread"]),
            helper.make_node("Mul", ["spread", "grid_weights"], ["grid"]),
            helper.make_node("Reshape", ["grid", "grid_shape"], ["patches" if prefix else "tokens"]),
        ]
    )
    if prefix:
        graph.node.extend(
            [
                helper.make_node("ReduceMean", ["frames_of_grid"], ["mean_of_grid"], axes=[1], keepdims=1),
                helper.make_node("Mul", ["mean_of_grid", "prefix_numbers"], ["prefix"]),
                helper.make_node("Concat", ["prefix", "patches"], ["tokens"], axis=1),
            ]
        )
    graph.node.append(helper.make_node("Identity", ["tokens"], [frames]))
    output.type.tensor_type.shape.dim[1].dim_param = "tokens"
    onnx.checker.check_model(model)
    return model


def declared(*, bands: int = 3, first: Order = "frequency", prefix: int = 2) -> list[str]:
    grid = f"{bands}xT" if first == "frequency" else f"Tx{bands}"
    return [f"tokens.grid={grid}", *([f"tokens.prefix={prefix}"] if prefix else [])]
