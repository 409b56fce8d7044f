"""The arithmetic of features against the extractors and spectrograms of `transformers`, and how clips stay apart."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx_models import noise
from transformers import ASTFeatureExtractor, ClapFeatureExtractor, SeamlessM4TFeatureExtractor, WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from xares_onnx.encoder.contract.frontend import Frontend, make_frontend
from xares_onnx.encoder.features import features_of, mel_filters

RATE = 16_000
Floats = NDArray[np.floating[Any]]


def made(waveform: Floats, frontend: Frontend, samples: int | None = None) -> NDArray[np.float32]:
    """Features (frames, bins) of one clip, padded with silence to `samples`."""
    padded = np.pad(waveform, (0, max(0, (samples or 0) - len(waveform)))).astype(np.float32)
    return features_of(padded[None], frontend, [len(waveform)])[0]


def swelling(samples: int, seed: int = 0) -> NDArray[np.float32]:
    """Noise and a tone over 120 dB, from what is under every floor to the loudest, off zero in the mean."""
    time = np.arange(samples) / RATE
    loudness = 10.0 ** (-6 * np.linspace(1, 0, samples))
    return (loudness * (noise(samples, seed) + 0.4 * np.sin(2 * np.pi * 700 * time) + 0.05)).astype(np.float32)


CLIPS = [swelling(samples, seed) for seed, samples in enumerate([401, 5_001, 16_000, 16_159, 33_333])]


# ---------------------------------------------------------------- against transformers


@pytest.mark.parametrize("bands", [80, 128])
def test_whisper(bands: int) -> None:
    extractor = WhisperFeatureExtractor(feature_size=bands, chunk_length=3)
    frontend = make_frontend({"preset": "whisper", "mels": bands}, RATE)
    for clip in CLIPS:
        found = made(clip, frontend, 48_000)
        expected = extractor._np_extract_fbank_features(np.pad(clip, (0, 48_000 - len(clip)))[None], "cpu")[0].T
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        in_single = extractor(clip, sampling_rate=RATE, return_tensors="np").input_features[0].T
        np.testing.assert_allclose(found, in_single, rtol=0, atol=1e-2)  # torch's arithmetic, far below the loudest


def test_whisper_with_another_transform_and_rate() -> None:
    extractor = WhisperFeatureExtractor(n_fft=512, hop_length=200, chunk_length=1, sampling_rate=22_050, feature_size=64)
    said = {"preset": "whisper", "mels": 64, "fft_samples": 512, "hop_samples": 200}
    found = made(CLIPS[1], make_frontend(said, 22_050), 22_050)
    expected = extractor._np_extract_fbank_features(np.pad(CLIPS[1], (0, 22_050 - 5_001))[None], "cpu")[0].T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalised", [True, False])
def test_kaldi_as_ast_has_it(normalised: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bands narrower than a bin
        extractor = ASTFeatureExtractor(max_length=300, do_normalize=normalised)
    said = {"preset": "kaldi", "mels": 128, "window": "hann", "fill": "zeros"}
    if normalised:
        said |= {"mean": extractor.mean, "std": 2 * extractor.std}
    frontend = make_frontend(said, RATE)
    for clip in CLIPS:
        found = made(clip, frontend, frontend.samples_for(300))
        (expected,) = extractor(clip, sampling_rate=RATE)["input_values"]
        assert found.shape == expected.shape == (300, 128)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_kaldi_as_seamless_has_it() -> None:
    extractor = SeamlessM4TFeatureExtractor()
    said = {"preset": "kaldi", "normalize": "cmvn", "stack_frames": 2, "fill": "zeros"}
    for clip in CLIPS[1:]:
        expected = extractor(clip, sampling_rate=RATE, pad_to_multiple_of=1, return_tensors="np")["input_features"][0]
        found = made(clip * np.float32(32_768), make_frontend(said, RATE))
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)  # a band of little variance is divided by it


@pytest.mark.parametrize("seconds", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("padding", ["repeatpad", "pad"])
def test_librosa_as_clap_has_it(seconds: float, padding: str) -> None:
    extractor = ClapFeatureExtractor(truncation="rand_trunc", max_length_s=3, padding=padding)
    said: dict[str, Any] = {"preset": "librosa", "padding": "reflect", "fft_samples": 1024, "hop_samples": 480, "mels": 64}
    said |= {"high_hz": 14_000.0, "log_range": 0.0, "fill": "repeat" if padding == "repeatpad" else "silence"}
    clip = swelling(round(48_000 * seconds))
    found = made(clip, make_frontend(said, 48_000), 144_000)
    expected = extractor(clip, sampling_rate=48_000, return_tensors="np")["input_features"][0, 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("reference", ["unit", "max"])
def test_librosa(reference: str) -> None:
    frontend = make_frontend({"preset": "librosa", "log_reference": reference}, RATE)
    filters = mel_filter_bank(1025, 128, 0.0, 8000.0, RATE, norm="slaney", mel_scale="slaney")
    for clip in CLIPS[1:]:
        settings = {"pad_mode": "constant", "power": 2.0, "mel_filters": filters}
        plain = spectrogram(clip, window_function(2048), 2048, 512, **settings)
        loudest = float(plain.max()) if reference == "max" else 1.0
        expected = spectrogram(
            clip, window_function(2048), 2048, 512, log_mel="dB", reference=loudest, db_range=80.0, **settings
        )
        np.testing.assert_allclose(made(clip, frontend), expected.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("said", "settings"),
    [
        ({"log": "natural", "log_floor": 1e-5}, {"log_mel": "log", "mel_floor": 1e-5}),
        ({"log": "none", "power": 1.0, "log_floor": 0.0}, {"power": 1.0, "mel_floor": 0.0}),
        ({"power": 1.0, "log_floor": 1e-5}, {"power": 1.0, "log_mel": "dB", "min_value": 1e-5, "mel_floor": 1e-5}),
        ({"preemphasis": 0.9, "remove_dc": "true"}, {"preemphasis": 0.9, "remove_dc_offset": True, "log_mel": "dB"}),
        ({"window": "hamming", "window_periodic": "false"}, {"log_mel": "dB"}),
        ({"window": "rectangular"}, {"log_mel": "dB"}),
    ],
    ids=str,
)
def test_single_keys(said: dict[str, Any], settings: dict[str, Any]) -> None:
    """Each changes what the key of another name changes in transformers."""
    frontend = make_frontend({"preset": "librosa", "log_range": 0.0, "fft_samples": 400, "mels": 40, **said}, RATE)
    filters = mel_filter_bank(201, 40, 0.0, 8000.0, RATE, norm="slaney", mel_scale="slaney")
    name = {"rectangular": "boxcar"}.get(frontend.window, frontend.window)
    window = window_function(400, name, periodic=frontend.window_periodic)
    power = {"power": 2.0} | settings
    expected = spectrogram(CLIPS[2], window, 400, 512, pad_mode="constant", mel_filters=filters, **power)
    np.testing.assert_allclose(made(CLIPS[2], frontend), expected.T, rtol=1e-5, atol=1e-5)


def test_a_logarithm_with_an_offset() -> None:
    said = {"preset": "whisper", "log_range": 0.0, "mean": 0.0, "std": 1.0, "log_floor": 0.0}
    without = made(CLIPS[2], make_frontend({**said, "log": "none"}, RATE)).astype(np.float64)
    found = made(CLIPS[2], make_frontend({**said, "log": "natural", "log_offset": 2.0**-24}, RATE))
    np.testing.assert_allclose(found, np.log(without + 2.0**-24), rtol=0, atol=1e-5)


def test_a_short_window_lies_in_the_middle_of_its_transform() -> None:
    """As torch.stft and librosa put it: with mirrored ends and an odd difference too."""
    import torch

    for length in (400, 399):
        said = {"preset": "librosa", "padding": "reflect", "window_samples": length, "fft_samples": 512, "hop_samples": 160}
        frontend = make_frontend({**said, "mels": 40, "log": "none"} | {"log_range": 0.0}, RATE)
        window = torch.hann_window(length, dtype=torch.float64)
        signal = torch.from_numpy(CLIPS[1].astype(np.float64))
        spectrum = torch.stft(signal, 512, 160, length, window, return_complex=True).abs().square().numpy()
        expected = (mel_filters(frontend).T @ spectrum).T
        np.testing.assert_allclose(made(CLIPS[1], frontend), expected, rtol=1e-5, atol=1e-9)


def test_symmetric_padding_is_kaldis_without_snipped_edges() -> None:
    """Kaldi: frame i begins at hop * i + hop / 2 - window / 2, and the ends are mirrored with the edge itself."""
    frontend = make_frontend({"preset": "kaldi", "padding": "symmetric"}, RATE)
    inside = make_frontend({"preset": "kaldi"}, RATE)
    for clip in CLIPS:
        count = (len(clip) + 80) // 160
        whole = np.concatenate([clip[:120][::-1], clip, clip[::-1][:400]])[: 400 + 160 * (count - 1)]
        np.testing.assert_array_equal(made(clip, frontend), made(whole, inside))


@pytest.mark.parametrize("kind", ["htk", "slaney"])
@pytest.mark.parametrize("norm", ["none", "slaney"])
def test_filters(kind: str, norm: str) -> None:
    said = {"preset": "librosa", "mel_scale": kind, "mel_norm": norm, "fft_samples": 512, "mels": 30}
    found = mel_filters(make_frontend({**said, "low_hz": 50.0, "high_hz": -400.0}, RATE))
    expected = mel_filter_bank(257, 30, 50.0, 7600.0, RATE, norm=None if norm == "none" else norm, mel_scale=kind)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


# ---------------------------------------------------------------- a clip by itself

EVERY = [
    {"preset": "whisper"},
    {"preset": "kaldi"},
    {"preset": "librosa"},
    {"preset": "kaldi", "normalize": "cmn", "fill": "zeros"},
    {"preset": "kaldi", "normalize": "cmvn", "stack_frames": 3},
    {"preset": "librosa", "log_reference": "max", "fill": "repeat"},
    {"preset": "kaldi", "padding": "symmetric", "hop_samples": 601},
]


@pytest.mark.parametrize("said", EVERY, ids=str)
def test_a_clip_does_not_depend_on_its_neighbours(said: dict[str, Any]) -> None:
    frontend = make_frontend(said, RATE)
    clips = np.stack([noise(20_001) * np.float32(scale) for scale in (1e-4, 1, 9)])
    held = [20_001, 9_000, 15_000]
    together = features_of(clips, frontend, held)
    for clip, own, found in zip(clips, held, together, strict=True):
        np.testing.assert_array_equal(features_of(clip[None], frontend, [own])[0], found)


@pytest.mark.parametrize("said", EVERY, ids=str)
@pytest.mark.parametrize("samples", [1, 2, 399, 400, 401, 560, 719, 720, 12_345])
def test_as_many_frames_as_foretold(said: dict[str, Any], samples: int) -> None:
    frontend = make_frontend(said, RATE)
    found = made(noise(samples), frontend)
    assert found.shape == (frontend.frames(samples), frontend.bins)
    assert np.isfinite(found).all()
    if frames := frontend.frames(samples):
        shortest = frontend.samples_for(frames)
        assert shortest <= samples
        assert frontend.frames(shortest) == frames
        assert shortest == 1 or frontend.frames(shortest - 1) == frames - 1


@pytest.mark.parametrize("said", EVERY[:3], ids=str)
def test_a_front_end_looks_where_it_says(said: dict[str, Any]) -> None:
    """A click is loudest in the frame that is centred next to it."""
    frontend = make_frontend({**said, "log_range": 0.0, "fill": "silence"}, RATE)
    centers = frontend.first_center_samples + frontend.frame_samples * np.arange(frontend.frames(20_000))
    for place in (3_001, 9_999, 15_111):
        clip = np.zeros(20_000, np.float32)
        clip[place] = 1
        loudest = int(made(clip, frontend).sum(axis=1).argmax())
        assert abs(centers[loudest] - place) <= frontend.frame_samples / 2
