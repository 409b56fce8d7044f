"""Decoding, resampling and cropping, against sines and arrays that are known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from shard_makers import encoded, noise, sine

from xares_onnx.data import audio
from xares_onnx.data.audio import crop, decode, duration, resample
from xares_onnx.errors import ClipError

RATES = (8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 192_000)


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    ("container", "subtype", "error"),
    [
        ("WAV", "PCM_U8", 0.01),
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 1e-7),
        ("WAV", "ULAW", 0.02),
        ("WAVEX", "PCM_16", 1e-4),
        ("FLAC", "PCM_16", 1e-4),
        ("FLAC", "PCM_24", 1e-6),
        ("AIFF", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.02),
        ("OGG", "OPUS", 0.02),
        ("MP3", "MPEG_LAYER_III", 0.02),
    ],
)
def test_what_was_encoded_is_decoded(container: str, subtype: str, error: float) -> None:
    samples, rate = decode(encoded(sine(440, 2, 48_000), 48_000, container, subtype))
    assert rate == 48_000
    assert samples.dtype == np.float32
    assert samples.shape == (96_000,)
    interior = slice(4_800, -4_800)  # a lossy coder swings in and out
    assert np.sqrt(np.mean((samples - sine(440, 2, 48_000))[interior] ** 2)) < error


@pytest.mark.parametrize("rate", RATES)
def test_every_rate_is_decoded(rate: int) -> None:
    samples, found = decode(encoded(sine(440, 0.5, rate), rate, subtype="FLOAT"))
    assert found == rate
    np.testing.assert_array_equal(samples, sine(440, 0.5, rate).astype(np.float32))


@pytest.mark.parametrize("channels", range(1, 7))
def test_channels_are_averaged(channels: int) -> None:
    # longer than one block of the decoder, so that blocks are put together too
    frames = audio._BLOCK_SAMPLES // channels + 1_000
    signals = np.random.default_rng(channels).uniform(-1, 1, (frames, channels)).astype(np.float32)
    samples, _ = decode(encoded(signals, 48_000, subtype="FLOAT"))
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, signals.mean(axis=1, dtype=np.float64), atol=2e-7)
    if channels == 1:
        np.testing.assert_array_equal(samples, signals[:, 0])


def test_a_mono_file_is_as_loud_as_the_same_in_stereo() -> None:
    mono = noise(1)
    np.testing.assert_allclose(decode(encoded(np.stack([mono, mono], axis=1)))[0], decode(encoded(mono))[0], atol=1e-7)


def test_ten_samples_are_enough_for_a_clip() -> None:
    samples, rate = decode(encoded(np.full(10, 0.25), 16_000, subtype="FLOAT"))
    np.testing.assert_array_equal(samples, np.full(10, 0.25, np.float32))
    assert len(resample(samples, rate, 48_000)) == 30


def _with_sample(value: float, channel: int) -> bytes:
    signals = np.zeros((1_000, 2), np.float32)
    signals[500, channel] = value
    return encoded(signals, 16_000, subtype="FLOAT")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "audio cannot be decoded", id="no bytes"),
        pytest.param(b"RIFF", "audio cannot be decoded", id="a stub"),
        pytest.param(bytes(4_096), "audio cannot be decoded", id="zeros"),
        pytest.param(b"<!doctype html><title>404</title>" * 40, "audio cannot be decoded", id="a web page"),
        pytest.param(np.random.default_rng(0).bytes(4_096), "audio cannot be decoded", id="random bytes"),
        pytest.param(b"\0\0\0\x20ftypM4A " + bytes(2_000), "audio cannot be decoded", id="m4a"),
        pytest.param(encoded(noise(1), container="FLAC")[:5_000], "decoder lost sync", id="a cut flac"),
        pytest.param(encoded(noise(1), container="OGG")[:3_000], "audio cannot be decoded", id="a cut ogg"),
        pytest.param(encoded(np.empty(0)), "audio holds no samples", id="no samples"),
        pytest.param(_with_sample(np.nan, 0), "NaN or infinite", id="NaN"),
        pytest.param(_with_sample(np.inf, 1), "NaN or infinite", id="infinity"),
        pytest.param(_with_sample(-np.inf, 0), "NaN or infinite", id="-infinity"),
        pytest.param(encoded(np.zeros(100), 50), "rate 50 Hz is not plausible", id="too slow a rate"),
        pytest.param(encoded(np.zeros(100), 2_000_000), "rate 2000000 Hz is not plausible", id="too fast a rate"),
    ],
)
def test_unusable_audio_raises_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ClipError, match=reason) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "limit"), [("MAX_SECONDS", 60), ("MAX_FRAMES", 60 * 8_000)])
def test_a_clip_past_the_limit_raises(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio, name, limit)
    assert len(decode(encoded(np.zeros(60 * 8_000), 8_000))[0]) == 60 * 8_000
    with pytest.raises(ClipError, match="longer than 1 minutes"):
        decode(encoded(np.zeros(60 * 8_000 + 1), 8_000))


def test_a_flac_whose_header_promises_days_costs_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lying = bytearray(encoded(noise(1), container="FLAC"))
    lying[21] |= 0x0F  # STREAMINFO's 36 bits of total samples
    lying[22:26] = b"\xff" * 4
    asked: list[int] = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda self, frames, **how: asked.append(frames) or read(self, frames, **how)
    )
    with pytest.raises(ClipError):
        decode(bytes(lying))
    assert max(asked) <= audio._BLOCK_SAMPLES
    assert duration(bytes(lying)) == audio.MAX_SECONDS


def test_duration_is_read_from_the_header() -> None:
    assert duration(encoded(noise(2.5, rate=22_050), 22_050)) == 2.5
    with pytest.raises(ClipError, match="audio cannot be decoded"):
        duration(b"none")


# ---------------------------------------------------------------- resampling


@pytest.mark.parametrize("target", [8_000, 16_000, 48_000])
@pytest.mark.parametrize("rate", RATES)
def test_a_sine_stays_that_sine(rate: int, target: int) -> None:
    frequency = 0.2 * min(rate, target)  # below both Nyquist frequencies
    resampled = resample(sine(frequency, 1, rate).astype(np.float32), rate, target)
    assert resampled.dtype == np.float32
    assert len(resampled) == target
    interior = slice(target // 20, -target // 20)
    np.testing.assert_allclose(resampled[interior], sine(frequency, 1, target)[interior], atol=1e-4)


@pytest.mark.parametrize("rate", [44_100, 48_000, 96_000])
def test_resampling_does_not_alias(rate: int) -> None:
    resampled = resample(sine(10_000, 1, rate).astype(np.float32), rate, 16_000)
    assert np.abs(resampled[800:-800]).max() < 1e-4


@given(length=st.integers(100, 5_000), rate=st.sampled_from(RATES), target=st.sampled_from(RATES))
def test_the_length_is_the_ratio_of_the_rates(length: int, rate: int, target: int) -> None:
    resampled = resample(np.zeros(length, np.float32), rate, target)
    assert abs(len(resampled) - length * target / rate) <= 0.5 + 1e-9


def test_a_clip_at_the_right_rate_is_unchanged() -> None:
    samples = noise(0.1).astype(np.float32)
    assert resample(samples, 16_000, 16_000) is samples


def test_too_few_samples_to_resample_raise() -> None:
    with pytest.raises(ClipError, match="10 samples at 192000 Hz are too few"):
        resample(np.ones(10, np.float32), 192_000, 8_000)


# ---------------------------------------------------------------- crops

lengths = st.integers(1, 2_000)
rates = st.integers(10, 200)  # Hz: low, so that seconds are short arrays
crop_lengths = st.floats(0.1, 12)


@given(length=lengths, rate=rates, seconds=crop_lengths)
def test_keep_tails_loses_less_than_a_second_and_pads_nothing(length: int, rate: int, seconds: float) -> None:
    samples = np.arange(1, length + 1, dtype=np.float32)
    crops = crop(samples, rate, seconds, "keep-tails")
    size = round(seconds * rate)
    kept = np.concatenate(crops)
    np.testing.assert_array_equal(kept, samples[: len(kept)])  # in order, nothing twice, nothing padded
    assert all(len(whole) == size for whole in crops[:-1])
    assert 0 < len(crops[-1]) <= size
    lost = length - len(kept)
    assert lost < size
    assert lost < rate * audio.MIN_TAIL_SECONDS
    if len(crops[-1]) < size:  # a tail: long enough, or all there is
        assert len(crops) == 1 or len(crops[-1]) >= rate * audio.MIN_TAIL_SECONDS
    if length <= size:
        assert len(crops) == 1
        assert not lost


@given(length=lengths, rate=rates, seconds=crop_lengths)
def test_whole_crops_are_those_of_xares(length: int, rate: int, seconds: float) -> None:
    samples = np.arange(1, length + 1, dtype=np.float32)
    crops = crop(samples, rate, seconds, "whole-crops")
    size = round(seconds * rate)
    assert len(crops) == max(1, length // size)
    assert all(len(whole) == size for whole in crops)
    joined = np.concatenate(crops)
    kept = min(length, len(joined))
    np.testing.assert_array_equal(joined[:kept], samples[:kept])
    assert not joined[kept:].any()


@pytest.mark.parametrize(
    ("seconds", "keep_tails", "whole_crops"),
    [(4, [4], [5]), (5, [5], [5]), (5.99, [5], [5]), (6, [5, 1], [5]), (10.5, [5, 5], [5, 5]), (12.5, [5, 5, 2.5], [5, 5])],
)
def test_crops_of_five_seconds(seconds: float, keep_tails: list[float], whole_crops: list[float]) -> None:
    samples = np.ones(round(seconds * 100), np.float32)
    assert [len(part) / 100 for part in crop(samples, 100, 5, "keep-tails")] == keep_tails
    assert [len(part) / 100 for part in crop(samples, 100, 5, "whole-crops")] == whole_crops


@pytest.mark.parametrize("rule", ["keep-tails", "whole-crops"])
def test_without_a_crop_length_the_clip_is_the_crop(rule: audio.CropRule) -> None:
    samples = noise(3).astype(np.float32)
    (whole,) = crop(samples, 16_000, None, rule)
    assert whole is samples
