"""The batched heads against the plainest way to train one: torch's own layers, loss and optimiser, a head at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from xares_onnx.data.task import Head
from xares_onnx.models.linear import LinearHeads, cross_entropy_gradient, normalised
from xares_onnx.probes import linear
from xares_onnx.probes.linear import Classification, train_linear
from xares_onnx.probes.training import HeadResult, Rows, learning_rate

DIM, CLASSES = 10, 5
Parameters = dict[str, NDArray[np.float32]]  # of one head


@dataclass(frozen=True)
class Problem:
    """Embeddings whose classes overlap, so that accuracies lie between chance and 1."""

    embeddings: NDArray[np.float32]
    labels: NDArray[np.int64]
    examples: NDArray[np.int64]
    folds: list[Rows]

    def train(self, settings: Head, seeds: Sequence[int], folds: int | None = None, **options: Any) -> list[HeadResult]:
        objective = Classification(self.labels, CLASSES)
        return train_linear(self.embeddings, objective, self.examples, self.folds[:folds], settings, seeds, **options)


def problem(sizes: Sequence[tuple[int, int, int]], *, crops: int = 1, noise: float = 1.5, seed: int = 0) -> Problem:
    """Folds of (train, valid, test) examples; with `crops` above 1, an example has 1 to `crops` crops."""
    rng = np.random.default_rng(seed)
    count = max(sum(size) for size in sizes)
    example_labels = rng.integers(0, CLASSES, count)
    examples = np.repeat(np.arange(count), rng.integers(1, crops + 1, count))
    labels = example_labels[examples]
    centres = rng.standard_normal((CLASSES, DIM))
    spread = noise * (1 + 2 * rng.random((len(labels), 1)) * (crops > 1))  # some crops are worse than others
    embeddings = (centres[labels] + spread * rng.standard_normal((len(labels), DIM))).astype(np.float32)
    # LayerNorm must matter: scale and offset of each crop are arbitrary.
    embeddings = embeddings * rng.uniform(0.5, 20, (len(labels), 1)).astype(np.float32) + np.float32(3)
    folds = []
    for train, valid, test in sizes:
        order = rng.permutation(count)
        parts = np.split(order[: train + valid + test], [train, train + valid])
        folds.append(Rows(*(np.flatnonzero(np.isin(examples, part)) for part in parts)))
    return Problem(embeddings, labels, examples, folds)


# ---------------------------------------------------------------- the reference


@dataclass
class Reference:
    initial: Parameters
    accuracies: list[float] = field(default_factory=list)  # of validation, an epoch each
    crop_accuracies: list[float] = field(default_factory=list)
    best: Parameters = field(default_factory=dict)
    last: Parameters = field(default_factory=dict)
    predictions: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    majority: list[int] = field(default_factory=list)  # what counting crops would predict


def train_one(p: Problem, fold: int, seed: int, settings: Head) -> Reference:
    """One head, trained by autograd. The draws are probe's: weights, biases, then a permutation an epoch."""
    rng = np.random.default_rng([seed, fold])
    bound = 1 / DIM**0.5
    norm, linear = nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(rng.uniform(-bound, bound, (DIM, CLASSES)).T))
        linear.bias.copy_(torch.tensor(rng.uniform(-bound, bound, CLASSES)))
    model = nn.Sequential(norm, linear)
    x, y, part = torch.from_numpy(p.embeddings), torch.from_numpy(p.labels), p.folds[fold]

    def parameters() -> Parameters:
        named = {"scale": norm.weight, "shift": norm.bias, "weight": linear.weight.T, "bias": linear.bias}
        return {name: value.detach().numpy().copy() for name, value in named.items()}

    def predict(crops: NDArray[np.int64]) -> tuple[dict[int, int], dict[int, int], NDArray[np.int64]]:
        with torch.no_grad():
            probabilities = model(x[crops]).softmax(dim=1).numpy()
        owners = p.examples[crops]
        by_crop = probabilities.argmax(axis=1)
        means = {int(e): int(probabilities[owners == e].mean(axis=0).argmax()) for e in np.unique(owners)}
        votes = {int(e): int(np.bincount(by_crop[owners == e], minlength=CLASSES).argmax()) for e in np.unique(owners)}
        return means, votes, by_crop

    found = Reference(parameters())
    adam = torch.optim.Adam(model.parameters())
    best = -1.0
    for epoch in range(settings.epochs):
        rate = settings.learning_rate * (0.55 + 0.45 * np.cos(np.pi * epoch / settings.epochs))
        for group in adam.param_groups:
            group["lr"] = rate
        order = rng.permutation(part.train)
        for start in range(0, len(order), settings.batch_size):
            batch = order[start : start + settings.batch_size]
            adam.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            adam.step()
        if len(part.valid):
            means, _, by_crop = predict(part.valid)
            truth = {int(example): int(label) for example, label in zip(p.examples, p.labels, strict=True)}
            found.accuracies.append(float(np.mean([means[e] == truth[e] for e in means])))
            found.crop_accuracies.append(float((by_crop == p.labels[part.valid]).mean()))
        if not len(part.valid) or found.accuracies[-1] > best:
            best = found.accuracies[-1] if len(part.valid) else -1.0
            found.best = parameters()
            means, votes, _ = predict(part.test)
            found.predictions = np.array([means[e] for e in sorted(means)])
            found.majority = [votes[e] for e in sorted(votes)]
    found.last = parameters()
    return found


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, Any]:
    """After a training: from the bytes of a head's first weights to a function that gives its chosen parameters."""
    found: dict[bytes, Any] = {}

    class Watched(LinearHeads):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            for h in range(len(self.weight)):
                found[self.weight[h].numpy().tobytes()] = lambda h=h: {
                    "scale": self.scale[h, 0].numpy(),
                    "shift": self.shift[h, 0].numpy(),
                    "weight": self.weight[h].numpy(),
                    "bias": self.bias[h, 0].numpy(),
                }

    monkeypatch.setattr(linear, "LinearHeads", Watched)
    return found


