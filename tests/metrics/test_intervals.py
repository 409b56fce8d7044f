"""Intervals, against references, exact coverage and simulated runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_results import classes, record, result, rng
from scipy import stats
from threadpoolctl import threadpool_info, threadpool_limits

from xares_onnx.evaluation.differences import Side, find_differences, gate_of
from xares_onnx.metrics.bootstrap import Array, SumScorer, bootstrap
from xares_onnx.metrics.intervals import Estimate, adjusted, average, detectable, estimates, interval, p_value
from xares_onnx.metrics.statistics import mean_squared_error, ratio
from xares_onnx.probes import knn
from xares_onnx.scoring.protocol import Protocol
from xares_onnx.scoring.scoring import groups_of_clips, scorers_of


def shares(right: Array) -> SumScorer:
    """Accuracy of outcomes (seeds, clips)."""
    return SumScorer(np.stack([right, np.ones_like(right)], axis=2).astype(float), ratio)


def estimate_of(right: Array, groups: Array | None = None, seed: int = 0) -> Estimate:
    return estimates([[shares(np.atleast_2d(right))]], rng(seed), None if groups is None else [groups])[0]


def bounds(estimate: Estimate) -> tuple[float, float]:
    found = interval(estimate)
    assert found is not None
    return found


def difference(a: Array, b: Array) -> Estimate:
    first, second = estimates([[shares(np.atleast_2d(a))], [shares(np.atleast_2d(b))]], rng(1))
    return second.minus(first)


def drawn(score: float, spread: float, seed: int, clips: float = math.inf, freedom: float = 1e9) -> Estimate:
    replicates = score + spread * stats.norm.ppf(rng(seed).permutation((np.arange(2000) + 0.5) / 2000))
    return Estimate(score, replicates, (), clips, freedom, "difference")


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize(("right", "clips"), [(0, 400), (1, 400), (200, 400), (360, 400), (399, 400), (400, 400)])
def test_accuracy_of_many_clips_has_wilsons_interval(right: int, clips: int) -> None:
    reference = stats.binomtest(right, clips).proportion_ci(method="wilson")
    assert bounds(estimate_of(np.arange(clips) < right)) == pytest.approx((reference.low, reference.high), abs=0.003)


@pytest.mark.parametrize("clips", [20, 50, 180])
@pytest.mark.parametrize("truth", [0.5, 0.7, 0.9, 0.95, 0.98])
def test_accuracy_is_covered_exactly_as_often_as_the_binomial_law_says(clips: int, truth: float) -> None:
    covered = 0.0
    for right in range(clips + 1):
        chance = stats.binom(clips, truth).pmf(right)
        if chance > 1e-5:
            low, high = bounds(estimate_of(np.arange(clips) < right))
            covered += chance * (low <= truth <= high)
    assert 0.92 <= covered <= 0.98


def test_a_smooth_score_of_many_clips_has_scipys_interval() -> None:
    """Far from the ends and with many clips every sound interval is the same: BCa's of a ratio of crops."""
    crops = rng().integers(1, 6, 300)
    right = rng(1).binomial(crops, 0.6).astype(float)
    scorer = SumScorer(np.stack([right, crops], axis=1)[None].astype(float), ratio)
    reference = stats.bootstrap(
        (right, crops.astype(float)),
        lambda part, whole, axis: part.sum(axis=axis) / whole.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="BCa",
        rng=rng(2),
    )
    found = bounds(estimates([[scorer]], rng())[0])
    assert found == pytest.approx(tuple(reference.confidence_interval), abs=0.004)


@given(
    score=st.floats(0, 1),
    spread=st.floats(0, 0.5),
    clips=st.integers(1, 10_000),
    seeds=st.lists(st.floats(-0.2, 0.2), max_size=4),
)
def test_any_interval_of_a_share_holds_it_within_0_and_1(
    score: float, spread: float, clips: int, seeds: list[float]
) -> None:
    replicates = np.clip(score + spread * rng().normal(size=2000), 0, 1)
    deviations = (np.array(seeds) - np.mean(seeds),) if seeds else ()
    low, high = bounds(Estimate(score, replicates, deviations, clips, max(1, clips - 1), "share"))
    assert 0 <= low <= score <= high <= 1


