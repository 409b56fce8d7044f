"""Two results of the same clips, clip by clip: how far apart their scores are, and how sure that is.

A difference is positive if B is better than A, also if the score is an error. Its interval comes from a paired bootstrap:
each resample of the clips serves both models, so that clips which are hard for both do not widen it; the spread between
seeds does. Of many tasks some differ by chance alone, so `better` and `worse` are only those that stay significant after
Benjamini and Hochberg's correction. McNemar's test (exact, two-sided) counts the clips that only one model has right.
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
from ..errors import DataError, DataMissingError, ScoreUndefinedError, UsageError, foreign
from ..metrics.bootstrap import Scorer, point, scored_alike
from ..metrics.intervals import Estimate, Scale, adjusted, average, detectable, estimates, interval, p_value
from ..scoring.protocol import Protocol
from ..scoring.scoring import Predictions, clips_of, generator, groups_of_clips, scorers_of
from .averages import weight_shares
from .record import GROUPS, SHOWN_GROUPS, Interval, Result, TaskResult, read_predictions, read_result
from .settings import METHODS, Method, family_of

TOLERANCE = 0.01
SIGNIFICANT = 0.05
_SAME_SCORE = 1e-9  # the same sums in the same order; a decimal text may cost the last digits
_ROUNDING = 1e-9  # shares of few clips often lie exactly at a tolerance, or at 0

Verdict = Literal["better", "worse", "same", "unclear"]
Identity = tuple[str, str, str | None]  # task, method, tap
Clips = Mapping[str, Sequence[str]]  # keys by fold


@dataclass(frozen=True)
class Side:
    """A result, its name in messages, and access to its predictions."""

    name: str
    result: Result
    predictions_of: Callable[[TaskResult], Predictions]

    @classmethod
    def read(cls, path: Path, name: str | None = None) -> Side:
        """A stored result, by default called by its file's name. Raises `UsageError` if the file is not a result."""
        return cls(name or path.name, read_result(path), lambda record: read_predictions(path, record))

    @classmethod
    def of_result(cls, name: str, result: Result) -> Side:
        """A result without its predictions."""

        def missing(record: TaskResult) -> Predictions:
            raise DataMissingError(f"{name} comes without predictions of {record.task}")

        return cls(name, result, missing)

    def scored(self) -> dict[Identity, TaskResult]:
        """The records that have a score."""
        return {identity(record): record for record in self.result.tasks if record.score is not None}


class McNemar(msgspec.Struct, frozen=True):
    """Clips that only A has right, clips that only B has right, and the probability of so uneven a split by chance."""

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
    """Positive if B is better."""
    ci95: Interval | None
    """95 % interval over test clips (or groups of them) within folds and, for heads with random draws, seeds."""
    p_adjusted: float
    """Corrected for the number of scores compared (Benjamini and Hochberg)."""
    detectable: float | None
    """The smallest true difference that these clips and seeds detect with a probability of 0.8."""
    alike: bool
    """Whether both models score every clip alike, with every seed."""
    per_seed: list[float]
    tolerance: float
    """Differences up to this count as the same: the tolerance, for an error times A's error."""
    verdict: Verdict
    mcnemar: McNemar | None
    """Of accuracies; a clip is right if more than half of its predictions are, over seeds and crops."""
    clips: int
    only_in_a: int
    """Clips left out because B has no prediction of them."""
    only_in_b: int

    @property
    def family(self) -> Method:
        return family_of(self.method)


