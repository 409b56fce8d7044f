"""Gates of an evaluation: scores that must not fall below a number, and not behind a baseline.

What was asked for is read and checked before anything is embedded; what was found is judged at the end and recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..data.task import HEAD_KINDS, Task
from ..errors import UsageError, nearest
from .differences import (
    TOLERANCE,
    AverageDifference,
    Difference,
    Side,
    check_alike,
    check_settings,
    check_tolerance,
    find_differences,
    gate_of,
    groups_of,
    identity,
    signed,
    verified,
)
from .record import GROUPS, Gate, Result, TaskResult
from .settings import METHODS, Method, family_of

_ORDER = ("fail", "warn", "pass", "skip")


@dataclass(frozen=True)
class Floor:
    """The least score of a task, or of an average, by a method; the greatest where a score is an error."""

    task: str
    method: str
    score: float

    @classmethod
    def parsed(cls, text: str) -> Floor:
        """From TASK[:METHOD]=SCORE; the method is `head` where none is named."""
        name, _, number = text.rpartition("=")
        task, _, method = name.partition(":")
        methods = (*METHODS, *HEAD_KINDS)
        try:
            score = float(number)
        except ValueError:
            score = float("nan")
        if not task or not 0 <= score < float("inf"):
            raise UsageError(f"--fail-under {text!r} must read TASK=SCORE or TASK:METHOD=SCORE, such as esc50:knn=0.8")
        if ":" in name and method not in methods:
            raise UsageError(f"--fail-under {text!r}: {method!r} is no method; write {', '.join(methods)}")
        return cls(task, method or "head", score)

    @property
    def family(self) -> Method:
        return family_of(self.method)

    def is_for(self, record: TaskResult) -> bool:
        return record.task == self.task and record.tap is None and self.method in _names(record.method)


@dataclass(frozen=True)
class Gates:
    """What a result must hold against: a baseline with a tolerance, and floors."""

    baseline: Side | None = None
    tolerance: float = TOLERANCE
    floors: tuple[Floor, ...] = ()

    @classmethod
    def read(cls, baseline: Path | None, tolerance: float | None, fail_under: Sequence[str]) -> Gates:
        """Raises `UsageError` for a baseline that is no result, a tolerance without one, or a floor that cannot be read."""
        if tolerance is not None and baseline is None:
            raise UsageError("--tolerance is of a comparison with --baseline RESULT.json; name one")
        tolerance = TOLERANCE if tolerance is None else tolerance
        check_tolerance(tolerance)
        floors = tuple(Floor.parsed(text) for text in fail_under)
        return cls(None if baseline is None else Side.read(baseline), tolerance, floors)

    def check(self, tasks: Sequence[Task], settings: Mapping[str, Any]) -> None:
        """Before anything is embedded: `UsageError` or `DataError` where these tasks and settings could not be judged."""
        for floor in self.floors:
            _check_floor(floor, tasks, settings)
        if self.baseline is None:
            return
        records = self._records(tasks, settings["methods"])
        if not records:
            raise UsageError(f"{self.baseline.name} has a score of none of the tasks that are to be scored; name others")
        self.check_settings(tasks, settings)
        definitions = {task.name: task.digest() for task in tasks}
        for record in records:
            check_alike(self.baseline, record, "this run", definitions[record.task], None)
            verified(self.baseline, record)

    def check_settings(self, tasks: Sequence[Task], settings: Mapping[str, Any]) -> None:
        """`UsageError` where the baseline was scored in another way."""
        if self.baseline is not None:
            methods = {record.method for record in self._records(tasks, settings["methods"])}
            check_settings(self.baseline, "this run", settings, methods)

    def check_data(self, task: Task, data_digest: str) -> None:
        """`DataError` where the baseline has a score of the task on other data."""
        if self.baseline is not None:
            for record in self.baseline.scored().values():
                if record.task == task.name:
                    check_alike(self.baseline, record, "this run", None, data_digest)

    def judge(self, side: Side) -> list[Gate]:
        """Every gate with what became of it, what failed first."""
        found = [_judged_floor(floor, side.result) for floor in self.floors]
        if self.baseline is not None:
            found += _judged_baseline(self.baseline, side, self.tolerance)
        return sorted(found, key=lambda gate: _ORDER.index(gate.status))

    def described(self) -> dict[str, Any]:
        """For the record of settings."""
        against = self.baseline and {"file": self.baseline.name, "model_sha256": self.baseline.result.encoder.sha256}
        floors = [f"{floor.task}:{floor.method}={floor.score:g}" for floor in self.floors]
        return {"baseline": against, "tolerance": self.tolerance if against else None, "fail_under": floors}

    def _records(self, tasks: Sequence[Task], methods: Sequence[str]) -> list[TaskResult]:
        """The baseline's scores that a run of these tasks by `head` or `knn` has too."""
        assert self.baseline is not None
        heads = {task.name: task.head.kind for task in tasks}
        return [
            record
            for record in self.baseline.scored().values()
            if record.family in methods
            and record.task in heads
            and (record.family == "knn" or record.method == heads[record.task])
        ]


