"""Every accepted way to take features: the same embeddings as the same encoder with its front end inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_models import HOPS, feature_model, waveform_model
from onnx import ModelProto, TensorProto, helper
from onnx_models import constant, noise, save, value

from xares_onnx.encoder.encoder import Embedding, Encoder, load_encoder
from xares_onnx.errors import ContractError

RATE = 16_000
TOLERANCE = 1e-5
LENGTHS = [1, 7, 401, 5_001, *range(15_999, 50_000, 2_122), 170_001]
CLIPS = [noise(samples, seed) * np.float32(10.0 ** -(seed % 4)) for seed, samples in enumerate(LENGTHS)]
pytestmark = pytest.mark.usefixtures("shared_process")

# Half a window lies before the first frame of Kaldi's alone; the encoder's first frame looks at the second of features.
FIRST = {"whisper": 160, "kaldi": 360, "librosa": 512}


def load(model: ModelProto, folder: Path, *contract: str, **options: Any) -> Encoder:
    """Each from a path of its own, since the shared process keeps the last model of a path."""
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    return load_encoder(save(model, path), device="cpu", contract=contract, **options)


_expected: dict[Any, list[Embedding]] = {}


def canonical(kind: str, folder: Path, *contract: str, rate: int = RATE) -> list[Embedding]:
    key = (kind, contract, rate)
    if key not in _expected:
        path = save(waveform_model(kind, rate), folder / "canonical.onnx")
        _expected[key] = load_encoder(path, device="cpu", contract=contract).embed(CLIPS, RATE)
    return _expected[key]


def assert_same(found: list[Embedding], expected: list[Embedding], tolerance: float = TOLERANCE) -> None:
    assert len(found) == len(expected) >= 20
    for one, other in zip(found, expected, strict=True):
        # Times differ by what the law of a waveform model cannot show: how its front end is centred.
        frames = min(len(one.frames), len(other.frames))
        assert abs(len(one.frames) - len(other.frames)) <= 1
        assert np.abs(other.frames).max() > 0.05
        np.testing.assert_allclose(one.frames[:frames], other.frames[:frames], rtol=0, atol=tolerance)


# ---------------------------------------------------------------- layouts

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "[batch, bands, frames]": ("BFT", {}),
    "[batch, frames, bands]": ("BTF", {}),
    "[batch, 1, bands, frames]": ("B1FT", {}),
    "[batch, 1, frames, bands]": ("B1TF", {}),
    "[batch, bands, frames, 1]": ("BFT1", {}),
    "[batch, frames, bands, 1]": ("BTF1", {}),
    "[frames, bands]": ("TF", {}),
    "[bands, frames]": ("FT", {}),
    "[1, bands, frames]": ("BFT", {"B": 1}),
    "[1, 1, frames, bands]": ("B1TF", {"B": 1}),
    "[3, frames, bands]": ("BTF", {"B": 3}),
    "[frames, 1, bands]": ("TBF", {"B": 1}),
}
NAMELESS = {"B": None, "T": None, "F": None}


@pytest.mark.parametrize("kind", ["whisper", "kaldi", "librosa"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same(form: str, kind: str, tmp_path: Path) -> None:
    layout, sizes = FORMS[form]
    if kind != "whisper" and layout not in ("BFT", "B1TF"):
        return
    encoder = load(feature_model(kind, layout, sizes=sizes), tmp_path, f"frontend.preset={kind}")
    contract = encoder.contract
    assert (contract.input_layout, contract.fixed_batch) == (layout, sizes.get("B"))
    assert (contract.hop_samples, contract.first_frame_center_samples) == (2 * HOPS[kind], FIRST[kind])
    assert contract.sources["input_layout"] == "graph"
    assert_same(encoder.embed(CLIPS, RATE), canonical(kind, tmp_path))


@pytest.mark.parametrize("layout", ["BFT", "BTF"])
def test_axes_without_sizes_are_told_apart_by_running_the_model(layout: str, tmp_path: Path) -> None:
    encoder = load(feature_model("whisper", layout, sizes=NAMELESS), tmp_path, "frontend.preset=whisper")
    assert (encoder.contract.input_layout, encoder.contract.sources["input_layout"]) == (layout, "measured")
    assert_same(encoder.embed(CLIPS, RATE), canonical("whisper", tmp_path))


def test_an_order_of_axes_that_is_declared(tmp_path: Path) -> None:
    said = ["frontend.preset=kaldi", "input_layout=TBF"]
    encoder = load(feature_model("kaldi", "TBF"), tmp_path, *said)
    assert (encoder.contract.input_layout, encoder.contract.dynamic_batch) == ("TBF", True)
    assert_same(encoder.embed(CLIPS, RATE), canonical("kaldi", tmp_path))


@pytest.mark.parametrize(("element", "tolerance"), [(TensorProto.DOUBLE, TOLERANCE), (TensorProto.FLOAT16, 1e-2)])
def test_other_types(element: int, tolerance: float, tmp_path: Path) -> None:
    encoder = load(feature_model("kaldi", "BTF", element=element), tmp_path, "frontend.preset=kaldi")
    assert_same(encoder.embed(CLIPS, RATE), canonical("kaldi", tmp_path), tolerance)


# ---------------------------------------------------------------- what is declared beside


def test_another_sampling_rate(tmp_path: Path) -> None:
    said = ["sample_rate=22050"]
    encoder = load(feature_model("whisper"), tmp_path, "frontend.preset=whisper", *said)
    assert encoder.contract.frontend is not None
    assert encoder.contract.frontend.sample_rate == 22_050
    assert_same(encoder.embed(CLIPS, RATE), canonical("whisper", tmp_path, *said, rate=22_050))


def test_clips_of_mean_0_and_variance_1(tmp_path: Path) -> None:
    encoder = load(feature_model("kaldi", "BTF"), tmp_path, "frontend.preset=kaldi", "normalize=zscore")
    plain = canonical("kaldi", tmp_path)
    assert_same(encoder.embed(CLIPS, RATE), expected := canonical("kaldi", tmp_path, "normalize=zscore"))
    assert np.abs(expected[5].frames - plain[5].frames).max() > 0.05


def test_samples_of_16_bits(tmp_path: Path) -> None:
    encoder = load(feature_model("kaldi", "BTF"), tmp_path, "frontend.preset=kaldi", "amplitude=int16")
    plain = canonical("kaldi", tmp_path)
    assert_same(encoder.embed(CLIPS, RATE), expected := canonical("kaldi", tmp_path, "amplitude=int16"))
    louder = load(waveform_model("kaldi"), tmp_path).embed([clip * 32_768 for clip in CLIPS], RATE)
    assert_same(encoder.embed(CLIPS, RATE), louder)
    assert np.abs(expected[5].frames - plain[5].frames).max() > 0.05


def test_lengths_count_frames(tmp_path: Path) -> None:
    """The encoder scales its features by lengths / frames."""
    extra = [
        helper.make_node("Shape", ["bands"], ["size"], start=2, end=3),
        helper.make_node("Cast", ["size"], ["size_float"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["feature_lens"], ["lengths_float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["lengths_float", "size_float"], ["ratio"]),
        constant("ratio_axes", [1, 2]),
        helper.make_node("Unsqueeze", ["ratio", "ratio_axes"], ["scale"]),
        helper.make_node("Mul", ["bands", "scale"], ["scaled"]),
    ]
    inputs = [value("feature_lens", TensorProto.INT64, ["batch"])]
    encoder = load(feature_model("kaldi", "BTF", extra=extra, extra_inputs=inputs), tmp_path, "frontend.preset=kaldi")
    assert encoder.contract.lengths_input == "feature_lens"
    assert_same(encoder.embed(CLIPS, RATE), canonical("kaldi", tmp_path))


@pytest.mark.parametrize(("kind", "own"), [("kaldi", 29), ("whisper", 32)])
def test_a_mask_counts_the_frames_of_the_clip(kind: str, own: int, tmp_path: Path) -> None:
    """A clip of 5,001 samples is padded to a second; the encoder keeps its features where the mask is one."""
    extra = [
        constant("mask_axis", [1]),
        helper.make_node("Unsqueeze", ["attention_mask", "mask_axis"], ["mask"]),
        helper.make_node("Cast", ["mask"], ["mask_float"], to=TensorProto.FLOAT),
        constant("one", 1),
        helper.make_node("Cast", ["one"], ["one_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["bands", "mask_float"], ["masked"]),
        helper.make_node("Add", ["masked", "mask_float"], ["ones"]),
        helper.make_node("Sub", ["ones", "mask_float"], ["scaled"]),
    ]
    inputs = [value("attention_mask", TensorProto.INT64, ["batch", "frames"])]
    model = feature_model(kind, "BTF", extra=extra, extra_inputs=inputs)
    plain = load(feature_model(kind, "BTF"), tmp_path, f"frontend.preset={kind}").embed([CLIPS[3]], RATE)[0]
    masked = load(model, tmp_path, f"frontend.preset={kind}").embed([CLIPS[3]], RATE)[0]
    untouched = (own - 3) // 2 + 1  # frames of the encoder that see frames of the mask's alone
    np.testing.assert_allclose(masked.frames[:untouched], plain.frames[:untouched], rtol=0, atol=TOLERANCE)
    assert len(plain.frames) > untouched
    assert np.abs(masked.frames[untouched] - plain.frames[untouched]).max() > 1e-3


# ---------------------------------------------------------------- bands and windows


@pytest.mark.parametrize("layout", ["BFT", "BTF", "B1TF", "TF"])
def test_the_number_of_bands_is_the_graphs(layout: str, tmp_path: Path) -> None:
    encoder = load(feature_model("kaldi", layout, bands=40), tmp_path, "frontend.preset=kaldi")
    frontend = encoder.contract.frontend
    assert frontend is not None
    assert (frontend.mels, encoder.contract.sources["frontend.mels"]) == (40, "graph")


@pytest.mark.parametrize("kind", ["whisper", "kaldi", "librosa"])
def test_windows_give_what_the_canonical_model_gives(kind: str, tmp_path: Path) -> None:
    told: list[str] = []
    model = feature_model(kind, "BTF", sizes={"T": 101})
    encoder = load(model, tmp_path, f"frontend.preset={kind}", observer=lambda event: told.append(str(event)))
    window = {"whisper": 16_160, "kaldi": 16_400, "librosa": 51_200}[kind]
    contract = encoder.contract
    assert (contract.min_samples, contract.max_samples, contract.chunk_samples) == (window,) * 3
    assert (contract.window_frames, contract.hop_samples) == (50, 2 * HOPS[kind])
    assert contract.first_frame_center_samples == pytest.approx(FIRST[kind], abs=1)
    assert any(f"windows of exactly {window} samples" in text for text in told)
    same_window = [f"min_samples={window}", f"max_samples={window}"]
    assert_same(encoder.embed(CLIPS, RATE), canonical(kind, tmp_path, *same_window))


def test_frames_of_zeros_follow_the_clip_where_that_is_declared(tmp_path: Path) -> None:
    """An encoder without bias on frames of zeros alone gives what it gives for zeros."""
    said = ["frontend.preset=kaldi", "amplitude=int16"]
    silent = load(feature_model("kaldi", "BTF", sizes={"T": 101}), tmp_path, *said).embed([CLIPS[3]], RATE)[0]
    encoder = load(feature_model("kaldi", "BTF", sizes={"T": 101}), tmp_path, *said, "frontend.fill=zeros")
    filled = encoder.embed([CLIPS[3]], RATE)[0]
    clean = 14  # of 29 frames of the clip
    np.testing.assert_allclose(filled.frames[:clean], silent.frames[:clean], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(
        filled.frames[15:], np.abs(np.linspace(-0.3, 0.3, 4))[None].repeat(len(filled.frames) - 15, 0)
    )


# ---------------------------------------------------------------- times

PLACES: dict[str, list[str]] = {
    "whisper": ["frontend.preset=whisper"],
    "kaldi": ["frontend.preset=kaldi"],
    "librosa": ["frontend.preset=librosa", "frontend.mels=80", "frontend.log_range=0"],
    "kaldi without snipped edges": ["frontend.preset=kaldi", "frontend.padding=symmetric"],
    "whisper with its last frame": ["frontend.preset=whisper", "frontend.drop_last_frame=false"],
    "stacked": ["frontend.preset=kaldi", "frontend.stack_frames=2", "frontend.mels=40"],
    "mirrored, an odd transform": ["frontend.preset=kaldi", "frontend.padding=reflect", "frontend.fft_samples=513"],
}


@pytest.mark.parametrize("window", [None, 81])
@pytest.mark.parametrize("name", PLACES)
def test_a_click_moves_the_frame_whose_time_is_nearest(name: str, window: int | None, tmp_path: Path) -> None:
    sizes = {} if window is None else {"T": window}
    encoder = load(feature_model("kaldi", "BTF", sizes=sizes, symmetric=True), tmp_path, *PLACES[name])
    hop = encoder.contract.hop_samples
    assert hop is not None
    quiet = noise(encoder.contract.min_samples if window else 40_000) * np.float32(1e-2)
    places = np.random.default_rng(0).integers(4_000, 9_000, 24)
    clips = np.repeat(quiet[None], len(places) + 1, axis=0)
    clips[np.arange(len(places)), places] = 1
    *clicked, plain = encoder.embed(clips, RATE)
    off = []
    for place, embedding in zip(places, clicked, strict=True):
        moved = np.abs(embedding.frames - plain.frames).sum(axis=1)
        assert abs(plain.times[moved.argmax()] * RATE - place) <= hop
        off.append(float(np.sum(moved * plain.times) / moved.sum()) * RATE - place)
    assert abs(np.mean(off)) < hop / 12  # a front end that is centred by half a hop of its own too late is at hop / 4


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "said", "says"),
    [
        (
            lambda: feature_model("kaldi", "BTF"),
            ["frontend.preset=kaldi", "frontend.mels=40"],
            "input 'features' has shape ['batch', 'frames', 80], and the front end gives 40 bins per frame; set the "
            "number of bands by --contract frontend.mels=N, or the axes by --contract input_layout=BTF or BFT",
        ),
        (
            lambda: feature_model("kaldi", "BTF", sizes={"T": 80}),
            ["frontend.preset=kaldi"],
            "the model accepts features in any order; set --contract input_layout=BTF or --contract input_layout=BFT (B",
        ),
        (
            lambda: feature_model("kaldi", "BTF"),
            ["frontend.preset=kaldi", "input_layout=BFT"],
            "--contract declares input_layout=BFT, but input 'features' has shape ['batch', 'frames', 80], and a frame",
        ),
        (lambda: feature_model("kaldi", "BTF"), ["frontend.preset=kaldi", "input_layout=B1T"], "which has no axis F"),
        (
            lambda: feature_model("kaldi", "BTF", sizes=NAMELESS),
            ["frontend.preset=kaldi", "frontend.mels=64"],
            "the model fails on 64 bins per frame, whatever the order of its axes",
        ),
        (
            lambda: feature_model("kaldi", "BTF"),
            ["frontend.mels=80"],
            "frontend.mels needs a preset; set --contract",
        ),
        (
            lambda: feature_model("kaldi", "BTF"),
            ["frontend.preset=kaldi", "frontend.window_samples=513", "frontend.fft_samples=512"],
            "the declared front end is impossible: window_samples=513 is more than fft_samples=512; correct",
        ),
        (
            lambda: feature_model("kaldi", "BTF", extra_inputs=[value("speaker", TensorProto.FLOAT, ["batch", 4])]),
            ["frontend.preset=kaldi", "input=features"],
            "the model needs input 'speaker' (tensor(float), shape ['batch', 4]) beside the features, which nothing here",
        ),
        (
            lambda: feature_model(
                "kaldi", "BTF", name="mel", extra_inputs=[value("image", TensorProto.FLOAT, ["batch", 4])]
            ),
            ["frontend.preset=kaldi"],
            "any of 'mel', 'image' could take the features; name it by --contract input=NAME",
        ),
    ],
)
def test_refused(model: Callable[[], ModelProto], said: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ContractError) as caught:
        load(model(), tmp_path, *said)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
