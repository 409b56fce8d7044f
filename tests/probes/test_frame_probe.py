"""The frame heads against the plainest way to train one: torch's own layers, loss and optimiser, a head at a time."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import f1_score
from torch import nn

from xares_onnx.data.sound_events import Events
from xares_onnx.errors import ScoreUndefinedError
from xares_onnx.probes import frames as probe
from xares_onnx.probes.frames import FrameHeads, train_frames
from xares_onnx.probes.training import HeadResult, Rows

DIM, CLASSES, HOP, SEGMENT = 8, 3, 0.04, 0.1
Parameters = dict[str, NDArray[np.float32]]  # of one head
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Settings:
    epochs: int = 5
    batch_size: int = 2
    learning_rate: float = 0.03
    positive_weight: float = 1.0


@dataclass(frozen=True)
class Problem:
    """Clips of different lengths in which classes come and go, hard enough for F1 to lie between 0 and 1."""

    frames: list[NDArray[Any]]
    times: list[NDArray[np.float64]]
    seconds: list[float]
    events: list[Events]
    folds: list[Rows]

    def train(self, settings: Settings, seeds: Sequence[int], folds: int | None = None, **options: Any) -> list[HeadResult]:
        options = {"segment_seconds": SEGMENT, "average": "macro", **options}
        clips = (self.frames, self.times, self.seconds, self.events)
        return train_frames(*clips, self.folds[:folds], CLASSES, settings, seeds, **options)


def problem(
    sizes: Sequence[tuple[int, int, int]],
    *,
    noise: float = 1.0,
    seed: int = 0,
    silent: Sequence[int] = (),
    longest: int = 40,
) -> Problem:
    """Folds of (train, valid, test) clips. Event times are no multiples of hop or segment, so that no rounding matters."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((CLASSES, DIM))
    frames, times, seconds, events = [], [], [], []
    for clip in range(max(sum(size) for size in sizes)):
        count = int(rng.integers(1, longest))
        at = (np.arange(count) + 0.5) * HOP
        onsets = rng.uniform(-0.05, count * HOP, 0 if clip in silent else 1 + count // 6)
        found = Events(onsets, onsets + rng.uniform(0, 0.5, len(onsets)), rng.integers(0, CLASSES, len(onsets)))
        x = looped_targets(found, at, count * HOP) @ centres + noise * rng.standard_normal((count, DIM))
        # LayerNorm must matter: scale and offset of each frame are arbitrary.
        frames.append((x * rng.uniform(0.5, 20, (count, 1)) + 3).astype(np.float32))
        times.append(at)
        seconds.append(count * HOP)
        events.append(found)
    folds = []
    for train, valid, test in sizes:
        order = rng.permutation(len(frames))[: train + valid + test]
        folds.append(Rows(*np.split(order, [train, train + valid])))
    return Problem(frames, times, seconds, events, folds)


# ---------------------------------------------------------------- the reference


def looped_targets(events: Events, times: NDArray[np.float64], seconds: float) -> Bools:
    targets = np.zeros((len(times), CLASSES), np.bool_)
    for onset, offset, number in zip(events.onsets, events.offsets, events.classes, strict=True):
        onset, offset = max(onset, 0.0), min(offset, seconds)
        if offset > onset:
            covered = (times >= onset) & (times < offset)
            targets[covered if covered.any() else np.argmin(np.abs(times - (onset + offset) / 2)), number] = True
    return targets


def looped_segments(p: Problem, clip: int, active: Bools) -> tuple[Bools, Bools]:
    """Targets and predictions (segments, classes)."""
    events, times, seconds = p.events[clip], p.times[clip], p.seconds[clip]
    count = math.ceil(seconds / SEGMENT - 1e-5)
    targets, predictions = np.zeros((2, count, CLASSES), np.bool_)
    for k in range(count):
        low, high = k * SEGMENT, min((k + 1) * SEGMENT, seconds)
        for onset, offset, number in zip(events.onsets, events.offsets, events.classes, strict=True):
            targets[k, number] |= min(offset, high) - max(onset, low) > 1e-6
        held = (times >= low - 1e-6) & (times < high - 1e-6)
        predictions[k] = (active[held] if held.any() else active[[np.argmin(np.abs(times - (low + high) / 2))]]).any(axis=0)
    return targets, predictions


def xares_targets(events: Events, frames: int, hop: float) -> Bools:
    targets = np.zeros((10_000, CLASSES), np.bool_)
    for onset, offset, number in zip(events.onsets, events.offsets, events.classes, strict=True):
        targets[max(0, math.ceil(onset / hop)) : max(0, math.ceil(offset / hop)), number] = True
    return targets[:frames]


def pooled(active: Bools, hop: float) -> Bools:
    width = math.ceil(SEGMENT / hop)
    if len(active) < width:
        return active[:0]  # max_pool1d refuses
    found = nn.functional.max_pool1d(torch.from_numpy(active.T.astype(np.float32))[None], width)
    return found[0].T.numpy().astype(np.bool_)


@dataclass
class Reference:
    initial: Parameters
    scores: list[float] = field(default_factory=list)  # of validation, an epoch each
    best: Parameters = field(default_factory=dict)
    last: Parameters = field(default_factory=dict)
    counts: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def train_one(
    p: Problem, fold: int, seed: int, settings: Settings, average: str = "macro", hop: float | None = None
) -> Reference:
    """One head, trained by autograd. The draws are probe's: weights, biases, then a permutation of the clips an epoch."""
    rng = np.random.default_rng([seed, fold])
    bound = 1 / DIM**0.5
    norm, linear = nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(rng.uniform(-bound, bound, (DIM, CLASSES)).T))
        linear.bias.copy_(torch.tensor(rng.uniform(-bound, bound, CLASSES)))
    model = nn.Sequential(norm, linear)
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(float(settings.positive_weight)))
    part = p.folds[fold]
    x = [torch.from_numpy(np.array(frames, np.float32)) for frames in p.frames]
    y = []
    for events, times, seconds in zip(p.events, p.times, p.seconds, strict=True):
        y.append(looped_targets(events, times, seconds) if hop is None else xares_targets(events, len(times), hop))

    def parameters() -> Parameters:
        named = {"scale": norm.weight, "shift": norm.bias, "weight": linear.weight.T, "bias": linear.bias}
        return {name: value.detach().numpy().copy() for name, value in named.items()}

    def segments(clip: int) -> tuple[Bools, Bools]:
        with torch.no_grad():
            active = model(x[clip]).sigmoid().round().bool().numpy()
        return looped_segments(p, clip, active) if hop is None else (pooled(y[clip], hop), pooled(active, hop))

    def score(clips: NDArray[np.int64]) -> float:
        targets, predictions = (np.concatenate(parts) for parts in zip(*map(segments, clips), strict=True))
        if average == "micro":
            return float(f1_score(targets, predictions, average="micro", zero_division=0))
        each = f1_score(targets, predictions, average=None, zero_division=0)
        return float(each[targets.any(axis=0)].mean() if hop is None else each.mean())

    def count(clip: int) -> NDArray[np.int64]:
        targets, predictions = segments(clip)
        hits, alarms, misses = targets & predictions, predictions & ~targets, targets & ~predictions
        return np.array([[part[:, c].sum() for part in (hits, alarms, misses)] for c in range(CLASSES)], np.int64)

    found = Reference(parameters())
    adam = torch.optim.Adam(model.parameters())
    best = -1.0
    for epoch in range(settings.epochs):
        for group in adam.param_groups:
            group["lr"] = settings.learning_rate * (0.55 + 0.45 * np.cos(np.pi * epoch / settings.epochs))
        order = rng.permutation(part.train)
        for start in range(0, len(order), settings.batch_size):
            batch = order[start : start + settings.batch_size]
            adam.zero_grad()
            targets = torch.from_numpy(np.concatenate([y[clip] for clip in batch])).float()
            loss(model(torch.cat([x[clip] for clip in batch])), targets).backward()
            adam.step()
        if len(part.valid):
            found.scores.append(score(part.valid))
        if not len(part.valid) or found.scores[-1] > best:
            best = found.scores[-1] if len(part.valid) else -1.0
            found.best = parameters()
            found.counts = np.stack([count(clip) for clip in np.unique(part.test)])
    found.last = parameters()
    return found


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, Any]:
    """After a training: from the bytes of a head's first weights to a function that gives its chosen parameters."""
    found: dict[bytes, Any] = {}

    class Watched(FrameHeads):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            for h in range(len(self.weight)):
                found[self.weight[h].numpy().tobytes()] = lambda h=h: {
                    "scale": self.scale[h, 0].numpy(),
                    "shift": self.shift[h, 0].numpy(),
                    "weight": self.weight[h].numpy(),
                    "bias": self.bias[h, 0].numpy(),
                }

    monkeypatch.setattr(probe, "FrameHeads", Watched)
    return found


