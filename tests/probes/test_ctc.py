"""The transcript heads against torch's own layers, CTC loss and optimiser, a head at a time."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ctc_reference import (
    ALPHABET,
    DIM,
    Corpus,
    Settings,
    bytes_of,
    character_accuracy,
    corpus,
    parameters_of,
    rows,
    torch_loss,
    train_one,
    word_accuracy,
)
from numpy.typing import NDArray
from torch import Tensor, nn

from xares_onnx.errors import ScoreUndefinedError
from xares_onnx.models.ctc import CtcHead
from xares_onnx.probes import ctc
from xares_onnx.probes.ctc import why_not
from xares_onnx.probes.sweep import Sweep


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[CtcHead]:
    """Every head that is made, in order: by fold, then by seed. After a training they have the chosen parameters."""
    made: list[CtcHead] = []

    class Watched(CtcHead):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(ctc, "CtcHead", Watched)
    return made


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(("sizes", "batch_size"), [([(9, 0, 6), (14, 0, 5)], 4), ([(5, 0, 4)], 8)])
def test_heads_are_trained_as_torch_would(sizes: list[tuple[int, int, int]], batch_size: int, heads: list[CtcHead]) -> None:
    c, seeds = corpus(sizes), (7, 0)
    settings = Settings(epochs=5, batch_size=batch_size)
    results = c.train(settings, seeds)
    assert [(result.fold, result.seed) for result in results] == [(f, s) for f in range(len(sizes)) for s in (0, 7)]
    for result, head in zip(results, heads, strict=True):
        reference = train_one(c, result.fold, result.seed, settings)
        for name, expected in reference.last.items():
            np.testing.assert_allclose(parameters_of(head)[name], expected, atol=2e-4, err_msg=name)
            assert np.abs(expected - reference.initial[name]).max() > 0.02  # there was something to get wrong
        np.testing.assert_array_equal(result.examples, np.sort(c.folds[result.fold].test))
        assert result.predictions == reference.hypotheses
        assert result.best_epoch == settings.epochs  # nothing to select by, so the last
        assert math.isnan(result.valid_score)


def standardised(c: Corpus, fold: int) -> Corpus:
    train = np.concatenate([c.frames[clip] for clip in c.folds[fold].train]).astype(np.float64)
    deviation = train.std(axis=0)
    inverse = np.divide(1, deviation, out=np.zeros(DIM), where=deviation > 0)
    frames = [((clip - train.mean(axis=0)) * inverse).astype(np.float32) for clip in c.frames]
    return Corpus(frames, c.transcripts, c.folds)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_a_sweep_of_one_rate_is_plain_torch_on_standardised_frames(kind: Any, heads: list[CtcHead]) -> None:
    c = corpus([(9, 0, 6), (14, 0, 5)])
    for clip in c.frames:
        clip[:, 3] = 2.5  # a constant dimension
    c = Corpus([clip.astype(kind) for clip in c.frames], c.transcripts, c.folds)
    results = c.train(Sweep((0.03,), 4, epochs=5, patience=2), (7,))
    for result, head in zip(results, heads, strict=True):
        of_fold = standardised(c, result.fold)
        reference = train_one(of_fold, result.fold, 7, Settings(epochs=5), constant_rate=True)
        for name, expected in reference.last.items():
            np.testing.assert_allclose(parameters_of(head)[name], expected, atol=2e-4, err_msg=name)
        assert result.predictions == reference.hypotheses


def test_a_sweep_takes_the_best_epoch_of_the_best_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of every epoch and rate computed again by torch."""
    c = corpus([(16, 6, 8)], noise=0.6)
    of_fold = standardised(c, 0)
    seen: list[tuple[float, float, float, int]] = []
    selected = ctc._Learner.selected

    def watched(learner: Any) -> tuple[float, float]:
        score_and_loss = selected(learner)
        losses = []
        for clip in c.folds[0].valid:
            x = nn.functional.layer_norm(torch.from_numpy(of_fold.frames[clip]), (DIM,))
            target = np.array([1 + learner._alphabet.index(character) for character in c.transcripts[clip]])
            losses.append(float(torch_loss(learner._head.logits(x), [len(x)], [target])))
        assert score_and_loss[1] == pytest.approx(np.mean(losses), rel=1e-3)
        seen.append((score_and_loss[0], -score_and_loss[1], -learner.rate, -learner.epoch))
        return score_and_loss

    monkeypatch.setattr(ctc._Learner, "selected", watched)
    (result,) = c.train(Sweep((3e-3, 3e-2, 3e-1), 4, epochs=25, patience=4))
    best = max(seen)
    assert result.tuning is not None
    assert (result.valid_score, result.tuning.chosen, result.best_epoch) == (best[0], [-best[2]], -best[3])
    for trial in result.tuning.tried:
        assert trial.selection == max(score for score, _, rate, _ in seen if rate == -trial.setting)
    chosen = next(trial for trial in result.tuning.tried if [trial.setting] == result.tuning.chosen)
    references = [c.transcripts[clip] for clip in result.examples]
    assert chosen.test == pytest.approx(max(0, word_accuracy(references, result.predictions)))


