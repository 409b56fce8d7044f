"""What the tests of the synthetic suite share: its clips and task files, and plain signal processing of our own."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xares_onnx.data.synthetic import SAMPLE_RATE, SPLITS, Clip, clips
from xares_onnx.data.task import Task, load_task

Array = NDArray[np.float64]


@cache
def split_of(task: str, split: str) -> tuple[Clip, ...]:
    return tuple(clips(task, split))


def all_of(task: str) -> list[Clip]:
    return [clip for split in SPLITS for clip in split_of(task, split)]


@cache
def task_file(task: str) -> Task:
    return load_task(Path(__file__).parents[2] / "tasks" / f"{task}.toml")


def samples_of(clip: Clip) -> Array:
    return clip.waveform.astype(np.float64)


def decibels(waveform: NDArray[np.float32]) -> float:
    return float(10 * np.log10(np.mean(waveform.astype(np.float64) ** 2)))


def frames(waveform: Array, size: int, hop: int) -> Array:
    return np.lib.stride_tricks.sliding_window_view(waveform, size)[::hop]


def log_mel(waveform: Array) -> Array:
    """25 ms frames every 10 ms, the first centred on 12.5 ms, shape (frames, 64)."""
    power = np.abs(np.fft.rfft(frames(waveform, 400, 160) * np.hanning(400), 512)) ** 2
    logarithms: Array = np.log(power @ _mel_filters() + 1e-10)
    return logarithms


@cache
def _mel_filters() -> Array:
    """64 triangles over 257 bins, 0 to 8 kHz, shape (257, 64)."""
    mels = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 66)
    edges = 700 * (10 ** (mels / 2595) - 1)
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    frequency = np.fft.rfftfreq(512, 1 / SAMPLE_RATE)[:, None]
    rising, falling = (frequency - low) / (centre - low), (high - frequency) / (high - centre)
    triangles: Array = np.maximum(0, np.minimum(rising, falling))
    return triangles
