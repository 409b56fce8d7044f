"""Ten everyday sounds that scenes consist of. Each can be recognised by its spectrum; most also move in time.

A source takes (samples, shift, generator) and returns a signal of unit level that lasts from the first sample to the last.
`shift` moves its pitch or its noise by so many octaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.random import Generator

from .sound import HIGHEST_HZ, NUMBERS, SAMPLE_RATE, Signal, hump, noise, tone, unit

Source = Callable[[int, float, Generator], Signal]


def _hum(samples: int, shift: float, rng: Generator) -> Signal:
    """A steady tone of 100 Hz, with few harmonics."""
    return unit(tone(np.full(samples, 100 * 2**shift), NUMBERS**-2.0, rng))


def _buzz(samples: int, shift: float, rng: Generator) -> Signal:
    """A steady tone of 150 Hz, with all its harmonics."""
    return unit(tone(np.full(samples, 150 * 2**shift), NUMBERS**-0.5, rng))


def _beep(samples: int, shift: float, rng: Generator) -> Signal:
    """A steady sine of 1 kHz."""
    return unit(tone(np.full(samples, 1000 * 2**shift), np.ones(1), rng))


def _whistle(samples: int, shift: float, rng: Generator) -> Signal:
    """A sine of 1.7 kHz that wavers by a semitone, five to seven times a second."""
    wave = np.sin(2 * np.pi * (_cycles(samples, rng.uniform(5, 7)) + rng.uniform()))
    return unit(tone(1700 * 2 ** (shift + wave / 12), np.ones(1), rng))


def _siren(samples: int, shift: float, rng: Generator) -> Signal:
    """Two sines in turn, a third apart around 1 kHz, each for about 0.1 s: at any one instant it is a beep."""
    upper = (_cycles(samples, rng.uniform(4.5, 5.5)) + rng.uniform()) % 1 < 0.5
    return unit(tone(1000 * 2 ** (shift + np.where(upper, 2, -2) / 12), np.ones(1), rng))


def _chirps(samples: int, shift: float, rng: Generator) -> Signal:
    """Short glides up from 2.5 to 5 kHz, seven to ten a second, with as long a rest after each."""
    phase = (_cycles(samples, rng.uniform(7, 10)) + rng.uniform()) % 1
    sine = tone(np.minimum(2500 * 2 ** (shift + 2 * phase), HIGHEST_HZ), np.ones(1), rng)
    return unit(sine * np.clip(5 * np.minimum(phase, 0.5 - phase), 0, 1))


def _bell(samples: int, shift: float, rng: Generator) -> Signal:
    """Strikes of a bell of 600 Hz, two or three a second, whose partials are no harmonics."""
    hertz = np.minimum(600 * 2**shift * np.array([1, 2.76, 5.4]), HIGHEST_HZ)
    sines = [share * tone(np.full(samples, f), np.ones(1), rng) for f, share in zip(hertz, (1.0, 0.7, 0.4), strict=True)]
    return unit(np.sum(sines, axis=0) * np.exp(-_since_strike(samples, rng.uniform(2, 3), rng) / 0.15))


def _knocks(samples: int, shift: float, rng: Generator) -> Signal:
    """Four to six knocks a second: noise around 300 Hz that dies within 0.1 s."""
    dull = noise(samples, rng, hump(samples, 300 * 2**shift, 15))
    return unit(dull * np.exp(-_since_strike(samples, rng.uniform(4, 6), rng) / 0.03))


def _ticks(samples: int, shift: float, rng: Generator) -> Signal:
    """Ten to fourteen ticks a second: noise around 2.5 kHz that dies within 0.03 s."""
    bright = noise(samples, rng, hump(samples, 2500 * 2**shift, 10))
    return unit(bright * np.exp(-_since_strike(samples, rng.uniform(10, 14), rng) / 0.008))


def _hiss(samples: int, shift: float, rng: Generator) -> Signal:
    """Steady noise around 4.5 kHz."""
    return noise(samples, rng, hump(samples, 4500 * 2**shift, 15))


def _cycles(samples: int, rate: float) -> Signal:
    return np.asarray(np.arange(samples) * (rate / SAMPLE_RATE), dtype=np.float64)


def _since_strike(samples: int, rate: float, rng: Generator) -> Signal:
    """Seconds since the last of `rate` strikes a second, the first of which may have been before the start."""
    return np.asarray((_cycles(samples, rate) + rng.uniform()) % 1 / rate)


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "hum": _hum,
        "buzz": _buzz,
        "beep": _beep,
        "whistle": _whistle,
        "siren": _siren,
        "chirps": _chirps,
        "bell": _bell,
        "knocks": _knocks,
        "ticks": _ticks,
        "hiss": _hiss,
    }
)
