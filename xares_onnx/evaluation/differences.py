"""Two results of the same clips, clip by clip: how far apart their scores are, and how sure that is.

A difference is always in the direction of better: positive where B is better than A, also where the score is an error. Its
interval is of a paired bootstrap: each resample of the clips serves both models, so that what both find hard does not
widen it; the spread between seeds does. Of many tasks some differ by chance alone: `better` and `worse` are said of those
that Benjamini and Hochberg's correction leaves. McNemar's test (exact, two-sided) asks the clips of which one model alone is
right.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from ..data.catalog import in_group, shipped_tasks
from ..errors import DataError, DataMissingError, ScoreUndefinedError, UsageError
from ..metrics.bootstrap import Scorer, point
from ..metrics.intervals import Estimate, Scale, adjusted, average, detectable, estimates, interval, p_value
from ..scoring.protocol import Protocol
from ..scoring.scoring import Predictions, clips_of, generator, groups_of_clips, scorers_of
from .record import GROUPS, SHOWN_GROUPS, Interval, Result, TaskResult, read_predictions, read_result

TOLERANCE = 0.01
SIGNIFICANT = 0.05
_SAME_SCORE = 1e-9  # sums of one order, and at most the last digits of a decimal text
_ROUNDING = 1e-9  # shares of few clips often lie exactly at a tolerance, or at 0

Verdict = Literal["better", "worse", "same", "unclear"]
Identity = tuple[str, str, str | None]  # task, method, tap
Clips = Mapping[str, Sequence[str]]  # keys by fold


@dataclass(frozen=True)
class Side:
    """A result, what to call it, and the door to its predictions."""

    name: str
    result: Result
    predictions_of: Callable[[TaskResult], Predictions]

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> Side:
        """A stored result, called by its file's name. Raises `UsageError` where it is none."""
        return cls(name or path.name, read_result(path), lambda record: read_predictions(path, record))

    @classmethod
    def of_result(cls, name: str, result: Result) -> Side:
        """A result alone, without its predictions."""

        def none(record: TaskResult) -> Predictions:
            raise DataMissingError(f"{name} comes without predictions of {record.task}")

        return cls(name, result, none)

    def scored(self) -> dict[Identity, TaskResult]:
        """The records that have a score."""
        return {identity(record): record for record in self.result.tasks if record.score is not None}


class McNemar(msgspec.Struct, frozen=True):
    """Clips of which A alone is right, of which B alone is, and how likely so uneven a split is where both are as good."""

    only_a: int
    only_b: int
    p: float


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """B against A in one task by one method, on the clips that both have."""

    task: str
    title: str
    method: str
    tap: str | None
    metric: str
    higher_is_better: bool
    a: float
    b: float
    difference: float
    """Positive where B is better."""
    ci95: Interval | None
    """Over test clips (or groups of them) within folds and, for heads that draw, seeds. Of this score alone."""
    p_adjusted: float
    """Corrected for all scores that are compared (Benjamini and Hochberg)."""
    detectable: float | None
    """The smallest true difference that these clips and seeds would find for certain in four cases of five."""
    alike: bool
    """Whether both models score every clip alike."""
    per_seed: list[float]
    tolerance: float
    """What counts as the same: as given, or where the score is an error that share of A's."""
    verdict: Verdict
    mcnemar: McNemar | None
    """Where each clip is of one class; a clip is right where more than half of its predictions are, over seeds and crops."""
    clips: int
    only_in_a: int
    """Clips that were left out, because B has no prediction of them."""
    only_in_b: int


class AverageDifference(msgspec.Struct, frozen=True, kw_only=True):
    """B against A in a weighted average over the tasks that both have a comparable score of."""

    group: str
    method: Literal["head", "knn"]
    tap: str | None
    a: float
    b: float
    difference: float
    ci95: Interval | None
    detectable: float | None
    tolerance: float
    verdict: Verdict
    tasks: list[str]


class Unpaired(msgspec.Struct, frozen=True, kw_only=True):
    task: str
    method: str
    tap: str | None
    reason: str


@dataclass(frozen=True)
class Differences:
    tasks: list[Difference]
    averages: list[AverageDifference]
    unpaired: list[Unpaired]


def identity(record: TaskResult) -> Identity:
    return record.task, record.method, record.tap