def start_of(seed: int, fold: int) -> bytes:
    drawn = np.random.default_rng([seed, fold]).uniform(-(DIM**-0.5), DIM**-0.5, (DIM, CLASSES))
    return drawn.astype(np.float32).tobytes()


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("sizes", "batch_size"),
    [
        (
            [(40, 0, 20), (61, 0, 20), (23, 0, 30)],
            8,
        ),  # last batches of 8, 5 and 7; the first and third end their epoch sooner
        ([(33, 0, 20), (64, 0, 20)], 16),  # a last batch of one clip
        ([(5, 0, 20), (70, 0, 20)], 32),  # a batch that is larger than its fold
    ],
)
def test_every_head_is_trained_as_if_it_were_alone(
    sizes: list[tuple[int, int, int]], batch_size: int, heads: dict[bytes, Any]
) -> None:
    p, seeds = problem(sizes), (0, 7)
    settings = Head(epochs=6, batch_size=batch_size, learning_rate=0.05)
    results = p.train(settings, seeds)
    assert [(result.fold, result.seed) for result in results] == [(f, s) for f in range(len(sizes)) for s in seeds]
    for result in results:
        reference = train_one(p, result.fold, result.seed, settings)
        parameters = heads[start_of(result.seed, result.fold)]()
        for name, expected in reference.last.items():
            np.testing.assert_allclose(parameters[name], expected, atol=1e-4, err_msg=f"{name} of {result.fold}")
            assert np.abs(expected - reference.initial[name]).max() > 0.05  # there was something to get wrong
        np.testing.assert_array_equal(result.predictions, reference.predictions)
        assert result.best_epoch == settings.epochs  # nothing to select by, so the last


def test_the_best_epoch_is_the_first_strict_maximum_of_validation(heads: dict[bytes, Any]) -> None:
    p = problem([(40, 10, 40), (56, 12, 40)])
    settings = Head(epochs=12, batch_size=8, learning_rate=0.02)
    ties, early = 0, 0
    for result in p.train(settings, range(4)):
        reference = train_one(p, result.fold, result.seed, settings)
        best = max(reference.accuracies)
        assert result.best_epoch == reference.accuracies.index(best) + 1
        assert result.valid_score == pytest.approx(best)
        for name, expected in reference.best.items():
            np.testing.assert_allclose(heads[start_of(result.seed, result.fold)]()[name], expected, atol=1e-4)
        np.testing.assert_array_equal(result.predictions, reference.predictions)
        ties += reference.accuracies.count(best) > 1
        early += result.best_epoch < settings.epochs
    assert ties >= 2  # so that "first" was tested
    assert early >= 2  # and "best"


def test_crops_are_averaged_by_probability_in_selection_and_in_test() -> None:
    p = problem([(50, 12, 60), (60, 12, 60)], crops=4)
    settings = Head(epochs=12, batch_size=8, learning_rate=0.02)
    votes_differ, selection_differs = 0, 0
    for result in p.train(settings, range(4)):
        reference = train_one(p, result.fold, result.seed, settings)
        np.testing.assert_array_equal(result.examples, np.unique(p.examples[p.folds[result.fold].test]))
        np.testing.assert_array_equal(result.predictions, reference.predictions)
        assert result.best_epoch == reference.accuracies.index(max(reference.accuracies)) + 1
        votes_differ += reference.majority != reference.predictions.tolist()
        by_crop = reference.crop_accuracies
        selection_differs += by_crop.index(max(by_crop)) != reference.accuracies.index(max(reference.accuracies))
    assert votes_differ  # so that neither could pass with crops counted one by one
    assert selection_differs


