"""How often the 95 % interval of a score holds the truth, and how often two runs of one model are told apart.

    python bench/coverage.py            # all
    python bench/coverage.py --quick    # fewer data sets, none of 1,000 clips

Data sets are drawn from a law whose score is known, each is scored by the scorers that an evaluation uses, and its interval
made by `intervals`. The truth is the mean score of test sets of this size: F1 and average precision give another score of
few clips than of many. Beside it stands the percentile interval of the same replicates, which was used before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from scipy import stats

from xares_onnx.data.task import Metric
from xares_onnx.metrics.bootstrap import Indices, Scorer, point
from xares_onnx.metrics.intervals import estimates, interval
from xares_onnx.scoring.kinds import Kept, kind_scored_by
from xares_onnx.scoring.protocol import Protocol

PROTOCOL = Protocol("corrected")
RESAMPLES = 400
CLASSES, SEGMENTS, CAPTIONS = 5, 10, 5
Rng = np.random.Generator
Drawn = dict[str, np.ndarray]


def accuracy(rng: Rng, n: int, p: float) -> Drawn:
    return {"target": np.zeros(n, int), "prediction": (rng.random(n) >= p).astype(int)}


def segments(rng: Rng, n: int, p: float) -> Drawn:
    """Events of five classes, some in every third clip; clips differ in difficulty."""
    there = np.where(rng.random((n, CLASSES)) < 0.4, rng.integers(1, SEGMENTS + 1, (n, CLASSES)), 0)
    ease = rng.beta(6 * p, 6 * (1 - p), (n, 1))
    hits = rng.binomial(there, ease)
    return {"segments": np.stack([hits, rng.binomial(there, 1 - ease), there - hits], axis=2)}


def tags(rng: Rng, n: int, p: float) -> Drawn:
    """Five tags, each on a fifth of the clips; `p` is the share of pairs of clips that are ranked rightly."""
    target = rng.random((n, CLASSES)) < 0.2
    target[rng.integers(0, n, CLASSES), np.arange(CLASSES)] = True
    score = rng.normal(0, 1, target.shape) + target * np.sqrt(2) * stats.norm.ppf(p)
    return {"target": target, "prediction": score.astype(np.float32)}


def captions(rng: Rng, n: int, p: float) -> Drawn:
    ease = rng.beta(4 * p, 4 * (1 - p), n)
    columns = [rng.binomial(CAPTIONS, ease), np.full(n, CAPTIONS), rng.random(n) < ease]
    return {"recall": np.stack(columns, axis=1).astype(int)}


def words(rng: Rng, n: int, p: float) -> Drawn:
    """About ten words a clip; clips differ in difficulty."""
    said = 3 + rng.poisson(8, n)
    return {"word_errors": np.stack([rng.binomial(said, rng.beta(10 * (1 - p), 10 * p, n)), said], axis=1)}


METRICS: dict[str, tuple[Metric, Callable[[Rng, int, float], Drawn]]] = {
    "accuracy": ("accuracy", accuracy),
    "macro F1": ("segment_f1_macro", segments),
    "micro F1": ("segment_f1_micro", segments),
    "mAP": ("mean_average_precision", tags),
    "recall": ("recall_at_1", captions),
    "WER": ("one_minus_wer", words),
}


@dataclass(frozen=True)
class Cell:
    """One line of a table: a metric of so many clips at a level, `groups` of them alike by an intraclass correlation."""

    metric: str
    clips: int
    level: float
    sets: int
    groups: int | None = None
    correlation: float = 0.0


def draw(cell: Cell, rng: Rng) -> tuple[Scorer, Indices | None]:
    metric, law = METRICS[cell.metric]
    groups = None
    if cell.groups is None:
        drawn = law(rng, cell.clips, cell.level)
    else:
        groups = np.arange(cell.clips) % cell.groups
        chance = np.full(cell.groups, cell.level)
        if cell.correlation:
            weight = (1 - cell.correlation) / cell.correlation
            chance = rng.beta(cell.level * weight, (1 - cell.level) * weight, cell.groups)
        right = rng.random(cell.clips) < chance[groups]
        drawn = {"target": np.zeros(cell.clips, int), "prediction": (~right).astype(int)}
    kept = Kept(drawn, np.arange(cell.clips))
    return kind_scored_by(metric).scorer([kept], cell.clips, metric, PROTOCOL), groups


def coverage(cell: Cell) -> tuple[Cell, float, float, float, float]:
    """The truth, how often the percentile interval and ours hold it, and the mean width of ours."""
    rng = np.random.default_rng([cell.clips, int(1000 * cell.level), int(100 * cell.correlation), *cell.metric.encode()])
    truth = float(np.mean([point([draw(cell, rng)[0]]).mean() for _ in range(4 * cell.sets)]))
    held, plain, width = 0, 0, 0.0
    for _ in range(cell.sets):
        scorer, groups = draw(cell, rng)
        (estimate,) = estimates([[scorer]], rng, None if groups is None else [groups], resamples=RESAMPLES)
        low, high = interval(estimate) or (0.0, 1.0)
        assert 0 <= low <= estimate.score <= high <= 1
        held += low <= truth <= high
        width += high - low
        drawn = cell.groups or cell.clips
        plain_replicates = estimate.score + (estimate.replicates - estimate.score) * np.sqrt(1 - 1 / drawn)
        low, high = np.nanquantile(plain_replicates, [0.025, 0.975])
        plain += low <= truth <= high
    return cell, truth, plain / cell.sets, held / cell.sets, width / cell.sets


@dataclass(frozen=True)
class Runs:
    """Two runs of one model, three seeds each: probits of a clip's ease, a seed's luck, and both together."""

    clips: int
    level: float
    seed: float
    both: float
    sets: int


def told_apart(runs: Runs) -> tuple[Runs, float, float]:
    """How often the interval of the difference excludes 0, which is the truth: by percentiles over clips alone, and ours."""
    rng = np.random.default_rng([runs.clips, int(1000 * runs.level), int(100 * runs.seed), int(100 * runs.both)])
    kind = kind_scored_by("accuracy")
    shift = stats.norm.ppf(runs.level) * np.sqrt(1 + runs.seed**2 + runs.both**2)
    plain, ours = 0, 0
    for _ in range(runs.sets):
        ease = shift + rng.normal(0, 1, runs.clips)
        models = []
        for _ in range(2):
            luck = rng.normal(0, runs.seed, (3, 1)) + rng.normal(0, runs.both, (3, runs.clips))
            wrong = (ease + luck < 0).astype(int)
            kept = [Kept({"target": np.zeros_like(row), "prediction": row}, np.arange(runs.clips)) for row in wrong]
            models.append([kind.scorer(kept, runs.clips, "accuracy", PROTOCOL)])
        a, b = estimates(models, rng, resamples=RESAMPLES)
        difference = b.minus(a)
        low, high = interval(difference) or (-1.0, 1.0)
        ours += low > 0 or high < 0
        low, high = np.quantile(difference.replicates, [0.025, 0.975])
        plain += low > 0 or high < 0
    return runs, plain / runs.sets, ours / runs.sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 data sets a line, none of 1,000 clips")
    parser.add_argument("--metric", choices=METRICS, help="one metric alone")
    arguments = parser.parse_args()
    few, many = (100, 0) if arguments.quick else (500, 200)
    sizes = {20: few, 50: few, 180: few, 1000: many}
    levels = (0.5, 0.9, 0.98) if arguments.quick else (0.5, 0.7, 0.9, 0.95, 0.98)
    chosen = [arguments.metric] if arguments.metric else list(METRICS)
    cells = [Cell(m, n, p, sets) for m in chosen for n, sets in sizes.items() if sets for p in levels]
    if "accuracy" in chosen:
        cells += [Cell("accuracy", n, p, few, 40, icc) for n in (80, 200) for icc in (0.0, 0.1, 0.2) for p in levels]
    runs = [
        Runs(n, level, seed, both, few)
        for n in (50, 200, 1000)
        if n < 1000 or many
        for level in (0.7, 0.9)
        for seed, both in ((0.0, 0.3), (0.0, 1.0), (0.03, 0.3), (0.1, 0.3), (0.2, 0.5), (0.5, 0.3))
    ]
    with get_context("spawn").Pool(2) as pool:
        print("| metric | clips | groups | ICC | truth | percentile | interval | mean width |")
        print("|---|--:|--:|--:|--:|--:|--:|--:|")
        for cell, truth, plain, held, width in pool.imap(coverage, cells):
            goal = 0.90 if cell.groups else 0.92
            mark = "" if held >= goal and (held <= 0.98 or cell.groups) else " *"
            about = f"{cell.metric} | {cell.clips} | {cell.groups or ''} | {cell.correlation if cell.groups else ''}"
            print(f"| {about} | {truth:.3f} | {plain:.3f} | {held:.3f}{mark} | {width:.3f} |", flush=True)
        if arguments.metric:
            return
        print("\n| runs of one model: clips | level | seed | seed and clip | percentile excludes 0 | interval excludes 0 |")
        print("|--:|--:|--:|--:|--:|--:|")
        for run, plain, ours in pool.imap(told_apart, runs):
            print(f"| {run.clips} | {run.level} | {run.seed} | {run.both} | {plain:.3f} | {ours:.3f} |", flush=True)


if __name__ == "__main__":
    main()
