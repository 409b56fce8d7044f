"""Small encoders of four families, as exporters write them at opset 13 and 17, and copies of them with one planted fault."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

DIM, HEADS, INNER = 32, 4, 64
LAYERS = 3


class Maker:
    """Adds the nodes of layers to a graph. What layer number n has is named `n.part`, so that a test can find it."""

    def __init__(self, opset: int, seed: int = 0) -> None:
        self.opset = opset
        self._rng = np.random.default_rng(seed)
        self.nodes: list[NodeProto] = []
        self.weights: dict[str, NDArray[Any]] = {}

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def weight(self, name: str, *shape: int, scale: float | None = None) -> str:
        fan = np.prod(shape[1:]) if len(shape) > 2 else shape[0]
        values = self._rng.standard_normal(shape) * (scale or 1.1 * float(fan) ** -0.5)
        self.weights[name] = values.astype(np.float32)
        return name

    def constant(self, name: str, value: Any) -> str:
        self.weights[name] = np.asarray(value)
        return name

    def linear(self, x: str, name: str, inside: int, outside: int) -> str:
        product = self.node("MatMul", [x, self.weight(f"{name}.weight", inside, outside)], f"{name}.MatMul")
        return self.node("Add", [product, self.weight(f"{name}.bias", outside, scale=0.1)], f"{name}.Add")

    def norm(self, x: str, name: str, dim: int = DIM) -> str:
        gain = self.constant(f"{name}.gain", (1 + 0.1 * self._rng.standard_normal(dim)).astype(np.float32))
        bias = self.weight(f"{name}.bias", dim, scale=0.1)
        if self.opset >= 17:
            return self.node("LayerNormalization", [x, gain, bias], f"{name}.LayerNormalization", axis=-1, epsilon=1e-5)
        mean = self.node("ReduceMean", [x], f"{name}.mean", axes=[-1], keepdims=1)
        centred = self.node("Sub", [x, mean], f"{name}.Sub")
        square = self.node("Pow", [centred, self.constant(f"{name}.two", np.float32(2))], f"{name}.Pow")
        variance = self.node("ReduceMean", [square], f"{name}.variance", axes=[-1], keepdims=1)
        padded = self.node("Add", [variance, self.constant(f"{name}.epsilon", np.float32(1e-5))], f"{name}.eps")
        scaled = self.node("Div", [centred, self.node("Sqrt", [padded], f"{name}.Sqrt")], f"{name}.Div")
        return self.node("Add", [self.node("Mul", [scaled, gain], f"{name}.Mul"), bias], f"{name}.Add")

    def gelu(self, x: str, name: str) -> str:
        scaled = self.node("Div", [x, self.constant(f"{name}.root", np.float32(2**0.5))], f"{name}.Div")
        error = self.node("Erf", [scaled], f"{name}.Erf")
        more = self.node("Add", [error, self.constant(f"{name}.one", np.float32(1))], f"{name}.Add")
        product = self.node("Mul", [x, more], f"{name}.Mul")
        return self.node("Mul", [product, self.constant(f"{name}.half", np.float32(0.5))], f"{name}.Mul2")

    def feed_forward(self, x: str, name: str) -> str:
        inner = self.gelu(self.linear(self.norm(x, f"{name}.norm"), f"{name}.in", DIM, INNER), f"{name}.gelu")
        return self.node("Add", [x, self.linear(inner, f"{name}.out", INNER, DIM)], f"{name}.join")

    def attention(self, x: str, name: str) -> str:
        shape = self.constant(f"{name}.shape", np.array([0, 0, HEADS, DIM // HEADS]))
        normal = self.norm(x, f"{name}.norm")

        def heads(part: str, perm: list[int]) -> str:
            split = self.node("Reshape", [self.linear(normal, f"{name}.{part}", DIM, DIM), shape], f"{name}.{part}.split")
            return self.node("Transpose", [split], f"{name}.{part}.heads", perm=perm)

        query, key, value = heads("q", [0, 2, 1, 3]), heads("k", [0, 2, 3, 1]), heads("v", [0, 2, 1, 3])
        scores = self.node("MatMul", [query, key], f"{name}.scores")
        scale = self.constant(f"{name}.scale", np.float32((DIM // HEADS) ** -0.5))
        weights = self.node("Softmax", [self.node("Mul", [scores, scale], f"{name}.scaled")], f"{name}.Softmax", axis=-1)
        mixed = self.node(
            "Transpose", [self.node("MatMul", [weights, value], f"{name}.mix")], f"{name}.merge", perm=[0, 2, 1, 3]
        )
        flat = self.node("Reshape", [mixed, self.constant(f"{name}.flat", np.array([0, 0, DIM]))], f"{name}.flatten")
        return self.node("Add", [x, self.linear(flat, f"{name}.o", DIM, DIM)], f"{name}.join")

    def convolution(self, x: str, name: str) -> str:
        first = self.node("Transpose", [self.norm(x, f"{name}.norm")], f"{name}.to", perm=[0, 2, 1])
        kernel, bias = self.weight(f"{name}.weight", DIM, 1, 5), self.weight(f"{name}.bias", DIM, scale=0.1)
        deep = self.node("Conv", [first, kernel, bias], f"{name}.Conv", group=DIM, pads=[2, 2])
        gate = self.node("Mul", [deep, self.node("Sigmoid", [deep], f"{name}.Sigmoid")], f"{name}.Swish")
        back = self.node("Transpose", [gate], f"{name}.back", perm=[0, 2, 1])
        return self.node("Add", [x, self.linear(back, f"{name}.point", DIM, DIM)], f"{name}.join")

    def recurrent(self, x: str, name: str) -> str:
        weights = [
            self.weight(f"{name}.W", 1, 4 * DIM, DIM, scale=0.3),
            self.weight(f"{name}.R", 1, 4 * DIM, DIM, scale=0.15),
            self.weight(f"{name}.B", 1, 8 * DIM, scale=0.1),
        ]
        output = self.node("LSTM", [x, *weights], f"{name}.LSTM", hidden_size=DIM)
        return self.node("Squeeze", [output, self.constant(f"{name}.axis", np.array([1]))], f"{name}.Squeeze")

    def stem(self, *, hop: int = 160, patch: bool = False) -> str:
        signal = self.node("Unsqueeze", ["audio", self.constant("channel", np.array([1]))], "stem.Unsqueeze")
        bands = self.node(
            "Conv", [signal, self.weight("stem.weight", DIM, 1, 2 * hop, scale=0.5)], "stem.Conv", strides=[hop]
        )
        if patch:  # a log power, as of a mel front end, and patches of it
            power = self.node("Mul", [bands, bands], "stem.power")
            level = self.node(
                "Log", [self.node("Add", [power, self.constant("stem.floor", np.float32(1e-3))], "stem.eps")], "stem.Log"
            )
            bands = self.node("Conv", [level, self.weight("patch.weight", DIM, DIM, 2)], "patch.Conv", strides=[2])
        return self.node("Transpose", [bands], "stem.Transpose", perm=[0, 2, 1])

    def model(self, x: str) -> ModelProto:
        self.nodes.append(helper.make_node("Identity", [x], ["embeddings"], name="end"))
        graph = helper.make_graph(
            self.nodes,
            "planted",
            [helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["batch", "samples"])],
            [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", "frames", DIM])],
            [numpy_helper.from_array(values, name) for name, values in self.weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        helper.set_model_props(model, {"sample_rate": "16000"})
        return model


def wav2vec2(opset: int) -> ModelProto:
    maker = Maker(opset, 1)
    x = maker.gelu(maker.norm(maker.stem(), "stem.norm"), "stem.gelu")
    for layer in range(1, LAYERS + 1):
        x = maker.feed_forward(maker.attention(x, f"{layer}.attention"), f"{layer}.ffn")
    return maker.model(maker.norm(x, "end.norm"))


def dasheng(opset: int) -> ModelProto:
    maker = Maker(opset, 2)
    x = maker.stem(patch=True)
    for layer in range(1, LAYERS + 1):
        x = maker.feed_forward(maker.attention(x, f"{layer}.attention"), f"{layer}.ffn")
    return maker.model(maker.norm(x, "end.norm"))


def conformer(opset: int) -> ModelProto:
    maker = Maker(opset, 3)
    x = maker.stem()
    for layer in range(1, LAYERS + 1):
        x = maker.feed_forward(x, f"{layer}.first")
        x = maker.convolution(maker.attention(x, f"{layer}.attention"), f"{layer}.conv")
        x = maker.norm(maker.feed_forward(x, f"{layer}.ffn"), f"{layer}.close")
    return maker.model(x)


def lstm(opset: int) -> ModelProto:
    maker = Maker(opset, 4)
    x = maker.norm(maker.stem(), "stem.norm")
    x = maker.node("Transpose", [x], "time_first", perm=[1, 0, 2])
    for layer in range(1, LAYERS + 1):
        x = maker.recurrent(x, f"{layer}.lstm")
    x = maker.node("Transpose", [x], "batch_first", perm=[1, 0, 2])
    return maker.model(maker.norm(maker.linear(x, "4.linear", DIM, DIM), "end.norm"))


FAMILIES: dict[str, Callable[[int], ModelProto]] = {
    "wav2vec2": wav2vec2,
    "dasheng": dasheng,
    "conformer": conformer,
    "lstm": lstm,
}


# ---------------------------------------------------------------- faults


def _values(model: ModelProto, name: str) -> NDArray[Any]:
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name)).copy()


def _set(model: ModelProto, name: str, values: NDArray[Any]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values.astype(_values(model, name).dtype), name))


def _matrix(model: ModelProto, layer: int) -> str:
    names = {tensor.name for tensor in model.graph.initializer}
    return next(name for name in (f"{layer}.ffn.in.weight", f"{layer}.lstm.W") if name in names)


def three_bits(model: ModelProto, layer: int) -> str:
    name = _matrix(model, layer)
    values = _values(model, name)
    step = np.abs(values).max() / 3
    _set(model, name, np.rint(values / step) * step)
    return name.rsplit(".", 1)[0]


def epsilon(model: ModelProto, layer: int) -> str:
    """A LayerNorm's epsilon of 0.1; a recurrent encoder has the one at its start and its end."""
    names = [node.name for node in model.graph.node]
    stem = next(stem for stem in (f"{layer}.ffn.norm", "stem.norm") if any(name.startswith(f"{stem}.") for name in names))
    for node in model.graph.node:
        if node.name == f"{stem}.LayerNormalization":
            next(each for each in node.attribute if each.name == "epsilon").f = 0.1
    if f"{stem}.epsilon" in {tensor.name for tensor in model.graph.initializer}:
        _set(model, f"{stem}.epsilon", np.float32(0.1))
    return stem


