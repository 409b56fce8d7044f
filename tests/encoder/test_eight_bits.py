"""Products of bytes: which overflow on a CPU without VNNI, that those of exported files do not, and what a CPU has."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from eight_bits import graph, product_without_vnni, run_without_vnni
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper
from random_checkpoints import save_speech

from xares_onnx.encoder import processor
from xares_onnx.encoder.integer_products import LARGEST, Product, computes_in_integers, integer_products, largest_pair_sum
from xares_onnx.encoder.model_file import scan_model
from xares_onnx.exporters import core, precision, speech

Array = NDArray[Any]
U8, S8 = np.uint8, np.int8
node = helper.make_node
RANDOM = np.random.default_rng(0)
TYPES = {U8: TensorProto.UINT8, S8: TensorProto.INT8}
# All 8 bits, or 7 of them.
WIDE = {S8: RANDOM.integers(70, 128, (8, 6)).astype(S8), U8: RANDOM.integers(140, 256, (8, 6)).astype(U8)}
NARROW = np.full((8, 6), 64, S8)


# ---------------------------------------------------------------- arithmetic


def test_seven_bits_never_saturate_and_one_more_does() -> None:
    """Two products of 0 to 255 and -64 to 64 stay within 16 bits: 2 * 64 * 255 = 32,640."""
    activations = np.array([[0, 0], [0, 255], [255, 0], [255, 255]], U8)
    for pair in itertools.product((-64, -1, 0, 1, 64), repeat=2):
        weights = np.array(pair, S8)[:, None]
        exact = activations.astype(np.int32) @ weights
        assert np.array_equal(product_without_vnni(activations, weights), exact)
        assert largest_pair_sum(weights, 0)[1] == 0
    assert largest_pair_sum(np.full((2, 1), 64, S8), 0) == (32_640, 0)
    assert largest_pair_sum(np.full((2, 1), -64, S8), 0) == (32_640, 0)
    for sign in (1, -1):
        weights = np.array([[64 * sign], [65 * sign]], S8)
        assert largest_pair_sum(weights, 0) == (255 * 129, 1)
        assert product_without_vnni(activations, weights)[3, 0] == (32_767 if sign == 1 else -32_768)
    assert largest_pair_sum(np.array([[127], [-128]], S8), 0) == (128 * 255, 0)  # of two signs: no sum


@pytest.mark.parametrize("kind", [S8, U8])
def test_the_largest_sum_is_that_of_the_worst_activations(kind: Any) -> None:
    limits, other = np.iinfo(kind), np.iinfo(S8 if kind is U8 else U8)
    saturating = 0
    for seed in range(300):
        weights = np.random.default_rng(seed).integers(limits.min, limits.max + 1, (3, 1)).astype(kind)
        extremes = itertools.product((other.min, 0, other.max), repeat=2)
        sums = [int(np.dot(pair, weights[:2, 0].astype(np.int64))) for pair in extremes]
        single = [extreme * int(weights[2, 0]) for extreme in (other.min, other.max)]
        largest, share = largest_pair_sum(weights, 0)
        assert largest == max(map(abs, [*sums, *single]))
        past = [any(value > LARGEST or value < -LARGEST - 1 for value in values) for values in (sums, single)]
        assert share == sum(past) / 2
        saturating += any(past)
    assert 50 < saturating < 250


def test_neighbours_are_two_by_two_along_the_axis() -> None:
    weights = np.zeros((6, 3), S8)
    weights[1:3, 0] = 127  # rows 1 and 2 never meet
    assert largest_pair_sum(weights, 0)[1] == 0
    weights[2:4, 1] = 127
    assert largest_pair_sum(weights, 0) == (254 * 255, 1 / 9)
    assert largest_pair_sum(np.ascontiguousarray(weights.T), 1) == (254 * 255, 1 / 9)


# ---------------------------------------------------------------- operators


def only(nodes: list[NodeProto], tensors: dict[str, Any], kind: int = TensorProto.FLOAT, folder: Path = Path()) -> Product:
    (product,) = integer_products(graph(nodes, tensors, kind), folder)
    return product


def zero(kind: Any) -> Any:
    return np.zeros((), kind)


def made_by(operator: str, first: Any, second: Any, weights: Array) -> Product:
    """The product of `operator`, whose activations are of type `first`."""
    tensors: dict[str, Any] = {"w": weights, "s": np.float32(1), "xz": zero(first), "wz": zero(second)}
    kind, contrib = TYPES[first], {"domain": "com.microsoft"}
    match operator:
        case "MatMulInteger" | "ConvInteger":
            return only([node(operator, ["x", "w"], ["y"])], tensors, kind)
        case "MatMulIntegerToFloat":
            return only([node(operator, ["x", "w", "s", "s"], ["y"], **contrib)], tensors, kind)
        case "QGemm":
            return only([node(operator, ["x", "s", "xz", "w", "s", "wz"], ["y"], **contrib)], tensors, kind)
        case "QAttention":
            return only([node(operator, ["x", "w", "b", "s", "s"], ["y"], num_heads=2, **contrib)], tensors, kind)
        case "QLinearMatMul" | "QLinearConv":
            return only([node(operator, ["x", "s", "xz", "w", "s", "wz", "s", "xz"], ["y"])], tensors, kind)
        case "DynamicQuantizeMatMul":
            return only([node(operator, ["x", "w", "s"], ["y"], **contrib)], tensors)
        case "DynamicQuantizeLinear":
            quantized = node("DynamicQuantizeLinear", ["x"], ["q", "scale", "offset"])
            return only([quantized, node("MatMulInteger", ["q", "w", "offset"], ["y"])], tensors)
        case _:  # a float operator between quantised tensors
            around = [
                node("QuantizeLinear", ["x", "s", "xz"], ["q"]),
                node("DequantizeLinear", ["q", "s", "xz"], ["d"]),
                node("DequantizeLinear", ["w", "s", "wz"], ["dw"]),
            ]
            return only([*around, node(operator, ["d", "dw"], ["y"])], tensors)


# What ONNX Runtime 1.31.1 gave otherwise on an emulated Haswell than with VNNI, by types of activations and weights.
OPERATORS = {
    "MatMulInteger": {(U8, S8)},
    "MatMulIntegerToFloat": {(U8, S8)},
    "QGemm": {(U8, S8)},
    "QLinearMatMul": {(U8, S8)},
    "QAttention": {(U8, S8)},
    "QLinearConv": {(U8, S8)},
    "DynamicQuantizeMatMul": {(U8, S8), (S8, S8)},  # it quantises by itself, so the type of activations is of no account
    "DynamicQuantizeLinear": {(U8, S8), (S8, S8)},
    "MatMul": {(U8, S8), (S8, S8)},
    "Gemm": {(U8, S8), (S8, S8)},
    "Conv": {(U8, S8), (S8, S8)},
    "ConvInteger": {(S8, U8)},
}


@pytest.mark.parametrize("types", [*itertools.product((U8, S8), repeat=2)], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_which_types_saturate(operator: str, types: tuple[Any, Any]) -> None:
    first, second = types
    weights = WIDE[second]
    if "Conv" in operator:
        weights = np.ascontiguousarray(weights.T[:, :, None])
    product = made_by(operator, first, second, weights)
    assert product.saturates == (types in OPERATORS[operator])
    assert (product.operator in (operator, "MatMulInteger"), product.shape) == (True, weights.shape)
    if product.saturates:
        assert product.largest > LARGEST
    narrow = NARROW if second is S8 else np.full((8, 6), 128, U8)
    assert not made_by(operator, first, second, narrow.T[:, :, None] if "Conv" in operator else narrow).saturates


def test_the_kernel_of_a_convolution_is_summed_channels_innermost() -> None:
    """But in ConvInteger outermost; a depthwise one is added in 32 bits."""
    tensors: dict[str, Any] = {"s": np.float32(1), "xz": zero(U8), "wz": zero(S8)}
    inputs = ["x", "s", "xz", "w", "s", "wz", "s", "xz"]

    def share(weights: Array, operator: str = "QLinearConv", **attributes: int) -> float:
        if operator == "ConvInteger":
            return only([node(operator, ["x", "w"], ["y"])], {"w": weights}, TensorProto.INT8).share
        return only([node(operator, inputs, ["y"], **attributes)], {"w": weights, **tensors}, TensorProto.UINT8).share

    channels, positions = np.zeros((1, 2, 4), S8), np.zeros((1, 2, 4), S8)
    channels[0, :, 1] = positions[0, 0, :2] = 127
    assert (share(channels), share(positions)) == (0.25, 0)
    assert share(2 * channels.astype(U8), "ConvInteger") == 0
    assert share(2 * positions.astype(U8), "ConvInteger") == 0.25
    depthwise = np.full((6, 1, 4), 127, S8)
    assert (share(depthwise, group=6), share(depthwise)) == (0, 1)


def test_both_weights_of_a_quantised_lstm() -> None:
    tensors = {"w": np.full((1, 4, 8), 127, S8), "r": np.full((1, 2, 8), 3, S8)}
    model = graph([node("DynamicQuantizeLSTM", ["x", "w", "r"], ["y"], domain="com.microsoft", hidden_size=2)], tensors)
    assert [product.share for product in integer_products(model, Path())] == [1, 0]


def test_two_computed_operands_are_the_worst() -> None:
    quantized = [
        node("QuantizeLinear", ["x", "s", "z"], ["first"]),
        node("QuantizeLinear", ["x", "s", "z8"], ["second"]),
        node("Transpose", ["second"], ["turned"]),
    ]
    tensors = {"s": np.float32(1), "z": zero(U8), "z8": zero(S8)}
    product = only([*quantized, node("MatMulInteger", ["first", "turned"], ["y"])], tensors)
    assert (product.constant, product.saturates, product.shape) == (False, True, ())
    unsigned = [*quantized[:1], node("MatMulInteger", ["first", "first"], ["y"])]
    assert not only(unsigned, tensors).saturates


def test_weights_in_other_places(tmp_path: Path) -> None:
    """Transposed, in a Constant, quantised in the graph from floats, in another file, in a branch, on the left."""
    wide, s = WIDE[S8], np.float32(1)
    turned = {"w": np.ascontiguousarray(wide.T)}
    transposed = [node("Transpose", ["w"], ["t"]), node("MatMulInteger", ["x", "t"], ["y"])]
    assert only(transposed, turned, TensorProto.UINT8).largest == largest_pair_sum(wide, 0)[0]
    constant = [node("Constant", [], ["w"], value=onnx.numpy_helper.from_array(wide)), *transposed[1:]]
    constant[1].input[1] = "w"
    assert only(constant, {}, TensorProto.UINT8).largest == largest_pair_sum(wide, 0)[0]
    gemm = [
        node("QuantizeLinear", ["x", "s"], ["q"]),
        node("DequantizeLinear", ["q", "s"], ["d"]),
        node("QuantizeLinear", ["w", "ws", "wz"], ["qw"], axis=0),
        node("DequantizeLinear", ["qw", "ws", "wz"], ["dw"], axis=0),
        node("Gemm", ["d", "dw"], ["y"], transB=1),
    ]
    scales = np.linspace(0.5, 1, 6, dtype=np.float32)
    tensors = {"s": s, "w": wide.T * scales[:, None], "ws": scales, "wz": np.zeros(6, S8)}
    assert only(gemm, tensors).largest == largest_pair_sum(wide, 0)[0]
    external = graph([node("MatMulInteger", ["x", "w"], ["y"])], {"w": wide}, TensorProto.UINT8)
    onnx.save(external, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    assert [product.saturates for product in integer_products(model, tmp_path)] == [True]
    branch = helper.make_graph([node("MatMulInteger", ["x", "w"], ["z"])], "branch", [], [onnx.ValueInfoProto(name="z")])
    inside = graph([node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], {"w": wide}, TensorProto.UINT8)
    assert [product.saturates for product in integer_products(inside, tmp_path)] == [True, True]
    left = only([node("MatMulInteger", ["w", "x"], ["y"])], {"w": WIDE[U8]}, TensorProto.INT8)
    assert (left.saturates, left.largest) == (True, largest_pair_sum(WIDE[U8], 1)[0])


def test_float_products_are_none() -> None:
    weights_only = [node("DequantizeLinear", ["w", "s"], ["dw"]), node("MatMul", ["x", "dw"], ["y"])]
    model = graph(weights_only, {"w": WIDE[S8], "s": np.float32(1)})
    assert (list(integer_products(model, Path())), computes_in_integers(model)) == ([], False)
    model = graph([node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), node("MatMulInteger", ["q", "w"], ["y"])], {})
    assert computes_in_integers(model)


# ---------------------------------------------------------------- exported files


@pytest.fixture(scope="module")
def hubert(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, Path, Path]:
    """A module, its float32 file and what `--quantize int8-dynamic` writes of it."""
    folder = tmp_path_factory.mktemp("hubert")
    module, spec = speech.build("hubert", str(save_speech("hubert", folder / "checkpoint")))
    core.export_encoder(module, spec, folder / "float.onnx")
    core.export_encoder(module, spec, folder / "quantized.onnx", precision="int8-dynamic")
    return module, folder / "float.onnx", folder / "quantized.onnx"


def test_exported_weights_never_saturate(hubert: tuple[torch.nn.Module, Path, Path]) -> None:
    products = list(integer_products(onnx.load(hubert[2]), hubert[2].parent))
    assert len(products) == 13
    assert max(product.largest for product in products) <= 32_640
    assert not any(product.saturates for product in products)


def test_eight_bits_are_wrong_without_vnni_and_the_exported_seven_are_right(
    hubert: tuple[torch.nn.Module, Path, Path], tmp_path: Path
) -> None:
    from onnx.reference import ReferenceEvaluator
    from onnxruntime.quantization import QuantType, quantize_dynamic

    module, plain, exported = hubert
    eight = tmp_path / "eight.onnx"
    model = onnx.load(plain)
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    onnx.save(model, tmp_path / "prepared.onnx")
    quantize_dynamic(tmp_path / "prepared.onnx", eight, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)
    audio = np.random.default_rng(400).uniform(-0.9, 0.9, (1, 400)).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(audio)).numpy()

    def error(path: Path, *, vnni: bool) -> float:
        feeds = {"audio": audio}
        (embeddings,) = (
            ReferenceEvaluator(onnx.load(path)).run(None, feeds) if vnni else run_without_vnni(onnx.load(path), feeds)
        )
        return float(np.abs(embeddings - expected).max() / np.abs(expected).max())

    tolerance = precision.TOLERANCE["int8-dynamic"]
    assert error(eight, vnni=True) < 0.05 < tolerance < error(eight, vnni=False)
    assert error(exported, vnni=False) < 0.05
    assert error(exported, vnni=False) == pytest.approx(error(exported, vnni=True), rel=1e-3)
    assert any(product.saturates for product in integer_products(onnx.load(eight), tmp_path))


def test_a_scan_tells_a_quantised_model_from_a_float_one(hubert: tuple[torch.nn.Module, Path, Path]) -> None:
    assert [scan_model(path).integers for path in hubert[1:]] == [False, True]


def test_a_report_says_on_which_arithmetic_parity_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, spec = speech.build("hubert", str(save_speech("hubert", tmp_path / "checkpoint")))
    monkeypatch.setattr(core, "pair_sums", lambda: "saturating")
    assert core.export_encoder(module, spec, tmp_path / "float.onnx").pair_sums is None
    assert core.export_encoder(module, spec, tmp_path / "m.onnx", precision="int8-dynamic").pair_sums == "saturating"


# ---------------------------------------------------------------- what the processor has

INTEL = "processor\t: 0\nmodel name\t: x\nflags\t\t: fpu fma sse avx avx2 avx512f avx512bw {}\nbugs\t\t: spectre\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    processor.instruction_sets.cache_clear()
    yield tmp_path / "cpuinfo"
    processor.instruction_sets.cache_clear()


@pytest.mark.parametrize(
    ("text", "sets", "sums"),
    [
        (INTEL.format(""), ("avx", "fma", "avx2", "avx512f", "avx512bw"), "saturating"),
        (INTEL.format("avx512_vnni"), ("avx", "fma", "avx2", "avx512f", "avx512bw", "avx512_vnni"), "exact"),
        (INTEL.format("avx_vnni"), ("avx", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw"), "exact"),
        (ARM, ("asimd", "asimddp", "i8mm"), "exact"),
        ("flags : sse2\n", (), "exact"),
        ("nothing of the kind\n", None, "unknown"),
        ("", None, "unknown"),
        (None, None, "unknown"),
    ],
)
def test_the_processor_by_its_flags(text: str | None, sets: tuple[str, ...] | None, sums: str, cpuinfo: Path) -> None:
    if text is not None:
        cpuinfo.write_text(text)
    assert (processor.instruction_sets(), processor.pair_sums()) == (sets, sums)


def test_this_processor_is_known_where_the_system_tells() -> None:
    sets = processor.instruction_sets()
    assert (sets is not None) == Path("/proc/cpuinfo").exists()
