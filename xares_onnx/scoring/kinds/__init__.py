"""Kinds of task: each joins a target, a head and a metric, behind one interface for evaluation.

A new kind is a target (in `data.targets`), a head (in `probes` and `models`) and a metric (in `metrics`), joined by a module
here.
"""

from __future__ import annotations

from ...data.task import METRICS, Metric, Task
from .captions import Captions
from .classes import Classes
from .events import EventsKind
from .kind import Kept, Kind, Outcome, Tools
from .number import Number
from .tags import Tags
from .transcript import Transcript

__all__ = ["KINDS", "Kept", "Kind", "Outcome", "Tools", "kind_of", "kind_scored_by"]

KINDS: dict[str, type[Kind]] = {
    "class": Classes,
    "integer": Classes,
    "tags": Tags,
    "events": EventsKind,
    "captions": Captions,
    "transcript": Transcript,
    "number": Number,
}


def kind_of(task: Task) -> type[Kind]:
    return KINDS[task.kind]


def kind_scored_by(metric: Metric) -> type[Kind]:
    """The class that scores by a metric; kinds that share a metric score alike. Raises `ValueError` for an unknown one."""
    for name, metrics in METRICS.items():
        if metric in metrics:
            return KINDS[name]
    raise ValueError(f"there is no metric {metric!r}")
