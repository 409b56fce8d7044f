"""Windows closer than their length: one vector per hop, equal to windows cut and run by hand, at the same times."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_models as models
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx_models import noise, save
from window_models import BANDS, WINDOW_DIM, vector_of, window_model

from xares_onnx.encoder.chunking import plan_chunks
from xares_onnx.encoder.contract.contract import Contract
from xares_onnx.encoder.contract.frontend import make_frontend
from xares_onnx.encoder.contract.windows import Windows
from xares_onnx.encoder.encoder import Encoder, load_encoder
from xares_onnx.encoder.features import features_of
from xares_onnx.errors import ContractError, UsageError

pytestmark = pytest.mark.usefixtures("shared_process")
RATE = 16_000
CLIPS = [noise(samples, seed) for seed, samples in enumerate([1, 7, 401, 5_001, *range(15_999, 100_000, 5_322), 350_003])]
FRAMES, HOP = 76, 8  # of features, 160 samples apart
MEL = ["frontend.preset=kaldi", f"frontend.mels={BANDS}"]
DECLARED = [*MEL, f"window.hop_frames={HOP}"]

Clip = NDArray[np.floating[Any]]


def load(model: Any, folder: Path, *contract: str, **options: Any) -> Encoder:
    path = folder / f"{len(list(folder.iterdir()))}.onnx"
    return load_encoder(save(model, path), device="cpu", contract=contract, **options)


def by_hand(clip: Clip, embed: Callable[[Clip], Clip], window: int, hop: int, first: float) -> tuple[Clip, Clip]:
    """Vectors and times of windows of samples, the last of which covers the clip's end, or lies in a clip that it covers.

    By the words of the documentation: a frame whose centre less half a hop lies past the end is left out, but the first.
    """
    count = max(1, math.ceil((len(clip) - window) / hop) + 1)
    padded = np.pad(clip, (0, max(0, window + (count - 1) * hop - len(clip))))
    starts = [i * hop for i in range(count)]
    starts = [start for start in starts if start == 0 or start + first - hop / 2 < len(clip)]
    vectors = [embed(padded[start : start + window]) for start in starts]
    return np.array(vectors), np.array([(start + first) / RATE for start in starts])


def assert_by_hand(encoder: Encoder, embed: Callable[[Clip], Clip], window: int, hop: int, first: float) -> None:
    assert len(CLIPS) >= 20
    for embedding, clip in zip(encoder.embed(CLIPS, RATE), CLIPS, strict=True):
        vectors, times = by_hand(clip, embed, window, hop, first)
        assert embedding.frames.shape == vectors.shape
        np.testing.assert_allclose(embedding.frames, vectors, rtol=0, atol=1e-5)
        np.testing.assert_allclose(embedding.times, times, rtol=0, atol=1e-9)


def of_kaldi(samples: Clip) -> Clip:
    """The vector of a window of samples, whose features do not depend on what lies around."""
    frontend = make_frontend({"preset": "kaldi", "mels": BANDS}, RATE)
    return vector_of(features_of(samples[None], frontend)[0])


# ---------------------------------------------------------------- equality and times

FORMS: dict[str, dict[str, Any]] = {
    "[batch, frames, bands, 1]": {"layout": "BTF1"},
    "[batch, 1, bands, frames]": {"layout": "B1FT"},
    "a batch of one": {"layout": "BTF", "batch": 1},
    "a batch of five": {"layout": "BTF", "batch": 5},
    "a batch of 64": {"layout": "B1TF", "batch": 64},
    "no batch": {"layout": "TF"},
    "an output of four axes": {"layout": "BTF1", "out": "B11D"},
}


@pytest.mark.parametrize("form", FORMS)
def test_windows_of_features(form: str, tmp_path: Path) -> None:
    told: list[Any] = []
    encoder = load(window_model(FRAMES, **FORMS[form]), tmp_path, *DECLARED, observer=told.append)
    contract = encoder.contract
    window = 400 + 160 * (FRAMES - 1)
    assert (contract.hop_samples, contract.receptive_field_samples, contract.min_samples) == (HOP * 160, window, window)
    assert (contract.first_frame_center_samples, contract.dim, contract.chunk_overlap) == (window / 2, WINDOW_DIM, "window")
    batch = FORMS[form].get("batch", 1 if "B" not in FORMS[form]["layout"] else None)
    assert contract.windows == Windows(FRAMES, HOP, batch or 64, batch)
    assert (contract.dynamic_batch, contract.batch_coupled, contract.fixed_batch) == (True, False, None)
    described = contract.described()
    assert described["window.frames"] == {"value": FRAMES, "source": "graph"}
    assert described["window.hop_frames"] == {"value": HOP, "source": "--contract"}
    assert described["chunk_overlap"] == {"value": "window", "source": "default (of windows)"}
    assert described["hop_samples"]["source"] == "measured"
    assert any("one vector per window of 76 frames, every 8: a frame every 1280 samples" in str(note) for note in told)
    assert_by_hand(encoder, of_kaldi, window, HOP * 160, window / 2)


@pytest.mark.parametrize("batch", ["batch", 1, 3])
def test_windows_of_samples(batch: Any, tmp_path: Path) -> None:
    encoder = load(models.encoder("BT", "B1D", samples=15_600, batch=batch), tmp_path, "window.hop_samples=7680")
    assert encoder.contract.described()["window.hop_samples"]["value"] == 7_680
    assert_by_hand(encoder, lambda samples: models.embed(samples).mean(axis=0), 15_600, 7_680, 7_800)


def test_windows_end_to_end(tmp_path: Path) -> None:
    encoder = load(window_model(FRAMES), tmp_path, *MEL, f"window.frames={FRAMES}")
    assert encoder.contract.sources["window.hop_frames"] == "default (end to end)"
    window, hop = 400 + 160 * (FRAMES - 1), 160 * FRAMES
    assert_by_hand(encoder, of_kaldi, window, hop, window / 2)


def test_a_window_that_the_graph_does_not_fix_is_declared(tmp_path: Path) -> None:
    model = window_model(FRAMES, sizes={"T": "frames"})
    encoder = load(model, tmp_path, *DECLARED, f"window.frames={FRAMES}")
    assert encoder.contract.sources["window.frames"] == "--contract"
    window = 400 + 160 * (FRAMES - 1)
    assert_by_hand(encoder, of_kaldi, window, HOP * 160, window / 2)


@pytest.mark.parametrize("chunk", [20_000, 33_333, 400_000])
def test_chunks_do_not_show(chunk: int, tmp_path: Path) -> None:
    encoder = load(window_model(FRAMES), tmp_path, *DECLARED, f"chunk_samples={chunk}")
    window = 400 + 160 * (FRAMES - 1)
    assert_by_hand(encoder, of_kaldi, window, HOP * 160, window / 2)


def test_chunks_that_do_not_overlap_may_be_declared(tmp_path: Path) -> None:
    encoder = load(window_model(FRAMES), tmp_path, *DECLARED, "chunk_overlap=none")
    assert encoder.contract.chunk_overlap is msgspec.UNSET
    assert np.abs(np.diff(encoder.embed([CLIPS[-1]], RATE)[0].times)).max() > HOP / 100 + 0.5


@pytest.mark.parametrize(
    ("preset", "frames", "hop", "seconds"),
    [("musicnn", 187, 93, 1.488), ("musicnn", 128, 62, 0.992), ("vggish", 96, 48, 0.48), ("yamnet", 96, 48, 0.48)],
)
def test_the_windows_that_a_preset_is_used_with(preset: str, frames: int, hop: int, seconds: float, tmp_path: Path) -> None:
    bands = {"musicnn": 96}.get(preset, 64)
    encoder = load(window_model(frames, bands=bands), tmp_path, f"frontend.preset={preset}")
    contract = encoder.contract
    assert contract.described()["window.hop_frames"] == {"value": hop, "source": f"preset {preset}"}
    assert contract.hop_samples == round(seconds * RATE)
    frontend = make_frontend({"preset": preset}, RATE)
    clip = noise(100_003, 3)
    # One chunk of features, cut by hand: centred frames see beyond a window, so features are those of the whole chunk.
    (embedding,) = load(
        window_model(frames, bands=bands), tmp_path, f"frontend.preset={preset}", "chunk_samples=200000"
    ).embed([clip], RATE)
    window, step = frontend.samples_for(frames), hop * frontend.hop_samples
    count = math.ceil((len(clip) - window) / step) + 1
    features = features_of(np.pad(clip, (0, window + (count - 1) * step - len(clip)))[None], frontend)[0]
    assert (len(features) - frames) // hop + 1 == count
    vectors = [vector_of(features[i * hop : i * hop + frames]) for i in range(count)]
    first = (frames - 1) / 2 * frontend.hop_samples + (200 if frontend.padding == "none" else 0)
    np.testing.assert_allclose(embedding.times, (first + step * np.arange(count)) / RATE, rtol=0, atol=1e-9)
    np.testing.assert_allclose(embedding.frames, vectors, rtol=0, atol=1e-5)


def test_another_window_of_a_preset_is_not_strided_and_how_to_is_said(tmp_path: Path) -> None:
    told: list[Any] = []
    contract = load(window_model(150, bands=96), tmp_path, "frontend.preset=musicnn", observer=told.append).contract
    assert any("; --contract window.hop_frames=N makes a frame of each, N apart" in str(note) for note in told)
    assert contract.clip_only
    assert contract.fixed_window


def test_windows_that_meet_in_a_batch_run_one_by_one(tmp_path: Path) -> None:
    """The model divides by the loudest value of the batch."""
    encoder = load(window_model(FRAMES, coupled=True), tmp_path, *DECLARED)
    assert encoder.contract.batch_coupled
    assert encoder.contract.windows == Windows(FRAMES, HOP, 1)
    window = 400 + 160 * (FRAMES - 1)

    def alone(samples: Clip) -> Clip:
        vector = of_kaldi(samples)
        return np.asarray(vector / np.abs(vector).max())

    assert_by_hand(encoder, alone, window, HOP * 160, window / 2)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("model", "contract", "error", "says"),
    [
        (
            lambda: window_model(FRAMES),
            [*MEL, "window.hop_samples=1280"],
            ContractError,
            "declares window.hop_samples=1280, but input 'features' takes features; declare --contract window.hop_frames=N",
        ),
        (
            lambda: models.encoder("BT", "B1D", samples=15_600),
            ["window.hop_frames=48"],
            ContractError,
            "declares window.hop_frames=48, but input 'audio' takes a waveform; declare --contract window.hop_samples=N",
        ),
        (
            lambda: window_model(FRAMES),
            [*DECLARED, "window.frames=80"],
            ContractError,
            "declares window.frames=80, but input 'features' takes exactly 76 frames; correct the declaration",
        ),
        (
            lambda: window_model(FRAMES, sizes={"T": "frames"}),
            DECLARED,
            ContractError,
            "declares window.hop_frames=8, but input 'features' takes any number of frames; declare the window too, by "
            "--contract window.frames=N",
        ),
        (
            lambda: window_model(FRAMES),
            [*MEL, "window.hop_frames=77"],
            ContractError,
            "declares window.hop_frames=77, more than the window of 76 frames, so that what lies between would be lost; "
            "declare --contract window.hop_frames=N with N up to 76",
        ),
        (
            lambda: window_model(FRAMES),
            [*DECLARED, "tokens.prefix=1"],
            ContractError,
            "a model of windows gives one vector per window, and so has no grid of tokens; drop tokens.* or window.*",
        ),
        (
            lambda: window_model(FRAMES, out="BTD"),
            DECLARED,
            ContractError,
            "several axes could hold the dim",
        ),
        (
            lambda: models.encoder("BT", "BD", samples=15_600),
            ["hop_samples=7680"],
            ContractError,
            "gives one vector per clip, without frames; for a frame per window, declare --contract window.hop_samples=N",
        ),
        (
            lambda: models.encoder("BT", "BD"),
            ["chunk_overlap=window"],
            ContractError,
            "declares chunk_overlap=window, but output 'embeddings' gives one vector per clip, without frames; drop it",
        ),
        (lambda: models.encoder(), ["window.hop_frames=0"], UsageError, "window.hop_frames=0 must be from 1 to"),
        (lambda: models.encoder(), ["window.hop=1"], UsageError, "there is no contract key 'window.hop'"),
        (lambda: models.encoder(), ["chunk_overlap=half"], UsageError, "must be one of none, window"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: Callable[[], Any], contract: list[str], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        load(model(), tmp_path, *contract)
    assert says in str(caught.value)


def test_a_table_of_windows_beside_the_model(tmp_path: Path) -> None:
    save(window_model(FRAMES), tmp_path / "model.onnx")
    (tmp_path / "model.toml").write_text(f'[frontend]\npreset = "kaldi"\nmels = {BANDS}\n[window]\nhop_frames = {HOP}\n')
    contract = load_encoder(tmp_path, device="cpu").contract
    assert contract.described()["window.hop_frames"] == {"value": HOP, "source": "model.toml"}


# ---------------------------------------------------------------- the arithmetic


@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 9), st.integers(1, 3))
def test_windows_are_cut_as_they_are_counted(values: int, length: int, hop: int, bins: int) -> None:
    windows = Windows(length, hop)
    array = np.arange(2 * values * bins, dtype=np.float32).reshape(2, values, bins)
    cut = windows.cut(array)
    starts = list(range(0, values - length + 1, hop))
    assert cut.shape == (2, windows.count(values), length, bins) == (2, len(starts), length, bins)
    for number, start in enumerate(starts):
        assert np.array_equal(cut[:, number], array[:, start : start + length])


@given(st.integers(1, 5_000), st.integers(0, 900), st.integers(1, 300), st.integers(0, 2_000))
def test_overlapping_chunks_give_each_frame_once_and_cover_the_clip(samples: int, field: int, hop: int, more: int) -> None:
    contract = msgspec.structs.replace(
        _CONTRACT,
        hop_samples=hop,
        receptive_field_samples=field,
        min_samples=max(field, 1),
        chunk_samples=max(field, hop, 1) + more,
        chunk_overlap="window",
    )
    chunks = plan_chunks(samples, contract)
    starts = [chunk.start + i * hop for chunk in chunks for i in range(contract.frames_of(chunk.length))]
    assert starts == [i * hop for i in range(len(starts))]
    assert all(0 <= chunk.start < chunk.stop <= samples for chunk in chunks)
    if field >= hop:
        assert chunks[-1].stop == samples
        if len(starts) > 1:
            assert starts[-2] + field < samples  # no more than are needed
    else:  # of centred frames the law shows less than they hold
        assert samples - chunks[-1].stop <= hop


_CONTRACT = Contract(
    input="audio",
    input_layout="BT",
    lengths_input=None,
    output="embeddings",
    output_layout="BTD",
    dim=4,
    sample_rate=RATE,
    hop_samples=160,
    receptive_field_samples=400,
    first_frame_center_samples=200.0,
    min_samples=400,
    max_samples=None,
    chunk_samples=160_000,
    amplitude="unit",
    normalize="none",
    dynamic_batch=True,
    batch_coupled=False,
)
