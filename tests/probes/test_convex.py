"""Convex heads: what scikit-learn finds, whatever the scale of a dimension, and the same bytes always."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from xares_onnx.errors import ScoreUndefinedError
from xares_onnx.models import logistic, standardised
from xares_onnx.models.logistic import Multinomial
from xares_onnx.models.standardised import Design, MatrixRows, pool_of
from xares_onnx.probes import convex
from xares_onnx.probes.convex import Classes, ConvexResult, FoldRows, Numbers, Objective, Tags, fit_fold, train_convex

Singles = NDArray[np.float32]
Indices = NDArray[np.int64]
LOW, HIGH = 20.0, 60.0


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """For scikit-learn's sake: threads that wait for each other take many times as long."""
    with threadpool_limits(1):
        yield


@dataclass(frozen=True)
class Problem:
    """Clips of one to three crops, their class, tags and number; one fold."""

    x: Singles
    examples: Indices
    classes: Indices  # a crop each, as the next two
    tags: NDArray[np.bool_]
    numbers: NDArray[np.float64]
    rows: FoldRows

    def fit(self, objective: Objective, **options: Any) -> ConvexResult:
        return fit_fold(self.x, objective, self.examples, self.rows, **options)


def problem(train: int = 120, dim: int = 24, classes: int = 4, *, spread: float = 0.6, seed: int = 0) -> Problem:
    """`train` clips, 60 selection clips, which are held out of training, and 150 test clips."""
    rng = np.random.default_rng(seed)
    count = train + 60 + 150
    of_clip = rng.integers(0, classes, count)
    tags = rng.random((count, 3)) < [0.4, 0.2, 0.1]
    turn = np.linalg.qr(rng.standard_normal((dim, dim)))[0] * (1 / (1 + np.arange(dim)))[:, None]
    clean = spread * rng.standard_normal((classes, dim))[of_clip] + tags @ rng.standard_normal((3, dim))
    examples = np.repeat(np.arange(count), rng.integers(1, 4, count))
    x = (clean[examples] + rng.standard_normal((len(examples), dim)) * 0.7) @ turn
    numbers = np.clip(40 + 8 * clean @ turn @ rng.standard_normal(dim) + rng.standard_normal(count), LOW, HIGH)
    parts = np.split(rng.permutation(count), [train, train + 60])
    crops = [np.flatnonzero(np.isin(examples, part)) for part in parts]
    rows = FoldRows(*crops, held_out=crops[1])
    return Problem(x.astype(np.float32), examples, of_clip[examples], tags[examples], numbers[examples], rows)


OBJECTIVES: dict[str, Callable[[Problem], Objective]] = {
    "classes": lambda p: Classes(p.classes, int(p.classes.max()) + 1),
    "tags": lambda p: Tags(p.tags, 3.0),
    "number": lambda p: Numbers(p.numbers, (LOW, HIGH)),
}


# ---------------------------------------------------------------- the reference


def means(values: NDArray[Any], examples: Indices) -> NDArray[Any]:
    return np.stack([values[examples == example].mean(axis=0) for example in np.unique(examples)])


def of_examples(values: NDArray[Any], examples: Indices) -> NDArray[Any]:
    return values[np.unique(examples, return_index=True)[1]]


def reference_fit(p: Problem, crops: Indices, name: str, strength: float) -> Callable[[Indices], NDArray[Any]]:
    """scikit-learn's solution, as a map of crops to the means of their examples' outputs."""
    scaler = StandardScaler().fit(p.x[crops].astype(np.float64))
    x = scaler.transform(p.x.astype(np.float64))
    if name == "number":
        ridge = Ridge(alpha=strength * len(crops)).fit(x[crops], p.numbers[crops])
        return lambda chosen: means(ridge.predict(x[chosen]), p.examples[chosen]).clip(LOW, HIGH)
    settings = {"C": 1 / (strength * len(crops)), "tol": 1e-9, "max_iter": 1000, "solver": "newton-cholesky"}
    if name == "classes":
        model = LogisticRegression(**settings).fit(x[crops], p.classes[crops])
        return lambda chosen: means(model.predict_proba(x[chosen]), p.examples[chosen])
    models = [
        LogisticRegression(**settings, class_weight={False: 1, True: 3}).fit(x[crops], p.tags[crops, c]) for c in range(3)
    ]
    return lambda chosen: means(np.stack([m.predict_proba(x[chosen])[:, 1] for m in models], axis=1), p.examples[chosen])


