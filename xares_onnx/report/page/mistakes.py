"""What a model gets wrong, from its stored predictions: confused classes, and the worst clips.

A clip's own score is the task's metric on that clip alone, averaged over seeds and crops: the share of right answers; the
mean precision of its tags among all classes ranked by probability; F1 over its segments; recall of its captions in both
directions; 1 - its word error rate; its squared error. Clips with equal scores are in the order of their keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...data.catalog import shipped_tasks
from ...errors import DataError, DataMissingError, foreign, printable
from ...evaluation.differences import verified
from ...evaluation.record import TaskResult
from ...metrics.bootstrap import Array
from ...scoring.scoring import Predictions
from ..board import Board, Row
from ..remarks import listed

MAX_CLASSES = 60  # of a heat map
MAX_MODELS = 4
MAX_CLIPS = 5
MAX_PAIRS = 5
_MAX_TEXT = 160
_NAMED_CLASSES = ("accuracy", "mean_average_precision", "segment_f1_macro", "segment_f1_micro")


@dataclass(frozen=True)
class Pair:
    """Two confused classes."""

    true: str
    predicted: str
    share: float
    """Of the answers for clips of the true class."""


@dataclass(frozen=True)
class Confusion:
    """One model's confusions; `matrix` (true, predicted) has shares of each true class's answers, None with many classes."""

    model: int
    classes: tuple[str, ...]
    matrix: Array | None
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class WorstClip:
    """A clip with low scores; `answers` and `scores` have an entry per model of `Mistakes.models`."""

    key: str
    truth: str
    answers: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Mistakes:
    """The mistakes in one task. `models` are indices of the board's models, `note` says if predictions are missing."""

    row: Row
    models: tuple[int, ...]
    confusions: tuple[Confusion, ...]
    clips: tuple[WorstClip, ...]
    note: str | None


