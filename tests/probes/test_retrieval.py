"""Retrieval heads against torch's own layers on every token of a padded batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from quick_sweeps import set_width
from retrieval_reference import (
    ANIMALS,
    ARITHMETICS,
    SOUNDS,
    Problem,
    Settings,
    loss_by_hand,
    problem,
    score,
    train_one,
    training_captions,
)

from xares_onnx.errors import ScoreUndefinedError
from xares_onnx.models import retrieval as towers
from xares_onnx.models.retrieval import RetrievalHead
from xares_onnx.probes import retrieval
from xares_onnx.probes.sweep import Sweep
from xares_onnx.probes.training import HeadResult, Rows
from xares_onnx.probes.wordpiece import WordPiece

REAL_WIDTH = towers.WIDTH


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """One test is of towers as wide as they are; all else is the same in narrow ones."""
    set_width(monkeypatch, 64)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RetrievalHead]:
    """The heads of a training, in the order in which they were made."""
    found: list[RetrievalHead] = []

    class Watched(RetrievalHead):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.tokens = arguments[2]
            found.append(self)

    monkeypatch.setattr(retrieval, "RetrievalHead", Watched)
    return found


def deviations(head: Any, expected: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float64]]:
    """Of each parameter, as far as it was kept."""
    found = {name: value.detach().numpy() for name, value in head.named_parameters()}
    kept = expected | {"embedding": expected["embedding"][head.tokens.numpy()]}
    assert found.keys() == kept.keys()
    return {name: np.abs(found[name].astype(np.float64) - kept[name]) for name in found}


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_one_step_is_that_of_plain_torch(
    arithmetic: str, trained: list[RetrievalHead], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert REAL_WIDTH == 1024
    set_width(monkeypatch, REAL_WIDTH)
    p = problem([(9, 0, 4)])
    vocabulary = WordPiece.trained(training_captions(p, 0))
    one = Settings(epochs=1, batch_size=1000, learning_rate=1e-3)
    expected = train_one(p, 0, 3, one, arithmetic, vocabulary)
    [result] = p.train(arithmetic, one, seeds=[3])
    for off in deviations(trained[0], expected.best).values():
        # Adam's first step is the rate times the gradient's sign, so one that is hardly more than rounding may differ.
        assert (off < 1e-6).mean() > 0.998
        assert off.max() <= 2e-3
    assert min(moved.mean() for moved in deviations(trained[0], expected.initial).values()) > 5e-4
    assert (result.best_epoch, math.isnan(result.valid_score)) == (1, True)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_a_training_is_that_of_plain_torch(arithmetic: str, trained: list[RetrievalHead]) -> None:
    p = problem([(14, 8, 9), (11, 8, 7)], seed=1)
    run = Settings(epochs=4, batch_size=16, learning_rate=5e-4)
    for fold, result in enumerate(p.train(arithmetic, run, seeds=[5])):
        expected = train_one(p, fold, 5, run, arithmetic, WordPiece.trained(training_captions(p, fold)))
        assert (result.fold, result.seed) == (fold, 5)
        assert (result.best_epoch - 1, result.valid_score) == (
            np.argmax(expected.scores),
            pytest.approx(max(expected.scores)),
        )
        assert result.examples.tolist() == expected.examples.tolist()
        assert result.predictions.tolist() == expected.predictions.tolist()
        assert result.predictions.dtype == np.int64
        moved = deviations(trained[fold], expected.initial)
        for name, off in deviations(trained[fold], expected.best).items():
            assert (off < 1e-4).mean() > 0.999
            assert moved[name].mean() > 1e3 * off.mean()


def standardised(p: Problem, fold: int) -> Problem:
    train = p.embeddings[p.folds[fold].train].astype(np.float64)
    deviation = train.std(axis=0)
    x = (p.embeddings - train.mean(axis=0)) / np.where(deviation > 0, deviation, np.inf)
    return Problem(x.astype(np.float32), p.captions, p.clip_of_crop, p.folds)


def test_a_sweep_of_one_rate_is_plain_torch_on_standardised_embeddings(trained: list[RetrievalHead]) -> None:
    p = problem([(14, 0, 9), (11, 0, 7)], seed=1)
    p.embeddings[:, 2] = 7  # a constant dimension
    for fold, result in enumerate(p.train("corrected", Sweep((5e-4,), 16, epochs=4, patience=2), seeds=[5])):
        vocabulary = WordPiece.trained(training_captions(p, fold))
        run = Settings(epochs=4, batch_size=16, learning_rate=5e-4)
        expected = train_one(standardised(p, fold), fold, 5, run, "corrected", vocabulary, constant_rate=True)
        assert result.predictions.tolist() == expected.predictions.tolist()
        moved = deviations(trained[fold], expected.initial)
        for name, off in deviations(trained[fold], expected.best).items():
            assert (off < 1e-4).mean() > 0.999
            assert moved[name].mean() > 1e3 * off.mean()


def test_a_sweep_takes_the_best_epoch_of_the_best_rate(
    trained: list[RetrievalHead], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and losses of every epoch and rate computed again, by hand, from the weights after it."""
    p = problem([(20, 12, 9)], seed=3)
    seen: list[tuple[float, float, float, int]] = []
    selected = retrieval._Learner.selected

    def watched(learner: Any) -> tuple[float, float]:
        score_and_loss = selected(learner)
        with torch.no_grad():
            rows, pairing = p.folds[0].valid, learner._pairing
            crops = np.array([crop for crop in rows for _ in p.captions[p.clip_of_crop[crop]]])
            texts = np.concatenate(pairing.texts_of(rows))
            audio, text = learner._head.audio(learner._x[crops]), learner._head.text(*pairing.packed(texts))
            clips = p.clip_of_crop[crops].tolist()
            by_hand = loss_by_hand(audio, text, learner._head.log_temperature, clips, "corrected")
        assert score_and_loss == pytest.approx((score(learner._predict(rows)[1]), float(by_hand)), rel=1e-5)
        seen.append((score_and_loss[0], -score_and_loss[1], -learner.rate, -learner.epoch))
        return score_and_loss

    monkeypatch.setattr(retrieval._Learner, "selected", watched)
    plan = Sweep((1e-4, 1e-3, 1e-2), 1000, epochs=25, patience=3)
    (result,) = p.train("corrected", plan)
    best = max(seen)
    assert result.tuning is not None
    assert (result.valid_score, result.tuning.chosen, result.best_epoch) == (best[0], [-best[2]], -best[3])
    for trial in result.tuning.tried:
        assert trial.selection == max(score for score, _, rate, _ in seen if rate == -trial.setting)
    chosen = next(trial for trial in result.tuning.tried if [trial.setting] == result.tuning.chosen)
    assert chosen.test == pytest.approx(score(result.predictions))
    assert result.tuning.train is not None
    assert result.tuning.train > chosen.test


