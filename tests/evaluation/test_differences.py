"""Two results clip by clip: each figure against plain numpy, scipy or simulation, and what cannot be compared."""

from __future__ import annotations

from math import comb
from typing import Any

import msgspec
import numpy as np
import pytest
from made_results import accuracy, classes, record, result, rng, side
from numpy.typing import NDArray
from scipy import stats

from xares_onnx.errors import DataError, DataMissingError, UsageError
from xares_onnx.evaluation.differences import (
    Difference,
    Differences,
    Side,
    check_settings,
    find_differences,
    gate_of,
    mcnemar,
    right_clips,
    signed,
    verdict_of,
)
from xares_onnx.probes.tuning import Convergence, Trial, Tuning
from xares_onnx.scoring.scoring import Predictions, clips_of

Bools = NDArray[np.bool_]
TUNING = Tuning(
    setting="L2 strength",
    tried=[Trial(setting=0.1, selection=0.6, test=0.5)],
    chosen=[0.1],
    convergence=Convergence(iterations=5, limit_reached=False, relative_gradient_norm=1e-5),
    train=0.9,
)


def only(found: Differences) -> Difference:
    (difference,) = found.tasks
    return difference


def compared(a: Predictions, b: Predictions, **options: Any) -> Difference:
    return only(find_differences(side("a", {"esc50": a}), side("b", {"esc50": b}), **options))


def outcomes(seed: int, clips: int, share: float = 0.7, seeds: int = 3) -> Bools:
    return rng(seed).random((seeds, clips)) < share


def pair(generator: np.random.Generator, clips: int, lost: float = 0.1, won: float = 0.05) -> tuple[Bools, Bools]:
    """Outcomes of two models that agree on most clips: B is worse by lost - won."""
    drawn = generator.random(clips)
    a = (drawn < lost) | (drawn > 0.4)
    b = ((drawn >= lost) & (drawn < lost + won)) | (drawn > 0.4)
    return a[None], b[None]


# ---------------------------------------------------------------- figures


def test_identical_results_differ_by_exactly_nothing() -> None:
    kept = classes({"x": outcomes(1, 40), "y": outcomes(2, 20)})
    found = compared(kept, kept)
    assert (found.difference, found.alike, found.verdict, found.per_seed) == (0, True, "unclear", [0, 0, 0])
    low, high = found.ci95  # type: ignore[misc]
    assert (-low, high) == pytest.approx((3 * (1 / 40 + 1 / 20) / 4,) * 2, rel=0.03)  # as of one fold of 53 clips
    assert found.mcnemar is not None
    assert (found.mcnemar.only_a, found.mcnemar.only_b, found.mcnemar.p) == (0, 0, 1)


def test_a_difference_is_the_mean_over_folds_then_seeds() -> None:
    a = {"x": np.array([[1, 1, 1, 0], [1, 1, 0, 0]]), "y": np.array([[1, 0], [1, 1]])}
    b = {"x": np.array([[1, 0, 0, 0], [1, 1, 0, 0]]), "y": np.array([[1, 1], [1, 1]])}
    found = compared(classes(a), classes(b))
    assert found.a == pytest.approx((3 / 4 + 2 / 4 + 1 / 2 + 1) / 4)
    assert found.b == pytest.approx((1 / 4 + 2 / 4 + 1 + 1) / 4)
    assert found.difference == pytest.approx(found.b - found.a)
    assert found.per_seed == pytest.approx([((1 - 3) / 4 + 1 / 2) / 2, 0])
    assert found.clips == 6


def test_rows_are_paired_by_key_and_fold_whatever_their_order() -> None:
    a = classes({"x": outcomes(1, 60), "y": outcomes(2, 30)})
    b = classes({"x": outcomes(1, 60) & outcomes(5, 60, 0.7), "y": outcomes(2, 30)})
    order = np.concatenate([rng(3 + seed).permutation(np.flatnonzero(b["seed"] == seed)) for seed in range(3)])
    shuffled = {name: column[order] for name, column in b.items()}
    # Clips in another order, and the same within every seed.
    sorted_rows = np.lexsort((b["key"], b["seed"]))[::-1]
    reversed_clips = {name: column[sorted_rows] for name, column in b.items()}
    with pytest.raises(DataError, match="do not fit its metric"):
        compared(a, shuffled)
    straight, other = compared(a, b), compared(a, reversed_clips)
    assert other.ci95 == pytest.approx(straight.ci95, abs=1e-12)
    assert (other.difference, other.mcnemar) == (pytest.approx(straight.difference), straight.mcnemar)
    assert straight.ci95[1] < 0  # type: ignore[index]


