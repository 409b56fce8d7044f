"""Tags and numbers from embeddings to a score, by both protocols, against scikit-learn, scipy and plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pooled_problems import (
    HEAD,
    HIGH,
    LOW,
    NAMES,
    Floats,
    Indices,
    Problem,
    minus_squared_error,
    precision_of_all,
    precision_of_present,
    problem,
    replace_head,
    rng,
    train_one,
)
from scipy import stats
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler
from torch import nn

from xares_onnx.data.shards import Clips
from xares_onnx.data.targets import ClassTarget, NumberTarget, TagsTarget
from xares_onnx.data.task import Data, Score, Task
from xares_onnx.errors import ScoreUndefinedError
from xares_onnx.metrics.statistics import correlation, error_statistics, mean_squared_error
from xares_onnx.scoring.dataset import Dataset
from xares_onnx.scoring.folds import Fold
from xares_onnx.scoring.kinds import Kept, Kind, Outcome, Tools, kind_of
from xares_onnx.scoring.protocol import Protocol
from xares_onnx.scoring.scoring import score

# ---------------------------------------------------------------- statistics of numbers


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(3, 60),
    offset=st.sampled_from([0.0, -5.0, 1e6]),
    other_offset=st.sampled_from([0.0, 3.0, -1e6]),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_sums_of_numbers_are_scipys(seed: int, count: int, offset: float, other_offset: float, scale: float) -> None:
    """However far predictions and targets lie from 0, and from each other."""
    draw = rng(seed)
    targets = offset + scale * draw.standard_normal(count)
    predictions = other_offset + 0.5 * (targets - offset) + scale * draw.standard_normal(count)
    sums = error_statistics(predictions, targets).sum(axis=0)
    assert mean_squared_error(sums) == pytest.approx(np.mean((predictions - targets) ** 2))
    assert sums[1] / sums[2] == pytest.approx(np.mean(np.abs(predictions - targets)))
    assert correlation(sums) == pytest.approx(stats.pearsonr(predictions, targets).statistic, abs=1e-8)


@given(seed=st.integers(0, 2**32 - 1), clips=st.integers(2, 12))
def test_statistics_may_be_summed_in_any_parts(seed: int, clips: int) -> None:
    draw = rng(seed)
    predictions, targets = draw.normal(50, 3, 30), draw.normal(48, 3, 30)
    statistics, owners = error_statistics(predictions, targets), draw.integers(0, clips, 30)
    counts = draw.integers(1, 4, clips)
    sums = sum(counts[clip] * statistics[owners == clip].sum(axis=0) for clip in range(clips))
    repeated = np.repeat(np.arange(30), counts[owners])
    expected = stats.pearsonr(predictions[repeated], targets[repeated]).statistic
    assert correlation(np.asarray(sums)) == pytest.approx(expected, abs=1e-9)
    assert mean_squared_error(np.asarray(sums)) == pytest.approx(np.mean((predictions - targets)[repeated] ** 2))


@given(constant=st.floats(-1e9, 1e9), count=st.integers(1, 200), seed=st.integers(0, 99))
def test_what_does_not_vary_has_no_correlation(constant: float, count: int, seed: int) -> None:
    varied = rng(seed).normal(3, 2, count)
    fixed = np.full(count, constant)
    for predictions, targets in ((fixed, varied), (varied, fixed), (fixed, fixed)):
        assert math.isnan(correlation(error_statistics(predictions, targets).sum(axis=0)))


def test_correlation_is_of_each_head() -> None:
    draw = rng()
    targets, predictions = draw.standard_normal(20), draw.standard_normal((3, 20))
    sums = np.stack([error_statistics(one, targets).sum(axis=0) for one in predictions])
    expected = [stats.pearsonr(one, targets).statistic for one in predictions]
    np.testing.assert_allclose(correlation(sums), expected)


# ---------------------------------------------------------------- kinds, from embeddings to a score

DATA = Data(splits={"train": "train.tar", "test": "test.tar"})
TAGS = Task(
    name="scenes",
    title="Scenes",
    domain="environment",
    data=DATA,
    target=TagsTarget("tags", NAMES),
    head=replace_head(HEAD, positive_weight=3.0),
    score=Score("mean_average_precision"),
)
NUMBER = Task(
    name="ages",
    title="Ages",
    domain="speech",
    data=DATA,
    target=NumberTarget("age", LOW, HIGH),
    head=HEAD,
    score=Score("mse"),
)
FOLDS = {"a": (40, 12, 30), "b": (61, 15, 20)}


@dataclass(frozen=True)
class Scene:
    problem: Problem
    dataset: Dataset
    folds: list[Fold]

    def kind(self, task: Task, protocol: str = "corrected", threads: int = 1) -> Kind:
        tools = Tools(threads=threads)
        return kind_of(task)(task, Protocol(protocol), self.dataset, self.folds, tools)  # type: ignore[arg-type]


def scene(task: Task, sizes: dict[str, tuple[int, int, int]] = FOLDS, *, noise: float = 1.0, crops: int = 3) -> Scene:
    p = problem(list(sizes.values()), noise=noise, crops=crops)
    labels: list[Any] = [tuple(np.flatnonzero(row).tolist()) for row in p.tags] if task is TAGS else p.numbers.tolist()
    # The clips of a fold in no order: what a head is given must not depend on it.
    parts = [[rng(1).permutation(np.unique(p.examples[part])) for part in (f.train, f.valid, f.test)] for f in p.folds]
    folds = [Fold(name, *found, held_out=found[1]) for name, found in zip(sizes, parts, strict=True)]
    keys = [f"test.tar/{clip:03}" for clip in range(len(labels))]
    clips = Clips(expected=len(labels), read=len(labels), dropped=[])
    return Scene(p, Dataset(p.embeddings, p.examples, labels, keys, {}, clips, 1.0, []), folds)


def trained_outputs(s: Scene, task: Task, fold: int, seed: int) -> tuple[Floats, NDArray[Any], Indices]:
    """(outputs, targets, clips) of the test crops of X-ARES's head by the reference in plain torch.

    It ranks and selects by logits over all classes, and learns numbers as they are.
    """
    p, rows = s.problem, s.problem.folds[fold]
    crops = np.arange(len(p.examples))
    tested = p.examples[np.unique(rows.test)]
    if task is TAGS:
        reference = train_one(
            p.embeddings,
            p.tags[p.examples],
            nn.BCEWithLogitsLoss(pos_weight=torch.full((len(NAMES),), task.head.positive_weight)),
            crops,
            rows,
            lambda outputs, found: precision_of_all(outputs, p.tags[p.examples[found]]),
            task.head,
            (seed, fold),
        )
        return reference.outputs, p.tags[tested], tested
    reference = train_one(
        p.embeddings,
        p.numbers[p.examples, None],
        nn.MSELoss(),
        crops,
        rows,
        lambda outputs, found: minus_squared_error(outputs[:, 0].astype(np.float64), p.numbers[p.examples[found]]),
        task.head,
        (seed, fold),
    )
    return reference.outputs[:, 0].astype(np.float64), p.numbers[tested], tested


def fitted_outputs(s: Scene, task: Task, crops: Indices, strength: float, asked: Indices) -> tuple[Floats, Indices]:
    """(outputs, clips): scikit-learn's head, fitted on some crops, of the clips of others: means over a clip's crops."""
    p = s.problem
    scaler = StandardScaler().fit(p.embeddings[crops].astype(float))
    x = scaler.transform(p.embeddings.astype(float))
    if task is TAGS:
        settings: dict[str, Any] = {"C": 1 / (strength * len(crops)), "tol": 1e-9, "max_iter": 1000}
        outputs = np.zeros((len(asked), len(NAMES)))
        for c in np.flatnonzero(p.tags[p.examples[crops]].any(axis=0)):
            model = LogisticRegression(
                **settings, solver="newton-cholesky", class_weight={False: 1, True: task.head.positive_weight}
            )
            outputs[:, c] = model.fit(x[crops], p.tags[p.examples[crops], c]).predict_proba(x[asked])[:, 1]
    else:
        ridge = Ridge(alpha=strength * len(crops)).fit(x[crops], p.numbers[p.examples[crops]])
        outputs = ridge.predict(x[asked])
    clips = np.unique(p.examples[asked])
    means = np.stack([outputs[p.examples[asked] == clip].mean(axis=0) for clip in clips])
    return means if task is TAGS else means.clip(LOW, HIGH), clips


def scored_by(task: Task, outputs: NDArray[Any], targets: NDArray[Any]) -> float:
    return precision_of_present(outputs, targets) if task is TAGS else minus_squared_error(outputs, targets)


@pytest.mark.parametrize("task", [TAGS, NUMBER], ids=["tags", "number"])
def test_a_converged_head_is_scikit_learns(task: Task) -> None:
    """The strength is the best on the selection clips; with it the head has the held-out clips too. One head per fold."""
    s = scene(task)
    kind = s.kind(task)
    truth = s.problem.tags if task is TAGS else s.problem.numbers
    outcomes = kind.train(3, lambda step: None)
    assert [(outcome.fold, outcome.seed) for outcome in outcomes] == [(0, 0), (1, 0)]
    expected = []
    for outcome in outcomes:
        rows, tuning = s.problem.folds[outcome.fold], outcome.tuning
        assert tuning is not None
        selections = [fitted_outputs(s, task, rows.train, trial.setting, rows.valid) for trial in tuning.tried]
        scores = [scored_by(task, outputs, truth[clips]) for outputs, clips in selections]
        np.testing.assert_allclose([trial.selection for trial in tuning.tried], scores, rtol=0.01, atol=0.02)
        (strength,) = tuning.chosen
        chosen = [trial.setting for trial in tuning.tried].index(strength)
        assert scores[chosen] > max(scores) - (0.02 if task is TAGS else 0.01 * abs(max(scores)))
        both = np.concatenate([rows.train, rows.valid])
        outputs, clips = fitted_outputs(s, task, both, strength, rows.test)
        np.testing.assert_array_equal(outcome.examples, clips)
        np.testing.assert_allclose(outcome.predictions, outputs, rtol=1e-3, atol=2e-3)
        expected.append(scored_by(task, outputs, truth[clips]))
    scored = score(kind, "linear", outcomes)
    assert scored.per_fold == pytest.approx(np.abs(expected), rel=1e-3, abs=2e-3)
    assert scored.per_seed == [scored.score]
    assert scored.tuning is not None
    assert scored.tuning.chosen == [value for outcome in outcomes if outcome.tuning for value in outcome.tuning.chosen]
    assert not scored.tuning.convergence.limit_reached


def test_tags_by_x_ares_from_embeddings_to_a_score() -> None:
    s = scene(TAGS)
    kind = s.kind(TAGS, "xares")
    assert kind.why_undefined() is None
    scored = score(kind, "linear", kind.train(2, lambda epoch: None))
    references = [[trained_outputs(s, TAGS, fold, seed) for seed in range(2)] for fold in range(2)]
    expected = np.array([[precision_of_all(outputs, targets) for outputs, targets, _ in row] for row in references])
    assert expected.std() > 0.01
    np.testing.assert_allclose(scored.per_fold, expected.mean(axis=1), atol=1e-6)
    np.testing.assert_allclose(scored.per_seed, expected.mean(axis=0), atol=1e-6)
    assert scored.score == pytest.approx(expected.mean(), abs=1e-6)
    assert scored.tuning is None
    rows = scored.predictions
    for fold, name in enumerate("ab"):
        for seed in range(2):
            mine = (rows["fold"] == name) & (rows["seed"] == seed)
            outputs, targets, clips = references[fold][seed]
            np.testing.assert_allclose(rows["prediction"][mine], 1 / (1 + np.exp(-outputs.astype(float))), atol=1e-4)
            np.testing.assert_array_equal(rows["target"][mine], targets)
            assert rows["key"][mine].tolist() == [s.dataset.keys[clip] for clip in clips]
    assert len(rows["key"]) == sum(len(outputs) for row in references for outputs, _, _ in row)
    assert (rows["prediction"].dtype, rows["target"].dtype) == (np.float32, np.bool_)


def test_a_number_by_x_ares_from_embeddings_to_a_score() -> None:
    s = scene(NUMBER)
    kind = s.kind(NUMBER, "xares")
    assert kind.why_undefined() is None
    scored = score(kind, "linear", kind.train(2, lambda epoch: None))
    references = [[trained_outputs(s, NUMBER, fold, seed) for seed in range(2)] for fold in range(2)]
    errors = np.array([[np.mean((found - true) ** 2) for found, true, _ in row] for row in references])
    np.testing.assert_allclose(scored.per_fold, errors.mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(scored.per_seed, errors.mean(axis=0), rtol=1e-4)
    assert scored.score == pytest.approx(errors.mean(), rel=1e-4)
    pearson = [[stats.pearsonr(found, true).statistic for found, true, _ in row] for row in references]
    absolute = [[np.mean(np.abs(found - true)) for found, true, _ in row] for row in references]
    assert set(scored.metrics) == {"pearson", "mean_absolute_error"}
    assert scored.metrics["pearson"] == pytest.approx(np.mean(pearson), abs=1e-4)
    assert scored.metrics["mean_absolute_error"] == pytest.approx(np.mean(absolute), rel=1e-4)
    rows = scored.predictions
    for fold, name in enumerate("ab"):
        for seed in range(2):
            mine = (rows["fold"] == name) & (rows["seed"] == seed)
            numbers, targets, clips = references[fold][seed]
            np.testing.assert_allclose(rows["prediction"][mine], numbers, rtol=1e-4)
            np.testing.assert_array_equal(rows["target"][mine], targets)
            assert rows["key"][mine].tolist() == [s.dataset.keys[clip] for clip in clips]
    assert ((rows["prediction"] < LOW) | (rows["prediction"] > HIGH)).any()  # a few epochs from 0 towards 40


@pytest.mark.parametrize("protocol", ["corrected", "xares"])
@pytest.mark.parametrize("task", [TAGS, NUMBER], ids=["tags", "number"])
def test_what_a_score_is_made_of(task: Task, protocol: str) -> None:
    s = scene(task)
    kind = s.kind(task, protocol)
    scored = score(kind, "linear", kind.train(2, lambda step: None))
    assert set(scored.metrics) == ({"classes_with_positives"} if task is TAGS else {"pearson", "mean_absolute_error"})
    if task is TAGS:
        assert scored.metrics["classes_with_positives"] == 5  # of six
        assert scored.estimate.replicates.mean() == pytest.approx(scored.score, abs=0.003)
    assert scored.n_test == 30 + 20
    assert scored.ci95 is not None
    assert scored.ci95[0] < scored.score < scored.ci95[1]
    assert len(scored.per_seed) == (1 if protocol == "corrected" else 2)
    rows = scored.predictions
    if protocol == "corrected":
        assert sorted(rows["key"].tolist()) == sorted(s.dataset.keys[clip] for fold in s.folds for clip in fold.test)
        if task is NUMBER:
            assert (rows["prediction"] >= LOW).all()
            assert (rows["prediction"] <= HIGH).all()


def test_validation_clips_without_tags_select_as_their_protocol_says() -> None:
    """X-ARES's precision is 0 in every epoch, so the first; where it is not defined, the log loss chooses."""
    s = scene(TAGS)
    for fold in s.folds:
        for clip in fold.valid:
            s.problem.tags[clip], s.dataset.labels[clip] = False, ()
    for outcome in s.kind(TAGS, "xares").train(1, lambda epoch: None):
        outputs, _, _ = trained_outputs(s, TAGS, outcome.fold, 0)
        np.testing.assert_allclose(outcome.predictions, 1 / (1 + np.exp(-outputs.astype(float))), atol=1e-4)
    for outcome in s.kind(TAGS).train(1, lambda step: None):
        rows, tuning = s.problem.folds[outcome.fold], outcome.tuning
        assert tuning is not None
        assert {trial.selection for trial in tuning.tried} == {None}
        outputs = [fitted_outputs(s, TAGS, rows.train, trial.setting, rows.valid)[0] for trial in tuning.tried]
        losses = [-np.log(np.maximum(1 - probabilities, 1e-15)).mean() for probabilities in outputs]
        chosen = [trial.setting for trial in tuning.tried].index(tuning.chosen[0])
        assert losses[chosen] == pytest.approx(min(losses), rel=0.02)


