"""The test signals: seeded, mono, in [-1, 1], and as different from each other as sounds are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Signal = npt.NDArray[np.float32]

FULL_SCALE_HZ, TONE_HZ = 100.0, 440.0


def make_signals(samples: int, rate: int) -> dict[str, Signal]:
    """Every signal by name, (samples,) each at `rate` Hz."""
    time = np.arange(samples) / rate
    signals = (make(time, np.random.default_rng(number)) for number, make in enumerate(_MAKERS.values()))
    return {name: signal.astype(np.float32) for name, signal in zip(_MAKERS, signals, strict=True)}


def quiet_noise(samples: int) -> Signal:
    """(samples,) of noise, for what depends on the length alone."""
    return np.random.default_rng(1).standard_normal(samples).astype(np.float32) * np.float32(0.1)


def _noise(time: npt.NDArray[np.float64], random: np.random.Generator) -> npt.NDArray[np.float64]:
    return np.clip(0.1 * random.standard_normal(len(time)), -1, 1)


def _coloured(time: npt.NDArray[np.float64], random: np.random.Generator, slope: float) -> npt.NDArray[np.float64]:
    """Noise whose amplitude falls as frequency ** -slope."""
    spectrum = np.fft.rfft(random.standard_normal(len(time)))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** -slope
    noise = np.fft.irfft(spectrum, len(time))
    return np.asarray(0.5 * noise / max(float(np.abs(noise).max()), 1e-9))


def _impulse(time: npt.NDArray[np.float64], random: np.random.Generator) -> npt.NDArray[np.float64]:
    signal = np.zeros(len(time))
    signal[len(time) // 2] = 1.0
    return signal


def _clicks(time: npt.NDArray[np.float64], random: np.random.Generator) -> npt.NDArray[np.float64]:
    signal = np.zeros(len(time))
    signal[random.integers(0, len(time), 24)] = random.uniform(-0.8, 0.8, 24)
    return signal


def _chirp(time: npt.NDArray[np.float64], random: np.random.Generator) -> npt.NDArray[np.float64]:
    """From 80 Hz up to 0.2 cycles per sample."""
    top = 0.2 / max(time[1] - time[0], 1e-9) if len(time) > 1 else 100.0
    seconds = max(float(time[-1]), 1e-9)
    growth = np.log(top / 80.0) / seconds
    return np.asarray(0.4 * np.sin(2 * np.pi * 80.0 * (np.exp(growth * time) - 1) / growth))


def _speech(time: npt.NDArray[np.float64], random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Like speech: harmonics of a moving voice under moving formants, in syllables of 200 ms with noise between."""
    pitch = 120 + 40 * np.sin(2 * np.pi * 0.7 * time)
    step = time[1] - time[0] if len(time) > 1 else 1.0
    phase = 2 * np.pi * np.cumsum(pitch) * step
    formant = 700 + 400 * np.sin(2 * np.pi * 1.3 * time)
    voice = np.zeros(len(time))
    for harmonic in range(1, 25):
        voice += np.sin(harmonic * phase) * np.exp(-(((harmonic * pitch - formant) / 300) ** 2)) + np.sin(
            harmonic * phase
        ) / (harmonic * harmonic)
    syllables = np.sin(2 * np.pi * 2.5 * time) ** 2
    mixed = voice * syllables + 0.3 * random.standard_normal(len(time)) * (1 - syllables) ** 4
    return np.asarray(0.4 * mixed / max(float(np.abs(mixed).max()), 1e-9))


_MAKERS: dict[str, Callable[[npt.NDArray[np.float64], np.random.Generator], npt.NDArray[np.float64]]] = {
    "noise": _noise,
    "speech-like": _speech,
    "chirp": _chirp,
    "pink noise": lambda time, random: _coloured(time, random, 0.5),
    "brown noise": lambda time, random: _coloured(time, random, 1.0),
    "clicks": _clicks,
    "tone": lambda time, random: 0.3 * np.sin(2 * np.pi * TONE_HZ * time),
    "quiet noise": lambda time, random: 1e-3 * _noise(time, random),
    "full-scale noise": lambda time, random: random.uniform(-1, 1, len(time)),
    "full-scale square wave": lambda time, random: np.where((time * FULL_SCALE_HZ * 2).astype(int) % 2, -1.0, 1.0),
    "impulse": _impulse,
    "DC": lambda time, random: np.full(len(time), 0.5),
    "silence": lambda time, random: np.zeros(len(time)),
}
