"""What a model gets wrong, from its kept predictions: classes that are confused, and the worst clips.

A clip's own score is the task's metric on that clip alone, the mean over seeds and crops: the share of right answers; the
mean precision of its tags among all classes ranked by probability; F1 over its segments; recall of its captions both ways;
1 - its word error rate; its squared error. Clips of equal score are in the order of their keys.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...data.catalog import shipped_tasks
from ...errors import DataError, DataMissingError, printable
from ...evaluation.differences import verified
from ...evaluation.record import TaskResult
from ...metrics.bootstrap import Array
from ...scoring.scoring import Predictions
from ..board import Board, Row

MAX_CLASSES = 60  # of a heat map
MAX_MODELS = 4
MAX_CLIPS = 5
MAX_PAIRS = 5
_MAX_TEXT = 160
_NAMED_CLASSES = ("accuracy", "mean_average_precision", "segment_f1_macro", "segment_f1_micro")


@dataclass(frozen=True)
class Pair:
    true: str
    predicted: str
    share: float
    """Of the answers to clips of the true class."""


@dataclass(frozen=True)
class Confusion:
    """`matrix` (true, predicted) has the share of each true class's answers; None where the classes are too many."""

    model: int
    classes: tuple[str, ...]
    matrix: Array | None
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class WorstClip:
    """`said` and `scores` have an entry a model of `Mistakes.models`."""

    key: str
    truth: str
    said: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Mistakes:
    row: Row
    models: tuple[int, ...]
    confusions: tuple[Confusion, ...]
    clips: tuple[WorstClip, ...]
    note: str | None


