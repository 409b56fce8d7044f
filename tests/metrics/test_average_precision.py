"""Macro average precision and its interval, against scikit-learn and against definitions written out in loops."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import average_precision_score

from xares_onnx.metrics import bootstrap as metrics
from xares_onnx.metrics.average_precision import AveragePrecisionScorer
from xares_onnx.metrics.bootstrap import RESAMPLES, SumScorer, bootstrap, point
from xares_onnx.metrics.intervals import estimates, interval
from xares_onnx.metrics.statistics import ratio

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Indices = NDArray[np.int64]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def macro(scores: NDArray[Any], targets: Bools, *, present_only: bool) -> float:
    """scikit-learn's macro average precision of (examples, classes); it gives a class without positives 0, and warns."""
    if present_only:
        targets, scores = targets[:, targets.any(axis=0)], scores[:, targets.any(axis=0)]
        if not targets.shape[1]:
            return float("nan")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No positive class found")
        each = [average_precision_score(targets[:, c], scores[:, c]) for c in range(targets.shape[1])]
    return float(np.mean(each))


def scorer_of(scores: NDArray[Any], targets: Bools, owners: Indices | None = None, *, present_only: bool) -> Any:
    """`scores` (seeds, examples, classes); without `owners` every example is a clip of its own."""
    owners = np.arange(len(targets)) if owners is None else owners
    clips = int(owners.max()) + 1
    return AveragePrecisionScorer(scores.astype(np.float32), targets, owners, clips, present_only=present_only)


def task_like(clips: int, classes: int, seeds: int = 1, share: float = 0.1, seed: int = 0) -> tuple[NDArray[Any], Bools]:
    """Scores (seeds, clips, classes) that favour the positives, who are a `share` of the clips."""
    draw = rng(seed)
    targets = draw.random((clips, classes)) < share
    return draw.normal(size=(seeds, clips, classes)).astype(np.float32) + 1.5 * targets, targets


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[Any], Bools, Indices, Floats]:
    """(scores (seeds, examples, classes), targets, owners, counts): often tied, classes often without a positive."""
    clips, classes, seeds = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    owners = np.repeat(np.arange(clips), draw(st.lists(st.integers(1, 3), min_size=clips, max_size=clips)))
    draws = rng(draw(st.integers(0, 2**32 - 1)))
    owners = draws.permutation(owners)  # a clip's crops need not stand together
    levels = draw(st.sampled_from([1, 2, 3, 1000]))
    scores = (draws.integers(0, levels, (seeds, len(owners), classes)) / levels).astype(np.float32)
    targets = draws.random((len(owners), classes)) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    counts = np.array(draw(st.lists(st.integers(0, 3), min_size=clips, max_size=clips)), float)
    return scores, targets, owners, counts


# ---------------------------------------------------------------- the score


@given(case=cases(), present_only=st.booleans())
def test_any_score_is_scikit_learns(case: Any, present_only: bool) -> None:
    scores, targets, owners, _ = case
    (found,) = point([scorer_of(scores, targets, owners, present_only=present_only)])
    assert found.shape == (len(scores),)
    expected = [macro(one, targets, present_only=present_only) for one in scores]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@given(case=cases(), present_only=st.booleans())
def test_a_clip_that_counts_twice_is_its_rows_twice(case: Any, present_only: bool) -> None:
    """With crops: all crops of a clip are repeated together. A clip that counts 0 times is not there."""
    scores, targets, owners, counts = case
    repeated = np.repeat(np.arange(len(owners)), counts[owners].astype(int))
    found = scorer_of(scores, targets, owners, present_only=present_only)(counts[None])[0]
    if len(repeated):
        expected = [macro(one[repeated], targets[repeated], present_only=present_only) for one in scores]
    else:
        expected = [np.nan if present_only else 0.0] * len(scores)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@given(case=cases())
def test_every_resample_is_scored_by_itself(case: Any) -> None:
    scores, targets, owners, counts = case
    scorer = scorer_of(scores, targets, owners, present_only=True)
    several = np.stack([counts, np.ones_like(counts), counts[::-1]])
    np.testing.assert_allclose(scorer(several), np.concatenate([scorer(row[None]) for row in several]), atol=1e-6)


def test_a_score_by_hand() -> None:
    """Ranks of the positives: 1 and 3 of class 0, so (1/1 + 2/3) / 2. Class 1 has none, in class 2 all are tied."""
    targets = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]], bool)
    scores = np.array([[[0.9, 0.1, 0.5], [0.8, 0.9, 0.5], [0.7, 0.3, 0.5], [0.6, 0.2, 0.5]]])
    first, last = (1 + 2 / 3) / 2, 1 / 4
    assert point([scorer_of(scores, targets, present_only=True)]) == pytest.approx((first + last) / 2)
    assert point([scorer_of(scores, targets, present_only=False)]) == pytest.approx((first + 0 + last) / 3)


