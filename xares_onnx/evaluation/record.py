"""The record of an evaluation, its averages, and its files.

Scores are fractions. Between two runs with the same inputs and settings only `seconds`, `rtf`, `environment` and
`created` differ. The JSON schema ships beside this module; regenerate it after a change of these types:

    python -m xares_onnx.evaluation.record > xares_onnx/evaluation/result.schema.json
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec
import numpy as np

from ..data.shards import Clips
from ..errors import DataError, DataMissingError, MachineError, UsageError, foreign
from ..files import check_target, disk_error, indented, write_aside
from ..foreign import ForeignFileError, NoFileError, decode_json, read_arrays, read_small
from ..probes.tuning import Tuning
from ..scoring.scoring import Predictions
from ..scoring.shots import Shots
from .settings import Method, family_of

SCHEMA_VERSION = 1
GROUPS = ("public", "all", "speech", "environment", "music", "synthetic", "own")
# The synthetic suite is a profile: its average is in the record for a gate that names it, and is neither shown nor compared.
SHOWN_GROUPS = tuple(group for group in GROUPS if group != "synthetic")

Status = Literal["ok", "not_applicable", "undefined", "skipped", "failed"]
Interval = tuple[float, float]

# More than any result holds: a larger file is a mistake, or meant to exhaust the machine.
_MAX_RESULT_BYTES = 32 << 20
_MAX_RECORDS = 20_000  # of tasks, methods and taps
_MAX_NUMBER, _MAX_SIZE = 1e9, 1 << 60
_MAX_PREDICTION_BYTES = 512 << 20


class Encoder(msgspec.Struct, frozen=True, kw_only=True):
    file: str
    sha256: str
    """Of the model file followed by its external data files, by name."""
    bytes: int
    parameters: int
    contract: dict[str, dict[str, Any]]
    """Each field as {value, source}."""
    taps: list[str]


class Seconds(msgspec.Struct, frozen=True, kw_only=True):
    embed: float
    """Time that encoders spent on the task's shards in this run, added over them; 0 where the store had everything."""
    train: float
    score: float


class TaskResult(msgspec.Struct, frozen=True, kw_only=True):
    task: str
    title: str
    domain: str
    status: Status
    reason: str | None = None
    """Why there is no score; null where status is ok."""
    method: Literal["linear", "retrieval", "ctc", "llm", "knn"]
    tap: str | None = None
    """The layer or output that the embeddings are of; null for the encoder's first tap, which is its output."""
    metric: str
    higher_is_better: bool = True
    score: float | None = None
    """Mean over folds, then over seeds."""
    ci95: Interval | None = None
    """95 % interval over test clips (or groups of them) and, for heads that draw, seeds."""
    test_groups: int | None = None
    """Groups of test clips (speakers, recordings) that the interval resamples whole; null where it resamples clips."""
    metrics: dict[str, float] = {}
    per_fold: list[float] = []
    per_seed: list[float] = []
    n_test: int = 0
    selection: float | None = None
    """A kNN's score on the selection clips, by which the best of several taps is chosen; of a head see `tuning`."""
    shots: list[Shots] = []
    """The head's score with few training clips per class, if `--shots` asked for it."""
    weight: float | None = None
    comparable: bool = True
    """Whether this is the task's score by its protocol: not after `--limit`, nor when too many clips were lost, nor
    where the protocol's own head or vocabulary was not at hand."""
    clips: Clips
    notes: list[str] = []
    """What is not as usual in this task: held-out selection, cross-validation, losses that were allowed."""
    data_digest: str | None = None
    definition_digest: str
    seconds: Seconds
    audio_hours: float = 0.0
    rtf: float | None = None
    """Seconds of embedding for each second of audio; null where nothing was embedded in this run."""
    published: dict[str, float] = {}
    """Scores of the same task and method in X-ARES's README, by encoder."""
    predictions: str | None = None
    """File name of the per-clip predictions, beside the result."""
    tuning: Tuning | None = None
    """How the head's setting was chosen, and what other settings would have given; null for heads that have none."""

    @property
    def family(self) -> Method:
        """`head` for a trained head of any kind, or `knn`."""
        return family_of(self.method)


class Average(msgspec.Struct, frozen=True, kw_only=True):
    weighted: float
    mean: float
    ci95: Interval | None
    """Of the weighted average."""
    tasks: int
    complete: bool
    missing: list[str]


Averages = dict[str, dict[Method, Average]]


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    gate: Literal["baseline", "fail_under"]
    task: str
    """A task, or the group of an average."""
    method: str
    tap: str | None = None
    status: Literal["pass", "warn", "fail", "skip"]
    """`warn`: the test clips are too few to tell."""
    message: str
    limit: float
    """The loss that is tolerated, or the score that was asked for."""
    score: float | None = None
    difference: float | None = None
    """From the baseline, positive where this result is better."""
    ci95: Interval | None = None
    """Of the difference."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    schema_version: int = SCHEMA_VERSION
    encoder: Encoder
    environment: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str] = []
    created: str
    tasks: list[TaskResult]
    averages: Averages
    """Of the model's output; where taps were named, of the first. That of `synthetic` ranks no encoders."""
    averages_by_tap: dict[str, Averages] = {}
    """The same for every tap, where taps were asked for."""
    gates: list[Gate] = []
    """What `--baseline` and `--fail-under` found, what failed first."""


class _Versioned(msgspec.Struct, frozen=True):
    schema_version: int


