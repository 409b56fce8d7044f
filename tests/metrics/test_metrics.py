"""Statistics, their intervals, and how predictions become a score: each against scipy, an exact law, or plain numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import f1_score, recall_score

from xares_onnx.data.shards import Clips
from xares_onnx.data.targets import ClassTarget
from xares_onnx.data.task import Data, Task
from xares_onnx.metrics import bootstrap as metrics
from xares_onnx.metrics.bootstrap import SumScorer
from xares_onnx.metrics.intervals import estimates, interval
from xares_onnx.metrics.statistics import accuracy_statistics, class_metrics, ratio, recall_both_ways, word_accuracy
from xares_onnx.probes import convex, linear
from xares_onnx.scoring.dataset import Dataset
from xares_onnx.scoring.folds import Fold
from xares_onnx.scoring.kinds import Kind, Outcome, Tools, kind_of
from xares_onnx.scoring.protocol import Protocol
from xares_onnx.scoring.scoring import score

Floats = NDArray[np.float64]


def outcomes(right: int, clips: int) -> Floats:
    """(1 seed, clips, 2) statistics of a fold in which so many clips are right."""
    return np.stack([np.arange(clips) < right, np.ones(clips)], axis=1)[None].astype(float)


def bootstrap(statistics: list[Floats], generator: np.random.Generator) -> Floats:
    return metrics.bootstrap([SumScorer(fold, ratio) for fold in statistics], generator)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- statistics


def test_accuracy_statistics_count_examples_by_clip() -> None:
    clips = np.array([7, 2, 7, 5, 2, 7])
    right = np.array([True, False, True, True, True, False])
    found = accuracy_statistics(right, clips, np.array([2, 5, 7]))
    assert found.tolist() == [[1, 2], [1, 1], [2, 3]]
    assert ratio(found.sum(axis=0)) == pytest.approx(4 / 6)
    assert ratio(found).tolist() == pytest.approx([1 / 2, 1, 2 / 3])


@pytest.mark.parametrize("seed", range(4))
def test_class_metrics_are_their_definitions(seed: int) -> None:
    targets = rng(seed).choice([0, 1, 2, 5], 60, p=[0.6, 0.2, 0.15, 0.05])
    predictions = np.where(
        rng(seed + 9).random(60) < 0.6, targets, rng(seed + 99).integers(0, 7, 60)
    )  # also never-true 3, 4, 6
    f1, recall = [], []
    for label in np.unique(targets):
        hit = np.sum((targets == label) & (predictions == label))
        f1.append(2 * hit / (np.sum(targets == label) + np.sum(predictions == label)))
        recall.append(hit / np.sum(targets == label))
    found = class_metrics(targets, predictions)
    assert found == {"macro_f1": pytest.approx(np.mean(f1)), "balanced_accuracy": pytest.approx(np.mean(recall))}
    present = np.unique(targets)
    assert found["macro_f1"] == pytest.approx(f1_score(targets, predictions, labels=present, average="macro"))
    assert found["balanced_accuracy"] == pytest.approx(recall_score(targets, predictions, labels=present, average="macro"))
    assert found["balanced_accuracy"] != pytest.approx(np.mean(targets == predictions))  # classes are unequal


def test_class_metrics_of_a_class_never_predicted() -> None:
    assert class_metrics(np.array([0, 0, 1]), np.array([0, 0, 0])) == {
        "macro_f1": pytest.approx((4 / 5 + 0) / 2),
        "balanced_accuracy": pytest.approx(1 / 2),
    }


# ---------------------------------------------------------------- the bootstrap


def test_replicates_of_an_accuracy_are_binomial() -> None:
    """A resample of n clips of which a share p is right holds Binomial(n, p) right ones: an exact law."""
    right, clips = 42, 60
    replicates = bootstrap([outcomes(right, clips)], rng())
    assert replicates.shape == (2000,)
    law = stats.binom(clips, right / clips)
    distance = stats.ks_2samp(replicates * clips, law.rvs(20_000, random_state=1))
    assert distance.pvalue > 0.01
    assert replicates.std() == pytest.approx(law.std() / clips, rel=0.06)


def test_ratio_of_crops_is_scipys_bootstrap() -> None:
    """Clips of one to nine crops: a resample's score is right crops over crops, not a mean over clips."""
    crops = rng(1).integers(1, 10, 80).astype(float)
    right = rng(2).binomial(crops.astype(int), np.clip(crops / 10, 0.1, 0.9)).astype(float)  # longer clips are easier
    replicates = bootstrap([np.stack([right, crops], axis=1)[None]], rng())
    reference = stats.bootstrap(
        (right, crops),
        lambda r, c, axis: r.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=rng(3),
    )
    assert tuple(np.quantile(replicates, [0.025, 0.975])) == pytest.approx(tuple(reference.confidence_interval), abs=0.01)
    assert replicates.std() == pytest.approx(reference.standard_error, rel=0.06)
    assert abs(replicates.mean() - (right / crops).mean()) > 0.05  # a mean over clips would be elsewhere