def test_an_error_has_an_interval_above_0() -> None:
    errors = rng().exponential(1, 30)
    statistics = np.stack([errors, errors, np.ones(30)], axis=1)[None]
    (estimate,) = estimates([[SumScorer(statistics, mean_squared_error)]], rng(), scale="error")
    low, high = bounds(estimate)
    assert 0 < low < estimate.score < high
    assert low * high == pytest.approx(estimate.score**2)
    assert math.log(high / low) / 2 == pytest.approx(2.045 * errors.std(ddof=1) / np.sqrt(30) / errors.mean(), rel=0.1)


# ---------------------------------------------------------------- groups


def test_clips_that_are_right_together_tell_as_much_as_their_groups() -> None:
    """Ten clips of each speaker, all right or all wrong: the interval is that of the speakers."""
    speakers = rng().random(60) < 0.7
    groups = np.repeat(np.arange(60), 10)
    together = bounds(estimate_of(np.repeat(speakers, 10), groups))
    assert together == pytest.approx(bounds(estimate_of(speakers)), abs=0.01)
    alone = bounds(estimate_of(np.repeat(speakers, 10)))
    assert together[1] - together[0] > 2.5 * (alone[1] - alone[0])


def test_whole_groups_are_resampled_in_each_fold() -> None:
    """Of two groups, of one clip that is right and of three that are wrong, a resample has 1, 1 of 4, or 0."""
    right = np.array([1, 0, 0, 0])
    replicates = bootstrap([shares(right[None])] * 2, rng(), [np.array([5, 2, 2, 2])] * 2)
    values = {(a + b) / 2 for a in (0, 0.25, 1) for b in (0, 0.25, 1)}
    assert {round(value, 9) for value in replicates.tolist()} == values


def test_groups_come_from_the_kept_predictions() -> None:
    kept = classes({"x": np.ones((2, 4), int), "y": np.ones((2, 2), int)})
    assert groups_of_clips(kept) is None
    kept["group"] = np.array(["b", "a", "b", "b", "c", "d"] * 2)
    kept = {name: np.concatenate([column[kept["fold"] == fold] for fold in "xy"]) for name, column in kept.items()}
    named = dict(zip(zip(kept["fold"].tolist(), kept["key"].tolist(), strict=True), kept["group"].tolist(), strict=True))
    found = groups_of_clips(kept)
    if any(len({group for (fold, _), group in named.items() if fold == one}) < 2 for one in "xy"):
        assert found is None
    else:
        assert found is not None
        assert [len(of_fold) for of_fold in found] == [4, 2]
    alone = {**kept, "group": np.where(kept["fold"] == "y", "one", kept["group"])}
    assert groups_of_clips(alone) is None  # a fold of one group tells nothing of how groups differ
    assert len(scorers_of(kept, "accuracy", Protocol("corrected"))) == 2


# ---------------------------------------------------------------- differences


@pytest.mark.parametrize("clips", [20, 100, 1000])
def test_models_that_no_clip_tells_apart_may_differ_by_3_in_n(clips: int) -> None:
    low, high = bounds(difference(np.ones(clips), np.ones(clips)))
    assert (-low, high) == pytest.approx((3 / clips, 3 / clips), rel=0.07)
    assert gate_of((low, high), 0.01) == ("pass" if clips == 1000 else "warn")


def test_few_discordant_clips_are_judged_as_by_mcnemars_exact_test() -> None:
    clips = 200
    for only_a in range(3):
        for only_b in range(15):
            a, b = np.ones(clips), np.ones(clips)
            b[:only_a] = 0
            a[only_a : only_a + only_b] = 0
            exact = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
            found = difference(a, b)
            low, high = bounds(found)
            assert (p_value(found) < 0.05) == (low > 0 or high < 0)
            if not 0.02 < exact < 0.2:
                assert (low > 0 or high < 0) == (exact <= 0.05), (only_a, only_b)


