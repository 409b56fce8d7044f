"""Gates of an evaluation: scores must not fall below a number, nor behind a baseline.

The gates are read and checked before any embedding, judged at the end, and recorded.
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
    """The lowest accepted score of a task or an average by a method; the highest if the score is an error."""

    task: str
    method: str
    score: float

    @classmethod
    def parsed(cls, text: str) -> Floor:
        """A floor from TASK[:METHOD]=SCORE; the method is `head` by default. Raises `UsageError` for another text."""
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
            raise UsageError(f"--fail-under {text!r}: method {method!r} must be one of {', '.join(methods)}")
        return cls(task, method or "head", score)

    @property
    def family(self) -> Method:
        return family_of(self.method)

    def is_for(self, record: TaskResult) -> bool:
        return record.task == self.task and record.tap is None and self.method in _names(record.method)


@dataclass(frozen=True)
class Gates:
    """The gates that a result must pass: a baseline with a tolerance, and floors."""

    baseline: Side | None = None
    tolerance: float = TOLERANCE
    floors: tuple[Floor, ...] = ()

    @classmethod
    def read(cls, baseline: Path | None, tolerance: float | None, fail_under: Sequence[str]) -> Gates:
        """Gates from options. Raises `UsageError` for an unreadable baseline or floor, or a tolerance without a baseline."""
        if tolerance is not None and baseline is None:
            raise UsageError("--tolerance requires --baseline RESULT.json")
        tolerance = TOLERANCE if tolerance is None else tolerance
        check_tolerance(tolerance)
        floors = tuple(Floor.parsed(text) for text in fail_under)
        return cls(None if baseline is None else Side.read(baseline), tolerance, floors)

    def check(self, tasks: Sequence[Task], settings: Mapping[str, Any]) -> None:
        """Before any embedding, raise `UsageError` or `DataError` if these tasks and settings could not be judged."""
        for floor in self.floors:
            _check_floor(floor, tasks, settings)
        if self.baseline is None:
            return
        records = self._records(tasks, settings["methods"])
        if not records:
            raise UsageError(f"{self.baseline.name} has no score of any selected task; name others by --tasks")
        self.check_settings(tasks, settings)
        definitions = {task.name: task.digest() for task in tasks}
        for record in records:
            check_alike(self.baseline, record, "this run", definitions[record.task], None)
            verified(self.baseline, record)

    def check_settings(self, tasks: Sequence[Task], settings: Mapping[str, Any]) -> None:
        """Raise `UsageError` if the baseline was scored in another way."""
        if self.baseline is not None:
            methods = {record.method for record in self._records(tasks, settings["methods"])}
            check_settings(self.baseline, "this run", settings, methods)

    def check_data(self, task: Task, data_digest: str) -> None:
        """Raise `DataError` if the baseline scored the task on other data."""
        if self.baseline is not None:
            for record in self.baseline.scored().values():
                if record.task == task.name:
                    check_alike(self.baseline, record, "this run", None, data_digest)

    def judge(self, side: Side) -> list[Gate]:
        """Every gate with its status, failed ones first."""
        gates = [_judged_floor(floor, side.result) for floor in self.floors]
        if self.baseline is not None:
            gates += _judged_baseline(self.baseline, side, self.tolerance)
        return sorted(gates, key=lambda gate: _ORDER.index(gate.status))

    def described(self) -> dict[str, Any]:
        """The gates as the result records them among its settings."""
        baseline = self.baseline and {"file": self.baseline.name, "model_sha256": self.baseline.result.encoder.sha256}
        floors = [f"{floor.task}:{floor.method}={floor.score:g}" for floor in self.floors]
        return {"baseline": baseline, "tolerance": self.tolerance if baseline else None, "fail_under": floors}

    def _records(self, tasks: Sequence[Task], methods: Sequence[str]) -> list[TaskResult]:
        """The baseline's scores that a run of these tasks by these methods will have too."""
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
    """The names of a method: its own and its family's."""
    return (method, family_of(method))