def reference_score(p: Problem, outputs: NDArray[Any], crops: Indices, name: str) -> tuple[float, float]:
    """(score, log loss)"""
    if name == "number":
        error = float(np.mean((outputs - of_examples(p.numbers[crops], p.examples[crops])) ** 2))
        return -error, error
    if name == "tags":
        tags = of_examples(p.tags[crops], p.examples[crops])
        loss = -np.log(np.where(tags, outputs, 1 - outputs)).mean()
        return float(average_precision_score(tags, outputs)), float(loss)
    classes = of_examples(p.classes[crops], p.examples[crops])
    return float((outputs.argmax(axis=1) == classes).mean()), -float(
        np.log(outputs[np.arange(len(classes)), classes]).mean()
    )


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("train", [30, 120])  # fewer crops than dimensions, and more
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_head_is_the_one_that_scikit_learn_finds(name: str, train: int) -> None:
    p = problem(train, dim=80 if train == 30 else 24)
    found = p.fit(OBJECTIVES[name](p))
    references = [reference_fit(p, p.rows.train, name, tried.strength) for tried in found.tried]
    scores = [reference_score(p, predict(p.rows.valid), p.rows.valid, name) for predict in references]
    tested = [reference_score(p, predict(p.rows.test), p.rows.test, name)[0] for predict in references]
    selections = [tried.selection for tried in found.tried]
    np.testing.assert_allclose(selections, [score for score, _ in scores], rtol=0.01, atol=0.03)
    np.testing.assert_allclose([tried.test for tried in found.tried], tested, rtol=0.01, atol=0.02)
    best = max(range(len(scores)), key=lambda number: (scores[number][0], -scores[number][1], -number))
    last = reference_fit(p, np.concatenate([p.rows.train, p.rows.held_out]), name, found.tried[found.chosen].strength)
    expected = last(p.rows.test)
    if name == "classes":
        right = of_examples(p.classes[p.rows.test], p.examples[p.rows.test])
        np.testing.assert_allclose(
            (found.predictions == right).mean(), (expected.argmax(axis=1) == right).mean(), atol=0.007
        )
    else:
        np.testing.assert_allclose(found.predictions, expected, atol=6e-3, rtol=2e-4)
    refitted = reference_fit(p, np.concatenate([p.rows.train, p.rows.held_out]), name, found.tried[best].strength)
    whole = reference_score(p, refitted(p.rows.test), p.rows.test, name)[0]
    mine = reference_score(p, expected, p.rows.test, name)[0]
    np.testing.assert_allclose(mine, whole, atol=0.02, rtol=0.05)
    assert found.convergence.converged
    assert all(tried.convergence.converged for tried in found.tried)


@pytest.mark.parametrize("kept", [1 << 24, 10])  # held in memory, and standardised anew in every pass
@pytest.mark.parametrize("strength", [1e-6, 1e-3, 0.1])
def test_probabilities_are_scikit_learns(monkeypatch: pytest.MonkeyPatch, strength: float, kept: int) -> None:
    p = problem()
    monkeypatch.setattr(standardised, "_VALUES_KEPT", kept)
    monkeypatch.setattr(standardised, "ROWS_AT_ONCE", 50)
    objective = Classes(p.classes, 4)
    objective.strengths = (10.0, 1.0, strength)
    *_, fit = fits(p, objective)
    near = replace(fit, strength=strength)
    with pool_of(1) as pool:
        refitted = objective.refit(MatrixRows(p.x, p.rows.train, p.classes), pool, near)
    found = means(objective.activation(refitted.head, p.x[p.rows.test]), p.examples[p.rows.test])
    np.testing.assert_allclose(
        found, reference_fit(p, p.rows.train, "classes", strength)(p.rows.test), atol=1e-3 if strength > 1e-4 else 5e-3
    )