def test_a_class_may_lose_its_positives_in_a_resample() -> None:
    targets = np.array([[1, 0], [0, 1], [0, 0]], bool)
    scores = np.array([[[0.2, 0.1], [0.8, 0.6], [0.1, 0.7]]])
    counts = np.array([[1, 1, 1], [0, 2, 1], [2, 0, 1], [0, 0, 3]], float)
    # Both classes have their positive second; alone, the second's two copies rank behind one other clip.
    expected = [1 / 2, 2 / 3, 1, np.nan]
    np.testing.assert_allclose(scorer_of(scores, targets, present_only=True)(counts)[:, 0], expected)
    over_all = [1 / 2, (0 + 2 / 3) / 2, 1 / 2, 0]
    np.testing.assert_allclose(scorer_of(scores, targets, present_only=False)(counts)[:, 0], over_all)


def test_a_rank_is_of_scores_and_not_of_the_order_of_clips() -> None:
    scores, targets = task_like(200, 4, share=0.2)
    scores = np.round(scores)  # many ties
    order = rng(1).permutation(200)
    one, other = (
        point([scorer_of(s, t, present_only=True)]) for s, t in ((scores, targets), (scores[:, order], targets[order]))
    )
    np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_allclose(point([scorer_of(3 * scores - 1, targets, present_only=True)]), one, atol=1e-6)


def test_no_positives_at_all() -> None:
    scores, targets = task_like(5, 3, seeds=2)
    targets[:] = False
    assert np.isnan(point([scorer_of(scores, targets, present_only=True)])).all()
    assert point([scorer_of(scores, targets, present_only=False)]).tolist() == [[0, 0]]


def test_many_clips_are_counted_exactly() -> None:
    """20,003 clips of which one ranks first and one last: (1 + 2/20003) / 2."""
    targets = np.zeros((20_003, 1), bool)
    targets[[0, -1]] = True
    scores = -np.arange(20_003, dtype=np.float32)[None, :, None]
    scorer = scorer_of(scores, targets, present_only=True)
    assert point([scorer])[0, 0] == pytest.approx((1 + 2 / 20_003) / 2, rel=1e-9)
    counts = np.full((1, 20_003), 3.0)
    assert scorer(counts)[0, 0] == pytest.approx((1 + 2 / 20_003) / 2, rel=1e-9)


# ---------------------------------------------------------------- the interval


def loop_average_precision(scores: Floats, targets: Bools) -> float:
    """Of one class: over the distinct scores, falling, precision times the recall that each adds."""
    total, before = 0.0, 0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        hits = int(targets[taken].sum())
        total += (hits - before) / targets.sum() * hits / taken.sum()
        before = hits
    return total


def test_replicates_are_of_resampled_clips() -> None:
    """As spread as a plain bootstrap: draw rows, and score them by the definition."""
    scores, targets = task_like(60, 2, share=0.3)
    scorer = scorer_of(scores, targets, present_only=True)
    found = bootstrap([scorer], rng())
    reference = []
    for _ in range(400):
        drawn = rng(len(reference)).integers(0, 60, 60)
        reference.append(np.mean([loop_average_precision(scores[0, drawn, c], targets[drawn, c]) for c in range(2)]))
    assert found.std() == pytest.approx(np.std(reference), rel=0.1)
    moved = found - found.mean() + np.mean(reference)
    assert stats.ks_2samp(moved, reference).pvalue > 0.01


@pytest.mark.parametrize("share", [0.02, 0.2])
def test_replicates_are_moved_so_that_their_mean_is_the_score(share: float) -> None:
    scores, targets = task_like(300, 5, seeds=2, share=share)
    scorer = scorer_of(scores, targets, present_only=True)
    score, found = point([scorer]).mean(), bootstrap([scorer], rng())
    assert 0.2 < score < 0.8
    assert found.mean() == pytest.approx(score, abs=1e-9)  # nothing was cut off at 0 or 1
    raw = scorer(np.stack([np.bincount(rng(i).integers(0, 300, 300), minlength=300) for i in range(300)]).astype(float))
    assert raw.mean() > score + (0.02 if share == 0.02 else 0.002)  # as drawn, clips rank beside their own copies


def test_sums_are_not_moved() -> None:
    """The mean of an accuracy's replicates is random: had they been moved, it would be the score exactly."""
    right = np.stack([np.arange(40) < 25, np.ones(40)], axis=1)[None].astype(float)
    found = bootstrap([SumScorer(right, ratio)], rng())
    assert found.mean() == pytest.approx(25 / 40, abs=0.01)
    assert abs(found.mean() - 25 / 40) > 1e-6


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), share=st.sampled_from([0.03, 0.2, 0.7]), present_only=st.booleans())
def test_any_interval_holds_the_score_and_stays_within_0_and_1(seed: int, share: float, present_only: bool) -> None:
    scores, targets = task_like(40, 4, seeds=2, share=share, seed=seed)
    targets[0, 0] = True
    scorer = scorer_of(scores * rng(seed).choice([1, 1, 4]), targets, present_only=present_only)
    found = bootstrap([scorer], rng(1))
    (estimate,) = estimates([[scorer]], rng(1))
    assert found.shape == (RESAMPLES,)
    defined = found[np.isfinite(found)]
    assert defined.min() >= 0
    assert defined.max() <= 1
    bounds = interval(estimate)
    assert bounds is not None
    assert 0 <= bounds[0] <= point([scorer]).mean() <= bounds[1] <= 1


