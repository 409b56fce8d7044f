"""The report of a check: one finding per property, and facts about the model."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Status = Literal["pass", "warn", "fail", "skip"]
STATUSES: tuple[Status, ...] = ("fail", "warn", "pass", "skip")


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one property: a figure `measured` in `unit`, and its `tolerance`, if the property has them."""

    status: Status
    says: str
    measured: float | int | str | None = None
    tolerance: float | int | str | None = None
    unit: str = ""
    remedy: str = ""
    details: tuple[str, ...] = ()


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


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """The report of a check. If the model cannot be used at all, `unusable` says why, and some properties are skipped.

    `contract` holds each field as {"value", "source"}; it and `model` are None if they could not be determined.
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
    unusable: str | None
    seconds: float

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
