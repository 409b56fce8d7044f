"""How a head's one free setting was chosen: the values tried, the value chosen, and whether the fit converged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import msgspec

Setting = Literal["L2 strength", "learning rate"]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_ROUNDING = 1e-6


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One value of the setting, with the score of its head on the selection clips and on the test clips."""

    setting: float
    selection: float | None
    """Null without selection clips, or if they give no score. Higher is better."""
    test: float | None
    """Of the head that selection saw, before any refit. Higher is better."""


class Convergence(msgspec.Struct, frozen=True, kw_only=True):
    """How the fit ended that gave the predictions."""

    iterations: int
    """Iterations of the solver, or the epoch that was kept."""
    limit_reached: bool
    """Whether it ended because it had no iterations or epochs left; of a convex head, this fit or a trial's."""
    relative_gradient_norm: float | None = None
    """Null for a head that is not fitted to an optimum."""


class Tuning(msgspec.Struct, frozen=True, kw_only=True):
    """Of one head (a fold and seed), or of a task: means over its heads, and every head's choice."""

    setting: Setting
    tried: list[Trial]
    chosen: list[float]
    """One value per head, folds first, then seeds."""
    convergence: Convergence
    train: float | None
    """Score on the rows that the last fit saw."""
    thresholds: list[float] | None = None
    """Probability from which on an event is active, one per head; null for other kinds of task."""
    mix: dict[str, list[Share]] | None = None
    """Of a head on a mix of layers, the weight of each layer in the sum, one per head; those of a head sum to 1."""

    def __post_init__(self) -> None:
        if self.mix is None:
            return
        if not self.mix or any(len(shares) != len(self.chosen) for shares in self.mix.values()):
            raise ValueError("mix must have a weight per layer and head")
        if any(abs(sum(of_head) - 1) > _ROUNDING for of_head in zip(*self.mix.values(), strict=True)):
            raise ValueError("the weights of a mix must sum to 1")


def remarks(tuning: Tuning) -> list[str]:
    """Notes for a reader of the score: a fit that did not converge, a choice at the end of the grid.

    If inner settings score as high as an end, the loss alone chose it, as when every selection clip is right: that needs no
    note.
    """
    notes = []
    if tuning.convergence.limit_reached:
        norm = tuning.convergence.relative_gradient_norm
        notes.append(
            "a head had no epochs left while its selection score still rose, so longer training may give another score"
            if norm is None
            else f"a fit stopped before it had converged (relative gradient norm {norm:.1g} at the end), so the score is "
            "that of its last iteration"
        )
    inner = max((trial.selection for trial in tuning.tried[1:-1] if trial.selection is not None), default=-math.inf)
    ends = [
        trial.setting
        for trial in (tuning.tried[0], tuning.tried[-1])
        if trial.selection is not None and trial.selection > inner
    ]
    if at_end := [value for value in tuning.chosen if value in ends]:
        values = " and ".join(f"{value:g}" for value in sorted(set(at_end)))
        notes.append(
            f"{values}, at the end of the grid, is the {tuning.setting} that {len(at_end)} of {len(tuning.chosen)} heads "
            "chose, so a better one may lie beyond it"
        )
    return notes


def pooled(heads: Sequence[Tuning]) -> Tuning:
    """Pool the tunings of a task's heads, which all tried the same settings.

    Scores are means over the heads that have one; the convergence is that of the worst head.
    """
    first = heads[0]
    return Tuning(
        setting=first.setting,
        tried=[
            Trial(
                setting=trial.setting,
                selection=_mean(head.tried[number].selection for head in heads),
                test=_mean(head.tried[number].test for head in heads),
            )
            for number, trial in enumerate(first.tried)
        ],
        chosen=[value for head in heads for value in head.chosen],
        convergence=Convergence(
            iterations=max(head.convergence.iterations for head in heads),
            limit_reached=any(head.convergence.limit_reached for head in heads),
            relative_gradient_norm=max(
                (
                    head.convergence.relative_gradient_norm
                    for head in heads
                    if head.convergence.relative_gradient_norm is not None
                ),
                default=None,
            ),
        ),
        train=_mean(head.train for head in heads),
        thresholds=[value for head in heads for value in head.thresholds or []] or None,
        mix={layer: [share for head in heads for share in (head.mix or {})[layer]] for layer in first.mix}
        if first.mix
        else None,
    )


def finite_or_none(score: float) -> float | None:
    """A score as a record has it: None if it is not defined."""
    return float(score) if math.isfinite(score) else None


def _mean(scores: Iterable[float | None]) -> float | None:
    known = [score for score in scores if score is not None and math.isfinite(score)]
    return sum(known) / len(known) if known else None
