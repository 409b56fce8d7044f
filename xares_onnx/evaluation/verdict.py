"""What a comparison found, as a record, and the sentence that sums it up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from ..embedding.drift import Drift
from ..encoder.speed import factor
from .differences import AverageDifference, Difference, Unpaired, gate_of

Outcome = Literal["better", "worse", "mixed", "same", "unclear"]


_NAMED = 3  # losses and gains that a verdict names one by one


class Model(msgspec.Struct, frozen=True, kw_only=True):
    file: str
    sha256: str
    bytes: int
    parameters: int
    dim: int | None
    provider: str | None
    instruction_sets: list[str] | None
    """Of the processor, those by which ONNX Runtime chooses its kernels; null where they were not recorded."""


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of work for each second of audio. `ratio` is that of A over that of B: above 1, B is faster."""

    rtf_a: float
    rtf_b: float
    ratio: float
    low: float | None = None
    """95 % interval of the ratio; null where the two were recorded in runs of their own."""
    high: float | None = None
    together: bool
    """Whether both were measured in turns on this machine, and not each in a run of its own."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Most resident memory of each model's process while it was timed, the program itself included."""

    bytes_a: int
    bytes_b: int


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    message: str
    exit_code: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """B against A. Differences are positive where B is better."""

    verdict: str
    outcome: Outcome
    a: Model
    b: Model
    settings: dict[str, Any]
    """Protocol, seeds and limit of both."""
    tolerance: float
    tasks: list[Difference]
    averages: list[AverageDifference]
    unpaired: list[Unpaired]
    drift: list[Drift] | None
    speed: Speed | None
    memory: Memory | None
    notes: list[str]
    failures: list[Failure]

    @property
    def size_ratio(self) -> float | None:
        """Bytes of B over bytes of A."""
        return self.b.bytes / self.a.bytes if self.a.bytes else None

    @property
    def failed(self) -> list[Difference | AverageDifference]:
        """Where B is for certain worse by more than the tolerance."""
        every: list[Difference | AverageDifference] = [*self.tasks, *self.averages]
        return [found for found in every if gate_of(found.ci95, found.tolerance) == "fail"]


def outcome_of(found: Sequence[Difference]) -> Outcome:
    verdicts = {difference.verdict for difference in found}
    if {"better", "worse"} <= verdicts:
        return "mixed"
    if "better" in verdicts or "worse" in verdicts:
        return "better" if "better" in verdicts else "worse"
    return "same" if verdicts == {"same"} else "unclear"


def verdict(found: Comparison) -> str:
    """One line to act on: what B loses and gains for certain, what cannot be told, and what it costs."""
    parts = []
    for state, verb in (("worse", "loses"), ("better", "gains")):
        certain = sorted((d for d in found.tasks if d.verdict == state), key=lambda d: -abs(d.difference))
        if certain:
            named = ", ".join(f"{amount(d)} on {_score_name(d, found.tasks)}{_doubt(d)}" for d in certain[:_NAMED])
            more = f" and on {len(certain) - _NAMED} more" if len(certain) > _NAMED else ""
            parts.append(f"{verb} {named}{more}")
    same = [d for d in found.tasks if d.verdict == "same"]
    unclear = [d for d in found.tasks if d.verdict == "unclear"]
    if found.tasks and all(d.alike for d in found.tasks):
        parts.append("every clip is scored alike")
    if same:
        parts.append(f"the same within {100 * found.tolerance:g} {_points(found.tolerance)} on {_count(same, found)}")
    if unclear:
        parts.append(f"no difference beyond noise, but too few clips to exclude one, on {_count(unclear, found)}")
    if not found.tasks:
        parts.append("no score to compare")
    for average in found.averages[:1]:  # of heads, over the widest group
        known = {"same": ", the same within the tolerance", "unclear": ", which may be noise"}.get(average.verdict, "")
        what = "kNN" if average.method == "knn" else "head"
        sign = "-" if average.difference < 0 else "+"
        parts.append(f"{sign}{amount(average)} in the {what} average over {average.group} tasks{known}")
    costs = [*_speed_words(found.speed), *([f"{factor(found.size_ratio)} the size"] if found.size_ratio else [])]
    if found.memory is not None:
        costs.append(f"{factor(found.memory.bytes_b / found.memory.bytes_a)} the memory")
    names = "B against A" if found.a.file == found.b.file else f"{found.b.file} against {found.a.file}"
    return f"{names}: {'; '.join([*parts, *([', '.join(costs)] if costs else [])])}"


def amount(found: Difference | AverageDifference) -> str:
    """How much, and half the width of its interval: 0.8 +- 0.5 points; in units of the error, where a score is one."""
    half = (found.ci95[1] - found.ci95[0]) / 2 if found.ci95 else float("nan")
    size = abs(found.difference)
    if isinstance(found, Difference) and not found.higher_is_better:
        return f"{size:.3f} +- {half:.3f}"
    digits = 1 if 100 * max(size, half) >= 0.1 else 2
    return f"{100 * size:.{digits}f} +- {100 * half:.{digits}f} points"


def _score_name(found: Difference, among: Sequence[Difference]) -> str:
    several = sum(other.task == found.task for other in among) > 1
    tap = f" at {found.tap}" if found.tap else ""
    return f"{found.title}{tap}" + (f" ({'kNN' if found.family == 'knn' else found.method})" if several else "")


def _doubt(found: Difference) -> str:
    """The interval is over clips; heads of other seeds may tell another story."""
    return " (not with every seed)" if any(value * found.difference < 0 for value in found.per_seed) else ""


def _count(some: Sequence[Difference], found: Comparison) -> str:
    return f"{len(some)} of {len(found.tasks)} scores"


def _points(tolerance: float) -> str:
    return "point" if tolerance == 0.01 else "points"


def _speed_words(speed: Speed | None) -> list[str]:
    if speed is None:
        return []
    recorded = "" if speed.together else " (as recorded, not measured together)"
    if speed.low is not None and speed.high is not None and speed.low <= 1 <= speed.high:
        return ["as fast, within the noise of the clock"]
    if speed.ratio >= 1:
        return [f"{factor(speed.ratio)} as fast{recorded}"]
    return [f"{factor(1 / speed.ratio)} as slow{recorded}"]