def find_mistakes(board: Board, row: Row) -> Mistakes:
    """The mistakes of the best-ranked models with predictions, at most `MAX_MODELS`.

    Raises:
        DataError: If predictions do not give the score of their result.
    """
    models: list[int] = []
    sources: list[tuple[TaskResult, Predictions]] = []
    missing: list[str] = []
    for number, cell in enumerate(row.cells):
        if cell is None or cell.score is None or len(models) == MAX_MODELS:
            continue
        try:
            predictions, _ = verified(board.models[number].side, cell.record)
        except DataMissingError as error:
            missing.append(str(error))
            continue
        models.append(number)
        sources.append((cell.record, predictions))
    try:
        clips_by_model = [_of_model(record, predictions) for record, predictions in sources]
        confusions = _confusions(models, clips_by_model) if row.metric == "accuracy" else ()
        clips = _worst(clips_by_model, row.higher_is_better)
    except (KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
        raise DataError(
            f"the predictions of {foreign(row.task)} do not fit the metric {row.metric_name}: {foreign(str(error))}"
        ) from error
    return Mistakes(row, tuple(models), confusions, clips, missing[0] if missing else None)


@dataclass(frozen=True)
class _Clips:
    """One model's test clips: the rows of the predictions per clip, and each clip's own score (clips,)."""

    metric: str
    predictions: Predictions
    names: list[tuple[str, str]]  # fold, key
    rows: list[npt.NDArray[np.int64]]
    scores: Array
    classes: tuple[str, ...] | None

    def class_name(self, number: int) -> str:
        known = self.classes is not None and 0 <= number < len(self.classes)
        return printable(self.classes[number]) if known and self.classes is not None else f"class {number}"


def _of_model(record: TaskResult, predictions: Predictions) -> _Clips:
    rows: dict[tuple[str, str], list[int]] = {}
    for row, name in enumerate(zip(predictions["fold"].tolist(), predictions["key"].tolist(), strict=True)):
        rows.setdefault(name, []).append(row)
    indices = [np.array(of_clip, np.int64) for of_clip in rows.values()]
    own = own_scores(record.metric, predictions)
    scores = np.array([own[of_clip].mean() for of_clip in indices], np.float64)
    return _Clips(record.metric, predictions, list(rows), indices, scores, class_names(record))


def class_names(record: TaskResult) -> tuple[str, ...] | None:
    """The class names of a shipped task; None for a user's own task, or one with another definition."""
    task = shipped_tasks().get(record.task)
    if task is None or record.metric not in _NAMED_CLASSES or task.digest() != record.definition_digest:
        return None
    return task.target.class_names


def own_scores(metric: str, predictions: Predictions) -> Array:
    """The metric of each row of the predictions by itself (rows,); nan if it is undefined there.

    Raises:
        ValueError: If the metric is unknown.
        KeyError: If the predictions lack an array that the metric needs.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        if metric == "accuracy":
            return np.asarray(predictions["target"] == predictions["prediction"], np.float64)
        if metric == "mean_average_precision":
            return ranking_precision(predictions["target"].astype(bool), predictions["prediction"])
        if metric.startswith("segment_f1"):
            hits, false, missed = predictions["segments"].sum(axis=1).T.astype(np.float64)
            return np.asarray(np.where(hits + false + missed > 0, 2 * hits / (2 * hits + false + missed), 1.0))
        if metric == "recall_at_1":
            to_audio, captions, to_text = predictions["recall"].T.astype(np.float64)
            return np.asarray((to_audio / captions + to_text) / 2)
        if metric == "one_minus_wer":
            errors, words = predictions["word_errors"].T.astype(np.float64)
            return np.asarray(1 - errors / np.maximum(words, 1))
        if metric == "mse":
            return np.asarray((predictions["target"].astype(np.float64) - predictions["prediction"]) ** 2)
    raise ValueError(f"unknown metric {metric}")


def ranking_precision(present: npt.NDArray[np.bool_], scores: npt.NDArray[Any]) -> Array:
    """The precision with which each row ranks its true classes (rows,), as `label_ranking_average_precision_score` does.

    For each true class: the share of true ones among the classes with at least its score; averaged over the row's true
    classes, 1 if there are none. scikit-learn's function averages over rows as well.

    Args:
        present: True classes (rows, classes).
        scores: The scores that rank them (rows, classes).
    """
    precisions = np.ones(len(scores))
    for i, (true, row_scores) in enumerate(zip(present, scores, strict=True)):
        true_classes = np.flatnonzero(true)
        if len(true_classes):
            as_high = row_scores[None, :] >= row_scores[true_classes, None]
            precisions[i] = (as_high[:, true_classes].sum(axis=1) / as_high.sum(axis=1)).mean()
    return precisions


def _confusions(models: Sequence[int], clips_by_model: Sequence[_Clips]) -> tuple[Confusion, ...]:
    numbers = {
        int(number)
        for clips in clips_by_model
        for name in ("target", "prediction")
        for number in np.unique(clips.predictions[name])
    }
    return tuple(_confusion(model, clips, sorted(numbers)) for model, clips in zip(models, clips_by_model, strict=True))


def _confusion(model: int, clips: _Clips, numbers: Sequence[int]) -> Confusion:
    """`numbers` are the classes that occur in any model's targets or answers, so that all matrices have the same axes."""
    target, prediction = (clips.predictions[name].astype(np.int64) for name in ("target", "prediction"))
    counts = Counter(zip(target.tolist(), prediction.tolist(), strict=True))
    answers = Counter(target.tolist())
    wrong = sorted(((n / answers[t], t, p) for (t, p), n in counts.items() if t != p), key=lambda x: (-x[0], x[1], x[2]))
    pairs = tuple(Pair(clips.class_name(t), clips.class_name(p), share) for share, t, p in wrong[:MAX_PAIRS])
    if len(numbers) > MAX_CLASSES:
        return Confusion(model, (), None, pairs)
    place = {number: i for i, number in enumerate(numbers)}
    matrix = np.zeros((len(numbers), len(numbers)))
    for (true, predicted), n in counts.items():
        matrix[place[true], place[predicted]] = n / answers[true]
    return Confusion(model, tuple(map(clips.class_name, numbers)), matrix, pairs)


def _worst(clips_by_model: Sequence[_Clips], higher_is_better: bool) -> tuple[WorstClip, ...]:
    """The imperfect clips with the worst average score over the models, out of those that all models have."""
    if not clips_by_model:
        return ()
    places = [{name: i for i, name in enumerate(clips.names)} for clips in clips_by_model]
    common = [name for name in clips_by_model[0].names if all(name in of_model for of_model in places)]
    scores = np.array(
        [[clips.scores[place[name]] for clips, place in zip(clips_by_model, places, strict=True)] for name in common]
    )
    if not len(scores):
        return ()
    mean = scores.mean(axis=1) if higher_is_better else -scores.mean(axis=1)
    perfect = 1.0 if higher_is_better else 0.0
    order = sorted((i for i in range(len(common)) if mean[i] < perfect), key=lambda i: (mean[i], common[i][1]))
    worst = []
    for i in order[:MAX_CLIPS]:
        name = common[i]
        texts = [_texts(clips, clips.rows[place[name]]) for clips, place in zip(clips_by_model, places, strict=True)]
        worst.append(WorstClip(name[1], texts[0][0], tuple(answer for _, answer in texts), tuple(map(float, scores[i]))))
    return tuple(worst)


def _texts(clips: _Clips, rows: npt.NDArray[np.int64]) -> tuple[str, str]:
    """The truth about a clip and the model's answer, in words."""
    of_clip = {name: array[rows] for name, array in clips.predictions.items()}
    if clips.metric == "accuracy":
        answers = Counter(of_clip["prediction"].tolist()).most_common()
        return clips.class_name(int(of_clip["target"][0])), ", ".join(f"{clips.class_name(c)} {n}x" for c, n in answers[:3])
    if clips.metric == "mean_average_precision":
        true = np.flatnonzero(of_clip["target"][0])
        ranked = np.argsort(-of_clip["prediction"].mean(axis=0), kind="stable")[: max(1, len(true))]
        return _list(clips.class_name(int(c)) for c in true), _list(clips.class_name(int(c)) for c in ranked)
    if clips.metric.startswith("segment_f1"):
        counts = of_clip["segments"].mean(axis=0)  # (classes, 3)
        present = np.flatnonzero(counts[:, 0] + counts[:, 2])
        hits, false, missed = counts.sum(axis=0)
        return (
            _list(clips.class_name(int(c)) for c in present),
            f"segments: {hits:.3g} right, {false:.3g} claimed though absent, {missed:.3g} missed",
        )
    if clips.metric == "recall_at_1":
        to_audio, captions, to_text = of_clip["recall"].mean(axis=0)
        first = "ranks a caption of its own first" if to_text > 0.5 else "ranks another clip's caption first"
        return f"{captions:.0f} captions", f"{to_audio:.3g} of them find the clip; it {first}"
    if clips.metric == "mse":
        return f"{of_clip['target'][0]:.3g}", f"{of_clip['prediction'].mean():.3g}"
    target, prediction = (of_clip[name][0] if name in of_clip else "" for name in ("target", "prediction"))
    return _short(target), _short(prediction)


def _list(names: Iterable[str]) -> str:
    return listed(list(names), limit=4)


def _short(text: Any) -> str:
    text = printable(str(text))
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
