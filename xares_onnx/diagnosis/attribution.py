"""How many points a group of operators costs: B with the group as in A, scored by the paired heads of `compare`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..encoder.contract.declarations import CONFIG, PREPROCESSOR_CONFIG
from ..encoder.encoder import Encoder, open_encoder
from ..encoder.spec import ModelOptions
from ..encoder.speed import measure_together
from ..errors import DataError, XaresError
from ..evaluation.differences import Side, paired
from ..evaluation.evaluation import evaluate_with
from ..evaluation.gates import Gates
from ..evaluation.settings import Settings
from ..metrics.intervals import average, interval
from ..progress import Event, Note, Observer, Progress
from .figures import Measurement
from .findings import Points, Regained
from .groups import Group, Trial, Trials, try_groups, write_group
from .process import Process

LEAST_BYTES = 1_000  # more than a group is taken to cost, so that what costs nothing is not infinitely cheap


@dataclass(frozen=True)
class Judge:
    """Scores models of one pair on the same tasks.

    `where` holds suite, data and cache, as for `evaluate`; `folder` takes the files that are tried.
    """

    a: Encoder
    b: Encoder
    process: Process
    options: ModelOptions
    settings: Settings
    tasks: Sequence[str]
    where: dict[str, Any]
    folder: Path
    measurement: Measurement
    waveforms: list[npt.NDArray[np.float32]]
    observer: Observer
    scored: dict[tuple[int, ...], tuple[Path, Side]] = field(default_factory=dict)
    """Files and scores of the groups so far."""

    def try_groups(self, groups: list[Group]) -> list[Trial]:
        """How near the embeddings come to A's with each group in float."""
        infos, threads, trust = (self.a.info, self.b.info), self.a.spec.threads, self.options.trust
        arguments = (infos, threads, trust, self.measurement, groups, self.waveforms)
        return self.process.call(try_groups, *arguments, returns=Trials).trials

    def side(self, path: Path, name: str) -> Side:
        """Score a model. Raises its first error if it has no score at all."""
        evaluation = evaluate_with(
            self.options, self.settings, Gates(), path, self.tasks, **self.where, observer=_named(name, self.observer)
        )
        side = evaluation.side(name)
        if not side.scored():
            raise evaluation.errors[0] if evaluation.errors else DataError(f"{name} has no score of these tasks")
        return side

    def with_float(self, steps: tuple[int, ...], name: str) -> tuple[Path, Side]:
        """B with some operators as in A: the file, and its scores."""
        if steps not in self.scored:
            path = self._write(steps)
            self.scored[steps] = path, self.side(path, name)
        return self.scored[steps]

    def _write(self, steps: tuple[int, ...]) -> Path:
        """B with some operators as in A, beside copies of what B's file has beside it."""
        source = Path(self.b.info.path)
        folder = self.folder / str(len(self.scored))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / source.name
        for beside in (source.with_suffix(".toml"), source.parent / CONFIG, source.parent / PREPROCESSOR_CONFIG):
            if beside.is_file():
                shutil.copyfile(beside, folder / beside.name)
        infos = (self.a.info, self.b.info)
        self.process.call(
            write_group,
            infos,
            self.a.spec.threads,
            self.options.trust,
            self.measurement,
            steps,
            str(path.absolute()),
            returns=int,
        )
        return path

    def time_ratio(self, path: Path) -> float | None:
        """Time per second of audio over B's; None if it cannot be measured."""
        try:
            with open_encoder(path, self.options, cache=self.where["cache"], observer=_quiet(self.observer)) as encoder:
                return 1 / measure_together(self.b, encoder, _quiet(self.observer)).ratio
        except XaresError as error:
            self.observer(Note(f"time could not be measured: {error}"))
            return None

    def regained(self, tried: Trials, side_b: Side, most: int) -> list[Regained]:
        """Score `most` groups, those that bring the output nearest to A's for their bytes; most points per byte first."""
        chosen = _chosen(tried, most)
        results = []
        for trial in tried.trials:
            points, ratio = None, None
            if trial.group in chosen:
                try:
                    path, side = self.with_float(trial.group.steps, trial.group.title)
                    points = points_of(side_b, side)
                    ratio = self.time_ratio(path)
                except XaresError as error:
                    self.observer(Note(f"{trial.group.title} in float could not be scored: {error}"))
            results.append(self._regained(trial, points, ratio))
        return sorted(results, key=_order)

    def _regained(self, trial: Trial, points: Points | None, ratio: float | None) -> Regained:
        steps = self.measurement.steps
        return Regained(
            title=trial.group.title,
            operators=[steps[number].name for number in trial.group.steps],
            noise=trial.noise,
            more_bytes=trial.more_bytes,
            points=points,
            time_ratio=ratio,
            steps=list(trial.group.steps),
        )


def _chosen(tried: Trials, most: int) -> list[Group]:
    """The groups to score, by turns those that regain the most for their bytes and those that come nearest to A."""
    trials = tried.trials
    everything = max((len(trial.group.steps) for trial in trials), default=0)
    usable = [trial for trial in trials if trial.noise is not None and len(trial.group.steps) < everything]

    def cheapness(trial: Trial) -> float:
        return max(0.0, tried.noise - (trial.noise or 0.0)) / max(trial.more_bytes or 0, LEAST_BYTES)

    cheapest = sorted(usable, key=lambda trial: -cheapness(trial))
    nearest = sorted(usable, key=lambda trial: trial.noise or 0.0)
    by_turns = [trial.group for pair in zip(cheapest, nearest, strict=True) for trial in pair]
    return list(dict.fromkeys(by_turns or [trial.group for trial in trials]))[:most]


def points_of(a: Side, b: Side) -> Points:
    """How much better `b` scores than `a`, on average over the scores that both have.

    Raises:
        DataError: They have none in common.
    """
    records_a, records_b = a.scored(), b.scored()
    gains = {}
    for key in records_a:
        if key in records_b and (estimate := paired(a, records_a[key], b, records_b[key])) is not None:
            gains[key] = estimate
    if not gains:
        raise DataError(f"{a.name} and {b.name} have no score in common")
    mean = average([1 / len(gains)] * len(gains), list(gains.values()))
    ci95 = interval(mean)
    return Points(
        points=100 * mean.score,
        ci95=None if ci95 is None else (100 * ci95[0], 100 * ci95[1]),
        by_task={f"{task} {method}": 100 * estimate.score for (task, method, _), estimate in gains.items()},
    )


def per_byte(entry: Regained) -> float:
    """Points per megabyte; what adds nothing counts as a kilobyte."""
    return (entry.points.points if entry.points else 0.0) / max(entry.more_bytes or 0, LEAST_BYTES) * 1e6


def _order(entry: Regained) -> tuple[bool, float, float]:
    return entry.points is None, -per_byte(entry), entry.noise if entry.noise is not None else float("inf")


def _named(name: str, observer: Observer) -> Observer:
    """An observer that says which of the tried models an event is of, and repeats none of their notes."""

    def observe(event: Event) -> None:
        match event:
            case Progress(stage, task, done, total) if stage in ("embed", "train"):
                observer(Progress(stage, f"{task} of {name}", done, total))
            case Note():
                pass
            case _:
                observer(event)

    return observe


def _quiet(observer: Observer) -> Observer:
    return lambda event: None if isinstance(event, Note) else observer(event)
