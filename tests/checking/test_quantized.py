"""Scales and weights of quantised files, and float weights that were quantised once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as models
import pytest
from check_models import BYTES, between_dequantized, in_8_bits
from eight_bits import graph
from onnx import TensorProto, helper, numpy_helper
from onnx_models import save

from xares_onnx.checking.quantized import Scales, Weights, folded_weights, is_on_a_grid, kept_matrices, quantized

node = helper.make_node


def bells(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def read(model: onnx.ModelProto, folder: Path = Path()) -> tuple[list[Scales], list[Weights]]:
    entries = list(quantized(model, folder))
    return [entry for entry in entries if isinstance(entry, Scales)], [e for e in entries if isinstance(e, Weights)]


# ---------------------------------------------------------------- scales

TINY = float(np.finfo(np.float32).tiny)


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (np.nan, "NaN or infinite"),
        (np.inf, "NaN or infinite"),
        (0.0, "zero"),
        (-0.01, "negative"),
        (TINY / 4, "denormal"),
        (TINY, None),
        (0.01, None),
    ],
)
def test_scales_that_cannot_be_right(value: float, fault: str | None) -> None:
    scales, _ = read(between_dequantized(BYTES, scales=[0.01] * 60 + [value] * 4))
    found = {entry.name: entry.wrong for entry in scales}
    assert found.pop("scales") == ({fault: 4} if fault else {})
    assert set(found) == {"scale", "large"}
    assert not any(found.values())


OPERATORS: list[tuple[str, str, list[str]]] = [
    ("DequantizeLinear", "", ["w", "s", "z"]),
    ("QuantizeLinear", "", ["x", "s", "z"]),
    ("QLinearMatMul", "", ["x", "a", "z", "w", "s", "z", "a", "z"]),
    ("QLinearConv", "", ["x", "a", "z", "w", "a", "z", "s", "z"]),
    ("QGemm", "com.microsoft", ["x", "s", "z", "w", "a", "z"]),
    ("QLinearAdd", "com.microsoft", ["x", "a", "z", "x", "s", "z", "a", "z"]),
    ("MatMulIntegerToFloat", "com.microsoft", ["x", "w", "a", "s"]),
    ("DynamicQuantizeMatMul", "com.microsoft", ["x", "w", "s"]),
    ("DynamicQuantizeLSTM", "com.microsoft", ["x", "w", "w", "", "", "", "", "", "a", "z", "s", "z"]),
    ("MatMulNBits", "com.microsoft", ["x", "w", "s"]),
]


@pytest.mark.parametrize(("operator", "domain", "inputs"), OPERATORS)
def test_the_scales_of_each_operator_are_found(operator: str, domain: str, inputs: list[str]) -> None:
    constants = {"w": np.ones((4, 4), np.int8), "z": np.int8(0), "a": np.float32(1), "s": np.float32(0)}
    scales, _ = read(graph([node(operator, inputs, ["y"], domain=domain)], constants))
    assert {entry.name: entry.wrong for entry in scales}["s"] == {"zero": 1}
    assert all(not entry.wrong for entry in scales if entry.name != "s")


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_the_scale_behind_a_product_of_bytes_is_found(activations: str) -> None:
    dynamic = [
        node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        node("MatMulInteger", ["xq", "w", "xz"], ["p"]),
        node("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["xs", "s"], ["both"]),
        node("Mul", ["f", "both"], ["y"]),
    ]
    static = [
        node("MatMulInteger", ["x", "w"], ["p"]),
        node("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["s", "f"], ["y"]),
    ]
    constants = {"w": np.ones((4, 4), np.int8), "s": np.array([1, np.nan, 1, 1], np.float32)}
    scales, weights = read(graph(dynamic if activations == "dynamic" else static, constants))
    assert [(entry.name, entry.wrong) for entry in scales] == [("s", {"NaN or infinite": 1})]
    assert [entry.name for entry in weights] == ["w"]


# ---------------------------------------------------------------- weights at the ends


def weights_of(values: np.ndarray, scales: int) -> float:
    nodes = [node("DequantizeLinear", ["w", "s", "z"], ["y"], axis=1)]
    several = () if scales == 1 else (scales,)
    constants = {"w": values, "s": np.ones(several, np.float32), "z": np.zeros(several, values.dtype)}
    (found,) = read(graph(nodes, constants))[1]
    return found.saturated


def whole(values: np.ndarray, scale: Any, most: int = 127) -> np.ndarray:
    return np.clip(np.rint(values / scale), -most, most).astype(np.int8)


@pytest.mark.parametrize("most", [127, 64, 63])
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_that_were_cut(most: int, per_channel: bool) -> None:
    values = bells(64, 32)
    largest = np.abs(values).max(axis=0) if per_channel else np.abs(values).max()
    scales = 32 if per_channel else 1
    assert weights_of(whole(values, largest / most, most), scales) < 0.01
    cut = weights_of(whole(values, largest / most / 4, most), scales)
    assert 0.2 < cut < 0.7
    expected = float((np.abs(values) > largest / 4).mean())
    assert cut == pytest.approx(expected, abs=2 * scales / values.size + 0.05)


def test_few_weights_per_scale_and_pruned_ones_are_no_sign() -> None:
    assert weights_of(whole(bells(3, 64), np.abs(bells(3, 64)).max(axis=0) / 127), 64) == 0
    pruned = np.where(np.random.default_rng(1).random((64, 32)) < 0.7, 0, np.abs(bells(64, 32)))
    assert weights_of(np.rint(pruned / pruned.max() * 255).astype(np.uint8), 1) < 0.01


# ---------------------------------------------------------------- float weights on a grid


def per_column(values: np.ndarray) -> np.ndarray:
    scale = np.abs(values).max(axis=0) / 127
    return (np.rint(values / scale) * scale).astype(np.float32)


def per_tensor(values: np.ndarray) -> np.ndarray:
    scale = np.float32(np.abs(values).max() / 127)
    return (np.rint(values / scale).astype(np.float32) * scale).astype(np.float32)


def with_zero_point(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    scale = np.float32((high - low) / 255)
    return (np.rint((values - low) / scale) * scale + np.float32(0.3)).astype(np.float32)


GRIDS: list[Callable[[np.ndarray], np.ndarray]] = [
    per_column,
    lambda values: per_column(values.T).T,
    per_tensor,
    with_zero_point,
]
OTHERS: list[Callable[[np.ndarray], np.ndarray]] = [
    lambda values: values,
    lambda values: values.astype(np.float16),
    lambda values: values.astype(np.float16).astype(np.float32),
    lambda values: (values.view(np.uint32) & 0xFFFF0000).view(np.float32),  # bfloat16's digits
    lambda values: np.exp2(np.rint(12 * values)).astype(np.float32),  # powers of two
    lambda values: np.sign(values),
    lambda values: np.zeros_like(values),
    lambda values: np.full_like(values, np.nan),
    lambda values: np.cos(2 * np.pi * np.outer(np.arange(len(values)), np.arange(values.shape[1])) / 512).astype(np.float32),
    lambda values: np.maximum(0, 1 - np.abs(np.arange(values.size).reshape(values.shape) % 400 - 200) / 17).astype(
        np.float32
    ),
]


def folded_share(values: np.ndarray) -> float:
    found = folded_weights(graph([node("MatMul", ["x", "w"], ["y"])], {"w": values}), Path())
    assert found.weights == values.size
    return found.on_a_grid / found.weights


@pytest.mark.parametrize("number", range(len(GRIDS)))
def test_weights_that_were_folded_back(number: int) -> None:
    assert folded_share(GRIDS[number](bells(512, 384))) == 1


@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_weights_that_were_not(number: int) -> None:
    assert folded_share(OTHERS[number](bells(512, 384))) == 0


def test_a_few_weights_say_nothing() -> None:
    assert not is_on_a_grid(per_tensor(bells(1, 299))[0])
    assert is_on_a_grid(per_tensor(bells(1, 300))[0])


def test_weights_in_another_file_are_read(tmp_path: Path) -> None:
    path = models.save_external(tmp_path)
    model = onnx.load(path, load_external_data=False)
    assert folded_weights(model, tmp_path).on_a_grid == 0


# ---------------------------------------------------------------- what ONNX Runtime's quantizer writes


@pytest.mark.parametrize("how", ["dynamic", "QDQ", "QOperator"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_onnx_runtimes_own_files_are_sane(how: str, per_channel: bool, tmp_path: Path) -> None:
    from onnxruntime import quantization

    logging.disable(logging.WARNING)
    weights = {"w": bells(64, 96), "v": bells(96, 32, seed=1)}
    weights["w"][:, 5] = 0  # a dead channel
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"]), node("MatMul", ["b", "v"], ["y"])]
    model = graph(nodes, weights)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32]))
    source, target = save(model, tmp_path / "float.onnx"), tmp_path / "int8.onnx"
    try:
        if how == "dynamic":
            quantization.quantize_dynamic(source, target, per_channel=per_channel)
        else:

            class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
                feeds = iter([{"x": bells(9, 64, seed=seed)} for seed in range(3)])

                def get_next(self) -> dict[str, np.ndarray] | None:
                    return next(self.feeds, None)

            kind = quantization.QuantFormat[how]
            quantization.quantize_static(source, target, Reader(), quant_format=kind, per_channel=per_channel)
    finally:
        logging.disable(logging.NOTSET)
    model = onnx.load(target)
    scales, found = read(model, tmp_path)
    assert {len(scales) >= 2, len(found)} == {True, 2}
    assert not any(entry.wrong for entry in scales)
    assert max(entry.saturated for entry in found) < 0.01
    assert sorted(kept_matrices(model)) == [(64, 96), (96, 32)]


def test_matrices_that_are_kept_in_bytes() -> None:
    assert kept_matrices(in_8_bits(collapsed=False)) == ((4, 64),)
    assert kept_matrices(models.encoder()) == ()
    zero = numpy_helper.from_array(np.zeros(3, np.uint8), "zero")
    model = models.encoder()
    model.graph.initializer.append(zero)
    assert kept_matrices(model) == ()