def _check_floor(floor: Floor, tasks: Sequence[Task], settings: Mapping[str, Any]) -> None:
    text = f"--fail-under {floor.task}:{floor.method}={floor.score:g}"
    if floor.family not in settings["methods"]:
        raise UsageError(f"{text} needs a {floor.family} score, which --method {settings['methods'][0]} leaves out")
    if floor.task in GROUPS:
        if settings["limit"] is not None:
            raise UsageError(f"{text} needs an average, and with --limit there is none; name a task")
        if floor.method not in METHODS:
            raise UsageError(f"{text}: an average is over heads of every kind; write {floor.task}:head")
        weighted = [task for task in tasks if task.weight_under(settings["protocol"]) is not None]
        if not any(floor.task in groups_of(task.name) for task in weighted):
            raise UsageError(f"{text}: no task of {floor.task} is selected")
    else:
        by_name = {task.name: task for task in tasks}
        if floor.task not in by_name:
            raise UsageError(f"{text} names a task that is not selected{nearest(floor.task, [*by_name, *GROUPS])}")
        task = by_name[floor.task]
        if floor.method not in (_names("knn") if task.knn else ()) + _names(task.head.kind):
            raise UsageError(f"{text}: {task.name} is scored by {task.head.kind}{' and knn' if task.knn else ''}")
        if not task.score.higher_is_better:
            return  # an error has no upper bound
    if floor.score > 1:
        raise UsageError(f"{text}: scores are fractions; write {floor.score / 100:g} for {floor.score:g} %")


def _judged_floor(floor: Floor, result: Result) -> Gate:
    base: dict[str, Any] = {"gate": "fail_under", "task": floor.task, "method": floor.method, "limit": floor.score}
    higher_is_better = True
    score: float | None
    if floor.task in GROUPS:
        average = result.averages.get(floor.task, {}).get(floor.family)
        score, why = (average.weighted, "") if average else (None, "no task of it has a comparable score")
    else:
        record = next((record for record in result.tasks if floor.is_for(record)), None)
        score, why = (record.score, f"{record.status}: {record.reason}") if record else (None, "it was not scored")
        higher_is_better = record is None or record.higher_is_better
    if score is None:
        return Gate(**base, status="fail", message=f"no score ({why})")
    passes = score >= floor.score if higher_is_better else score <= floor.score
    verbs = ("reaches", "is below") if higher_is_better else ("stays within", "is above")
    message = f"{score:.3f} {verbs[not passes]} {floor.score:g}"
    return Gate(**base, status="pass" if passes else "fail", message=message, score=score)


def _judged_baseline(baseline: Side, side: Side, tolerance: float) -> list[Gate]:
    differences = find_differences(baseline, side, tolerance)
    gates = [_gate(difference, difference.task, difference.method) for difference in differences.tasks]
    gates += [_gate(average, average.group, average.method) for average in differences.averages]
    records, scored_before = {identity(record): record for record in side.result.tasks}, baseline.scored()
    for unpaired in differences.unpaired:
        name = (unpaired.task, unpaired.method, unpaired.tap)
        # A score that this run should have and the baseline has: to lose it is no smaller loss than a low score.
        lost = name in records and name in scored_before
        gates.append(
            Gate(
                gate="baseline",
                task=unpaired.task,
                method=unpaired.method,
                tap=unpaired.tap,
                status="fail" if lost else "skip",
                message=unpaired.reason,
                limit=tolerance,
            )
        )
    return gates


def _gate(difference: Difference | AverageDifference, task: str, method: str) -> Gate:
    status = gate_of(difference.ci95, difference.tolerance)
    return Gate(
        gate="baseline",
        task=task,
        method=method,
        tap=difference.tap,
        status=status,
        message=loss(difference, status),
        limit=difference.tolerance,
        score=difference.b,
        difference=difference.difference,
        ci95=difference.ci95,
    )


def loss(difference: Difference | AverageDifference, status: Literal["pass", "warn", "fail"]) -> str:
    """A gate's message on a difference: both scores, their distance, and what that means for the tolerance."""
    between = ", without an interval"
    if difference.ci95 is not None:
        low, high = difference.ci95
        between = f", 95 % between {signed(low)} and {signed(high)}"
    meaning = {
        "fail": f"worse by more than {difference.tolerance:g} for certain",
        "warn": f"too few test clips to tell whether it is worse by more than {difference.tolerance:g}",
        "pass": f"not worse by more than {difference.tolerance:g}",
    }[status]
    return f"{difference.a:.3f} -> {difference.b:.3f} ({signed(difference.difference)}{between}): {meaning}"
