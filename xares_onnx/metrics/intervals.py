"""How far a score, or a difference of two, may be off: the one place where replicates become an interval.

Two things vary: the test clips (or groups of clips: speakers, recordings), and the seeds of heads with random draws. The
first gives the variance of the bootstrap's replicates, the second the variance between the scores of the seeds. They are
added, with Satterthwaite's degrees of freedom, so that three seeds count for no more than they are.

The interval of a share is Wilson's (1927), for the number of clips that would give a plain share this variance: it covers
near 0 and 1, stays within them, and holds the score. For the accuracy of one seed and ungrouped clips it is Wilson's own; a
design effect of groups, as in Dean and Pagano (2015), enters by the variance. A share of ungrouped clips tells how much it
varies, as Wilson's interval supposes, so its quantile is the normal law's; what is measured (the effect of groups, seeds, a
difference, an error) has Student's. The interval of a difference is symmetric, and its variance has an exact lower bound:
3 / n if no clip tells the two models apart. The interval of an error is symmetric in its logarithm.
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
_UNSEEN = (3 / _NORMAL) ** 2  # half the interval is 3 / n if no clip of n tells two models apart (rule of three)
# Of the variance of a single clip, beside the measured variance. bench/coverage.py holds its goal from 0.09 to 0.1.
_PRIOR_WEIGHT = 0.1

Bounds = tuple[float, float]
Scale = Literal["share", "error", "difference"]


@dataclass(frozen=True)
class Estimate:
    """A score and its spread.

    Attributes:
        score: The score itself.
        replicates: (resamples,) scores of resampled clips, spread as the score itself is: n clips drawn from n vary too
            little by the factor (n - 1) / n, which is corrected.
        seeds: For each training with random draws, the deviations (seeds,) of the seeds' scores from their mean.
        clips: How many clips of equal weight tell as much; infinite for an error, which has no largest loss.
        freedom: Number of resampled clips or groups, less one per fold.
        scale: What the score is: a share, an error, or a difference.
        grouped: Whether groups were resampled.
    """

    score: float
    replicates: Array
    seeds: tuple[Array, ...]
    clips: float
    freedom: float
    scale: Scale
    grouped: bool = False

    def minus(self, other: Estimate) -> Estimate:
        """The difference from another model's score; both were estimated together, or with equal generators."""
        seeds: tuple[Array, ...] = (*self.seeds, *(-deviations for deviations in other.seeds))
        if [len(deviations) for deviations in self.seeds] == [len(deviations) for deviations in other.seeds]:
            seeds = tuple(a - b for a, b in zip(self.seeds, other.seeds, strict=True))
        return Estimate(
            self.score - other.score,
            self.replicates - other.replicates,
            seeds,
            min(self.clips, other.clips),
            min(self.freedom, other.freedom),
            "difference",
            self.grouped,
        )

    def variance(self) -> tuple[float, float] | None:
        """The variance over clips and seeds, and its degrees of freedom; None if most resamples have no score."""
        defined = self.replicates[np.isfinite(self.replicates)]
        if 2 * len(defined) < len(self.replicates):
            return None
        of_clips = float(defined.var())
        if self.scale == "difference":
            of_clips += _UNSEEN / self.clips**2
        parts = [(of_clips, math.inf if self.scale == "share" and not self.grouped else self.freedom)]
        parts += [(float(d @ d) / (len(d) * (len(d) - 1)), len(d) - 1.0) for d in self.seeds if len(d) > 1]
        total = math.fsum(variance for variance, _ in parts)
        inverse = math.fsum((variance / total) ** 2 / freedom for variance, freedom in parts) if total else 0.0
        return total, 1 / inverse if inverse else math.inf


