"""Heads of tags and numbers are trained as plain torch trains them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pooled_problems import (
    DIM,
    HEAD,
    HIGH,
    LOW,
    NAMES,
    UNEQUAL,
    Floats,
    Problem,
    minus_squared_error,
    precision_of_all,
    precision_of_present,
    problem,
    replace_head,
    rng,
    train_one,
)
from torch import nn

from xares_onnx.errors import ScoreUndefinedError
from xares_onnx.models.linear import binary_cross_entropy_gradient
from xares_onnx.probes import linear
from xares_onnx.probes.linear import Classification, Regression, Tagging, train_linear
from xares_onnx.probes.training import HeadResult, Rows

# ---------------------------------------------------------------- training


@pytest.mark.parametrize("present_only", [True, False])
@pytest.mark.parametrize("weight", [1.0, 6.0])
def test_tags_are_learnt_as_torch_learns_them(weight: float, present_only: bool) -> None:
    p = problem(UNEQUAL)
    scored_by = precision_of_present if present_only else precision_of_all
    found = train_linear(
        p.embeddings, Tagging(p.tags[p.examples], weight, present_only=present_only), p.examples, p.folds, HEAD, (0, 5)
    )
    assert [(result.fold, result.seed) for result in found] == [(f, s) for f in range(3) for s in (0, 5)]
    early = 0
    for result in found:
        reference = train_one(
            p.embeddings,
            p.tags[p.examples],
            nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weight)),
            p.examples,
            p.folds[result.fold],
            lambda scores, examples: scored_by(scores, p.tags[examples]),
            HEAD,
            (result.seed, result.fold),
            torch.sigmoid,
        )
        assert reference.moved > 0.3  # there was something to learn
        assert result.examples.tolist() == np.unique(p.examples[p.folds[result.fold].test]).tolist()
        np.testing.assert_allclose(result.predictions, reference.outputs, atol=1e-4)
        assert result.best_epoch == reference.epoch
        assert result.valid_score == pytest.approx(max(reference.valid_scores), abs=1e-6)
        early += result.best_epoch < HEAD.epochs
    assert early


def test_the_weight_of_positives_changes_what_is_learnt() -> None:
    p = problem([(60, 0, 40)])
    light, heavy = (
        train_linear(p.embeddings, Tagging(p.tags[p.examples], w, present_only=True), p.examples, p.folds, HEAD, (0,))[0]
        for w in (1.0, 6.0)
    )
    assert heavy.predictions.mean() > light.predictions.mean() + 0.1


@pytest.mark.parametrize("bounds", [None, (LOW, HIGH)])
def test_numbers_are_learnt_as_torch_learns_them(bounds: tuple[float, float] | None) -> None:
    """With bounds on the scale 0..1, and cut off at them; without, on the number itself."""
    p = problem(UNEQUAL)
    low, width = (LOW, HIGH - LOW) if bounds else (0.0, 1.0)
    head = replace_head(HEAD, learning_rate=0.03 if bounds else 0.3)
    found = train_linear(p.embeddings, Regression(p.numbers[p.examples], bounds), p.examples, p.folds, head, (0, 5))
    early, cut = 0, 0

    def decided(outputs: NDArray[Any]) -> Floats:
        numbers = outputs[:, 0].astype(np.float64) * width + low
        return np.clip(numbers, *bounds) if bounds else numbers

    for result in found:
        reference = train_one(
            p.embeddings,
            (p.numbers[p.examples, None] - low) / width,
            nn.MSELoss(),
            p.examples,
            p.folds[result.fold],
            lambda outputs, examples: minus_squared_error(decided(outputs), p.numbers[examples]),
            head,
            (result.seed, result.fold),
        )
        assert reference.moved > 0.1
        np.testing.assert_allclose(result.predictions, decided(reference.outputs), rtol=1e-4)
        assert result.best_epoch == reference.epoch
        assert result.valid_score == pytest.approx(max(reference.valid_scores), rel=1e-4)
        assert result.valid_score < 0
        early += result.best_epoch < head.epochs
        cut += int(np.isin(result.predictions, [LOW, HIGH]).sum())
    assert early or not bounds  # raw numbers are still approached when the training ends
    assert bool(cut) == bool(bounds)


def test_the_gradient_of_tags_is_autograds() -> None:
    draw = rng(4)
    logits = torch.from_numpy(draw.normal(0, 4, (2, 5, 3))).float().requires_grad_()
    targets = torch.from_numpy(draw.random((2, 5, 3)) < 0.4)
    weight = torch.from_numpy(draw.random((2, 5))).float()
    for positive_weight in (1.0, 10.0):
        logits.grad = None
        losses = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(positive_weight), reduction="none")(logits, targets.float())
        (losses.mean(dim=2) * weight).sum().backward()
        found = binary_cross_entropy_gradient(logits.detach(), targets, weight, positive_weight)
        torch.testing.assert_close(found, logits.grad)


@pytest.mark.parametrize("bounds", [None, (LOW, HIGH)])
def test_the_gradient_of_a_number_is_autograds(bounds: tuple[float, float] | None) -> None:
    draw = rng(4)
    logits = torch.from_numpy(draw.normal(0, 4, (2, 5, 1))).float().requires_grad_()
    targets = torch.from_numpy(draw.uniform(LOW, HIGH, (2, 5)))
    weight = torch.from_numpy(draw.random((2, 5))).float()
    scaled = ((targets - LOW) / (HIGH - LOW) if bounds else targets).float()
    (nn.MSELoss(reduction="none")(logits[..., 0], scaled) * weight).sum().backward()
    torch.testing.assert_close(Regression(targets.numpy(), bounds).gradient(logits.detach(), targets, weight), logits.grad)


OBJECTIVES: dict[str, Callable[[Problem], Any]] = {
    "classes": lambda p: Classification(p.tags[p.examples].argmax(axis=1), len(NAMES)),
    "tags": lambda p: Tagging(p.tags[p.examples], 1.0, present_only=True),
    "number": lambda p: Regression(p.numbers[p.examples], (LOW, HIGH)),
    "raw number": lambda p: Regression(p.numbers[p.examples], None),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_validation_the_last_epoch_is_taken(objective: str) -> None:
    p = problem([(30, 0, 20)])
    (result,) = train_linear(p.embeddings, OBJECTIVES[objective](p), p.examples, p.folds, HEAD, (0,))
    assert result.best_epoch == HEAD.epochs
    assert math.isnan(result.valid_score)


def test_validation_clips_without_tags_select_nothing_unless_every_class_counts() -> None:
    """No class to average over: the last epoch. Over all classes the score is 0 in every epoch: the first."""
    p = problem([(40, 10, 20)])
    p.tags[np.unique(p.examples[p.folds[0].valid])] = False
    for present_only, epoch in ((True, HEAD.epochs), (False, 1)):
        objective = Tagging(p.tags[p.examples], 1.0, present_only=present_only)
        (result,) = train_linear(p.embeddings, objective, p.examples, p.folds, HEAD, (0,))
        assert result.best_epoch == epoch


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_no_numbers_give_no_score_and_nothing_else(objective: str, value: float) -> None:
    p = problem([(30, 10, 20)])
    p.embeddings[:] *= np.float32(value)
    with pytest.raises(ScoreUndefinedError, match="NaN or infinity"):
        train_linear(p.embeddings, OBJECTIVES[objective](p), p.examples, p.folds, HEAD, (0,))


def test_a_number_that_the_head_cannot_hold_gives_no_score() -> None:
    """The embeddings are fine, but single precision ends at 3.4e38."""
    p = problem([(30, 10, 20)])
    with pytest.raises(ScoreUndefinedError, match="NaN or infinity"):
        train_linear(p.embeddings, Regression(p.numbers[p.examples] * 1e40, None), p.examples, p.folds, HEAD, (0,))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("size", [1e14, 1e16, 1e20, 1e30, 1e36])
def test_large_embeddings_are_learnt_as_small_ones_are(objective: str, size: float) -> None:
    """The square of 1e20 overflows, and a LayerNorm in float32 would make zeros of it: every head would be a constant."""
    p = problem([(30, 10, 20)])
    small, large = (
        train_linear(p.embeddings * scale, OBJECTIVES[objective](p), p.examples, p.folds, HEAD, (0,))[0]
        for scale in (np.float32(1), np.float32(size))
    )
    assert len(np.unique(small.predictions)) > 1
    np.testing.assert_allclose(large.predictions, small.predictions, atol=0.01)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_one_nan_is_enough(objective: str, part: str) -> None:
    p = problem([(30, 10, 20)])
    p.embeddings[getattr(p.folds[0], part)[3], 2] = math.nan
    with pytest.raises(ScoreUndefinedError):
        train_linear(p.embeddings, OBJECTIVES[objective](p), p.examples, p.folds, HEAD, (0,))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_same_bytes_twice_and_the_same_numbers_alone(objective: str) -> None:
    p = problem(UNEQUAL)
    made = OBJECTIVES[objective](p)

    def trained(folds: list[Rows], seeds: Sequence[int]) -> dict[tuple[int, int], HeadResult]:
        return {(r.fold, r.seed): r for r in train_linear(p.embeddings, made, p.examples, folds, HEAD, seeds)}

    together, again, alone = trained(p.folds, (0, 1)), trained(p.folds, (0, 1)), trained(p.folds[:2], (1,))
    for key, result in together.items():
        assert result.predictions.tobytes() == again[key].predictions.tobytes()
    for key, result in alone.items():
        np.testing.assert_allclose(result.predictions, together[key].predictions, rtol=1e-5, atol=1e-6)


def test_test_labels_select_nothing() -> None:
    p = problem([(40, 12, 30)])
    other = replace(p, tags=p.tags.copy(), numbers=p.numbers.copy())
    tested = np.unique(p.examples[p.folds[0].test])
    other.tags[tested] = ~other.tags[tested]
    other.numbers[tested] = LOW
    for made in (OBJECTIVES["tags"], OBJECTIVES["number"]):
        one, two = (train_linear(q.embeddings, made(q), q.examples, q.folds, HEAD, (0,))[0] for q in (p, other))
        assert one.predictions.tobytes() == two.predictions.tobytes()
        assert one.valid_score == two.valid_score


def test_scoring_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem([(40, 12, 30)])
    whole = [train_linear(p.embeddings, OBJECTIVES[n](p), p.examples, p.folds, HEAD, (0,))[0] for n in ("tags", "number")]
    monkeypatch.setattr(linear, "_VALUES_AT_ONCE", 7 * DIM)
    for name, expected in zip(("tags", "number"), whole, strict=True):
        (blocks,) = train_linear(p.embeddings, OBJECTIVES[name](p), p.examples, p.folds, HEAD, (0,))
        np.testing.assert_allclose(blocks.predictions, expected.predictions, rtol=1e-5)
        assert blocks.best_epoch == expected.best_epoch