def _names(method: str) -> tuple[str, str]:
    """What a method may be called: a head by its kind too."""
    return (method, family_of(method))


def _check_floor(floor: Floor, tasks: Sequence[Task], settings: Mapping[str, Any]) -> None:
    text = f"--fail-under {floor.task}:{floor.method}={floor.score:g}"
    if floor.family not in settings["methods"]:
        raise UsageError(f"{text} asks for a {floor.family} score, which --method {settings['methods'][0]} leaves out")
    if floor.task in GROUPS:
        if settings["limit"] is not None:
            raise UsageError(f"{text} asks for an average, and under --limit no score enters one; name a task")
        if floor.method not in METHODS:
            raise UsageError(f"{text}: an average is over heads of every kind; write {floor.task}:head")
        weighed = [task for task in tasks if task.weight_under(settings["protocol"]) is not None]
        if not any(floor.task in groups_of(task.name) for task in weighed):
            raise UsageError(f"{text}: no task of {floor.task} is to be scored")
    else:
        named = {task.name: task for task in tasks}
        if floor.task not in named:
            raise UsageError(f"{text} names no task that is to be scored{nearest(floor.task, [*named, *GROUPS])}")
        task = named[floor.task]
        if floor.method not in (_names("knn") if task.knn else ()) + _names(task.head.kind):
            raise UsageError(f"{text}: {task.name} is scored by {task.head.kind}{' and knn' if task.knn else ''}")
        if not task.score.higher_is_better:
            return  # an error has no bound
    if floor.score > 1:
        raise UsageError(f"{text}: scores are fractions; write {floor.score / 100:g} for {floor.score:g} %")


def _judged_floor(floor: Floor, result: Result) -> Gate:
    base: dict[str, Any] = {"gate": "fail_under", "task": floor.task, "method": floor.method, "limit": floor.score}
    better = True
    score: float | None
    if floor.task in GROUPS:
        average = result.averages.get(floor.task, {}).get(floor.family)
        score, why = (average.weighted, "") if average else (None, "no task of it has a comparable score")
    else:
        record = next((record for record in result.tasks if floor.is_for(record)), None)
        score, why = (record.score, f"{record.status}: {record.reason}") if record else (None, "it was not scored")
        better = record is None or record.higher_is_better
    if score is None:
        return Gate(**base, status="fail", message=f"no score ({why})")
    held = score >= floor.score if better else score <= floor.score
    words = ("reaches", "is below") if better else ("stays within", "is above")
    message = f"{score:.3f} {words[not held]} {floor.score:g}"
    return Gate(**base, status="pass" if held else "fail", message=message, score=score)


def _judged_baseline(baseline: Side, side: Side, tolerance: float) -> list[Gate]:
    differences = find_differences(baseline, side, tolerance)
    found = [_gate(difference, difference.task, difference.method, tolerance) for difference in differences.tasks]
    found += [_gate(average, average.group, average.method, tolerance) for average in differences.averages]
    here = {identity(record): record for record in side.result.tasks}
    for unpaired in differences.unpaired:
        record = here.get((unpaired.task, unpaired.method, unpaired.tap))
        lost = record is not None and (unpaired.task, unpaired.method, unpaired.tap) in baseline.scored()
        found.append(
            Gate(
                gate="baseline",
                task=unpaired.task,
                method=unpaired.method,
                tap=unpaired.tap,
                # A score that the baseline has and this run was to have and has not is no smaller loss than a low one.
                status="fail" if lost else "skip",
                message=unpaired.reason,
                limit=tolerance,
            )
        )
    return found


def _gate(found: Difference | AverageDifference, task: str, method: str, tolerance: float) -> Gate:
    status = gate_of(found.ci95, found.tolerance)
    return Gate(
        gate="baseline",
        task=task,
        method=method,
        tap=found.tap,
        status=status,
        message=loss(found, status),
        limit=found.tolerance,
        score=found.b,
        difference=found.difference,
        ci95=found.ci95,
    )


def loss(found: Difference | AverageDifference, status: Literal["pass", "warn", "fail"]) -> str:
    """What a gate says of a difference: the scores, how far apart, and what that means for the tolerance."""
    between = (
        f", 95 % between {signed(found.ci95[0])} and {signed(found.ci95[1])}" if found.ci95 else ", without an interval"
    )
    meaning = {
        "fail": f"worse by more than {found.tolerance:g} for certain",
        "warn": f"too few test clips to tell whether it is worse by more than {found.tolerance:g}",
        "pass": f"not worse by more than {found.tolerance:g}",
    }[status]
    return f"{found.a:.3f} -> {found.b:.3f} ({signed(found.difference)}{between}): {meaning}"
