"""Encoders for `check`: sound ones, and for each property one that lacks it and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_models as models
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx_models import DIM, FLOAT, INT64, constant, encoder

node = helper.make_node

DECLARED = {
    "sample_rate": "16000",
    "output_dim": "4",
    "xares.hop_samples": "160",
    "xares.receptive_field_samples": "400",
    "xares.amplitude": "unit",
    "xares.normalize": "none",
    "xares.license": "MIT",
    "xares.source": "made here",
}


def declared(model: ModelProto, **changes: str | None) -> ModelProto:
    """The model with all that cannot be measured declared; `changes` name keys, `__` for the dot, None to leave one out."""
    wanted = DECLARED | {key.replace("__", "."): value for key, value in changes.items()}
    onnx.helper.set_model_props(model, {key: value for key, value in wanted.items() if value is not None})
    return model


def sound() -> ModelProto:
    return declared(encoder())


def unlike() -> ModelProto:
    """Another encoder: one of its weights has another sign."""
    model = sound()
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "weights")
    weights = models.WEIGHTS[:, None, :].copy()
    weights[0] *= -1.05
    tensor.CopyFrom(numpy_helper.from_array(weights, "weights"))
    return model


def computed(nodes: Sequence[NodeProto]) -> ModelProto:
    """The sound encoder, whose `frames_first` (batch, frames, dim) the nodes make `embeddings` of."""
    return declared(encoder(extra=nodes))


def number(name: str, *values: float) -> NodeProto:
    return node("Constant", [], [name], value=numpy_helper.from_array(np.array(values, np.float32), f"{name}_value"))


def byte(name: str, value: int) -> NodeProto:
    return node("Constant", [], [name], value=numpy_helper.from_array(np.array(value, np.uint8), f"{name}_value"))


def flipped_where(condition: Sequence[NodeProto]) -> ModelProto:
    """Frames of the other sign where `flips`, a truth value that spreads over (batch, frames, dim)."""
    return computed(
        [
            *condition,
            number("minus", -1.0),
            number("plus", 1.0),
            node("Where", ["flips", "minus", "plus"], ["sign"]),
            node("Mul", ["frames_first", "sign"], ["embeddings"]),
        ]
    )


def recurrent(size: int = 8) -> ModelProto:
    """A GRU over the frames."""
    random = np.random.default_rng(3)
    shapes = {"W": (1, 3 * size, DIM), "R": (1, 3 * size, size)}
    model = declared(
        encoder(
            output_layout="any",
            extra=[
                node("Transpose", ["frames_first"], ["steps"], perm=[1, 0, 2]),
                node("GRU", ["steps", "W", "R"], ["states", ""], hidden_size=size),
                constant("direction", [1]),
                node("Squeeze", ["states", "direction"], ["by_step"]),
                node("Transpose", ["by_step"], ["embeddings"], perm=[1, 0, 2]),
            ],
        ),
        output_dim=str(size),
    )
    model.graph.initializer.extend(
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name) for name, shape in shapes.items()
    )
    return model


def widened(nodes: Sequence[NodeProto], weights: np.ndarray, name: str = "layer") -> ModelProto:
    """The sound encoder with a layer of `weights` [4, 4] sixteen times side by side, so that it does a part of the work.

    The nodes make `wide` (batch, frames, 64) of `frames_first`; its first four columns are the embeddings.
    """
    cut = [constant("from", [0]), constant("to", [DIM]), constant("columns", [2])]
    model = computed([*nodes, *cut, node("Slice", ["wide", "from", "to", "columns"], ["embeddings"])])
    model.graph.initializer.append(numpy_helper.from_array(np.tile(weights, (1, 16)), name))
    return model


def in_8_bits(*, collapsed: bool) -> ModelProto:
    """A linear layer over the frames in 8 bits, quantised as they come; its rows are all alike where it collapsed."""
    weights = np.array([[90, -40, 7, 12], [-20, 100, 30, -9], [11, 25, -80, 14], [3, -35, 21, 110]], np.int8)
    if collapsed:
        weights[:] = weights[:1]
    return widened(
        [
            node("DynamicQuantizeLinear", ["frames_first"], ["whole", "scale", "zero"]),
            node("MatMulInteger", ["whole", "layer", "zero"], ["product"]),
            node("Cast", ["product"], ["single_product"], to=FLOAT),
            node("Mul", ["single_product", "scale"], ["wide"]),
        ],
        weights,
    )


def quantised_on_one_scale(most: int) -> ModelProto:
    """A linear layer over the frames in 8 bits, whose activations have one scale for good; `most` is its largest weight."""
    weights = np.array([[90, -40, 7, 12], [-20, 100, 30, -9], [11, 25, -80, 44], [3, -35, 21, most]], np.int8)
    return widened(
        [
            number("scale", 0.01),
            byte("zero", 128),
            node("QuantizeLinear", ["frames_first", "scale", "zero"], ["whole"]),
            node("MatMulInteger", ["whole", "layer", "zero"], ["product"], name="the layer"),
            node("Cast", ["product"], ["single_product"], to=FLOAT),
            node("Mul", ["single_product", "scale"], ["wide"]),
        ],
        weights,
    )


def between_dequantized(
    weights: np.ndarray, *, scales: Sequence[float] = (0.01,), integer_activations: bool = True
) -> ModelProto:
    """A linear layer whose weights, bytes around 128, are made float in the graph.

    So are its activations, which ONNX Runtime then multiplies in bytes; or they are float all along.
    """
    whole = [node("Identity", ["frames_first"], ["again"])]
    if integer_activations:
        whole = [
            node("QuantizeLinear", ["frames_first", "scale", "zero"], ["whole"]),
            node("DequantizeLinear", ["whole", "scale", "zero"], ["again"]),
        ]
    several = len(scales) > 1
    zeros = np.full(len(scales) if several else (), 128, np.uint8)
    out = [node("QuantizeLinear", ["product", "large", "zero"], ["whole_product"])]
    model = widened(
        [
            number("scale", 0.01),
            number("large", 0.05),
            byte("zero", 128),
            *whole,
            node("DequantizeLinear", ["layer", "scales", "zeros"], ["weights_again"], axis=int(len(scales) > DIM)),
            node("MatMul", ["again", "weights_again"], ["product"]),
            *out,
            node("DequantizeLinear", ["whole_product", "large", "zero"], ["wide"]),
        ],
        weights,
    )
    scale_values = np.array(scales if several else scales[0], np.float32)
    for name, values in (("scales", scale_values), ("zeros", zeros)):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


BYTES = np.array([[218, 88, 135, 140], [108, 228, 158, 119], [139, 153, 48, 142], [131, 93, 149, 238]], np.uint8)
CUT = np.array([[255, 88, 255, 140], [108, 255, 255, 119], [255, 153, 48, 255], [255, 93, 149, 255]], np.uint8)


def folded_back() -> ModelProto:
    """A linear layer whose float weights are multiples of one step."""
    model = widened([node("MatMul", ["frames_first", "layer"], ["wide"])], np.zeros((DIM, DIM), np.float32))
    whole = np.random.default_rng(2).integers(-127, 128, (DIM, 16 * DIM))
    model.graph.initializer[-1].CopyFrom(numpy_helper.from_array((0.01 * whole).astype(np.float32), "layer"))
    (filters,) = [tensor for tensor in model.graph.initializer if tensor.name == "weights"]
    whole = np.rint(127 * models.WEIGHTS[:, None, :] / np.abs(models.WEIGHTS).max())
    filters.CopyFrom(numpy_helper.from_array((whole * 0.002).astype(np.float32), "weights"))
    return model


def probabilities() -> ModelProto:
    return computed([node("Softmax", ["frames_first"], ["embeddings"], axis=2)])


def logits() -> ModelProto:
    """A linear layer from four to three, which is called by what it is for."""
    nodes = [node("MatMul", ["frames_first", "layer"], ["linear_out"]), node("Add", ["linear_out", "offset"], ["logits"])]
    model = declared(encoder(output_layout="any", extra=nodes), output_dim="3")
    model.graph.output[0].name = "logits"
    weights = np.random.default_rng(4).standard_normal((DIM, 3)).astype(np.float32)
    for name, values in (("layer", weights), ("offset", np.ones(3, np.float32))):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


# ---------------------------------------------------------------- one way to be wrong each


def old() -> ModelProto:
    model = sound()
    model.opset_import[0].version = 6
    return model


def frozen_time() -> ModelProto:
    return declared(encoder(samples=16_000, frames=98))


def even_lengths_only() -> ModelProto:
    return computed(
        [
            constant("pairs", [0, -1, 2]),
            node("Reshape", ["audio", "pairs"], ["paired"]),
            node("ReduceMax", ["paired"], ["most"], keepdims=0),
            node("Sub", ["most", "most"], ["nothing"]),
            node("Add", ["frames_first", "nothing"], ["embeddings"]),
        ]
    )


def fills_up_to_a_second() -> ModelProto:
    """Short inputs are padded to 16,000 samples inside."""
    return declared(
        encoder(
            output_layout="any",
            extra=[
                node("Shape", ["signal"], ["size"], start=2, end=3),
                constant("second", [16_000]),
                constant("none", [0]),
                constant("before", [0, 0, 0, 0, 0]),
                node("Sub", ["second", "size"], ["short"]),
                node("Max", ["short", "none"], ["missing"]),
                node("Concat", ["before", "missing"], ["pads"], axis=0),
                node("Pad", ["signal", "pads"], ["filled"]),
                node("Conv", ["filled", "weights", "bias"], ["conv"], strides=[models.HOP]),
                node("Abs", ["conv"], ["conv_abs"]),
                node("Transpose", ["conv_abs"], ["embeddings"], perm=[0, 2, 1]),
            ],
        )
    )


def fails_at_one_frame() -> ModelProto:
    """Divides by the number of frames but one."""
    return computed(
        [
            node("Shape", ["frames_first"], ["count"], start=1, end=2),
            node("Cast", ["count"], ["frames_count"], to=FLOAT),
            number("one_frame", 1.0),
            node("Sub", ["frames_count", "one_frame"], ["others"]),
            node("Div", ["others", "others"], ["one_or_none"]),
            node("Mul", ["frames_first", "one_or_none"], ["embeddings"]),
        ]
    )


def batch_of_one_inside() -> ModelProto:
    return computed([constant("rows", [1, -1, DIM]), node("Reshape", ["frames_first", "rows"], ["embeddings"])])


def noisy() -> ModelProto:
    return computed(
        [
            node("RandomNormalLike", ["frames_first"], ["noise"], scale=2e-5),
            node("Add", ["frames_first", "noise"], ["embeddings"]),
        ]
    )


def not_for_silence() -> ModelProto:
    """Divides by the peak of each item."""
    return computed(
        [
            node("Abs", ["audio"], ["size"]),
            node("ReduceMax", ["size"], ["peak"], axes=[1], keepdims=1),
            node("Div", ["peak", "peak"], ["one"]),
            constant("last", [2]),
            node("Unsqueeze", ["one", "last"], ["factor"]),
            node("Mul", ["frames_first", "factor"], ["embeddings"]),
        ]
    )


def the_same_all_along() -> ModelProto:
    return computed(
        [
            node("ReduceMean", ["frames_first"], ["mean"], axes=[1], keepdims=1),
            node("Sub", ["frames_first", "frames_first"], ["nothing"]),
            node("Add", ["nothing", "mean"], ["embeddings"]),
        ]
    )


def hardly_different() -> ModelProto:
    return computed(
        [
            number("tiny", 1e-6),
            number("much", 1.0, 2.0, 3.0, 4.0),
            node("Mul", ["frames_first", "tiny"], ["small"]),
            node("Add", ["small", "much"], ["embeddings"]),
        ]
    )


def one_direction() -> ModelProto:
    return computed(
        [
            node("ReduceMean", ["frames_first"], ["level"], axes=[2], keepdims=1),
            number("direction", 1.0, -2.0, 3.0, 0.5),
            node("Mul", ["level", "direction"], ["embeddings"]),
        ]
    )


def flips_before_zeros() -> ModelProto:
    """Of the other sign where the last sample is zero."""
    return flipped_where(
        [
            constant("from", [-1]),
            constant("to", [1 << 40]),
            constant("along", [1]),
            node("Slice", ["audio", "from", "to", "along"], ["last"]),
            number("zero", 0.0),
            node("Equal", ["last", "zero"], ["ends_in_zero"]),
            constant("behind", [2]),
            node("Unsqueeze", ["ends_in_zero", "behind"], ["flips"]),
        ]
    )


def flips_after_two_seconds() -> ModelProto:
    return flipped_where(
        [
            node("Shape", ["frames_first"], ["count"], start=1, end=2),
            constant("only", [0]),
            node("Squeeze", ["count", "only"], ["stop"]),
            constant("start", 0),
            constant("step", 1),
            node("Range", ["start", "stop", "step"], ["places"]),
            constant("two_seconds", 200),
            node("GreaterOrEqual", ["places", "two_seconds"], ["late"]),
            constant("behind", [1]),
            node("Unsqueeze", ["late", "behind"], ["flips"]),
        ]
    )


def flips_when_quiet() -> ModelProto:
    return flipped_where(
        [
            node("Abs", ["audio"], ["size"]),
            node("ReduceMax", ["size"], ["peak"], axes=[1], keepdims=1),
            number("quiet", 0.05),
            node("Less", ["peak", "quiet"], ["is_quiet"]),
            constant("behind", [2]),
            node("Unsqueeze", ["is_quiet", "behind"], ["flips"]),
        ]
    )


def counts_its_mask() -> ModelProto:
    """Adds, along one direction, five times the share of samples that are no padding."""
    return declared(
        encoder(
            extra=[
                node("Cast", ["attention_mask"], ["mask_float"], to=FLOAT),
                node("ReduceMean", ["mask_float"], ["share"], axes=[1], keepdims=1),
                constant("behind", [2]),
                node("Unsqueeze", ["share", "behind"], ["spread"]),
                number("five", 5.0, -5.0, 0.0, 0.0),
                number("all_but", 3.5, -3.5, 0.0, 0.0),
                node("Mul", ["spread", "five"], ["along"]),
                node("Sub", ["along", "all_but"], ["moved"]),
                node("Add", ["frames_first", "moved"], ["embeddings"]),
            ],
            extra_inputs=[models.value("attention_mask", INT64, ["batch", "samples"])],
        )
    )


def never_ends_on_dc() -> ModelProto:
    """Where every sample is above 0.25."""
    model = declared(models.endless_loop(above=0.25))
    (least,) = [node for node in model.graph.node if node.op_type == "ReduceMax"]
    least.op_type = "ReduceMin"
    return model


SOUND: dict[str, Callable[[], ModelProto]] = {
    "convolution": sound,
    "convolution without declarations of what can be measured": lambda: declared(
        encoder(), output_dim=None, xares__hop_samples=None, xares__receptive_field_samples=None
    ),
    "recurrent": recurrent,
    "fixed window": lambda: declared(encoder(samples=16_000, frames=98), xares__chunk_samples="16000"),
    "one vector a clip": lambda: declared(
        encoder(output_layout="BD"), xares__hop_samples=None, xares__receptive_field_samples=None
    ),
    "fixed batch of one": lambda: declared(encoder(batch=1)),
    "no batch axis": lambda: declared(encoder("T", "TD")),
    "half precision in and out": lambda: declared(encoder(kind=models.FLOAT16)),
    "lengths": lambda: declared(models.with_lengths()),
    "normalised clips": lambda: declared(encoder(), xares__normalize="zscore"),
    "bytes that stay in 16 bits": lambda: quantised_on_one_scale(84),
    "bytes between float operators": lambda: between_dequantized(BYTES),
}
MUTANTS: dict[str, tuple[str, str, Callable[[], ModelProto]]] = {
    "an unknown operator": ("loads", "fail", lambda: declared(models.unknown_operator())),
    "a state": ("inputs", "fail", lambda: declared(models.stateful())),
    "a declaration that cannot be read": ("contract", "fail", lambda: declared(encoder(), xares__hop_samples="x")),
    "any of two outputs": ("output", "fail", lambda: declared(models.two_hidden_states())),
    "a dimension misdeclared": ("declarations", "fail", lambda: declared(encoder(), output_dim="5")),
    "a receptive field misdeclared": (
        "declarations",
        "fail",
        lambda: declared(encoder(), xares__receptive_field_samples="401"),
    ),
    "no license": ("metadata", "warn", lambda: declared(encoder(), xares__license=None)),
    "opset 6": ("opset", "warn", old),
    "a frozen time axis": ("dynamic-time", "fail", frozen_time),
    "a time frozen inside": ("dynamic-time", "fail", lambda: declared(models.frozen_inside(16_000))),
    "a time frozen inside, at a length that is not tried": (
        "dynamic-time",
        "fail",
        lambda: declared(models.frozen_inside(80_000)),
    ),
    "frames that do not follow the length": ("dynamic-time", "fail", lambda: declared(models.constant_frames())),
    "even lengths only": ("dynamic-time", "fail", even_lengths_only),
    "two strides": ("frame-law", "fail", lambda: declared(models.lawless_frames())),
    "short inputs filled up": ("frame-law", "fail", fills_up_to_a_second),
    "a hop misdeclared": ("hop", "fail", lambda: declared(encoder(), xares__hop_samples="320")),
    "NaN at one frame": ("min-length", "warn", fails_at_one_frame),
    "a table of positions": ("max-length", "fail", lambda: declared(models.stops_growing(500))),
    "a maximum that fails": (
        "max-length",
        "fail",
        lambda: declared(models.stops_growing(500), xares__chunk_samples="64000", xares__max_samples="160000"),
    ),
    "a batch of one inside": ("dynamic-batch", "fail", batch_of_one_inside),
    "a frozen batch": ("dynamic-batch", "warn", lambda: declared(encoder(batch=4))),
    "a norm over the batch": ("batch-invariance", "fail", lambda: declared(models.batch_coupled())),
    "noise inside": ("determinism", "fail", noisy),
    "a division by the peak": ("finite", "fail", not_for_silence),
    "NaN": ("finite", "fail", lambda: declared(models.not_a_number())),
    "the same all along": ("varies", "fail", the_same_all_along),
    "hardly different": ("varies", "fail", hardly_different),
    "a table": ("varies", "fail", lambda: declared(models.a_table())),
    "one direction": ("rank", "fail", one_direction),
    "flips before zeros": ("padding", "warn", flips_before_zeros),
    "a mask that counts": ("padding", "warn", counts_its_mask),
    "flips after two seconds": ("chunking", "warn", flips_after_two_seconds),
    "flips when quiet": ("gain", "warn", flips_when_quiet),
    "bytes past 16 bits": ("int8-saturation", "warn", lambda: quantised_on_one_scale(85)),
    "a scale of zero": ("int8-scales", "fail", lambda: between_dequantized(BYTES, scales=[0.01] * 63 + [0.0])),
    "weights cut at the end of their range": ("int8-scales", "warn", lambda: between_dequantized(CUT)),
    "weights in bytes, multiplied in float": (
        "arithmetic",
        "warn",
        # A scale per row, which no product of packed weights can have.
        lambda: between_dequantized(BYTES, scales=[0.01] * 4, integer_activations=False),
    ),
    "weights folded back to float": ("arithmetic", "warn", folded_back),
    "probabilities": ("head", "warn", probabilities),
    "logits": ("head", "warn", logits),
}
__all__ = ["MUTANTS", "SOUND", "declared", "in_8_bits", "never_ends_on_dc", "sound", "unlike"]