def test_test_labels_select_nothing() -> None:
    p = problem([(40, 10, 40)])
    settings = Head(epochs=8, batch_size=8, learning_rate=0.02)
    labels = p.labels.copy()
    labels[p.folds[0].test] = (labels[p.folds[0].test] + 1) % CLASSES
    for one, other in zip(
        p.train(settings, range(3)),
        Problem(p.embeddings, labels, p.examples, p.folds).train(settings, range(3)),
        strict=True,
    ):
        assert one.best_epoch == other.best_epoch
        np.testing.assert_array_equal(one.predictions, other.predictions)


def test_other_folds_and_seeds_change_nothing(heads: dict[bytes, Any]) -> None:
    p = problem([(40, 10, 30), (23, 10, 30), (77, 10, 30)])
    settings = Head(epochs=5, batch_size=8, learning_rate=0.03)
    together = {(r.fold, r.seed): r for r in p.train(settings, (0, 1, 2))}
    kept = {key: make() for key, make in heads.items()}
    alone = {(r.fold, r.seed): r for r in p.train(settings, (1,), folds=2)}
    assert set(alone) == {(0, 1), (1, 1)}
    for (fold, seed), result in alone.items():
        start = start_of(seed, fold)
        for name, value in heads[start]().items():
            np.testing.assert_allclose(value, kept[start][name], atol=1e-6)
        np.testing.assert_array_equal(result.predictions, together[fold, seed].predictions)
        assert result.best_epoch == together[fold, seed].best_epoch


def test_the_same_bytes_twice_whatever_the_threads(heads: dict[bytes, Any]) -> None:
    p = problem([(200, 20, 60), (150, 20, 60)])
    settings = Head(epochs=3, batch_size=32, learning_rate=0.03)
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            p.train(settings, (0, 1))
            assert torch.get_num_threads() == threads  # the caller's setting is given back
        finally:
            torch.set_num_threads(1)
        runs.append({key: [value.tobytes() for value in make().values()] for key, make in heads.items()})
    assert len(runs[0]) == 4
    assert runs[0] == runs[1]


def test_scoring_in_blocks_changes_no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem([(60, 20, 60)], crops=3)
    settings = Head(epochs=4, batch_size=16, learning_rate=0.02)
    whole = p.train(settings, (0,))
    monkeypatch.setattr(linear, "_VALUES_AT_ONCE", 7 * DIM)
    (blocks,) = p.train(settings, (0,))
    np.testing.assert_array_equal(blocks.predictions, whole[0].predictions)
    assert blocks.valid_score == whole[0].valid_score


def test_every_epoch_is_told() -> None:
    told: list[int] = []
    problem([(20, 5, 5)]).train(Head(epochs=4, batch_size=8), (0, 1), on_epoch=told.append)
    assert told == [1, 2, 3, 4]


def test_learning_rate_curve() -> None:
    assert [learning_rate(epoch, 3, 1.0) for epoch in (1, 2, 3)] == pytest.approx([1, 0.775, 0.325])
    assert learning_rate(10, 10, 1.0) == pytest.approx(0.122, abs=5e-4)
    assert learning_rate(1, 1, 1e-3) == pytest.approx(1e-3)


def test_backward_is_autograd() -> None:
    rng = np.random.default_rng(3)
    active, batch = 2, 7
    heads = LinearHeads(DIM, CLASSES, [np.random.default_rng(i) for i in range(3)])
    heads.scale += torch.from_numpy(rng.normal(0, 0.3, heads.scale.shape)).float()
    heads.shift += torch.from_numpy(rng.normal(0, 0.3, heads.shift.shape)).float()
    raw = torch.from_numpy(rng.normal(1, 4, (active, batch, DIM))).float()
    classes = torch.from_numpy(rng.integers(0, CLASSES, (active, batch)))
    weight = torch.from_numpy(rng.random((active, batch))).float()
    for gradient in heads.gradients:
        gradient.fill_(9)
    x = normalised(raw)
    heads.backward(x, cross_entropy_gradient(heads.logits(x), classes, weight))
    for h in range(active):
        norm, linear = nn.LayerNorm(DIM), nn.Linear(DIM, CLASSES)
        with torch.no_grad():
            norm.weight.copy_(heads.scale[h, 0])
            norm.bias.copy_(heads.shift[h, 0])
            linear.weight.copy_(heads.weight[h].T)
            linear.bias.copy_(heads.bias[h, 0])
        logits = linear(norm(raw[h]))
        torch.testing.assert_close(heads.logits(x)[h], logits)
        torch.testing.assert_close(heads.logits_of(h, x[h]), logits)
        (nn.functional.cross_entropy(logits, classes[h], reduction="none") * weight[h]).sum().backward()
        expected = (norm.weight.grad, norm.bias.grad, linear.weight.grad, linear.bias.grad)
        for got, parameter in zip(heads.gradients, expected, strict=True):
            assert parameter is not None
            reference = parameter.T if parameter.ndim == 2 else parameter[None]
            torch.testing.assert_close(got[h], reference, atol=1e-6, rtol=1e-4)
    assert all((gradient[active:] == 9).all() for gradient in heads.gradients)  # a head without a batch is left alone
