"""Reads the truth back from synthetic clips, by plain signal processing that shares no code with their makers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from synthetic_clips import Array, frames

from xares_onnx.data.synthetic import SAMPLE_RATE

Span = tuple[int, int]  # in samples


# --- Sounds ---


def name_of_sound(signal: Array, shift: float = 0.0) -> str:
    """Which of the ten sources this is, where it sounds alone, `shift` octaves above its usual pitch."""
    level = np.sqrt((frames(signal, 160, 80)[4:-4] ** 2).mean(axis=1))
    if 20 * np.log10(np.quantile(level, 0.95) / np.quantile(level, 0.15)) > 9:
        rate = strikes_per_second(level)
        return "bell" if rate < 3.5 else "knocks" if rate < 6.5 else "chirps" if rate < 10 else "ticks"
    power, hertz = np.abs(np.fft.rfft(signal * np.hanning(signal.size))) ** 2, frequencies(signal.size)
    strongest = hertz[power.argmax()]
    if strongest / 2**shift < 300:
        line = power[np.abs(hertz / strongest - 1) < 0.1].sum() / power.sum()
        return "hum" if line > 0.6 else "buzz"
    short = np.abs(np.fft.rfft(frames(signal, 640, 160) * np.hanning(640), 8192)) ** 2
    pitch = frequencies(8192)[short.argmax(axis=1)]
    spread = np.quantile(pitch, 0.9) / np.quantile(pitch, 0.1)
    if np.median(short.max(axis=1) / short.sum(axis=1)) < 0.02 or spread > 1.6:
        return "buzz" if np.median(pitch) / 2**shift < 2000 else "hiss"
    return "beep" if spread < 1.03 else "whistle" if spread < 1.18 else "siren"


def strikes_per_second(level: Array) -> float:
    """The lowest of the strong lines in the spectrum of a level taken every 5 ms."""
    beats = np.abs(np.fft.rfft((level - level.mean()) * np.hanning(level.size), 4096))
    rates = frequencies(4096) / 80
    beats[(rates < 1.5) | (rates > 20)] = 0
    rate = rates[beats.argmax()]
    for part in (2, 3, 4):
        near = (np.abs(rates - rate / part) < 0.6) & (rate / part > 1.8)
        if near.any() and beats[near].max() > 0.5 * beats.max():
            return float(rates[near][beats[near].argmax()])
    return float(rate)


def texture_of(signal: Array) -> Array:
    """For each of some thirty bands: three quantiles of its log power over time, how fast that changes, and the height of
    its highest line."""
    power = np.abs(np.fft.rfft(frames(signal, 512, 160) * np.hanning(512))) ** 2
    edges = np.unique(np.round(np.geomspace(60, 7900, 33) * 512 / SAMPLE_RATE).astype(int))
    bands = np.log(np.add.reduceat(power, edges, axis=1)[:, :-1] / np.diff(edges) + 1e-9)
    bands -= bands.mean()
    changes = [np.abs(bands[lag:] - bands[:-lag]).mean(axis=0) for lag in (1, 5)]
    average = power.mean(axis=0)
    lines = np.log(np.maximum.reduceat(average, edges) + 1e-9)[:-1] - np.log(np.exp(bands).mean(axis=0))
    return np.concatenate([*np.quantile(bands, [0.1, 0.5, 0.9], axis=0), *changes, lines])


# --- Events ---

_BANDS_HZ = {"hum": (75, 130), "beep or siren": (690, 1340), "whistle": (1340, 2150), "hiss": (4000, 6000)}


def events_in(signal: Array) -> list[tuple[str, float, float]]:
    """(class, onset, offset) of every event, sorted."""
    events = []
    for name, band in _BANDS_HZ.items():
        analytic = analytic_band(signal, *band)
        level = np.sqrt(moving_average(np.abs(analytic) ** 2, 160))
        for start, stop in runs(level > max(np.quantile(level, 0.995) / 8, 4 * np.quantile(level, 0.1))):
            inside = np.abs(analytic[start + 800 : stop - 800])
            if stop - start < 0.2 * SAMPLE_RATE or (name != "hiss" and inside.std() > 0.35 * inside.mean()):
                continue  # the skirt of a hiss
            first = max(0, start - 800)
            loud = runs(level[first : stop + 800] > np.median(level[start:stop]) / 2)
            pitch = moving_average(np.diff(np.unwrap(np.angle(analytic[start + 800 : stop - 800]))), 160)[160:-160]
            steady = np.quantile(pitch, 0.9) < 1.15 * np.quantile(pitch, 0.1)
            label = name if " or " not in name else "beep" if steady else "siren"
            events.append((label, (first + loud[0][0]) / SAMPLE_RATE, (first + loud[-1][1]) / SAMPLE_RATE))
    return sorted(events)


# --- Notes ---


def between_boundaries(signal: Array, notes: Sequence[dict[str, Any]]) -> Iterator[tuple[Array, frozenset[int]]]:
    """Pieces of 40 ms and more, 10 ms off any beginning and end of a note, with the notes that are said to sound."""
    bounds = sorted({round(note[key] * SAMPLE_RATE) for note in notes for key in ("start", "end")} | {0, signal.size})
    for start, stop in pairwise(bounds):
        if stop - start >= 320 + 640:
            sounding = {
                note["note"] for note in notes if note["start"] * SAMPLE_RATE <= start + 1 <= note["end"] * SAMPLE_RATE
            }
            yield signal[start + 160 : stop - 160], frozenset(sounding)


def residue(piece: Array, notes: frozenset[int], tuning: float) -> float:
    """Share of the power that harmonics of these notes, of straight rise or fall, leave; `tuning` in semitones."""
    time = (np.arange(piece.size) - piece.size / 2) / SAMPLE_RATE
    hertz = [440 * 2 ** ((note - 69 + tuning) / 12) * number for note in sorted(notes) for number in range(1, 5)]
    waves = [wave(2 * np.pi * f * time) for f in hertz for wave in (np.cos, np.sin)]
    columns = np.column_stack([*waves, *(wave * time / time[-1] for wave in waves)])
    left = piece - columns @ np.linalg.lstsq(columns, piece, rcond=None)[0]
    return float((left**2).sum() / (piece**2).sum())


# --- Letters ---

_FORMANTS_HZ = {  # Peterson & Barney (1952)
    "A": (730, 1090, 2440),
    "E": (530, 1840, 2480),
    "I": (270, 2290, 3010),
    "O": (570, 840, 2410),
    "U": (300, 870, 2240),
    "R": (490, 1350, 1690),
}
_NOISE_HZ = {"H": 850, "F": 1900, "X": 3400, "S": 6000}
_EDGES = np.unique(np.round(np.geomspace(200, 7600, 19) * 512 / SAMPLE_RATE).astype(int))


def letters_in(signal: Array) -> list[list[Span]]:
    """Where the letters of each word lie: above the murmur, between silences."""
    level = 10 * np.log10(moving_average(signal**2, 240) + 1e-12)
    loud = np.quantile(level, 0.95)
    silences = [(start + stop) // 2 for start, stop in runs(level < loud - 27) if stop - start > 0.025 * SAMPLE_RATE]
    bounds = [0, *silences, signal.size]
    words = [(start, runs(level[start:stop] > loud - 10)) for start, stop in pairwise(bounds)]
    return [[(first + a, first + b) for a, b in found if b - a > 0.015 * SAMPLE_RATE] for first, found in words]


def letter_at(signal: Array, start: int, stop: int) -> str:
    """The letter whose spectrum, known from phonetics, is the nearest."""
    middle = (start + stop) // 2
    spectrum = band_levels(np.abs(np.fft.rfft(signal[middle - 240 : middle + 240] * np.hanning(480), 512)) ** 2)
    return min(_SPECTRA, key=lambda letter: float(((_SPECTRA[letter] - spectrum) ** 2).sum()))


def band_levels(power: Array) -> Array:
    levels = np.log(np.add.reduceat(power, _EDGES)[:-1] / np.diff(_EDGES) + 1e-12)
    above: Array = np.maximum(levels - levels.max(), -10.0)
    return above - above.mean()


def _vowel(formants: tuple[int, ...]) -> Array:
    """Power of a voice whose source falls by 6 dB an octave, through resonances of 50 Hz and 6 % bandwidth."""
    hertz = np.maximum(frequencies(512), 100.0)
    power = hertz**-2.0
    for formant in (*formants, 3500, 4500):
        width = 50 + 0.06 * formant
        power = power / ((1 - (hertz / formant) ** 2) ** 2 + (hertz * width / formant**2) ** 2)
    return power


# --- Noise ---


def noise_over_tone(signal: Array) -> float:
    """Level of the noise between the harmonics of a tone of 150 to 450 Hz, continued under them, over the tone's, in dB."""
    hertz = frequencies(8192)
    power = (np.abs(np.fft.rfft(frames(signal, 4096, 2048) * np.hanning(4096), 8192)) ** 2).mean(axis=0)

    def contrast(pitch: float) -> float:
        number = np.arange(1, 9)
        return float(
            np.log(np.interp(number * pitch, hertz, power) / np.interp((number + 0.5) * pitch, hertz, power)).mean()
        )

    number = hertz / max(np.geomspace(145, 465, 160), key=contrast)
    between = (np.abs(number - np.round(number)) > 0.3) | (number < 0.5)
    noise = np.interp(hertz, hertz[between], power[between]).sum()
    return float(10 * np.log10(noise / max(power.sum() - noise, 1e-3 * noise)))


