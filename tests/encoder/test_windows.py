"""Models whose input is a fixed window: equal to the canonical model fed the same windows, frame by frame and in time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models as models
import pytest
from onnx import ModelProto, TensorProto, helper
from onnx_models import DIM, HOP, RECEPTIVE, noise, save

from xares_onnx.encoder.encoder import Encoder, load_encoder
from xares_onnx.errors import ContractError

RATE = 16_000
TOLERANCE = 1e-5
CLIPS = [noise(samples, seed) for seed, samples in enumerate([1, 7, 401, 5_001, *range(15_999, 100_000, 5_322)])]

Clip = np.ndarray


def load(model: ModelProto, folder: Path, **options: Any) -> Encoder:
    return load_encoder(save(model, folder / "model.onnx"), **{"device": "cpu", **options})


def reference(
    clip: Clip, window: int, embed: Callable[[Clip], Clip] = models.embed, hop: float = HOP, first: float = RECEPTIVE / 2
) -> tuple[Clip, Clip]:
    """Frames and times of a clip in windows, by the words of the contract."""
    frames, times = [], []
    for start in range(0, len(clip), window):
        piece = clip[start : start + window]
        for i, frame in enumerate(embed(np.pad(piece, (0, window - len(piece))))):
            center = start + first + i * hop
            if center - hop / 2 < len(clip) or (start == 0 and i == 0):
                frames.append(frame)
                times.append(center / RATE)
    return np.array(frames), np.array(times)


def assert_equals_reference(encoder: Encoder, window: int, *args: Any, tolerance: float = TOLERANCE, **options: Any) -> None:
    assert len(CLIPS) >= 20
    for embedding, clip in zip(encoder.embed(CLIPS, RATE), CLIPS, strict=True):
        frames, times = reference(clip, window, *args, **options)
        assert embedding.frames.shape == frames.shape
        np.testing.assert_allclose(embedding.frames, frames, rtol=0, atol=tolerance)
        np.testing.assert_allclose(embedding.times, times, rtol=0, atol=1e-9)


def over_the_window() -> list[Any]:
    """Nodes that divide by the loudest value of the window, so that every frame sees all of it."""
    return [
        helper.make_node("ReduceMax", ["frames_first"], ["loudest"], axes=[1, 2], keepdims=1),
        helper.make_node("Div", ["frames_first", "loudest"], ["embeddings"]),
    ]


def normalised(samples: Clip) -> Clip:
    frames = models.embed(samples)
    whole: Clip = frames / frames.max()
    return whole


# ---------------------------------------------------------------- frames and times

FORMS: dict[str, tuple[Callable[[], ModelProto], int]] = {
    "1 s": (lambda: models.encoder(samples=16_000, frames=98), 16_000),
    "2 s": (lambda: models.encoder(samples=32_000, frames=198), 32_000),
    "43,844 samples, [batch, samples, 1]": (lambda: models.encoder("BT1", samples=43_844, frames=None), 43_844),
    "[samples] to [frames, dim]": (lambda: models.encoder("T", "TD", samples=16_000, frames=None), 16_000),
    "[1, samples] to [1, dim, frames]": (lambda: models.encoder("BT", "BDT", samples=16_000, frames=98, batch=1), 16_000),
    "[3, samples] to [3, frames, 1, dim]": (
        lambda: models.encoder("BT", "BT1D", samples=16_000, frames=98, batch=3),
        16_000,
    ),
    "to [1, frames, batch, dim]": (lambda: models.encoder("BT", "1TBD", samples=16_000, frames=None), 16_000),
    "as many frames as dimensions": (lambda: models.encoder("BT", "BDT", samples=880, frames=4), 880),
    "lengths": (lambda: models.with_lengths(samples=16_000), 16_000),
    "several outputs": (lambda: models.several_outputs(samples=16_000), 16_000),
    "float64": (lambda: models.encoder(samples=16_000, frames=None, kind=TensorProto.DOUBLE), 16_000),
}


@pytest.mark.parametrize("form", FORMS)
def test_windows_give_what_the_canonical_model_gives(form: str, tmp_path: Path, shared_process: None) -> None:
    model, window = FORMS[form]
    told: list[Any] = []
    short = {"contract": ["hop_samples=160", "first_frame_center_samples=200"]} if window < RATE else {}
    encoder = load(model(), tmp_path, observer=told.append, **short)
    contract = encoder.contract
    assert (contract.min_samples, contract.max_samples, contract.chunk_samples) == (window,) * 3
    assert contract.sources["chunk_samples"] == "graph (the input's axis is fixed)"
    assert any(f"windows of exactly {window} samples" in str(note) for note in told)
    assert contract.window_frames == len(models.embed(np.zeros(window)))
    if not short:
        assert (contract.hop_samples, contract.receptive_field_samples) == (HOP, RECEPTIVE)
        assert contract.sources["hop_samples"] == "measured"
    assert_equals_reference(encoder, window)


def test_float16_windows(tmp_path: Path, shared_process: None) -> None:
    encoder = load(models.encoder(samples=16_000, frames=None, kind=models.FLOAT16), tmp_path)
    assert_equals_reference(encoder, 16_000, tolerance=2e-3)


def test_a_front_end_that_pads_has_its_first_frame_at_the_start(tmp_path: Path, shared_process: None) -> None:
    encoder = load(models.padding_front_end(200, samples=16_000), tmp_path)
    assert (encoder.contract.hop_samples, encoder.contract.receptive_field_samples) == (HOP, 0)
    assert_equals_reference(encoder, 16_000, lambda samples: models.embed(np.pad(samples, 200)), first=0)


def test_a_recurrent_model_is_measured_by_where_its_frames_end(tmp_path: Path, shared_process: None) -> None:
    extra = [models.constant("time", 1), helper.make_node("CumSum", ["frames_first", "time"], ["embeddings"])]
    encoder = load(models.encoder(samples=16_000, frames=98, extra=extra), tmp_path)
    assert (encoder.contract.hop_samples, encoder.contract.receptive_field_samples) == (HOP, RECEPTIVE)
    assert_equals_reference(encoder, 16_000, lambda samples: models.embed(samples).cumsum(axis=0), tolerance=2e-4)


def test_frames_that_see_the_whole_window_are_spread_over_it_and_that_is_said(tmp_path: Path, shared_process: None) -> None:
    told: list[Any] = []
    model = models.encoder(samples=16_000, frames=98, extra=over_the_window())
    encoder = load(model, tmp_path, observer=told.append)
    assert encoder.contract.sources["hop_samples"] == "default (window / frames)"
    assert encoder.contract.sources["first_frame_center_samples"] == "default (frames in the middle of the window)"
    assert any("hop_samples=163.265 (--contract changes it)" in str(note) for note in told)
    assert_equals_reference(encoder, 16_000, normalised, hop=16_000 / 98, first=8_000 / 98)


def test_a_hop_that_is_no_whole_number_is_remembered(tmp_path: Path, shared_process: None) -> None:
    model = models.encoder(samples=16_000, frames=98, extra=over_the_window())
    first, again = (load(model, tmp_path, cache=tmp_path / "cache").contract for _ in range(2))
    assert again == first
    assert again.hop_samples == 16_000 / 98


@pytest.mark.parametrize(
    ("declared", "first", "source"),
    [
        ([], (16_000 - 97 * HOP) / 2, "default (frames in the middle of the window)"),
        ([f"receptive_field_samples={RECEPTIVE}"], RECEPTIVE / 2, "default (receptive field / 2)"),
        (["first_frame_center_samples=12.5"], 12.5, "--contract"),
    ],
)
def test_a_declared_hop_stands_where_none_can_be_measured(
    declared: list[str], first: float, source: str, tmp_path: Path, shared_process: None
) -> None:
    model = models.encoder(samples=16_000, frames=98, extra=over_the_window())
    encoder = load(model, tmp_path, contract=["hop_samples=160", *declared])
    assert encoder.contract.sources["hop_samples"] == "--contract"
    assert encoder.contract.sources["first_frame_center_samples"] == source
    assert_equals_reference(encoder, 16_000, normalised, first=first)


def test_one_vector_a_window(tmp_path: Path, shared_process: None) -> None:
    """Windows are weighted by the samples of the clip that they hold."""
    encoder = load(models.encoder("BT", "B1D", samples=16_000), tmp_path)
    assert encoder.contract.clip_only
    for embedding, clip in zip(encoder.embed(CLIPS, RATE), CLIPS, strict=True):
        pieces = [clip[start : start + 16_000] for start in range(0, len(clip), 16_000)]
        vectors = [models.embed(np.pad(piece, (0, 16_000 - len(piece)))).mean(axis=0) for piece in pieces]
        expected = np.average(vectors, axis=0, weights=[len(piece) for piece in pieces])
        np.testing.assert_allclose(embedding.frames, expected[None], rtol=0, atol=TOLERANCE)


def test_a_mask_tells_the_padding_of_a_window(tmp_path: Path, shared_process: None) -> None:
    encoder = load(models.with_mask(samples=16_000), tmp_path)
    clips = [noise(5_001), noise(16_000)]
    for embedding, clip in zip(encoder.embed(clips, RATE), clips, strict=True):
        frames, _ = reference(clip, 16_000)
        np.testing.assert_allclose(embedding.frames, frames * (len(clip) / 16_000), rtol=0, atol=TOLERANCE)


def test_a_window_that_the_graph_does_not_show_may_be_declared(tmp_path: Path, shared_process: None) -> None:
    model = models.frozen_inside(16_000)
    encoder = load(model, tmp_path, contract=["min_samples=16000", "max_samples=16000"])
    assert encoder.contract.sources["chunk_samples"] == "--contract"
    assert_equals_reference(encoder, 16_000)


def test_axes_that_cannot_be_told_apart_may_be_declared(tmp_path: Path, shared_process: None) -> None:
    """All frames are the mean of the window in another size: a change moves along no axis."""
    model = models.same_everywhere(samples=16_000)
    with pytest.raises(ContractError, match=r"no measurement shows which axis holds the frames; .*output_layout=BTD"):
        load(model, tmp_path)
    encoder = load(model, tmp_path, contract=["output_layout=BTD"])
    assert encoder.contract.sources["output_layout"] == "--contract"
    assert (encoder.contract.window_frames, encoder.contract.dim) == (98, DIM)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "declared", "says"),
    [
        (
            models.encoder,
            ["chunk_samples=8000"],
            "declares chunk_samples=8000, but input 'audio' takes exactly 16000 samples",
        ),
        (models.encoder, ["min_samples=400"], "declares min_samples=400, but input 'audio' takes exactly 16000 samples"),
        (models.encoder, ["hop_samples=320"], "declares hop_samples=320, but 160 was measured"),
        (models.encoder, ["output_layout=BDT"], "declares output_layout=BDT, but BTD was measured"),
        (
            lambda samples: models.encoder(samples=samples, extra=over_the_window()),
            ["hop_samples=165"],
            "declares hop_samples=165, but 98 frames at that hop do not fit into the window of 16000 samples",
        ),
        (lambda samples: models.encoder("BT", "BD", samples=samples), ["hop_samples=160"], "gives one vector per clip"),
        (models.two_hidden_states, [], "any of outputs 'layer_1', 'layer_2' could be the embedding; name it by"),
        (lambda samples: models.one_value("BT", samples=samples), [], "one value per frame is no embedding"),
        (lambda samples: models.one_value("B", samples=samples), [], "a single value is no embedding"),
        (models.attention_map, [], "no measurement shows which axis holds the frames; declare the axes, as in --contract"),
        (models.stateful, [], "the model keeps a state: input 'state' takes"),
    ],
)
def test_refused_windows(
    model: Callable[..., ModelProto], declared: list[str], says: str, tmp_path: Path, shared_process: None
) -> None:
    with pytest.raises(ContractError) as caught:
        load(model(samples=16_000), tmp_path, contract=declared)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