def schema() -> dict[str, Any]:
    """JSON schema of a result file."""
    result_schema = msgspec.json.schema(Result)
    for record in result_schema["$defs"].values():  # fields with a default are written too
        record["required"] = list(record["properties"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **result_schema}


def make_room(path: Path) -> None:
    """Make a result's folder, so that a path that cannot be written fails before hours of work and not after.

    Args:
        path: File of the result.

    Raises:
        UsageError: `path` is a folder, or a link, pipe or device, which a file would replace.
        MachineError: Its folder cannot be made or written to.
    """
    if path.is_dir():
        raise UsageError(f"--output {path} is a folder; name a file in it")
    check_target(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error
    if not os.access(path.parent, os.W_OK):
        raise MachineError(f"{path.parent} cannot be written to; name another place by --output")


def write_result(path: Path, result: Result, predictions: Mapping[tuple[str, str], Predictions]) -> None:
    """Write a result as JSON, and the predictions of each task and method beside it. Every file is whole or absent.

    Args:
        path: File of the result, in an existing folder.
        result: The record.
        predictions: Arrays by task and method.

    Raises:
        DiskFullError, MachineError: A file cannot be written.
    """
    for (task, method), arrays in predictions.items():
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **arrays)
        write_aside(path.parent / prediction_file(path, task, method), buffer.getvalue())
    write_aside(path, indented(result))


def read_result(path: Path) -> Result:
    """Read a result file.

    Args:
        path: A `RESULT.json` that `evaluate` wrote.

    Returns:
        The result, with every field of docs/results.md.

    Raises:
        UsageError: The file cannot be read, is not a result, or has another schema version.

    Example:
        >>> read_result(Path("results/model.json")).tasks[0].score  # doctest: +SKIP
        0.83
    """
    try:
        data = read_small(path, _MAX_RESULT_BYTES)
    except NoFileError as error:
        raise UsageError(f"there is no result file {path}") from error
    except ForeignFileError as error:
        raise UsageError(
            f"result file {path} cannot be read ({error}); name the JSON file that `xares-onnx evaluate` wrote"
        ) from error
    try:
        version = decode_json(data, _Versioned).schema_version
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"{path} has schema_version {version}, and this version of xares-onnx reads {SCHEMA_VERSION}; evaluate again"
            )
        result = decode_json(data, Result)
        if len(result.tasks) > _MAX_RECORDS:
            raise ForeignFileError(f"it has {len(result.tasks)} records of tasks")
        _check_numbers(result)
        return result
    except ForeignFileError as error:
        raise UsageError(f"{path} is not a result of `xares-onnx evaluate`: {error}") from error


def _check_numbers(result: Result) -> None:
    """A file may hold any number; only those that an evaluation can give are drawn and averaged."""
    encoder = result.encoder
    if not (0 <= encoder.bytes <= _MAX_SIZE and 0 <= encoder.parameters <= _MAX_SIZE):
        raise ForeignFileError("it holds an impossible encoder size")
    for record in result.tasks:
        signed = [record.score, *(record.ci95 or ()), *record.per_seed, *record.published.values()]
        signed += [value for row in record.shots for value in (row.clips_per_class, row.score, *(row.ci95 or ()))]
        signed += [trial.test for trial in record.tuning.tried] if record.tuning else []
        positive = [record.weight, record.rtf, record.audio_hours]
        in_range = all(value is None or abs(value) <= _MAX_NUMBER for value in signed)
        if not (in_range and all(value is None or 0 <= value <= _MAX_NUMBER for value in positive)):
            raise ForeignFileError(f"it holds an impossible number for {foreign(record.task)}")


def read_predictions(path: Path, record: TaskResult) -> Predictions:
    """Read the per-clip predictions of one record of a result.

    Args:
        path: File of the result.
        record: Its record of a task and method.

    Returns:
        Arrays by name, all with a row for each entry of `key`.

    Raises:
        DataMissingError: The predictions were not kept, or their file is absent.
        DataError: The file does not hold predictions as an evaluation writes them.
    """
    name = foreign(f"{record.task}.{record.method}")
    if record.predictions is None:
        raise DataMissingError(f"{path} keeps no predictions of {name}; evaluate again with --output")
    place = PurePosixPath(record.predictions)
    if place.is_absolute() or ".." in place.parts or "\\" in record.predictions or "\0" in record.predictions:
        raise DataError(f"{path} names predictions of {name} outside its own folder; it was not written by an evaluation")
    file, shown = path.parent / place, path.parent / foreign(record.predictions)
    try:
        arrays: Predictions = read_arrays(file, _MAX_PREDICTION_BYTES)
        rows = len(arrays["key"])
        if any(array.ndim < 1 or len(array) != rows for array in arrays.values()):
            raise ValueError("its columns differ in length")
        if [arrays[column].dtype.kind for column in ("key", "fold", "seed")] != ["U", "U", "i"]:
            raise ValueError("key and fold must be texts, and seed a whole number")
        if "group" in arrays and arrays["group"].dtype.kind != "U":
            raise ValueError("group must be a text")
    except NoFileError as error:
        raise DataMissingError(f"the predictions of {name} are not at {shown}; keep them beside {path.name}") from error
    except (ForeignFileError, ValueError, KeyError) as error:
        reason = foreign(f"there is no column {error}" if isinstance(error, KeyError) else str(error))
        raise DataError(f"{shown} does not hold predictions as an evaluation writes them: {reason}") from error
    return arrays


def prediction_file(path: Path, task: str, method: str) -> str:
    """Name of a predictions file, relative to the result's folder."""
    return f"{path.stem}.predictions/{task}.{method}.npz"


if __name__ == "__main__":
    sys.stdout.buffer.write(indented(schema()))
