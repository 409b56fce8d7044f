"""Kinds of task: each joins a target, a head and a metric, and evaluation knows none of them by name.

A new kind is a target (in `targets`), a head (in `probes` and `models`) and a metric (in `metrics`), joined by a module
here.
"""

from __future__ import annotations

from ..task import Task
from .captions import Captions
from .classes import Classes
from .events import EventsKind
from .kind import Kind, Outcome, Tools
from .number import Number
from .tags import Tags
from .transcript import Transcript

__all__ = ["KINDS", "Kind", "Outcome", "Tools", "kind_of"]

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
