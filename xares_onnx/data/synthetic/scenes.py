"""The synthetic tasks of all other kinds: each maker takes (number, generator) and returns a clip's json and its waveform.

`number` counts the clips of a split from 0; what must be balanced follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, product
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.random import Generator

from .classes import FORMANTS_HZ, HIGH_FORMANTS_HZ
from .sound import (
    SAMPLE_RATE,
    Signal,
    Waveform,
    any_harmonics,
    fades,
    gain,
    glide,
    hump,
    noise,
    octaves,
    record,
    sung,
    tone,
    unit,
)
from .sources import SOURCES

# --- Tags ---

TAGS = ("hum", "buzz", "whistle", "siren", "chirps", "bell", "knocks", "hiss")


def _tags(number: int, rng: Generator) -> tuple[dict[str, str], Waveform]:
    """One, two or three sources at once, up to 12 dB apart."""
    samples = _samples(rng.uniform(1.0, 1.5))
    chosen = [TAGS[index] for index in np.sort(rng.choice(len(TAGS), 1 + number % 3, replace=False))]
    sounds = [gain(rng.uniform(-6, 6)) * SOURCES[tag](samples, rng.uniform(-0.5, 0.5), rng) for tag in chosen]
    return {"tags": ";".join(chosen)}, record(np.sum(sounds, axis=0), (-35.0, -15.0), rng)


# --- Events ---

EVENTS = {"hum": "low", "beep": "middle", "siren": "middle", "whistle": "high", "hiss": "top"}
"""The classes, and the band that each fills: events of one band never overlap, since they would sound like one."""

_SCENE_SECONDS = 4.0
_GAP_SECONDS = 0.1  # between two events of one band, and before the first event and after the last


def _events(number: int, rng: Generator) -> tuple[list[dict[str, Any]], Waveform]:
    """One to four events of 0.3 to 1.5 s, over noise that falls by 6 dB an octave above 400 Hz."""
    samples = _samples(_SCENE_SECONDS)
    scene = gain(rng.uniform(-30, -15)) * noise(samples, rng, -6 * np.maximum(octaves(samples), 3))
    events: list[dict[str, Any]] = []
    while len(events) < 1 + number % 4:
        label = tuple(EVENTS)[rng.integers(len(EVENTS))]
        seconds = rng.uniform(0.3, 1.5)
        start = _samples(rng.uniform(_GAP_SECONDS, _SCENE_SECONDS - _GAP_SECONDS - seconds))
        stop = start + _samples(seconds)
        event = {"onset": start / SAMPLE_RATE, "offset": stop / SAMPLE_RATE, "label": label}
        if not any(_collide(event, other) for other in events):
            sound = SOURCES[label](stop - start, rng.uniform(-0.2, 0.2), rng) * fades(stop - start)
            scene[start:stop] += gain(rng.uniform(-6, 6)) * sound
            events.append(event)
    return sorted(events, key=lambda event: float(event["onset"])), record(scene, (-50.0, -40.0), rng)


def _collide(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    apart = one["onset"] >= other["offset"] + _GAP_SECONDS or other["onset"] >= one["offset"] + _GAP_SECONDS
    return EVENTS[one["label"]] == EVENTS[other["label"]] and not apart


# --- Notes ---

NOTES = range(60, 72)  # MIDI numbers: middle C to the B above it
_PIECE_SECONDS = 2.0


def _notes(number: int, rng: Generator) -> tuple[list[dict[str, Any]], Waveform]:
    """Two voices, each one note of 0.12 to 0.4 s after another, of one instrument, struck and dying away.

    A note never meets itself in the other voice.
    """
    piece: Signal = np.zeros(_samples(_PIECE_SECONDS))
    harmonics, tuning = any_harmonics(rng), rng.uniform(-0.1, 0.1)
    notes: list[dict[str, Any]] = []
    ready = [rng.uniform(0.05, 0.3) for _ in range(2)]  # when each voice begins its next note
    silent = dict.fromkeys(NOTES, 0.0)  # from when each note may sound again
    while (onset := min(ready)) < _PIECE_SECONDS - 0.5:
        free = [note for note in NOTES if silent[note] <= onset]
        note = free[rng.integers(len(free))]
        start = _samples(onset)
        stop = start + _samples(rng.uniform(0.12, 0.4))
        string = tone(np.full(stop - start, 440 * 2 ** ((note - 69 + tuning) / 12)), harmonics, rng)
        decay = np.exp(-np.arange(stop - start) / _samples(0.3))
        piece[start:stop] += gain(rng.uniform(-3, 3)) * string * decay * fades(stop - start)
        notes.append({"start": start / SAMPLE_RATE, "end": stop / SAMPLE_RATE, "note": note})
        silent[note] = stop / SAMPLE_RATE + 0.05
        ready[ready.index(onset)] = stop / SAMPLE_RATE + rng.uniform(0.0, 0.1)
    return notes, record(piece, (-45.0, -25.0), rng)


# --- Captions ---

_NOUNS = {
    "hum": ("a hum", "a drone"),
    "buzz": ("a buzz", "a razor"),
    "beep": ("a beep", "a tone"),
    "whistle": ("a whistle", "a flute"),
    "siren": ("a siren", "an alarm"),
    "chirps": ("birdsong", "chirping"),
    "bell": ("a bell", "a chime"),
    "knocks": ("knocking", "drumming"),
    "ticks": ("ticking", "a clock"),
    "hiss": ("a hiss", "steam"),
}
_REGISTERS = ((-0.6, ("low", "deep")), (0.6, ("high", "shrill")))  # octaves
_BACKDROPS = (
    (-45.0, ("in silence", "in a quiet room")),
    (-12.0, ("in the rain", "while rain falls")),
)  # decibels of the rain
_IN_TURN = ("{0}, then {1}", "{0} followed by {1}", "{1} after {0}", "{0} and later {1}", "{0} before {1}")
_AT_ONCE = ("{0} over {1}", "{0} and {1} at once", "{1} together with {0}", "{0} along with {1}", "{1} during {0}")
_COMBINATIONS = tuple(product(combinations(_NOUNS, 2), _REGISTERS, _BACKDROPS))  # 180
_STRIDE = 77  # prime to their number: 180 clips in a row hold each once, and any 60 are well mixed


def _captions(number: int, rng: Generator) -> tuple[dict[str, str], Waveform]:
    """Two sources, in turn or at once, both low or both high, in the rain or not.

    Each combination of these, order aside, is one clip of the test split, and every caption names it by the bag of its
    words: a perfect encoder can find each clip.
    """
    pair, (shift, registers), (decibels, backdrops) = _COMBINATIONS[number * _STRIDE % len(_COMBINATIONS)]
    names = [pair[index] for index in rng.permutation(2)]
    in_turn = bool(rng.integers(2))
    samples = _samples(rng.uniform(0.75, 1.0)) * (1 if in_turn else 2)
    sounds = [gain(rng.uniform(-3, 3)) * SOURCES[name](samples, shift + rng.uniform(-0.2, 0.2), rng) for name in names]
    scene = np.concatenate([sound * fades(samples) for sound in sounds]) if in_turn else np.sum(sounds, axis=0)
    captions = {}
    for index, template in enumerate(_IN_TURN if in_turn else _AT_ONCE, 1):
        sentence = template.format(*(_one_of(_NOUNS[name], rng) for name in names))
        captions[f"caption_{index}"] = f"{sentence}, both {_one_of(registers, rng)}, {_one_of(backdrops, rng)}"
    return captions, record(scene, (decibels - 3, decibels + 3), rng)


def _one_of(words: Sequence[str], rng: Generator) -> str:
    return words[int(rng.integers(len(words)))]


# --- Transcripts ---

_VOWELS_HZ: dict[str, tuple[float, ...]] = {  # formants
    **{vowel.upper(): formants for vowel, formants in FORMANTS_HZ.items()},
    "R": (490, 1350, 1690),  # as in "bird", from the same source
}
_BREATHS_HZ = {"H": 850, "F": 1900, "X": 3400, "S": 6000}  # centre of a consonant's noise
_LETTERS = (*_VOWELS_HZ, *_BREATHS_HZ)
_MURMUR_HZ = (250, 1200, 2200)  # formants of a voice behind closed lips
_MURMUR_DECIBELS = -15.0


def _transcript(number: int, rng: Generator) -> tuple[dict[str, str], Waveform]:
    """One to four words of two to four letters. A word is a murmur out of which its letters rise; words part in silence.

    Pitch, speed and size of the speaker vary from clip to clip, length, pitch and level of a letter within one. Letters
    and silences are short: if many frames look alike, the CTC loss keeps a linear head from writing anything. Some
    clips are of one word, so that the head does not learn to use the space between words as the blank.
    """
    pitch, size, speed = 90 * 2.5 ** rng.uniform(), rng.uniform(0.92, 1.08), rng.uniform(0.85, 1.15)
    words, parts = [], []
    for _ in range(1 + number % 4):
        word = "".join(_one_of(_LETTERS, rng) for _ in range(rng.integers(2, 5)))
        parts += [_word(word, pitch, size, speed, rng), np.zeros(_samples(speed * rng.uniform(0.06, 0.07)))]
        words.append(word)
    return {"trans": " ".join(words)}, record(np.concatenate(parts[:-1]), (-45.0, -35.0), rng)


def _word(word: str, pitch: float, size: float, speed: float, rng: Generator) -> Signal:
    lengths = [_samples(speed * rng.uniform(0.04, 0.05)) for _ in word]
    rests = [_samples(speed * rng.uniform(0.04, 0.07)) for _ in range(len(word) + 1)]
    samples = sum(lengths) + sum(rests)
    spoken = gain(_MURMUR_DECIBELS) * _voice(_MURMUR_HZ, samples, pitch, size, rng) * fades(samples)
    stop = 0
    for letter, rest, length in zip(word, rests, lengths, strict=False):
        start, stop = stop + rest, stop + rest + length
        if letter in _VOWELS_HZ:
            sound = _voice(_VOWELS_HZ[letter], length, pitch * rng.uniform(0.9, 1.1), size, rng)
        else:
            sound = noise(length, rng, hump(length, size * _BREATHS_HZ[letter], 20))
        spoken[start:stop] += gain(rng.uniform(-3, 3)) * sound * fades(length)
    return np.asarray(spoken)


def _voice(formants: tuple[float, ...], samples: int, pitch: float, size: float, rng: Generator) -> Signal:
    harmonics = sung(size * np.array([*formants, *HIGH_FORMANTS_HZ]), pitch)
    return unit(tone(pitch * glide(samples, rng.uniform(-0.05, 0.05)), harmonics, rng))


# --- Number ---


def _number(number: int, rng: Generator) -> tuple[dict[str, float], Waveform]:
    """A tone of 150 to 450 Hz in noise of any slope: 0 if the noise lies 20 dB under it, 10 if it lies 20 dB over it."""
    score = round(rng.uniform(0, 10), 1)
    samples = _samples(rng.uniform(1.0, 1.5))
    hertz = 150 * 3 ** rng.uniform() * glide(samples, rng.uniform(-0.05, 0.05))
    mixed = unit(tone(hertz, any_harmonics(rng), rng))
    mixed += gain(4 * score - 20) * noise(samples, rng, rng.uniform(-4, 2) * octaves())
    return {"score": score}, record(mixed, None, rng)


def _samples(seconds: float) -> int:
    return round(SAMPLE_RATE * seconds)


SCENE_TASKS: Mapping[str, Callable[[int, Generator], tuple[Any, Waveform]]] = MappingProxyType(
    {
        "synthetic_tags": _tags,
        "synthetic_events": _events,
        "synthetic_notes": _notes,
        "synthetic_captions": _captions,
        "synthetic_transcript": _transcript,
        "synthetic_number": _number,
    }
)
