"""The synthetic suite must mean something: chance for noise, the ceiling for features that hold the
answer, and nothing of the order of time in an average spectrum. The features are plain signal processing;
they share no code with the makers of the clips.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import solve_toeplitz
from scipy.stats import binom
from shard_makers import small_disk
from synthetic_clips import Array, all_of, decibels, frames, log_mel, samples_of, split_of, task_file

from xares_onnx.data import synthetic
from xares_onnx.data.audio import decode
from xares_onnx.data.shards import index_shard, read_extent
from xares_onnx.data.synthetic import LABELS, SAMPLE_RATE, SPLITS, TASKS, Clip, build, clips, is_built
from xares_onnx.data.targets import ClassTarget
from xares_onnx.data.task import Task
from xares_onnx.errors import DataError, DiskFullError, MachineError, UnknownTaskError
from xares_onnx.probes.linear import Classification, train_linear
from xares_onnx.probes.training import Rows

SHARDS = [f"{split}-000000.tar" for split in SPLITS]

each_task = pytest.mark.parametrize("task", TASKS)
each_task_of_classes = pytest.mark.parametrize("task", LABELS)


# --- What a score means ---


@each_task_of_classes
def test_noise_scores_chance(task: str) -> None:
    chance = 1 / len(LABELS[task])
    low, high = binom.ppf([0.025, 0.975], SPLITS["test"], chance) / SPLITS["test"]
    assert low <= score(task, "noise") <= high


@each_task_of_classes
def test_features_that_hold_the_answer_reach_the_ceiling(task: str) -> None:
    assert score(task, "oracle") >= 0.95


@pytest.mark.parametrize("task", ["synthetic_timbre", "synthetic_vowel", "synthetic_colour"])
def test_average_spectrum_settles_what_it_holds(task: str) -> None:
    assert score(task, "log_mel") >= 0.9


@pytest.mark.parametrize("task", ["synthetic_tempo", "synthetic_contour"])
def test_average_spectrum_says_nothing_of_the_order_of_time(task: str) -> None:
    assert score(task, "log_mel") < 0.5 * score(task, "oracle")


@each_task_of_classes
def test_loudness_and_length_say_nothing_of_the_class(task: str) -> None:
    everything = all_of(task)
    loudness = np.array([decibels(clip.waveform) for clip in everything])
    assert np.ptp(loudness) > 20
    assert loudness.std() > 6
    length = np.array([len(clip.waveform) for clip in everything])
    for value in [loudness, length] if length.std() else [loudness]:
        value = (value - value.mean()) / value.std()
        for label in LABELS[task]:
            ours = value[[class_of(clip) == label for clip in everything]]
            assert abs(ours.mean()) < 3.5 / np.sqrt(len(ours)), label


# --- The clips ---


@each_task
def test_clips_are_sound_and_unrepeated(task: str) -> None:
    contents: set[bytes] = set()
    for split, size in SPLITS.items():
        part = split_of(task, split)
        assert len({clip.key for clip in part}) == len(part) == size
        for clip in part:
            assert clip.waveform.dtype == np.float32
            assert clip.waveform.ndim == 1
            assert 0.15 <= len(clip.waveform) / SAMPLE_RATE <= 4.0
            assert np.isfinite(clip.waveform).all()
            assert np.abs(clip.waveform).max() < 0.991
            np.testing.assert_array_equal(clip.waveform * 2**15, np.rint(clip.waveform * 2**15))
            contents.add(hashlib.sha256(clip.waveform.tobytes()).digest())
    assert len(contents) == sum(SPLITS.values())


@each_task_of_classes
def test_classes_are_balanced(task: str) -> None:
    for split, size in SPLITS.items():
        counts = {label: sum(class_of(clip) == label for clip in split_of(task, split)) for label in LABELS[task]}
        assert set(counts.values()) == {size // len(LABELS[task])}


def test_lengths_vary_in_several_tasks() -> None:
    varied = [task for task in TASKS if len({len(clip.waveform) for clip in split_of(task, "test")}) > 100]
    assert len(varied) >= 2


# Sum of the 16-bit samples' sizes in all splits. A few may differ in the last bit between machines.
FINGERPRINTS: dict[int, dict[str, int]] = {
    1: {
        "synthetic_pitch": 7_031_681_883,
        "synthetic_timbre": 6_663_366_821,
        "synthetic_vowel": 7_019_183_471,
        "synthetic_colour": 8_653_505_034,
        "synthetic_tempo": 8_587_578_440,
        "synthetic_contour": 8_675_733_001,
        "synthetic_tags": 8_115_295_543,
        "synthetic_events": 20_270_931_436,
        "synthetic_notes": 11_351_179_146,
        "synthetic_captions": 10_978_575_286,
        "synthetic_transcript": 4_759_141_593,
        "synthetic_number": 8_139_118_155,
    }
}


@each_task
def test_other_samples_are_another_version(task: str) -> None:
    found = round(sum(float(np.abs(samples_of(clip)).sum()) for clip in all_of(task)) * 2**15)
    assert abs(found - FINGERPRINTS[synthetic.VERSION][task]) < 20, f"{found}: raise VERSION"


def test_unknown_task_is_named_with_its_nearest() -> None:
    with pytest.raises(UnknownTaskError, match="synthetic_tempo"):
        next(clips("synthetic_tempi", "train"))


@each_task_of_classes
def test_task_file_agrees(task: str) -> None:
    definition = task_file(task)
    assert (definition.name, definition.domain, definition.weight) == (task, "synthetic", SPLITS["test"])
    assert isinstance(definition.target, ClassTarget)
    assert (definition.target.key, definition.target.classes) == ("label", LABELS[task])
    assert definition.data.splits == {split: f"{split}-*.tar" for split in SPLITS}


# --- The shards ---


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SPLITS", {"train": 12, "valid": 12, "test": 12})


@each_task
@pytest.mark.usefixtures("small")
def test_shards_are_the_same_bytes_each_time(task: str, tmp_path: Path) -> None:
    build(task, tmp_path / "one")
    build(task, tmp_path / "two")
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert len(set(digests(tmp_path / "one"))) == len(SHARDS)


@pytest.mark.parametrize("task", ["synthetic_contour", "synthetic_events", "synthetic_captions"])
@pytest.mark.usefixtures("small")
def test_shards_hold_the_very_clips(task: str, tmp_path: Path) -> None:
    build(task, tmp_path / "data")
    for split in SPLITS:
        path = tmp_path / "data" / f"{split}-000000.tar"
        shard = index_shard(path)
        made = list(clips(task, split))
        assert shard.damage is None
        assert shard.expected == len(shard.samples) == len(made)
        for sample, clip in zip(shard.samples, made, strict=True):
            waveform, rate = decode(read_extent(path, sample.audio))
            assert (sample.key, rate) == (clip.key, SAMPLE_RATE)
            assert json.loads(read_extent(path, sample.label)) == clip.label
            np.testing.assert_array_equal(waveform, clip.waveform)


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_killed_build_does_not_pass_for_a_finished_one(tmp_path: Path) -> None:
    """Killed at the last moment, when all is written and not yet in its place."""
    folder = tmp_path / "synthetic_tempo"
    script = """