def doubled(model: ModelProto, layer: int) -> str:
    name = _matrix(model, layer)
    _set(model, name, 2 * _values(model, name))
    return name.rsplit(".", 1)[0]


def swapped_heads(model: ModelProto, layer: int) -> str:
    """The first two heads of an attention's values in each other's place; of an LSTM, the first two gates."""
    names = {tensor.name for tensor in model.graph.initializer}
    if f"{layer}.attention.v.weight" in names:
        values = _values(model, f"{layer}.attention.v.weight")
        size = DIM // HEADS
        values[:, : 2 * size] = np.roll(values[:, : 2 * size], size, axis=1)
        _set(model, f"{layer}.attention.v.weight", values)
        return f"{layer}.attention.v"
    values = _values(model, f"{layer}.lstm.R")
    values[:, : 2 * DIM] = np.roll(values[:, : 2 * DIM], DIM, axis=1)
    _set(model, f"{layer}.lstm.R", values)
    return f"{layer}.lstm"


def coupled(model: ModelProto, layer: int) -> str:
    """A normalisation over the batch as well: of one clip it is right."""
    names = {node.name for node in model.graph.node}
    stems = [f"{layer}.ffn.norm", "stem.norm"]
    stem = next(stem for stem in stems if names & {f"{stem}.Sub", f"{stem}.LayerNormalization"})
    if f"{stem}.Sub" in names:
        for node in model.graph.node:
            if node.name in (f"{stem}.mean", f"{stem}.variance"):
                next(each for each in node.attribute if each.name == "axes").ints[:] = [0, -1]
        return stem
    place, node = next((i, n) for i, n in enumerate(model.graph.node) if n.name == f"{stem}.LayerNormalization")
    x, gain, bias = node.input
    for name, value in (("two", np.float32(2)), ("epsilon", np.float32(1e-5))):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{stem}.{name}"))
    parts = [
        helper.make_node("ReduceMean", [x], [f"{stem}.m"], axes=[0, -1], keepdims=1),
        helper.make_node("Sub", [x, f"{stem}.m"], [f"{stem}.c"]),
        helper.make_node("Pow", [f"{stem}.c", f"{stem}.two"], [f"{stem}.s"]),
        helper.make_node("ReduceMean", [f"{stem}.s"], [f"{stem}.v"], axes=[0, -1], keepdims=1),
        helper.make_node("Add", [f"{stem}.v", f"{stem}.epsilon"], [f"{stem}.e"]),
        helper.make_node("Sqrt", [f"{stem}.e"], [f"{stem}.r"]),
        helper.make_node("Div", [f"{stem}.c", f"{stem}.r"], [f"{stem}.d"]),
        helper.make_node("Mul", [f"{stem}.d", gain], [f"{stem}.g"]),
        helper.make_node("Add", [f"{stem}.g", bias], [node.output[0]]),
    ]
    for number, part in enumerate(parts):
        part.name = f"{stem}.{number}"
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *parts, *nodes[place + 1 :]])
    return stem


