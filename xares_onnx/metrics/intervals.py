"""How far a score, or a difference of two, may be off: the one place where replicates become an interval.

Three things vary: which test clips (or groups of clips: speakers, recordings) were drawn, and for heads that draw which
seeds. The first is the variance of the bootstrap's replicates, the second the variance between the seeds' scores. They are
added, with Satterthwaite's degrees of freedom, so that three seeds are taken for no more than they are.

A share's interval is Wilson's (1927), for the number of clips that would give a plain share that variance: it covers near 0
and 1, stays within them, and holds the score. For the accuracy of one seed and ungrouped clips this is Wilson's itself; a
design effect of groups, as in Dean and Pagano (2015), comes with the variance. A difference's interval is symmetric, and its
variance is never below that of an exact bound: where no clip tells two models apart, 3 / n. An error's is symmetric in its
logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from .bootstrap import LEVEL, RESAMPLES, Array, Indices, Scorer, bootstrap_together, point

POWER = 0.8
_NORMAL = float(special.ndtri((1 + LEVEL) / 2))
_UNSEEN = (3 / _NORMAL) ** 2  # half the interval is 3 / n where no clip of n tells two models apart (rule of three)
_LEARNT_SLOWLY = 0.06  # how much a variance of one clip per clip weighs beside the measured one: by bench/coverage.py

Bounds = tuple[float, float]
Scale = Literal["share", "error", "difference"]


@dataclass(frozen=True)
class Estimate:
    """A score with what is known of its spread.

    `replicates` (2000,) are those of resampled clips, spread as the score itself is: n clips drawn from n vary too little by
    (n - 1) / n. `seeds` holds for each training that drew the deviations (seeds,) from their mean. `clips` is how many
    clips of equal weight tell as much: infinite for an error, which has no largest loss. `freedom` counts what was
    resampled, less one per fold.
    """

    score: float
    replicates: Array
    seeds: tuple[Array, ...]
    clips: float
    freedom: float
    scale: Scale

    def minus(self, other: Estimate) -> Estimate:
        """The difference from another model's score, where both were estimated together (or with equal generators)."""
        seeds: tuple[Array, ...] = (*self.seeds, *(-deviations for deviations in other.seeds))
        if [len(mine) for mine in self.seeds] == [len(theirs) for theirs in other.seeds]:
            seeds = tuple(mine - theirs for mine, theirs in zip(self.seeds, other.seeds, strict=True))
        return Estimate(
            self.score - other.score,
            self.replicates - other.replicates,
            seeds,
            min(self.clips, other.clips),
            min(self.freedom, other.freedom),
            "difference",
        )

    @property
    def unvaried(self) -> bool:
        """Whether no resample and no seed changes it: of a difference, that both models score every clip alike."""
        return bool((self.replicates == self.score).all()) and not any(deviations.any() for deviations in self.seeds)

    def variance(self) -> tuple[float, float] | None:
        """The variance of clips and seeds together, and its degrees of freedom; None where most resamples have no score."""
        defined = self.replicates[np.isfinite(self.replicates)]
        if 2 * len(defined) < len(self.replicates):
            return None
        of_clips = float(defined.var())
        if self.scale == "difference":
            of_clips += _UNSEEN / self.clips**2
        parts = [(of_clips, self.freedom)]
        parts += [(float(d @ d) / (len(d) * (len(d) - 1)), len(d) - 1.0) for d in self.seeds if len(d) > 1]
        total = math.fsum(variance for variance, _ in parts)
        if total == 0:
            return 0.0, self.freedom
        return total, 1 / math.fsum((variance / total) ** 2 / freedom for variance, freedom in parts)