class AverageDifference(msgspec.Struct, frozen=True, kw_only=True):
    """B against A in the weighted average over the tasks that both have a comparable score of."""

    group: str
    method: Method
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
    """`better` or `worse` for certain, by however little; `same` within the tolerance; `unclear` if too few clips can tell.

    Certain means that the interval excludes 0 and that `p_adjusted` is significant.
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
    """`fail` if the loss certainly exceeds the tolerance, `warn` if the clips cannot exclude that it does."""
    if ci95 is None:
        return "warn"
    low, high = (value + tolerance + _ROUNDING for value in ci95)
    return "fail" if high < 0 else "warn" if low < 0 else "pass"


def signed(value: float) -> str:
    """A difference of scores as text: +0.012. Zero is +0.000, from whichever side it was rounded."""
    return f"{round(value, 3) + 0.0:+.3f}"


def find_differences(a: Side, b: Side, tolerance: float = TOLERANCE) -> Differences:
    """Compare every score that both results have, and the averages over these scores.

    Args:
        a: The result to compare with.
        b: The result whose gains count as positive.
        tolerance: A smaller difference counts as the same; a fraction.

    Returns:
        Differences of tasks and averages, and the scores that only one result has.

    Raises:
        UsageError: The two were scored in different ways.
        DataError: They were scored on different data, or predictions are not those of their result.
        DataMissingError: Predictions are missing.
    """
    check_tolerance(tolerance)
    records_a, records_b = a.scored(), b.scored()
    common = [name for name in records_a if name in records_b]
    check_settings(a, b.name, b.result.settings, {method for _, method, _ in common})
    for name in common:
        check_alike(a, records_a[name], b.name, records_b[name].definition_digest, records_b[name].data_digest)
    pairs, unpaired = [], list(_unpaired(a, b))
    for name in common:
        record_a, record_b = records_a[name], records_b[name]
        try:
            pairs.append(_Pair(record_a, record_b, *_difference(a, record_a, b, record_b, tolerance)))
        except ScoreUndefinedError as error:
            unpaired.append(Unpaired(task=name[0], method=name[1], tap=name[2], reason=str(error)))
    return Differences(_corrected([pair.difference for pair in pairs]), _averages(pairs, tolerance), unpaired)


def _corrected(differences: Sequence[Difference]) -> list[Difference]:
    """Differences that were judged alone, judged again as many comparisons."""
    p_values = adjusted([difference.p_adjusted for difference in differences])
    return [
        msgspec.structs.replace(d, p_adjusted=p, verdict=verdict_of(d.ci95, d.tolerance, p))
        for d, p in zip(differences, p_values, strict=True)
    ]


def check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < 1:
        raise UsageError(f"--tolerance {tolerance:g} must be at least 0 and below 1: scores are fractions, a point is 0.01")


def check_settings(a: Side, name: str, settings: Mapping[str, Any], methods: Collection[str]) -> None:
    """Raise `UsageError` if the settings of the run `name` give its scores another meaning than those of `a`.

    `methods` are those that are compared (`linear`, `knn`, ...), since some settings concern only some methods. A key that
    `settings` lacks is not known yet, and passes.
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
        value = a.result.settings.get(key)
        other = settings.get(key, value)
        if value != other:
            readable = key in ("protocol", "limit", "seeds")
            contrast = (
                f"{option} {foreign(str(value))} and {name} with {foreign(str(other))}" if readable else f"another {option}"
            )
            raise UsageError(f"{a.name} was scored with {contrast}, so they cannot be compared; evaluate one of them again")


def check_alike(a: Side, record: TaskResult, name: str, definition: str | None, data: str | None) -> None:
    """Raise `UsageError` if `definition` is not the record's, `DataError` if `data` is not; None is not known yet."""
    if definition is not None and record.definition_digest != definition:
        raise UsageError(
            f"{foreign(record.task)} is defined differently in {a.name} and in {name} (its task file has changed); evaluate "
            "again"
        )
    if data is not None and record.data_digest != data:
        raise DataError(
            f"{a.name} was scored on other data of {foreign(record.task)} than {name}; evaluate one of them again"
        )


def check_heads_alike(a: Side, ours: TaskResult, name: str, theirs: TaskResult) -> None:
    """`UsageError` if one head's setting was chosen on the selection clips and the other's was not."""
    if (ours.tuning is None) != (theirs.tuning is None):
        older = a.name if ours.tuning is None else name
        raise UsageError(
            f"the head of {foreign(ours.task)} in {older} was trained by an earlier version, with settings that nothing "
            "chose, so the two scores cannot be compared; evaluate again"
        )


