"""Targets: how a clip's json becomes what a head is trained on. One frozen record a kind; its fields are the TOML keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import msgspec

from .errors import LabelError

MAX_CLASSES = 100_000


class ClassTarget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="class", tag_field="kind", dict=True):
    """One class name a clip, from `classes`."""

    key: str
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError("`classes` needs at least two names, each once")

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.classes)}

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes

    def encode(self, label: Mapping[str, Any]) -> int:
        """Class index of a clip's json; `LabelError` where it names no class of the vocabulary."""
        value = _field(label, self.key)
        if not isinstance(value, str):
            raise LabelError(f"label {self.key} is {_shown(value)}, not a class name")
        if value not in self._index:
            raise LabelError(f"unknown label {self.key}={_shown(value)}")
        return self._index[value]


class IntegerTarget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="integer", tag_field="kind"):
    """The class index itself, 0 <= index < `classes`."""

    key: str
    classes: int

    def __post_init__(self) -> None:
        if not 2 <= self.classes <= MAX_CLASSES:
            raise ValueError(f"`classes` must lie between 2 and {MAX_CLASSES}")

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(str(index) for index in range(self.classes))

    def encode(self, label: Mapping[str, Any]) -> int:
        """Class index of a clip's json; `LabelError` where it is no integer of the range."""
        value = _field(label, self.key)
        number = _whole_number(value)
        if number is None or not 0 <= number < self.classes:
            raise LabelError(f"label {self.key}={_shown(value)} is not one of 0..{self.classes - 1}")
        return number


Target = ClassTarget | IntegerTarget


def _field(label: Mapping[str, Any], key: str) -> Any:
    if key not in label:
        raise LabelError(f"its json has no {key!r}")
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
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