def test_clips_are_resampled_within_their_fold() -> None:
    """A fold without errors varies by nothing, and each fold counts alike whatever its size."""
    replicates = bootstrap([outcomes(50, 50), outcomes(5, 10)], rng())
    assert set(np.round(replicates * 20).astype(int)) <= set(range(10, 21))
    np.testing.assert_allclose(replicates * 20, np.round(replicates * 20), atol=1e-9)
    assert replicates.mean() == pytest.approx(0.75, abs=0.01)
    assert replicates.std() == pytest.approx(np.sqrt(0.25 / 10) / 2, rel=0.06)


def test_seeds_share_a_resample() -> None:
    """Two seeds that are right on each other's errors average to one half in every resample of the clips."""
    one = outcomes(30, 40)
    other = one.copy()
    other[..., 0] = 1 - one[..., 0]
    replicates = bootstrap([np.concatenate([one, other])], rng())
    np.testing.assert_allclose(replicates, 0.5)


def test_more_seeds_do_not_feign_more_clips() -> None:
    one = outcomes(30, 40)
    alone, thrice = (bootstrap([np.concatenate([one] * n)], rng()) for n in (1, 3))
    np.testing.assert_allclose(alone, thrice)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    clips, truth, trials = 100, 0.8, 400
    covered = 0
    for right in rng(5).binomial(clips, truth, trials):
        (estimate,) = estimates([[SumScorer(outcomes(right, clips), ratio)]], rng(right))
        low, high = interval(estimate)
        covered += low <= truth <= high
    assert 0.90 <= covered / trials <= 0.98


def test_bootstrap_repeats_and_fills_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap([outcomes(30, 40)], rng())
    np.testing.assert_array_equal(whole, bootstrap([outcomes(30, 40)], rng()))
    assert (whole != bootstrap([outcomes(30, 40)], rng(1))).any()
    for values in (1, 40 * 7):  # a resample at a time; seven at a time, and five in the last block
        monkeypatch.setattr(metrics, "_DRAWS_AT_ONCE", values)
        blocks = bootstrap([outcomes(30, 40)], rng())
        assert stats.ks_2samp(whole, blocks).pvalue > 0.01


# ---------------------------------------------------------------- from predictions to a score

TASK = Task(
    name="tones",
    title="Tones",
    domain="music",
    data=Data(splits={"train": "train.tar", "test": "test.tar"}),
    target=ClassTarget("label", ("a", "b", "c")),
)


def dataset(classes: list[int], crops: list[int] | None = None) -> Dataset:
    crops = crops or [1] * len(classes)
    return Dataset(
        embeddings=np.zeros((sum(crops), 2), np.float32),
        clip_of_crop=np.repeat(np.arange(len(classes)), crops),
        labels=list(classes),
        keys=[f"test.tar/{i:03}" for i in range(len(classes))],
        parts={},
        clips=Clips(expected=len(classes), read=len(classes), dropped=[]),
        audio_seconds=1.0,
        damage=[],
    )