def test_an_error_is_better_where_it_is_smaller() -> None:
    targets = rng(1).normal(size=50)

    def regression(noise: float) -> tuple[Predictions, float]:
        predicted = targets + noise * rng(2).normal(size=50)
        keys = np.array([f"t.tar/{i}" for i in range(50)])
        kept = {"key": keys, "fold": np.full(50, "test"), "seed": np.zeros(50, int), "target": targets}
        return {**kept, "prediction": predicted}, float(np.mean((predicted - targets) ** 2))

    (good, low), (bad, high) = regression(0.5), regression(0.7)
    fields: dict[str, Any] = {"metric": "mse", "higher_is_better": False, "weight": None}
    sides = [
        Side(name, result([record("number", score, **fields)]), lambda _, kept=kept: kept)
        for name, kept, score in (("good", good, low), ("bad", bad, high))
    ]
    worse, better = only(find_differences(*sides)), only(find_differences(*sides[::-1]))
    assert worse.difference == pytest.approx(low - high)
    assert worse.difference < 0 < better.difference
    assert (worse.verdict, better.verdict) == ("worse", "better")
    assert worse.ci95[1] < 0 < better.ci95[0]  # type: ignore[index]
    assert worse.tolerance == pytest.approx(0.01 * low)  # a share of A's error
    assert worse.mcnemar is None


# ---------------------------------------------------------------- the interval


def test_paired_interval_covers_the_truth_about_95_times_in_100() -> None:
    lost, won, clips, trials = 0.1, 0.05, 150, 300
    generator, covered = rng(7), 0
    for _ in range(trials):
        a, b = pair(generator, clips, lost, won)
        low, high = compared(classes({"t": a}), classes({"t": b})).ci95  # type: ignore[misc]
        covered += low <= won - lost <= high
    law = stats.binom(trials, 0.94)  # the percentile interval of 150 clips is a little short
    assert law.ppf(0.001) <= covered <= stats.binom(trials, 0.97).ppf(0.999)


def test_paired_interval_is_that_of_the_clips_differences() -> None:
    """For one fold and seed the difference is a mean over clips: its law is known, and scipy's bootstrap of it too."""
    a, b = pair(rng(1), 200)
    found = compared(classes({"t": a}), classes({"t": b}))
    each = b[0].astype(float) - a[0]
    reference = stats.bootstrap((each,), np.mean, method="percentile", n_resamples=20_000, rng=rng(2)).confidence_interval
    assert found.ci95 == pytest.approx(tuple(reference), abs=0.01)
    unpaired = 2 * 1.96 * np.sqrt(a.var() / 200 + b.var() / 200)
    assert found.ci95[1] - found.ci95[0] < 0.65 * unpaired  # type: ignore[index]


def test_clips_are_resampled_within_folds() -> None:
    """A fold where B loses a clip of two weighs as much as one of forty without a change."""
    small, large = np.array([[1, 1]]), np.ones((1, 40), int)
    found = compared(classes({"s": small, "l": large}), classes({"s": np.array([[1, 0]]), "l": large}))
    assert found.difference == pytest.approx(-0.25)
    # 2, 1 or 0 of the fold's two draws are the lost clip; beside that, all that 7.6 clips of equal weight cannot show.
    variance = (0.5 * 0.5 / 2 / 4) * (1 + 1 / 39) / (1 / 2 + 1 / 40) + (3 / 1.96 * (1 / 2 + 1 / 40) / 4) ** 2
    half = 2.02 * np.sqrt(variance)
    assert found.ci95 == pytest.approx((-0.25 - half, -0.25 + half), rel=0.05)


def test_groups_are_resampled_whole() -> None:
    """Ten groups of 20 clips, of which B loses five: as uncertain as ten clips, not as 200."""

    def grouped(kept: Predictions) -> Predictions:
        return {**kept, "group": np.array([f"speaker {int(key[-4:]) // 20}" for key in kept["key"].tolist()])}

    a, b = (classes({"t": outcome[None]}) for outcome in (np.ones(200, int), np.repeat([1, 0] * 5, 20)))
    alone, whole = (found.ci95 for found in (compared(a, b), compared(grouped(a), grouped(b))))
    assert whole[1] - whole[0] > 3 * (alone[1] - alone[0])  # type: ignore[index]
    assert compared(a, grouped(b)).ci95 == whole