def test_two_perfect_models_on_twenty_clips_are_too_few() -> None:
    kept = classes({"x": np.ones((1, 20), int)})
    sides = [Side(name, result([record("esc50", 1.0)]), lambda _: kept) for name in "ab"]
    (found,) = find_differences(*sides).tasks
    assert (found.verdict, found.alike, found.difference) == ("unclear", True, 0)
    assert gate_of(found.ci95, found.tolerance) == "warn"


def alike(a: Array, b: Array) -> bool:
    sides = []
    for name, right in (("a", a), ("b", b)):
        kept = classes({"x": right})
        sides.append(Side(name, result([record("esc50", float(right.mean()))]), lambda _, kept=kept: kept))
    return find_differences(*sides).tasks[0].alike


def test_models_are_alike_if_every_clip_is_with_every_seed() -> None:
    a = (rng().random((3, 40)) < 0.8).astype(int)
    a[:, :2] = [[1, 0], [0, 1], [1, 1]]
    b = a.copy()
    b[:2, :2] = [[0, 1], [1, 0]]  # loses with one seed the clip that it wins with another; each seed's score is the same
    assert (a.sum(axis=0).tolist(), a.sum(axis=1).tolist()) == (b.sum(axis=0).tolist(), b.sum(axis=1).tolist())
    assert not alike(a, b)
    assert alike(a, a.copy())
    assert not alike(a, a[[1, 0, 2]])  # the seeds in another order


def test_a_difference_of_few_clips_has_students_interval() -> None:
    """Resamples of n clips vary less than clips do, by (n - 1) / n: a fifth for five."""
    errors = rng(3).gamma(2, size=(2, 5))
    scorers = [[SumScorer(np.stack([row, np.zeros(5), np.ones(5)], axis=1)[None], mean_squared_error)] for row in errors]
    a, b = estimates(scorers, rng(4), scale="error", resamples=20_000)
    reference = stats.ttest_rel(errors[1], errors[0]).confidence_interval()
    assert bounds(b.minus(a)) == pytest.approx((reference.low, reference.high), rel=0.02)


def test_folds_of_unlike_size_widen_each_by_its_own_clips() -> None:
    """The mean of two folds, of three clips and of thirty, that vary alike."""
    errors = [np.tile([1.0, 2.0, 3.0], repeats) for repeats in (1, 10)]
    scorers = [SumScorer(np.stack([row, 0 * row, 1 + 0 * row], axis=1)[None], mean_squared_error) for row in errors]
    (estimate,) = estimates([scorers], rng(), scale="error", resamples=20_000)
    variance = estimate.variance()
    assert variance is not None
    spread = np.var(errors[0])
    assert variance[0] == pytest.approx((spread / 2 + spread / 29) / 4, rel=0.04)
    assert variance[1] == 31


def test_runs_of_one_model_are_rarely_told_apart() -> None:
    """Three seeds each, with luck of their own: by clips alone a third of such runs differ."""
    apart = clips_alone = 0
    for number in range(200):
        draw = rng(number)
        ease = 0.7 + draw.normal(size=300)
        runs = [(ease + draw.normal(0, 0.15, (3, 1)) + draw.normal(0, 0.3, (3, 300)) > 0).astype(float) for _ in "ab"]
        pair = estimates([[shares(run)] for run in runs], draw, resamples=300)
        found = pair[1].minus(pair[0])
        low, high = bounds(found)
        apart += low > 0 or high < 0
        low, high = np.quantile(found.replicates, [0.025, 0.975])
        clips_alone += low > 0 or high < 0
    assert clips_alone > 50
    assert apart <= stats.binom(200, 0.08).ppf(0.999)


def test_seeds_count_for_no_more_than_they_are() -> None:
    """Where clips say nothing, the interval is Student's of three seeds, and pairs of seeds are subtracted one by one."""
    seeds = np.array([0.1, -0.3, 0.2])
    found = Estimate(0.0, np.zeros(2000), (seeds,), math.inf, 100, "difference")
    reference = stats.t(2, scale=seeds.std(ddof=1) / np.sqrt(3)).ppf(0.975)
    assert bounds(found) == pytest.approx((-reference, reference))
    share = Estimate(0.5, np.full(2000, 0.5), (seeds,), 100, 99, "share")
    assert [deviations.tolist() for deviations in share.minus(share).seeds] == [[0, 0, 0]]


