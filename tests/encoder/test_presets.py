"""Presets of front ends beside Whisper's, Kaldi's and librosa's: by their sources' formulas, and by figures of packages."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from feature_models import feature_model
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx_models import constant, noise, save, value
from transformers.audio_utils import mel_filter_bank

from xares_onnx.encoder.contract.frontend import make_frontend
from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.encoder.features import features_of

RATE = 16_000
Doubles = NDArray[np.float64]


def filters(bins: int, bands: int, low: float, high: float, **options: Any) -> Doubles:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bank: Doubles = mel_filter_bank(bins, bands, low, high, RATE, **options)
    return bank


def spectra(signal: Doubles, window: Doubles, hop: int, fft: int) -> Doubles:
    """|DFT| of every whole window, by matrix."""
    phases = np.exp(-2j * np.pi / fft * np.outer(np.arange(len(window)), np.arange(fft // 2 + 1)))
    starts = range(0, len(signal) - len(window) + 1, hop)
    magnitudes: Doubles = np.abs(np.stack([signal[start : start + len(window)] * window for start in starts]) @ phases)
    return magnitudes


def hann(samples: int, *, periodic: bool) -> Doubles:
    window: Doubles = np.hanning(samples + 1)[:-1] if periodic else np.hanning(samples)
    return window


def centred(window: Doubles, fft: int) -> Doubles:
    return np.pad(window, ((fft - len(window)) // 2, (fft - len(window)) // 2))


def wespeaker(clip: Doubles) -> Doubles:
    """torchaudio's kaldi.fbank with a Hamming window, less the mean over time."""
    pieces = np.lib.stride_tricks.sliding_window_view(clip, 400)[::160]
    pieces = pieces - pieces.mean(axis=1, keepdims=True)
    pieces = pieces - 0.97 * np.concatenate([pieces[:, :1], pieces[:, :-1]], axis=1)
    power = spectra(pieces.ravel(), np.hamming(400), 400, 512) ** 2
    bank = filters(257, 80, 20, 8_000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True)
    levels = np.log(np.maximum(power @ bank, np.finfo(np.float32).eps))
    return np.asarray(levels - levels.mean(axis=0))


