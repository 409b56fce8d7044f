"""Task files: one TOML per task. A user's own file works exactly like a shipped one."""

from __future__ import annotations

import functools
import hashlib
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec

from ..errors import TaskFileError, UsageError, escaped, foreign, nearest, quoted
from ..foreign import ForeignFileError, parse_toml, read_small
from .targets import CaptionsTarget, Target

Domain = Literal["speech", "environment", "music", "synthetic"]
HeadKind = Literal["linear", "retrieval", "ctc", "llm"]
Metric = Literal[
    "accuracy", "mean_average_precision", "segment_f1_macro", "segment_f1_micro", "recall_at_1", "one_minus_wer", "mse"
]


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
            raise ValueError(f"`pattern` {quoted(self.pattern)} must hold {{fold}} or {{fold:02}}") from error
        if len(globs) != len(self.numbers):
            raise ValueError(f"`pattern` {quoted(self.pattern)} must hold {{fold}} or {{fold:02}}")
        for glob in globs:
            _check_glob(glob)

    def glob(self, number: int) -> str:
        if not re.fullmatch(r"[^{}]*\{fold(:0?\d)?\}[^{}]*", self.pattern):
            raise ValueError(self.pattern)
        return self.pattern.format(fold=number)


MAX_GROUP = 200  # characters of a group's name, and of a template for it


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which shards a task has, and how their clips are cropped and grouped.

    `splits` or `folds` holds glob patterns, `zenodo` the number of the record that the shards come from. `group` names what
    must not be split, such as a speaker: a key of the clips' json, or a template over clip keys. A template is a text with
    `{group}` in it once, and any number of `*`: see `group_of`.
    """

    splits: dict[Literal["train", "valid", "test"], str] | None = None
    folds: Folds | None = None
    crop_seconds: float | None = None
    zenodo: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if (self.splits is None) == (self.folds is None):
            raise ValueError("needs either `splits` or `folds`")
        if self.splits is not None:
            if not {"train", "test"} <= set(self.splits):
                raise ValueError("`splits` needs train and test")
            for glob in self.splits.values():
                _check_glob(glob)
        if self.zenodo is not None and not re.fullmatch(r"[0-9]{1,12}", self.zenodo):
            raise ValueError("`zenodo` is the number of a record, such as 14614287")
        if self.crop_seconds is not None and not 0.1 <= self.crop_seconds <= 3600:
            raise ValueError("`crop_seconds` must lie between 0.1 and 3600")
        if self.group is not None:
            if not 0 < len(self.group) <= MAX_GROUP or not self.group.isprintable():
                raise ValueError(f"`group` is a text of 1 to {MAX_GROUP} printable characters")
            if set(self.group) & set("*{}"):
                _template(self.group)

    def group_of(self, key: str, label: Mapping[str, Any]) -> str | None:
        """The group of a clip, by its key in the shard and its json; None if they name none.

        A json value is a text or a whole number. A template of n path parts is compared with the last n parts of the key.
        Each `*`, and `{group}`, stands for one or more characters that contain neither `/` nor one of the two texts beside
        it in the template, so that `{group}_*_*` fits keys of exactly three parts.
        """
        value: Any = None
        if self.group is not None and "{group}" in self.group:
            parts = key.split("/")[-1 - self.group.count("/") :]
            match = _template(self.group).fullmatch("/".join(parts))
            value = match["group"] if match else None
        elif self.group is not None:
            value = label.get(self.group)
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
                value = str(value)
        return escaped(value) if isinstance(value, str) and 0 < len(value) <= MAX_GROUP else None


@functools.cache
def _template(text: str) -> re.Pattern[str]:
    """A template as a pattern that never backtracks, so that matching takes time in proportion to the key.

    A regular expression in a stranger's task file could run for ever on one key; a template cannot.
    """
    literals, wildcards = re.split(r"\*|\{group\}", text), re.findall(r"\*|\{group\}", text)
    if wildcards.count("{group}") != 1 or set("".join(literals)) & set("{}"):
        raise ValueError(
            f"`group` {quoted(text)} must hold {{group}} once, and no other braces; a json key has no `*` or braces"
        )
    if not all(literals[1:-1]):
        raise ValueError(
            f"`group` {quoted(text)} must have a text between `*` and {{group}}, or nothing tells where one ends"
        )
    pattern = re.escape(literals[0])
    for before, wildcard, after in zip(literals, wildcards, literals[1:], strict=False):
        ends = "|".join(re.escape(literal) for literal in (before, after, "/") if literal)
        # "++" never gives back what it matched. No match is lost: a wildcard contains neither of the texts beside it.
        pattern += f"({'?P<group>' if wildcard == '{group}' else '?:'}(?:(?!{ends}).)++){re.escape(after)}"
    return re.compile(pattern, re.DOTALL)


_MAX_GLOB, _MAX_GLOB_PARTS = 300, 16  # characters of a shard pattern, and its folders
_MAX_BYTES = 4_000_000  # of a task file, which may name 100,000 classes
HEAD_KINDS: tuple[HeadKind, ...] = typing.get_args(HeadKind)

# The heads and metrics that fit each kind of target.
HEADS: dict[str, tuple[HeadKind, ...]] = {
    "class": ("linear",),
    "integer": ("linear",),
    "tags": ("linear",),
    "events": ("linear",),
    "captions": ("retrieval",),
    "transcript": ("ctc", "llm"),
    "number": ("linear",),
}
METRICS: dict[str, tuple[Metric, ...]] = {
    "class": ("accuracy",),
    "integer": ("accuracy",),
    "tags": ("mean_average_precision",),
    "events": ("segment_f1_macro", "segment_f1_micro"),
    "captions": ("recall_at_1",),
    "transcript": ("one_minus_wer",),
    "number": ("mse",),
}


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a head is trained.

    `positive_weight` multiplies the loss of present classes in heads that decide class by class (tags, events). `epochs`,
    `batch_size` and `learning_rate` are X-ARES's, with its defaults, and serve `--protocol xares`: `corrected` fits a head
    until it has converged, or chooses these on the selection clips.
    """

    kind: HeadKind = "linear"
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    positive_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.positive_weight <= 1e6:
            raise ValueError("`positive_weight` must lie above 0 and not above 1000000")
        if not (1 <= self.epochs <= 10_000 and 1 <= self.batch_size <= 1_000_000 and 0 < self.learning_rate < 10):
            raise ValueError(
                "`epochs` must lie in 1..10000, `batch_size` in 1..1000000, `learning_rate` above 0 and below 10"
            )