def test_a_clip_may_be_tested_in_several_folds() -> None:
    sizes = {"x": 12, "y": 6}
    keys = {fold: [f"shared.tar/{i}" for i in range(size)] for fold, size in sizes.items()}
    a, b = ({fold: outcomes(seed + size, size) for fold, size in sizes.items()} for seed in (1, 5))
    found = compared(classes(a, keys), classes(b, keys))
    assert found.clips == 18
    for outcome, score in ((a, found.a), (b, found.b)):
        assert score == pytest.approx(np.mean([fold.mean() for fold in outcome.values()]))
    assert found.mcnemar is not None
    majority = {
        name: np.concatenate([side[fold].mean(axis=0) > 0.5 for fold in "xy"]) for name, side in (("a", a), ("b", b))
    }
    assert found.mcnemar.only_a == (majority["a"] & ~majority["b"]).sum()


def test_seeds_share_a_resample() -> None:
    """The clips that B loses with one seed it wins with the other, so a shared resample always gives 0.

    A resample for each seed would not: the interval would be about 0.25 wide on each side.
    """
    a = np.array([[1, 0] * 15, [0, 1] * 15])
    found = compared(classes({"t": a}), classes({"t": 1 - a}))
    assert found.per_seed == [0, 0]
    assert found.ci95 == pytest.approx((-3 / 30, 3 / 30), rel=0.05)  # the rule of three alone


def test_two_seeds_that_contradict_each_other_tell_nothing() -> None:
    a = np.array([[1] * 30, [0] * 30])
    found = compared(classes({"t": a}), classes({"t": 1 - a}))
    assert found.per_seed == [-1, 1]
    assert found.ci95 == (-1, 1)


def test_average_precision_is_paired_and_moved_to_its_score() -> None:
    generator = rng(4)
    present = generator.random((60, 5)) < 0.2
    present[0] = True
    keys = np.array([f"t.tar/{i:02}" for i in range(60)])

    def tags(noise: float, seed: int) -> Predictions:
        scores = present + noise * rng(seed).normal(size=present.shape)
        kept = {"key": keys, "fold": np.full(60, "test"), "seed": np.zeros(60, int), "target": present}
        return {**kept, "prediction": scores.astype(np.float32)}

    from sklearn.metrics import average_precision_score

    good, bad = tags(0.3, 1), tags(0.6, 1)
    sides = []
    for name, kept in (("a", good), ("b", bad)):
        score = np.mean([average_precision_score(present[:, c], kept["prediction"][:, c]) for c in range(5)])
        made = result([record("fsd50k", float(score), metric="mean_average_precision")])
        sides.append(Side(name, made, lambda _, kept=kept: kept))
    found = only(find_differences(*sides))
    low, high = found.ci95  # type: ignore[misc]
    assert low < found.difference < high < 0
    assert only(find_differences(sides[0], sides[0])).alike


# ---------------------------------------------------------------- McNemar


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 9), (10, 10), (40, 22), (0, 12)])
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    a = np.array([True] * only_a + [False] * only_b + [True] * 5 + [False] * 3)
    b = np.array([False] * only_a + [True] * only_b + [True] * 5 + [False] * 3)
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(comb(n, i) for i in range(k + 1)) / 2**n
    found = mcnemar(a, b)
    assert (found.only_a, found.only_b) == (only_a, only_b)
    assert found.p == pytest.approx(min(1, 2 * tail))


def test_a_clip_is_right_where_most_of_its_predictions_are() -> None:
    """Over seeds, and under X-ARES's protocol over crops."""
    kept = classes({"x": np.array([[1, 1, 0, 1], [1, 0, 0, 1], [0, 0, 1, 1]])})
    assert right_clips(kept, clips_of(kept)).tolist() == [True, False, False, True]
    even = classes({"x": np.array([[1, 1], [0, 1]])})
    assert right_clips(even, clips_of(even)).tolist() == [False, True]  # one of two is not most
    crops = {name: column[[0, 0, 1, 3]] for name, column in kept.items()}
    crops["prediction"][0] += 1
    assert right_clips(crops, clips_of(crops)).tolist() == [False, True, True]


# ---------------------------------------------------------------- what is left out, and averages


def test_clips_that_one_has_alone_are_left_out_and_counted() -> None:
    a, b = classes({"x": outcomes(1, 30)}), classes({"x": outcomes(2, 30)})
    lacks = {name: column[b["key"] != "x.tar/0003"] for name, column in b.items()}
    lacking = {name: column[~np.isin(a["key"], ["x.tar/0003", "x.tar/0007"])] for name, column in a.items()}
    found, both = compared(a, lacks), compared(lacking, lacks)
    assert (found.only_in_a, found.only_in_b, found.clips) == (1, 0, 29)
    assert (both.only_in_a, both.only_in_b, both.clips) == (0, 1, 28)
    kept = {name: column[~np.isin(b["key"], ["x.tar/0003", "x.tar/0007"])] for name, column in b.items()}
    assert both.b == pytest.approx(accuracy(kept))
    assert both.difference == pytest.approx(accuracy(kept) - accuracy(lacking))


