"""What the columns of a table mean. Upper and lower case of their names do not matter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError, nearest, quoted
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
SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
# The first of these that occurs in a table's cells separates tags.
_TAG_SEPARATORS = ("|", ";", ",")


@dataclass(frozen=True)
class Columns:
    """Names of the columns by what they mean; None for what the table does not have."""

    path: str
    labels: Labels
    split: str | None
    fold: str | None
    group: str | None

    @property
    def wanted(self) -> frozenset[str]:
        return frozenset(filter(None, (self.path, self.split, self.fold, self.group, *self.labels.columns)))

    def part(self, cells: Mapping[str, Any], where: str) -> str | None:
        """The split or fold of a row; None if the table has no such column. `where` names the row in messages."""
        column = self.split or self.fold
        if column is None:
            return None
        value = cells[column]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        text = str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
        if not text:
            raise UsageError(f"{where} names no {'split' if self.split else 'fold'} in its column {quoted(column)}")
        if self.split is None:
            return text
        if text.lower() not in SPLIT_OF:
            words = ", ".join(SPLIT_OF)
            raise UsageError(
                f"{where} names the split {quoted(text)}, which is not one of {words}{nearest(text.lower(), SPLIT_OF)}"
            )
        return SPLIT_OF[text.lower()]


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
    """Find out what a table's columns mean.

    Args:
        table: The table.
        target: The column of labels, or a kind of label; needed if several columns could hold labels.
        kind: One of `KINDS`, for a target column with a name of its own.
        group: The column of groups, if it is not named `group`.
        separator: What separates tags in a cell; by default what the cells contain.
        low: Lower bound of a number; by default from the cells.
        high: Upper bound of a number.

    Raises:
        UsageError: A column is missing or ambiguous, or an option does not fit the kind of label.
    """
    columns = {name.strip().lower(): name for name in table.columns}
    path = table.audio_column or next((columns[name] for name in PATHS if name in columns), None)
    if path is None:
        raise _lacking(table, f"column {quoted(PATHS[0])} with the files' names", PATHS)
    split, fold = columns.get("split"), columns.get("fold")
    if split and fold:
        raise UsageError(f"{table.path.name} has a column split and a column fold; leave one out")
    if group is not None and group.strip().lower() not in columns:
        raise _lacking(table, f"column {quoted(group)} to group by", [group])
    labels = _labels(table, columns, target, kind)
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
    return Columns(path, labels, split, fold, columns[group.strip().lower()] if group else columns.get("group"))


def _labels(table: Table, columns: Mapping[str, str], target: str | None, kind: str | None) -> Labels:
    if kind is not None and kind not in KINDS:
        raise UsageError(f"--kind {quoted(kind)} is not one of {', '.join(KINDS)}{nearest(kind, KINDS)}")
    if kind is not None and target is None:
        raise UsageError("--kind says what a column is; name the column by --target")
    candidates = _candidates(columns)
    for name in table.labels:
        candidates[name.strip().lower()] = KINDS[table.kinds[name]]((name,))
    if target is not None:
        wanted = target.strip().lower()
        if wanted not in columns and wanted not in candidates:
            raise _lacking(table, f"column {quoted(target)}", [*columns, *candidates])
        if kind is not None and wanted in columns:
            return KINDS[kind]((columns[wanted],))
        named = columns.get(wanted, "")
        if kind is None and wanted not in candidates and named in table.kinds:
            return KINDS[table.kinds[named]]((named,))
        candidates = {name: labels for name, labels in candidates.items() if wanted in (name, *_lower(labels.columns))}
        if not candidates:
            raise UsageError(f"--target {target} requires --kind, one of {', '.join(KINDS)}")
        return candidates.get(wanted) or next(iter(candidates.values()))
    if not candidates:
        needed = f"column with labels: {', '.join(_TARGETS)} or caption (or any other, by --target and --kind)"
        raise _lacking(table, needed, (*_TARGETS, "caption", "captions"))
    events = candidates.get("events")
    if events and len(events.columns) == 3:  # path, start, end, label: the label is an event's
        candidates = {name: c for name, c in candidates.items() if c is events or not set(c.columns) & set(events.columns)}
    if len(candidates) > 1:
        names = " or ".join(candidates)
        raise UsageError(f"{table.path.name} has several columns of labels; choose one: --target {names}")
    return next(iter(candidates.values()))


def _candidates(columns: Mapping[str, str]) -> dict[str, Labels]:
    """What could be the labels, by the name to choose it by; `columns` are by name in lower case."""
    candidates: dict[str, Labels] = {
        name: KINDS[kind]((columns[name],)) for name, kind in _TARGETS.items() if name in columns
    }
    captions = tuple(columns[name] for name in columns if _CAPTIONS.fullmatch(name))
    if captions:
        candidates["caption"] = KINDS["captions"](captions)
    fields = [next((columns[name] for name in names if name in columns), None) for names in (START, END, NAME)]
    if "events" not in candidates and all(fields):
        candidates["events"] = EventLabels(tuple(filter(None, fields)))
    return candidates


def _tag_separator(table: Table, column: str) -> str:
    marks: set[str] = set()
    for _, cells in table.rows({column}):
        if isinstance(cells[column], str):
            marks.update(mark for mark in _TAG_SEPARATORS if mark in cells[column])
    return next((mark for mark in _TAG_SEPARATORS if mark in marks), TagLabels.separator)


def _lower(names: Sequence[str]) -> list[str]:
    return [name.strip().lower() for name in names]


def _lacking(table: Table, what: str, known: Sequence[str]) -> UsageError:
    names = ", ".join(repr(name) for name in table.columns[:12])
    close = next((nearest(name, table.columns) for name in known if nearest(name, table.columns)), "")
    return UsageError(f"{table.path.name} has no {what}; it has {names}{close}")
