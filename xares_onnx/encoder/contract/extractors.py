"""Hugging Face's feature extractors, translated into declarations of the contract.

Source: the classes of these names in transformers 5. Only what can be computed exactly is translated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import ContractError, foreign
from .frontend import make_frontend

Values = dict[str, Any]
_LARGEST = 1e9  # of any number in a configuration


class NotComputedError(Exception):
    """These features cannot be computed here; the text says why."""


def declared_by_extractor(raw: Mapping[str, Any]) -> Values:
    """The declarations of a `preprocessor_config.json`, by contract key.

    Raises:
        NotComputedError: Its features cannot be computed from a waveform here.
    """
    kind = raw.get("feature_extractor_type")
    rate: Values = {"sample_rate": raw["sampling_rate"]} if "sampling_rate" in raw else {}
    if kind in (None, "Wav2Vec2FeatureExtractor"):
        return rate | _zscore(raw)
    if not isinstance(kind, str) or kind not in _EXTRACTORS:
        raise NotComputedError(f"{foreign(str(kind))}, which is not known here")
    try:
        values = _EXTRACTORS[kind](raw)
    except (TypeError, ValueError, OverflowError, ContractError) as error:
        raise NotComputedError(f"{kind}, whose settings cannot be read: {foreign(str(error))}") from error
    if raw.get("dither", 0.0) != 0.0:
        raise NotComputedError(f"{kind} with dither, which is random")
    return rate | values


def _zscore(raw: Mapping[str, Any]) -> Values:
    normalize = raw.get("do_normalize")
    return {"normalize": "zscore" if normalize else "none"} if isinstance(normalize, bool) else {}


def _whisper(raw: Mapping[str, Any]) -> Values:
    rate = int(_number(raw, "sampling_rate", 16_000))
    if raw.get("padding_value", 0.0) != 0.0:
        raise NotComputedError("WhisperFeatureExtractor with a padding_value other than 0")
    values: Values = {
        "frontend.preset": "whisper",
        "frontend.mels": raw.get("feature_size", 80),
        "frontend.hop_samples": raw.get("hop_length", 160),
        "frontend.fft_samples": raw.get("n_fft", 400),
    }
    return values | _window(int(_number(raw, "chunk_length", 30) * rate)) | _zscore(raw)


def _ast(raw: Mapping[str, Any]) -> Values:
    values: Values = {
        "frontend.preset": "kaldi",
        "frontend.mels": raw.get("num_mel_bins", 128),
        "frontend.window": "hann",
        "frontend.fill": "zeros",
    }
    if raw.get("do_normalize", True):
        values["frontend.mean"] = _number(raw, "mean", -4.2677393)
        values["frontend.std"] = 2 * _number(raw, "std", 4.5689974)
    # torchaudio's windows have 25 ms, those of the NumPy path 400 samples: the same at 16 kHz alone.
    rate = int(_number(raw, "sampling_rate", 16_000))
    if rate != 16_000:
        raise NotComputedError(f"ASTFeatureExtractor at {rate} Hz, where its two implementations differ")
    frontend = make_frontend({"preset": "kaldi"}, rate)
    return values | _window(frontend.samples_for(int(_number(raw, "max_length", 1024))))


def _seamless(raw: Mapping[str, Any]) -> Values:
    return {
        "amplitude": "int16",
        "frontend.preset": "kaldi",
        "frontend.mels": raw.get("num_mel_bins", 80),
        "frontend.window_samples": 400,
        "frontend.hop_samples": 160,
        "frontend.high_hz": int(_number(raw, "sampling_rate", 16_000)) // 2,
        "frontend.normalize": "cmvn",
        "frontend.fill": "zeros",
        "frontend.stack_frames": raw.get("stride", 2),
    }


def _clap(raw: Mapping[str, Any]) -> Values:
    if raw.get("truncation", "fusion") != "rand_trunc":
        raise NotComputedError("ClapFeatureExtractor with truncation=fusion, which takes random crops of a long clip")
    padding = raw.get("padding", "repeatpad")
    if padding not in ("repeatpad", "pad"):
        raise NotComputedError(f"ClapFeatureExtractor with padding={foreign(str(padding))}")
    rate = int(_number(raw, "sampling_rate", 48_000))
    values: Values = {
        "frontend.preset": "librosa",
        "frontend.mels": raw.get("feature_size", 64),
        "frontend.padding": "reflect",
        "frontend.fft_samples": raw.get("fft_window_size", 1024),
        "frontend.hop_samples": raw.get("hop_length", 480),
        "frontend.low_hz": raw.get("frequency_min", 0),
        "frontend.high_hz": raw.get("frequency_max", 14_000),
        "frontend.log_range": 0,
        "frontend.fill": "repeat" if padding == "repeatpad" else "silence",
    }
    return {"sample_rate": rate} | values | _window(int(_number(raw, "max_length_s", 10) * rate))


def _number(raw: Mapping[str, Any], key: str, default: float) -> int | float:
    """A number to compute with: a text times a rate would be gigabytes of text."""
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ValueError(f"{key}={foreign(repr(value))} is no number, or too large")
    return value


def _window(samples: int) -> Values:
    return {"min_samples": samples, "max_samples": samples, "chunk_samples": samples}


_EXTRACTORS: dict[str, Callable[[Mapping[str, Any]], Values]] = {
    "WhisperFeatureExtractor": _whisper,
    "ASTFeatureExtractor": _ast,
    "SeamlessM4TFeatureExtractor": _seamless,
    "ClapFeatureExtractor": _clap,
}
