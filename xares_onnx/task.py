"""Task files: one TOML a task (DESIGN section 9). A user's own file works exactly like a shipped one."""

from __future__ import annotations

import hashlib
import re
import tomllib
import types
import typing
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from .errors import TaskFileError, nearest
from .targets import Target

Domain = Literal["speech", "environment", "music", "synthetic"]


class Folds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Cross-validation folds: `pattern` is a glob with `{fold}` in it, filled with each of `numbers`."""

    pattern: str
    numbers: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.numbers) < 2 or len(set(self.numbers)) != len(self.numbers):
            raise ValueError("`numbers` needs at least two folds, each once")
        try:
            globs = {self.glob(number) for number in self.numbers}
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(f"`pattern` {self.pattern!r} must hold {{fold}} or {{fold:02}}") from error
        if len(globs) != len(self.numbers):
            raise ValueError(f"`pattern` {self.pattern!r} must hold {{fold}} or {{fold:02}}")
        for glob in globs:
            _check_glob(glob)

    def glob(self, number: int) -> str:
        if not re.fullmatch(r"[^{}]*\{fold(:0?\d)?\}[^{}]*", self.pattern):
            raise ValueError(self.pattern)
        return self.pattern.format(fold=number)


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    splits: dict[Literal["train", "valid", "test"], str] | None = None
    folds: Folds | None = None
    crop_seconds: float | None = None
    zenodo: str | None = None

    def __post_init__(self) -> None:
        if (self.splits is None) == (self.folds is None):
            raise ValueError("needs either `splits` or `folds`")
        if self.splits is not None:
            if not {"train", "test"} <= set(self.splits):
                raise ValueError("`splits` needs train and test")
            for glob in self.splits.values():
                _check_glob(glob)
        if self.crop_seconds is not None and not 0.1 <= self.crop_seconds <= 3600:
            raise ValueError("`crop_seconds` must lie between 0.1 and 3600")


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: Literal["linear"] = "linear"
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if not (1 <= self.epochs <= 10_000 and 1 <= self.batch_size <= 1_000_000 and 0 < self.learning_rate < 10):
            raise ValueError("`epochs` lies in 1..10000, `batch_size` in 1..1000000, `learning_rate` above 0 and below 10")


class Score(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    metric: Literal["accuracy"] = "accuracy"
    knn: bool = True


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Scores from X-ARES's README, by encoder."""

    linear: dict[str, float] = {}
    knn: dict[str, float] = {}
    note: str | None = None


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    title: str
    domain: Domain
    weight: float | None = None
    private: bool = False
    data: Data
    target: Target
    head: Head = Head()
    score: Score = Score()
    published: Published | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", self.name):
            raise ValueError("`name` may hold letters, digits, `_`, `-` and `.` only")
        if self.weight is not None and not 0 <= self.weight < 1e12:
            raise ValueError("`weight` must not be negative")

    @property
    def kind(self) -> str:
        """Target kind as the TOML names it."""
        return str(self.target.__struct_config__.tag)

    def digest(self) -> str:
        """Hex digest of everything in the file that shapes a score: not the title, not what others published."""
        shaping = msgspec.structs.replace(self, title="", published=None)
        return hashlib.sha256(msgspec.json.encode(shaping, order="deterministic")).hexdigest()


def load_task(path: Path, text: str | None = None) -> Task:
    """Read and validate one task file; `TaskFileError` names the file, the key and the nearest valid one."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8") if text is None else text)
    except OSError as error:
        raise TaskFileError(f"task file {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, an integer of 5,000 digits
        raise TaskFileError(f"task file {path} is not valid TOML: {error}") from error
    _reject_unknown(raw, Task, path, "")
    try:
        return msgspec.convert(raw, Task)
    except (msgspec.ValidationError, ValueError) as error:
        message = re.sub(r" - at `\$\.?(.*?)`", r" (at `\1`)", str(error))
        raise TaskFileError(f"task file {path}: {message}") from error


def _check_glob(glob: str) -> None:
    parts = PurePosixPath(glob).parts
    plain = glob.isprintable() and not set(glob) & set("\\:") and all(part == "**" or "**" not in part for part in parts)
    if not parts or glob.startswith("/") or ".." in parts or not plain:
        raise ValueError(f"shard pattern {glob!r} must be a plain pattern inside the task's folder")


def _reject_unknown(raw: Any, expected: Any, path: Path, where: str) -> None:
    """msgspec rejects unknown keys and words too; walking first lets the error suggest what was meant."""
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    if isinstance(raw, str) and typing.get_origin(expected) is Literal and raw not in typing.get_args(expected):
        words = ", ".join(map(repr, typing.get_args(expected)))
        raise TaskFileError(f"task file {path}: {where} is {raw!r}, but must be one of {words}")
    known = _known_keys(raw, options) if isinstance(raw, dict) else None
    if known is None:
        return
    for key, value in raw.items():
        if key not in known:
            place = f"[{where}] " if where else ""
            raise TaskFileError(f"task file {path}: unknown key {place}{key}{nearest(key, known)}")
        _reject_unknown(value, known[key], path, f"{where}.{key}".lstrip("."))


def _known_keys(raw: dict[str, Any], options: tuple[Any, ...]) -> dict[str, Any] | None:
    """The keys that a table may hold, with their types: of a record, of its kind among several, of a dict of named parts."""
    for option in options:
        if typing.get_origin(option) is dict and typing.get_origin(typing.get_args(option)[0]) is Literal:
            names, value = typing.get_args(option)
            return dict.fromkeys(typing.get_args(names), value)
    structs = [option for option in options if isinstance(option, type) and issubclass(option, msgspec.Struct)]
    known: dict[str, Any] = {}
    if len(structs) > 1:
        kinds = {struct.__struct_config__.tag: struct for struct in structs}
        known["kind"] = Literal.__getitem__(tuple(kinds))
        structs = [kinds[raw["kind"]]] if raw.get("kind") in list(kinds) else structs
    for struct in structs:
        known |= typing.get_type_hints(struct)
    return known or None
