"""The synthetic suite as a profile: what an encoder keeps of a sound, aspect by aspect.

It has no average: one would rank encoders by how many of these attributes they keep, and real tasks rank them differently.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..data.catalog import shipped_tasks
from .tables import METRIC_NAMES

NOTE = "the synthetic suite says what an encoder keeps, not how good it is on real sound, so it has no average"
_ASPECTS = {
    "pitch": ("synthetic_pitch",),
    "timbre": ("synthetic_timbre", "synthetic_vowel"),
    "noise": ("synthetic_colour", "synthetic_number"),
    "order in time": ("synthetic_contour", "synthetic_tempo"),
    "what sounds when": ("synthetic_events", "synthetic_notes", "synthetic_transcript"),
    "what sounds together": ("synthetic_tags", "synthetic_captions"),
}


@dataclass(frozen=True)
class Aspect:
    """A task of the profile and what it tests; `chance` is the accuracy of a guess, None for tasks without classes."""

    kept: str
    task: str
    title: str
    metric: str
    chance: float | None


def aspects(tasks: Collection[str]) -> list[Aspect]:
    """The tasks that belong to the profile, out of these names, aspect by aspect."""
    rows = []
    for kept, names in _ASPECTS.items():
        for name in names:
            if name not in tasks:
                continue
            task = shipped_tasks()[name]
            metric = METRIC_NAMES[task.score.metric] + ("" if task.score.higher_is_better else ", lower is better")
            chance = 1 / len(task.target.class_names) if task.kind == "class" else None
            rows.append(Aspect(kept, name, task.title, metric, chance))
    return rows
