"""Retrieval heads against torch's own layers on every token of a padded batch, and recalls against sorting by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from xares_onnx.errors import ScoreUndefinedError
from xares_onnx.models.retrieval import RetrievalHead, cosine_loss, product_loss
from xares_onnx.probes import retrieval
from xares_onnx.probes.retrieval import recalls, train_retrieval
from xares_onnx.probes.sweep import Sweep
from xares_onnx.probes.training import HeadResult, Rows
from xares_onnx.probes.wordpiece import WordPiece

DIM, WIDTH = 6, 1024
ARITHMETICS = ["corrected", "xares"]
ANIMALS = ["dog", "cat", "bird", "horse", "frog"]
SOUNDS = ["barking", "singing", "walking", "eating", "snoring"]


@dataclass(frozen=True)
class Settings:
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Problem:
    embeddings: NDArray[np.float32]
    captions: list[list[str]]
    clip_of_crop: NDArray[np.int64]
    folds: list[Rows]

    def train(
        self,
        arithmetic: Any,
        settings: Settings | Sweep,
        seeds: Sequence[int] = (0,),
        folds: int | None = None,
        **options: Any,
    ) -> list[HeadResult]:
        given = {"vocabulary": None} | options
        data = self.embeddings, self.captions, self.clip_of_crop, self.folds[:folds]
        return train_retrieval(*data, settings, seeds, arithmetic=arithmetic, **given)


def problem(sizes: Sequence[tuple[int, int, int]], *, captions: int | tuple[int, int] = (1, 4), seed: int = 0) -> Problem:
    """Folds of (train, valid, test) clips of 1 to 3 crops; what a caption names shows in the embedding, beside noise."""
    rng = np.random.default_rng(seed)
    clips = max(sum(size) for size in sizes)
    animals, sounds = rng.integers(0, len(ANIMALS), clips), rng.integers(0, len(SOUNDS), clips)
    low, high = (captions, captions) if isinstance(captions, int) else captions
    texts = [
        [
            f"{rng.choice(['A', 'the', 'one old', 'some'])} {ANIMALS[animal]} {rng.choice(['is', 'was'])} {SOUNDS[sound]}."
            for _ in range(rng.integers(low, high + 1))
        ]
        for animal, sound in zip(animals, sounds, strict=True)
    ]
    clip_of_crop = np.repeat(np.arange(clips), rng.integers(1, 4, clips))
    features = np.concatenate([rng.standard_normal((5, DIM))[animals], rng.standard_normal((5, DIM))[sounds]]).reshape(
        2, -1, DIM
    )
    embeddings = features.sum(axis=0)[clip_of_crop] + 0.5 * rng.standard_normal((len(clip_of_crop), DIM))
    embeddings = embeddings * rng.uniform(0.5, 20, (len(clip_of_crop), 1)) + 3  # LayerNorm must matter
    folds = []
    for train, valid, test in sizes:
        parts = np.split(rng.permutation(clips)[: train + valid + test], [train, train + valid])
        folds.append(Rows(*(np.flatnonzero(np.isin(clip_of_crop, part)) for part in parts)))
    return Problem(embeddings.astype(np.float32), texts, clip_of_crop, folds)


# ---------------------------------------------------------------- the reference


class Towers(nn.Module):
    """Torch's own layers over every token of a padded batch."""

    def __init__(self, vocabulary: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.audio_mlp = nn.Sequential(nn.Linear(DIM, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.text_mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.log_temperature = nn.Parameter(torch.tensor(1 / 0.07).log())
        with torch.no_grad():
            self._draw(self.audio_mlp, rng)
            self.embedding.weight.copy_(torch.from_numpy(rng.standard_normal((vocabulary, WIDTH), np.float32)))
            self._draw(self.text_mlp, rng)

    @staticmethod
    def _draw(layers: nn.Sequential, rng: np.random.Generator) -> None:
        for layer in layers:
            if isinstance(layer, nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                layer.weight.copy_(torch.from_numpy(rng.uniform(-bound, bound, (layer.in_features, WIDTH)).T))
                layer.bias.copy_(torch.from_numpy(rng.uniform(-bound, bound, WIDTH)))

    def audio(self, x: Tensor) -> Tensor:
        output: Tensor = self.audio_mlp(self.norm(x))
        return output

    def text(self, encoded: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, encoded))
        padded = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in encoded])
        mask = torch.tensor([[1.0] * len(tokens) + [0.0] * (longest - len(tokens)) for tokens in encoded])[:, :, None]
        output: Tensor = (self.text_mlp(self.embedding(padded)) * mask).sum(1) / mask.sum(1)
        return output

    def named(self) -> dict[str, NDArray[np.float32]]:
        """By the names of `RetrievalHead`."""
        linears = {"audio_hidden": self.audio_mlp[0], "audio_output": self.audio_mlp[2]}
        linears |= {"text_hidden": self.text_mlp[0], "text_output": self.text_mlp[2]}
        found = {"scale": self.norm.weight, "shift": self.norm.bias, "embedding": self.embedding.weight}
        found["log_temperature"] = self.log_temperature
        for name, layer in linears.items():
            found |= {f"{name}.weight": layer.weight.T, f"{name}.bias": layer.bias}
        return {name: value.detach().numpy().copy() for name, value in found.items()}


def loss_by_hand(audio: Tensor, text: Tensor, log_temperature: Tensor, clips: Sequence[int], arithmetic: str) -> Tensor:
    """Softmax by softmax."""
    if arithmetic == "corrected":
        audio, text = audio / audio.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    terms = []
    for ours, theirs in ((audio, text), (text, audio)):
        logits = log_temperature.exp() * ours @ theirs.T
        for i in range(len(clips)):
            negatives = [j for j in range(len(clips)) if j != i and (arithmetic == "xares" or clips[j] != clips[i])]
            terms.append(logits[i, [i, *negatives]].logsumexp(0) - logits[i, i])
    loss = torch.stack(terms).mean()
    if arithmetic == "xares":
        loss = loss + sum(e.abs().mean() / (e**2).sum().sqrt() for e in (audio, text))
    return loss


def ranks_by_hand(similarities: NDArray[Any]) -> NDArray[np.int64]:
    """The rank of each column in its row, from 0, the larger first and of equal ones the earlier."""
    return np.array(
        [[sorted(range(len(row)), key=lambda j: (-row[j], j)).index(k) for k in range(len(row))] for row in similarities]
    )


def recalls_by_hand(audio: NDArray[Any], texts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """`recalls` for the vectors of each clip's captions, (captions, dim) a clip."""
    # One by one, as a matrix product may round equal ones differently.
    similarities = np.array([[(a * t).sum() for t in np.concatenate(texts)] for a in audio])
    owners = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
    found = []
    for clip in range(len(texts)):
        own = np.flatnonzero(owners == clip)
        to_audio = np.array([ranks_by_hand(similarities.T[[caption]])[0, clip] for caption in own])
        to_text = ranks_by_hand(similarities[[clip]])[0, own]
        row = [int((to_audio < 1).sum()), len(own), int((to_text < 1).any())]
        for rank in (5, 10):
            row += [int((to_audio < rank).sum()), int((to_text < rank).any())]
        found.append(row)
    return np.array(found)


def recall_at_1_of_xares(audio: NDArray[Any], text: NDArray[Any], captions: int) -> float:
    """Its definition, on an audio and a text vector for each caption: an audio is repeated for each of its captions.

    From an audio the best rank among its captions counts; from a caption, its audio's rank among the audios.
    """
    similarities = audio @ text.T
    order = np.argsort(-similarities[::captions], axis=1, kind="stable")
    best = [min(np.flatnonzero(row // captions == clip)) for clip, row in enumerate(order)]
    order = np.argsort(-similarities.T[:, ::captions], axis=1, kind="stable")
    ranks = [list(row).index(caption // captions) for caption, row in enumerate(order)]
    return float((np.mean(np.array(best) < 1) + np.mean(np.array(ranks) < 1)) / 2)


def score(predictions: NDArray[np.int64]) -> float:
    return float(predictions[:, 0].sum() / predictions[:, 1].sum() + predictions[:, 2].mean()) / 2


@dataclass
class Reference:
    initial: dict[str, NDArray[np.float32]]
    scores: list[float] = field(default_factory=list)  # of validation, an epoch each
    best: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    examples: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    predictions: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def train_one(
    p: Problem,
    fold: int,
    seed: int,
    settings: Settings,
    arithmetic: str,
    vocabulary: WordPiece,
    *,
    constant_rate: bool = False,
) -> Reference:
    rows = p.folds[fold]
    rng = np.random.default_rng([seed, fold])
    towers = Towers(vocabulary.size, rng)
    pairs = [(crop, caption) for crop in rows.train for caption in p.captions[p.clip_of_crop[crop]]]
    x = torch.from_numpy(p.embeddings)

    def predict(crops: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        owners = p.clip_of_crop if arithmetic == "corrected" else np.arange(len(p.clip_of_crop))
        examples = np.unique(owners[crops])
        vectors, texts = [], []
        with torch.no_grad():
            for example in examples:
                mine = crops[owners[crops] == example]
                mean = normalize(towers.audio(x[mine])).mean(0)
                vectors.append((mean / mean.norm()).numpy())
                encoded = [vocabulary.encode(caption) for caption in p.captions[p.clip_of_crop[mine[0]]]]
                texts.append(np.concatenate([normalize(towers.text([tokens])).numpy() for tokens in encoded]))
        return examples, recalls_by_hand(np.stack(vectors), texts)

    found = Reference(towers.named())
    adam = torch.optim.Adam(towers.parameters())
    for epoch in range(settings.epochs):
        for group in adam.param_groups:
            curve = 1 if constant_rate else 0.55 + 0.45 * np.cos(np.pi * epoch / settings.epochs)
            group["lr"] = settings.learning_rate * curve
        order = rng.permutation(len(pairs))
        for start in range(0, len(order), settings.batch_size):
            batch = [pairs[i] for i in order[start : start + settings.batch_size]]
            audio = towers.audio(x[[crop for crop, _ in batch]])
            text = towers.text([vocabulary.encode(caption) for _, caption in batch])
            clips = [int(p.clip_of_crop[crop]) for crop, _ in batch]
            adam.zero_grad()
            loss_by_hand(audio, text, towers.log_temperature, clips, arithmetic).backward()
            adam.step()
        if len(rows.valid):
            found.scores.append(score(predict(rows.valid)[1]))
        if not len(rows.valid) or found.scores[-1] > max(found.scores[:-1], default=-1):
            found.best = towers.named()
            found.examples, found.predictions = predict(rows.test)
    return found


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


def training_captions(p: Problem, fold: int) -> list[str]:
    return [caption for clip in np.unique(p.clip_of_crop[p.folds[fold].train]) for caption in p.captions[clip]]


def deviations(head: Any, expected: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float64]]:
    """Of each parameter, as far as it was kept."""
    found = {name: value.detach().numpy() for name, value in head.named_parameters()}
    kept = expected | {"embedding": expected["embedding"][head.tokens.numpy()]}
    assert found.keys() == kept.keys()
    return {name: np.abs(found[name].astype(np.float64) - kept[name]) for name in found}


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_one_step_is_that_of_plain_torch(arithmetic: str, trained: list[RetrievalHead]) -> None:
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


# ---------------------------------------------------------------- scoring


def fixed(p: Problem, arithmetic: str) -> NDArray[np.int64]:
    """The test predictions of a head that learns nothing."""
    [result] = p.train(arithmetic, Settings(epochs=1, learning_rate=0.0), vocabulary=WordPiece.trained(["abc", *ANIMALS]))
    found: NDArray[np.int64] = result.predictions
    return found


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_the_order_of_a_clips_captions_does_not_matter(arithmetic: str) -> None:
    p = problem([(5, 0, 20)])
    turned = Problem(p.embeddings, [own[::-1] for own in p.captions], p.clip_of_crop, p.folds)
    assert fixed(p, arithmetic).tolist() == fixed(turned, arithmetic).tolist()


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_examples_are_clips_or_crops_and_captions_are_counted(arithmetic: str) -> None:
    p = problem([(5, 0, 20)])
    rows = p.folds[0]
    shuffled = Problem(p.embeddings, p.captions, p.clip_of_crop, [Rows(rows.train, rows.valid, rows.test[::-1].copy())])
    [result] = shuffled.train(arithmetic, Settings(epochs=1))
    expected = rows.test if arithmetic == "xares" else np.unique(p.clip_of_crop[rows.test])
    clips = p.clip_of_crop[expected] if arithmetic == "xares" else expected
    assert result.examples.tolist() == expected.tolist()
    assert result.predictions.shape == (len(expected), 7)
    assert result.predictions[:, 1].tolist() == [len(p.captions[clip]) for clip in clips]


def test_a_clip_is_where_its_crops_point_in_the_mean_however_long_their_vectors_are() -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((121, DIM)).astype(np.float32)
    embeddings[::2] = 1  # LayerNorm leaves 0, and the audio tower a shorter vector
    captions = [[f"{ANIMALS[clip % 5]} {SOUNDS[clip // 5 % 5]} {'a' * (1 + clip // 25)}"] for clip in range(41)]
    p = Problem(
        embeddings, captions, np.repeat(np.arange(41), 3)[:121], [Rows(np.arange(1), np.empty(0, int), np.arange(1, 121))]
    )
    vocabulary = WordPiece.trained(caption for own in captions for caption in own)
    still = Settings(epochs=1, learning_rate=0.0)
    expected = train_one(p, 0, 0, still, "corrected", vocabulary)
    [result] = p.train("corrected", still, vocabulary=vocabulary)
    assert result.predictions.tolist() == expected.predictions.tolist()


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_scoring_in_small_blocks_is_the_same(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem([(5, 0, 20)])
    whole = fixed(p, arithmetic)
    monkeypatch.setattr(retrieval, "_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(retrieval, "_VALUES_AT_ONCE", 3 * WIDTH)
    assert fixed(p, arithmetic).tolist() == whole.tolist()


@st.composite
def vectors(draw: st.DrawFn) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Few different whole numbers, so that products are exact and many are equal; some captions share a text."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    clips, dim, spread = draw(st.integers(1, 14)), draw(st.integers(1, 4)), draw(st.integers(0, 9))
    counts = rng.integers(1, draw(st.integers(1, 4)) + 1, clips)
    columns = rng.integers(0, draw(st.integers(1, 30)), counts.sum())
    unique, columns = np.unique(columns, return_inverse=True)
    audio, text = (rng.integers(-spread, spread + 1, (rows, dim)).astype(np.float32) for rows in (clips, len(unique)))
    return audio, text, columns, counts


@given(vectors())
@settings(max_examples=150)
def test_recalls_are_those_of_sorting(
    drawn: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]],
) -> None:
    audio, text, columns, counts = drawn
    found = recalls(torch.from_numpy(audio), torch.from_numpy(text), columns, counts)
    expected = recalls_by_hand(audio, np.split(text[columns], np.cumsum(counts)[:-1]))
    assert found.tolist() == expected.tolist()


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 5), st.booleans())
@settings(max_examples=100)
def test_the_score_is_that_of_xares(seed: int, clips: int, captions: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    audio, text = (rng.standard_normal((rows, 3)).astype(np.float32) for rows in (clips, clips * captions))
    if ties:
        audio, text = audio.round(), text.round()
    found = recalls(torch.from_numpy(audio), torch.from_numpy(text), np.arange(len(text)), np.full(clips, captions))
    assert score(found) == pytest.approx(recall_at_1_of_xares(audio.repeat(captions, axis=0), text, captions))


def test_where_all_are_alike_only_the_first_clip_is_found() -> None:
    found = recalls(torch.ones(12, 2), torch.ones(1, 2), np.zeros(24, np.int64), np.full(12, 2))
    assert found[:, :3].tolist() == [[2, 2, 1], *[[0, 2, 0]] * 11]
    assert found[:, 3].sum() == 10  # captions of the first five clips
    assert found[:, 4].sum() == 3  # the first five captions are those of the first three clips


# ---------------------------------------------------------------- losses


@given(st.integers(0, 2**32), st.lists(st.integers(0, 4), min_size=1, max_size=9), st.floats(-2, 4))
@settings(max_examples=60)
def test_losses_are_those_of_softmaxes_by_hand(seed: int, clips: list[int], log_temperature: float) -> None:
    rng = np.random.default_rng(seed)
    audio, text = (torch.from_numpy(rng.standard_normal((len(clips), 5))) for _ in range(2))
    temperature = torch.tensor(log_temperature, dtype=torch.float64)
    for arithmetic in ARITHMETICS:
        gradients, values = [], []
        for by_hand in (True, False):
            leaves = [value.clone().requires_grad_() for value in (audio, text, temperature)]
            if by_hand:
                loss = loss_by_hand(*leaves, clips, arithmetic)
            elif arithmetic == "corrected":
                loss = cosine_loss(*leaves, torch.tensor(clips))
            else:
                loss = product_loss(*leaves)
            loss.backward()
            values.append(loss.detach())
            gradients.append(torch.cat([leaf.grad.ravel() for leaf in leaves]))
        torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-10)
