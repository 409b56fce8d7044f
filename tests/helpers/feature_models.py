"""One tiny encoder behind three front ends, as two files each: the front end inside the graph, and outside of it.

The graph's front end is a strided convolution with the DFT, and filters of `transformers`: it shares nothing with the
package. Behind it is |W · 3 frames + b|, every other frame.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx_models import constant, value
from transformers.audio_utils import mel_filter_bank, window_function

DIM, KERNEL, STRIDE = 4, 3, 2
FLOAT = TensorProto.FLOAT
Doubles = NDArray[np.float64]

BANDS = {"whisper": 80, "kaldi": 80, "librosa": 128}
HOPS = {"whisper": 160, "kaldi": 160, "librosa": 512}


def waveform_model(kind: str, rate: int = 16_000) -> ModelProto:
    """float32 [batch, samples] -> [batch, frames, 4], the front end inside."""
    nodes, initializers = front_end(kind, rate)
    return build(
        [*nodes, *body("bands")],
        [value("audio", FLOAT, ["batch", "samples"])],
        [*initializers, *weights(BANDS[kind])],
    )


def feature_model(
    kind: str,
    layout: str = "BFT",
    *,
    name: str = "features",
    sizes: dict[str, Any] | None = None,
    extra: Sequence[NodeProto] = (),
    extra_inputs: Sequence[Any] = (),
    element: int = FLOAT,
    metadata: dict[str, str] | None = None,
    bands: int | None = None,
    symmetric: bool = False,
) -> ModelProto:
    """The same encoder, that takes features in a layout such as BTF or B1FT. `extra` nodes change `bands` to `scaled`."""
    bands = bands or BANDS[kind]
    shape: dict[str, Any] = {"B": "batch", "T": "frames", "F": bands, "1": 1} | (sizes or {})
    single = [axis for axis, letter in enumerate(layout) if letter == "1"]
    letters = layout.replace("1", "")
    nodes = [helper.make_node("Cast", [name], ["float"], to=FLOAT)]
    source = "float"
    if single:
        nodes += [constant("single", single), helper.make_node("Squeeze", [source, "single"], ["squeezed"])]
        source = "squeezed"
    if "B" not in letters:
        nodes += [constant("first", [0]), helper.make_node("Unsqueeze", [source, "first"], ["batched"])]
        source, letters = "batched", "B" + letters
    nodes.append(helper.make_node("Transpose", [source], ["bands"], perm=[letters.index(axis) for axis in "BFT"]))
    return build(
        [*nodes, *extra, *body("scaled" if extra else "bands")],
        [value(name, element, [shape[axis] for axis in layout]), *extra_inputs],
        weights(bands, symmetric),
        metadata,
    )


def body(source: str) -> list[NodeProto]:
    return [
        helper.make_node("Conv", [source, "weights", "bias"], ["linear"], strides=[STRIDE], kernel_shape=[KERNEL]),
        helper.make_node("Abs", ["linear"], ["dim_first"]),
        helper.make_node("Transpose", ["dim_first"], ["embeddings"], perm=[0, 2, 1]),
    ]


def weights(bands: int, symmetric: bool = False) -> list[TensorProto]:
    """`symmetric` if the frame before and the one after weigh the same."""
    rng = np.random.default_rng(3)
    matrix = (rng.standard_normal((DIM, bands, KERNEL)) / (20 * bands**0.5)).astype(np.float32)
    if symmetric:
        matrix[:, :, 2] = matrix[:, :, 0]
    return [
        numpy_helper.from_array(matrix, "weights"),
        numpy_helper.from_array(np.linspace(-0.3, 0.3, DIM, dtype=np.float32), "bias"),
    ]


def front_end(kind: str, rate: int) -> tuple[list[NodeProto], list[TensorProto]]:
    """Nodes from `audio` [batch, samples] to `bands` [batch, bands, frames]."""
    kernels, pad, mode = KERNELS[kind]()
    filters = mel_filters(kind, rate)
    initializers = [
        single(kernels[:, None], "kernels"),
        single(np.tile(filters.T, 2)[:, :, None], "filters"),  # cosines and sines are summed too
        single(2.0**-23 if kind == "kaldi" else 1e-10, "floor"),
    ]
    nodes = [
        constant("channel", [1]),
        helper.make_node("Unsqueeze", ["audio", "channel"], ["signal"]),
        constant("pads", [0, 0, pad, 0, 0, pad]),
        helper.make_node("Pad", ["signal", "pads"], ["padded"], mode=mode),
        helper.make_node("Conv", ["padded", "kernels"], ["spectrum"], strides=[HOPS[kind]]),
        helper.make_node("Mul", ["spectrum", "spectrum"], ["power"]),
        helper.make_node("Conv", ["power", "filters"], ["energies"]),
        helper.make_node("Max", ["energies", "floor"], ["floored"]),
        helper.make_node("Log", ["floored"], ["natural"]),
    ]
    if kind == "kaldi":
        return [*nodes, helper.make_node("Identity", ["natural"], ["bands"])], initializers
    unit, limit, mean, std = (1.0, 8.0, -4.0, 4.0) if kind == "whisper" else (10.0, 80.0, 0.0, 1.0)
    numbers = {"unit": unit / np.log(10), "limit": limit, "mean": mean, "std": std}
    initializers += [single(number, name) for name, number in numbers.items()]
    ends = np.iinfo(np.int64).max if kind == "librosa" else -1
    nodes += [
        helper.make_node("Mul", ["natural", "unit"], ["all"]),
        constant("start", [0]),
        constant("end", [ends]),
        constant("time", [2]),
        helper.make_node("Slice", ["all", "start", "end", "time"], ["kept"]),
        helper.make_node("ReduceMax", ["kept"], ["loudest"], axes=[1, 2], keepdims=1),
        helper.make_node("Sub", ["loudest", "limit"], ["lowest"]),
        helper.make_node("Max", ["kept", "lowest"], ["limited"]),
        helper.make_node("Sub", ["limited", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["bands"]),
    ]
    return nodes, initializers


def single(values: Doubles | float, name: str) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, np.float32), name)


def dft(samples: int, window: Doubles) -> Doubles:
    """Cosines and sines (samples // 2 + 1 of each, len(window)), windowed."""
    phase = 2 * np.pi / samples * np.outer(np.arange(samples // 2 + 1), np.arange(len(window)))
    whole: Doubles = np.concatenate([np.cos(phase), np.sin(phase)]) * window
    return whole


def whisper_kernels() -> tuple[Doubles, int, str]:
    return dft(400, window_function(400, "hann")), 200, "reflect"


def librosa_kernels() -> tuple[Doubles, int, str]:
    return dft(2048, window_function(2048, "hann")), 1024, "constant"


def kaldi_kernels() -> tuple[Doubles, int, str]:
    """Removing the mean, pre-emphasis, window and DFT are one matrix."""
    no_mean = np.eye(400) - 1 / 400
    emphasis = np.eye(400) - 0.97 * np.eye(400, k=-1)
    emphasis[0, 0] -= 0.97
    return dft(512, window_function(400, "povey", periodic=False)) @ emphasis @ no_mean, 0, "constant"


KERNELS = {"whisper": whisper_kernels, "librosa": librosa_kernels, "kaldi": kaldi_kernels}


def mel_filters(kind: str, rate: int) -> Doubles:
    settings: dict[str, dict[str, Any]] = {
        "whisper": {"num_frequency_bins": 201, "norm": "slaney", "mel_scale": "slaney"},
        "librosa": {"num_frequency_bins": 1025, "norm": "slaney", "mel_scale": "slaney"},
        "kaldi": {"num_frequency_bins": 257, "norm": None, "mel_scale": "kaldi", "triangularize_in_mel_space": True},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        filters: Doubles = mel_filter_bank(
            num_mel_filters=BANDS[kind],
            min_frequency=20.0 if kind == "kaldi" else 0.0,
            max_frequency=8000.0,
            sampling_rate=rate,
            **settings[kind],
        )
    return filters


def build(
    nodes: Sequence[NodeProto],
    inputs: Sequence[Any],
    initializers: Sequence[TensorProto],
    metadata: dict[str, str] | None = None,
) -> ModelProto:
    outputs = [value("embeddings", FLOAT, ["batch", None, DIM])]
    graph = helper.make_graph(list(nodes), "tiny", list(inputs), outputs, list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.helper.set_model_props(model, metadata or {})
    return model
