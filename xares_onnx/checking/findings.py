"""The report of a check: one finding per property, and facts about the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

Status = Literal["pass", "warn", "fail", "skip"]
STATUSES: tuple[Status, ...] = ("fail", "warn", "pass", "skip")


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one property: a figure `measured` in `unit`, and its `tolerance`, if the property has them.

    `reached` is false if the check ended before it.
    """

    status: Status
    says: str
    measured: float | int | str | None = None
    tolerance: float | int | str | None = None
    unit: str = ""
    remedy: str = ""
    details: tuple[str, ...] = ()
    reached: bool = True


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """An outcome with its property. `says` is one sentence, `remedy` the way to mend a warning or a failure."""

    property: str
    group: str
    title: str
    status: Status
    says: str
    measured: float | int | str | None
    tolerance: float | int | str | None
    unit: str
    remedy: str
    details: tuple[str, ...]
    reached: bool
    seconds: float


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the file: `operators` counts nodes by type, `precision` is that of most of its arithmetic."""

    sha256: str
    bytes: int
    parameters: int
    producer: str
    ir_version: int
    opsets: dict[str, int]
    operators: dict[str, int]
    precision: Literal["fp32", "fp16", "int8-dynamic"]
    metadata: dict[str, str]
    input_shape: tuple[int | str | None, ...] = ()


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Kernels of one operator or one layer, in one run: how many, their time in milliseconds and its share of all."""

    name: str
    kernels: int
    milliseconds: float
    share: float


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Times of the kernels of one run with one thread, each the median of `runs`.

    `seconds` of audio were heard. `operators` come with the largest first, `layers` in order; there are none if none are
    found, as `note` then says.
    """

    provider: str
    seconds: float
    runs: int
    milliseconds: float
    operators: tuple[Part, ...]
    layers: tuple[Part, ...]
    note: str = ""


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of a check. If the model cannot be used at all, `unusable` says why, and some properties are skipped.

    `contract` holds each field as {"value", "source"}; it and `model` are None if they could not be determined. `profile` is
    None unless it was asked for.
    """

    schema_version: int = 1
    file: str
    model: ModelFacts | None
    contract: dict[str, dict[str, Any]] | None
    provider: str | None
    versions: dict[str, str]
    walls: tuple[str, ...] | None
    """What the model's process could not do: the names of `encoder.walls.WALLS`; None if it was never started."""
    findings: tuple[Finding, ...]
    profile: Profile | None
    unusable: str | None
    seconds: float

    @property
    def name(self) -> str:
        """The model's name, for people."""
        return shown_name(self.file)

    @property
    def exit_code(self) -> int:
        """0 if every property passes or warns, 1 if a usable model is faulty, 3 if the model cannot be used."""
        if self.unusable is not None:
            return 3
        return int(bool(self.named("fail")))

    def named(self, status: Status) -> list[str]:
        """The properties with a status, in order."""
        return [finding.property for finding in self.findings if finding.status == status]


def passed(says: str, **figure: Any) -> Outcome:
    return Outcome(status="pass", says=says, **figure)


def warned(says: str, remedy: str, **figure: Any) -> Outcome:
    return Outcome(status="warn", says=says, remedy=remedy, **figure)


def failed(says: str, remedy: str, **figure: Any) -> Outcome:
    return Outcome(status="fail", says=says, remedy=remedy, **figure)


def skipped(why: str) -> Outcome:
    return Outcome(status="skip", says=why)


def unreached(why: str) -> Outcome:
    return Outcome(status="skip", says=why, reached=False)


def shown_name(model: str) -> str:
    """The last part of a model's path; of `.` and the like, that of the folder it stands for."""
    path = Path(model)
    return path.name if path.name not in ("", "..") else path.resolve().name or str(path)