def fits(p: Problem, objective: Any) -> Iterator[convex.Fit]:
    with pool_of(1) as pool:
        yield from objective.fits(MatrixRows(p.x, p.rows.train, objective.targets), pool)


@pytest.mark.parametrize("unused", [0, 2])  # classes without a training crop, before the two that have one
@pytest.mark.parametrize("strength", [10.0, 0.251, 1e-3])
def test_two_classes_are_penalised_as_by_scikit_learn(strength: float, unused: int) -> None:
    p = problem(classes=2)
    objective = Classes(p.classes + unused, 2 + unused)
    objective.strengths = (10.0, 1.58, 0.251, 0.0398, 0.00631, 1e-3)
    fit = next(fit for fit in fits(p, objective) if fit.strength == strength)
    with pool_of(1) as pool:
        refitted = objective.refit(MatrixRows(p.x, p.rows.train, objective.targets), pool, fit)
    found = means(objective.activation(refitted.head, p.x[p.rows.test]), p.examples[p.rows.test])
    assert not found[:, :unused].any()
    expected = reference_fit(p, p.rows.train, "classes", strength)(p.rows.test)
    np.testing.assert_allclose(found[:, unused:], expected, atol=1e-3)


def test_the_gradient_is_that_of_the_objective() -> None:
    """The recorded norm is small where float64 and the plainest formula find it small too."""
    p = problem()
    with pool_of(1) as pool:
        design = Design(MatrixRows(p.x, p.rows.train, p.classes), pool)
        loss = Multinomial(np.bincount(p.classes[p.rows.train]))
        *_, end = logistic.path(design, loss, [1.0, 0.1, 0.01], 1e-5)
        head = design.head(end.theta)
    train = p.x[p.rows.train].astype(np.float64)
    x = (train - train.mean(axis=0)) / train.std(axis=0)
    logits = x @ head.weight + head.bias
    residual = np.exp(logits - logits.max(axis=1, keepdims=True))
    residual /= residual.sum(axis=1, keepdims=True)
    residual[np.arange(len(x)), p.classes[p.rows.train]] -= 1
    gradient = x.T @ residual / len(x) + 0.01 * head.weight
    assert np.linalg.norm(gradient) < 1e-3 * np.linalg.norm(0.01 * head.weight)
    assert np.abs(residual.mean(axis=0)).max() < 1e-5


# ---------------------------------------------------------------- what the encoder's scale is worth


@pytest.mark.parametrize("name", OBJECTIVES)
def test_offsets_and_scales_of_dimensions_move_no_score(name: str) -> None:
    p = problem()
    rng = np.random.default_rng(1)
    scale = 10 ** rng.uniform(-2, 2, p.x.shape[1])
    other = replace(p, x=(p.x * scale + 10 ** rng.uniform(-2, 2, p.x.shape[1]) * scale).astype(np.float32))
    one, two = p.fit(OBJECTIVES[name](p)), other.fit(OBJECTIVES[name](p))
    close = {"rtol": 0.01} if name == "number" else {"atol": 0.01}
    np.testing.assert_allclose([t.test for t in one.tried], [t.test for t in two.tried], **close)
    assert one.chosen == two.chosen
    np.testing.assert_allclose(one.predictions, two.predictions, atol=0.01)


def test_dimensions_that_say_nothing_change_nothing() -> None:
    """One constant, one of zeros, and one whose variation is only rounding."""
    p = problem()
    rng = np.random.default_rng(1)
    still = np.stack([np.full(len(p.x), 7.0), np.zeros(len(p.x)), 1000 + 1e-4 * rng.standard_normal(len(p.x))], axis=1)
    other = replace(p, x=np.concatenate([p.x, still.astype(np.float32)], axis=1))
    one, two = p.fit(Tags(p.tags, 1.0)), other.fit(Tags(p.tags, 1.0))
    np.testing.assert_allclose(one.predictions, two.predictions, atol=1e-3)


