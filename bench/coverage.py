"""How often the 95 % interval of a score holds the truth, and how often two runs of one model are told apart.

    python bench/coverage.py            # all
    python bench/coverage.py --quick    # fewer data sets, none of 1,000 clips

Data sets are drawn from a law whose score is known, each is scored by the scorers that an evaluation uses, and its interval
made by `intervals`. The truth is the mean score of test sets of this size: F1 and average precision give another score of
few clips than of many. The accuracy of ungrouped clips takes n + 1 values, and coverage jumps with each that the interval
takes in, so it is not drawn but summed over these values by the binomial law. Beside it stands the percentile interval of
the same replicates, which was used before. A line marked * is outside the goal, 0.92 to 0.98 (with groups at least 0.90), by
more than twice its standard error.

Data sets share resamples, a batch at a time, because drawing these is most of the work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context

import numpy as np
from scipy import stats

from xares_onnx.data.task import Metric
from xares_onnx.metrics.bootstrap import Indices, Scorer
from xares_onnx.metrics.intervals import Estimate, estimates, interval
from xares_onnx.scoring.kinds import Kept, kind_scored_by
from xares_onnx.scoring.protocol import Protocol

PROTOCOL = Protocol("corrected")
RESAMPLES = 1000
BATCH = 50
CLASSES, SEGMENTS, CAPTIONS = 5, 10, 5
Rng = np.random.Generator
Drawn = dict[str, np.ndarray]


def accuracy(rng: Rng, n: int, p: float) -> Drawn:
    return outcomes(rng.random(n) < p)


def outcomes(right: np.ndarray) -> Drawn:
    return {"target": np.zeros(len(right), int), "prediction": (~right).astype(int)}


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

    @property
    def exact(self) -> bool:
        return self.metric == "accuracy" and self.groups is None

    @property
    def group_of_clip(self) -> Indices | None:
        return None if self.groups is None else np.arange(self.clips) % self.groups


def scorer(metric: Metric, drawn: Drawn, clips: int) -> Scorer:
    return kind_scored_by(metric).scorer([Kept(drawn, np.arange(clips))], clips, metric, PROTOCOL)


def data_sets(cell: Cell, rng: Rng) -> Iterator[tuple[float, Scorer]]:
    """Data sets with the probability of each; if it is exact, every number of right clips, else draws."""
    metric, law = METRICS[cell.metric]
    if cell.exact:
        chances = stats.binom(cell.clips, cell.level).pmf(np.arange(cell.clips + 1))
        for right in np.flatnonzero(chances > 1e-7):
            yield chances[right], scorer(metric, outcomes(np.arange(cell.clips) < right), cell.clips)
        return
    for _ in range(cell.sets):
        if cell.group_of_clip is None:
            drawn = law(rng, cell.clips, cell.level)
        else:
            chance = np.full(cell.groups or 0, cell.level)
            if cell.correlation:
                weight = (1 - cell.correlation) / cell.correlation
                chance = rng.beta(cell.level * weight, (1 - cell.level) * weight, cell.groups)
            drawn = outcomes(rng.random(cell.clips) < chance[cell.group_of_clip])
        yield 1 / cell.sets, scorer(metric, drawn, cell.clips)


@dataclass(frozen=True)
class Line:
    cell: Cell
    truth: float
    percentile: float
    """How often its interval holds the truth."""
    held: float
    width: float
    """The mean width of our interval."""

    @property
    def outside(self) -> bool:
        error = 0.0 if self.cell.exact else 2 * float(np.sqrt(0.05 * 0.95 / self.cell.sets))
        least, most = (0.90, 1.0) if self.cell.groups else (0.92, 0.98)
        return not least - error <= self.held <= most + error


def coverage(cell: Cell) -> Line:
    rng = np.random.default_rng([cell.clips, int(1000 * cell.level), int(100 * cell.correlation), *cell.metric.encode()])
    of_groups = None if cell.group_of_clip is None else [cell.group_of_clip]
    weights, scores, ours, percentiles = [], [], [], []
    for batch in batches(data_sets(cell, rng)):
        models = [[of_set] for _, of_set in batch]
        for (weight, _), estimate in zip(batch, estimates(models, rng, of_groups, resamples=RESAMPLES), strict=True):
            low, high = interval(estimate) or (0.0, 1.0)
            assert 0 <= low <= estimate.score <= high <= 1
            weights.append(weight)
            scores.append(estimate.score)
            ours.append((low, high))
            percentiles.append(percentile_interval(estimate, cell.groups or cell.clips))
    shares = np.array(weights)
    truth = cell.level if cell.exact else float(shares @ scores)

    def held(bounds: np.ndarray) -> float:
        return float(shares @ ((bounds[:, 0] <= truth) & (truth <= bounds[:, 1])))

    return Line(
        cell,
        truth,
        percentile=held(np.array(percentiles)),
        held=held(np.array(ours)),
        width=float(shares @ np.diff(ours, axis=1)[:, 0]),
    )


def batches(sets: Iterable[tuple[float, Scorer]]) -> Iterator[list[tuple[float, Scorer]]]:
    remaining = iter(sets)
    while batch := list(islice(remaining, BATCH)):
        yield batch


def percentile_interval(estimate: Estimate, drawn: int) -> np.ndarray:
    """Of replicates as they were before n / (n - 1) widened them."""
    replicates = estimate.score + (estimate.replicates - estimate.score) * np.sqrt(1 - 1 / drawn)
    return np.asarray(np.nanquantile(replicates, [0.025, 0.975]))


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
    shift = stats.norm.ppf(runs.level) * np.sqrt(1 + runs.seed**2 + runs.both**2)

    def run(ease: np.ndarray) -> list[Scorer]:
        luck = rng.normal(0, runs.seed, (3, 1)) + rng.normal(0, runs.both, (3, runs.clips))
        kept = [Kept(outcomes(row), np.arange(runs.clips)) for row in ease + luck >= 0]
        return [kind_scored_by("accuracy").scorer(kept, runs.clips, "accuracy", PROTOCOL)]

    plain, ours = 0, 0
    for start in range(0, runs.sets, BATCH):
        eases = shift + rng.normal(0, 1, (min(BATCH, runs.sets - start), runs.clips))
        of_runs = estimates([run(ease) for ease in eases for _ in range(2)], rng, resamples=RESAMPLES)
        for a, b in zip(of_runs[::2], of_runs[1::2], strict=True):
            difference = b.minus(a)
            low, high = interval(difference) or (-1.0, 1.0)
            ours += low > 0 or high < 0
            low, high = np.quantile(difference.replicates, [0.025, 0.975])
            plain += low > 0 or high < 0
    return runs, plain / runs.sets, ours / runs.sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 data sets a line, none of 1,000 clips")
    parser.add_argument("--metric", choices=METRICS, help="one metric alone")
    arguments = parser.parse_args()
    few, many = (200, 0) if arguments.quick else (2000, 1000)
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
    outside = 0
    with get_context("spawn").Pool(2) as pool:
        print("| metric | clips | groups | ICC | truth | percentile | interval | mean width |")
        print("|---|--:|--:|--:|--:|--:|--:|--:|")
        for line in pool.imap(coverage, cells):
            cell = line.cell
            outside += line.outside
            about = f"{cell.metric} | {cell.clips} | {cell.groups or ''} | {cell.correlation if cell.groups else ''}"
            held = f"{line.held:.3f}{' *' if line.outside else ''}"
            print(f"| {about} | {line.truth:.3f} | {line.percentile:.3f} | {held} | {line.width:.3f} |", flush=True)
        print(f"\n{outside} of {len(cells)} lines are outside the goal")
        if arguments.metric:
            return
        print("\n| runs of one model: clips | level | seed | seed and clip | percentile excludes 0 | interval excludes 0 |")
        print("|--:|--:|--:|--:|--:|--:|")
        for run, plain, ours in pool.imap(told_apart, runs):
            print(f"| {run.clips} | {run.level} | {run.seed} | {run.both} | {plain:.3f} | {ours:.3f} |", flush=True)


if __name__ == "__main__":
    main()
