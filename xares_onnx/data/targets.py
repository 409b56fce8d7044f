"""Targets: how a clip's json becomes what a head is trained on. One frozen record per kind; its fields are the TOML keys."""

from __future__ import annotations

import functools
import math
import reprlib
import sys
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from ..errors import LabelError, quoted
from .sound_events import Events
from .text import normalise

MAX_CLASSES = 100_000


class _Vocabulary(msgspec.Struct, frozen=True, dict=True):
    """A target with class names. `numbers` is made once: to find it by the tuple would take as long as making it."""

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """The index of each class."""
        return {name: number for number, name in enumerate(self.class_names)}

    @property
    def class_names(self) -> tuple[str, ...]:
        raise NotImplementedError


class ClassTarget(_Vocabulary, frozen=True, forbid_unknown_fields=True, tag="class", tag_field="kind"):
    """One class name per clip, from `classes`."""

    key: str
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError("`classes` needs at least two names, each once")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    def encode(self, label: Mapping[str, Any]) -> int:
        """The clip's class index; `LabelError` if its json names no class of the vocabulary."""
        value = _field(label, self.key)
        if not isinstance(value, str):
            raise LabelError(f"label {self.key} is {_shown(value)}, not a class name")
        if value not in self.numbers:
            raise LabelError(f"unknown label {self.key}={_shown(value)}")
        return self.numbers[value]


class IntegerTarget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="integer", tag_field="kind"):
    """The class index itself, 0 <= index < `classes`. Of two classes, false is 0 and true is 1."""

    key: str
    classes: int

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= MAX_CLASSES:
            raise ValueError(f"`classes` must lie between 2 and {MAX_CLASSES}")

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(str(index) for index in range(self.classes))

    def encode(self, label: Mapping[str, Any]) -> int:
        """The clip's class index; `LabelError` if it is not an integer in the range."""
        value = _field(label, self.key)
        number = int(value) if isinstance(value, bool) and self.classes == 2 else _whole_number(value)
        if number is None or not 0 <= number < self.classes:
            raise LabelError(f"label {self.key}={_shown(value)} is not one of 0..{self.classes - 1}")
        return number


class TagsTarget(_Vocabulary, frozen=True, forbid_unknown_fields=True, tag="tags", tag_field="kind"):
    """Any number of class names per clip: a list, or a text with `separator` between them."""

    key: str
    classes: tuple[str, ...]
    separator: str = ";"

    def __post_init__(self) -> None:
        _check_classes(self.classes, self.separator)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    def encode(self, label: Mapping[str, Any]) -> tuple[int, ...]:
        """The clip's class indices, sorted, perhaps none; `LabelError` if a name is not in the vocabulary."""
        value = _field(label, self.key)
        names = value.split(self.separator) if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise LabelError(f"label {self.key} is {_shown(value)}, neither a text nor a list of class names")
        names = [name.strip() for name in names if name.strip()]
        if unknown := [name for name in names if name not in self.numbers]:
            raise LabelError(f"unknown label {self.key}={_shown(unknown[0])}")
        return tuple(sorted({self.numbers[name] for name in names}))


class EventsTarget(_Vocabulary, frozen=True, forbid_unknown_fields=True, tag="events", tag_field="kind"):
    """Events in time: the json is a list of them (or holds one as `events`), each with its start and end in seconds."""

    start: str
    end: str
    label: str
    classes: tuple[str, ...]
    separator: str = ","

    def __post_init__(self) -> None:
        _check_classes(self.classes, self.separator)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    def encode(self, label: Mapping[str, Any]) -> Events:
        """The clip's events. Those of unknown classes are only counted; `LabelError` if one has no times."""
        entries = label.get("events")
        if not isinstance(entries, list):
            raise LabelError("its json is not a list of events")
        times, classes, outside = [], [], 0
        for entry in entries:
            if not isinstance(entry, dict):
                raise LabelError(f"event {_shown(entry)} is not an object")
            start, end, event_class = (_field(entry, key) for key in (self.start, self.end, self.label))
            if not (_is_number(start) and _is_number(end) and start <= end):
                raise LabelError(
                    f"event {_shown(event_class)} has no times: {self.start}={_shown(start)}, {self.end}={_shown(end)}"
                )
            if not isinstance(event_class, str):
                number = _whole_number(event_class)
                event_class = _shown(event_class) if number is None else str(number)
            for name in filter(None, (part.strip() for part in event_class.split(self.separator))):
                if name in self.numbers:
                    times.append((float(start), float(end)))
                    classes.append(self.numbers[name])
                else:
                    outside += 1
        bounds = np.array(times, np.float64).reshape(-1, 2)
        return Events(bounds[:, 0], bounds[:, 1], np.array(classes, np.int64), outside)