# --- Of use to all ---


def frequencies(size: int) -> Array:
    return np.fft.rfftfreq(size, 1 / SAMPLE_RATE)


def moving_average(values: Array, size: int) -> Array:
    return np.convolve(values, np.full(size, 1 / size), "same")


def analytic_band(signal: Array, low: float, high: float) -> NDArray[np.complex128]:
    spectrum, hertz = np.fft.fft(signal), np.fft.fftfreq(signal.size, 1 / SAMPLE_RATE)
    return 2 * np.fft.ifft(np.where((hertz >= low) & (hertz < high), spectrum, 0))


def runs(mask: NDArray[np.bool_]) -> list[Span]:
    """Bounds of each stretch of true values."""
    steps = np.diff(np.concatenate([[0], mask.astype(int), [0]]))
    return list(zip(np.flatnonzero(steps == 1).tolist(), np.flatnonzero(steps == -1).tolist(), strict=True))


def _over_murmur(power: Array) -> Array:
    murmur = _vowel((250, 1200, 2200))
    return band_levels(power / power.sum() + 0.03 * murmur / murmur.sum())


_SPECTRA = {letter: _over_murmur(_vowel(formants)) for letter, formants in _FORMANTS_HZ.items()} | {
    letter: _over_murmur(10 ** (-2 * np.abs(np.log2(np.maximum(frequencies(512), 50) / centre))))
    for letter, centre in _NOISE_HZ.items()
}