def test_an_interval_over_all_classes_ends_where_a_perfect_ranking_does() -> None:
    """One class of two has positives, and 4 clips of 45: one resample in 60 has none of them, and scores 0."""
    targets = np.arange(45)[:, None] < [4, 0]
    found = bootstrap([scorer_of(targets[None] * 1.0, targets, present_only=False)], rng())
    assert found.max() == 0.5
    assert found.min() < 0.02
    assert np.quantile(found, [0.025, 0.975]).tolist() == [0.5, 0.5]


def test_a_perfect_ranking_has_an_interval_that_ends_at_1() -> None:
    targets = rng().random((50, 3)) < 0.3
    scores = targets[None] + 0.1 * rng(1).random((1, 50, 3))
    found = bootstrap([scorer_of(scores, targets, present_only=True)], rng())
    np.testing.assert_allclose(found, 1, atol=1e-6)


def test_a_score_without_positives_in_most_resamples_has_no_interval() -> None:
    """A clip of 3 is left out of 8 resamples in 27; of 2 folds both have theirs in about half."""
    targets = np.array([[1], [0], [0]], bool)
    scorer = scorer_of(np.array([[[0.1], [0.2], [0.3]]]), targets, present_only=True)
    found = bootstrap([scorer], rng())
    assert np.isnan(found).mean() == pytest.approx(8 / 27, abs=0.04)
    assert interval(estimates([[scorer]], rng())[0]) is not None
    folds = bootstrap([scorer] * 3, rng())
    assert np.isnan(folds).mean() == pytest.approx(1 - (19 / 27) ** 3, abs=0.04)
    assert interval(estimates([[scorer] * 3], rng())[0]) is None


def test_folds_count_alike_and_are_moved_each_by_itself() -> None:
    perfect = np.arange(30) < 10
    easy = scorer_of(-np.arange(30.0)[None, :, None], perfect[:, None], present_only=True)
    scores, targets = task_like(90, 1, share=0.15)
    hard = scorer_of(scores, targets, present_only=True)
    found, alone = bootstrap([easy, hard], rng()), bootstrap([hard], rng())
    assert found.mean() == pytest.approx(point([easy, hard]).mean(), abs=1e-9)
    assert found.std() == pytest.approx(alone.std() / 2, rel=0.06)


def test_seeds_share_a_resample() -> None:
    scores, targets = task_like(50, 3, share=0.2)
    alone, thrice = (
        bootstrap([scorer_of(np.concatenate([scores] * seeds), targets, present_only=True)], rng()) for seeds in (1, 3)
    )
    np.testing.assert_allclose(alone, thrice, atol=1e-6)


def test_every_seed_counts_alike() -> None:
    scores, targets = task_like(50, 3, seeds=2, share=0.2)
    scores[1] = scores[1] / 4 + targets  # one head is far better
    both, *each = (bootstrap([scorer_of(s, targets, present_only=True)], rng()) for s in (scores, scores[:1], scores[1:]))
    assert each[1].mean() > each[0].mean() + 0.1
    np.testing.assert_allclose(both, (each[0] + each[1]) / 2, atol=0.02)  # a head alone may be cut off at 1


def test_the_bootstrap_repeats_and_fills_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, targets = task_like(50, 3, seeds=2, share=0.2)
    scorer = scorer_of(scores, targets, present_only=True)
    whole = bootstrap([scorer], rng())
    np.testing.assert_array_equal(whole, bootstrap([scorer], rng()))
    monkeypatch.setattr(metrics, "_DRAWS_AT_ONCE", 50 * 7)  # seven at a time, and five in the last block
    blocks = bootstrap([scorer], rng())
    assert blocks.mean() == pytest.approx(whole.mean(), abs=1e-9)  # moved once, not block by block
    assert stats.ks_2samp(whole, blocks).pvalue > 0.01


def test_crops_are_resampled_with_their_clip() -> None:
    """Ten copies of every clip's row are no ten times as many clips: the interval is as wide."""
    scores, targets = task_like(50, 2, share=0.3)
    owners = np.repeat(np.arange(50), 10)
    one = bootstrap([scorer_of(scores, targets, present_only=True)], rng())
    ten = bootstrap([scorer_of(scores[:, owners], targets[owners], owners, present_only=True)], rng())
    np.testing.assert_allclose(*(np.quantile(found, [0.025, 0.975]) for found in (ten, one)), atol=0.01)