class CaptionsTarget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="captions", tag_field="kind"):
    """Texts that describe a clip: the json's values under `keys`, or every text in it."""

    keys: tuple[str, ...] | None = None

    class_names = ()

    def encode(self, label: Mapping[str, Any]) -> tuple[str, ...]:
        """The clip's captions; `LabelError` if it has none."""
        values = label.values() if self.keys is None else [label.get(key) for key in self.keys]
        captions = tuple(value for value in values if isinstance(value, str) and value.strip())
        if not captions:
            raise LabelError("its json holds no caption")
        for caption in captions:
            _check_characters("caption", caption)
        return captions


class TranscriptTarget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="transcript", tag_field="kind"):
    """What is said in a clip."""

    key: str

    class_names = ()

    def encode(self, label: Mapping[str, Any]) -> str:
        """The transcript as written; `LabelError` if it contains neither a letter nor a digit."""
        value = _field(label, self.key)
        if not isinstance(value, str):
            raise LabelError(f"transcript {self.key} is {_shown(value)}, not a text")
        _check_characters("transcript", value)
        if not normalise(value):
            raise LabelError(f"its transcript {self.key} is empty")
        return value


class NumberTarget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="number", tag_field="kind"):
    """A number from `low` to `high`."""

    key: str
    low: float
    high: float

    class_names = ()

    def __post_init__(self) -> None:
        if not 0 < self.high - self.low < math.inf:
            raise ValueError("`low` must lie below `high`")

    def encode(self, label: Mapping[str, Any]) -> float:
        """The clip's number; `LabelError` if it is not a number in the range."""
        value = _field(label, self.key)
        if not _is_number(value) or not self.low <= value <= self.high:
            raise LabelError(f"label {self.key}={_shown(value)} is not a number from {self.low:g} to {self.high:g}")
        return float(value)


Target = ClassTarget | IntegerTarget | TagsTarget | EventsTarget | CaptionsTarget | TranscriptTarget | NumberTarget


def _check_classes(classes: tuple[str, ...], separator: str) -> None:
    if not classes or len(set(classes)) != len(classes):
        raise ValueError("`classes` needs at least one name, each once")
    if not separator:
        raise ValueError("`separator` must not be empty")
    if bad := [name for name in classes if separator in name or name != name.strip() or not name]:
        raise ValueError(
            f"class {quoted(bad[0])} can never be read: it is empty, contains the separator, or begins or ends with white "
            "space"
        )


def _is_number(value: Any) -> bool:
    """Whether a json value is a number that a float can hold: neither NaN nor infinite nor too large."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_characters(name: str, text: str) -> None:
    """`LabelError` for half a surrogate pair, which json can escape and no tokenizer accepts."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise LabelError(f"its {name} {_shown(text)} holds half a character")


def _field(label: Mapping[str, Any], key: str) -> Any:
    if key not in label:
        raise LabelError(f"its json has no {quoted(key)}")
    return label[key]


def _whole_number(value: Any) -> int | None:
    """2, 2.0 and "2" are the whole number 2; true is not 1."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 10:
        return int(value)
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else None


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else reprlib.repr(value)  # reprlib does not descend into a deep list
    return text if len(text) <= 60 else text[:57] + "..."