def kind(data: Dataset, folds: list[Fold], protocol: str = "corrected", task: Task = TASK) -> Kind:
    return kind_of(task)(task, Protocol(protocol), data, folds, Tools())  # type: ignore[arg-type]


def fold(name: str, test: list[int], train: list[int] | None = None) -> Fold:
    none = np.empty(0, np.int64)
    return Fold(name, np.array(train or [], np.int64), none, np.array(test), none)


def test_score_is_the_mean_over_folds_then_over_seeds() -> None:
    data = dataset([0, 1, 2, 0, 1, 2])
    folds = [fold("x", [0, 1]), fold("y", [5, 4, 3, 2])]  # of different sizes, and not in order
    wrong = {(0, 0): [1], (0, 4): [0, 1], (1, 0): [2, 3, 4], (1, 4): []}
    found = []
    for (number, seed), errors in wrong.items():
        examples = np.sort(folds[number].test)
        predictions = np.array([(data.labels[i] + (i in errors)) % 3 for i in examples])
        found.append(Outcome(number, seed, examples, predictions))
    scored = score(kind(data, folds), "head", found)
    assert scored.per_fold == pytest.approx([(0.5 + 0) / 2, (0.25 + 1) / 2])
    assert scored.per_seed == pytest.approx([(0.5 + 0.25) / 2, (0 + 1) / 2])
    assert scored.score == pytest.approx((0.5 + 0 + 0.25 + 1) / 4)
    assert scored.n_test == 6
    assert scored.ci95[0] <= scored.score <= scored.ci95[1]
    rows = scored.predictions
    assert len(rows["key"]) == 12  # clips x seeds
    right = rows["target"] == rows["prediction"]
    for number, name in enumerate("xy"):
        for seed in (0, 4):
            mine = right[(rows["fold"] == name) & (rows["seed"] == seed)]
            assert mine.mean() == 1 - len(wrong[number, seed]) / len(folds[number].test)
    assert dict(zip(rows["key"].tolist(), rows["target"].tolist(), strict=True)) == dict(
        zip(data.keys, data.labels, strict=True)
    )


def test_x_ares_scores_crops_and_resamples_clips() -> None:
    """Four clips of 1, 1, 1 and 7 crops, of which the long one is wrong: 3 of 10 crops."""
    data = dataset([0, 1, 2, 0], crops=[1, 1, 1, 7])
    predictions = np.where(data.clip_of_crop == 3, 1, np.array(data.labels)[data.clip_of_crop])
    found = [Outcome(0, 0, np.arange(10), predictions)]
    scored = score(kind(data, [fold("test", [0, 1, 2, 3])], "xares"), "knn", found)
    assert scored.score == pytest.approx(3 / 10)
    assert scored.n_test == 4
    # A resample holds the long clip k times: (4 - k) right of (4 - k) + 7k crops.
    values = {(4 - k) / (4 - k + 7 * k) for k in range(5)}
    replicates = scored.score + (scored.estimate.replicates - scored.score) * np.sqrt(3 / 4)
    assert {round(value, 9) for value in replicates.tolist()} == {round(value, 9) for value in values}
    assert np.isclose(replicates, 1).mean() == pytest.approx(0.75**4, abs=0.04)
    assert len(scored.predictions["key"]) == 10


def test_an_interval_depends_on_its_task_and_method_alone() -> None:
    data, folds = dataset([0, 1, 2] * 10), [fold("test", list(range(30)))]
    found = [Outcome(0, 0, np.arange(30), rng().integers(0, 3, 30))]

    def replicates(name: str, method: str) -> Floats:
        task = Task(name=name, title="", domain="music", data=TASK.data, target=TASK.target)
        return score(kind(data, folds, task=task), method, found).estimate.replicates

    np.testing.assert_array_equal(replicates("a", "head"), replicates("a", "head"))
    assert (replicates("a", "head") != replicates("a", "knn")).any()
    assert (replicates("a", "head") != replicates("b", "head")).any()