def verdict_of(ci95: Interval | None, tolerance: float, p_adjusted: float = 0.0) -> Verdict:
    """`better` and `worse` for certain, by however little; `same` within the tolerance; `unclear`: too few clips to tell.

    A difference that may be chance among those of many tasks, by `p_adjusted`, is not certain.
    """
    if ci95 is None:
        return "unclear"
    low, high = ci95
    if p_adjusted <= SIGNIFICANT:
        if low > _ROUNDING:
            return "better"
        if high < -_ROUNDING:
            return "worse"
    return "same" if max(-low, high) <= tolerance + _ROUNDING else "unclear"


def gate_of(ci95: Interval | None, tolerance: float) -> Literal["pass", "warn", "fail"]:
    """`fail` where the loss is for certain larger than the tolerance, `warn` where the clips cannot exclude that it is."""
    if ci95 is None:
        return "warn"
    low, high = (value + tolerance + _ROUNDING for value in ci95)
    return "fail" if high < 0 else "warn" if low < 0 else "pass"


def signed(value: float) -> str:
    """A difference of scores: +0.012; nothing is +0.000, from whichever side it was rounded."""
    return f"{round(value, 3) + 0.0:+.3f}"


def find_differences(a: Side, b: Side, tolerance: float = TOLERANCE) -> Differences:
    """Every score that both results have, and the averages over them.

    Raises `UsageError` where they were scored in different ways, `DataError` where on different data, or where predictions
    are not those of their result, `DataMissingError` where they are not there.
    """
    check_tolerance(tolerance)
    ours, theirs = a.scored(), b.scored()
    common = [name for name in ours if name in theirs]
    check_settings(a, b.name, b.result.settings, {method for _, method, _ in common})
    for name in common:
        check_alike(a, ours[name], b.name, theirs[name].definition_digest, theirs[name].data_digest)
    drawn, unpaired = [], list(_unpaired(a, b))
    for name in common:
        try:
            difference, estimate = _difference(a, ours[name], b, theirs[name], tolerance)
        except ScoreUndefinedError as error:
            unpaired.append(Unpaired(task=name[0], method=name[1], tap=name[2], reason=str(error)))
            continue
        drawn.append((ours[name], theirs[name], difference, estimate))
    return Differences(_corrected([row[2] for row in drawn]), _averages(drawn, tolerance), unpaired)


def _corrected(alone: Sequence[Difference]) -> list[Difference]:
    """The differences of which each was judged alone, judged as one of many."""
    corrected = zip(alone, adjusted([difference.p_adjusted for difference in alone]), strict=True)
    return [msgspec.structs.replace(d, p_adjusted=p, verdict=verdict_of(d.ci95, d.tolerance, p)) for d, p in corrected]


def check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < 1:
        raise UsageError(f"--tolerance {tolerance:g} must be at least 0 and below 1: scores are fractions, a point is 0.01")


def check_settings(a: Side, name: str, settings: Mapping[str, Any], methods: Collection[str]) -> None:
    """`UsageError` where another run's settings make its scores by these methods (`linear`, `knn`, ...) mean something else.

    A setting that is not among them is not known yet.
    """
    compared = {"protocol": "--protocol", "limit": "--limit"}
    drawn_from_nothing = {"knn", "linear"} if a.result.settings.get("protocol") == "corrected" else {"knn"}
    if set(methods) - drawn_from_nothing:
        compared["seeds"] = "--seeds"
    if "retrieval" in methods:
        compared["vocabulary"] = "--vocabulary"
    if "llm" in methods:
        compared["lm"] = "--lm"
    for key, option in compared.items():
        mine, other = a.result.settings.get(key), settings.get(key, a.result.settings.get(key))
        if mine != other:
            what = (
                f"{option} {mine} and {name} with {other}" if key in ("protocol", "limit", "seeds") else f"another {option}"
            )
            raise UsageError(f"{a.name} was scored with {what}, so they cannot be compared; evaluate one of them again")


