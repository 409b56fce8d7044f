"""Results made of outcomes that a test chooses, scored in plain numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xares_onnx.data.shards import Clips
from xares_onnx.evaluation import record as results
from xares_onnx.evaluation.differences import Side
from xares_onnx.evaluation.record import Result, Seconds, TaskResult
from xares_onnx.scoring.scoring import Predictions

ENCODER = results.Encoder(file="bank.onnx", sha256="ab" * 32, bytes=1000, parameters=100, contract={}, taps=[])
SETTINGS: dict[str, Any] = {"protocol": "corrected", "seeds": 3, "limit": None, "vocabulary": None, "lm": None}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def classes(right: dict[str, NDArray[Any]], keys: dict[str, list[str]] | None = None) -> Predictions:
    """Predictions of a task of classes: by fold, `right` (seeds, clips) says which are true."""
    rows: dict[str, list[Any]] = {name: [] for name in ("key", "fold", "seed", "target", "prediction")}
    for fold, outcomes in right.items():
        for seed, row in enumerate(np.atleast_2d(outcomes)):
            for clip, hit in enumerate(row):
                target = clip % 4
                key = keys[fold][clip] if keys else f"{fold}.tar/{clip:04}"
                for name, value in zip(rows, (key, fold, seed, target, target if hit else target + 1), strict=True):
                    rows[name].append(value)
    return {name: np.array(column) for name, column in rows.items()}


def accuracy(predictions: Predictions) -> float:
    """Mean over folds of the mean over seeds."""
    hit = predictions["target"] == predictions["prediction"]
    fold, seed = predictions["fold"], predictions["seed"]
    return float(
        np.mean(
            [np.mean([hit[(fold == f) & (seed == s)].mean() for s in np.unique(seed[fold == f])]) for f in np.unique(fold)]
        )
    )


def record(task: str, score: float | None, **fields: Any) -> TaskResult:
    base: dict[str, Any] = {
        "task": task,
        "title": task.upper(),
        "domain": "environment",
        "status": "ok" if score is not None else "failed",
        "method": "linear",
        "metric": "accuracy",
        "score": score,
        "weight": 100.0,
        "clips": Clips(expected=0, read=0, dropped=[]),
        "data_digest": "data",
        "definition_digest": "definition",
        "seconds": Seconds(embed=0.0, train=0.0, score=0.0),
    }
    return TaskResult(**{**base, **fields})


def result(records: list[TaskResult], **fields: Any) -> Result:
    settings = {**SETTINGS, **fields.pop("settings", {})}
    base: dict[str, Any] = {"encoder": ENCODER, "environment": {}, "created": "2026-01-01T00:00:00", "averages": {}}
    return Result(**{**base, **fields}, settings=settings, tasks=records)


def side(name: str, tasks: dict[str, Predictions], **fields: Any) -> Side:
    """A side of tasks of classes, by name."""
    records = [record(task, accuracy(kept), **fields.get("of_record", {})) for task, kept in tasks.items()]
    fields.pop("of_record", None)
    return Side(name, result(records, **fields), lambda of: tasks[of.task])


def saved(path: Path, tasks: dict[str, Predictions], **fields: Any) -> Path:
    """The same as files."""
    records = [
        record(task, accuracy(kept), predictions=results.prediction_file(path, task, "linear"))
        for task, kept in tasks.items()
    ]
    results.write_result(path, result(records, **fields), {(task, "linear"): kept for task, kept in tasks.items()})
    return path
