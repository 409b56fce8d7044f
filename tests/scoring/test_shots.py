"""Heads on few clips per class: what they score, against scikit-learn, and what is said of classes that are too small."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from xares_onnx.data.shards import Clips
from xares_onnx.data.targets import ClassTarget
from xares_onnx.data.task import Data, Head, Score, Task
from xares_onnx.errors import UsageError
from xares_onnx.probes import convex
from xares_onnx.scoring.dataset import Dataset
from xares_onnx.scoring.folds import Fold
from xares_onnx.scoring.kinds import Tools
from xares_onnx.scoring.kinds.classes import Classes
from xares_onnx.scoring.protocol import Protocol
from xares_onnx.scoring.shots import DRAWS, Shots, checked_shots, score_shots

NAMES = ("wind", "rain", "dog", "tram")
DIM = 16
TASK = Task(
    name="places",
    title="Places",
    domain="environment",
    data=Data(splits={"train": "train.tar", "test": "test.tar"}),
    target=ClassTarget("label", NAMES),
    head=Head("linear", epochs=1),
    score=Score("accuracy"),
)


def kind(
    sizes: tuple[int, ...] = (30, 30, 30, 30), *, crops: int = 1, order: int = 0, folds: int = 1, threads: int = 1
) -> Classes:
    """Classes around centres of their own; a tenth of the training clips is held out, 200 are tested."""
    draw = np.random.default_rng(5)
    labels = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), draw.integers(0, len(sizes), 200)])
    train, test = np.split(np.arange(len(labels)), [sum(sizes)])
    centres = draw.standard_normal((len(sizes), DIM))
    clips = np.repeat(np.arange(len(labels)), crops)
    x = (centres[labels[clips]] + 1.5 * draw.standard_normal((len(clips), DIM))).astype(np.float32)
    # The same clips in another order, as of other shards.
    moved = np.random.default_rng(order).permutation(len(labels)) if order else np.arange(len(labels))
    place = np.argsort(moved)
    by_crop = np.argsort(place[clips], kind="stable")
    dataset = Dataset(
        embeddings=x[by_crop],
        clip_of_crop=place[clips][by_crop],
        labels=labels[moved].tolist(),
        keys=[f"clip{clip:03}" for clip in moved],
        parts={},
        clips=Clips(expected=len(labels), read=len(labels), dropped=[]),
        audio_seconds=0.0,
        damage=[],
    )
    train, test = np.sort(place[train]), np.sort(place[test])
    fold = Fold("0", train[10:], train[:10], test, held_out=train[:10])
    tools = Tools(threads=threads)
    return Classes(TASK, Protocol("corrected"), dataset, [replace(fold, name=str(i)) for i in range(folds)], tools)


def reference(of: Classes, count: int) -> list[float]:
    """scikit-learn's accuracy of every draw, on the clips that the rule of the docstring draws."""
    dataset, fold = of.dataset, of.folds[0]
    labels, scores = np.array(dataset.labels), []
    for draw in range(DRAWS):
        drawn: list[int] = []
        for label in range(len(NAMES)):
            pool = [clip for clip in (*fold.train.tolist(), *fold.held_out.tolist()) if labels[clip] == label]
            pool.sort(key=lambda clip: hashlib.sha256(f"shots/{draw}/{dataset.keys[clip]}".encode()).digest())
            drawn += pool[:count]
        crops = dataset.crops_of(np.array(sorted(drawn)))
        x = dataset.embeddings.astype(np.float64)
        scaler = StandardScaler().fit(x[crops])
        settings: dict[str, Any] = {"C": 1 / (1e-3 * len(crops)), "tol": 1e-8, "max_iter": 1000}
        model = LogisticRegression(**settings).fit(scaler.transform(x[crops]), labels[dataset.clip_of_crop[crops]])
        means = [model.predict_proba(scaler.transform(x[dataset.clip_of_crop == clip])).mean(axis=0) for clip in fold.test]
        scores.append(float((np.argmax(means, axis=1) == labels[fold.test]).mean()))
    return scores


@pytest.fixture(scope="module")
def rows() -> list[Shots]:
    return score_shots(kind(), (1, 2, 4, 8, 16))


def test_scores_grow_with_the_clips(rows: list[Shots]) -> None:
    scores = [row.score or 0.0 for row in rows]
    assert [row.clips_per_class for row in rows] == [1, 2, 4, 8, 16]
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 0.15 > 0.4
    for row in rows:
        assert row.ci95 is not None
        assert row.score == pytest.approx(np.mean(row.draws))
        assert row.ci95[0] < (row.score or 0.0) < row.ci95[1]
        assert (len(row.draws), row.note) == (DRAWS, None)


def test_the_interval_covers_the_draws_too(rows: list[Shots]) -> None:
    """Of 200 clips alone it would be at most 0.14 wide."""
    first = rows[0]
    assert first.ci95 is not None
    assert np.std(first.draws) > 0.03
    assert first.ci95[1] - first.ci95[0] > 2 * 2.2 * np.std(first.draws, ddof=1) / np.sqrt(DRAWS)