def test_offset_and_unequal_scaling_do_not_move_a_sweeps_score() -> None:
    p, rng = concepts(shuffled=False), np.random.default_rng(0)
    factors, offset = 10 ** rng.uniform(-2, 2, 16), 100 * rng.standard_normal(16)
    moved = Problem((p.embeddings * factors + offset).astype(np.float32), p.captions, p.clip_of_crop, p.folds)
    plan = Sweep((3e-4, 3e-3), 32, epochs=6, patience=3)
    (one,), (other,) = p.train("corrected", plan), moved.train("corrected", plan)
    assert score(one.predictions) > 0.9
    assert score(other.predictions) == pytest.approx(score(one.predictions), abs=0.03)


def test_a_sweep_gives_the_same_bytes_twice_whatever_the_threads() -> None:
    p = problem([(10, 5, 6), (8, 4, 7)], seed=2)
    plan = Sweep((1e-3, 1e-2), 16, epochs=4, patience=2)
    once = p.train("corrected", plan, seeds=[0, 1])
    torch.set_num_threads(2)
    again = p.train("corrected", plan, seeds=[0, 1])
    torch.set_num_threads(1)
    assert repr(once) == repr(again)
    assert [(result.fold, result.seed) for result in once] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_a_sweep_of_embeddings_that_are_no_numbers_gives_no_score(part: str) -> None:
    p = problem([(6, 3, 4)])
    p.embeddings[getattr(p.folds[0], part)[-1], 0] = np.inf
    with pytest.raises(ScoreUndefinedError, match="NaN or infinity"):
        p.train("corrected", Sweep((1e-3, 1e-2), 16, epochs=2, patience=1))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_a_given_vocabulary_is_used_and_its_other_tokens_do_not_matter(arithmetic: str) -> None:
    p = problem([(9, 4, 5)])
    letters = [chr(97 + i) for i in range(26)]
    tokens = [
        "[PAD]",
        "x1",
        "[UNK]",
        "[SEP]",
        "[CLS]",
        ".",
        *letters,
        *(f"##{c}" for c in letters),
        *ANIMALS,
        *SOUNDS,
        "the",
    ]
    given = WordPiece(tokens)
    expected = train_one(p, 0, 0, Settings(), arithmetic, given)
    [result] = p.train(arithmetic, Settings(), vocabulary=given)
    assert result.predictions.tolist() == expected.predictions.tolist()
    assert result.valid_score == pytest.approx(max(expected.scores))