@pytest.mark.parametrize("task", [TAGS, NUMBER], ids=["tags", "number"])
def test_several_threads_give_the_same_bytes(task: Task) -> None:
    s = scene(task)
    one, two = (s.kind(task, threads=threads).train(1, lambda step: None) for threads in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert (a.fold, a.predictions.tobytes(), a.tuning) == (b.fold, b.predictions.tobytes(), b.tuning)


@pytest.mark.parametrize("task", [TAGS, NUMBER], ids=["tags", "number"])
def test_the_first_fold_that_fails_ends_all(task: Task) -> None:
    s = scene(task)
    s.problem.embeddings[s.problem.folds[1].test[0]] = np.nan
    told: list[int] = []
    with pytest.raises(ScoreUndefinedError, match="NaN or infinity"):
        s.kind(task, threads=2).train(1, told.append)
    assert told == list(range(1, len(told) + 1))


@pytest.mark.parametrize("protocol", ["corrected", "xares"])
@pytest.mark.parametrize("task", [TAGS, NUMBER], ids=["tags", "number"])
def test_a_clip_counts_with_all_its_crops(task: Task, protocol: str) -> None:
    """`scorer` takes counts of the sorted test clips: as if the rows of each were there so many times."""
    s = scene(task)
    kind = s.kind(task, protocol)
    outcomes = [outcome for outcome in kind.train(2, lambda epoch: None) if outcome.fold == 0]
    tested = np.sort(s.folds[0].test)
    counts = rng(8).integers(0, 4, (3, len(tested)))
    kept = [Kept(kind.columns(outcome), np.searchsorted(tested, kind.clips_of(outcome.examples))) for outcome in outcomes]
    found = kind.scorer(kept, len(tested), task.score.metric, kind.protocol)(counts.astype(float))
    assert found.shape == (3, 1 if protocol == "corrected" else 2)
    for row, counted in zip(found, counts, strict=True):
        times = dict(zip(tested.tolist(), counted.tolist(), strict=True))
        for value, outcome in zip(row, outcomes, strict=True):
            clips = outcome.examples if protocol == "corrected" else s.problem.examples[outcome.examples]
            rows = np.repeat(np.arange(len(clips)), [times[clip] for clip in clips.tolist()])
            predictions = outcome.predictions[rows]
            if task is TAGS:
                scored_by = precision_of_all if protocol == "xares" else precision_of_present
                assert value == pytest.approx(scored_by(predictions, s.problem.tags[clips[rows]]), abs=1e-6)
            else:
                assert value == pytest.approx(np.mean((predictions - s.problem.numbers[clips[rows]]) ** 2))


def test_an_error_of_crops_is_resampled_by_clips() -> None:
    s = scene(NUMBER, {"a": (40, 12, 60)}, crops=6)
    kind = s.kind(NUMBER, "xares")
    scored = score(kind, "linear", kind.train(1, lambda epoch: None))
    rows = scored.predictions
    errors = (rows["prediction"] - rows["target"]) ** 2
    sums, crops = (
        np.array([values[rows["key"] == key].sum() for key in np.unique(rows["key"])])
        for values in (errors, np.ones_like(errors))
    )
    reference = stats.bootstrap(
        (sums, crops),
        lambda one, other, axis: one.sum(axis=axis) / other.sum(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=rng(3),
    )
    assert scored.estimate.replicates.std() == pytest.approx(reference.standard_error, rel=0.06)
    assert scored.ci95 == pytest.approx(tuple(reference.confidence_interval), rel=0.03)


@pytest.mark.parametrize("protocol", ["corrected", "xares"])
def test_predictions_that_do_not_vary_have_an_error_and_no_correlation(protocol: str) -> None:
    s = scene(NUMBER)
    kind = s.kind(NUMBER, protocol)
    constant = 0.1 + 31.7
    outcomes = [
        Outcome(number, 0, examples, np.full(len(examples), constant))
        for number, fold in enumerate(s.folds)
        for examples in [np.unique(kind.examples_of_crops[s.dataset.crops_of(fold.test)])]
    ]
    scored = score(kind, "linear", outcomes)
    assert set(scored.metrics) == {"mean_absolute_error"}
    assert scored.per_fold == pytest.approx(
        [np.mean((constant - s.problem.numbers[kind.clips_of(o.examples)]) ** 2) for o in outcomes]
    )


def test_an_encoder_that_hears_nothing_predicts_the_mean() -> None:
    """A constant embedding leaves a head its bias alone."""
    s = scene(NUMBER)
    s.problem.embeddings[:] = 1
    s.problem.numbers[:] += 0.1
    kind = s.kind(NUMBER)
    scored = score(kind, "linear", kind.train(1, lambda epoch: None))
    assert "pearson" not in scored.metrics
    assert scored.score > 0.8 * np.var(s.problem.numbers)


def test_one_test_clip_has_an_error_and_no_correlation() -> None:
    s = scene(NUMBER, {"a": (40, 12, 1)})
    kind = s.kind(NUMBER)
    scored = score(kind, "linear", kind.train(1, lambda epoch: None))
    assert scored.n_test == 1
    assert set(scored.metrics) == {"mean_absolute_error"}
    assert scored.ci95 == pytest.approx((scored.score, scored.score))


def test_a_score_that_is_not_defined_is_said() -> None:
    s = scene(TAGS)
    kind = s.kind(TAGS)
    outcomes = kind.train(1, lambda epoch: None)
    for clip in s.folds[1].test:
        s.dataset.labels[clip] = ()
    with pytest.raises(ScoreUndefinedError, match="mean_average_precision of its test clips is not defined"):
        score(s.kind(TAGS), "linear", outcomes)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("protocol", "steps"), [("corrected", (2 * 12, 2 * 22)), ("xares", (HEAD.epochs, HEAD.epochs))])
def test_every_step_is_counted(protocol: str, steps: tuple[int, int], threads: int) -> None:
    """Fits of a converged head: of each fold one per strength and the last; epochs of X-ARES's."""
    for task, count in zip((TAGS, NUMBER), steps, strict=True):
        told: list[int] = []
        kind = scene(task).kind(task, protocol, threads)
        kind.train(1, told.append)
        assert told == list(range(1, count + 1))
        assert kind.steps() == count


def test_tags_and_numbers_know_no_neighbours() -> None:
    for task in (TAGS, NUMBER):
        with pytest.raises(NotImplementedError, match=f"there is no kNN for {task.kind}"):
            scene(task).kind(task).search()


# ---------------------------------------------------------------- what gives no score


def fold_of(train: list[int], test: list[int], name: str = "x") -> Fold:
    none = np.empty(0, np.int64)
    return Fold(name, np.array(train, np.int64), none, np.array(test, np.int64), none)


def labelled(task: Task, labels: list[Any], *folds: Fold) -> Kind:
    count = len(labels)
    clips = Clips(expected=count, read=count, dropped=[])
    keys = [str(clip) for clip in range(count)]
    dataset = Dataset(np.zeros((count, 2), np.float32), np.arange(count), labels, keys, {}, clips, 1.0, [])
    return kind_of(task)(task, Protocol("corrected"), dataset, list(folds), Tools())


@pytest.mark.parametrize(
    ("folds", "why"),
    [
        ([fold_of([0, 2], [1])], None),
        ([fold_of([2, 4], [1])], "the training clips of fold x have no tags"),
        ([fold_of([0, 1], [2, 4])], "the test clips of fold x have no tags"),
        ([fold_of([0, 1], [3]), fold_of([0], [2], "y")], "the test clips of fold y have no tags"),
        ([fold_of([], [1])], "there are no training clips in fold x"),
        ([fold_of([0], [])], "there are no test clips in fold x"),
        ([fold_of([1, 3], [0])], None),  # a class that is only tested is ranked by chance, and has a score
    ],
)
def test_which_tags_have_no_score(folds: list[Fold], why: str | None) -> None:
    assert labelled(TAGS, [(0, 2), (1,), (), (0, 1), ()], *folds).why_undefined() == why


@pytest.mark.parametrize(
    ("fold", "why"),
    [
        (fold_of([0], [1]), None),
        (fold_of([], [1]), "there are no training clips in fold x"),
        (fold_of([0], []), "there are no test clips in fold x"),
    ],
)
def test_which_numbers_have_no_score(fold: Fold, why: str | None) -> None:
    assert labelled(NUMBER, [21.0, 22.0], fold).why_undefined() == why


def test_a_class_that_is_tested_and_not_trained_has_no_score() -> None:
    task = Task(name="c", title="C", domain="music", data=DATA, target=ClassTarget("key", ("a", "b", "c")))
    why = labelled(task, [0, 1, 2, 2], fold_of([0, 1], [2, 3], "y")).why_undefined()
    assert why == "class 'c' is tested in fold y but has no training clip"


@given(labels=st.lists(st.lists(st.integers(0, 5), max_size=4, unique=True).map(tuple), min_size=1, max_size=20))
def test_a_clips_stratum_is_its_rarest_tag(labels: list[tuple[int, ...]]) -> None:
    """Held-out clips are chosen in the same proportion from every stratum; clips without tags are one of their own."""
    strata = kind_of(TAGS).strata(labels)
    assert strata.dtype == np.int64
    often = [sum(tag in tags for tags in labels) for tag in range(6)]
    for tags, stratum in zip(labels, strata.tolist(), strict=True):
        assert stratum >= 0
        if not tags:
            assert stratum == 0
        else:
            assert stratum - 1 in tags
            assert often[stratum - 1] == min(often[tag] for tag in tags)
    assert kind_of(NUMBER).strata([1.5] * 3).tolist() == [0, 0, 0]


def test_macro_f1_of_classes_is_scikit_learns() -> None:
    """The kind that they share a head with: predictions of two seeds, macro F1 over the classes that are tested."""
    task = Task(name="c", title="C", domain="music", data=DATA, target=ClassTarget("key", NAMES))
    labels = rng().integers(0, 5, 40)
    kind = labelled(task, labels.tolist(), fold_of([0, 1, 2], list(range(3, 40))))
    outcomes = [Outcome(0, seed, np.arange(3, 40), rng(seed + 5).integers(0, 6, 37)) for seed in range(2)]
    scored = score(kind, "linear", outcomes)
    truth = labels[3:]
    expected = [f1_score(truth, o.predictions, labels=np.unique(truth), average="macro") for o in outcomes]
    assert scored.metrics["macro_f1"] == pytest.approx(np.mean(expected))
    assert scored.per_seed == pytest.approx([np.mean(o.predictions == truth) for o in outcomes])
