"""The record of a comparison, and the sentence that sums it up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from ..embedding.drift import Drift
from ..encoder.speed import factor
from ..errors import foreign
from .differences import AverageDifference, Difference, Unpaired, gate_of

Outcome = Literal["better", "worse", "mixed", "same", "unclear"]


_NAMED = 3  # the most losses, and the most gains, that a verdict names one by one


class Model(msgspec.Struct, frozen=True, kw_only=True):
    file: str
    sha256: str
    bytes: int
    parameters: int
    dim: int | None
    provider: str | None
    instruction_sets: list[str] | None
    """Instruction sets of the processor by which ONNX Runtime chooses its kernels; null if they were not recorded."""


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of work per second of audio. `ratio` is A's over B's: above 1, B is faster."""

    rtf_a: float
    rtf_b: float
    ratio: float
    low: float | None = None
    """95 % interval of the ratio; null if each was recorded in a run of its own."""
    high: float | None = None
    together: bool
    """Whether both were measured in turns on this machine, rather than each in a run of its own."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Peak resident memory of each model's process while it was timed, the program itself included."""

    bytes_a: int
    bytes_b: int


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    message: str
    exit_code: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """B against A. Differences are positive if B is better."""

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
        """The scores and averages in which B is certainly worse by more than the tolerance."""
        differences: list[Difference | AverageDifference] = [*self.tasks, *self.averages]
        return [difference for difference in differences if gate_of(difference.ci95, difference.tolerance) == "fail"]


def outcome_of(differences: Sequence[Difference]) -> Outcome:
    verdicts = {difference.verdict for difference in differences}
    if {"better", "worse"} <= verdicts:
        return "mixed"
    if "better" in verdicts or "worse" in verdicts:
        return "better" if "better" in verdicts else "worse"
    return "same" if verdicts == {"same"} else "unclear"


def verdict(comparison: Comparison) -> str:
    """One line to act on: what B certainly loses and gains, what too few clips leave open, and the costs."""
    tasks = comparison.tasks
    parts = []
    for state, verb in (("worse", "loses"), ("better", "gains")):
        certain = sorted((d for d in tasks if d.verdict == state), key=lambda d: -abs(d.difference))
        if certain:
            listed = ", ".join(f"{amount(d)} on {_score_name(d, tasks)}{_doubt(d)}" for d in certain[:_NAMED])
            others = f" and on {len(certain) - _NAMED} more" if len(certain) > _NAMED else ""
            parts.append(f"{verb} {listed}{others}")
    same = [d for d in tasks if d.verdict == "same"]
    unclear = [d for d in tasks if d.verdict == "unclear"]
    if tasks and all(d.alike for d in tasks):
        parts.append("every clip is scored alike")
    if same:
        within = f"{100 * comparison.tolerance:g} {_points(comparison.tolerance)}"
        parts.append(f"the same within {within} on {len(same)} of {len(tasks)} scores")
    if unclear:
        count = f"{len(unclear)} of {len(tasks)} scores"
        parts.append(f"no difference beyond noise, but too few clips to exclude one, on {count}")
    if not tasks:
        parts.append("no score to compare")
    for average in comparison.averages[:1]:  # of heads, over the widest group
        certainty = {"same": ", the same within the tolerance", "unclear": ", which may be noise"}.get(average.verdict, "")
        method = "kNN" if average.method == "knn" else "head"
        sign = "-" if average.difference < 0 else "+"
        parts.append(f"{sign}{amount(average)} in the {method} average over {average.group} tasks{certainty}")
    costs = _speed_words(comparison.speed)
    if comparison.size_ratio:
        costs.append(f"{factor(comparison.size_ratio)} the size")
    if comparison.memory is not None:
        costs.append(f"{factor(comparison.memory.bytes_b / comparison.memory.bytes_a)} the memory")
    if costs:
        parts.append(", ".join(costs))
    a, b = foreign(comparison.a.file), foreign(comparison.b.file)
    names = "B against A" if a == b else f"model {b} against {a}"
    return f"{names}: {'; '.join(parts)}"


def amount(difference: Difference | AverageDifference) -> str:
    """The size of a difference and half the width of its interval: 0.8 +- 0.5 points; an error's in its own unit."""
    half = (difference.ci95[1] - difference.ci95[0]) / 2 if difference.ci95 else float("nan")
    size = abs(difference.difference)
    if isinstance(difference, Difference) and not difference.higher_is_better:
        return f"{size:.3f} +- {half:.3f}"
    digits = 1 if 100 * max(size, half) >= 0.1 else 2
    return f"{100 * size:.{digits}f} +- {100 * half:.{digits}f} points"


def _score_name(difference: Difference, differences: Sequence[Difference]) -> str:
    """The task's title, with tap and method if the differences have several scores of the task."""
    several = sum(other.task == difference.task for other in differences) > 1
    tap = f" at {foreign(difference.tap)}" if difference.tap else ""
    method = "kNN" if difference.family == "knn" else difference.method
    return f"{foreign(difference.title)}{tap}" + (f" ({method})" if several else "")


def _doubt(difference: Difference) -> str:
    """A remark if a seed has the opposite sign: the interval is mostly over clips."""
    return " (not with every seed)" if any(value * difference.difference < 0 for value in difference.per_seed) else ""


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