def start_of(seed: int, fold: int) -> bytes:
    drawn = np.random.default_rng([seed, fold]).uniform(-(DIM**-0.5), DIM**-0.5, (DIM, CLASSES))
    return drawn.astype(np.float32).tobytes()


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("sizes", "settings", "block", "hop"),
    [
        # The first and the last fold end their epochs sooner; a block ends within clips and holds several.
        ([(7, 0, 4), (12, 0, 4), (5, 0, 6)], Settings(batch_size=3), 16, None),
        ([(9, 0, 4), (4, 0, 4)], Settings(batch_size=1, positive_weight=10.0), 7, None),  # MAESTRO's
        ([(3, 0, 4), (14, 0, 4)], Settings(batch_size=8, positive_weight=0.3), 512, None),  # more than a fold, in one block
        ([(9, 0, 4), (6, 0, 4)], Settings(batch_size=2, positive_weight=3.0), 16, 0.03),  # X-ARES's raster with a wrong hop
    ],
)
def test_every_head_is_trained_as_if_it_were_alone(
    sizes: list[tuple[int, int, int]],
    settings: Settings,
    block: int,
    hop: float | None,
    heads: dict[bytes, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probe, "_FRAMES_AT_ONCE", block)
    p, seeds = problem(sizes), (7, 0)
    results = p.train(settings, seeds, hop_seconds=hop)
    assert [(result.fold, result.seed) for result in results] == [(f, s) for f in range(len(sizes)) for s in (0, 7)]
    for result in results:
        reference = train_one(p, result.fold, result.seed, settings, hop=hop)
        parameters = heads[start_of(result.seed, result.fold)]()
        for name, expected in reference.last.items():
            np.testing.assert_allclose(parameters[name], expected, atol=1e-4, err_msg=f"{name} of {result.fold}")
            assert np.abs(expected - reference.initial[name]).max() > 0.05  # there was something to get wrong
        np.testing.assert_array_equal(result.examples, np.unique(p.folds[result.fold].test))
        np.testing.assert_array_equal(result.predictions, reference.counts)
        assert result.predictions.dtype == np.int64
        assert result.best_epoch == settings.epochs  # nothing to select by, so the last
        assert math.isnan(result.valid_score)


@pytest.mark.parametrize(("average", "hop"), [("macro", None), ("micro", None), ("macro", 0.04), ("micro", 0.04)])
def test_the_best_epoch_is_the_first_strict_maximum_of_f1(average: str, hop: float | None, heads: dict[bytes, Any]) -> None:
    p = problem([(10, 3, 6), (14, 2, 6)], longest=15)
    if average == "macro":  # one class is never to be found in the validation clips: X-ARES counts it as 0
        for clip in np.concatenate([fold.valid for fold in p.folds]):
            p.events[clip].classes[p.events[clip].classes == 0] = 1
    settings = Settings(epochs=12, learning_rate=0.05)
    ties, early = 0, 0
    for result in p.train(settings, range(5), average=average, hop_seconds=hop):
        reference = train_one(p, result.fold, result.seed, settings, average, hop)
        best = max(reference.scores)
        assert result.valid_score == pytest.approx(best)
        assert result.best_epoch == reference.scores.index(best) + 1
        for name, expected in reference.best.items():
            np.testing.assert_allclose(heads[start_of(result.seed, result.fold)]()[name], expected, atol=1e-4)
        np.testing.assert_array_equal(result.predictions, reference.counts)
        ties += reference.scores.count(best) > 1
        early += result.best_epoch < settings.epochs
    assert ties  # so that "first" was tested
    assert early >= 2  # and "best"


def test_the_size_of_a_block_changes_nothing(heads: dict[bytes, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem([(9, 4, 6), (6, 4, 6)])
    runs = []
    for block in (1, 7, 64, 10_000):
        monkeypatch.setattr(probe, "_FRAMES_AT_ONCE", block)
        results = p.train(Settings(positive_weight=3.0), (0, 1))
        runs.append((results, {key: make() for key, make in heads.items()}))
    for results, parameters in runs[:-1]:
        for one, whole in zip(results, runs[-1][0], strict=True):
            np.testing.assert_array_equal(one.predictions, whole.predictions)
            assert (one.best_epoch, one.valid_score) == (whole.best_epoch, whole.valid_score)
        for key, named in runs[-1][1].items():
            for name, value in named.items():
                np.testing.assert_allclose(parameters[key][name], value, atol=1e-6, rtol=1e-5)


def test_other_folds_and_seeds_change_no_bit(heads: dict[bytes, Any]) -> None:
    p = problem([(9, 4, 6), (5, 4, 6), (14, 4, 6)])
    together = {(r.fold, r.seed): r for r in p.train(Settings(), (0, 1, 2))}
    kept = {key: {name: value.tobytes() for name, value in make().items()} for key, make in heads.items()}
    alone = {(r.fold, r.seed): r for r in p.train(Settings(), (1,), folds=2)}
    assert set(alone) == {(0, 1), (1, 1)}
    for (fold, seed), result in alone.items():
        found = {name: value.tobytes() for name, value in heads[start_of(seed, fold)]().items()}
        assert found == kept[start_of(seed, fold)]
        np.testing.assert_array_equal(result.predictions, together[fold, seed].predictions)
        assert (result.best_epoch, result.valid_score) == (together[fold, seed].best_epoch, together[fold, seed].valid_score)


def test_the_same_bytes_twice_whatever_the_threads(heads: dict[bytes, Any]) -> None:
    p = problem([(9, 4, 6)], longest=300)
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            meanwhile: list[int] = []
            p.train(Settings(epochs=2), (0, 1), on_epoch=lambda _, seen=meanwhile: seen.append(torch.get_num_threads()))
            assert meanwhile == [1, 1]  # threads would share out the sums of a product
            assert torch.get_num_threads() == threads  # the caller's setting is given back
        finally:
            torch.set_num_threads(1)
        runs.append({key: [value.tobytes() for value in make().values()] for key, make in heads.items()})
    assert len(runs[0]) == 2
    assert runs[0] == runs[1]


def test_frames_may_be_float16_in_a_mapped_file(tmp_path: Path, heads: dict[bytes, Any]) -> None:
    p = problem([(9, 4, 6)])
    lengths = [len(frames) for frames in p.frames]
    path = tmp_path / "frames"
    np.concatenate(p.frames).astype(np.float16).tofile(path)
    mapped = np.split(np.memmap(path, np.float16, "r").reshape(-1, DIM), np.cumsum(lengths)[:-1])
    single = [frames.astype(np.float32) for frames in mapped]
    stored = Problem([*mapped[:3], *single[3:]], p.times, p.seconds, p.events, p.folds)
    loaded = Problem(single, p.times, p.seconds, p.events, p.folds)
    runs = []
    for these in (stored, loaded):
        results = these.train(Settings(), (0,))
        runs.append(([value.tobytes() for value in heads[start_of(0, 0)]().values()], results[0].predictions.tolist()))
    assert runs[0] == runs[1]
    assert path.read_bytes() == np.concatenate(p.frames).astype(np.float16).tobytes()


def test_a_long_recording_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, dim, path = 60_000, 128, tmp_path / "frames"
    blocks: list[int] = []

    def watched(x: torch.Tensor) -> torch.Tensor:
        blocks.append(len(x))
        return torch.nn.functional.layer_norm(x, x.shape[-1:])

    monkeypatch.setattr(probe, "normalised", watched)
    np.tile(np.random.default_rng(0).standard_normal((600, dim)).astype(np.float16), (100, 1)).tofile(path)
    recording = np.memmap(path, np.float16, "r").reshape(count, dim)
    times = (np.arange(count) + 0.5) * 0.01
    events = Events(times[:-10:50], times[:-10:50] + 0.3, np.zeros(len(times[:-10:50]), np.int64))
    clips = np.zeros(1, np.int64)
    fold, settings = Rows(clips, clips, clips), Settings(epochs=1, batch_size=1)
    tracemalloc.start()
    try:
        train_frames(
            [recording], [times], [600.0], [events], [fold], 2, settings, (0,), segment_seconds=0.1, average="micro"
        )
        peak = tracemalloc.get_traced_memory()[1]  # of what numpy holds
    finally:
        tracemalloc.stop()
    assert peak < recording.nbytes / 3
    assert max(blocks) <= 4096
    assert sum(blocks) == 3 * count  # trained, validated and tested, each frame once


@pytest.mark.parametrize("hop", [None, HOP])
def test_a_toy_set_is_learnt(hop: float | None) -> None:
    """Events last whole hops, and a segment is whole hops, so that frames can give every segment."""
    rng = np.random.default_rng(1)
    silence, centres = rng.standard_normal(DIM), rng.standard_normal((CLASSES, DIM))
    p = problem([(40, 8, 20)], longest=60)
    for clip, events in enumerate(p.events):
        onsets, offsets = (np.round(instants / HOP) * HOP for instants in (events.onsets, events.offsets + HOP))
        p.events[clip] = Events(onsets, offsets, events.classes)
        # The clock's frames are what their centres hear, X-ARES's what its raster says.
        y = looped_targets(p.events[clip], p.times[clip], p.seconds[clip])
        shown = y if hop is None else xares_targets(p.events[clip], len(y), hop)
        p.frames[clip] = (silence + shown @ centres + 0.05 * rng.standard_normal((len(y), DIM))).astype(np.float32)
    (result,) = p.train(Settings(epochs=30), (0,), segment_seconds=5 * HOP, hop_seconds=hop)
    hits, alarms, misses = result.predictions.sum(axis=0).T
    assert (hits + misses).min() > 20
    assert (2 * hits / (2 * hits + alarms + misses)).min() > 0.95


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_silent_clips(average: str) -> None:
    p = problem([(8, 3, 4)])
    everywhere = Problem(p.frames, p.times, p.seconds, [events_without(events) for events in p.events], p.folds)
    (result,) = everywhere.train(Settings(epochs=4), (0,), average=average)
    assert math.isnan(result.valid_score)
    assert result.best_epoch == 4  # nothing to select by
    assert not result.predictions[:, :, [0, 2]].any()
    (result,) = everywhere.train(Settings(epochs=4), (0,), average=average, hop_seconds=HOP)
    assert (result.valid_score, result.best_epoch) == (0.0, 1)  # X-ARES's F1 is 0, so the first
    # Silence is trained on: claims are unlearnt where there are only silent clips.
    (result,) = everywhere.train(Settings(epochs=60), (0,), average=average)
    assert not result.predictions.any()


def events_without(events: Events) -> Events:
    return Events(events.onsets[:0], events.offsets[:0], events.classes[:0])


def test_clips_of_a_single_frame() -> None:
    p = problem([(6, 3, 4)], longest=2)
    assert {len(frames) for frames in p.frames} == {1}
    settings = Settings(batch_size=1)
    (result,) = p.train(settings, (0,), average="micro")
    reference = train_one(p, 0, 0, settings, "micro")
    np.testing.assert_array_equal(result.predictions, reference.counts)
    assert result.valid_score == pytest.approx(max(reference.scores))


def test_examples_are_each_test_clip_once_in_ascending_order() -> None:
    p = problem([(6, 3, 4)])
    test = p.folds[0].test
    twice = Rows(p.folds[0].train, p.folds[0].valid, np.concatenate([np.sort(test)[::-1], test[:2]]))
    (result,) = Problem(p.frames, p.times, p.seconds, p.events, [twice]).train(Settings(), (0,))
    (once,) = p.train(Settings(), (0,))
    np.testing.assert_array_equal(result.examples, np.sort(test))
    np.testing.assert_array_equal(result.predictions, once.predictions)


def test_test_events_select_nothing() -> None:
    p = problem([(8, 4, 8)])
    events = [events_without(e) if clip in p.folds[0].test else e for clip, e in enumerate(p.events)]
    for one, other in zip(
        p.train(Settings(epochs=8), range(3)),
        Problem(p.frames, p.times, p.seconds, events, p.folds).train(Settings(epochs=8), range(3)),
        strict=True,
    ):
        assert (one.best_epoch, one.valid_score) == (other.best_epoch, other.valid_score)
        # What is called active is the same: it is only counted as false.
        np.testing.assert_array_equal(one.predictions[..., :2].sum(axis=-1), other.predictions[..., :2].sum(axis=-1))


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_infinity_is_no_score(part: str) -> None:
    p = problem([(6, 2, 3)])
    p.frames[getattr(p.folds[0], part)[0]][0, 0] = np.inf
    with pytest.raises(ScoreUndefinedError, match="NaN or infinity"):
        p.train(Settings(epochs=2), (0,))


def test_every_epoch_is_told() -> None:
    told: list[int] = []
    problem([(6, 2, 3), (3, 2, 3)]).train(Settings(epochs=4), (0, 1), on_epoch=told.append)
    assert told == [1, 2, 3, 4]
