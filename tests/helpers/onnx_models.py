"""Tiny ONNX encoders made with `onnx.helper` alone: one that is right, and one for each way to differ or to be wrong.

All but the hopeless ones compute what `embed` computes in NumPy: |W · window + b| over windows of 400 samples, 160 apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

HOP, RECEPTIVE, DIM = 160, 400, 4
FRAMES = f"((samples - {RECEPTIVE})//{HOP}) + 1"
WEIGHTS = (np.random.default_rng(1).standard_normal((DIM, RECEPTIVE)) / 20).astype(np.float32)
BIAS = np.linspace(-0.3, 0.3, DIM, dtype=np.float32)

FLOAT, FLOAT16, INT64, BOOL = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.BOOL
Dims = Sequence[int | str | None] | None
Floats = NDArray[np.floating[Any]]


def embed(samples: Floats) -> NDArray[np.float64]:
    """(samples,) to (frames, dim) in double precision, sharing nothing with ONNX."""
    windows = sliding_window_view(samples.astype(np.float64), RECEPTIVE)[::HOP]
    return np.abs(windows @ WEIGHTS.T.astype(np.float64) + BIAS)


def noise(samples: int, seed: int = 0) -> NDArray[np.float32]:
    return np.clip(np.random.default_rng(seed).standard_normal(samples) * 0.2, -1, 1).astype(np.float32)


def save(model: ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


# ---------------------------------------------------------------- the encoder and its layouts


def encoder(
    input_layout: str = "BT",
    output_layout: str = "BTD",
    *,
    frames: int | str | None = FRAMES,
    samples: int | str | None = "samples",
    batch: int | str | None = "batch",
    kind: int = FLOAT,
    extra: Sequence[NodeProto] = (),
    extra_inputs: Sequence[ValueInfoProto] = (),
    extra_outputs: Sequence[ValueInfoProto] = (),
    metadata: dict[str, str] | None = None,
) -> ModelProto:
    """The tiny encoder in layouts written as in `Contract`, such as B1T and BT1D; `any` gives BTD without a declared shape.
    `extra` nodes stand in for the last ones: they read `frames_first` (batch, frames, dim) and write `embeddings`."""
    sizes: dict[str, int | str | None] = {"B": batch, "T": samples, "1": 1}
    nodes = [
        helper.make_node("Cast", ["audio"], ["single"], to=FLOAT),
        constant("row_shape", [1, 1, -1] if "B" not in input_layout else [0, 1, -1]),
        helper.make_node("Reshape", ["single", "row_shape"], ["signal"]),
        helper.make_node("Conv", ["signal", "weights", "bias"], ["linear"], strides=[HOP], kernel_shape=[RECEPTIVE]),
        helper.make_node("Abs", ["linear"], ["dim_first"]),
        helper.make_node("Transpose", ["dim_first"], ["frames_first"], perm=[0, 2, 1]),
    ]
    layout = "BTD" if output_layout == "any" else output_layout
    if not extra:
        nodes += [*shaped(layout), helper.make_node("Cast", ["shaped"], ["embeddings"], to=kind)]
    sizes_out: dict[str, int | str | None] = {"B": batch, "T": frames, "D": DIM, "1": 1}
    return build(
        [*nodes, *extra],
        [value("audio", kind, [sizes[axis] for axis in input_layout]), *extra_inputs],
        [
            value("embeddings", kind, None if output_layout == "any" else [sizes_out[axis] for axis in layout]),
            *extra_outputs,
        ],
        metadata=metadata,
    )


def shaped(layout: str) -> list[NodeProto]:
    """Nodes from `frames_first` (batch, frames, dim) to `shaped` in a layout; without T it is the mean over the frames."""
    axes, name, nodes = "BTD", "frames_first", []
    if "T" not in layout:
        nodes.append(helper.make_node("ReduceMean", [name], ["mean"], axes=[1], keepdims=0))
        axes, name = "BD", "mean"
    if "B" not in layout:
        nodes += [constant("batch_axis", [0]), helper.make_node("Squeeze", [name, "batch_axis"], ["row"])]
        axes, name = axes[1:], "row"
    perm = [axes.index(axis) for axis in layout if axis != "1"]
    nodes.append(helper.make_node("Transpose", [name], ["ordered"], perm=perm))
    single = [i for i, axis in enumerate(layout) if axis == "1"]
    if single:
        return [*nodes, constant("ones", single), helper.make_node("Unsqueeze", ["ordered", "ones"], ["shaped"])]
    return [*nodes, helper.make_node("Identity", ["ordered"], ["shaped"])]


def waveform_input(name: str) -> ValueInfoProto:
    return value(name, FLOAT, ["batch", "samples"])


def with_mask(kind: int = INT64, name: str = "attention_mask", samples: int | str = "samples") -> ModelProto:
    """Right only where the mask holds one for every sample: the output is scaled by the mean of the mask."""
    extra = [
        helper.make_node("Cast", [name], ["mask_float"], to=FLOAT),
        helper.make_node("ReduceMean", ["mask_float"], ["share"], axes=[1], keepdims=1),
        constant("share_axis", [2]),
        helper.make_node("Unsqueeze", ["share", "share_axis"], ["scale"]),
        helper.make_node("Mul", ["frames_first", "scale"], ["embeddings"]),
    ]
    return encoder(samples=samples, extra=extra, extra_inputs=[value(name, kind, ["batch", samples])])


def with_lengths(kind: int = INT64, name: str = "lengths", samples: int | str = "samples") -> ModelProto:
    """Right only where `lengths` holds the number of samples of each item: the output is scaled by lengths / samples."""
    extra = [
        helper.make_node("Shape", ["audio"], ["size"], start=1, end=2),
        helper.make_node("Cast", ["size"], ["size_float"], to=FLOAT),
        helper.make_node("Cast", [name], ["lengths_float"], to=FLOAT),
        helper.make_node("Div", ["lengths_float", "size_float"], ["ratio"]),
        constant("ratio_axes", [1, 2]),
        helper.make_node("Unsqueeze", ["ratio", "ratio_axes"], ["scale"]),
        helper.make_node("Mul", ["frames_first", "scale"], ["embeddings"]),
    ]
    return encoder(samples=samples, extra=extra, extra_inputs=[value(name, kind, ["batch"])])


def cast_to_embeddings(layout: str) -> list[NodeProto]:
    return [*shaped(layout), helper.make_node("Identity", ["shaped"], ["embeddings"])]


def divides_its_samples(by: float) -> ModelProto:
    """Right for samples that are `by` times too large."""
    model = encoder()
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "weights")
    tensor.CopyFrom(numpy_helper.from_array((WEIGHTS[:, None, :] / by).astype(np.float32), "weights"))
    return model


def batch_coupled(batch: int | str = "batch") -> ModelProto:
    """Divides by the loudest value of the whole batch."""
    extra = [
        helper.make_node("ReduceMax", ["frames_first"], ["loudest"], keepdims=1),
        helper.make_node("Div", ["frames_first", "loudest"], ["embeddings"]),
    ]
    return encoder(extra=extra, batch=batch)


def several_outputs(samples: int | str = "samples") -> ModelProto:
    """Beside the frames: a pooled vector and a constant table. Only `hidden` follows the length."""
    extra = [
        helper.make_node("ReduceMean", ["frames_first"], ["embeddings"], axes=[1], keepdims=0),
        helper.make_node("Identity", ["frames_first"], ["hidden"]),
        helper.make_node("Identity", ["weights"], ["table"]),
    ]
    outputs = [value("hidden", FLOAT, ["batch", None, DIM]), value("table", FLOAT, None)]
    return encoder(output_layout="BD", samples=samples, extra=extra, extra_outputs=outputs)


def two_hidden_states(samples: int | str = "samples") -> ModelProto:
    """Two outputs with frames, of which neither has a telling name."""
    model = encoder(
        samples=samples,
        extra=[
            helper.make_node("Identity", ["frames_first"], ["embeddings"]),
            helper.make_node("Neg", ["frames_first"], ["layer_2"]),
        ],
        extra_outputs=[value("layer_2", FLOAT, ["batch", None, DIM])],
    )
    return renamed(model, "embeddings", "layer_1")


def stops_growing(frames: int) -> ModelProto:
    """Right up to `frames` frames; longer inputs fail, as with a table of learned positions."""
    extra = [
        helper.make_node("Shape", ["frames_first"], ["count"], start=1, end=2),
        constant("count_axis", [0]),
        helper.make_node("Squeeze", ["count", "count_axis"], ["stop"]),
        constant("zero", 0),
        constant("one", 1),
        helper.make_node("Range", ["zero", "stop", "one"], ["places"]),
        helper.make_node(
            "Constant", [], ["table"], value=numpy_helper.from_array(np.zeros((frames, DIM), np.float32), "table_value")
        ),
        helper.make_node("Gather", ["table", "places"], ["positions"]),
        helper.make_node("Add", ["frames_first", "positions"], ["embeddings"]),
    ]
    return encoder(extra=extra)


def padding_front_end(pad: int, samples: int | str = "samples") -> ModelProto:
    """Pads the signal with zeros on both sides."""
    extra = [
        helper.make_node(
            "Conv", ["signal", "weights", "bias"], ["padded"], strides=[HOP], kernel_shape=[RECEPTIVE], pads=[pad, pad]
        ),
        helper.make_node("Abs", ["padded"], ["padded_abs"]),
        helper.make_node("Transpose", ["padded_abs"], ["embeddings"], perm=[0, 2, 1]),
    ]
    return encoder(samples=samples, output_layout="any", extra=extra)


def frozen_inside(samples: int) -> ModelProto:
    """Takes one length only, though its axes do not say so."""
    extra = [
        constant("only", [0, (samples - RECEPTIVE) // HOP + 1, DIM]),
        helper.make_node("Reshape", ["frames_first", "only"], ["embeddings"]),
    ]
    return encoder(extra=extra)


def same_everywhere(samples: int) -> ModelProto:
    """(batch, frames, dim) where every value is a multiple of one value of the window."""
    extra = [
        helper.make_node("ReduceMean", ["frames_first"], ["level"], axes=[1, 2], keepdims=1),
        helper.make_node("Mul", ["frames_first", "level"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "scaled"], ["zeros"]),
        helper.make_node("Add", ["zeros", "level"], ["embeddings"]),
    ]
    return encoder(samples=samples, frames=None, extra=extra)


# ---------------------------------------------------------------- hopeless models


def rank_4() -> ModelProto:
    nodes = [
        constant("axis", [3]),
        helper.make_node("Squeeze", ["audio", "axis"], ["signal"]),
        helper.make_node("Conv", ["signal", "weights", "bias"], ["dim_first"], strides=[HOP]),
        helper.make_node("Transpose", ["dim_first"], ["embeddings"], perm=[0, 2, 1]),
    ]
    return build(nodes, [value("audio", FLOAT, ["batch", 1, "samples", 1])], [value("embeddings", FLOAT, None)])


def images() -> ModelProto:
    nodes = [helper.make_node("Relu", ["pixel_values"], ["embeddings"])]
    return build(nodes, [value("pixel_values", FLOAT, ["batch", 3, 224, 224])], [value("embeddings", FLOAT, None)])


def tokens() -> ModelProto:
    nodes = [helper.make_node("Gather", ["weights", "tokens"], ["embeddings"])]
    return build(nodes, [value("tokens", INT64, ["batch", "time"])], [value("embeddings", FLOAT, None)])


def stateful(samples: int | str = "samples") -> ModelProto:
    extra = [
        helper.make_node("Add", ["frames_first", "state"], ["embeddings"]),
        helper.make_node("Identity", ["state"], ["new_state"]),
    ]
    state = [value(name, FLOAT, ["batch", 1, DIM]) for name in ("state", "new_state")]
    return encoder(samples=samples, extra=extra, extra_inputs=state[:1], extra_outputs=state[1:])


def conditioned() -> ModelProto:
    """Wants a vector beside the waveform, and gives none back."""
    extra = [helper.make_node("Add", ["frames_first", "speaker"], ["embeddings"])]
    return encoder(extra=extra, extra_inputs=[value("speaker", FLOAT, ["batch", 1, DIM])])


def not_a_number() -> ModelProto:
    extra = [
        helper.make_node("Sub", ["frames_first", "frames_first"], ["zeros"]),
        helper.make_node("Div", ["zeros", "zeros"], ["embeddings"]),
    ]
    return encoder(extra=extra)


def unknown_operator() -> ModelProto:
    return encoder(extra=[helper.make_node("Magic", ["frames_first"], ["embeddings"], domain="vendor")])


def scalar_output() -> ModelProto:
    return encoder(output_layout="any", extra=[helper.make_node("ReduceMean", ["frames_first"], ["embeddings"], keepdims=0)])


def one_value(layout: str, samples: int | str = "samples") -> ModelProto:
    """The mean over the dimension in a layout of B, T and 1; over the frames too, if it has no T."""
    axes = [2] if "T" in layout else [1, 2]
    extra = [helper.make_node("ReduceMean", ["frames_first"], ["embeddings"], axes=axes, keepdims=int("1" in layout))]
    return encoder(output_layout="any", samples=samples, extra=extra)


def attention_map(samples: int | str = "samples") -> ModelProto:
    """[batch, frames, frames]: how alike any two frames are."""
    extra = [helper.make_node("MatMul", ["frames_first", "dim_first"], ["embeddings"])]
    return encoder(output_layout="any", samples=samples, extra=extra)


def mean_over_a_batch_of_5() -> ModelProto:
    extra = [helper.make_node("ReduceMean", ["frames_first"], ["embeddings"], axes=[0], keepdims=0)]
    return encoder(output_layout="any", batch=5, extra=extra)


def heads() -> ModelProto:
    """[batch, frames, 2, dim / 2]."""
    extra = [constant("split", [0, 0, 2, DIM // 2]), helper.make_node("Reshape", ["frames_first", "split"], ["embeddings"])]
    return encoder(output_layout="any", extra=extra)


def a_table() -> ModelProto:
    """Its only output is its bias, whatever comes in."""
    return encoder("T", "any", extra=[helper.make_node("Identity", ["bias"], ["embeddings"])])


def constant_frames(frames: int = 5) -> ModelProto:
    """The first few frames of whatever comes in."""
    extra = [
        constant("start", [0]),
        constant("end", [frames]),
        constant("axis", [1]),
        helper.make_node("Slice", ["frames_first", "start", "end", "axis"], ["embeddings"]),
    ]
    return encoder(frames=frames, extra=extra)


def lawless_frames() -> ModelProto:
    """Two strides, one after the other: the frame count grows at no fixed hop."""
    extra = [
        helper.make_node("Conv", ["signal", "weights", "bias"], ["other"], strides=[HOP + 51]),
        helper.make_node("Transpose", ["other"], ["other_first"], perm=[0, 2, 1]),
        helper.make_node("Concat", ["frames_first", "other_first"], ["embeddings"], axis=1),
    ]
    return encoder(frames=None, extra=extra)


def sequence_output() -> ModelProto:
    nodes = [helper.make_node("SequenceConstruct", ["audio"], ["embeddings"])]
    output = helper.make_tensor_sequence_value_info("embeddings", FLOAT, None)
    return build(nodes, [value("audio", FLOAT, ["batch", "samples"])], [output])


def endless_loop(above: float = -2.0) -> ModelProto:
    """Never ends where a sample is above a value."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["going"], ["goes_on"]), helper.make_node("Identity", ["carried"], ["carries_on"])],
        "body",
        [value("i", INT64, []), value("going", BOOL, []), value("carried", FLOAT, None)],
        [value("goes_on", BOOL, []), value("carries_on", FLOAT, None)],
    )
    extra = [
        helper.make_node("ReduceMax", ["audio"], ["loudest"], keepdims=0),
        helper.make_node("Constant", [], ["above"], value=helper.make_tensor("above_value", FLOAT, [], [above])),
        helper.make_node("Greater", ["loudest", "above"], ["loud"]),
        helper.make_node("Loop", ["", "loud", "frames_first"], ["embeddings"], body=body),
    ]
    return encoder(extra=extra)


