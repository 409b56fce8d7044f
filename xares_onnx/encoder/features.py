"""The features of a front end, computed in double precision. A clip's features depend on that clip alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from .contract.frontend import Frontend

Doubles = npt.NDArray[np.float64]

_BLOCK_FRAMES = 128  # few enough for the processor's cache
_VARIANCE_FLOOR = 1e-7  # SeamlessM4T's
_DEVIATION_FLOOR = 1e-5  # NeMo's


def features_of(
    waveforms: npt.NDArray[np.float32], frontend: Frontend, held: Sequence[int] | None = None
) -> npt.NDArray[np.float32]:
    """Compute features.

    Args:
        waveforms: (items, samples).
        frontend: The front end.
        held: How many leading samples of each are the clip's own, and not padding; all by default.

    Returns:
        Features (items, frames, bins).
    """
    items, samples = waveforms.shape
    frames = frontend.frames(samples)
    features = np.zeros((items, frames, frontend.bins), np.float32)
    for item in range(items):
        own = samples if held is None else min(samples, held[item])
        waveform = waveforms[item]
        if frontend.fill == "zeros":
            waveform = waveform[:own]
        elif frontend.fill == "repeat" and 0 < own < samples:
            copies = np.tile(waveform[:own], samples // own)
            waveform = np.pad(copies, (0, samples - len(copies)))
        bands = _normalized(_bands(waveform, frontend), frontend)
        stacked = bands[: len(bands) // frontend.stack_frames * frontend.stack_frames].reshape(-1, frontend.bins)
        features[item, : len(stacked)] = stacked
    if (frontend.mean, frontend.std) != (0.0, 1.0):
        features = ((features - frontend.mean) / frontend.std).astype(np.float32)
    return features


def _bands(waveform: npt.NDArray[np.float32], frontend: Frontend) -> Doubles:
    """(samples,) to log mel bands (frames, mels), before the steps that need the whole clip."""
    within = frontend.preemphasis_over != "clip"
    windows = _windows(waveform if within else _emphasised(waveform, frontend.preemphasis), frontend)
    bands: Doubles = np.empty((len(windows), frontend.mels))
    shape, filters = _window(frontend), _sparse_filters(frontend)
    for start in range(0, len(windows), _BLOCK_FRAMES):
        block = windows[start : start + _BLOCK_FRAMES].astype(np.float64)
        if frontend.remove_dc:
            block -= block.mean(axis=1, keepdims=True)
        if frontend.preemphasis and within:
            previous = np.concatenate([block[:, :1], block[:, :-1]], axis=1)
            block -= frontend.preemphasis * previous
        block *= shape
        spectrum = np.fft.rfft(block, frontend.fft_samples, axis=1)
        power = spectrum.real**2 + spectrum.imag**2
        if frontend.power != 2:
            power **= frontend.power / 2
        bands[start : start + len(block)] = (filters @ power.T).T
    if frontend.log != "none":
        np.maximum(bands + frontend.log_offset, frontend.log_floor, out=bands)
        (np.log if frontend.log == "natural" else np.log10)(bands, out=bands)
    if frontend.log == "decibel":
        bands *= 20 / frontend.power
    return bands


def _emphasised(waveform: npt.NDArray[np.float32], share: float) -> npt.NDArray[np.float32]:
    """(samples,) less this share of the sample before each; the first stays."""
    whole: npt.NDArray[np.float32] = waveform.copy()
    whole[1:] -= np.float32(share) * waveform[:-1]
    return whole


def _normalized(bands: Doubles, frontend: Frontend) -> Doubles:
    """The steps that need all frames of the clip."""
    if not len(bands):
        return bands
    if frontend.log_range:
        bands = np.maximum(bands, bands.max() - frontend.log_range)
    if frontend.log_reference == "max":
        bands = bands - bands.max()
    if frontend.normalize != "none":
        centred: Doubles = bands - bands.mean(axis=0)
        if frontend.normalize == "cmn":
            return centred
        variance = bands.var(axis=0, ddof=1) if len(bands) > 1 else np.zeros(frontend.mels)
        if frontend.normalize == "per_feature":
            return np.asarray(centred / (np.sqrt(variance) + _DEVIATION_FLOOR))
        bands = centred / np.sqrt(variance + _VARIANCE_FLOOR)
    return bands


def _windows(waveform: npt.NDArray[np.float32], frontend: Frontend) -> npt.NDArray[np.float32]:
    """The windows of a waveform, (frames, window_samples): a view of the padded waveform."""
    length, hop, fft = frontend.window_samples, frontend.hop_samples, frontend.fft_samples
    samples = len(waveform)
    if not samples:
        return np.empty((0, length), np.float32)
    if frontend.padding == "none":
        before = 0
    elif frontend.padding == "symmetric":
        before = length // 2 - hop // 2
    else:  # the window lies in the middle of the transform's samples
        before = fft // 2 - (fft - length) // 2
    count = frontend.window_law.frames(samples)
    if count == 0:
        return np.empty((0, length), np.float32)
    after = max(0, (count - 1) * hop + length - before - samples)
    mode = {"reflect": "reflect", "symmetric": "symmetric"}.get(frontend.padding, "constant")
    padded = np.pad(waveform[max(0, -before) :], (max(0, before), after), mode)  # type: ignore[call-overload]
    windows: npt.NDArray[np.float32] = sliding_window_view(padded, length)[::hop][:count]
    return windows


@functools.lru_cache(maxsize=8)
def _window(frontend: Frontend) -> Doubles:
    """The window's shape (window_samples,)."""
    samples = frontend.window_samples
    if frontend.window == "rectangular" or samples == 1:
        return np.ones(samples)
    turns = np.arange(samples) / (samples if frontend.window_periodic else samples - 1)
    cosine = np.cos(2 * np.pi * turns)
    if frontend.window == "hamming":
        return np.asarray(0.54 - 0.46 * cosine)
    hann = np.maximum(0.5 - 0.5 * cosine, 0.0)
    return np.asarray(hann**0.85 if frontend.window == "povey" else hann)