def verified(side: Side, record: TaskResult) -> tuple[Predictions, list[Scorer]]:
    """The predictions and scorers of a record. Raises `DataError` if they do not give the recorded score."""
    predictions = side.predictions_of(record)
    try:
        scorers = _scorers(side, record, predictions, None)
        score = float(point(scorers).mean())
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(
            f"the predictions of {foreign(record.task)} in {side.name} do not fit its metric, {foreign(record.metric)}: "
            f"{foreign(str(error))}"
        ) from error
    if record.score is None or not abs(score - record.score) <= _SAME_SCORE * max(1.0, abs(score)):
        raise DataError(
            f"{side.name} records {record.score} for {foreign(record.task)}, but its predictions give {score:.6g}: they are "
            "another run's; evaluate again"
        )
    return predictions, scorers


def paired(a: Side, record_a: TaskResult, b: Side, record_b: TaskResult) -> Estimate | None:
    """How much better B is, with its spread, on the clips that both have; None if these have no score."""
    try:
        return _difference(a, record_a, b, record_b, TOLERANCE)[1]
    except ScoreUndefinedError:
        return None


def _difference(
    a: Side, record_a: TaskResult, b: Side, record_b: TaskResult, tolerance: float
) -> tuple[Difference, Estimate]:
    """The difference of one score, judged alone, and its spread."""
    check_heads_alike(a, record_a, b.name, record_b)
    predictions_a, scorers_a = verified(a, record_a)
    predictions_b, scorers_b = verified(b, record_b)
    clips_a, clips_b = clips_of(predictions_a), clips_of(predictions_b)
    common = _common_clips(clips_a, clips_b)
    if common != clips_a:
        scorers_a = _scorers(a, record_a, predictions_a, common)
    if common != clips_b:
        scorers_b = _scorers(b, record_b, predictions_b, common)
    scores = np.stack([point(scorers_a), point(scorers_b)])  # (models, folds, seeds)
    if not np.isfinite(scores).all():
        raise ScoreUndefinedError(f"the {record_a.metric} of the clips that both have is not defined")
    groups = groups_of_clips(predictions_a, common) or groups_of_clips(predictions_b, common)
    scale: Scale = "share" if record_a.higher_is_better else "error"
    rng = generator(record_a.task, record_a.family)
    estimate_a, estimate_b = estimates([scorers_a, scorers_b], rng, groups, scale)
    mean_a, mean_b = (float(value) for value in scores.mean(axis=(1, 2)))
    if record_a.higher_is_better:
        sign, estimate, same_within = 1.0, estimate_b.minus(estimate_a), tolerance
    else:
        sign, estimate, same_within = -1.0, estimate_a.minus(estimate_b), tolerance * mean_a
    test = None
    if record_a.metric == "accuracy":
        test = mcnemar(right_clips(predictions_a, common), right_clips(predictions_b, common))
    ci95 = interval(estimate)
    clips = _count(common)
    difference = Difference(
        task=record_a.task,
        title=record_a.title,
        method=record_a.method,
        tap=record_a.tap,
        metric=record_a.metric,
        higher_is_better=record_a.higher_is_better,
        a=mean_a,
        b=mean_b,
        difference=sign * (mean_b - mean_a),
        ci95=ci95,
        p_adjusted=p_value(estimate),
        detectable=detectable(estimate),
        alike=scored_alike(scorers_a, scorers_b, rng),
        per_seed=[float(value) for value in sign * (scores[1] - scores[0]).mean(axis=0)],
        tolerance=same_within,
        verdict=verdict_of(ci95, same_within),
        mcnemar=test,
        clips=clips,
        only_in_a=_count(clips_a) - clips,
        only_in_b=_count(clips_b) - clips,
    )
    return difference, estimate


def _common_clips(a: Clips, b: Clips) -> dict[str, list[str]]:
    """Keys by fold of the clips that both sides have, in A's order. Raises `ScoreUndefinedError` if a fold has none."""
    keys_b = {fold: set(keys) for fold, keys in b.items()}
    common = {fold: [key for key in keys if key in keys_b.get(fold, ())] for fold, keys in a.items()}
    if a.keys() != b.keys() or not all(common.values()):
        raise ScoreUndefinedError("a fold has no clip that both have predictions of")
    return common