def huge_tensor() -> ModelProto:
    """Asks for 64 GB while it runs."""
    extra = [
        helper.make_node("Shape", ["audio"], ["size"]),
        helper.make_node("ReduceMin", ["size"], ["small"], keepdims=1),  # the batch, so that nothing is known at load
        constant("many", [1 << 34]),
        helper.make_node("Mul", ["small", "many"], ["wanted"]),
        helper.make_node("ConstantOfShape", ["wanted"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=0),
        helper.make_node("Add", ["frames_first", "sum"], ["embeddings"]),
    ]
    return encoder(extra=extra)


def nested_functions(depth: int) -> ModelProto:
    """2^(depth - 1) nodes in a few hundred bytes: each function calls the one below twice, and loading expands them."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("nested", 1)]
    functions = [
        helper.make_function("nested", "level_0", ["x"], ["y"], [helper.make_node("Neg", ["x"], ["y"])], opsets),
        *(
            helper.make_function(
                "nested",
                f"level_{level}",
                ["x"],
                ["y"],
                [
                    helper.make_node(f"level_{level - 1}", ["x"], ["half"], domain="nested"),
                    helper.make_node(f"level_{level - 1}", ["half"], ["y"], domain="nested"),
                ],
                opsets,
            )
            for level in range(1, depth)
        ),
    ]
    model = encoder(extra=[helper.make_node(f"level_{depth - 1}", ["frames_first"], ["embeddings"], domain="nested")])
    model.functions.extend(functions)
    model.opset_import.append(opsets[1])
    return model


# ---------------------------------------------------------------- files


def with_external_weights(model: ModelProto, location: str) -> tuple[ModelProto, bytes]:
    """The same model with its weights in another file, and the bytes that belong there."""
    model = ModelProto.FromString(model.SerializeToString())
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "weights")
    data = tensor.raw_data
    make_external(tensor, location)
    return model, data


def save_external(folder: Path, location: str = "weights.bin", target: Path | None = None) -> Path:
    """The encoder in `folder`, which finds its weights in `location`; they are written to `target`, or there."""
    model, data = with_external_weights(encoder(), location)
    target = target or folder / location
    for parent in (folder, target.parent):
        parent.mkdir(exist_ok=True, parents=True)
    target.write_bytes(data)
    return save(model, folder / "model.onnx")


def make_external(tensor: TensorProto, location: str) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def renamed(model: ModelProto, old: str, new: str) -> ModelProto:
    """The same model with an input or output under another name."""
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
    for info in (*model.graph.input, *model.graph.output):
        if info.name == old:
            info.name = new
    return model


# ---------------------------------------------------------------- pieces


def build(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    metadata: dict[str, str] | None = None,
) -> ModelProto:
    initializers = [
        numpy_helper.from_array(WEIGHTS[:, None, :], "weights"),
        numpy_helper.from_array(BIAS, "bias"),
    ]
    graph = helper.make_graph(list(nodes), "tiny", list(inputs), list(outputs), initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("vendor", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.helper.set_model_props(model, metadata or {})
    return model


def value(name: str, kind: int, dims: Dims) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, dims)


def constant(name: str, values: Sequence[int] | int) -> NodeProto:
    return helper.make_node(
        "Constant", [], [name], value=numpy_helper.from_array(np.array(values, np.int64), f"{name}_value")
    )
