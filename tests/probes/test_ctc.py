"""The transcript heads against torch's own layers, CTC loss and optimiser, a head at a time, and against brute force."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from xares_onnx.errors import ScoreUndefinedError
from xares_onnx.models.ctc import CtcHead, Workspace, collapse, ctc_gradient
from xares_onnx.probes import ctc
from xares_onnx.probes.ctc import train_ctc, why_not
from xares_onnx.probes.sweep import Sweep
from xares_onnx.probes.training import HeadResult, Rows

DIM = 12
SILENCE = "_"  # the sound of no character
ALPHABET = "abcd "


@dataclass(frozen=True)
class Settings:
    epochs: int
    batch_size: int = 4
    learning_rate: float = 0.03


@dataclass(frozen=True)
class Corpus:
    frames: Sequence[NDArray[Any]]
    transcripts: list[str]
    folds: list[Rows]

    def train(
        self, settings: Settings | Sweep, seeds: Sequence[int] = (0,), folds: int | None = None, **more: Any
    ) -> list[HeadResult]:
        return train_ctc(self.frames, self.transcripts, self.folds[:folds], settings, seeds, **more)


def rows(*parts: Sequence[int]) -> Rows:
    return Rows(*(np.array(part, np.int64) for part in parts))


def spoken(text: str, sounds: dict[str, NDArray[np.float64]], noise: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Each character is one to three frames of its sound; equal neighbours have silence between them, others may."""
    said = [SILENCE]
    for before, character in zip(["", *list(text)], text, strict=False):
        said += [SILENCE] * int(rng.integers(before == character, 3)) + [character] * int(rng.integers(1, 4))
    clean = np.stack([sounds[sound] for sound in said])
    # LayerNorm must matter: scale and offset of each frame are arbitrary.
    scale = rng.uniform(0.5, 20, (len(said), 1))
    return ((clean + noise * rng.standard_normal(clean.shape)) * scale + 3).astype(np.float32)


def corpus(sizes: Sequence[tuple[int, int, int]], *, noise: float = 0.3, seed: int = 0) -> Corpus:
    """Folds of (train, valid, test) clips of a toy language."""
    rng = np.random.default_rng(seed)
    sounds = {character: rng.standard_normal(DIM) for character in ALPHABET + SILENCE}
    transcripts = []
    for _ in range(max(sum(size) for size in sizes)):
        words = ["".join(rng.choice(list("abcd"), rng.integers(1, 5))) for _ in range(rng.integers(1, 4))]
        transcripts.append(" ".join(words))
    folds = []
    for train, valid, test in sizes:
        order = rng.permutation(len(transcripts))
        folds.append(rows(*np.split(order[: train + valid + test], [train, train + valid])))
    return Corpus([spoken(text, sounds, noise, rng) for text in transcripts], transcripts, folds)


# ---------------------------------------------------------------- references


def torch_loss(
    logits: Tensor, lengths: Sequence[int], targets: Sequence[NDArray[np.int64]], reduction: str = "mean"
) -> Tensor:
    """torch's CTC loss of clips whose frames follow each other."""
    padded = nn.utils.rnn.pad_sequence(list(logits.split(list(lengths))))
    return nn.functional.ctc_loss(
        padded.log_softmax(dim=2),
        torch.from_numpy(np.concatenate(targets)),
        torch.tensor(lengths),
        torch.tensor([len(target) for target in targets]),
        reduction=reduction,
        zero_infinity=True,
    )


def spelt(path: Sequence[int]) -> list[int]:
    return [number for number, _ in itertools.groupby(path) if number != 0]