def find_mistakes(board: Board, row: Row) -> Mistakes:
    """Of the best ranked models that have its predictions. Raises `DataError` where those are not what gave the score."""
    models: list[int] = []
    kept: list[tuple[TaskResult, Predictions]] = []
    lacking: list[str] = []
    for number, cell in enumerate(row.cells):
        if cell is None or cell.score is None or len(models) == MAX_MODELS:
            continue
        try:
            predictions, _ = verified(board.models[number].side, cell.record)
        except DataMissingError as error:
            lacking.append(str(error))
            continue
        models.append(number)
        kept.append((cell.record, predictions))
    try:
        found = [_of_model(record, predictions) for record, predictions in kept]
        confusions = _confusions(models, found) if row.metric == "accuracy" else ()
        clips = _worst(found, row.higher_is_better)
    except (KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
        raise DataError(f"the predictions of {row.task} are not those of a score of {row.metric}: {error}") from error
    return Mistakes(row, tuple(models), confusions, clips, lacking[0] if lacking else None)


@dataclass(frozen=True)
class _Clips:
    """One model's test clips: rows of the predictions by clip, own scores (clips,)."""

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
    """The vocabulary of a task as it ships; None where it is a user's own, or was defined otherwise."""
    task = shipped_tasks().get(record.task)
    if task is None or record.metric not in _NAMED_CLASSES or task.digest() != record.definition_digest:
        return None
    return task.target.class_names


def own_scores(metric: str, predictions: Predictions) -> Array:
    """(rows,) the metric of each row of the predictions by itself; nan where it says nothing."""
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
    raise ValueError(f"{metric} is not known")


def ranking_precision(present: npt.NDArray[np.bool_], scores: npt.NDArray[Any]) -> Array:
    """(rows,) the mean over a row's classes of the share of true ones among those ranked as high; 1 without any.

    scikit-learn's label_ranking_average_precision_score, row by row.
    """
    made = np.ones(len(scores))
    for i, (true, of_row) in enumerate(zip(present, scores, strict=True)):
        wanted = np.flatnonzero(true)
        if len(wanted):
            as_high = of_row[None, :] >= of_row[wanted, None]
            made[i] = (as_high[:, wanted].sum(axis=1) / as_high.sum(axis=1)).mean()
    return made


def _confusions(models: Sequence[int], found: Sequence[_Clips]) -> tuple[Confusion, ...]:
    seen = {int(c) for own in found for name in ("target", "prediction") for c in np.unique(own.predictions[name])}
    return tuple(_confusion(number, own, sorted(seen)) for number, own in zip(models, found, strict=True))


def _confusion(model: int, own: _Clips, numbers: Sequence[int]) -> Confusion:
    """`numbers` are the classes that any model of the task has seen or said, so that all of its matrices are alike."""
    target, prediction = (own.predictions[name].astype(np.int64) for name in ("target", "prediction"))
    counts = Counter(zip(target.tolist(), prediction.tolist(), strict=True))
    answers = Counter(target.tolist())
    wrong = sorted(((n / answers[t], t, p) for (t, p), n in counts.items() if t != p), key=lambda x: (-x[0], x[1], x[2]))
    pairs = tuple(Pair(own.class_name(t), own.class_name(p), share) for share, t, p in wrong[:MAX_PAIRS])
    if len(numbers) > MAX_CLASSES:
        return Confusion(model, (), None, pairs)
    place = {number: i for i, number in enumerate(numbers)}
    matrix = np.zeros((len(numbers), len(numbers)))
    for (true, predicted), n in counts.items():
        matrix[place[true], place[predicted]] = n / answers[true]
    return Confusion(model, tuple(map(own.class_name, numbers)), matrix, pairs)


def _worst(found: Sequence[_Clips], higher_is_better: bool) -> tuple[WorstClip, ...]:
    """The clips that all of the models have and that are worst for them on average; only those that are not perfect."""
    if not found:
        return ()
    places = [{name: i for i, name in enumerate(own.names)} for own in found]
    common = [name for name in found[0].names if all(name in of_model for of_model in places)]
    scores = np.array([[own.scores[of[name]] for own, of in zip(found, places, strict=True)] for name in common])
    if not len(scores):
        return ()
    mean = scores.mean(axis=1) if higher_is_better else -scores.mean(axis=1)
    perfect = 1.0 if higher_is_better else 0.0
    order = sorted((i for i in range(len(common)) if mean[i] < perfect), key=lambda i: (mean[i], common[i][1]))
    worst = []
    for i in order[:MAX_CLIPS]:
        name = common[i]
        told = [_told(own, own.rows[of[name]]) for own, of in zip(found, places, strict=True)]
        worst.append(WorstClip(name[1], told[0][0], tuple(said for _, said in told), tuple(map(float, scores[i]))))
    return tuple(worst)


def _told(own: _Clips, rows: npt.NDArray[np.int64]) -> tuple[str, str]:
    """In words: what is true of a clip, and what was said of it."""
    of_clip = {name: array[rows] for name, array in own.predictions.items()}
    if own.metric == "accuracy":
        said = Counter(of_clip["prediction"].tolist()).most_common()
        return own.class_name(int(of_clip["target"][0])), ", ".join(f"{own.class_name(c)} {n}x" for c, n in said[:3])
    if own.metric == "mean_average_precision":
        true = np.flatnonzero(of_clip["target"][0])
        ranked = np.argsort(-of_clip["prediction"].mean(axis=0), kind="stable")[: max(1, len(true))]
        return _list(own.class_name(int(c)) for c in true), _list(own.class_name(int(c)) for c in ranked)
    if own.metric.startswith("segment_f1"):
        counts = of_clip["segments"].mean(axis=0)  # (classes, 3)
        present = np.flatnonzero(counts[:, 0] + counts[:, 2])
        hits, false, missed = counts.sum(axis=0)
        return (
            _list(own.class_name(int(c)) for c in present),
            f"segments: {hits:.3g} right, {false:.3g} claimed though absent, {missed:.3g} missed",
        )
    if own.metric == "recall_at_1":
        to_audio, captions, to_text = of_clip["recall"].mean(axis=0)
        first = "ranks a caption of its own first" if to_text > 0.5 else "ranks another clip's caption first"
        return f"{captions:.0f} captions", f"{to_audio:.3g} of them find the clip; it {first}"
    if own.metric == "mse":
        return f"{of_clip['target'][0]:.3g}", f"{of_clip['prediction'].mean():.3g}"
    target, prediction = (of_clip[name][0] if name in of_clip else "" for name in ("target", "prediction"))
    return _short(target), _short(prediction)


def _list(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _short(text: Any) -> str:
    text = printable(str(text))
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