def test_offset_and_unequal_scaling_do_not_move_a_sweeps_score() -> None:
    c, rng = corpus([(60, 10, 30)], noise=0.6), np.random.default_rng(0)
    factors, offset = 10 ** rng.uniform(-2, 2, DIM), 100 * rng.standard_normal(DIM)
    moved = Corpus([(clip * factors + offset).astype(np.float32) for clip in c.frames], c.transcripts, c.folds)
    (one,), (other,) = (corpus.train(Sweep((1e-2, 1e-1), 8, epochs=20, patience=5)) for corpus in (c, moved))
    scores = [character_accuracy([c.transcripts[clip] for clip in r.examples], r.predictions) for r in (one, other)]
    assert scores[0] > 0.7
    assert scores[1] == pytest.approx(scores[0], abs=0.02)


def test_a_sweep_gives_the_same_bytes_twice_whatever_the_threads() -> None:
    c = corpus([(13, 3, 5), (9, 3, 5)])
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(c.train(Sweep((1e-2, 1e-1), 4, epochs=4, patience=2), (0, 1)))
    torch.set_num_threads(1)
    assert repr(results[0]) == repr(results[1])
    assert [(result.fold, result.seed) for result in results[0]] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_selection_transcripts_of_unknown_characters_can_be_swept_by() -> None:
    c = corpus([(12, 3, 4)])
    transcripts = ["z" if clip in c.folds[0].valid else text for clip, text in enumerate(c.transcripts)]
    (result,) = Corpus(c.frames, transcripts, c.folds).train(Sweep((1e-2, 1e-1), 4, epochs=4, patience=2))
    assert math.isfinite(result.valid_score)


def test_the_best_epoch_is_the_first_strict_maximum_of_character_accuracy(heads: list[CtcHead]) -> None:
    c = corpus([(16, 4, 8), (20, 3, 8)], noise=0.8)
    settings = Settings(epochs=14, learning_rate=0.05)
    ties, early = 0, 0
    for result, head in zip(c.train(settings, range(3)), heads, strict=True):
        reference = train_one(c, result.fold, result.seed, settings)
        best = max(reference.scores)
        assert result.best_epoch == reference.scores.index(best) + 1
        assert result.valid_score == pytest.approx(best)
        for name, expected in reference.best.items():
            np.testing.assert_allclose(parameters_of(head)[name], expected, atol=2e-3, err_msg=name)
        assert result.predictions == reference.hypotheses
        ties += reference.scores.count(best) > 1
        early += result.best_epoch < settings.epochs
    assert ties >= 2  # so that "first" was tested
    assert early >= 2  # and "best"


def test_below_zero_epochs_are_still_compared() -> None:
    # One letter of reference and many of hypothesis: every epoch scores below 0, and the least bad one is taken.
    c = corpus([(12, 3, 4)], noise=0.6)
    transcripts = list(c.transcripts)
    for clip in c.folds[0].valid:
        transcripts[clip] = "z"
    c = Corpus(c.frames, transcripts, c.folds)
    settings = Settings(epochs=12, learning_rate=0.05)
    scores = train_one(c, 0, 0, settings).scores
    assert max(scores) < 0
    assert scores.index(max(scores)) not in (0, settings.epochs - 1)
    (result,) = c.train(settings)
    assert result.best_epoch == scores.index(max(scores)) + 1
    assert result.valid_score == pytest.approx(max(scores))


def test_a_toy_language_is_learnt() -> None:
    c = corpus([(60, 10, 30)])
    (result,) = c.train(Settings(epochs=15))
    assert word_accuracy([c.transcripts[clip] for clip in result.examples], result.predictions) > 0.95


