"""Kinds of labels: how the cells of a table are read, what is written beside a clip, and the target of the task.

Several rows may describe one clip: each adds an event, a caption or tags. Repetitions count once; contradictions are errors.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

from ..errors import LabelError, quoted

# Separators of a vocabulary; the last is a control character for this purpose, which nobody types.
SEPARATORS = (";", "|", ",", "\x1f")
Cells = Mapping[str, Any]


@dataclass(frozen=True)
class Labels(ABC):
    """A kind of label, and the `columns` of a table that it is read from."""

    kind: ClassVar[str]
    adds_up: ClassVar[bool] = False
    """Whether further rows about a clip add to its label."""

    columns: tuple[str, ...]

    @abstractmethod
    def read(self, cells: Cells) -> Any:
        """The label in one row, as json can hold it; `LabelError` if it is unusable."""

    @abstractmethod
    def join(self, parts: Sequence[Any]) -> Any:
        """The json beside a clip, from what `read` returned for its rows."""

    def classes(self, label: Any) -> Collection[str]:
        """The names of the classes in a clip's json, each once."""
        return ()

    @abstractmethod
    def target(self, classes: Sequence[str], numbers: tuple[float, float]) -> dict[str, Any]:
        """The [target] of the task, without `kind`. `numbers` are the lowest and the highest that were read."""


class ClassLabels(Labels):
    kind = "class"

    def read(self, cells: Cells) -> str:
        return _name(cells[self.columns[0]], "label")

    def join(self, parts: Sequence[str]) -> dict[str, str]:
        return {"label": parts[0]}

    def classes(self, label: Mapping[str, str]) -> Collection[str]:
        return (label["label"],)

    def target(self, classes: Sequence[str], numbers: tuple[float, float]) -> dict[str, Any]:
        return {"key": "label", "classes": list(classes)}


@dataclass(frozen=True)
class TagLabels(Labels):
    """A list of names, or a text with `separator` between them."""

    kind = "tags"
    adds_up = True
    separator: str = ";"

    def read(self, cells: Cells) -> list[str]:
        value = cells[self.columns[0]]
        names = value.split(self.separator) if isinstance(value, str) else value
        if names is None:
            return []
        if not isinstance(names, list):
            raise LabelError("its tags are neither a text nor a list")
        return sorted({_name(name, "tag") for name in names if not (isinstance(name, str) and not name.strip())})

    def join(self, parts: Sequence[list[str]]) -> dict[str, list[str]]:
        return {"labels": sorted({name for part in parts for name in part})}

    def classes(self, label: Mapping[str, list[str]]) -> Collection[str]:
        return label["labels"]

    def target(self, classes: Sequence[str], numbers: tuple[float, float]) -> dict[str, Any]:
        return {"key": "labels", "separator": separator_of_none(classes), "classes": list(classes)}


# Names of an event's fields, as columns of a table and as keys in a list of objects.
START, END, NAME = ("start", "onset"), ("end", "offset"), ("label", "event_label", "event")