def test_a_fold_that_only_one_has_gives_no_difference() -> None:
    one, two = classes({"x": outcomes(1, 20)}), classes({"x": outcomes(1, 20), "y": outcomes(2, 20)})
    for a, b in ((one, two), (two, one)):
        found = find_differences(side("a", {"esc50": a}), side("b", {"esc50": b}))
        assert found.tasks == []
        assert [lost.reason for lost in found.unpaired] == ["a fold has no clip that both have predictions of"]


def test_what_one_has_alone_is_said() -> None:
    kept = classes({"x": outcomes(1, 20)})
    a, b = side("a", {"esc50": kept, "desed": kept}), side("b", {"esc50": kept})
    found = find_differences(a, b)
    assert [d.task for d in found.tasks] == ["esc50"]
    (lost,) = found.unpaired
    assert (lost.task, lost.reason) == ("desed", "no score in b: it was not scored there")
    failed = Side("b", result([record("desed", None, reason="a shard is damaged")]), b.predictions_of)
    reasons = {lost.task: lost.reason for lost in find_differences(a, failed).unpaired}
    assert reasons["desed"] == "no score in b: failed: a shard is damaged"


def test_taps_are_told_apart() -> None:
    kept, other = classes({"x": outcomes(1, 20)}), classes({"x": outcomes(2, 20)})
    records = [record("esc50", accuracy(kept)), record("esc50", accuracy(other), tap="layer3")]
    both = Side("a", result(records), lambda of: other if of.tap else kept)
    swapped = Side("b", result([records[1]]), lambda of: other)
    (difference,) = find_differences(both, swapped).tasks
    assert (difference.tap, difference.difference) == ("layer3", 0)


def test_averages_are_of_independent_tasks() -> None:
    tasks = {"esc50": 400, "urbansound8k": 300}
    made = {}
    for name, seed in (("a", 1), ("b", 2)):
        kept = {
            task: classes({"x": outcomes(seed + weight, 150, 0.8 if name == "a" else 0.7)}) for task, weight in tasks.items()
        }
        records = [record(task, accuracy(kept[task]), weight=weight) for task, weight in tasks.items()]
        made[name] = Side(name, result(records), lambda of, kept=kept: kept[of.task])
    found = find_differences(made["a"], made["b"])
    assert [average.group for average in found.averages] == ["public"]  # `all` and `environment` hold the same tasks
    (average,) = found.averages
    first, second = found.tasks
    assert average.difference == pytest.approx((400 * first.difference + 300 * second.difference) / 700)
    widths = [d.ci95[1] - d.ci95[0] for d in found.tasks]  # type: ignore[index]
    expected = np.hypot(4 * widths[0], 3 * widths[1]) / 7
    assert average.ci95[1] - average.ci95[0] == pytest.approx(expected, rel=0.15)  # type: ignore[index]
    limited = [msgspec.structs.replace(r, comparable=False) for r in made["a"].result.tasks]
    partial = Side("a", result(limited), made["a"].predictions_of)
    assert find_differences(partial, made["b"]).averages == []
    assert find_differences(made["b"], partial).averages == []
    single = msgspec.structs.replace(made["a"].result, tasks=made["a"].result.tasks[:1])
    assert find_differences(Side("a", single, made["a"].predictions_of), made["b"]).averages == []


def test_verdicts_and_gates() -> None:
    cases = {
        (0.001, 0.002): ("better", "pass"),
        (-0.05, -0.02): ("worse", "fail"),
        (-0.05, -0.01): ("worse", "warn"),  # certain, but not that it is more than the tolerance
        (-0.009, -0.001): ("worse", "pass"),
        (-0.01, 0.01): ("same", "pass"),
        (0.29 - 0.3, 0.31 - 0.3): ("same", "pass"),  # -0.010000000000000009
        (-1e-17, 0.002): ("same", "pass"),
        (1e-17, 0.002): ("same", "pass"),
        (-0.02, 0.005): ("unclear", "warn"),
        (-0.005, 0.02): ("unclear", "pass"),
    }
    for ci95, expected in cases.items():
        assert (verdict_of(ci95, 0.01), gate_of(ci95, 0.01)) == expected, ci95
    assert (verdict_of(None, 0.01), gate_of(None, 0.01)) == ("unclear", "warn")
    for ci95, verdict in {(0.001, 0.002): "same", (0.001, 0.05): "unclear", (-0.05, -0.001): "unclear"}.items():
        assert verdict_of(ci95, 0.01, p_adjusted=0.06) == verdict  # chance among many differences
    assert [signed(value) for value in (-1e-17, -0.0004, 0.0126, -0.0126)] == ["+0.000", "+0.000", "+0.013", "-0.013"]


