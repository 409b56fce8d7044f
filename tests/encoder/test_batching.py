"""Which chunks share a call: equally long ones of a bounded window, by the shard alone, whoever calls and when."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_models import HOP, encoder, save

from xares_onnx.encoder.batching import Batching
from xares_onnx.encoder.encoder import Encoder, load_encoder
from xares_onnx.encoder.runner import ChunkRunner, Job
from xares_onnx.encoder.session import Session

RATE = 16_000
BATCHINGS = st.builds(
    Batching, st.integers(1, 5), st.integers(1, 8 * RATE), st.one_of(st.just(0), st.integers(1, 40 * RATE))
)


@given(st.lists(st.integers(1, 6), max_size=40), st.integers(1, 7), st.integers(1, 30))
def test_groups_hold_every_chunk_once_and_only_equal_lengths(lengths: list[int], items: int, call_samples: int) -> None:
    groups = Batching(items, call_samples, 1).groups(lengths)
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    assert [lengths[group[0]] for group in groups] == sorted((lengths[group[0]] for group in groups), reverse=True)
    for group in groups:
        assert group == sorted(group)
        assert len({lengths[number] for number in group}) == 1
        assert len(group) == 1 or len(group) <= min(items, call_samples // lengths[group[0]])
    for length in set(lengths):  # none is alone for nothing
        room = max(1, min(items, call_samples // length))
        assert sum(lengths[group[0]] == length for group in groups) == -(-lengths.count(length) // room)


class Recorded:
    """A model of one frame a hop, which tells of each call how long its items are and which there were."""

    def __init__(self, seed: int | None = None) -> None:
        self.calls: list[tuple[int, tuple[float, ...]]] = []
        self._lock = threading.Lock()
        self._rng = None if seed is None else np.random.default_rng(seed)

    def run_taps(self, batch: np.ndarray, taps: Any, held: Any) -> list[np.ndarray]:
        with self._lock:
            self.calls.append((batch.shape[1], tuple(batch[:, 0].tolist())))
            pause = 0.0 if self._rng is None else self._rng.uniform(0, 0.002)
        time.sleep(pause)
        frames = batch.shape[1] // HOP
        return [np.repeat(batch[:, :1, None], frames, axis=1).repeat(2, axis=2)]


def contract() -> Any:
    """As much of a contract as a runner reads, of a law without a receptive field."""
    return SimpleNamespace(
        sample_rate=RATE,
        chunk_samples=4 * RATE,
        min_samples=HOP,
        hop_samples=HOP,
        first_frame_center_samples=HOP / 2,
        dim=2,
        normalize="none",
        chunk_overlap=None,
        frames_of=lambda samples: samples // HOP,
    )


def runner(session: Any, batching: Batching, callers: int) -> ChunkRunner:
    spec: Any = SimpleNamespace(info=SimpleNamespace(contract=contract()), callers=callers)
    return ChunkRunner(session, spec, batching=batching, callers=callers)


def jobs(lengths: list[int]) -> list[Job]:
    return [Job(number, np.full(length, number + 1, np.float32)) for number, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 10 * RATE), max_size=12), BATCHINGS)
def test_every_chunk_comes_once_and_in_order(lengths: list[int], batching: Batching) -> None:
    session = Recorded()
    seen = [
        (job.tag, chunk.start, is_last, float(frames[0, 0]))
        for job, chunk, (frames,), is_last in runner(session, batching, 2).run(jobs(lengths))
    ]
    expected = [
        (number, start, start + 4 * RATE >= length, number + 1.0)
        for number, length in enumerate(lengths)
        for start in range(0, length, 4 * RATE)
    ]
    assert seen == expected
    assert sum(len(items) for _, items in session.calls) == len(expected)
    for samples, items in session.calls:
        assert len(items) == 1 or len(items) <= min(batching.items, batching.call_samples // samples)


@given(st.lists(st.sampled_from([RATE, 2 * RATE, 9 * RATE]), min_size=1, max_size=12), BATCHINGS)
def test_calls_depend_on_the_shard_alone(lengths: list[int], batching: Batching) -> None:
    """Not on how many call the model, nor on how long each call takes."""
    calls = []
    for callers, seed in [(1, None), (3, 0), (4, 1)]:
        session = Recorded(seed)
        list(runner(session, batching, callers).run(jobs(lengths)))
        calls.append(sorted(session.calls))
    assert calls[0] == calls[1] == calls[2]


@given(st.integers(1, 12), st.integers(1, 3))
def test_no_more_than_two_windows_are_read_ahead(clips: int, callers: int) -> None:
    """What waits for the model is bounded; every window of clips of a second is the same number of clips."""
    taken: list[int] = []

    def read() -> Iterator[Job]:
        for job in jobs([RATE] * 50):
            taken.append(job.tag)
            yield job

    window = Batching(items=4, call_samples=40 * RATE, window_samples=clips * RATE)
    for number, (job, *_) in enumerate(runner(Recorded(), window, callers).run(read())):
        assert job.tag == number
        assert len(taken) == min(50, (number // clips + 2) * clips)


def test_a_window_ends_in_the_midst_of_a_clip() -> None:
    """A recording of hours is held no longer than many clips."""
    session = Recorded()
    window = Batching(items=8, call_samples=400 * RATE, window_samples=12 * RATE)
    list(runner(session, window, 1).run(jobs([40 * RATE])))
    assert [len(items) for _, items in session.calls] == [3, 3, 3, 1]


def test_a_failure_ends_the_calls_that_wait() -> None:
    class Failing(Recorded):
        def run_taps(self, batch: np.ndarray, taps: Any, held: Any) -> list[np.ndarray]:
            super().run_taps(batch, taps, held)
            time.sleep(0.01)
            raise RuntimeError("no")

    session = Failing()
    with pytest.raises(RuntimeError, match="no"):
        list(runner(session, Batching(1, 1, 400 * RATE), 1).run(jobs([RATE] * 400)))
    assert len(session.calls) < 100


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = save(encoder(), tmp_path_factory.mktemp("model") / "m.onnx")
    with load_encoder(path, device="cpu") as loaded:
        yield loaded, Session(path, "cpu")


@given(st.lists(st.integers(1, 3 * RATE), min_size=1, max_size=8), BATCHINGS)
def test_embeddings_are_those_of_chunks_alone(
    model: tuple[Encoder, Session], lengths: list[int], batching: Batching
) -> None:
    loaded, session = model
    clips = [
        Job(number, (np.random.default_rng(number).standard_normal(length) * 0.1).astype(np.float32))
        for number, length in enumerate(lengths)
    ]
    alone = [frames for _, _, (frames,), _ in ChunkRunner(session, loaded.spec).run(clips)]
    shared = [frames for _, _, (frames,), _ in ChunkRunner(session, loaded.spec, batching=batching, callers=2).run(clips)]
    for a, b in zip(alone, shared, strict=True):
        np.testing.assert_allclose(b, a, atol=1e-6)