import os, pathlib, signal, sys, xares_onnx.data.synthetic as s
s.SPLITS = dict.fromkeys(s.SPLITS, 12)
s._put_in_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
s.build(sys.argv[1], pathlib.Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", script, "synthetic_tempo", str(folder)]
    assert subprocess.run(command, timeout=200).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*/*/*.tar"))) == len(SHARDS)
    assert not folder.exists()
    assert not is_built("synthetic_tempo", folder)


@pytest.mark.usefixtures("small")
def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path, samples: object) -> None:
        if path.name == SHARDS[1]:
            raise KeyboardInterrupt
        path.touch()

    monkeypatch.setattr(synthetic, "_write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build("synthetic_pitch", tmp_path / "data")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small")
def test_several_may_build_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(build, ["synthetic_pitch"] * 4, [folder] * 4))
    assert is_built("synthetic_pitch", folder)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.usefixtures("small")
def test_finished_build_is_kept_and_another_version_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data"
    build("synthetic_pitch", folder)
    first = digests(folder)
    written = (folder / SHARDS[0]).stat().st_ino
    build("synthetic_pitch", folder)
    assert (folder / SHARDS[0]).stat().st_ino == written
    monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    assert not is_built("synthetic_pitch", folder)
    build("synthetic_pitch", folder)
    assert is_built("synthetic_pitch", folder)
    assert digests(folder) != first
    (folder / SHARDS[2]).unlink()
    assert not is_built("synthetic_pitch", folder)


@pytest.mark.usefixtures("small")
def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "recording.wav"
    mine.parent.mkdir()
    mine.write_bytes(b"precious")
    with pytest.raises(DataError, match="mine contains files that were not built here"):
        build("synthetic_pitch", mine.parent)
    with pytest.raises(MachineError):
        build("synthetic_pitch", mine)
    assert mine.read_bytes() == b"precious"


def test_a_full_disk_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """webdataset's writer, left open, would complain on stderr once it is collected."""
    with small_disk(tmp_path / "disk", 600):
        with pytest.raises(DiskFullError, match="free some space and run again"):
            synthetic.build("synthetic_timbre", tmp_path / "disk" / "synthetic_timbre")
        gc.collect()
        assert not list((tmp_path / "disk").iterdir())
    assert capfd.readouterr().err == ""


# --- Scoring ---


@cache
def score(task: str, encoder: str) -> float:
    labels = LABELS[task]
    embeddings = {split: ENCODERS[encoder](task, split) for split in SPLITS}
    targets = {s: np.array([labels.index(class_of(clip)) for clip in split_of(task, s)]) for s in SPLITS}
    return train_head(embeddings, targets, len(labels), task_file(task), seed=0)


def train_head(
    embeddings: dict[str, Array], targets: dict[str, NDArray[np.int64]], classes: int, task: Task, seed: int
) -> float:
    """Accuracy on test of the project's own linear head."""
    bounds = np.cumsum([0, *(len(targets[split]) for split in SPLITS)])
    fold = Rows(*(np.arange(start, stop) for start, stop in pairwise(bounds)))
    x = np.concatenate([embeddings[split] for split in SPLITS]).astype(np.float32)
    y = np.concatenate([targets[split] for split in SPLITS])
    (result,) = train_linear(x, Classification(y, classes), np.arange(len(y)), [fold], task.head, [seed])
    return float((result.predictions == y[result.examples]).mean())


def class_of(clip: Clip) -> str:
    return str(clip.label["label"])


def digests(folder: Path) -> list[str]:
    return [hashlib.sha256((folder / shard).read_bytes()).hexdigest() for shard in SHARDS]


# --- Encoders: (task, split) -> one vector a clip, shape (clips, dim) ---


NOISE_SEED = 3  # of twelve seeds tried, four put one of the six tasks outside: as often as a 95 % interval should


def noise(task: str, split: str) -> Array:
    rng = np.random.default_rng([NOISE_SEED, *task.encode(), *split.encode()])
    return rng.standard_normal((SPLITS[split], 64))


def average_log_mel(task: str, split: str) -> Array:
    return np.array([log_mel(samples_of(clip)).mean(axis=0) for clip in split_of(task, split)])


def oracle(task: str, split: str) -> Array:
    return np.array([ORACLES[task](samples_of(clip)) for clip in split_of(task, split)])


ENCODERS: dict[str, Callable[[str, str], Array]] = {"noise": noise, "log_mel": average_log_mel, "oracle": oracle}


def fundamental_hz(waveform: Array, low: float, high: float) -> float:
    """The first lag, between those of `high` and `low` Hz, at which the signal is nearly itself again."""
    size, finer = 2 ** int(np.ceil(np.log2(2 * waveform.size))), 4
    power = np.abs(np.fft.rfft(waveform * np.hanning(waveform.size), size)) ** 2
    lags = np.fft.irfft(power, size * finer)[: int(finer * SAMPLE_RATE / low)]
    lags /= lags[0]
    lags[: max(int(finer * SAMPLE_RATE / high), int(np.argmax(lags < 0.5)))] = -1
    inner = lags[1:-1]
    peaks = 1 + np.flatnonzero((inner >= lags[:-2]) & (inner > lags[2:]) & (inner > 0.85 * lags.max()))
    return float(SAMPLE_RATE * finer / (peaks[0] if peaks.size else np.argmax(lags)))


def soft_chroma(waveform: Array) -> Array:
    semitones = 12 * np.log2(fundamental_hz(waveform[:8192], 55, 520) / 65.41)
    distance = (semitones - np.arange(12) + 6) % 12 - 6
    nearness: Array = np.exp(-(distance**2) / 2)
    return nearness


def harmonic_amplitudes(waveform: Array) -> Array:
    middle = waveform[4000:8096]
    number = np.fft.rfftfreq(middle.size, 1 / SAMPLE_RATE) / fundamental_hz(middle, 140, 470)
    power = np.abs(np.fft.rfft(middle * np.hanning(middle.size))) ** 2
    harmonics = np.array([power[np.abs(number - harmonic) < 0.3].sum() for harmonic in range(1, 9)])
    amplitudes: Array = np.sqrt(harmonics / harmonics.sum())
    return amplitudes


def predicted_spectrum(waveform: Array) -> Array:
    """Log spectrum, 200 to 4000 Hz, of a linear prediction of order 16."""
    power = np.abs(np.fft.rfft(np.diff(waveform), 2**15)) ** 2
    lags = np.fft.irfft(power)[:17]
    lags[0] *= 1.0001
    predictor = np.append(1, -solve_toeplitz(lags[:-1], lags[1:]))
    angles = 2 * np.pi * np.geomspace(200, 4000, 40) / SAMPLE_RATE
    spectrum: Array = -np.log(np.abs(np.exp(-1j * np.outer(angles, np.arange(17))) @ predictor))
    return spectrum


def log_spectrum(waveform: Array) -> Array:
    """Log power in 16 bands, 60 Hz to 7.8 kHz, without the line through them."""
    power = np.abs(np.fft.rfft(waveform, 2**15)) ** 2
    edges = (np.geomspace(60, 7800, 17) * 2**15 / SAMPLE_RATE).astype(int)
    bands = np.log(np.add.reduceat(power, edges)[:-1] / np.diff(edges))
    residue: Array = bands - np.polyval(np.polyfit(np.arange(16), bands, 1), np.arange(16))
    return residue


def envelope_spectrum(waveform: Array) -> Array:
    """How much the level beats at 2.5 to 20 Hz."""
    level = np.sqrt((frames(waveform, 160, 80) ** 2).mean(axis=1))
    spectrum = np.abs(np.fft.rfft((level - level.mean()) * np.hanning(level.size), 4096))
    beats = np.interp(np.geomspace(2.5, 20, 48), np.fft.rfftfreq(4096, 80 / SAMPLE_RATE), spectrum)
    relative: Array = beats / beats.max()
    return relative


def glides(waveform: Array) -> Array:
    """Median step of log f0 from frame to frame in either half, and their opposites."""
    octaves = np.log2([fundamental_hz(frame, 100, 900) for frame in frames(waveform, 800, 800)])
    middle = octaves.size // 2
    steps = [np.median(np.diff(half)) for half in (octaves[1:middle], octaves[middle + 1 : -1])]
    clipped: Array = np.clip(np.append(steps, np.negative(steps)), -0.2, 0.2) * 50
    return clipped


ORACLES: dict[str, Callable[[Array], Array]] = {
    "synthetic_pitch": soft_chroma,
    "synthetic_timbre": harmonic_amplitudes,
    "synthetic_vowel": predicted_spectrum,
    "synthetic_colour": log_spectrum,
    "synthetic_tempo": envelope_spectrum,
    "synthetic_contour": glides,
}
