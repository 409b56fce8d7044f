"""The built-in suite: six small listening tests made by arithmetic, so that a score needs no download.

Each task hides one attribute behind others that vary freely, so a score says what an encoder keeps:

==================  =================================  ====================================================
task                what decides the class             what varies and must not help
==================  =================================  ====================================================
synthetic_pitch     pitch class of a steady tone       octave, harmonic spectrum, tuning
synthetic_timbre    waveform of a tone                 pitch, a slight glide
synthetic_vowel     formants of a sung vowel           pitch, a slight glide, size of the speaker
synthetic_colour    where the spectrum has its hump    its height, slope of the noise under it, length
synthetic_tempo     bursts of noise in a second        their share of time, spectrum and depth, phase, length
synthetic_contour   two glides, each rises or falls    pitch, range, harmonic spectrum, length
==================  =================================  ====================================================

A clip's average spectrum settles timbre, vowel and colour, and much of pitch class. It says nothing of tempo
and contour, which lie in the order of time alone: the bursts of every tempo fill the same share of the clip,
the glides of every contour pass the same pitches at the same speed. Loudness has one distribution everywhere.

Every draw comes from one generator, seeded by the version, the task and the split. The arithmetic, in
float64, ends in 16-bit samples, so that a last-bit difference between two machines' sines is rounded away.
"""

from __future__ import annotations

import io
import json
import os
import wave
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray

from .errors import DataError, UnknownTaskError
from .files import disk_error

__all__ = ["LABELS", "SAMPLE_RATE", "SPLITS", "TASKS", "VERSION", "Clip", "build", "clips", "is_built"]

VERSION = 1
"""Raised whenever a byte of any shard changes: two versions' scores are not comparable."""

SAMPLE_RATE = 16_000

SPLITS: Mapping[str, int] = MappingProxyType({"train": 240, "valid": 60, "test": 180})
"""Clips in each split of every task: multiples of 60, so that 4, 5, 6 and 12 classes are all balanced."""

Signal = NDArray[np.float64]  # audio at any level, shape (samples,)
_LONGEST = 2**15  # 2.05 s: noises are made at this power of two, which the FFT likes, and cut
_CYCLE = 2**12  # points in one cycle of a tone; read linearly, its error lies below -60 dB
_FLAT_BELOW_HZ = 50.0
_HIGHEST_HZ = 7600.0  # no harmonic comes nearer to the Nyquist frequency
_FADE_SECONDS = 0.01


@dataclass(frozen=True)
class Clip:
    key: str
    waveform: NDArray[np.float32]
    """Shape (samples,), 16 kHz, in [-1, 1]: multiples of 2**-15, the very values that its file holds."""
    label: str


@dataclass(frozen=True)
class _Recipe:
    labels: tuple[str, ...]
    seconds: tuple[float, float]
    """Shortest and longest clip."""
    make: Callable[[str, int, Generator], Signal]
    """(label, samples, generator) -> a signal of that class at any level."""
    hiss_decibels: tuple[float, float] | None = (-50.0, -35.0)
    """Level of the white noise under the signal, relative to it; None where noise is the signal."""


def clips(task: str, split: str) -> Iterator[Clip]:
    """Make the clips of one split, classes in turn; every call gives the same ones.

    Raises:
        UnknownTaskError: `task` is none of `TASKS`.
        KeyError: `split` is none of `SPLITS`.
    """
    if task not in _RECIPES:
        raise UnknownTaskError.named(task, TASKS)
    recipe = _RECIPES[task]
    rng = Generator(PCG64(SeedSequence(list(f"{VERSION}/{task}/{split}".encode()))))
    for number in range(SPLITS[split]):
        label = recipe.labels[number % len(recipe.labels)]
        samples = round(SAMPLE_RATE * rng.uniform(*recipe.seconds))
        waveform = _record(recipe.make(label, samples, rng), recipe.hiss_decibels, rng)
        yield Clip(f"{split}-{number:04}", waveform, label)


