"""kNN on frozen embeddings: ten nearest neighbours, votes weighted by exp(similarity / 0.07)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import KNeighborsClassifier

from ..threads import one_thread

NEIGHBOURS = 10
TEMPERATURE = 0.07

Matrix = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


def knn_cosine(train: Matrix, labels: Indices, test: Matrix, examples: Indices) -> tuple[Indices, Indices]:
    """Classify by cosine similarity; an example's votes are the sum of its crops' votes.

    Args:
        train: (crops, dim) embeddings to search.
        labels: (crops,) their classes.
        test: (crops, dim) embeddings to classify.
        examples: (crops,) the example of each test crop.

    Returns:
        The examples, sorted, and their predicted classes.
    """
    classifier = KNeighborsClassifier(
        n_neighbors=min(NEIGHBOURS, len(train)), weights=_vote_weights, metric="cosine", algorithm="brute"
    )
    with one_thread():
        classifier.fit(train, labels)
        votes = classifier.predict_proba(test)
    unique, positions = np.unique(examples, return_inverse=True)
    totals = np.zeros((len(unique), votes.shape[1]))
    np.add.at(totals, positions, votes)
    return unique, classifier.classes_[totals.argmax(axis=1)]


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