@pytest.mark.parametrize("size", [1e-20, 1e14, 1e20, 1e30, 1e36])
def test_large_embeddings_are_learnt_as_small_ones_are(size: float) -> None:
    p = problem(30)
    other = replace(p, x=p.x * np.float32(size))
    np.testing.assert_allclose(p.fit(Tags(p.tags, 1.0)).predictions, other.fit(Tags(p.tags, 1.0)).predictions, atol=1e-3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_embeddings_that_are_all_alike_give_what_is_most_frequent(name: str) -> None:
    p = problem(30)
    found = replace(p, x=np.ones_like(p.x)).fit(OBJECTIVES[name](p))
    assert len(np.unique(found.predictions, axis=0)) == 1
    assert found.convergence.converged
    if name == "classes":
        crops = np.concatenate([p.rows.train, p.rows.held_out])
        assert found.predictions[0] == np.bincount(p.classes[crops]).argmax()


# ---------------------------------------------------------------- selection


@pytest.mark.parametrize("name", OBJECTIVES)
def test_test_labels_select_nothing(name: str) -> None:
    p = problem(45)
    other = replace(p, classes=p.classes.copy(), tags=p.tags.copy(), numbers=p.numbers.copy())
    other.classes[p.rows.test] = 0
    other.tags[p.rows.test] = ~p.tags[p.rows.test]
    other.numbers[p.rows.test] = LOW
    one = p.fit(Classes(p.classes, 4) if name == "classes" else OBJECTIVES[name](p))
    two = other.fit(Classes(other.classes, 4) if name == "classes" else OBJECTIVES[name](other))
    assert one.predictions.tobytes() == two.predictions.tobytes()
    assert one.chosen == two.chosen


def tried(selection: float, log_loss: float, strength: float = 1.0) -> convex.Tried:
    return convex.Tried(strength, selection, log_loss, 0.0, convex.Convergence(0.0, 0, True))


def test_ties_go_to_the_lower_log_loss_and_then_to_the_stronger() -> None:
    assert convex.better(tried(0.6, 2.0), tried(0.5, 1.0), None)
    assert not convex.better(tried(0.4, 0.5), tried(0.5, 1.0), None)
    assert convex.better(tried(0.5, 0.9), tried(0.5, 1.0), None)
    assert not convex.better(tried(0.5, 1.0), tried(0.5, 1.0), None)
    assert convex.better(tried(0.1, 9.0), tried(math.nan, 1.0), None)
    assert convex.better(tried(math.nan, 0.9), tried(math.nan, 1.0), None)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_selection_clips_a_stated_strength_is_taken(name: str) -> None:
    p = problem(45)
    none = p.rows.valid[:0]
    found = replace(p, rows=replace(p.rows, valid=none, held_out=none)).fit(OBJECTIVES[name](p))
    assert found.tried[found.chosen].strength == OBJECTIVES[name](p).without_selection
    assert found.tuning.tried[0].selection is None


def test_the_grid_and_the_record() -> None:
    assert len(convex.LOGISTIC_STRENGTHS) >= 11
    assert convex.LOGISTIC_STRENGTHS[0] / convex.LOGISTIC_STRENGTHS[-1] >= 0.99e8
    p = problem(45)
    tuning = p.fit(Classes(p.classes, 4)).tuning
    assert tuning.setting == "L2 strength"
    assert [trial.setting for trial in tuning.tried] == list(convex.LOGISTIC_STRENGTHS)
    assert set(tuning.chosen) < {trial.setting for trial in tuning.tried}
    assert not tuning.convergence.limit_reached
    assert tuning.convergence.relative_gradient_norm is not None
    assert 0 < tuning.convergence.relative_gradient_norm <= convex.TOLERANCE


def test_an_iteration_limit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(45)
    monkeypatch.setattr(convex, "MAX_ITERATIONS", 2)
    tuning = p.fit(Classes(p.classes, 4)).tuning
    assert tuning.convergence.limit_reached
    assert tuning.convergence.relative_gradient_norm is not None
    assert tuning.convergence.relative_gradient_norm > convex.TOLERANCE


# ---------------------------------------------------------------- what training lacks


def test_a_class_without_training_crops_is_never_predicted() -> None:
    p = problem(45)
    found = p.fit(Classes(p.classes + 1, 7))
    assert set(found.predictions.tolist()) <= {1, 2, 3, 4}


def test_a_class_that_only_held_out_crops_have_is_learnt_in_the_end() -> None:
    p = problem(45)
    classes = p.classes.copy()
    classes[p.rows.train[classes[p.rows.train] == 3]] = 0
    found = replace(p, classes=classes).fit(Classes(classes, 4))
    assert 3 in found.predictions


def test_tags_that_no_crop_has_or_every_one() -> None:
    p = problem(45)
    tags = np.concatenate([p.tags, np.zeros((len(p.tags), 1), bool), np.ones((len(p.tags), 1), bool)], axis=1)
    found = p.fit(Tags(tags, 1.0))
    assert not found.predictions[:, 3].any()
    assert (found.predictions[:, 4] == 1).all()
    np.testing.assert_allclose(found.predictions[:, :3], p.fit(Tags(p.tags, 1.0)).predictions, atol=0.05)


# ---------------------------------------------------------------- no numbers, and the same numbers


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("part", ["train", "valid", "test"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_value_that_is_no_number_gives_no_score(name: str, part: str, value: float) -> None:
    p = problem(30)
    p.x[getattr(p.rows, part)[3], 2] = value
    with pytest.raises(ScoreUndefinedError, match="NaN or infinity"):
        p.fit(OBJECTIVES[name](p))


@pytest.mark.parametrize("kept", [1 << 24, 10])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_same_bytes_whatever_the_threads(monkeypatch: pytest.MonkeyPatch, name: str, kept: int) -> None:
    monkeypatch.setattr(standardised, "ROWS_AT_ONCE", 37)
    monkeypatch.setattr(standardised, "_VALUES_KEPT", kept)
    p = problem(60)
    found = [p.fit(OBJECTIVES[name](p), threads=threads) for threads in (1, 2, 1)]
    with threadpool_limits(2):
        found.append(p.fit(OBJECTIVES[name](p)))
    (one,) = train_convex(p.x, OBJECTIVES[name](p), p.examples, [p.rows])
    for result in (*found, one):
        assert result.predictions.tobytes() == one.predictions.tobytes()
        assert result.tuning == one.tuning


@pytest.mark.parametrize("name", OBJECTIVES)
def test_blocks_change_nothing_that_counts(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    p = problem(60)
    whole = p.fit(OBJECTIVES[name](p))
    monkeypatch.setattr(standardised, "ROWS_AT_ONCE", 37)
    monkeypatch.setattr(convex, "rows_at_once", lambda dim: 11)
    monkeypatch.setattr(standardised, "_VALUES_KEPT", 10)
    blocks = p.fit(OBJECTIVES[name](p))
    if name == "classes":
        assert (blocks.predictions != whole.predictions).mean() < 0.01
    else:
        np.testing.assert_allclose(blocks.predictions, whole.predictions, atol=5e-3)
    assert blocks.chosen == whole.chosen
    assert blocks.examples.tobytes() == whole.examples.tobytes() == np.unique(p.examples[p.rows.test]).tobytes()


def test_memory_is_that_of_the_embeddings_and_a_few_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(30)
    p.fit(Classes(p.classes, 4))  # whatever is loaded at first
    monkeypatch.setattr(standardised, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr(standardised, "_VALUES_KEPT", 10)
    monkeypatch.setattr(convex, "rows_at_once", lambda dim: 64)
    dim, classes, rows = 128, 250, 1500
    x = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    objective = Classes(np.arange(rows) % classes, classes)
    objective.strengths = (10.0, 1.58, 0.251)
    train, valid, test = np.split(np.arange(rows), [rows // 2, rows * 3 // 4])
    tracemalloc.start()
    try:
        fit_fold(x, objective, np.arange(rows), FoldRows(train, valid, test, held_out=valid))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 26 * dim * classes * 4  # bytes of a head's weights