def build(task: str, folder: Path) -> None:
    """Write a task's shards, `train-000000.tar` and so on, into `folder`, in X-ARES's layout.

    A shard is a webdataset tar of `<key>.wav` (16-bit, mono) and `<key>.json` (`{"label": ...}`). The folder
    appears complete or not at all, and several processes may build the same one. Shards of this version are
    left as they are; those of another version are replaced.

    Raises:
        UnknownTaskError: `task` is none of `TASKS`.
        DataError: `folder` holds something that this function did not make.
        MachineError: it cannot be written.
    """
    if is_built(task, folder):
        return
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / _MARK_FILE).is_file():
            raise DataError(f"{folder} holds files of another making; move them, or choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
            fresh = Path(aside, "fresh")
            fresh.mkdir()  # with usual permissions: the temporary folder around it is closed to others
            for split in SPLITS:
                _write_shard(fresh / _shard_name(split), clips(task, split))
            (fresh / _MARK_FILE).write_text(_mark(task), encoding="utf-8", newline="\n")
            _put_in_place(task, fresh, folder, Path(aside, "outdated"))
    except OSError as error:
        raise disk_error(error, folder) from error


def is_built(task: str, folder: Path) -> bool:
    """Whether `folder` holds the three shards of `task` as this version makes them."""
    try:
        mark = (folder / _MARK_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return mark == _mark(task) and all((folder / _shard_name(split)).is_file() for split in SPLITS)


# --- Tasks: each maker takes (label, samples, generator) and returns a signal of that many samples


def _pitch(label: str, samples: int, rng: Generator) -> Signal:
    """A steady tone on any octave from C2 to B4, at most 15 cents out of tune."""
    semitones = 12 * rng.integers(3) + _PITCH_CLASSES.index(label) + rng.uniform(-0.15, 0.15)
    return _tone(np.full(samples, _C2_HZ * 2 ** (semitones / 12)), _any_harmonics(rng), rng)


def _timbre(label: str, samples: int, rng: Generator) -> Signal:
    """A tone of 150 to 450 Hz whose harmonics follow one of six rules."""
    hertz = 150 * 3 ** rng.uniform() * _glide(samples, rng.uniform(-0.05, 0.05))
    return _tone(hertz, _WAVEFORMS[label], rng)


def _vowel(label: str, samples: int, rng: Generator) -> Signal:
    """A buzz of 90 to 270 Hz through the resonances of a vocal tract of varied length."""
    pitch = 90 * 3 ** rng.uniform()
    formants = np.array([*_FORMANTS_HZ[label], 3500.0, 4500.0]) * rng.uniform(0.9, 1.1)
    widths = 50 + 0.06 * formants
    frequency = pitch * _NUMBERS[:, None]
    resonances = 1 / np.hypot(1 - (frequency / formants) ** 2, frequency * widths / formants**2)
    return _tone(pitch * _glide(samples, rng.uniform(-0.05, 0.05)), resonances.prod(axis=1) / _NUMBERS, rng)


def _colour(label: str, samples: int, rng: Generator) -> Signal:
    """Noise with a hump of 10 to 20 dB around one of five frequencies, over any slope."""
    octaves = _octaves() - np.log2(_HUMPS_HZ[label] / _FLAT_BELOW_HZ)
    hump = rng.uniform(10, 20) * np.exp(-((octaves + rng.uniform(-0.2, 0.2)) ** 2))
    return _noise(samples, rng, hump + 3 * rng.uniform(-2, 1) * octaves)


def _tempo(label: str, samples: int, rng: Generator) -> Signal:
    """Bursts of noise. A burst fills 30 to 50 % of its period whatever the tempo."""
    rate = _BURSTS_PER_SECOND[label] * 2 ** rng.uniform(-0.06, 0.06)
    phase = (np.arange(samples) / SAMPLE_RATE * rate + rng.uniform()) % 1
    ramp = 0.1
    gate = np.clip((rng.uniform(0.3, 0.5) / 2 - np.abs(phase - 0.5)) / ramp + 0.5, 0, 1)
    ripple = 6 * np.cos(2 * np.pi * (_octaves() / rng.uniform(2, 5) + rng.uniform()))
    return gate * _noise(samples, rng, ripple + rng.uniform(-5, 2) * _octaves())


def _contour(label: str, samples: int, rng: Generator) -> Signal:
    """Two glides through the same 0.5 to 1 octave, each of half the clip, with a breath between them.

    Every class passes every pitch equally often and equally fast, so all four have one average over time.
    """
    octaves = rng.uniform(0.5, 1.0)
    lengths = (samples // 2, samples - samples // 2)
    glides = [_glide(n, octaves * _DIRECTIONS[word]) for n, word in zip(lengths, label.split(), strict=True)]
    hertz = 200 * 2 ** rng.uniform() * np.concatenate(glides)
    breaths: Signal = np.concatenate([_fades(n) for n in lengths])
    return _tone(hertz, _any_harmonics(rng), rng) * breaths


_PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
_C2_HZ = 65.41
_NUMBERS = np.arange(1.0, 81.0)  # of the harmonics: the 80th of 95 Hz is the last below 7.6 kHz
_ODD = _NUMBERS % 2
_WAVEFORMS: dict[str, Signal] = {  # amplitudes of the harmonics
    "sine": (_NUMBERS == 1).astype(np.float64),
    "triangle": _ODD / _NUMBERS**2,
    "square": _ODD / _NUMBERS,
    "sawtooth": 1 / _NUMBERS,
    "pulse": np.ones_like(_NUMBERS),
    "organ": np.isin(_NUMBERS, (1, 2, 4, 8)).astype(np.float64),
}
_FORMANTS_HZ = {  # of men, after Peterson & Barney, JASA 24 (1952), 175-184
    "a": (730, 1090, 2440),
    "e": (530, 1840, 2480),
    "i": (270, 2290, 3010),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
}
_HUMPS_HZ = {"red": 250, "yellow": 500, "green": 1000, "blue": 2000, "violet": 4000}
_BURSTS_PER_SECOND = {"3": 3, "4": 4, "6": 6, "8": 8, "12": 12, "16": 16}
_DIRECTIONS = {"rise": 1, "fall": -1}

_RECIPES = {
    "synthetic_pitch": _Recipe(_PITCH_CLASSES, (1.0, 1.0), _pitch),
    "synthetic_timbre": _Recipe(tuple(_WAVEFORMS), (1.0, 1.0), _timbre),
    "synthetic_vowel": _Recipe(tuple(_FORMANTS_HZ), (1.0, 1.0), _vowel),
    "synthetic_colour": _Recipe(tuple(_HUMPS_HZ), (1.0, 1.5), _colour, None),
    "synthetic_tempo": _Recipe(tuple(_BURSTS_PER_SECOND), (1.5, 2.0), _tempo, (-30.0, -12.0)),
    "synthetic_contour": _Recipe(("rise rise", "rise fall", "fall rise", "fall fall"), (1.0, 1.6), _contour),
}

TASKS: tuple[str, ...] = tuple(_RECIPES)
"""The tasks' names: each is also the name of a task file and of its data folder."""

LABELS: Mapping[str, tuple[str, ...]] = MappingProxyType({task: _RECIPES[task].labels for task in TASKS})
"""The classes of each task, in the order of its task file."""


# --- Sound ---


def _tone(hertz: Signal, harmonics: Signal, rng: Generator) -> Signal:
    """A periodic tone of a frequency at each sample, from its harmonics' amplitudes, in random phases.

    One cycle is made as a table, without the harmonics that would alias at the highest frequency, and read at
    the running phase: a glide of eighty harmonics costs the same as a sine.
    """
    count = min(len(harmonics), int(_HIGHEST_HZ / hertz.max()))
    spectrum = np.zeros(_CYCLE // 2 + 1, dtype=np.complex128)
    spectrum[1 : count + 1] = harmonics[:count] * np.exp(2j * np.pi * rng.uniform(size=count))
    cycle = np.fft.irfft(spectrum)
    step = np.roll(cycle, -1) - cycle
    # Phase in whole numbers of 2**-32 cycle: no error grows, and all machines agree.
    phase = np.cumsum(np.rint(hertz * (2**32 / SAMPLE_RATE)).astype(np.int64))
    whole, rest = (phase >> 20) % _CYCLE, phase % 2**20
    tone: Signal = cycle[whole] + step[whole] * (rest / 2**20)
    return tone


def _any_harmonics(rng: Generator) -> Signal:
    """Amplitudes of harmonics that fall by 3 to 9 dB an octave, each a few dB off."""
    return _NUMBERS ** -rng.uniform(0.5, 1.5) * np.exp(0.4 * rng.standard_normal(_NUMBERS.size))


def _glide(samples: int, octaves: float) -> Signal:
    """Factors of frequency, shape (samples,), that rise by so many octaves around 1; negative falls."""
    return 2 ** np.linspace(-octaves / 2, octaves / 2, samples)


def _noise(samples: int, rng: Generator, decibels: Signal) -> Signal:
    """Noise of unit level whose spectrum has these levels at the frequencies of `_octaves`."""
    spectrum = rng.standard_normal((decibels.size, 2)).view(np.complex128)[:, 0]
    noise = np.fft.irfft(spectrum * np.exp(np.log(10) / 20 * decibels))[:samples]
    unit: Signal = noise / _level(noise)
    return unit


@cache
def _octaves() -> Signal:
    """Octaves over 50 Hz of a noise's frequencies, (_LONGEST / 2 + 1,); 0 below, lest a slope rumble."""
    octaves: Signal = np.log2(np.maximum(np.fft.rfftfreq(_LONGEST, 1 / SAMPLE_RATE) / _FLAT_BELOW_HZ, 1.0))
    return octaves


def _record(signal: Signal, hiss_decibels: tuple[float, float] | None, rng: Generator) -> NDArray[np.float32]:
    """Fade in and out, add hiss, set a random loudness and round to 16 bits: float32, shape (samples,).

    Loudness is set by root mean square, and not by peak, for a waveform's crest depends on its class.
    """
    signal = signal * _fades(signal.size)
    if hiss_decibels is not None:
        hiss = _level(signal) * 10 ** (rng.uniform(*hiss_decibels) / 20)
        signal = signal + hiss * rng.standard_normal(signal.size)
    gain = min(10 ** (rng.uniform(-45, -20) / 20) / _level(signal), 0.99 / np.abs(signal).max())
    rounded: NDArray[np.float32] = (np.rint(gain * signal * 2**15) / 2**15).astype(np.float32)
    return rounded


def _level(signal: Signal) -> float:
    return float(np.sqrt(np.mean(signal**2)))


def _fades(samples: int) -> Signal:
    """Gain of a fade in and a fade out, each a straight line, shape (samples,)."""
    fade_in = np.linspace(0, 1, int(_FADE_SECONDS * SAMPLE_RATE))
    return np.concatenate([fade_in, np.ones(samples - 2 * fade_in.size), fade_in[::-1]])


# --- Files ---

_MARK_FILE = "made-by-xares-onnx"


def _mark(task: str) -> str:
    return f"{task}, version {VERSION}\n"


def _shard_name(split: str) -> str:
    return f"{split}-000000.tar"


def _write_shard(path: Path, samples: Iterator[Clip]) -> None:
    from webdataset import TarWriter  # imports torch, which takes seconds

    with path.open("wb") as file:
        shard = TarWriter(file, user="", group="", encoder=False, mtime=0)
        for clip in samples:
            label = json.dumps({"label": clip.label}).encode()
            shard.write({"__key__": clip.key, "wav": _wav(clip.waveform), "json": label})
        shard.close()
        file.flush()
        os.fsync(file.fileno())


def _wav(waveform: NDArray[np.float32]) -> bytes:
    """A 16-bit mono file; by the standard library, whose bytes do not depend on a version of libsndfile."""
    file = io.BytesIO()
    with wave.open(file, "wb") as audio:
        audio.setnchannels(1)
        audio.setsampwidth(2)
        audio.setframerate(SAMPLE_RATE)
        audio.writeframes((waveform * 2**15).astype("<i2").tobytes())
    return file.getvalue()


def _put_in_place(task: str, fresh: Path, folder: Path, outdated: Path) -> None:
    """Rename `fresh` to `folder`, after moving an older version from there to `outdated`."""
    if is_built(task, folder):
        return  # another process was sooner, with the same bytes
    with suppress(FileNotFoundError):  # there is none, or another process has just moved it
        os.replace(folder, outdated)
    try:
        os.replace(fresh, folder)
    except OSError:
        if not is_built(task, folder):
            raise