def test_other_folds_and_seeds_change_nothing_to_the_last_bit(heads: list[CtcHead]) -> None:
    c = corpus([(11, 3, 5), (18, 3, 5), (7, 3, 5)])
    settings = Settings(epochs=3)
    together = c.train(settings, (0, 1, 2))
    kept = bytes_of(heads)
    heads.clear()
    alone = c.train(settings, (1,), folds=2)
    assert [(result.fold, result.seed) for result in alone] == [(0, 1), (1, 1)]
    assert bytes_of(heads) == [kept[1], kept[4]]
    for result, other in zip(alone, (together[1], together[4]), strict=True):
        assert (result.fold, result.seed, result.best_epoch) == (other.fold, other.seed, other.best_epoch)
        assert (result.predictions, result.valid_score) == (other.predictions, other.valid_score)


def test_the_same_bytes_twice_whatever_the_threads(heads: list[CtcHead]) -> None:
    c = corpus([(13, 3, 5)])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            c.train(Settings(epochs=2), (0, 1))
            assert torch.get_num_threads() == threads  # the caller's setting is given back
        finally:
            torch.set_num_threads(1)
    first, second = bytes_of(heads[:2]), bytes_of(heads[2:])
    assert first == second
    assert first[0] != first[1]  # seeds differ


def test_every_epoch_is_told() -> None:
    told: list[int] = []
    corpus([(5, 2, 2), (5, 2, 2)]).train(Settings(epochs=3), (0, 1), on_epoch=told.append)
    assert told == [1, 2, 3]


def test_test_transcripts_select_nothing() -> None:
    c = corpus([(14, 4, 6)])
    transcripts = list(c.transcripts)
    for clip in c.folds[0].test:
        transcripts[clip] = "something else"
    (one,), (other,) = c.train(Settings(4)), Corpus(c.frames, transcripts, c.folds).train(Settings(4))
    assert (one.predictions, one.best_epoch) == (other.predictions, other.best_epoch)


def test_only_characters_of_the_training_clips_are_written(heads: list[CtcHead]) -> None:
    c = corpus([(20, 4, 8)])
    transcripts = [text if clip in c.folds[0].train else text.replace("a", "é") for clip, text in enumerate(c.transcripts)]
    (result,) = Corpus(c.frames, transcripts, c.folds).train(Settings(8))
    assert heads[0].weight.shape == (1 + len(ALPHABET), DIM)
    assert set("".join(result.predictions)) <= set(ALPHABET)
    assert "a" in "".join(result.predictions)


# ---------------------------------------------------------------- frames


def test_clips_with_too_few_frames_teach_nothing_and_are_scored_as_they_come(heads: list[CtcHead]) -> None:
    c = corpus([(10, 3, 6)])
    settings = Settings(epochs=4, batch_size=3)
    short, empty = int(c.folds[0].test[0]), int(c.folds[0].test[1])
    frames = list(c.frames)
    frames[short], frames[empty] = frames[short][:1], frames[empty][:0]
    for clip in c.folds[0].train[:4]:
        frames[clip] = frames[clip][: len(c.transcripts[clip]) - 1]
    (result,) = (cut := Corpus(frames, c.transcripts, c.folds)).train(settings)
    reference = train_one(cut, 0, 0, settings)
    for name, expected in reference.best.items():
        np.testing.assert_allclose(parameters_of(heads[0])[name], expected, atol=2e-4, err_msg=name)
    assert result.predictions == reference.hypotheses
    assert result.predictions[result.examples.tolist().index(empty)] == ""
    heads.clear()
    # Without one clip that is long enough, the head stays as it was drawn.
    (result,) = Corpus(frames, c.transcripts, [rows(c.folds[0].train[:4], [], c.folds[0].test)]).train(settings)
    fresh = CtcHead(DIM, len(heads[0].weight), np.random.default_rng([0, 0]))
    for name, expected in parameters_of(fresh).items():
        np.testing.assert_array_equal(parameters_of(heads[0])[name], expected, err_msg=name)


def test_stored_half_precision_frames_are_read_as_they_are(heads: list[CtcHead], tmp_path: Path) -> None:
    c = corpus([(12, 3, 5)])
    half = np.concatenate(c.frames).astype(np.float16)
    half.tofile(tmp_path / "frames")
    mapped = np.memmap(tmp_path / "frames", np.float16, "r").reshape(half.shape)
    offsets = np.cumsum([0, *map(len, c.frames)])
    kinds: list[list[NDArray[Any]]] = [
        [array[start:end] for start, end in itertools.pairwise(offsets)] for array in (half, mapped, half.astype(np.float32))
    ]
    results = [Corpus(frames, c.transcripts, c.folds).train(Settings(3))[0] for frames in kinds]
    stored, wide = bytes_of(heads[:2]), bytes_of(heads[2:])
    assert stored == wide * 2  # float16 loses nothing on its way, and the arithmetic is float32's
    assert results[0].predictions == results[1].predictions == results[2].predictions


