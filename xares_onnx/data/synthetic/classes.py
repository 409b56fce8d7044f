"""The synthetic tasks with one class per clip: each maker takes (class, samples, generator) and returns a signal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.random import Generator

from .sound import (
    FLAT_BELOW_HZ,
    NUMBERS,
    SAMPLE_RATE,
    Range,
    Signal,
    Waveform,
    any_harmonics,
    fades,
    glide,
    noise,
    octaves,
    record,
    sung,
    tone,
)


@dataclass(frozen=True)
class ClassTask:
    """A task whose clips take its `labels` in turn."""

    labels: tuple[str, ...]
    seconds: Range
    """Shortest and longest clip."""
    make: Callable[[str, int, Generator], Signal]
    """(label, samples, generator) -> a signal of that class at any level."""
    hiss_decibels: Range | None = (-50.0, -35.0)
    """Level of the white noise under the signal, relative to it; None if the signal is noise itself."""

    def __call__(self, number: int, rng: Generator) -> tuple[dict[str, str], Waveform]:
        label = self.labels[number % len(self.labels)]
        samples = round(SAMPLE_RATE * rng.uniform(*self.seconds))
        return {"label": label}, record(self.make(label, samples, rng), self.hiss_decibels, rng)


def _pitch(label: str, samples: int, rng: Generator) -> Signal:
    """A steady tone on any octave from C2 to B4, at most 15 cents out of tune."""
    semitones = 12 * rng.integers(3) + _PITCH_CLASSES.index(label) + rng.uniform(-0.15, 0.15)
    return tone(np.full(samples, _C2_HZ * 2 ** (semitones / 12)), any_harmonics(rng), rng)


def _timbre(label: str, samples: int, rng: Generator) -> Signal:
    """A tone of 150 to 450 Hz whose harmonics follow one of six rules."""
    hertz = 150 * 3 ** rng.uniform() * glide(samples, rng.uniform(-0.05, 0.05))
    return tone(hertz, _WAVEFORMS[label], rng)


def _vowel(label: str, samples: int, rng: Generator) -> Signal:
    """A buzz of 90 to 270 Hz through the resonances of a vocal tract of varied length."""
    pitch = 90 * 3 ** rng.uniform()
    formants = np.array([*FORMANTS_HZ[label], *HIGH_FORMANTS_HZ]) * rng.uniform(0.9, 1.1)
    return tone(pitch * glide(samples, rng.uniform(-0.05, 0.05)), sung(formants, pitch), rng)


def _colour(label: str, samples: int, rng: Generator) -> Signal:
    """Noise with a hump of 10 to 20 dB around one of five frequencies, over any slope."""
    distance = octaves() - np.log2(_HUMPS_HZ[label] / FLAT_BELOW_HZ)
    hump = rng.uniform(10, 20) * np.exp(-((distance + rng.uniform(-0.2, 0.2)) ** 2))
    return noise(samples, rng, hump + 3 * rng.uniform(-2, 1) * distance)


def _tempo(label: str, samples: int, rng: Generator) -> Signal:
    """Bursts of noise. A burst fills 30 to 50 % of its period whatever the tempo."""
    rate = _BURSTS_PER_SECOND[label] * 2 ** rng.uniform(-0.06, 0.06)
    phase = (np.arange(samples) / SAMPLE_RATE * rate + rng.uniform()) % 1
    ramp = 0.1
    gate = np.clip((rng.uniform(0.3, 0.5) / 2 - np.abs(phase - 0.5)) / ramp + 0.5, 0, 1)
    ripple = 6 * np.cos(2 * np.pi * (octaves() / rng.uniform(2, 5) + rng.uniform()))
    return gate * noise(samples, rng, ripple + rng.uniform(-5, 2) * octaves())


def _contour(label: str, samples: int, rng: Generator) -> Signal:
    """Two glides through the same 0.5 to 1 octave, each of half the clip, with a breath between them.

    Every class passes every pitch equally often and equally fast, so all four have the same average over time.
    """
    span = rng.uniform(0.5, 1.0)
    lengths = (samples // 2, samples - samples // 2)
    glides = [glide(n, span * _DIRECTIONS[word]) for n, word in zip(lengths, label.split(), strict=True)]
    hertz = 200 * 2 ** rng.uniform() * np.concatenate(glides)
    breaths: Signal = np.concatenate([fades(n) for n in lengths])
    return tone(hertz, any_harmonics(rng), rng) * breaths


_PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
_C2_HZ = 65.41
_ODD = NUMBERS % 2
_WAVEFORMS: dict[str, Signal] = {  # amplitudes of the harmonics
    "sine": (NUMBERS == 1).astype(np.float64),
    "triangle": _ODD / NUMBERS**2,
    "square": _ODD / NUMBERS,
    "sawtooth": 1 / NUMBERS,
    "pulse": np.ones_like(NUMBERS),
    "organ": np.isin(NUMBERS, (1, 2, 4, 8)).astype(np.float64),
}
FORMANTS_HZ = {  # of men, after Peterson & Barney, JASA 24 (1952), 175-184
    "a": (730, 1090, 2440),
    "e": (530, 1840, 2480),
    "i": (270, 2290, 3010),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
}
HIGH_FORMANTS_HZ = (3500.0, 4500.0)  # of every vowel
_HUMPS_HZ = {"red": 250, "yellow": 500, "green": 1000, "blue": 2000, "violet": 4000}
_BURSTS_PER_SECOND = {"3": 3, "4": 4, "6": 6, "8": 8, "12": 12, "16": 16}
_DIRECTIONS = {"rise": 1, "fall": -1}

CLASS_TASKS: Mapping[str, ClassTask] = MappingProxyType(
    {
        "synthetic_pitch": ClassTask(_PITCH_CLASSES, (1.0, 1.0), _pitch),
        "synthetic_timbre": ClassTask(tuple(_WAVEFORMS), (1.0, 1.0), _timbre),
        "synthetic_vowel": ClassTask(tuple(FORMANTS_HZ), (1.0, 1.0), _vowel),
        "synthetic_colour": ClassTask(tuple(_HUMPS_HZ), (1.0, 1.5), _colour, None),
        "synthetic_tempo": ClassTask(tuple(_BURSTS_PER_SECOND), (1.5, 2.0), _tempo, (-30.0, -12.0)),
        "synthetic_contour": ClassTask(("rise rise", "rise fall", "fall rise", "fall fall"), (1.0, 1.6), _contour),
    }
)
