"""The task file of a packed data set, written as a person would write it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.task import HEADS, METRICS
from .labels import Labels

_WIDTH = 120


@dataclass(frozen=True)
class Heading:
    name: str
    title: str
    domain: str


def write_task(
    heading: Heading,
    labels: Labels,
    *,
    parts: Mapping[str, int],
    folds: bool,
    classes: Sequence[str],
    numbers: tuple[float, float],
    crop_seconds: float | None,
    segment_seconds: float,
    group: str | None = None,
) -> str:
    """The TOML. `parts` has the clips of each split or, by its number, each fold; `group` is a key of each clip's json."""
    tested = sum(parts.values()) if folds else parts["test"]
    if folds:
        shards = f'folds = {{ pattern = "fold-{{fold}}-*.tar", numbers = {sorted(map(int, parts))} }}'
    else:
        named = ", ".join(f'{part} = "{part}-*.tar"' for part in ("train", "valid", "test") if part in parts)
        shards = f"splits = {{ {named} }}"
    metric = METRICS[labels.kind][0]
    lines = [
        *_pairs({"name": heading.name, "title": heading.title, "domain": heading.domain}),
        *([] if labels.kind == "number" else [f"weight = {tested}"]),
        "",
        "[data]",
        shards,
        *_pairs({"crop_seconds": crop_seconds} if crop_seconds is not None else {}),
        *_pairs({"group": group} if group is not None else {}),
        "",
        "[target]",
        *_pairs({"kind": labels.kind, **labels.target(classes, numbers)}),
        "",
        "[head]",
        *_pairs({"kind": HEADS[labels.kind][0]}),
        "",
        "[score]",
        *_pairs({"metric": metric}),
        *_pairs({"segment_seconds": segment_seconds} if labels.kind == "events" else {}),
        *_pairs({"knn": True} if labels.kind == "class" else {}),
    ]
    return "\n".join(lines) + "\n"


def _pairs(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_list(value) if isinstance(value, list) else _scalar(value)}" for key, value in values.items()]


def _list(names: Sequence[str]) -> str:
    quoted = [_scalar(name) for name in names]
    if sum(map(len, quoted)) + 2 * len(quoted) < _WIDTH - 12:
        return f"[{', '.join(quoted)}]"
    lines = ["   "]
    for name in quoted:
        if len(lines[-1]) + len(name) + 2 > _WIDTH and lines[-1].strip():
            lines.append("   ")
        lines[-1] += f" {name},"
    return "\n".join(["[", *lines, "]"])


def _scalar(value: Any) -> str:
    """TOML's texts are json's, except that DEL must be escaped; its numbers and booleans are too."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
