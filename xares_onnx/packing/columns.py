"""Which columns of a table mean what. Names are compared without regard to case."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError, nearest
from .labels import END, KINDS, NAME, START, EventLabels, Labels, NumberLabels, TagLabels
from .tables import Table

PATHS = ("path", "file", "filename", "file_name", "audio")
_TARGETS = {"label": "class", "labels": "tags", "events": "events", "transcript": "transcript", "score": "number"}
_CAPTIONS = re.compile(r"captions?(_?\d+)?")
_SPLITS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
# In the cells of a table, the first of these that occurs separates tags.
_TAG_SEPARATORS = ("|", ";", ",")


@dataclass(frozen=True)
class Columns:
    path: str
    labels: Labels
    split: str | None
    fold: str | None
    group: str | None

    @property
    def wanted(self) -> frozenset[str]:
        return frozenset(filter(None, (self.path, self.split, self.fold, self.group, *self.labels.columns)))

    def part(self, cells: Mapping[str, Any], where: str) -> str | None:
        """The split or the fold that a row names, or None where the table has no such column."""
        column = self.split or self.fold
        if column is None:
            return None
        value = cells[column]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
        if not text:
            raise UsageError(f"{where} names no {'split' if self.split else 'fold'} in its column {column!r}")
        if self.split is None:
            return text
        if text.lower() not in _SPLIT_OF:
            words = ", ".join(_SPLIT_OF)
            raise UsageError(f"{where} names the split {text!r}, which is none of {words}{nearest(text.lower(), _SPLIT_OF)}")
        return _SPLIT_OF[text.lower()]


def find_columns(
    table: Table,
    *,
    target: str | None = None,
    kind: str | None = None,
    group: str | None = None,
    separator: str | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Columns:
    """What a table's columns mean; `UsageError` where one is missing, or where more than one could be meant."""
    named = {name.strip().lower(): name for name in table.columns}
    path = next((named[name] for name in PATHS if name in named), None)
    if path is None:
        raise _lacking(table, f"column {PATHS[0]!r} with the files' names", PATHS)
    split, fold = named.get("split"), named.get("fold")
    if split and fold:
        raise UsageError(f"{table.path.name} has a column split and a column fold; leave one out")
    if group is not None and group.strip().lower() not in named:
        raise _lacking(table, f"column {group!r} to group by", [group])
    labels = _labels(table, named, target, kind)
    if separator is not None and not isinstance(labels, TagLabels):
        raise UsageError(f"--separator is for tags, not for {labels.kind}")
    if (low is not None or high is not None) and not isinstance(labels, NumberLabels):
        raise UsageError(f"--low and --high are for a number, not for {labels.kind}")
    if isinstance(labels, TagLabels):
        if separator == "":
            raise UsageError("--separator must not be empty")
        labels = TagLabels(labels.columns, separator or _tag_separator(table, labels.columns[0]))
    elif isinstance(labels, NumberLabels):
        labels = NumberLabels(labels.columns, low, high)
    return Columns(path, labels, split, fold, named[group.strip().lower()] if group else named.get("group"))


def _labels(table: Table, named: Mapping[str, str], target: str | None, kind: str | None) -> Labels:
    if kind is not None and kind not in KINDS:
        raise UsageError(f"--kind {kind!r} is none of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    if kind is not None and target is None:
        raise UsageError("--kind says what a column is; name the column by --target")
    candidates = _candidates(named)
    if target is not None:
        wanted = target.strip().lower()
        if wanted not in named and wanted not in candidates:
            raise _lacking(table, f"column {target!r}", [*named, *candidates])
        if kind is not None and wanted in named:
            return KINDS[kind]((named[wanted],))
        candidates = {name: labels for name, labels in candidates.items() if wanted in (name, *_lower(labels.columns))}
        if not candidates:
            raise UsageError(f"say what the column {target!r} is by --kind: {', '.join(KINDS)}")
        return candidates.get(wanted) or next(iter(candidates.values()))
    if not candidates:
        needed = f"column with labels: {', '.join(_TARGETS)} or caption (or any other, by --target and --kind)"
        raise _lacking(table, needed, (*_TARGETS, "caption", "captions"))
    rows = candidates.get("events")
    if rows and len(rows.columns) == 3:  # path, start, end, label: the label is an event's
        candidates = {name: c for name, c in candidates.items() if c is rows or not set(c.columns) & set(rows.columns)}
    if len(candidates) > 1:
        names = " or ".join(candidates)
        raise UsageError(f"{table.path.name} has several columns of labels; choose one: --target {names}")
    return next(iter(candidates.values()))


def _candidates(named: Mapping[str, str]) -> dict[str, Labels]:
    found: dict[str, Labels] = {name: KINDS[kind]((named[name],)) for name, kind in _TARGETS.items() if name in named}
    captions = tuple(named[name] for name in named if _CAPTIONS.fullmatch(name))
    if captions:
        found["caption"] = KINDS["captions"](captions)
    fields = [next((named[name] for name in names if name in named), None) for names in (START, END, NAME)]
    if "events" not in found and all(fields):
        found["events"] = EventLabels(tuple(filter(None, fields)))
    return found


def _tag_separator(table: Table, column: str) -> str:
    found: set[str] = set()
    for _, cells in table.rows({column}):
        if isinstance(cells[column], str):
            found.update(mark for mark in _TAG_SEPARATORS if mark in cells[column])
    return next((mark for mark in _TAG_SEPARATORS if mark in found), TagLabels.separator)


def _lower(names: Sequence[str]) -> list[str]:
    return [name.strip().lower() for name in names]


def _lacking(table: Table, what: str, known: Sequence[str]) -> UsageError:
    there = ", ".join(repr(name) for name in table.columns[:12])
    close = next((nearest(name, table.columns) for name in known if nearest(name, table.columns)), "")
    return UsageError(f"{table.path.name} has no {what}; it has {there}{close}")