def wrong_words(reference: str, hypothesis: str) -> int:
    wanted, got = reference.split(), hypothesis.split()
    row = list(range(len(got) + 1))
    for i, word in enumerate(wanted, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(got, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def character_accuracy(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Characters are words of a text in which every one stands alone; a space is written as one that is no letter."""

    def spread(text: str) -> str:
        return " ".join("_".join(text.split()))

    wrong = sum(wrong_words(spread(r), spread(h)) for r, h in zip(references, hypotheses, strict=True))
    return 1 - wrong / sum(len(spread(r).split()) for r in references)


def word_accuracy(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    wrong = sum(wrong_words(r, h) for r, h in zip(references, hypotheses, strict=True))
    return 1 - wrong / sum(len(r.split()) for r in references)


Parameters = dict[str, NDArray[np.float32]]


@dataclass
class Reference:
    initial: Parameters
    scores: list[float] = field(default_factory=list)  # of validation, an epoch each
    last: Parameters = field(default_factory=dict)
    best: Parameters = field(default_factory=dict)
    hypotheses: list[str] = field(default_factory=list)


def train_one(c: Corpus, fold: int, seed: int, settings: Settings, *, constant_rate: bool = False) -> Reference:
    """One head, trained by autograd. The draws are the probe's: weights, biases, then a permutation an epoch."""
    part = c.folds[fold]
    alphabet = sorted({character for clip in part.train for character in c.transcripts[clip]})
    rng = np.random.default_rng([seed, fold])
    norm, linear = nn.LayerNorm(DIM), nn.Linear(DIM, len(alphabet) + 1)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(rng.uniform(-(DIM**-0.5), DIM**-0.5, (len(alphabet) + 1, DIM))))
        linear.bias.copy_(torch.tensor(rng.uniform(-(DIM**-0.5), DIM**-0.5, len(alphabet) + 1)))
    model = nn.Sequential(norm, linear)

    def parameters() -> Parameters:
        named = {"scale": norm.weight, "shift": norm.bias, "weight": linear.weight, "bias": linear.bias}
        return {name: value.detach().numpy().copy() for name, value in named.items()}

    def hypothesis(clip: int) -> str:
        with torch.no_grad():
            path = model(torch.from_numpy(c.frames[clip]).float()).argmax(dim=1).tolist()
        return "".join(alphabet[number - 1] for number in spelt(path))

    found = Reference(parameters())
    adam = torch.optim.Adam(model.parameters())
    best = -math.inf
    for epoch in range(settings.epochs):
        for group in adam.param_groups:
            curve = 1 if constant_rate else 0.55 + 0.45 * math.cos(math.pi * epoch / settings.epochs)
            group["lr"] = settings.learning_rate * curve
        order = rng.permutation(part.train)
        for start in range(0, len(order), settings.batch_size):
            batch = order[start : start + settings.batch_size]
            logits = model(torch.from_numpy(np.concatenate([c.frames[clip] for clip in batch])).float())
            targets = [np.array([1 + alphabet.index(character) for character in c.transcripts[clip]]) for clip in batch]
            adam.zero_grad()
            torch_loss(logits, [len(c.frames[clip]) for clip in batch], targets).backward()
            adam.step()
        if len(part.valid):
            found.scores.append(
                character_accuracy([c.transcripts[i] for i in part.valid], [hypothesis(i) for i in part.valid])
            )
        if not found.scores or found.scores[-1] > best:
            best = found.scores[-1] if found.scores else best
            found.best = parameters()
            found.hypotheses = [hypothesis(clip) for clip in sorted(part.test)]
    found.last = parameters()
    return found


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


def parameters_of(head: CtcHead) -> Parameters:
    return {
        "scale": head.scale[0].numpy(),
        "shift": head.shift[:, 0].numpy(),
        "weight": head.weight.numpy(),
        "bias": head.bias[:, 0].numpy(),
    }


def bytes_of(made: Sequence[CtcHead]) -> list[list[bytes]]:
    return [[parameter.numpy().tobytes() for parameter in head.parameters] for head in made]


# ---------------------------------------------------------------- the loss and its gradient


clips_of_a_batch = st.lists(
    st.tuples(st.integers(0, 14), st.lists(st.integers(1, 3), min_size=1, max_size=6)), min_size=1, max_size=4
)


@given(clips_of_a_batch, st.integers(0, 99), st.sampled_from([0.1, 1, 8]))
def test_losses_and_gradient_are_torchs(clips: list[tuple[int, list[int]]], seed: int, spread: float) -> None:
    lengths, targets = [length for length, _ in clips], [np.array(target) for _, target in clips]
    lengths[-1] += sum(lengths) == 0  # torch wants a frame
    logits = spread * torch.from_numpy(np.random.default_rng(seed).standard_normal((sum(lengths), 4)))
    logits.requires_grad_()
    losses, gradient = ctc_gradient(logits.detach().float(), lengths, targets, Workspace())
    expected = torch_loss(logits, lengths, targets, "none") / torch.tensor([len(target) for target in targets])
    torch.testing.assert_close(losses.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    mean = torch_loss(logits, lengths, targets)
    torch.testing.assert_close(losses.mean().double(), mean.detach(), atol=1e-5, rtol=1e-5)
    mean.backward()
    torch.testing.assert_close(gradient.double(), logits.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", [[1], [1, 2], [2, 2], [1, 2, 1], [1, 1, 1], [2, 2, 1]])
@pytest.mark.parametrize("frames", [1, 3, 5, 6])
def test_the_likelihood_is_the_sum_over_every_path_that_spells_the_text(target: list[int], frames: int) -> None:
    probabilities = np.random.default_rng(frames).dirichlet([1, 1, 1], frames)
    paths = [path for path in itertools.product(range(3), repeat=frames) if spelt(path) == target]
    logits = torch.from_numpy(np.log(probabilities)).float() + 5  # logits need not be normalised
    losses, gradient = ctc_gradient(logits, [frames], [np.array(target)], Workspace())
    if not paths:
        assert losses.tolist() == [0]
        assert not gradient.any()
        return
    weights = np.array([math.prod(probabilities[t, number] for t, number in enumerate(path)) for path in paths])
    assert float(losses[0]) == pytest.approx(-math.log(weights.sum()) / len(target), abs=1e-5)
    posterior = np.zeros((frames, 3))
    for path, weight in zip(paths, weights / weights.sum(), strict=True):
        posterior[np.arange(frames), path] += weight
    np.testing.assert_allclose(gradient, (probabilities - posterior) / len(target), atol=1e-5)


def test_long_clips_lose_no_more_precision_than_torchs() -> None:
    rng = np.random.default_rng(2)
    lengths, targets = [1500, 900], [rng.integers(1, 29, 210), rng.integers(1, 29, 160)]
    exact = torch.from_numpy(rng.standard_normal((2400, 29)))
    exact[:, 0] += 6  # mostly blank, as early in a training: what fits the text is unlikely from where most paths are
    single = exact.float().requires_grad_()
    exact.requires_grad_()
    torch_loss(exact, lengths, targets).backward()
    torch_loss(single, lengths, targets).backward()
    assert exact.grad is not None
    assert single.grad is not None
    losses, gradient = ctc_gradient(single.detach(), lengths, targets, Workspace())
    torch.testing.assert_close(losses.mean().double(), torch_loss(exact, lengths, targets).detach(), atol=0, rtol=1e-5)
    assert (gradient - exact.grad).abs().max() < 3 * (single.grad - exact.grad).abs().max()


def test_a_batch_is_its_clips_one_by_one_whatever_was_in_the_workspace() -> None:
    rng = np.random.default_rng(1)
    workspace = Workspace()
    for lengths, sizes in (([30, 7, 19], [9, 2, 5]), ([4], [3]), ([11, 40, 3, 25], [4, 1, 7, 12]), ([6, 6], [2, 2])):
        logits = torch.from_numpy(rng.standard_normal((sum(lengths), 5))).float()
        targets = [rng.integers(1, 5, size) for size in sizes]
        losses, gradient = ctc_gradient(logits, lengths, targets, workspace)
        alone = [
            ctc_gradient(part, [length], [target], Workspace())
            for part, length, target in zip(logits.split(lengths), lengths, targets, strict=True)
        ]
        torch.testing.assert_close(losses, torch.cat([loss for loss, _ in alone]))
        torch.testing.assert_close(gradient, torch.cat([part for _, part in alone]) / len(lengths), atol=1e-6, rtol=1e-5)


def test_clips_without_frames_have_neither_loss_nor_gradient() -> None:
    losses, gradient = ctc_gradient(torch.empty(0, 3), [0, 0], [np.array([1]), np.array([2, 1])], Workspace())
    assert losses.tolist() == [0, 0]
    assert gradient.shape == (0, 3)


def test_huge_logits_are_no_trouble() -> None:
    logits = torch.tensor([[9e9, 0.0, -9e9], [0.0, 9e9, 1.0], [-9e9, 1.0, 9e9], [9e9, 7e9, 8e9]])
    losses, gradient = ctc_gradient(logits, [4], [np.array([1, 2])], Workspace())
    assert losses.tolist() == [0]
    assert torch.isfinite(gradient).all()


def test_what_is_not_a_number_does_not_pass_for_a_clip_that_is_too_short() -> None:
    logits = torch.zeros(5, 3)
    logits[2] = torch.nan
    losses, gradient = ctc_gradient(logits, [5], [np.array([1, 2])], Workspace())
    assert losses.isnan().all()
    assert gradient.isnan().any()


def test_backward_is_autograd() -> None:
    rng = np.random.default_rng(3)
    head = CtcHead(DIM, 5, rng)
    for parameter in (head.scale, head.shift):
        parameter += torch.from_numpy(rng.normal(0, 0.3, parameter.shape)).float()
    for gradient in head.gradients:
        gradient.fill_(9)
    norm, linear = nn.LayerNorm(DIM), nn.Linear(DIM, 5)
    with torch.no_grad():
        norm.weight.copy_(head.scale[0])
        norm.bias.copy_(head.shift[:, 0])
        linear.weight.copy_(head.weight)
        linear.bias.copy_(head.bias[:, 0])
    raw = torch.from_numpy(rng.normal(1, 4, (31, DIM))).float()
    at_logits = torch.from_numpy(rng.standard_normal((31, 5))).float()
    x = nn.functional.layer_norm(raw, (DIM,))
    logits = linear(norm(raw))
    torch.testing.assert_close(head.logits(x), logits, atol=1e-5, rtol=1e-5)
    head.backward(x, at_logits)
    logits.backward(at_logits)
    expected = (norm.weight.grad, norm.bias.grad, linear.weight.grad, linear.bias.grad)
    for got, reference in zip(head.gradients, expected, strict=True):
        assert reference is not None
        torch.testing.assert_close(got.view_as(reference), reference, atol=1e-5, rtol=1e-4)


@given(st.lists(st.integers(0, 3), max_size=12))
def test_paths_collapse(path: list[int]) -> None:
    assert collapse(np.array(path, np.int64)).tolist() == spelt(path)


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
