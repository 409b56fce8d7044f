"""kNN against loops and formulas written from the definitions: true cosine, and X-ARES 0.1.3's own arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from xares_onnx.probes.knn import knn_cosine, knn_xares

Matrix = NDArray[np.float32]
Indices = NDArray[np.int64]
Search = Callable[[Matrix, Indices, Matrix, Indices], tuple[Indices, Indices]]


def clusters(
    train: int, test: int, classes: int = 4, dim: int = 8, noise: float = 1.5, seed: int = 0
) -> tuple[Matrix, Indices, Matrix, Indices]:
    """Overlapping classes off the origin; features of very different size, as embeddings have them."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, dim))
    scale = 10 ** rng.uniform(-1, 1, dim)
    labels = rng.integers(0, classes, train + test)
    points = (centres[labels] + noise * rng.standard_normal((len(labels), dim)) + 0.5) * scale
    points *= rng.uniform(0.2, 5, (len(points), 1))  # cosine does not see a vector's length
    points = points.astype(np.float32)
    return points[:train], labels[:train], points[train:], labels[train:]


def cosine(a: Matrix, b: Matrix) -> float:
    return float(np.dot(a.astype(np.float64), b) / (math.sqrt(float(np.dot(a, a))) * math.sqrt(float(np.dot(b, b)))))


def naive(train: Matrix, labels: Indices, test: Matrix, examples: Indices) -> dict[int, int]:
    """Ten nearest by cosine, votes exp(similarity / 0.07) that sum to 1, an example's the mean of its crops'."""
    votes: dict[int, list[NDArray[np.float64]]] = {}
    for vector, example in zip(test, examples, strict=True):
        nearest = sorted(((cosine(vector, other), label) for other, label in zip(train, labels, strict=True)), reverse=True)
        vote = np.zeros(labels.max() + 1)
        for similarity, label in nearest[:10]:
            vote[label] += math.exp(similarity / 0.07)
        votes.setdefault(int(example), []).append(vote / vote.sum())
    return {example: int(np.mean(found, axis=0).argmax()) for example, found in votes.items()}


def as_x_ares(train: Matrix, labels: Indices, test: Matrix) -> list[int]:
    """The published arithmetic, in torch: test rows are normalised, and training columns over the clips."""
    rows = torch.nn.functional.normalize(torch.from_numpy(test), dim=1)
    columns = torch.nn.functional.normalize(torch.from_numpy(train), dim=0)
    similarity, nearest = (rows @ columns.T).topk(10, dim=1)
    weights = (similarity / 0.07).softmax(dim=1)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels)[nearest], int(labels.max()) + 1)
    predictions: list[int] = (one_hot * weights[:, :, None]).sum(dim=1).argmax(dim=1).tolist()
    return predictions


def each(count: int) -> Indices:
    return np.arange(count)


@pytest.mark.parametrize("seed", range(3))
def test_cosine_is_the_naive_loop(seed: int) -> None:
    train, labels, test, truth = clusters(90, 70, seed=seed)
    examples, predictions = knn_cosine(train, labels, test, each(70))
    expected = naive(train, labels, test, each(70))
    assert dict(zip(examples.tolist(), predictions.tolist(), strict=True)) == expected
    assert 0.3 < (predictions == truth).mean() < 0.95  # neither chance nor trivial


def test_votes_of_crops_are_averaged() -> None:
    train, labels, test, _ = clusters(90, 120, noise=2.5)
    examples = np.sort(np.random.default_rng(0).integers(0, 40, 120)) * 2  # numbers with gaps, one to several crops each
    found, predictions = knn_cosine(train, labels, test, examples)
    np.testing.assert_array_equal(found, np.unique(examples))
    assert dict(zip(found.tolist(), predictions.tolist(), strict=True)) == naive(train, labels, test, examples)
    _, by_crop = knn_cosine(train, labels, test, each(120))
    majority = [int(np.bincount(by_crop[examples == example]).argmax()) for example in found]
    assert majority != predictions.tolist()  # so that counting crops would have been seen