def check_alike(a: Side, record: TaskResult, name: str, definition: str | None, data: str | None) -> None:
    """`UsageError` for another definition of the task, `DataError` for other data; None is not known yet."""
    if definition is not None and record.definition_digest != definition:
        raise UsageError(
            f"{record.task} is defined otherwise in {a.name} than in {name} (its task file has changed); evaluate again"
        )
    if data is not None and record.data_digest != data:
        raise DataError(f"{a.name} was scored on other data of {record.task} than {name}; evaluate one of them again")


def check_heads_alike(a: Side, ours: TaskResult, name: str, theirs: TaskResult) -> None:
    """`UsageError` if one head's setting was chosen on the selection clips and the other's was not."""
    if (ours.tuning is None) != (theirs.tuning is None):
        older = a.name if ours.tuning is None else name
        raise UsageError(
            f"the head of {ours.task} in {older} was trained by an earlier version, with settings that nothing chose, so "
            "the two scores cannot be compared; evaluate again"
        )


def verified(side: Side, record: TaskResult) -> tuple[Predictions, list[Scorer]]:
    """The predictions and scorers of a record; `DataError` where they do not give the score that is recorded."""
    predictions = side.predictions_of(record)
    try:
        scorers = _scorers(side, record, predictions, None)
        score = float(point(scorers).mean())
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(
            f"the predictions of {record.task} in {side.name} do not fit its metric, {record.metric}: {error}"
        ) from error
    if record.score is None or not abs(score - record.score) <= _SAME_SCORE * max(1.0, abs(score)):
        raise DataError(
            f"{side.name} says {record.score} of {record.task}, and its predictions give {score:.6g}: another run's"
        )
    return predictions, scorers


def paired(a: Side, ours: TaskResult, b: Side, theirs: TaskResult) -> Estimate | None:
    """How much better B is, with its spread, on the clips that both have; None where that has no score."""
    try:
        return _difference(a, ours, b, theirs, TOLERANCE)[1]
    except ScoreUndefinedError:
        return None


def _difference(a: Side, ours: TaskResult, b: Side, theirs: TaskResult, tolerance: float) -> tuple[Difference, Estimate]:
    """Judged alone; also with its spread."""
    check_heads_alike(a, ours, b.name, theirs)
    (mine, scorers_a), (other, scorers_b) = verified(a, ours), verified(b, theirs)
    clips_a, clips_b = clips_of(mine), clips_of(other)
    common = {fold: [key for key in keys if key in set_b] for fold, keys, set_b in _by_fold(clips_a, clips_b)}
    if clips_a.keys() != clips_b.keys() or not all(common.values()):
        raise ScoreUndefinedError("a fold has no clip that both have predictions of")
    clips, only_a, only_b = (sum(map(len, of.values())) for of in (common, clips_a, clips_b))
    if common != clips_a:
        scorers_a = _scorers(a, ours, mine, common)
    if common != clips_b:
        scorers_b = _scorers(b, theirs, other, common)
    scores = np.stack([point(scorers_a), point(scorers_b)])  # (models, folds, seeds)
    if not np.isfinite(scores).all():
        raise ScoreUndefinedError(f"the {ours.metric} of the clips that both have is not defined")
    sign = 1.0 if ours.higher_is_better else -1.0
    method = "knn" if ours.method == "knn" else "head"
    groups = groups_of_clips(mine, common) or groups_of_clips(other, common)
    scale: Scale = "share" if ours.higher_is_better else "error"
    estimate_a, estimate_b = estimates([scorers_a, scorers_b], generator(ours.task, method), groups, scale)
    estimate = estimate_b.minus(estimate_a) if ours.higher_is_better else estimate_a.minus(estimate_b)
    mean_a, mean_b = (float(value) for value in scores.mean(axis=(1, 2)))
    per_seed = sign * (scores[1] - scores[0]).mean(axis=0)
    same_within = tolerance if ours.higher_is_better else tolerance * mean_a
    ci95 = interval(estimate)
    difference = Difference(
        task=ours.task,
        title=ours.title,
        method=ours.method,
        tap=ours.tap,
        metric=ours.metric,
        higher_is_better=ours.higher_is_better,
        a=mean_a,
        b=mean_b,
        difference=sign * (mean_b - mean_a),
        ci95=ci95,
        p_adjusted=p_value(estimate),
        detectable=detectable(estimate),
        alike=estimate.unvaried,
        per_seed=[float(value) for value in per_seed],
        tolerance=same_within,
        verdict=verdict_of(ci95, same_within),
        mcnemar=mcnemar(right_clips(mine, common), right_clips(other, common)) if ours.metric == "accuracy" else None,
        clips=clips,
        only_in_a=only_a - clips,
        only_in_b=only_b - clips,
    )
    return difference, estimate


