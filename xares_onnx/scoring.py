"""Predictions to scores: train and search in every fold, then the score, its spread and its interval."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .dataset import Dataset
from .events import Observer, Progress
from .folds import Fold, Indices, Protocol
from .metrics import Array, accuracy, accuracy_statistics, bootstrap, class_metrics, interval
from .task import Task


@dataclass(frozen=True)
class Outcome:
    """Predicted classes of one fold's test examples, by one seed."""

    fold: int
    seed: int
    examples: Indices
    predictions: Indices


@dataclass(frozen=True)
class Scored:
    score: float
    ci95: tuple[float, float]
    metrics: dict[str, float]
    per_fold: list[float]
    per_seed: list[float]
    n_test: int
    replicates: Array  # (2000,) bootstrap scores
    predictions: dict[str, npt.NDArray[Any]]  # one row an example and seed


def why_undefined(folds: Sequence[Fold], dataset: Dataset) -> str | None:
    """Why these folds can give no score, or None."""
    for fold in folds:
        for part, clips in (("training", fold.train), ("test", fold.test)):
            if not len(clips):
                return f"there are no {part} clips in fold {fold.name}"
        if len(np.unique(dataset.classes[fold.train])) < 2:
            return f"the training clips of fold {fold.name} are all of one class"
    return None


def examples_of(protocol: Protocol, dataset: Dataset) -> Indices:
    """(crops,) the example that each crop is scored with: its clip, or under X-ARES's protocol the crop itself."""
    return dataset.clip_of_crop if protocol.corrected else np.arange(len(dataset.clip_of_crop))


def run_head(
    task: Task, protocol: Protocol, dataset: Dataset, folds: Sequence[Fold], seeds: int, observer: Observer
) -> list[Outcome]:
    """Train the task's head in every fold with every seed, and predict the test examples."""
    from .probe import CropFold, train_linear  # torch: seconds to import, so only where something is trained

    observer(Progress("train", task.name, 0, task.head.epochs))
    results = train_linear(
        dataset.embeddings,
        dataset.classes[dataset.clip_of_crop],
        examples_of(protocol, dataset),
        [CropFold(*(dataset.crops_of(part) for part in (fold.train, fold.valid, fold.test))) for fold in folds],
        len(task.target.class_names),
        task.head,
        range(seeds),
        on_epoch=lambda epoch: observer(Progress("train", task.name, epoch, task.head.epochs)),
    )
    return [Outcome(result.fold, result.seed, result.examples, result.predictions) for result in results]


def run_knn(protocol: Protocol, dataset: Dataset, folds: Sequence[Fold]) -> list[Outcome]:
    """Search every training clip, those held out for a head's selection too: kNN selects nothing."""
    from .knn import knn_cosine, knn_xares

    search = knn_cosine if protocol.corrected else knn_xares
    labels, examples = dataset.classes[dataset.clip_of_crop], examples_of(protocol, dataset)
    outcomes = []
    for number, fold in enumerate(folds):
        train = dataset.crops_of(np.concatenate([fold.train, fold.held_out]))
        test = dataset.crops_of(fold.test)
        found = search(dataset.embeddings[train], labels[train], dataset.embeddings[test], examples[test])
        outcomes.append(Outcome(number, 0, *found))
    return outcomes


def score(
    task: Task, method: str, protocol: Protocol, dataset: Dataset, folds: Sequence[Fold], outcomes: Sequence[Outcome]
) -> Scored:
    """Mean over folds, then over seeds; the interval resamples test clips within folds, the same for every seed."""
    clip_of_example = np.arange(len(dataset.keys)) if protocol.corrected else dataset.clip_of_crop
    statistics, extra, rows = [], [], []
    for number, fold in enumerate(folds):
        tested = np.sort(fold.test)
        by_seed = []
        for outcome in (outcome for outcome in outcomes if outcome.fold == number):
            clips = clip_of_example[outcome.examples]
            targets = dataset.classes[clips]
            by_seed.append(accuracy_statistics(outcome.predictions == targets, clips, tested))
            extra.append(class_metrics(targets, outcome.predictions))
            rows.append(
                (clips, np.full(len(clips), number), np.full(len(clips), outcome.seed), targets, outcome.predictions)
            )
        statistics.append(np.stack(by_seed))
    scores = np.array([accuracy(fold.sum(axis=1)) for fold in statistics])  # (folds, seeds)
    # The task and the method name the generator, so that a task's interval depends on no other task.
    name = hashlib.sha256(f"{task.name}/{method}".encode()).digest()
    replicates = bootstrap(statistics, accuracy, np.random.default_rng(list(name)))
    clips, fold_of, seed_of, targets, predictions = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Scored(
        score=float(scores.mean()),
        ci95=interval(replicates),
        metrics={key: float(np.mean([values[key] for values in extra])) for key in extra[0]},
        per_fold=[float(value) for value in scores.mean(axis=1)],
        per_seed=[float(value) for value in scores.mean(axis=0)],
        n_test=int(sum(len(fold.test) for fold in folds)),
        replicates=replicates,
        predictions={
            "key": np.array(dataset.keys)[clips],
            "fold": np.array([fold.name for fold in folds])[fold_of],
            "seed": seed_of,
            "target": targets.astype(np.int32),
            "prediction": predictions.astype(np.int32),
        },
    )
