"""Inputs that carry no audio: declared numbers in the type and shape of the graph, in every call."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_models as models
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from xares_onnx import load_encoder
from xares_onnx.encoder.annotate import annotate
from xares_onnx.encoder.contract.constants import constant_of
from xares_onnx.encoder.encoder import Embedding
from xares_onnx.errors import ContractError, ContradictionError, UsageError

pytestmark = pytest.mark.usefixtures("shared_process")
FLOAT, BOOL, INT64 = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.INT64
LENGTHS = [400, 1_601, 4_003, 16_000, 16_000, 23_457]


def scaled_by(name: str, kind: int, dims: list[int | str]) -> onnx.ModelProto:
    """An encoder whose frames are multiplied by the sum of a further input: per item, or of the whole if it has no batch."""
    rank = len(dims)
    axes = list(range(1, rank)) if isinstance(dims[0], str) else list(range(rank))
    extra = [
        helper.make_node("Cast", [name], ["numbers"], to=FLOAT),
        models.constant("sum_axes", axes),
        helper.make_node("ReduceSum", ["numbers", "sum_axes"], ["sum"], keepdims=0),
        models.constant("scale_shape", [-1, 1, 1]),
        helper.make_node("Reshape", ["sum", "scale_shape"], ["scale"]),
        helper.make_node("Mul", ["frames_first", "scale"], ["embeddings"]),
    ]
    return models.encoder(extra=extra, extra_inputs=[models.value(name, kind, dims)])


def embedded(path: Path, *contract: str) -> list[Embedding]:
    rng = np.random.default_rng(0)
    clips = [rng.uniform(-0.5, 0.5, length) for length in LENGTHS]
    with load_encoder(path, device="cpu", threads=1, contract=["amplitude=unit", *contract]) as encoder:
        return encoder.embed(clips, 16_000)


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> list[Embedding]:
    path = tmp_path_factory.mktemp("canonical") / "model.onnx"
    onnx.save(models.encoder(), path)
    return embedded(path)


@pytest.mark.parametrize(
    ("kind", "dims", "declared", "scale"),
    [
        (BOOL, ["batch", 1], "true", 1),
        (BOOL, ["batch", 1], "True", 1),  # as Python writes it
        (FLOAT, ["batch", "times"], "[[0.5, 1.5]]", 2),
        (FLOAT, ["batch", 4], "0.25", 1),
        (FLOAT, [1], "-2", -2),
        (INT64, [3], "[1, 2, -1]", 2),
        (TensorProto.FLOAT16, ["batch", 2, 2], "[[1, 2], [3, -2]]", 4),
    ],
)
def test_a_declared_input_takes_its_numbers(
    tmp_path: Path, canonical: list[Embedding], kind: int, dims: list[int | str], declared: str, scale: float
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(scaled_by("extra", kind, dims), path)
    for clip, plain in zip(embedded(path, f"constant.extra={declared}"), canonical, strict=True):
        assert np.allclose(clip.frames, scale * plain.frames, rtol=1e-6, atol=1e-7)
        assert np.array_equal(clip.times, plain.times)


def test_it_may_be_declared_beside_the_model_or_inside(tmp_path: Path, canonical: list[Embedding]) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(scaled_by("is_longer:0", BOOL, ["batch", 1]), path)
    annotate(path, ["constant.is_longer:0=true"], tmp_path / "inside.onnx")
    path.with_suffix(".toml").write_text('[constant]\n"is_longer:0" = true\n')
    for file, source in ((path, "model.toml"), (tmp_path / "inside.onnx", "metadata")):
        assert all(np.array_equal(a.frames, b.frames) for a, b in zip(embedded(file), canonical, strict=True))
        with load_encoder(file, device="cpu") as encoder:
            assert encoder.contract.described()["constant.is_longer:0"] == {"value": (True,), "source": source}


def test_without_a_declaration_the_error_shows_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(scaled_by("is_longer", BOOL, ["batch", 1]), path)
    with pytest.raises(ContractError, match=r"constant\.is_longer=VALUE; else export it without that input$"):
        embedded(path)


@pytest.mark.parametrize(
    ("declared", "error", "sentence"),
    [
        ("constant.extra=yes", UsageError, r"constant\.extra=yes must be a number, true, false, or a short list of"),
        ("constant.extra=NaN", UsageError, "must be a number"),
        ("constant.extra=[]", UsageError, "must be a number"),
        ("constant.extra=" + "[" * 5_000, UsageError, "must be a number"),
        ("constant.extra=" + "9" * 5_000, UsageError, "must be a number"),
        ("constant.extra=[[1], [2, 3]]", ContractError, "give lists of equal lengths"),
        ("constant.extra=[1, 2, 3]", ContractError, r"its axis 1 takes 2 values, not 3"),
        (
            "constant.extra=[[1, 2], [3, 4]]",
            ContractError,
            "its axis 0 takes one item, which every item of the batch is given",
        ),
        ("constant.extra=[[[1, 2]]]", ContractError, "with at most 2 levels"),
        ("constant.extra=0.5", ContractError, "which cannot hold it"),
        ("constant.extra=9223372036854775808", ContractError, "which cannot hold it"),
        ("constant.other=1", ContradictionError, "the model has no input 'other'; it has 'audio', 'extra'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, declared: str, error: type[Exception], sentence: str) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(scaled_by("extra", INT64, ["batch", 2]), path)
    with pytest.raises(error, match=sentence):
        embedded(path, declared)


def test_an_input_of_more_than_16_mib_is_refused() -> None:
    with pytest.raises(ContractError, match="more than 16 MiB"):
        constant_of("big", "tensor(float)", ["batch", 4096, 4096], "0", "--contract")


@given(
    st.lists(st.lists(st.integers(-128, 127), min_size=3, max_size=3), min_size=1, max_size=4),
    st.integers(1, 5),
    st.sampled_from(["tensor(int8)", "tensor(double)", "tensor(float)"]),
)
def test_every_item_of_a_batch_takes_the_same_numbers(rows: list[list[int]], batch: int, kind: str) -> None:
    constant = constant_of("extra", kind, ["N", len(rows), "width"], str(rows), "--contract")
    array = constant.array(batch)
    assert array.shape == (batch, len(rows), 3)
    assert all(item.tolist() == rows for item in array)