def right_clips(predictions: Predictions, clips: Clips) -> npt.NDArray[np.bool_]:
    """(clips,) whether more than half of what was predicted of a clip is right, over seeds and crops, folds in turn."""
    places = {name: place for place, name in enumerate((fold, key) for fold, keys in clips.items() for key in keys)}
    rows = zip(predictions["fold"].tolist(), predictions["key"].tolist(), strict=True)
    place = np.array([places.get(row, -1) for row in rows], np.int64)
    kept = place >= 0
    right = (predictions["target"] == predictions["prediction"])[kept]
    votes = np.bincount(place[kept], minlength=len(places))
    found: npt.NDArray[np.bool_] = 2 * np.bincount(place[kept], right, minlength=len(places)) > votes
    return found


def mcnemar(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> McNemar:
    """McNemar's exact test of (clips,) outcomes: of the clips that one alone has right, each has half."""
    from scipy import stats  # half a second, which most runs need not spend

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return McNemar(only_a, only_b, float(p))


def _scorers(side: Side, record: TaskResult, predictions: Predictions, clips: Clips | None) -> list[Scorer]:
    protocol = Protocol(side.result.settings["protocol"])
    return scorers_of(predictions, record.metric, protocol, clips)  # type: ignore[arg-type]


def _by_fold(a: Clips, b: Clips) -> Iterator[tuple[str, Sequence[str], set[str]]]:
    for fold, keys in a.items():
        yield fold, keys, set(b.get(fold, ()))


def _unpaired(a: Side, b: Side) -> Iterator[Unpaired]:
    """What one result alone has a score of, and why, where that is known."""
    for side, other in ((a, b), (b, a)):
        there = {identity(record): record for record in other.result.tasks}
        for name in side.scored():
            match = there.get(name)
            if match is None or match.score is None:
                why = f"{match.status}: {match.reason}" if match else "it was not scored there"
                yield Unpaired(task=name[0], method=name[1], tap=name[2], reason=f"no score in {other.name}: {why}")


_Drawn = Sequence[tuple[TaskResult, TaskResult, Difference, Estimate]]


def _averages(drawn: _Drawn, tolerance: float) -> list[AverageDifference]:
    """Tasks are independent: an average's spread is that of averages of theirs. Groups of the same tasks are told once."""
    found: list[AverageDifference] = []
    told: set[tuple[Any, ...]] = set()
    usable = [row for row in drawn if row[0].weight is not None and row[0].comparable and row[1].comparable]
    for method in ("head", "knn"):
        of_method = [row for row in usable if (row[0].method == "knn") == (method == "knn")]
        for tap in dict.fromkeys(row[0].tap for row in of_method):
            for group in SHOWN_GROUPS:
                rows = [row for row in of_method if row[0].tap == tap and group in groups_of(row[0].task)]
                tasks = [row[0].task for row in rows]
                if len(rows) < 2 or (method, tap, *tasks) in told:
                    continue
                told.add((method, tap, *tasks))
                weights = np.array([row[0].weight for row in rows], np.float64)
                share = weights / weights.sum() if weights.any() else np.full(len(rows), 1 / len(rows))
                a, b = (float(share @ [getattr(row[2], side) for row in rows]) for side in ("a", "b"))
                estimate = average(share, [row[3] for row in rows])
                ci95 = interval(estimate)
                found.append(
                    AverageDifference(
                        group=group,
                        method=method,
                        tap=tap,
                        a=a,
                        b=b,
                        difference=b - a,
                        ci95=ci95,
                        detectable=detectable(estimate),
                        tolerance=tolerance,
                        verdict=verdict_of(ci95, tolerance),
                        tasks=tasks,
                    )
                )
    return found


def groups_of(task: str) -> list[str]:
    """The averages that a task is in; `own` alone for a user's."""
    shipped = shipped_tasks().get(task)
    return [group for group in GROUPS if (in_group(shipped, group) if shipped else group == "own")]
