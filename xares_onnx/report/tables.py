"""Tables as a terminal shows them, and as plain text elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from ..evaluation.record import TaskResult

METRIC_NAMES = {
    "accuracy": "accuracy",
    "mean_average_precision": "mAP",
    "segment_f1_macro": "macro F1",
    "segment_f1_micro": "micro F1",
    "recall_at_1": "recall@1",
    "one_minus_wer": "1 - WER",
    "mse": "MSE",
}


def grid_range(record: TaskResult) -> tuple[float, float] | None:
    """Lowest and highest test score over the settings that were tried; None for a method without settings."""
    if record.tuning is None:
        return None
    sign = 1 if record.higher_is_better else -1
    scores = [sign * trial.test for trial in record.tuning.tried if trial.test is not None]
    return (min(scores), max(scores)) if scores else None


def is_narrow(console: Console) -> bool:
    """Whether tables leave columns out to fit."""
    return console.width < 120


def empty_table(console: Console, words: Sequence[str], numbers: Sequence[str], more_words: Sequence[str] = ()) -> Table:
    """A table without rows: columns of words, then of numbers (aligned right), then of words again, by their headings."""
    if console.is_terminal:
        table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    else:
        table = Table(box=box.ASCII2)
    for heading in words:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in more_words:
        table.add_column(heading, no_wrap=True)
    return table