# ---------------------------------------------------------------- what cannot be compared


@pytest.mark.parametrize(
    ("settings", "fields", "error", "message"),
    [
        ({"protocol": "xares"}, {}, UsageError, "--protocol corrected and b with xares"),
        ({"limit": 40}, {}, UsageError, "--limit None and b with 40"),
        ({}, {"definition_digest": "other"}, UsageError, "defined differently"),
        ({}, {"data_digest": "other"}, DataError, "other data of esc50"),
        ({}, {"score": 0.123}, DataError, "another run's"),
    ],
)
def test_what_means_something_else_is_refused(settings: Any, fields: Any, error: type[Exception], message: str) -> None:
    kept = classes({"x": outcomes(1, 20)})
    changed = msgspec.structs.replace(record("esc50", accuracy(kept)), **fields)
    b = Side("b", result([changed], settings=settings), lambda of: kept)
    with pytest.raises(error, match=message):
        find_differences(side("a", {"esc50": kept}), b)


@pytest.mark.parametrize(
    ("protocol", "method", "draws"),
    [("corrected", "linear", False), ("corrected", "retrieval", True), ("xares", "linear", True), ("xares", "knn", False)],
)
def test_only_heads_that_draw_need_the_same_seeds(protocol: str, method: str, draws: bool) -> None:
    settings = {"protocol": protocol, "seeds": 3}
    a = Side("a", result([], settings=settings), lambda of: {})
    if draws:
        with pytest.raises(UsageError, match="--seeds 3 and b with 1"):
            check_settings(a, "b", {**settings, "seeds": 1}, {method})
    else:
        check_settings(a, "b", {**settings, "seeds": 1}, {method})


def test_a_head_of_an_earlier_version_is_refused() -> None:
    kept = classes({"x": outcomes(1, 20)})
    tuned = msgspec.structs.replace(record("esc50", accuracy(kept)), tuning=TUNING)
    b = Side("b", result([tuned]), lambda of: kept)
    with pytest.raises(UsageError, match="the head of esc50 in a was trained by an earlier version"):
        find_differences(side("a", {"esc50": kept}), b)
    assert only(find_differences(b, b)).alike


@pytest.mark.parametrize(("method", "option"), [("retrieval", "vocabulary"), ("llm", "lm")])
def test_files_of_a_head_must_be_the_same(method: str, option: str) -> None:
    a, b = (
        Side(name, result([record("clotho", 0.5, method=method)], settings={option: name}), lambda _: {}) for name in "ab"
    )
    with pytest.raises(UsageError, match=f"a was scored with another --{option}"):
        find_differences(a, b)


def test_knn_has_no_seeds_to_differ_in() -> None:
    kept = classes({"x": outcomes(1, 20, seeds=1)})
    a, b = (
        side(name, {"esc50": kept}, settings={"seeds": n}, of_record={"method": "knn"}) for name, n in (("a", 1), ("b", 3))
    )
    assert only(find_differences(a, b)).method == "knn"


@pytest.mark.parametrize("lost", ["target", "prediction"])
def test_predictions_of_another_kind_are_refused(lost: str) -> None:
    kept = classes({"x": outcomes(1, 20)})
    a, b = side("a", {"esc50": kept}), side("b", {"esc50": kept})
    broken = Side("b", b.result, lambda of: {name: column for name, column in kept.items() if name != lost})
    with pytest.raises(DataError, match="do not fit its metric"):
        find_differences(a, broken)


def test_missing_predictions_are_an_error_at_once() -> None:
    kept = classes({"x": outcomes(1, 20)})

    def gone(of: Any) -> Predictions:
        raise DataMissingError("the predictions are not there")

    a = side("a", {"esc50": kept})
    with pytest.raises(DataMissingError, match="not there"):
        find_differences(a, Side("b", a.result, gone))


@pytest.mark.parametrize("tolerance", [-0.01, 1, 5, float("nan")])
def test_a_tolerance_is_a_fraction(tolerance: float) -> None:
    kept = classes({"x": outcomes(1, 20)})
    with pytest.raises(UsageError, match="scores are fractions"):
        compared(kept, kept, tolerance=tolerance)
