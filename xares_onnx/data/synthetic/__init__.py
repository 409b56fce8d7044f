"""The built-in suite: small listening tests of every kind, made by arithmetic, so that a score needs no download.

Each task hides one attribute behind others that vary freely, so a score says what an encoder keeps:

====================  =================================  ====================================================
task                  what is asked                      what varies and must not help
====================  =================================  ====================================================
synthetic_pitch       pitch class of a steady tone       octave, harmonic spectrum, tuning
synthetic_timbre      waveform of a tone                 pitch, a slight glide
synthetic_vowel       formants of a sung vowel           pitch, a slight glide, size of the speaker
synthetic_colour      where the spectrum has its hump    its height, slope of the noise under it, length
synthetic_tempo       bursts of noise per second        their share of time, spectrum and depth, phase, length
synthetic_contour     two glides, each rises or falls    pitch, range, harmonic spectrum, length
synthetic_tags        which of eight sources sound       their number, levels and pitches, hiss, length
synthetic_events      when each of five sources sounds   their number, levels and pitches, overlaps, hiss
synthetic_notes       which notes sound when             harmonic spectrum, levels, overlaps, hiss
synthetic_captions    which words describe a scene       levels, pitches, wording, order in time, length
synthetic_transcript  which letters are spoken           pitch, speed and size of the speaker, levels, hiss
synthetic_number      how much noise is in a tone        pitch, harmonic spectrum, slope of the noise, length
====================  =================================  ====================================================

A clip's average spectrum settles timbre, vowel and colour, and much of pitch class, tags, captions and number. It says
nothing of tempo and contour, which lie in the order of time alone: the bursts of every tempo fill the same share of the
clip, the glides of every contour pass the same pitches at the same speed. A single frame's spectrum settles most of
events, notes and transcripts; it cannot tell two classes of event apart, a steady tone and two tones in turn. Loudness has
the same distribution everywhere.

Every draw comes from one generator, seeded by the version, the task and the split. The arithmetic, in
float64, ends in 16-bit samples, so that a last-bit difference between two machines' sines is rounded away.
"""

from __future__ import annotations

import io
import json
import os
import wave
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray

from ...errors import DataError, UnknownTaskError
from ...files import disk_error
from .classes import CLASS_TASKS
from .scenes import SCENE_TASKS
from .sound import SAMPLE_RATE, Waveform

__all__ = ["LABELS", "SAMPLE_RATE", "SPLITS", "TASKS", "VERSION", "Clip", "build", "clips", "is_built"]

VERSION = 1
"""Increases whenever a byte of any shard changes: scores of different versions are not comparable."""

SPLITS: Mapping[str, int] = MappingProxyType({"train": 240, "valid": 60, "test": 180})
"""Clips in each split of every task: multiples of 60, so that 4, 5, 6 and 12 classes are all balanced."""

_MAKERS: Mapping[str, Callable[[int, Generator], tuple[Any, Waveform]]] = {**CLASS_TASKS, **SCENE_TASKS}

TASKS: tuple[str, ...] = tuple(_MAKERS)
"""The tasks' names, which are also those of their task files and data folders."""

LABELS: Mapping[str, tuple[str, ...]] = MappingProxyType({name: task.labels for name, task in CLASS_TASKS.items()})
"""The classes of each task with one class per clip, in the order of its task file."""


@dataclass(frozen=True)
class Clip:
    key: str
    waveform: NDArray[np.float32]
    """Shape (samples,), 16 kHz, in [-1, 1]: multiples of 2**-15, exactly the values in its file."""
    label: Any
    """The value of its json file: `{"label": class}` in the tasks of `LABELS`, else as the task file's target reads it."""


def clips(task: str, split: str) -> Iterator[Clip]:
    """Make the clips of one split, classes in turn; every call gives the same clips.

    Raises:
        UnknownTaskError: `task` is not one of `TASKS`.
        KeyError: `split` is not one of `SPLITS`.
    """
    if task not in _MAKERS:
        raise UnknownTaskError.named(task, TASKS)
    rng = Generator(PCG64(SeedSequence(list(f"{VERSION}/{task}/{split}".encode()))))
    for number in range(SPLITS[split]):
        label, waveform = _MAKERS[task](number, rng)
        yield Clip(f"{split}-{number:04}", waveform, label)


def build(task: str, folder: Path) -> None:
    """Write a task's shards, `train-000000.tar` and so on, into `folder`, in X-ARES's layout.

    A shard is a webdataset tar of `<key>.wav` (16-bit, mono) and `<key>.json`. The folder appears complete or not at
    all, and several processes may build the same one. Shards of this version are kept, those of another are replaced.

    Raises:
        UnknownTaskError: `task` is not one of `TASKS`.
        DataError: `folder` contains files that this function did not make.
        MachineError: The folder cannot be written.
    """
    if is_built(task, folder):
        return
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / _MARK_FILE).is_file():
            raise DataError(f"{folder} contains files that were not built here; move them, or choose another folder")
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


# --- Files ---

_MARK_FILE = "made-by-xares-onnx"


def _mark(task: str) -> str:
    return f"{task}, version {VERSION}\n"


def _shard_name(split: str) -> str:
    return f"{split}-000000.tar"


def _write_shard(path: Path, samples: Iterator[Clip]) -> None:
    from webdataset import TarWriter  # imports torch, which takes seconds

    with path.open("wb") as file:
        # A writer that is not closed complains on stderr, when it is collected, that its file is closed.
        with closing(TarWriter(file, user="", group="", encoder=False, mtime=0)) as shard:
            for clip in samples:
                label = json.dumps(clip.label).encode()
                shard.write({"__key__": clip.key, "wav": _wav(clip.waveform), "json": label})
        file.flush()
        os.fsync(file.fileno())


def _wav(waveform: NDArray[np.float32]) -> bytes:
    """A 16-bit mono file, by the standard library: its bytes depend on no version of libsndfile."""
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
        return  # another process was faster, and wrote the same bytes
    with suppress(FileNotFoundError):  # there is none, or another process has just moved it
        os.replace(folder, outdated)
    try:
        os.replace(fresh, folder)
    except OSError:
        if not is_built(task, folder):
            raise