def estimates(
    models: Sequence[Sequence[Scorer]],
    rng: np.random.Generator,
    groups: Sequence[Indices] | None = None,
    scale: Scale = "share",
    resamples: int = RESAMPLES,
) -> list[Estimate]:
    """Estimate the scores of several models on the same clips.

    Each resample serves all models, so that their differences are due to the models alone. A fold with a single clip or
    group counts as certain, since it cannot be resampled.

    Args:
        models: Each model's scorers by fold.
        rng: Source of the random draws.
        groups: For each fold, the group (clips,) of each clip; then groups are resampled instead of clips.
        scale: What the scores are: shares or errors.
        resamples: Number of replicates.

    Returns:
        One estimate per model.
    """
    clips = np.array([scorer.clips for scorer in models[0]], np.float64)
    units = clips if groups is None else np.array([len(np.unique(of_fold)) for of_fold in groups], np.float64)
    widening = np.sqrt((1 / np.maximum(units - 1, 1)).sum() / (1 / units).sum())
    equal = len(units) ** 2 / (1 / units).sum()
    of_models = []
    for scorers, replicates in zip(models, bootstrap_together(models, rng, groups, resamples), strict=True):
        per_seed = point(scorers).mean(axis=0)
        score = float(per_seed.mean())
        of_models.append(
            Estimate(
                score,
                score + widening * (replicates - score),
                (per_seed - score,) if len(per_seed) > 1 else (),
                math.inf if scale == "error" else float(equal),
                float(max(1.0, (units - 1).sum())),
                scale,
                groups is not None,
            )
        )
    return of_models


def average(shares: Sequence[float] | Array, scores: Sequence[Estimate]) -> Estimate:
    """The weighted average of independent scores, or of differences; `shares` (scores,) are the weights, with the sum 1."""
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
        any(score.grouped for score in scores),
    )


def interval(estimate: Estimate) -> Bounds | None:
    """The 95 % interval, which holds the score; None if most resamples have no score."""
    spread = estimate.variance()
    if spread is None or not math.isfinite(estimate.score):
        return None
    variance, freedom = spread
    score, reach = estimate.score, _quantile((1 + LEVEL) / 2, freedom)
    if estimate.scale == "difference":
        half = reach * math.sqrt(variance)
        most = 1.0 if math.isfinite(estimate.clips) else math.inf  # the largest difference of two shares
        return max(score - half, -most), min(score + half, most)
    if estimate.scale == "error":
        factor = math.exp(min(reach * math.sqrt(variance) / score, 700.0)) if score > 0 else 1.0
        return score / factor, score * factor
    return _wilson(min(max(score, 0.0), 1.0), variance, estimate.clips, reach)


def _wilson(score: float, variance: float, clips: float, reach: float) -> Bounds:
    """Wilson's interval for the number of clips that would give a share this variance.

    A few wrong clips determine the variance badly, and none not at all, so the prior variance of a single clip is mixed in.
    """
    number = (score * (1 - score) + _PRIOR_WEIGHT / clips) / (variance + _PRIOR_WEIGHT / clips**2)
    scaled = reach**2 / number
    centre = (score + scaled / 2) / (1 + scaled)
    half = reach / (1 + scaled) * math.sqrt(score * (1 - score) / number + scaled / number / 4)
    return max(0.0, min(centre - half, score)), min(1.0, max(centre + half, score))


def p_value(difference: Estimate) -> float:
    """The probability of so large a difference by chance; below 0.05 if the interval excludes 0."""
    spread = difference.variance()
    if spread is None:
        return 1.0
    variance, freedom = spread
    if variance == 0:
        return 1.0 if difference.score == 0 else 0.0
    return float(2 * special.stdtr(freedom, -abs(difference.score) / math.sqrt(variance)))


def detectable(difference: Estimate) -> float | None:
    """The smallest true difference that clips and seeds like these detect with a probability of 0.8."""
    spread = difference.variance()
    if spread is None:
        return None
    variance, freedom = spread
    return (_quantile((1 + LEVEL) / 2, freedom) + _quantile(POWER, freedom)) * math.sqrt(variance)


def adjusted(p_values: Sequence[float]) -> list[float]:
    """P-values after Benjamini and Hochberg (1995): of those up to 0.05, one in twenty is false on average."""
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