def _count(clips: Clips) -> int:
    return sum(len(keys) for keys in clips.values())


def right_clips(predictions: Predictions, clips: Clips) -> npt.NDArray[np.bool_]:
    """(clips,) whether most predictions of each clip are right, over its seeds and crops; `clips` fold after fold."""
    names = [(fold, key) for fold, keys in clips.items() for key in keys]
    places = {name: place for place, name in enumerate(names)}
    rows = zip(predictions["fold"].tolist(), predictions["key"].tolist(), strict=True)
    place_of_row = np.array([places.get(row, -1) for row in rows], np.int64)
    kept = place_of_row >= 0
    right = (predictions["target"] == predictions["prediction"])[kept]
    votes = np.bincount(place_of_row[kept], minlength=len(names))
    right_votes = np.bincount(place_of_row[kept], right, minlength=len(names))
    majority: npt.NDArray[np.bool_] = 2 * right_votes > votes
    return majority


def mcnemar(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> McNemar:
    """McNemar's exact test of the outcomes (clips,): by chance, each model has half of the clips that only one has right."""
    from scipy import stats  # half a second to import, needed only here

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return McNemar(only_a, only_b, float(p))


def _scorers(side: Side, record: TaskResult, predictions: Predictions, clips: Clips | None) -> list[Scorer]:
    protocol = Protocol(side.result.settings["protocol"])
    return scorers_of(predictions, record.metric, protocol, clips)  # type: ignore[arg-type]


def _unpaired(a: Side, b: Side) -> Iterator[Unpaired]:
    """The scores that only one result has, and why the other lacks them."""
    for side, other in ((a, b), (b, a)):
        others = {identity(record): record for record in other.result.tasks}
        for name in side.scored():
            match = others.get(name)
            if match is None or match.score is None:
                why = f"{match.status}: {match.reason}" if match else "it was not scored there"
                yield Unpaired(task=name[0], method=name[1], tap=name[2], reason=f"no score in {other.name}: {why}")


@dataclass(frozen=True)
class _Pair:
    """The records of one score in both results, and their difference with its spread."""

    a: TaskResult
    b: TaskResult
    difference: Difference
    estimate: Estimate


def _averages(pairs: Sequence[_Pair], tolerance: float) -> list[AverageDifference]:
    """The difference of every group's weighted average. Of groups with the same tasks only the first is listed.

    Tasks are independent, so an average's spread is that of the averages of their replicates.
    """
    averages: list[AverageDifference] = []
    listed: set[tuple[Any, ...]] = set()
    usable = [pair for pair in pairs if pair.a.weight is not None and pair.a.comparable and pair.b.comparable]
    for method in METHODS:
        of_method = [pair for pair in usable if pair.a.family == method]
        for tap in dict.fromkeys(pair.a.tap for pair in of_method):
            of_tap = [pair for pair in of_method if pair.a.tap == tap]
            for group in SHOWN_GROUPS:
                members = [pair for pair in of_tap if group in groups_of(pair.a.task)]
                tasks = [pair.a.task for pair in members]
                if len(members) < 2 or (method, tap, *tasks) in listed:
                    continue
                listed.add((method, tap, *tasks))
                averages.append(_average(group, method, tap, members, tolerance))
    return averages


def _average(group: str, method: Method, tap: str | None, pairs: Sequence[_Pair], tolerance: float) -> AverageDifference:
    shares = weight_shares([pair.a.weight for pair in pairs])
    a = float(shares @ [pair.difference.a for pair in pairs])
    b = float(shares @ [pair.difference.b for pair in pairs])
    estimate = average(shares, [pair.estimate for pair in pairs])
    ci95 = interval(estimate)
    return AverageDifference(
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
        tasks=[pair.a.task for pair in pairs],
    )


def groups_of(task: str) -> list[str]:
    """The groups whose average a task enters; for a user's own task only `own`."""
    shipped = shipped_tasks().get(task)
    return [group for group in GROUPS if (in_group(shipped, group) if shipped else group == "own")]