def test_an_average_adds_the_variances_of_its_tasks() -> None:
    parts = [drawn(0.1, 0.02, 1), drawn(0.2, 0.05, 2)]
    low, high = bounds(average([0.6, 0.4], parts))
    assert (low + high) / 2 == pytest.approx(0.14)
    assert (high - low) / 2 == pytest.approx(1.96 * math.hypot(0.6 * 0.02, 0.4 * 0.05), rel=0.03)


def test_what_could_be_shown_is_found_in_four_cases_of_five() -> None:
    least = detectable(drawn(0.0, 0.01, 1))
    assert least is not None
    found = [p_value(drawn(score, 0.01, 1)) < 0.05 for score in rng().normal(least, 0.01, 2000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.03)


def test_benjamini_and_hochbergs_correction() -> None:
    """Their own example (1995, table 1): at 0.05 the first four of fifteen are left."""
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.324, 0.4262, 0.5719, 0.6528, 0.759, 1]
    order = rng().permutation(15)
    found = np.array(adjusted(np.array(p)[order].tolist()))
    assert sorted(order[found <= 0.05].tolist()) == [0, 1, 2, 3]
    assert dict(zip(order.tolist(), found, strict=True))[3] == pytest.approx(0.0095 * 15 / 4)
    np.testing.assert_allclose(found, stats.false_discovery_control(np.array(p)[order]))
    assert adjusted([]) == []


def test_of_many_scores_without_a_difference_none_is_better_by_chance() -> None:
    """One of twenty with a p-value of 0.03 is no finding, and alone it is one."""
    clips = 400
    kept_a, kept_b, records = {}, {}, []
    for number in range(20):
        a, b = np.ones((1, clips), int), np.ones((1, clips), int)
        gained, lost = (8, 1) if number == 0 else (4, 4)
        a[0, :gained] = 0
        b[0, gained : gained + lost] = 0
        kept_a[f"own{number}"], kept_b[f"own{number}"] = classes({"x": a}), classes({"x": b})
        records.append((f"own{number}", float(a.mean()), float(b.mean())))

    def verdict(count: int) -> str:
        a = Side("a", result([record(name, score) for name, score, _ in records[:count]]), lambda of: kept_a[of.task])
        b = Side("b", result([record(name, score) for name, _, score in records[:count]]), lambda of: kept_b[of.task])
        return find_differences(a, b).tasks[0].verdict

    assert verdict(1) == "better"
    assert verdict(20) == "unclear"


# ---------------------------------------------------------------- threads


@pytest.mark.skipif(
    not any(pool["user_api"] == "blas" for pool in threadpool_info()), reason="no BLAS whose threads can be set"
)
def test_the_same_bytes_with_one_thread_and_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product sees one thread of BLAS, however many there are outside."""
    seen: list[int] = []

    class Watched(SumScorer):
        def __call__(self, counts: Array) -> Array:
            seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
            return super().__call__(counts)

    values = rng().random((1, 3000, 40))
    train, test = (rng(seed).normal(size=(1500, 192)).astype(np.float32) for seed in (1, 2))
    labels = rng(3).integers(0, 20, 1500)
    similarity = knn._vote_weights
    monkeypatch.setattr(
        knn,
        "_vote_weights",
        lambda distances: (
            seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
            or similarity(distances)
        ),
    )
    outputs = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            replicates = bootstrap([Watched(values, lambda sums: sums.sum(axis=2))], rng(4))
            found = [search(train, labels, test, np.arange(1500))[1] for search in (knn.knn_cosine, knn.knn_xares)]
            outputs.append([array.tobytes() for array in (replicates, *found)])
    assert outputs[0] == outputs[1]
    assert set(seen) == {1}