@pytest.mark.parametrize(("count", "crops"), [(1, 1), (4, 1), (16, 1), (4, 3)])
def test_every_draw_is_scikit_learns(count: int, crops: int) -> None:
    of = kind(crops=crops)
    (row,) = score_shots(of, (count,))
    expected = reference(of, count)
    assert row.score == pytest.approx(np.mean(expected), abs=0.005)
    np.testing.assert_allclose(row.draws, expected, atol=0.02)


def test_the_order_of_the_clips_changes_no_draw(rows: list[Shots]) -> None:
    again = score_shots(kind(order=3), (1, 4))
    for row, first in zip(again, (rows[0], rows[2]), strict=True):
        np.testing.assert_allclose(row.draws, first.draws, atol=0.011)


def test_the_same_bytes_twice(rows: list[Shots]) -> None:
    assert score_shots(kind(), (1, 2, 4, 8, 16)) == rows


def test_the_same_bytes_with_two_threads_which_share_the_heads(rows: list[Shots], monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=60)
    fit, waiting = convex.fit_fold, [True, True]

    def together(*args: Any, **options: Any) -> Any:
        """Each of the first two fits waits for the other, so that one thread alone would never end."""
        if waiting:
            waiting.pop()
            both.wait()
        return fit(*args, **options)

    monkeypatch.setattr(convex, "fit_fold", together)
    told: list[tuple[int, int]] = []
    threads = set()

    def on_draw(done: int, of: int) -> None:
        told.append((done, of))
        threads.add(threading.current_thread())

    assert score_shots(kind(threads=2), (1, 2, 4, 8, 16), on_draw) == rows
    assert told == [(n, 5 * DRAWS) for n in range(1, 5 * DRAWS + 1)]
    assert threads == {threading.current_thread()}


def test_one_count_does_not_depend_on_the_others(rows: list[Shots]) -> None:
    assert score_shots(kind(), (8,)) == [rows[3]]


def test_held_out_clips_are_drawn_as_well() -> None:
    """The first class has no clips beside those that are held out."""
    of = kind((10, 30, 30, 30))
    (row,) = score_shots(of, (8,))
    assert row.note is None
    np.testing.assert_allclose(row.draws, reference(of, 8), atol=0.02)


def test_a_small_class_gives_all_it_has() -> None:
    of = kind((3, 30, 30, 30))
    few, many = score_shots(of, (2, 8))
    assert few.note is None
    assert many.note == "1 of 4 classes have fewer than 8 training clips and give all they have"
    np.testing.assert_allclose(many.draws, reference(of, 8), atol=0.02)


def test_a_count_that_no_class_has_gives_no_score() -> None:
    (row,) = score_shots(kind((3, 5, 4, 5)), (6,))
    assert (row.score, row.ci95, row.draws) == (None, None, [])
    assert row.note == "no class has 6 training clips; the largest has 5"


def test_every_fold_is_scored_and_told() -> None:
    told: list[tuple[int, int]] = []
    (row,) = score_shots(kind(folds=2), (4,), lambda done, of: told.append((done, of)))
    assert told == [(n, 2 * DRAWS) for n in range(1, 2 * DRAWS + 1)]
    assert len(row.draws) == DRAWS


def test_embeddings_that_are_not_finite_give_no_score() -> None:
    of = kind()
    spoilt: NDArray[np.float32] = of.dataset.embeddings.copy()
    spoilt[-1, 0] = np.inf
    broken = Classes(TASK, of.protocol, replace(of.dataset, embeddings=spoilt), of.folds, of.tools)
    (row,) = score_shots(broken, (2,))
    assert row.score is None
    assert "NaN or infinity" in (row.note or "")


def test_counts_are_checked() -> None:
    assert checked_shots([8, 1, 8]) == (1, 8)
    for wrong in (0, -1, 1001):
        with pytest.raises(UsageError, match=f"--shots {wrong} must lie between 1 and 1000"):
            checked_shots([wrong])


def test_the_nearest_neighbours_of_selection_clips() -> None:
    """Of the training clips without those held out; none under X-ARES's protocol."""
    from xares_onnx.probes.knn import knn_cosine

    of = kind(folds=2)
    fold, labels = of.folds[0], of.classes
    x = of.dataset.embeddings
    _, expected = knn_cosine(x[fold.train], labels[fold.train], x[fold.valid], fold.valid)
    assert of.search_selection() == pytest.approx((expected == labels[fold.valid]).mean())
    assert Classes(TASK, Protocol("xares"), of.dataset, of.folds, of.tools).search_selection() is None
    without = [replace(fold, valid=fold.valid[:0], held_out=fold.valid[:0])]
    assert Classes(TASK, of.protocol, of.dataset, without, of.tools).search_selection() is None