class EventLabels(Labels):
    """A list of events per clip, as json in a text or as it is; or, with three columns, an event per row.

    A row without start, end and label states that its clip has no events.
    """

    kind = "events"
    adds_up = True

    def read(self, cells: Cells) -> list[dict[str, Any]]:
        if len(self.columns) == 3:
            values = [cells[column] for column in self.columns]
            return [] if all(value in (None, "") for value in values) else [_event(*values)]
        value = cells[self.columns[0]]
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise LabelError(f"its events are not json ({error})") from error
        if value in (None, ""):
            return []
        if not isinstance(value, list) or not all(isinstance(event, dict) for event in value):
            raise LabelError("its events are not a list of objects with start, end and label")
        return [_event(*(_first(event, names) for names in (START, END, NAME))) for event in value]

    def join(self, parts: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        events = {(event["start"], event["end"], event["label"]): event for part in parts for event in part}
        return [events[key] for key in sorted(events)]

    def classes(self, label: Iterable[Mapping[str, Any]]) -> Collection[str]:
        return {event["label"] for event in label}

    def target(self, classes: Sequence[str], numbers: tuple[float, float]) -> dict[str, Any]:
        named = {"start": "start", "end": "end", "label": "label"}
        return {**named, "separator": separator_of_none(classes), "classes": list(classes)}


class CaptionLabels(Labels):
    """A text or a list of texts in each column."""

    kind = "captions"
    adds_up = True

    def read(self, cells: Cells) -> list[str]:
        values = [cells[column] for column in self.columns]
        texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
        return [text.strip() for text in texts if isinstance(text, str) and text.strip()]

    def join(self, parts: Sequence[list[str]]) -> dict[str, str]:
        texts = sorted({text for part in parts for text in part})
        return {f"caption_{number}": text for number, text in enumerate(texts, 1)}

    def target(self, classes: Sequence[str], numbers: tuple[float, float]) -> dict[str, Any]:
        return {}


class TranscriptLabels(Labels):
    kind = "transcript"

    def read(self, cells: Cells) -> str:
        value = cells[self.columns[0]]
        if not isinstance(value, str):
            raise LabelError("its transcript is not a text")
        return value

    def join(self, parts: Sequence[str]) -> dict[str, str]:
        return {"transcript": parts[0]}

    def target(self, classes: Sequence[str], numbers: tuple[float, float]) -> dict[str, Any]:
        return {"key": "transcript"}


@dataclass(frozen=True)
class NumberLabels(Labels):
    """A number from `low` to `high`; by default the lowest and highest of the clips, rounded outwards."""

    kind = "number"
    low: float | None = None
    high: float | None = None

    def read(self, cells: Cells) -> float:
        return _number(cells[self.columns[0]], "score")

    def join(self, parts: Sequence[float]) -> dict[str, float]:
        return {"score": parts[0]}

    def target(self, classes: Sequence[str], numbers: tuple[float, float]) -> dict[str, Any]:
        low, high = rounded_outwards(*numbers)
        return {
            "key": "score",
            "low": low if self.low is None else self.low,
            "high": high if self.high is None else self.high,
        }


KINDS: dict[str, type[Labels]] = {
    labels.kind: labels for labels in (ClassLabels, TagLabels, EventLabels, CaptionLabels, TranscriptLabels, NumberLabels)
}


def separator_of_none(names: Iterable[str]) -> str:
    """The first separator that occurs in no name, since targets split names at it."""
    letters = {letter for name in names for letter in name}
    return next((separator for separator in SEPARATORS if separator not in letters), "".join(SEPARATORS))


def rounded_outwards(low: float, high: float) -> tuple[float, float]:
    """Bounds on a grid, the power of ten below their distance: 0.03 and 0.97 become 0 and 1, 1.2 and 4.9 become 1 and 5."""
    if not low < high:
        return low, high
    first, last = Decimal(repr(low)), Decimal(repr(high))  # the decimals as written, not the binary fractions nearby
    step = Decimal(10) ** (last - first).adjusted()
    return float(math.floor(first / step) * step), float(math.ceil(last / step) * step)


def _event(start: Any, end: Any, name: Any) -> dict[str, Any]:
    onset, offset, event_class = _number(start, "start"), _number(end, "end"), _name(name, "event's label")
    if onset > offset:
        raise LabelError(f"an event {quoted(event_class)} ends before it starts")
    return {"start": onset, "end": offset, "label": event_class}


def _first(event: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((event[name] for name in names if name in event), None)


def _name(value: Any, what: str) -> str:
    """A class's name. Whole numbers, such as the notes of a piano, and true and false are names too."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and abs(value) < 2**63:
        return json.dumps(value)
    if not isinstance(value, str) or not value.strip():
        raise LabelError(f"it has no {what}" if value in (None, "") else f"its {what} is not a name")
    return value.strip()


def _number(value: Any, what: str) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise LabelError(
            f"it has no {what}" if value in (None, "") else f"its {what} {quoted(str(value)[:40])} is not a number"
        )
    return number
