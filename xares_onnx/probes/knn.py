"""kNN on frozen embeddings: ten nearest neighbours, votes weighted by exp(similarity / 0.07)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import KNeighborsClassifier

from ..threads import one_thread

NEIGHBOURS = 10
TEMPERATURE = 0.07
_WORTH_A_DEVICE = 1 << 32  # products of a search: a tenth of a second of one CPU core
_QUERIES, _SEARCHED = 1024, 1 << 16  # rows at once on a device: 256 MiB of similarities

Matrix = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


def knn_cosine(
    train: Matrix, labels: Indices, test: Matrix, examples: Indices, device: str | None = None
) -> tuple[Indices, Indices]:
    """Classify by cosine similarity; an example's votes are the sum of its crops' votes.

    Args:
        train: (crops, dim) embeddings to search.
        labels: (crops,) their classes.
        test: (crops, dim) embeddings to classify.
        examples: (crops,) the example of each test crop.
        device: torch device for large searches; the CPU makes all of them by default.

    Returns:
        The examples, sorted, and their predicted classes.
    """
    if device is not None and len(train) * len(test) * train.shape[1] >= _WORTH_A_DEVICE:
        classes, votes = _votes_on(device, train, labels, test)
    else:
        classifier = KNeighborsClassifier(
            n_neighbors=min(NEIGHBOURS, len(train)), weights=_vote_weights, metric="cosine", algorithm="brute"
        )
        with one_thread():
            classifier.fit(train, labels)
            classes, votes = classifier.classes_, classifier.predict_proba(test)
    unique, positions = np.unique(examples, return_inverse=True)
    totals = np.zeros((len(unique), votes.shape[1]))
    np.add.at(totals, positions, votes)
    return unique, classes[totals.argmax(axis=1)]


def _votes_on(device: str, train: Matrix, labels: Indices, test: Matrix) -> tuple[Indices, npt.NDArray[np.float64]]:
    """(classes, votes (crops, classes)), the neighbours searched by torch in blocks, so that its memory stays bounded."""
    import torch  # takes seconds: only for a device

    from ..models.device import torch_device, without_tf32

    without_tf32()
    where, k = torch_device(device), min(NEIGHBOURS, len(train))

    def units(block: Matrix) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.from_numpy(block).to(where).double()).float()

    similarities, indices = [], []
    with torch.inference_mode():
        queries = [units(test[start : start + _QUERIES]) for start in range(0, len(test), _QUERIES)]
        best = [(query.new_empty((len(query), 0)), query.new_empty((len(query), 0)).long()) for query in queries]
        for start in range(0, len(train), _SEARCHED):
            rows = units(train[start : start + _SEARCHED])
            for number, query in enumerate(queries):
                near = (query @ rows.T).topk(min(k, len(rows)), dim=1)
                values = torch.cat([best[number][0], near.values], dim=1)
                found = torch.cat([best[number][1], near.indices + start], dim=1)
                kept = values.topk(min(k, values.shape[1]), dim=1)
                best[number] = kept.values, found.gather(1, kept.indices)
        for near_values, near_indices in best:
            similarities.append(near_values.cpu().numpy())
            indices.append(near_indices.cpu().numpy())
    weights = _vote_weights(1 - np.concatenate(similarities).astype(np.float64))
    classes, of_class = np.unique(labels, return_inverse=True)
    votes = np.zeros((len(test), len(classes)))
    at = np.arange(len(test))[:, None], of_class[np.concatenate(indices)]
    np.add.at(votes, at, weights / weights.sum(axis=1, keepdims=True))
    return classes, votes


def knn_xares(train: Matrix, labels: Indices, test: Matrix, examples: Indices) -> tuple[Indices, Indices]:
    """X-ARES 0.1.3's arithmetic, crop by crop, for `--protocol xares` only; arguments as in `knn_cosine`.

    Each test vector is normalised by its length, but the training matrix feature by feature over its crops: not a cosine.
    """
    rows = test / np.maximum(np.linalg.norm(test, axis=1, keepdims=True), 1e-12)
    columns = train / np.maximum(np.linalg.norm(train, axis=0, keepdims=True), 1e-12)
    k = min(NEIGHBOURS, len(train))
    classes = int(labels.max()) + 1
    predictions = []
    for start in range(0, len(rows), 1024):
        with one_thread():
            similarity = rows[start : start + 1024] @ columns.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(similarity, nearest, axis=1).astype(np.float64) / TEMPERATURE
        weights = np.exp(near - near.max(axis=1, keepdims=True))
        votes = np.zeros((len(near), classes))
        np.add.at(votes, (np.arange(len(near))[:, None], labels[nearest]), weights / weights.sum(axis=1, keepdims=True))
        predictions.append(votes.argmax(axis=1))
    return examples, np.concatenate(predictions)


def _vote_weights(distances: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Votes from cosine distances. scikit-learn normalises a row's votes to sum 1, so a common factor may be taken out."""
    nearest = distances.min(axis=1, keepdims=True)
    weights: npt.NDArray[Any] = np.exp((nearest - distances) / TEMPERATURE)
    return weights