@pytest.mark.parametrize("settings", [Settings(2, batch_size=3), Sweep((0.03,), 3, epochs=2, patience=2)])
def test_clips_are_read_when_they_are_needed_and_let_go(settings: Settings | Sweep) -> None:
    c = corpus([(30, 8, 8)])
    alive: weakref.WeakValueDictionary[int, NDArray[Any]] = weakref.WeakValueDictionary()
    reads = itertools.count()
    most = 0

    class Lazy(Sequence[NDArray[Any]]):
        def __len__(self) -> int:
            return len(c.frames)

        def __getitem__(self, clip: Any) -> Any:
            nonlocal most
            array = c.frames[clip].copy()
            alive[next(reads)] = array
            most = max(most, len(alive))
            return array

    (result,) = Corpus(Lazy(), c.transcripts, c.folds).train(settings)
    assert result.predictions == c.train(settings)[0].predictions
    assert next(reads) >= 2 * 38 + 8
    assert most <= 2 * 3  # the batch, and the one before it while it is replaced


def test_scoring_and_reading_in_blocks_change_no_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    c = corpus([(20, 4, 10)])
    (whole,) = c.train(Settings(6))
    sizes: list[int] = []
    collapsed = ctc.collapse
    monkeypatch.setattr(ctc, "collapse", lambda path: collapsed(path[sizes.append(len(path)) or slice(None)]))
    monkeypatch.setattr(ctc, "_ROWS_READ_AT_ONCE", 3)
    monkeypatch.setattr(ctc, "_ROWS_SCORED_AT_ONCE", 7)
    (blocks,) = c.train(Settings(6))
    assert (blocks.predictions, blocks.valid_score) == (whole.predictions, whole.valid_score)
    assert sizes[-10:] == [len(c.frames[clip]) for clip in blocks.examples]


def test_scoring_holds_a_bounded_number_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    c = corpus([(4, 0, 3)])
    long = np.tile(c.frames[c.folds[0].test[0]], (40, 1))
    frames = [long if clip in c.folds[0].test else array for clip, array in enumerate(c.frames)]
    monkeypatch.setattr(ctc, "_ROWS_SCORED_AT_ONCE", 64)
    seen: list[int] = []

    class Watched(CtcHead):
        def logits(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().logits(x)

    monkeypatch.setattr(ctc, "CtcHead", Watched)
    Corpus(frames, c.transcripts, c.folds).train(Settings(1, batch_size=1))
    assert max(seen[4:]) <= 64
    assert sum(seen[4:]) == 3 * len(long)


@pytest.mark.parametrize("settings", [Settings(2), Sweep((1e-2, 1e-1), 4, epochs=2, patience=2)])
@pytest.mark.parametrize("part", ["train", "valid", "test"])
def test_frames_that_are_no_numbers_give_no_score(part: str, settings: Settings | Sweep) -> None:
    c = corpus([(8, 3, 3)])
    frames = [array.copy() for array in c.frames]
    frames[getattr(c.folds[0], part)[-1]][-1, 0] = np.inf
    with pytest.raises(ScoreUndefinedError):
        Corpus(frames, c.transcripts, c.folds).train(settings)


# ---------------------------------------------------------------- where the encoder is too coarse


def test_an_encoder_with_fewer_frames_than_characters_cannot_write() -> None:
    counts, seconds, texts = [25, 25, 60, 300], [2.0, 2.0, 4.0, 4.0], ["x" * 30, "x" * 28, "x" * 70, "x" * 60]
    # The three clips that are too short: 110 frames and 128 characters in 8 s.
    sentence = "the encoder gives fewer frames than characters: 13.8 a second against 16.0 characters a second"
    assert why_not(counts, seconds, texts) == sentence
    assert why_not(counts[1:], seconds[1:], texts[1:]) is not None  # two of three
    assert why_not(counts[2:], seconds[2:], texts[2:]) is None  # one of two is not more than half
    assert why_not([30, 30], [1.0, 1.0], ["x" * 30] * 2) is None  # a frame a character is enough
    assert why_not([], [], []) is None