def nemo(clip: Doubles) -> Doubles:
    """FilterbankFeatures.forward, less its last frame, which is masked."""
    emphasised = np.concatenate([clip[:1], clip[1:] - 0.97 * clip[:-1]])
    power = spectra(np.pad(emphasised, 256), centred(hann(400, periodic=False), 512), 160, 512) ** 2
    levels = np.log(power @ filters(257, 80, 0, 8_000, norm="slaney", mel_scale="slaney") + 2**-24)[: len(clip) // 160]
    return np.asarray((levels - levels.mean(axis=0)) / (levels.std(axis=0, ddof=1) + 1e-5))


def ced(clip: Doubles) -> Doubles:
    """torchaudio's MelSpectrogram(n_fft=512, hop_length=160, n_mels=64), then AmplitudeToDB(top_db=120)."""
    power = spectra(np.pad(clip, 256, "reflect"), hann(512, periodic=True), 160, 512) ** 2
    decibels = 10 * np.log10(np.maximum(power @ filters(257, 64, 0, 8_000, norm=None, mel_scale="htk"), 1e-10))
    return np.asarray(np.maximum(decibels, decibels.max() - 120))


def vggish(clip: Doubles, offset: float = 0.01) -> Doubles:
    """mel_features.log_mel_spectrogram."""
    bank = filters(257, 64, 125, 7_500, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True)
    return np.asarray(np.log(spectra(clip, hann(400, periodic=True), 160, 512) @ bank + offset))


def musicnn(clip: Doubles) -> Doubles:
    """TensorflowInputMusiCNN over frames of 512 samples around every 256th."""
    power = spectra(np.pad(clip, 256), hann(512, periodic=False), 256, 512) ** 2
    return np.asarray(np.log10(1 + 10_000 * power @ filters(257, 96, 0, 8_000, norm="slaney", mel_scale="slaney")))


FORMULAS: dict[str, Callable[[Doubles], Doubles]] = {
    "wespeaker": wespeaker,
    "nemo": nemo,
    "ced": ced,
    "vggish": vggish,
    "yamnet": lambda clip: vggish(clip, 0.001),
    "musicnn": musicnn,
}


@pytest.mark.parametrize("preset", FORMULAS)
def test_a_preset_is_its_formula(preset: str) -> None:
    frontend = make_frontend({"preset": preset}, RATE)
    for samples in (801, 16_000, 20_011):
        clip = noise(samples, samples)
        clip[: samples // 3] *= np.float32(1e-4)  # a range that limits and floors cut
        expected = FORMULAS[preset](clip.astype(np.float64))
        features = features_of(clip[None], frontend)[0]
        assert features.shape == expected.shape == (frontend.frames(samples), frontend.bins)
        np.testing.assert_allclose(features, expected, rtol=0, atol=2e-4)


# By kaldi-native-fbank 1.23, Essentia 2.1-beta6 and onnx-asr 0.12 (its NumPy preprocessor), for frames and bands of `chirp`.
# Essentia pads the last frame of the first two, and its VGGish takes a symmetric window.
FRAMES, BANDS = (0, 40, -1), (0, 9, 30, 63)
FIGURES: dict[str, tuple[list[str], list[list[float]]]] = {
    "musicnn": ([], [[3.37881, 2.99625, 0.48274, 0.70571], [0.76806, 0.0, 0.00138, 2e-05]]),
    "vggish": (
        ["window_periodic=false"],
        [
            [0.88997, -3.54973, -4.59284, -4.60398],
            [-4.48297, -4.36903, -4.49901, -4.60346],
        ],
    ),
    "wespeaker": (
        [],
        [
            [2.27263, 6.19869, -4.26326, -0.08416],
            [-0.4381, -0.70849, -0.07009, 0.62699],
            [-0.06601, -3.41529, -0.93067, 1.29263],
        ],
    ),
    "nemo": (
        [],
        [
            [9.12612, 1.64826, 0.35923, 9.0197],
            [-0.18801, -0.46528, -0.05616, -0.13264],
            [-0.27408, -0.53555, -0.6461, -0.13353],
        ],
    ),
}


def chirp() -> NDArray[np.float32]:
    t = np.arange(16_357) / RATE
    tones = 0.2 * np.sin(2 * np.pi * (200 * t + 900 * t * t)) + 0.05 * np.sin(2 * np.pi * 3_300 * t)
    return (tones + 0.001 * np.sin(2 * np.pi * 37 * t)).astype(np.float32)


@pytest.mark.parametrize("preset", FIGURES)
def test_a_preset_gives_what_its_package_gives(preset: str) -> None:
    changes, expected = FIGURES[preset]
    declared = dict(change.split("=") for change in changes)
    clip = chirp() * np.float32(32_768 if preset == "wespeaker" else 1)
    features = features_of(clip[None], make_frontend({"preset": preset, **declared}, RATE))[0]
    given = features[np.ix_([frame % len(features) for frame in FRAMES], BANDS)]
    np.testing.assert_allclose(given[: len(expected)], expected, rtol=0, atol=2e-3)


# ---------------------------------------------------------------- models as their makers ship them


def test_wespeakers_input_takes_16_bit_samples_by_its_preset(tmp_path: Path, shared_process: None) -> None:
    model = feature_model("kaldi", "BTF", name="feats")
    path = save(model, tmp_path / "model.onnx")
    contract = load_encoder(path, device="cpu", contract=["frontend.preset=wespeaker"]).contract
    assert contract.described()["amplitude"] == {"value": "int16", "source": "preset wespeaker"}
    assert contract.described()["frontend.normalize"] == {"value": "cmn", "source": "preset wespeaker"}
    declared = load_encoder(path, device="cpu", contract=["frontend.preset=wespeaker", "amplitude=unit"]).contract
    assert declared.described()["amplitude"] == {"value": "unit", "source": "--contract"}


def test_nemos_two_inputs(tmp_path: Path, shared_process: None) -> None:
    """`audio_signal` and `length`, to frames that count it."""
    extra = [
        helper.make_node("Cast", ["length"], ["counted"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["bands"], ["size"], start=2, end=3),
        helper.make_node("Cast", ["size"], ["frames"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["counted", "frames"], ["ratio"]),
        constant("axes", [1, 2]),
        helper.make_node("Unsqueeze", ["ratio", "axes"], ["ratios"]),
        helper.make_node("Mul", ["bands", "ratios"], ["scaled"]),
    ]
    lengths = [value("length", TensorProto.INT64, ["batch"])]
    model = feature_model("kaldi", "BFT", name="audio_signal", extra=extra, extra_inputs=lengths)
    encoder = load_encoder(save(model, tmp_path / "nemo.onnx"), device="cpu", contract=["frontend.preset=nemo"])
    assert (encoder.contract.input, encoder.contract.lengths_input) == ("audio_signal", "length")
    plain = save(feature_model("kaldi", "BFT"), tmp_path / "plain.onnx")
    expected = load_encoder(plain, device="cpu", contract=["frontend.preset=nemo"])
    clips = [noise(samples, samples) for samples in range(15_999, 60_000, 2_122)]
    for one, other in zip(encoder.embed(clips, RATE), expected.embed(clips, RATE), strict=True):
        np.testing.assert_allclose(one.frames, other.frames, rtol=0, atol=1e-6)
        # Frames are centred on multiples of 160 samples; the encoder's first looks at the second of them.
        np.testing.assert_allclose(one.times, 0.01 + 0.02 * np.arange(len(one.times)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("preset", FORMULAS)
def test_an_encoder_behind_a_preset_is_the_encoder_on_its_formula(preset: str, tmp_path: Path, shared_process: None) -> None:
    """Twenty clips of odd lengths, each one chunk; the encoder by hand is |W x 3 frames + b|, every other frame."""
    bands = make_frontend({"preset": preset}, RATE).bins
    model = feature_model("kaldi", "BTF", bands=bands)
    path = save(model, tmp_path / "model.onnx")
    encoder = load_encoder(path, device="cpu", contract=[f"frontend.preset={preset}", "input_layout=BTF"])
    tensors = {tensor.name: np.frombuffer(tensor.raw_data, np.float32) for tensor in model.graph.initializer}
    bias = tensors["bias"]
    weights = tensors["weights"].reshape(len(bias), bands, 3)
    clips = [noise(samples, samples) for samples in range(16_001, 60_000, 2_122)]
    assert len(clips) >= 20
    for clip, embedding in zip(clips, encoder.embed(clips, RATE), strict=True):
        loud = 32_768.0 if preset == "wespeaker" else 1.0
        features = FORMULAS[preset](loud * clip.astype(np.float64))
        starts = range(0, len(features) - 2, 2)
        expected = np.abs([np.einsum("dft,tf->d", weights, features[start : start + 3]) + bias for start in starts])
        assert embedding.frames.shape == expected.shape
        np.testing.assert_allclose(embedding.frames, expected, rtol=0, atol=2e-4)
