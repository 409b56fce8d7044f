"""Every accepted way to take a waveform and to give frames: the same embeddings as the canonical [batch, samples] model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models as models
import pytest
from onnx import ModelProto, TensorProto
from onnx_models import DIM, HOP, RECEPTIVE, noise, save

from xares_onnx.encoder.encoder import Embedding, Encoder, load_encoder

RATE = 16_000
TOLERANCE = 1e-5
CLIPS = [noise(samples, seed) for seed, samples in enumerate([1, 7, 401, 5_001, *range(15_999, 50_000, 2_122)])]


@pytest.fixture(scope="module")
def canonical(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Embedding]]:
    with load(models.encoder(), tmp_path_factory.mktemp("canonical")) as encoder:
        yield encoder.embed(CLIPS, RATE)


def load(model: ModelProto, folder: Path, **options: Any) -> Encoder:
    return load_encoder(save(model, folder / "model.onnx"), **{"device": "cpu", **options})


def assert_same(found: list[Embedding], expected: list[Embedding], tolerance: float = TOLERANCE) -> None:
    assert len(found) == len(expected) >= 20
    for one, other in zip(found, expected, strict=True):
        assert one.frames.dtype == np.float32
        assert one.frames.shape == other.frames.shape
        np.testing.assert_allclose(one.frames, other.frames, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(one.times, other.times)


# ---------------------------------------------------------------- batch, singleton axes, order of axes

FORMS: dict[str, tuple[Callable[[], ModelProto], dict[str, Any]]] = {
    "[1, samples]": (lambda: models.encoder(batch=1), {"input_layout": "BT", "fixed_batch": 1}),
    "[1, 1, samples]": (lambda: models.encoder("B1T", batch=1), {"input_layout": "B1T", "fixed_batch": 1}),
    "[batch, 1, samples]": (lambda: models.encoder("B1T"), {"input_layout": "B1T", "fixed_batch": None}),
    "[batch, samples, 1]": (lambda: models.encoder("BT1"), {"input_layout": "BT1", "fixed_batch": None}),
    "[samples]": (lambda: models.encoder("T", "TD"), {"input_layout": "T", "output_layout": "TD"}),
    "[3, samples]": (lambda: models.encoder(batch=3), {"fixed_batch": 3, "output_layout": "BTD"}),
    "[4, samples] to [4, 4, frames]": (lambda: models.encoder("BT", "BDT", batch=DIM), {"output_layout": "BDT"}),
    "[4, samples] to [4, frames, 4], the batch last": (
        lambda: models.encoder("BT", "DTB", batch=DIM),
        {"output_layout": "DTB"},
    ),
    "[3, 1, samples] to [frames, 3, dim]": (lambda: models.encoder("B1T", "TBD", batch=3), {"output_layout": "TBD"}),
    **{
        f"to {layout}": ((lambda layout=layout: models.encoder("BT", layout)), {"output_layout": layout, "dim": DIM})
        for layout in ("BTD", "BDT", "TBD", "B1TD", "BT1D", "BTD1", "1BTD", "B1DT", "1BD1T", "DT1B")
    },
    "[samples] to [1, dim, frames]": (lambda: models.encoder("T", "1DT"), {"output_layout": "BDT"}),
    "[1, samples] to [1, 1, frames, dim]": (lambda: models.encoder("BT", "1BTD", batch=1), {"output_layout": "B1TD"}),
    "nameless axes and an undeclared output": (
        lambda: models.encoder("B1T", "any", samples=None, batch=None, extra=models.cast_to_embeddings("1BTD")),
        {"output_layout": "1BTD", "dynamic_batch": True},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(form: str, tmp_path: Path, canonical: list[Embedding], shared_process: None) -> None:
    model, fields = FORMS[form]
    encoder = load(model(), tmp_path)
    assert {name: getattr(encoder.contract, name) for name in fields} == fields
    assert (encoder.contract.hop_samples, encoder.contract.receptive_field_samples) == (HOP, RECEPTIVE)
    assert_same(encoder.embed(CLIPS, RATE), canonical)


@pytest.mark.parametrize("layout", ["BD", "D", "1BD", "B1D", "BD1"])
def test_every_form_of_one_vector_a_clip(layout: str, tmp_path: Path, shared_process: None) -> None:
    encoder = load(models.encoder("BT" if "B" in layout else "T", layout), tmp_path)
    assert encoder.contract.clip_only
    assert encoder.contract.output_layout == layout
    for embedding, clip in zip(encoder.embed(CLIPS, RATE), CLIPS, strict=True):
        padded = np.pad(clip, (0, max(0, RATE - len(clip))))
        np.testing.assert_allclose(embedding.frames, models.embed(padded).mean(axis=0)[None], rtol=0, atol=TOLERANCE)


def test_a_fixed_batch_is_said_and_is_filled_with_the_clip_itself(tmp_path: Path, shared_process: None) -> None:
    """Of a model that divides by the loudest value of its batch the clip alone decides, as at batch 1."""
    notes = []
    encoder = load(models.batch_coupled(batch=3), tmp_path, observer=notes.append)
    assert encoder.contract.sources["fixed_batch"] == "graph"
    assert any("takes batches of exactly 3" in str(note) for note in notes)
    free = load_encoder(save(models.batch_coupled(), tmp_path / "free.onnx"), device="cpu")
    assert_same(encoder.embed(CLIPS, RATE), free.embed(CLIPS, RATE))


# ---------------------------------------------------------------- types and amplitude


def test_float64(tmp_path: Path, canonical: list[Embedding], shared_process: None) -> None:
    assert_same(load(models.encoder(kind=TensorProto.DOUBLE), tmp_path).embed(CLIPS, RATE), canonical)


def test_float16(tmp_path: Path, canonical: list[Embedding], shared_process: None) -> None:
    """Samples and embeddings below 2 are rounded to 1/2048 of their size, and a frame sums 400 of them."""
    assert_same(load(models.encoder(kind=models.FLOAT16), tmp_path).embed(CLIPS, RATE), canonical, 2e-3)


def test_int16_amplitude_is_the_same_model_fed_louder(tmp_path: Path, canonical: list[Embedding]) -> None:
    """A model that divides its samples by 32,768 gives, fed int16 amplitudes, the canonical embeddings."""
    with load(models.divides_its_samples(32_768), tmp_path, contract=["amplitude=int16"]) as encoder:
        assert encoder.contract.sources["amplitude"] == "--contract"
        assert_same(encoder.embed(CLIPS, RATE), canonical)


# ---------------------------------------------------------------- lengths and masks


@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.FLOAT])
@pytest.mark.parametrize(("name", "source"), [("attention_mask", "graph"), ("valid", "--contract")])
def test_a_mask_is_one_for_samples_and_zero_for_padding(
    name: str, source: str, kind: int, tmp_path: Path, canonical: list[Embedding], shared_process: None
) -> None:
    """The model scales its frames by the mean of the mask; a mask holds at least the samples of one frame."""
    encoder = load(models.with_mask(kind, name), tmp_path, contract=["mask_input=valid"] if name == "valid" else [])
    assert (encoder.contract.mask_input, encoder.contract.sources["mask_input"]) == (name, source)
    scaled = [
        Embedding(whole.frames * (max(len(clip), RECEPTIVE) / RATE if len(clip) < RATE else 1), whole.times)
        for clip, whole in zip(CLIPS, canonical, strict=True)
    ]
    assert_same(encoder.embed(CLIPS, RATE), scaled)


def test_lengths_count_all_samples_that_are_handed_over(
    tmp_path: Path, canonical: list[Embedding], shared_process: None
) -> None:
    encoder = load(models.with_lengths(), tmp_path)
    assert (encoder.contract.lengths_input, encoder.contract.sources["lengths_input"]) == ("lengths", "graph")
    assert_same(encoder.embed(CLIPS, RATE), canonical)