def estimates(
    models: Sequence[Sequence[Scorer]],
    rng: np.random.Generator,
    groups: Sequence[Indices] | None = None,
    scale: Scale = "share",
    resamples: int = RESAMPLES,
) -> list[Estimate]:
    """Several models' scores of the same clips: each resample serves all, so that their difference is of what they do.

    `models` holds each one's scorers by fold; `groups` (clips,) by fold the number of each clip's group, where groups are
    resampled in place of clips. Every fold has at least two of what is resampled, or its score is taken for certain.
    """
    clips = np.array([scorer.clips for scorer in models[0]], np.float64)
    units = clips if groups is None else np.array([len(np.unique(of_fold)) for of_fold in groups], np.float64)
    widening = np.sqrt((1 / np.maximum(units - 1, 1)).sum() / (1 / units).sum())
    equal = len(units) ** 2 / (1 / units).sum()
    made = []
    for scorers, replicates in zip(models, bootstrap_together(models, rng, groups, resamples), strict=True):
        per_seed = point(scorers).mean(axis=0)
        score = float(per_seed.mean())
        made.append(
            Estimate(
                score,
                score + widening * (replicates - score),
                (per_seed - score,) if len(per_seed) > 1 else (),
                math.inf if scale == "error" else float(equal),
                float(max(1.0, (units - 1).sum())),
                scale,
            )
        )
    return made


def average(shares: Sequence[float] | Array, scores: Sequence[Estimate]) -> Estimate:
    """The weighted average of independent scores, or of differences. A share counts as its task weighs."""
    weights = np.asarray(shares, np.float64)
    inverse = math.fsum(w**2 / score.clips for w, score in zip(weights, scores, strict=True))
    scales = {score.scale for score in scores}
    return Estimate(
        float(weights @ [score.score for score in scores]),
        weights @ np.stack([score.replicates for score in scores]),
        tuple(w * deviations for w, score in zip(weights, scores, strict=True) for deviations in score.seeds),
        1 / inverse if inverse else math.inf,
        math.fsum(score.freedom for score in scores),
        scales.pop() if len(scales) == 1 else "difference",
    )


def interval(estimate: Estimate) -> Bounds | None:
    """The 95 % interval, which holds the score; None where most resamples have none."""
    spread = estimate.variance()
    if spread is None or not math.isfinite(estimate.score):
        return None
    variance, freedom = spread
    score, reach = estimate.score, _quantile((1 + LEVEL) / 2, freedom)
    if estimate.scale == "difference":
        half = reach * math.sqrt(variance)
        most = 1.0 if math.isfinite(estimate.clips) else math.inf  # between two shares
        return max(score - half, -most), min(score + half, most)
    if estimate.scale == "error":
        factor = math.exp(min(reach * math.sqrt(variance) / score, 700.0)) if score > 0 else 1.0
        return score / factor, score * factor
    return _wilson(min(max(score, 0.0), 1.0), variance, estimate.clips, reach)


def _wilson(score: float, variance: float, clips: float, reach: float) -> Bounds:
    """Wilson's interval for the number of clips that would give a share this variance.

    Few wrong clips tell their variance badly, and none not at all: beside what was measured stands that of one clip a clip.
    """
    number = (score * (1 - score) + _LEARNT_SLOWLY / clips) / (variance + _LEARNT_SLOWLY / clips**2)
    scaled = reach**2 / number
    centre = (score + scaled / 2) / (1 + scaled)
    half = reach / (1 + scaled) * math.sqrt(score * (1 - score) / number + scaled / number / 4)
    return max(0.0, min(centre - half, score)), min(1.0, max(centre + half, score))


def p_value(difference: Estimate) -> float:
    """How likely a difference as large would be if there were none: below 0.05 where the interval excludes 0."""
    spread = difference.variance()
    if spread is None:
        return 1.0
    variance, freedom = spread
    if variance == 0:
        return 1.0 if difference.score == 0 else 0.0
    return float(2 * special.stdtr(freedom, -abs(difference.score) / math.sqrt(variance)))


def detectable(difference: Estimate) -> float | None:
    """The smallest true difference that clips and seeds like these find for certain in four cases of five."""
    spread = difference.variance()
    if spread is None:
        return None
    variance, freedom = spread
    return (_quantile((1 + LEVEL) / 2, freedom) + _quantile(POWER, freedom)) * math.sqrt(variance)


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's (1995): of those that are at most 0.05, one in twenty is false in the mean."""
    p = np.asarray(p_values, np.float64)
    if not len(p):
        return []
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    result = np.empty(len(p))
    result[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return [float(value) for value in result]


def _quantile(share: float, freedom: float) -> float:
    return float(special.stdtrit(freedom, share))