@pytest.mark.parametrize("seed", range(3))
def test_x_ares_arithmetic_is_that_of_its_page(seed: int) -> None:
    train, labels, test, _ = clusters(90, 70, seed=seed)
    examples, predictions = knn_xares(train, labels, test, each(70))
    np.testing.assert_array_equal(examples, each(70))
    assert predictions.tolist() == as_x_ares(train, labels, test)


def test_the_two_differ() -> None:
    train, labels, test, _ = clusters(90, 70)
    assert (knn_cosine(train, labels, test, each(70))[1] != knn_xares(train, labels, test, each(70))[1]).sum() > 5


def test_x_ares_scores_crops_one_by_one_and_in_blocks() -> None:
    train, labels, test, _ = clusters(40, 2500, noise=2.5)
    examples, predictions = knn_xares(train, labels, test, each(2500))  # more than two blocks of 1024
    assert predictions.tolist() == as_x_ares(train, labels, test)
    assert len(examples) == 2500


def test_ten_neighbours_and_no_more() -> None:
    """Ten near clips of one class outvote, and an eleventh ring of five hundred of the other is not asked."""
    near = np.array([[1.0, 0.3]] * 10, np.float32)
    far = np.array([[1.0, 0.32]] * 500, np.float32)
    train = np.concatenate([near, far])
    labels = np.array([1] * 10 + [0] * 500)
    assert knn_cosine(train, labels, np.array([[1.0, 0.0]], np.float32), each(1))[1].tolist() == [1]


def test_temperature_weighs_a_near_clip_over_nine_far_ones() -> None:
    train = np.array([[1.0, 0.0]] + [[0.8, 0.6]] * 9, np.float32)  # cosines 1 and 0.8: exp(0.2 / 0.07) = 17.4 > 9
    labels = np.array([2] + [5] * 9)
    test = np.array([[3.0, 0.0]], np.float32)
    assert knn_cosine(train, labels, test, each(1))[1].tolist() == [2]
    train[1:] = [math.cos(0.5), math.sin(0.5)]  # cosine 0.878: exp(0.122 / 0.07) = 5.7 < 9
    assert knn_cosine(train, labels, test, each(1))[1].tolist() == [5]


@pytest.mark.parametrize("search", [knn_cosine, knn_xares])
def test_fewer_than_ten_training_crops(search: Search) -> None:
    train = np.array([[1.0, 0.1], [0.9, 0.0], [0.0, 1.0]], np.float32)
    labels = np.array([4, 4, 1])
    test = np.array([[2.0, 0.0], [0.0, 5.0]], np.float32)
    assert search(train, labels, test, each(2))[1].tolist() == [4, 1]
    assert search(train[:1], labels[:1], test, each(2))[1].tolist() == [4, 4]


@pytest.mark.parametrize("search", [knn_cosine, knn_xares])
def test_zero_vectors_neither_crash_nor_win(search: Search) -> None:
    """Silence may embed to zero. Its cosine to everything is taken as 0, so it votes less than any clip on the same side."""
    train = np.array([[0.0, 0.0]] * 3 + [[1.0, 0.2]] * 2, np.float32)
    labels = np.array([0] * 3 + [1] * 2)
    assert search(train, labels, np.array([[1.0, 0.2]], np.float32), each(1))[1].tolist() == [1]
    only_zeros = search(train, labels, np.zeros((2, 2), np.float32), each(2))[1]
    assert only_zeros.tolist() == [0, 0]  # all similarities equal: the majority


@pytest.mark.parametrize("search", [knn_cosine, knn_xares])
def test_a_tie_of_votes_goes_to_the_first_class(search: Search) -> None:
    train = np.array([[1.0, 0.0]] * 4, np.float32)
    for labels in ([3, 3, 1, 1], [1, 3, 1, 3], [1, 1, 3, 3]):
        assert search(train, np.array(labels), np.array([[1.0, 0.0]], np.float32), each(1))[1].tolist() == [1]


def test_length_of_a_vector_does_not_matter() -> None:
    train, labels, test, _ = clusters(60, 40)
    scaled = knn_cosine(train * np.float32(1e4), labels, test * np.float32(1e-3), each(40))[1]
    np.testing.assert_array_equal(scaled, knn_cosine(train, labels, test, each(40))[1])
