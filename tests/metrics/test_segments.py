"""Events to frames to segments, against loops over every frame and segment, and against what X-ARES does with torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from xares_onnx.data.sound_events import Events
from xares_onnx.metrics.segments import (
    frame_targets,
    segment_count,
    segment_counts,
    segment_f1,
    segment_predictions,
    segment_targets,
    xares_frame_targets,
    xares_segments,
)

CLASSES = 3
Bools = NDArray[np.bool_]
Entry = tuple[float, float, int]


def events_of(entries: Sequence[Entry]) -> Events:
    bounds = np.array([entry[:2] for entry in entries], np.float64).reshape(-1, 2)
    return Events(bounds[:, 0], bounds[:, 1], np.array([entry[2] for entry in entries], np.int64))


def entries(unit: float, low: int, high: int, longest: int) -> st.SearchStrategy[list[Entry]]:
    """Events on a grid of `unit` seconds; a unit that is a power of two makes every sum and comparison exact."""
    one = st.tuples(st.integers(low, high), st.integers(0, longest), st.integers(0, CLASSES - 1))
    return st.lists(one.map(lambda e: (e[0] * unit, (e[0] + e[1]) * unit, e[2])), max_size=6)


def active(rows: int, *cells: tuple[int, int]) -> Bools:
    found = np.zeros((rows, CLASSES), np.bool_)
    for row, number in cells:
        found[row, number] = True
    return found


# ---------------------------------------------------------------- frames, on the clock


def test_an_event_covers_its_onset_and_not_its_offset() -> None:
    times = np.array([0.5, 1.5, 2.5, 3.5])
    found = frame_targets(events_of([(1.5, 3.5, 0), (0.6, 2.0, 2)]), times, CLASSES)
    np.testing.assert_array_equal(found, active(4, (1, 0), (2, 0), (1, 2)))


@pytest.mark.parametrize(
    ("onset", "offset", "frame"),
    [
        (1.6, 1.9, 1),
        (1.6, 2.5, 2),  # its middle decides, not its onset
        (1.5, 1.5, 1),  # no time at all
        (1.9, 2.1, 1),  # just between two: the earlier
        (0.0, 0.1, 0),
        (3.6, 3.9, 3),
    ],
)
def test_an_event_between_two_centres_marks_the_nearest(onset: float, offset: float, frame: int) -> None:
    found = frame_targets(events_of([(onset, offset, 1)]), np.array([0.5, 1.5, 2.5, 3.5]), CLASSES)
    np.testing.assert_array_equal(found, active(4, (frame, 1)))


@given(
    entries=entries(1 / 64, -20, 150, 60),
    gaps=st.lists(st.integers(1, 40), min_size=1, max_size=20),  # an encoder's hop may change between chunks
)
def test_frames_are_what_a_loop_finds(entries: list[Entry], gaps: list[int]) -> None:
    times = np.cumsum(gaps) / 64
    expected = np.zeros((len(times), CLASSES), np.bool_)
    for onset, offset, number in entries:
        covered = [i for i, time in enumerate(times) if onset <= time < offset]
        middle = (onset + offset) / 2
        covered = covered or [min(range(len(times)), key=lambda i: (abs(times[i] - middle), i))]
        expected[covered, number] = True
    found = frame_targets(events_of(entries), times, CLASSES)
    assert found.dtype == np.bool_
    np.testing.assert_array_equal(found, expected)


def test_only_what_lies_in_the_clip_is_kept() -> None:
    given_ = [(-2.0, -1.0, 0), (-1.0, 2.0, 1), (3.0, 5.0, 2), (4.5, 9.0, 0), (5.0, 6.0, 1), (4.0, 4.0, 2), (5.0, 5.0, 0)]
    found = events_of([*given_, (-3.0, -3.0, 1), (-1.0, 5e-7, 2), (-1.0, 9.0, 0), (5 - 5e-7, 6.0, 1), (0.0, 0.0, 1)]).within(
        5.0
    )
    expected = [(0.0, 2.0, 1), (3.0, 5.0, 2), (4.5, 5.0, 0), (4.0, 4.0, 2), (0.0, 5.0, 0), (0.0, 0.0, 1)]
    assert list(zip(found.onsets.tolist(), found.offsets.tolist(), found.classes.tolist(), strict=True)) == expected
    assert Events(np.zeros(0), np.zeros(0), np.zeros(0, np.int64), 7).within(5.0).outside == 7


# ---------------------------------------------------------------- segments, on the clock


@pytest.mark.parametrize(
    ("seconds", "length", "count"),
    [
        (10.0, 0.1, 100),
        (0.3, 0.1, 3),  # 0.3 / 0.1 is less than 3
        (0.7, 0.1, 7),  # 0.7 / 0.1 is less than 7
        (8.2, 0.1, 82),  # 8.2 / 0.1 is more than 82
        (9.5, 1.0, 10),
        (10.0, 1.0, 10),
        (10.0000005, 1.0, 10),  # a remainder that is rounding
        (10.00002, 1.0, 11),  # the remainder of one sample at 48 kHz
        (0.05, 0.1, 1),
        (0.0, 0.1, 1),
        (3600 * 24.0, 0.1, 864_000),
    ],
)
def test_number_of_segments(seconds: float, length: float, count: int) -> None:
    assert segment_count(seconds, length) == count
    assert len(segment_targets(events_of([]), seconds, length, CLASSES)) == count
    assert len(segment_predictions(active(1), np.array([0.01]), seconds, length)) == count


@given(tenths=st.integers(1, 100_000))
def test_tenths_of_a_second_are_as_many_segments(tenths: int) -> None:
    assert segment_count(tenths / 10, 0.1) == segment_count(tenths * 0.1, 0.1) == tenths


@pytest.mark.parametrize(
    ("onset", "offset", "segments"),
    [
        (0.2, 0.3, [2]),  # an offset on a boundary does not enter the next segment, nor does an onset leave it
        (0.3, 0.6, [3, 4, 5]),
        (0.29, 0.61, [2, 3, 4, 5, 6]),
        (0.2999995, 0.35, [3]),  # 0.5 us of overlap is none
        (0.299998, 0.35, [2, 3]),  # 2 us are
        (0.25, 0.3000005, [2]),
        (0.25, 0.300002, [2, 3]),
        (0.3, 0.3, [3]),  # no time, in the segment that begins there
        (0.65, 0.65, [6]),
        (0.31, 0.3100005, [3]),
        (0.2999995, 0.3000007, [3]),  # overlaps neither by enough: it begins, all but, at the boundary
        (0.2999985, 0.3000001, [2]),
        (-1.0, 0.15, [0, 1]),
        (0.75, 7.0, [7]),  # the last segment is short: 0.7 to 0.77
        (0.78, 0.79, []),  # past the end, though not past a whole segment
        (0.77, 0.77, []),
        (-1.0, 0.0, []),
    ],
)
def test_segments_of_one_event(onset: float, offset: float, segments: list[int]) -> None:
    found = segment_targets(events_of([(onset, offset, 1)]), 0.77, 0.1, CLASSES)
    np.testing.assert_array_equal(found, active(8, *((segment, 1) for segment in segments)))


@given(
    entries=entries(1 / 64, -40, 700, 200),
    seconds=st.integers(1, 640).map(lambda n: n / 64),
    length=st.sampled_from([1 / 64, 7 / 64, 0.25, 1.0, 20.0]),
)
def test_segments_are_what_a_loop_finds(entries: list[Entry], seconds: float, length: float) -> None:
    count = math.ceil(seconds / length)
    expected = np.zeros((count, CLASSES), np.bool_)
    for onset, offset, number in entries:
        for k in range(count):
            low, high = k * length, min((k + 1) * length, seconds)
            expected[k, number] |= min(offset, high) > max(onset, low) or low <= onset == offset < high
    np.testing.assert_array_equal(segment_targets(events_of(entries), seconds, length, CLASSES), expected)


@given(
    entries=st.lists(st.tuples(st.integers(-50, 1100), st.integers(0, 300), st.integers(0, CLASSES - 1)), max_size=6),
    hundredths=st.integers(1, 1000),
    length=st.integers(1, 120),
)
def test_segments_of_decimal_seconds_are_what_whole_numbers_find(entries: list[Entry], hundredths: int, length: int) -> None:
    """Events, durations and segments in hundredths of a second, which float64 does not hold exactly."""
    count = -(-hundredths // length)
    expected = np.zeros((count, CLASSES), np.bool_)
    for onset, duration, number in entries:
        for k in range(count):
            low, high = k * length, min((k + 1) * length, hundredths)
            expected[k, number] |= min(onset + duration, high) > max(onset, low) or (low <= onset < high and not duration)
    events = events_of([(onset / 100, (onset + duration) / 100, number) for onset, duration, number in entries])
    np.testing.assert_array_equal(segment_targets(events, hundredths / 100, length / 100, CLASSES), expected)


@given(
    data=st.data(),
    gaps=st.lists(st.integers(1, 90), min_size=1, max_size=25),
    seconds=st.integers(1, 700).map(lambda n: n / 64),
    length=st.sampled_from([1 / 64, 7 / 64, 0.25, 1.0, 20.0]),
)
def test_predicted_segments_are_what_a_loop_finds(
    data: st.DataObject, gaps: list[int], seconds: float, length: float
) -> None:
    times = (np.cumsum(gaps) - gaps[0] / 2) / 64
    frames = np.array(
        data.draw(st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=len(times), max_size=len(times)))
    )
    count = math.ceil(seconds / length)
    expected = np.zeros((count, 2), np.bool_)
    for k in range(count):
        low, high = k * length, min((k + 1) * length, seconds)
        held = [i for i, time in enumerate(times) if low <= time < (k + 1) * length or (k == count - 1 and time >= low)]
        held = held or [min(range(len(times)), key=lambda i: (abs(times[i] - (low + high) / 2), i))]
        expected[k] = frames[held].any(axis=0)
    found = segment_predictions(frames, times, seconds, length)
    assert found.dtype == np.bool_
    np.testing.assert_array_equal(found, expected)


def test_a_centre_on_a_boundary_belongs_to_the_segment_that_begins_there() -> None:
    times = np.arange(100) * 0.01  # 0.29 + 0.01 and 0.3 / 0.1 are not what they should be
    for frame in range(100):
        found = segment_predictions(active(100, (frame, 2)), times, 1.0, 0.1)
        np.testing.assert_array_equal(found, active(10, (frame // 10, 2)))


def test_a_centre_on_a_boundary_is_not_before_it_for_rounding() -> None:
    times = np.arange(40) / 10
    assert times[17] < 1.3 + 0.4
    assert times[3] < 0.1 + 0.2
    found = frame_targets(events_of([(1.3, 1.3 + 0.4, 0), (0.1 + 0.2, 0.5, 1)]), times, CLASSES)
    np.testing.assert_array_equal(found, active(40, *((i, 0) for i in range(13, 17)), (3, 1), (4, 1)))


@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 60), st.integers(40, 100), st.booleans(), st.integers(0, CLASSES - 1)),
        max_size=8,
    ),
    receptive_ms=st.sampled_from([0, 10, 25]),
)
def test_every_hop_gets_the_same_segments_from_its_own_targets(
    pieces: list[tuple[int, int, int, bool, int]], receptive_ms: int
) -> None:
    """10 s of sound, framed at 10, 20 and 40 ms, segments of 0.1 s and 1 s.

    The frames' targets give exactly the segments' targets wherever each event overlaps each segment that it touches by no
    less than one hop. That is more than "no shorter than the hop": an event that sticks out of a segment by 5 ms makes it
    active, though the event may cover none of its centres. Then the frames of a coarse hop miss a segment, and nothing else
    can be done: between two centres an encoder says nothing.
    """
    entries = []
    for segment, start, length, whole, number in pieces:  # within a segment of 0.1 s, or over many whole ones
        onset = segment + (0.3 if whole else start / 1000)
        entries.append((onset, onset + (0.4 if whole else min(length, 100 - start) / 1000), number))
    events, counts = events_of(entries), []
    for hop_ms in (10, 20, 40):
        # 16 kHz: the centre of the receptive field; the frames reach the end of the clip.
        times = (receptive_ms * 8 + np.arange(10_000 // hop_ms) * hop_ms * 16) / 16_000
        frames = frame_targets(events.within(10.0), times, CLASSES)
        for length in (0.1, 1.0):
            targets = segment_targets(events, 10.0, length, CLASSES)
            predictions = segment_predictions(frames, times, 10.0, length)
            counts.append((length, segment_counts(targets, predictions).tolist(), targets.sum(axis=0).tolist()))
    for length, found, positives in counts:
        assert found == [[count, 0, 0] for count in positives], length
        assert (length, found, positives) in counts[:2]


def test_a_hop_longer_than_a_segment_repeats_the_nearest_frame() -> None:
    times = np.array([0.1, 0.3, 0.5])
    found = segment_predictions(active(3, (1, 0)), times, 0.6, 0.05)
    # 0.175 is nearer to 0.1, 0.225 nearer to 0.3; at the other side 0.375 and 0.425.
    np.testing.assert_array_equal(np.flatnonzero(found[:, 0]), [4, 5, 6, 7])


# ---------------------------------------------------------------- X-ARES


@given(
    entries=entries(0.01, 0, 1200, 300),
    hop_ms=st.sampled_from([10, 12.5, 20, 25, 40, 62.5, 80, 320]),
    frames=st.integers(0, 600),
)
def test_xares_frames_are_what_its_slices_give(entries: list[Entry], hop_ms: float, frames: int) -> None:
    def to_frame(seconds: float) -> int:
        return math.ceil(seconds / (hop_ms / 1000))

    target = torch.zeros(CLASSES, to_frame(16))
    for onset, offset, number in entries:
        target[number, to_frame(onset) : to_frame(offset)] = 1
    extra = frames - target.shape[1]
    target = torch.nn.functional.pad(target, (0, extra)) if extra > 0 else target[:, :frames]
    found = xares_frame_targets(events_of(entries), frames, hop_ms / 1000, CLASSES)
    np.testing.assert_array_equal(found, target.T.numpy().astype(np.bool_))


def test_xares_rounds_up_what_floats_make_of_a_boundary() -> None:
    # 0.07 / 0.01 is more than 7, so its frame is 8; an event between two multiples of the hop is lost.
    found = xares_frame_targets(events_of([(0.07, 0.1, 0), (0.021, 0.029, 1), (-5.0, 0.01, 2)]), 12, 0.01, CLASSES)
    np.testing.assert_array_equal(found, active(12, (8, 0), (9, 0), (0, 2)))


@given(
    data=st.data(),
    hop_ms=st.sampled_from([10, 12.5, 20, 25, 40, 62.5, 80, 320]),
    segment_seconds=st.sampled_from([0.1, 0.5, 1.0]),
    extra=st.integers(0, 200),
)
def test_xares_segments_are_max_pooling(data: st.DataObject, hop_ms: float, segment_seconds: float, extra: int) -> None:
    kernel = math.ceil(segment_seconds / (hop_ms / 1000.0))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    frames = rng.random((kernel + extra, CLASSES)) < 1 / kernel
    pooled = torch.nn.functional.max_pool1d(torch.from_numpy(frames.T.astype(np.float32))[None], kernel_size=kernel)[0].T
    found = xares_segments(frames, hop_ms / 1000, segment_seconds)
    np.testing.assert_array_equal(found, pooled.numpy().astype(np.bool_))
    assert found.dtype == np.bool_


def test_xares_has_no_segment_of_fewer_frames() -> None:
    assert xares_segments(active(9), 0.01, 0.1).shape == (0, CLASSES)
    assert xares_segments(active(10), 0.01, 0.1).shape == (1, CLASSES)


# ---------------------------------------------------------------- the score


def stacked(seed: int, segments: int, silent: Sequence[int]) -> tuple[Bools, Bools]:
    """Targets and predictions of 5 classes; a class of `silent` has no positives, and no predictions if it is even."""
    rng = np.random.default_rng(seed)
    targets, predictions = rng.random((2, segments, 5)) < rng.random((2, 1, 5))
    for number in silent:
        targets[:, number] = False
        predictions[:, number] &= number % 2 == 1
    return targets, predictions


@given(
    seed=st.integers(0, 999), silent=st.sets(st.integers(0, 4)), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4)
)
def test_f1_is_scikit_learns(seed: int, silent: set[int], sizes: list[int]) -> None:
    targets, predictions = stacked(seed, sum(sizes), sorted(silent))
    cuts = np.cumsum(sizes)[:-1]
    pairs = zip(np.split(targets, cuts), np.split(predictions, cuts), strict=True)
    counts = np.sum([segment_counts(*pair) for pair in pairs], axis=0)
    assert counts.dtype == np.int64
    for average in ("macro", "micro"):
        expected = f1_score(targets, predictions, average=average, zero_division=0)
        assert segment_f1(counts, average, present_only=False) == pytest.approx(expected, abs=1e-12)
        present = targets.any(axis=0)
        found = float(segment_f1(counts, average, present_only=True))
        if not present.any():
            assert math.isnan(found)
        elif average == "macro":
            each = f1_score(targets, predictions, average=None, zero_division=0)
            assert found == pytest.approx(each[present].mean(), abs=1e-12)
        else:
            assert found == pytest.approx(expected, abs=1e-12)  # false positives of absent classes are false positives


def test_f1_of_many_counts_at_once() -> None:
    counts = np.array([[[3, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 2, 0]], [[2, 0, 2], [1, 0, 0]]])
    for kind in (np.int64, np.float64):  # sums of a bootstrap's resamples are floats
        macro = segment_f1(counts.astype(kind).reshape(3, 1, 2, 3), "macro", present_only=True)
        np.testing.assert_allclose(macro, [[0.75], [np.nan], [(2 / 3 + 1) / 2]])
        np.testing.assert_allclose(segment_f1(counts.astype(kind), "macro", present_only=False), [0.375, 0, 5 / 6])
        np.testing.assert_allclose(segment_f1(counts.astype(kind), "micro", present_only=True), [0.75, np.nan, 0.75])
        np.testing.assert_allclose(segment_f1(counts.astype(kind), "micro", present_only=False), [0.75, 0, 0.75])


def test_counts_are_hits_false_alarms_and_misses() -> None:
    targets = np.array([[1, 0], [1, 0], [1, 1], [0, 0], [0, 1], [1, 0]], np.bool_)
    predictions = np.array([[1, 1], [0, 1], [0, 1], [1, 0], [0, 1], [0, 0]], np.bool_)
    np.testing.assert_array_equal(segment_counts(targets, predictions), [[1, 1, 3], [2, 2, 0]])
