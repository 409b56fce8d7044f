"""The building blocks of all synthetic clips: tones, noises, fades, and the rounding to 16 bits.

A `Signal` is float64, shape (samples,), at 16 kHz and any level.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

SAMPLE_RATE = 16_000

Signal = NDArray[np.float64]
Waveform = NDArray[np.float32]
Range = tuple[float, float]

NUMBERS: Signal = np.arange(1.0, 81.0)  # of the harmonics: the 80th of 95 Hz is the last below 7.6 kHz
FLAT_BELOW_HZ = 50.0
HIGHEST_HZ = 7600.0  # no harmonic comes nearer to the Nyquist frequency
FADE_SECONDS = 0.01
LONGEST = 2**15  # 2.05 s: no clip of one class is longer
_CYCLE = 2**12  # points in one cycle of a tone; read linearly, its error lies below -60 dB


def tone(hertz: Signal, harmonics: Signal, rng: Generator) -> Signal:
    """A periodic tone with a given frequency at each sample and given amplitudes of its harmonics, in random phases.

    One cycle is made as a table, without the harmonics that would alias at the highest frequency, and read at
    the running phase: a glide of eighty harmonics costs the same as a sine.
    """
    count = min(len(harmonics), int(HIGHEST_HZ / hertz.max()))
    spectrum = np.zeros(_CYCLE // 2 + 1, dtype=np.complex128)
    spectrum[1 : count + 1] = harmonics[:count] * np.exp(2j * np.pi * rng.uniform(size=count))
    cycle = np.fft.irfft(spectrum)
    step = np.roll(cycle, -1) - cycle
    # Phase in whole numbers of 2**-32 cycle: no error grows, and all machines agree.
    phase = np.cumsum(np.rint(hertz * (2**32 / SAMPLE_RATE)).astype(np.int64))
    whole, rest = (phase >> 20) % _CYCLE, phase % 2**20
    return np.asarray(cycle[whole] + step[whole] * (rest / 2**20))


def any_harmonics(rng: Generator) -> Signal:
    """Amplitudes of harmonics that fall by 3 to 9 dB per octave, each a few dB off."""
    return NUMBERS ** -rng.uniform(0.5, 1.5) * np.exp(0.4 * rng.standard_normal(NUMBERS.size))


def sung(formants: Signal, pitch: float) -> Signal:
    """Amplitudes of a voice's harmonics at this pitch, in Hz, through resonances at the `formants`, in Hz."""
    widths = 50 + 0.06 * formants
    frequency = pitch * NUMBERS[:, None]
    resonances = 1 / np.hypot(1 - (frequency / formants) ** 2, frequency * widths / formants**2)
    return np.asarray(resonances.prod(axis=1) / NUMBERS)


def glide(samples: int, octaves: float) -> Signal:
    """Factors of frequency (samples,) that rise by this many octaves around 1; negative octaves fall."""
    return np.asarray(2 ** np.linspace(-octaves / 2, octaves / 2, samples))


def noise(samples: int, rng: Generator, decibels: Signal) -> Signal:
    """Noise of unit level whose spectrum has these levels at the frequencies of `octaves`.

    It is made at the power of two that these are for, which the FFT likes, and cut.
    """
    spectrum = rng.standard_normal((decibels.size, 2)).view(np.complex128)[:, 0]
    return unit(np.fft.irfft(spectrum * np.exp(np.log(10) / 20 * decibels))[:samples])


def octaves(samples: int = LONGEST) -> Signal:
    """Octaves over 50 Hz of the frequencies that `noise` of so many samples consists of.

    There are as many as the FFT of the next power of two has. They are 0 below 50 Hz, so that a slope does not rumble.
    """
    return _octaves(2 ** (samples - 1).bit_length())


@cache
def _octaves(size: int) -> Signal:
    return np.asarray(np.log2(np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE) / FLAT_BELOW_HZ, 1.0)))


def hump(samples: int, hertz: float, slope: float) -> Signal:
    """Levels for `noise` that fall by `slope` decibels per octave on both sides of a frequency."""
    return np.asarray(-slope * np.abs(octaves(samples) - np.log2(hertz / FLAT_BELOW_HZ)))


def record(signal: Signal, hiss_decibels: Range | None, rng: Generator) -> Waveform:
    """Fade in and out, add hiss, set a random loudness and round to 16 bits: float32, shape (samples,).

    `hiss_decibels` is the level of the hiss relative to the signal; None adds none. Loudness is set by root mean
    square, not by peak, because a waveform's crest depends on its class.
    """
    signal = signal * fades(signal.size)
    if hiss_decibels is not None:
        hiss = level(signal) * 10 ** (rng.uniform(*hiss_decibels) / 20)
        signal = signal + hiss * rng.standard_normal(signal.size)
    factor = min(10 ** (rng.uniform(-45, -20) / 20) / level(signal), 0.99 / np.abs(signal).max())
    return np.asarray(np.rint(factor * signal * 2**15) / 2**15, dtype=np.float32)


def gain(decibels: float) -> float:
    return float(10 ** (decibels / 20))


def level(signal: Signal) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(signal**2)))


def unit(signal: Signal) -> Signal:
    return np.asarray(signal / level(signal))


def fades(samples: int) -> Signal:
    """Gain of a fade in and a fade out, each a straight line of 10 ms, shape (samples,)."""
    fade_in = np.linspace(0, 1, int(FADE_SECONDS * SAMPLE_RATE))
    return np.concatenate([fade_in, np.ones(samples - 2 * fade_in.size), fade_in[::-1]])
