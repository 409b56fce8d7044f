"""A board of one model as the `model-index` block in the front matter of a Hugging Face model card."""

from __future__ import annotations

from typing import Any

import msgspec

from ..errors import UsageError, foreign
from ..evaluation.record import TaskResult
from ..version import __version__
from .board import Board, Row

# Names in model cards, by metric: the task, and the metric if it has another name there.
_TASK_TYPES = {"one_minus_wer": "automatic-speech-recognition", "recall_at_1": "feature-extraction"}
_METRIC_TYPES = {"segment_f1_macro": "f1", "segment_f1_micro": "f1", "one_minus_wer": "wer"}


def model_index(board: Board) -> str:
    """A YAML block with an entry per task and a metric per method, then the averages.

    The `args` of a metric are its interval, protocol and seeds. Scores that are not comparable are left out.

    Raises:
        UsageError: If the board has several models, or no comparable score.
    """
    if len(board.models) != 1:
        raise UsageError(f"a model-index describes one model, not {len(board.models)}; name one result")
    results: dict[str, dict[str, Any]] = {}
    for row in board.rows:
        cell = row.cells[0]
        if cell is None or cell.score is None or not cell.record.comparable:
            continue
        entry = results.setdefault(
            row.task,
            {
                "task": {"type": _TASK_TYPES.get(row.metric, "audio-classification")},
                "dataset": {"name": row.title, "type": foreign(row.task)},
                "metrics": [],
            },
        )
        entry["metrics"].append(_metric(row, cell.record, board))
    for average in board.averages:
        cell_of_average = average.cells[0]
        key = f"average {average.group}"
        entry = results.setdefault(
            key,
            {
                "task": {"type": "audio-classification", "name": "X-ARES"},
                "dataset": {"name": f"X-ARES, {average.group}", "type": f"x-ares-{average.group}"},
                "metrics": [],
            },
        )
        args = {**_args(board), **_interval(cell_of_average.ci95), "tasks": list(map(foreign, average.tasks))}
        name = f"weighted average, {average.method}, of {len(average.tasks)} of {average.group_size} tasks"
        entry["metrics"].append({"type": "weighted_average", "value": cell_of_average.weighted, "name": name, "args": args})
    if not results:
        raise UsageError(f"{board.models[0].side.name} has no comparable score for a model card; evaluate without --limit")
    index = {"model-index": [{"name": board.models[0].label, "results": list(results.values())}]}
    return msgspec.yaml.encode(index).decode()


def _metric(row: Row, record: TaskResult, board: Board) -> dict[str, Any]:
    value, ci95, name = record.score or 0.0, record.ci95, row.metric_name
    if row.metric == "one_minus_wer":
        rate = record.metrics.get("word_error_rate", 1 - value)  # the score stops at 0, a rate may exceed 1
        value, ci95, name = rate, (1 - ci95[1], 1 - ci95[0]) if ci95 else None, "WER"
    return {
        "type": _METRIC_TYPES.get(row.metric, foreign(row.metric)),
        "value": value,
        "name": f"{name}, {'kNN' if record.family == 'knn' else foreign(record.method) + ' head'}",
        "args": {**_args(board), **_interval(ci95), "test_clips": record.n_test},
    }


def _args(board: Board) -> dict[str, Any]:
    settings = board.settings
    return {"protocol": _plain(settings.get("protocol")), "seeds": _plain(settings.get("seeds")), "xares_onnx": __version__}


def _plain(value: object) -> object:
    return value if isinstance(value, int | float | None) else foreign(str(value))


def _interval(ci95: tuple[float, float] | None) -> dict[str, Any]:
    return {"ci95": list(ci95)} if ci95 else {}