class Score(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a task is scored. Segment metrics need `segment_seconds`. Classes are scored by kNN too, unless `knn` is false."""

    metric: Metric = "accuracy"
    segment_seconds: float | None = None
    knn: bool | None = None

    def __post_init__(self) -> None:
        if self.segment_seconds is not None and not 0.001 <= self.segment_seconds <= 3600:
            raise ValueError("`segment_seconds` must lie between 0.001 and 3600")

    @property
    def higher_is_better(self) -> bool:
        return self.metric != "mse"


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Scores from X-ARES's README, by encoder.

    `linear` holds those of the trained head. `head` is its kind, if it is not that of the task.
    """

    linear: dict[str, float] = {}
    knn: dict[str, float] = {}
    head: HeadKind | None = None
    note: str | None = None


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One task file. `disabled`: X-ARES's own runs skip the task, so that X-ARES's averages are without it."""

    name: str
    title: str
    domain: Domain
    weight: float | None = None
    private: bool = False
    disabled: bool = False
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
        if self.weight is not None and self.kind == "number":
            raise ValueError("the error of a number cannot be averaged with other scores; leave out `weight`")
        for table, key, value, allowed in (
            ("head", "kind", self.head.kind, HEADS[self.kind]),
            ("score", "metric", self.score.metric, METRICS[self.kind]),
        ):
            if value not in allowed:
                choices = " or ".join(repr(word) for word in allowed)
                raise ValueError(
                    f"[{table}] {key} {quoted(value)} does not fit a target of kind {self.kind!r}; write {key} = {choices}"
                )
        if (self.score.segment_seconds is None) == (self.kind == "events"):
            needed = "needs `segment_seconds`" if self.kind == "events" else "has no use for `segment_seconds`"
            raise ValueError(f"[score] of a target of kind {self.kind!r} {needed}")
        if self.score.knn and not self.classifies:
            raise ValueError(f"[score] knn is for classes, not for a target of kind {self.kind!r}")
        if self.head.positive_weight != 1 and self.kind not in ("tags", "events"):
            raise ValueError(f"[head] positive_weight is for tags and events, not for a target of kind {self.kind!r}")
        if self.data.crop_seconds is not None and self.kind in ("events", "transcript"):
            raise ValueError(f"[data] crop_seconds would cut through the {self.kind} of a clip; leave it out")

    @property
    def classifies(self) -> bool:
        """Whether every clip is of one class."""
        return self.kind in ("class", "integer")

    @property
    def knn(self) -> bool:
        """Whether a kNN is scored beside the head."""
        return self.classifies and self.score.knn is not False

    @property
    def kind(self) -> str:
        """The target's kind, as the TOML names it."""
        return str(self.target.__struct_config__.tag)

    def with_head(self, kind: HeadKind) -> Task:
        """The task with another kind of head; `UsageError` if that does not fit the target."""
        if kind not in HEADS[self.kind]:
            raise UsageError(
                f"head {quoted(kind)} does not fit {self.name}, a task of kind {self.kind!r}: "
                f"{' or '.join(HEADS[self.kind])}"
            )
        return msgspec.structs.replace(self, head=msgspec.structs.replace(self.head, kind=kind))

    def weight_under(self, protocol: str) -> float | None:
        """The weight in averages under a protocol; None if the task is in no average."""
        return None if protocol == "xares" and self.disabled else self.weight

    def published_scores(self, method: Literal["head", "knn"]) -> dict[str, float]:
        """Published scores by the same method, by encoder; none if they are of another kind of head."""
        if self.published is None or (method == "head" and self.published.head not in (None, self.head.kind)):
            return {}
        return self.published.knn if method == "knn" else self.published.linear

    def encode(self, label: Mapping[str, Any]) -> Any:
        """What a head is trained on, from a clip's json; `LabelError` if the json has no usable label.

        The value that names the group is not taken for a caption.
        """
        if isinstance(self.target, CaptionsTarget) and self.target.keys is None and self.data.group in label:
            label = {key: value for key, value in label.items() if key != self.data.group}
        return self.target.encode(label)

    def digest(self) -> str:
        """Hex digest of everything in the file that shapes a score, so without title and published scores."""
        shaping = msgspec.to_builtins(msgspec.structs.replace(self, title="", published=None), order="deterministic")
        del shaping["disabled"]  # it shapes averages only
        if self.data.group is None:  # so that results from before there were groups stay comparable
            del shaping["data"]["group"]
        return hashlib.sha256(msgspec.json.encode(shaping)).hexdigest()


def load_task(path: Path, text: str | None = None) -> Task:
    """Read and validate one task file.

    Args:
        path: The file, named in messages.
        text: The content, if it need not be read from `path`.

    Raises:
        TaskFileError: The file cannot be read or is not a valid task; names the key, and the nearest valid one.
    """
    try:
        raw = parse_toml(read_small(path, _MAX_BYTES) if text is None else text.encode("utf-8", "surrogatepass"))
    except ForeignFileError as error:
        raise TaskFileError(f"task file {path} cannot be read ({error})") from error
    _reject_unknown(raw, Task, path, "")
    try:
        return msgspec.convert(raw, Task)
    except (msgspec.ValidationError, ValueError) as error:
        message = re.sub(r" - at `\$\.?(.*?)`", r" (at `\1`)", str(error))
        raise TaskFileError(f"task file {path}: {message}") from error


def _check_glob(glob: str) -> None:
    parts = PurePosixPath(glob).parts
    plain = glob.isprintable() and not set(glob) & set("\\:") and all(part == "**" or "**" not in part for part in parts)
    if not 0 < len(parts) <= _MAX_GLOB_PARTS or len(glob) > _MAX_GLOB or glob.startswith("/") or ".." in parts or not plain:
        raise ValueError(f"shard pattern {quoted(glob)} must be a plain pattern inside the task's folder")


def _reject_unknown(raw: Any, expected: Any, path: Path, where: str) -> None:
    """msgspec rejects unknown keys and words too; this walk comes first, to suggest the nearest known one."""
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    if isinstance(raw, str) and typing.get_origin(expected) is Literal and raw not in typing.get_args(expected):
        words = ", ".join(map(repr, typing.get_args(expected)))
        raise TaskFileError(f"task file {path}: {where} is {quoted(raw)}, but must be one of {words}")
    known = _known_keys(raw, options) if isinstance(raw, dict) else None
    if known is None:
        return
    for key, value in raw.items():
        if key not in known:
            place = f"[{where}] " if where else ""
            raise TaskFileError(f"task file {path}: unknown key {place}{foreign(key)}{nearest(key, known)}")
        _reject_unknown(value, known[key], path, f"{where}.{key}".lstrip("."))


def _known_keys(raw: dict[str, Any], options: tuple[Any, ...]) -> dict[str, Any] | None:
    """The keys that a table may hold, with their types; None if it may hold any.

    The table is a record, one of several kinds of records, or a dict of named parts.
    """
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