def cut_frames(model: ModelProto, layer: int) -> str:
    """The last 3 frames gone before a layer's first operator with weights of its feed-forward, or before an LSTM."""
    names = [node.name for node in model.graph.node]
    target = next(
        name
        for name in (f"{layer}.ffn.norm.mean", f"{layer}.ffn.norm.LayerNormalization", f"{layer}.lstm.LSTM")
        if name in names
    )
    place = names.index(target)
    source = model.graph.node[place].input[0]
    axis = 0 if "lstm" in target else 1
    for name, value in (("first", 0), ("last", -3), ("along", axis)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), f"cut.{name}"))
    cut = helper.make_node("Slice", [source, "cut.first", "cut.last", "cut.along"], ["cut.out"], name=f"{layer}.cut")
    nodes = list(model.graph.node)
    for node in nodes[place:]:
        for at, name in enumerate(node.input):
            if name == source:
                node.input[at] = "cut.out"
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], cut, *nodes[place:]])
    return f"{layer}."


FAULTS: dict[str, Callable[[ModelProto, int], str]] = {
    "three bits": three_bits,
    "epsilon": epsilon,
    "doubled": doubled,
    "swapped heads": swapped_heads,
    "coupled": coupled,
    "cut frames": cut_frames,
}


# ---------------------------------------------------------------- precisions