def test_without_a_vocabulary_each_fold_has_that_of_its_training_captions(trained: list[RetrievalHead]) -> None:
    p = problem([(9, 4, 5), (8, 5, 4)])
    captions = [[f"{caption} {'z' * clip}" for caption in own] for clip, own in enumerate(p.captions)]
    p = Problem(p.embeddings, captions, p.clip_of_crop, p.folds)
    run = Settings(epochs=1)
    beside = p.train("corrected", run)
    for fold in (0, 1):
        own = p.train("corrected", run, vocabulary=WordPiece.trained(training_captions(p, fold)))[fold]
        assert torch.equal(trained[fold].embedding, trained[-2 + fold].embedding)
        assert same(own, beside[fold])
    sizes = {WordPiece.trained(training_captions(p, fold)).digest for fold in (0, 1)}
    assert len(sizes) == 2


def same(one: HeadResult, other: HeadResult) -> bool:
    scores = np.array([one.valid_score, other.valid_score])
    return (
        (one.fold, one.seed, one.best_epoch) == (other.fold, other.seed, other.best_epoch)
        and np.array_equal(scores[:1], scores[1:], equal_nan=True)
        and np.array_equal(one.examples, other.examples)
        and np.array_equal(one.predictions, other.predictions)
    )


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_a_head_does_not_depend_on_its_neighbours_or_on_threads(arithmetic: str, trained: list[RetrievalHead]) -> None:
    p = problem([(10, 5, 6), (8, 0, 7)], seed=2)
    state = torch.random.get_rng_state()
    results = p.train(arithmetic, Settings(), seeds=[4, 1])
    assert [(result.fold, result.seed) for result in results] == [(0, 1), (0, 4), (1, 1), (1, 4)]
    together = [[parameter.detach().clone() for parameter in head.parameters()] for head in trained]
    torch.set_num_threads(2)
    [alone] = p.train(arithmetic, Settings(), seeds=[4], folds=1)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert same(alone, results[1])
    assert all(torch.equal(a, b) for a, b in zip(trained[-1].parameters(), together[1], strict=True))
    assert not torch.equal(together[0][2], together[1][2])  # nor are two seeds the same
    assert torch.equal(torch.random.get_rng_state(), state)


def test_epochs_are_told_once_each_as_the_whole_training_goes_on() -> None:
    p = problem([(4, 2, 3), (5, 2, 2)])
    told: list[int] = []
    p.train("corrected", Settings(epochs=3), seeds=[0, 1], on_epoch=told.append)
    assert told == [1, 2, 3]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_batches_of_one_pair_train(arithmetic: str) -> None:
    p = problem([(3, 2, 4)])
    one = Problem(p.embeddings, p.captions, p.clip_of_crop, [Rows(p.folds[0].train[:1], p.folds[0].valid, p.folds[0].test)])
    for q, size in ((one, 16), (p, 1)):
        [result] = q.train(arithmetic, Settings(batch_size=size))
        assert np.isfinite(result.valid_score)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("rate", [1e9, 1e38])  # after one step, an audio vector is finite but not its norm; not even finite
def test_a_head_that_runs_away_gives_no_score(arithmetic: str, rate: float) -> None:
    p = problem([(6, 0, 4)])
    with pytest.raises(ScoreUndefinedError, match="NaN or infinity"):
        p.train(arithmetic, Settings(epochs=1, batch_size=1000, learning_rate=rate))


def concepts(shuffled: bool) -> Problem:
    """Each of 25 combinations in 4 training, 1 validation and 1 test clip; captions name the combination, or any."""
    rng = np.random.default_rng(0)
    animals, sounds = (np.tile(axis.ravel(), 6) for axis in np.meshgrid(range(5), range(5)))
    clips = len(animals)
    embeddings = np.eye(5)[animals] @ rng.standard_normal((5, 16)) + np.eye(5)[sounds] @ rng.standard_normal((5, 16))
    embeddings += 0.1 * rng.standard_normal(embeddings.shape)
    named = np.concatenate([part + rng.permutation(25) for part in range(0, clips, 25)]) if shuffled else np.arange(clips)
    captions = [
        [f"A {ANIMALS[animals[i]]} is {SOUNDS[sounds[i]]} {where}." for where in ("loudly", "outside")[: 1 + clip % 2]]
        for clip, i in enumerate(named)
    ]
    parts = np.split(np.arange(clips), [100, 125])
    return Problem(embeddings.astype(np.float32), captions, np.arange(clips), [Rows(*parts)])


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_what_captions_name_is_learnt_and_chance_is_not(arithmetic: str) -> None:
    run = Settings(epochs=6, batch_size=16)
    assert score(concepts(shuffled=False).train(arithmetic, run)[0].predictions) > 0.9
    assert score(concepts(shuffled=True).train(arithmetic, run)[0].predictions) < 0.2


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_a_constant_encoder_scores_at_chance(arithmetic: str) -> None:
    p = problem([(8, 4, 20)], captions=5)
    constant = Problem(np.ones_like(p.embeddings), p.captions, p.clip_of_crop, p.folds)
    [result] = constant.train(arithmetic, Settings(epochs=1))
    assert score(result.predictions) < 0.15
