"""Convex heads on frames: scikit-learn's on the same frames, thresholds chosen on the selection clips, flat memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from xares_onnx.data.sound_events import Events
from xares_onnx.errors import ScoreUndefinedError
from xares_onnx.metrics import segments as rasters
from xares_onnx.models import standardised
from xares_onnx.models.standardised import pool_of
from xares_onnx.probes.convex import FoldRows, OneAgainstTheRest
from xares_onnx.probes.convex_frames import THRESHOLDS, Clips, EventsResult, FrameRows, fit_frames

DIM, CLASSES, HOP, SEGMENT, WEIGHT = 8, 3, 0.04, 0.1, 4.0
ROWS = FoldRows(np.arange(30), np.arange(30, 50), np.arange(50, 70), held_out=np.arange(30, 50))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threadpool_limits(1):
        yield


def problem(kind: Any = np.float32) -> Clips:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLASSES, DIM))
    frames: list[NDArray[Any]] = []
    times, seconds, events = [], [], []
    for _ in range(70):
        count = int(rng.integers(1, 60))
        at = (np.arange(count) + 0.5) * HOP
        onsets = rng.uniform(-0.05, count * HOP, 1 + count // 8)
        happened = Events(onsets, onsets + rng.uniform(0, 0.5, len(onsets)), rng.integers(0, CLASSES, len(onsets)))
        active = rasters.frame_targets(happened.within(count * HOP), at, CLASSES)
        frames.append((active @ centres + rng.standard_normal((count, DIM))).astype(kind))
        times.append(at)
        seconds.append(count * HOP)
        events.append(happened)
    return Clips(frames, times, seconds, events, CLASSES)


def fit(clips: Clips, rows: FoldRows = ROWS, **options: Any) -> EventsResult:
    return fit_frames(clips, rows, WEIGHT, segment_seconds=SEGMENT, average="macro", **options)


def stacked(clips: Clips, chosen: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    x = np.concatenate([clips.frames[clip] for clip in chosen]).astype(np.float64)
    return x, np.concatenate([clips.targets(clip) for clip in chosen])


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_the_head_is_the_one_that_scikit_learn_finds(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standardised, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr(standardised, "_VALUES_KEPT", 10)
    clips = problem(kind)
    objective = OneAgainstTheRest(CLASSES, WEIGHT)
    x, targets = stacked(clips, ROWS.train)
    scaler = StandardScaler().fit(x)
    with pool_of(1) as pool:
        for fitted in list(objective.fits(FrameRows(clips, ROWS.train), pool))[::3]:
            logits = fitted.head.logits(x.astype(np.float32))
            for c in range(CLASSES):
                model = LogisticRegression(C=1 / (fitted.strength * len(x)), class_weight={0: 1, 1: WEIGHT}, tol=1e-9)
                expected = model.fit(scaler.transform(x), targets[:, c]).decision_function(scaler.transform(x))
                np.testing.assert_allclose(expit(logits[:, c]), expit(expected), atol=0.01)


def test_blocks_hold_every_frame_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = problem()
    chosen = np.array([5, 3, 60, 7])
    for size in (1, 7, 60, 10_000):
        monkeypatch.setattr(standardised, "ROWS_AT_ONCE", size)
        rows = FrameRows(clips, chosen)
        x, targets = stacked(clips, chosen)
        assert np.array_equal(np.concatenate([rows.block(n) for n in range(rows.blocks)]), x.astype(np.float32))
        assert np.array_equal(np.concatenate([rows.targets(n) for n in range(rows.blocks)]), targets)


def test_the_threshold_is_the_best_of_the_selection_clips_and_test_clips_choose_nothing() -> None:
    clips = problem()
    found = fit(clips)
    assert found.threshold in THRESHOLDS
    assert found.threshold > 0.5  # a positive counts four times, which one half would pay for
    assert found.predictions.shape == (20, CLASSES, 3)
    assert found.tried[found.chosen].selection == max(t.selection for t in found.tried)
    assert found.convergence.converged
    silent = Events(np.empty(0), np.empty(0), np.empty(0, np.int64))
    other = fit(replace(clips, events=[*clips.events[:50], *[silent] * 20]))
    assert (found.threshold, found.chosen) == (other.threshold, other.chosen)
    none = fit(clips, replace(ROWS, valid=ROWS.valid[:0], held_out=ROWS.valid[:0]))
    assert none.threshold == 0.5
    assert math.isnan(none.tried[0].selection)


def test_the_same_bytes_whatever_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standardised, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr(standardised, "_VALUES_KEPT", 10)
    clips = problem(np.float16)
    one, two = fit(clips), fit(clips, threads=2)
    assert one.predictions.tobytes() == two.predictions.tobytes()
    assert one.tuning == two.tuning


def test_offsets_and_scales_of_dimensions_move_no_score() -> None:
    clips = problem()
    rng = np.random.default_rng(1)
    scale, offset = 10 ** rng.uniform(-2, 2, (2, DIM))
    other = replace(clips, frames=[((x + offset) * scale).astype(np.float32) for x in clips.frames])
    for one, two in zip(fit(clips).tried, fit(other).tried, strict=True):
        assert two.test == pytest.approx(one.test, abs=0.01)


def test_frames_may_be_mapped_from_a_file(tmp_path: Path) -> None:
    clips = problem()
    bounds = np.cumsum([0, *(len(x) for x in clips.frames)])
    np.save(tmp_path / "frames.npy", np.concatenate(clips.frames))
    mapped = np.load(tmp_path / "frames.npy", mmap_mode="r")
    other = replace(clips, frames=[mapped[start:stop] for start, stop in itertools.pairwise(bounds)])
    assert fit(other).predictions.tobytes() == fit(clips).predictions.tobytes()


@pytest.mark.parametrize("clip", [3, 33, 55])
def test_one_frame_that_is_no_number_gives_no_score(clip: int) -> None:
    clips = problem()
    clips.frames[clip][0, 0] = math.nan
    with pytest.raises(ScoreUndefinedError, match="NaN or infinity"):
        fit(clips)