def save_as(model: ModelProto, path: Path, precision: str) -> Path:
    """Write a model in float32, float16, or quantised by ONNX Runtime: `dynamic` or `static` (QDQ)."""
    logging.disable(logging.WARNING)  # the quantizer's advice
    try:
        if precision == "float32":
            onnx.save(model, path)
        elif precision == "float16":
            from onnxruntime.transformers.float16 import convert_float_to_float16

            onnx.save(convert_float_to_float16(model, keep_io_types=True, op_block_list=["LSTM"]), path)
        else:
            _quantize(model, path, precision)
    finally:
        logging.disable(logging.NOTSET)
    return path


def _quantize(model: ModelProto, path: Path, precision: str) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

    source = path.with_suffix(".float.onnx")
    onnx.save(model, source)
    if precision == "dynamic":
        quantize_dynamic(source, path, weight_type=QuantType.QInt8, per_channel=False)
        return

    class Clips(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            rng = np.random.default_rng(7)
            self._clips = iter([{"audio": (0.1 * rng.standard_normal((1, 16_000))).astype(np.float32)} for _ in range(4)])

        def get_next(self) -> dict[str, NDArray[np.float32]] | None:
            return next(self._clips, None)

    quantize_static(
        source,
        path,
        Clips(),
        quant_format=QuantFormat.QDQ,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Conv", "Add", "Mul"],
        # A front end in 8 bits is a fault of its own: where the power is quantised to 0, its logarithm is not finite.
        nodes_to_exclude=[node.name for node in model.graph.node if node.name.startswith("stem.")],
    )