def test_knn_searches_the_clips_held_out_of_training_too() -> None:
    """kNN selects nothing, so clips that a head is selected by are neighbours; official validation clips are not."""
    data = dataset([0, 1, 1, 2, 2])
    data.embeddings[:] = [[1, 0], [0, 1], [0.6, 0.8], [0.6, 0.9], [0.6, 0.85]]  # the last is nearest to 3, then to 2
    none = np.empty(0, np.int64)

    def predicted(valid: list[int], held_out: list[int]) -> list[int]:
        fold = Fold("test", np.array([0, 1]), np.array(valid), np.array([4]), np.array(held_out, np.int64))
        (found,) = kind(data, [fold]).search()
        return found.predictions.tolist()

    assert predicted([3], [3]) == [2]
    assert predicted([3], none.tolist()) == [1]


def test_heads_are_trained_selected_and_tested_on_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def trained(*arguments: Any, **options: Any) -> list[Any]:
        given["crops"] = [[part.tolist() for part in (f.train, f.valid, f.test)] for f in arguments[3]]
        given["labels"], given["examples"] = arguments[1].targets.tolist(), arguments[2].tolist()
        options["on_epoch"](7)
        return []

    def converged(*arguments: Any, **options: Any) -> list[Any]:
        given["held out"] = [rows.held_out.tolist() for rows in arguments[3]]
        return trained(*arguments, on_epoch=options["on_fit"])

    monkeypatch.setattr(linear, "train_linear", trained)
    monkeypatch.setattr(convex, "train_convex", converged)
    data = dataset([2, 0, 1], crops=[2, 1, 2])
    parts = Fold("test", np.array([0]), np.array([1]), np.array([2]), np.array([1]))
    steps: list[int] = []
    kind(data, [parts], "xares").train(3, steps.append)
    assert given == {"crops": [[[0, 1], [2], [3, 4]]], "labels": [2, 2, 0, 1, 1], "examples": [0, 1, 2, 3, 4]}
    kind(data, [parts]).train(3, steps.append)
    assert given == {
        "crops": [[[0, 1], [2], [3, 4]]],
        "labels": [2, 2, 0, 1, 1],
        "examples": [0, 0, 1, 2, 2],
        "held out": [[2]],
    }
    assert steps == [7, 7]


def test_recall_is_the_mean_of_both_ways() -> None:
    assert recall_both_ways(np.array([[1.0, 4.0, 4.0, 5.0]])).tolist() == [pytest.approx((1 / 4 + 4 / 5) / 2)]


def test_word_accuracy_ends_at_0() -> None:
    assert word_accuracy(np.array([[1.0, 4.0], [5.0, 4.0]])).tolist() == [0.75, 0.0]


def test_which_folds_have_no_score() -> None:
    data = dataset([0, 0, 1, 2, 1])

    def why(*folds: Fold) -> str | None:
        return kind(data, list(folds)).why_undefined()

    assert why(fold("test", [4], train=[0, 2])) is None
    assert why(fold("test", [], train=[0, 2])) == "there are no test clips in fold test"
    assert why(fold("a", [4], train=[0, 2]), fold("b", [1])) == "there are no training clips in fold b"
    assert why(fold("test", [3], train=[0, 1])) == "the training clips of fold test are all of one class"
    assert why(fold("test", [3], train=[0, 2])) == "class 'c' is tested in fold test but has no training clip"


def test_a_class_that_a_limit_left_out_of_training_is_no_fault_of_the_data() -> None:
    data = replace(dataset([0, 0, 1, 2]), limited=True)
    assert kind(data, [fold("test", [3], train=[0, 2])]).why_undefined() is None


def test_examples_are_clips_or_under_x_ares_crops() -> None:
    data = dataset([0, 1], crops=[2, 1])
    assert kind(data, []).examples_of_crops.tolist() == [0, 0, 1]
    assert kind(data, [], "xares").examples_of_crops.tolist() == [0, 1, 2]