@functools.lru_cache(maxsize=8)
def _sparse_filters(frontend: Frontend) -> Any:
    """(mels, fft_samples // 2 + 1). Sparse, as a bin is in two filters at most, and without a BLAS's waiting threads."""
    from scipy.sparse import csr_array

    return csr_array(mel_filters(frontend).T)


def mel_filters(frontend: Frontend) -> Doubles:
    """Triangular mel filters of a front end, (fft_samples // 2 + 1, mels).

    Sources: M. Slaney, Auditory Toolbox (1998), as in librosa.filters.mel; S. Young et al., The HTK Book, as in Kaldi.
    """
    rate, to_mel = frontend.sample_rate, _slaney_mel if frontend.mel_scale == "slaney" else _htk_mel
    to_hertz = _slaney_hertz if frontend.mel_scale == "slaney" else _htk_hertz
    top = frontend.high_hz if frontend.high_hz > 0 else rate / 2 + frontend.high_hz
    edges_mel = np.linspace(to_mel(np.array(frontend.low_hz)), to_mel(np.array(top)), frontend.mels + 2)
    edges_hz = to_hertz(edges_mel)
    bins = np.arange(frontend.fft_samples // 2 + 1) * rate / frontend.fft_samples
    on_mel = frontend.mel_triangles == "mel"
    edges, places = (edges_mel, to_mel(bins)[:, None]) if on_mel else (edges_hz, bins[:, None])
    rises = (places - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falls = (edges[2:] - places) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0.0, np.minimum(rises, falls))
    if frontend.mel_norm == "slaney":
        filters *= 2 / (edges_hz[2:] - edges_hz[:-2])
    return filters


_BREAK_HERTZ, _BREAK_MEL, _MEL_STEP = 1000.0, 15.0, np.log(6.4) / 27.0  # linear below, logarithmic above


def _slaney_mel(hertz: Doubles) -> Doubles:
    above = _BREAK_MEL + np.log(np.maximum(hertz, _BREAK_HERTZ) / _BREAK_HERTZ) / _MEL_STEP
    return np.where(hertz < _BREAK_HERTZ, hertz * _BREAK_MEL / _BREAK_HERTZ, above)


def _slaney_hertz(mel: Doubles) -> Doubles:
    above = _BREAK_HERTZ * np.exp((np.maximum(mel, _BREAK_MEL) - _BREAK_MEL) * _MEL_STEP)
    return np.where(mel < _BREAK_MEL, mel * _BREAK_HERTZ / _BREAK_MEL, above)


def _htk_mel(hertz: Doubles) -> Doubles:
    return 1127.0 * np.log1p(hertz / 700.0)


def _htk_hertz(mel: Doubles) -> Doubles:
    return 700.0 * np.expm1(mel / 1127.0)
