"""Properties that are figures: size, time and memory. They fail only by a limit that the user sets."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .findings import Outcome, failed, passed, skipped
from .model_under_test import Bench
from .signals import quiet_noise

_LONG_SECONDS = 10.0
_MOST_RUNS, _LEAST_RUNS, _RUN_SECONDS = 9, 3, 1.0  # two if one takes seconds


def check_size(bench: Bench, tolerance: float | None) -> Outcome:
    facts = bench.facts
    megabytes = facts.bytes / 1e6
    says = f"{megabytes:.1f} MB, {facts.parameters / 1e6:.2f} M parameters, {sum(facts.operators.values())} nodes"
    return _limited(f"{says}, {facts.precision}", float(f"{megabytes:.4g}"), "MB", tolerance, "quantise or prune the model")


def check_latency(bench: Bench, tolerance: float | None) -> Outcome:
    """Time of a chunk of 1 s and of 10 s, or as long as the model takes, with one caller and one thread."""
    contract = bench.contract
    timings, measured = [], 0.0
    lengths = {min(max(round(seconds * contract.sample_rate), contract.min_samples), contract.chunk_samples)
               for seconds in (1.0, _LONG_SECONDS)}  # fmt: skip
    for samples in sorted(lengths):
        chunk = quiet_noise(samples)[None]
        times: list[float] = []
        while len(times) < (_LEAST_RUNS if sum(times) < 2 * _RUN_SECONDS else 2) or (
            len(times) < _MOST_RUNS and sum(times) < _RUN_SECONDS
        ):
            started = time.perf_counter()
            bench.run(chunk)
            times.append(time.perf_counter() - started)
        median, late = float(np.median(times)), float(np.quantile(times, 0.95, method="higher"))
        measured = max(measured, median)
        timings.append(f"{samples / contract.sample_rate:g} s in {_seconds(median)} (95 %: {_seconds(late)})")
    return _limited(
        f"{'; '.join(timings)}; one thread, a timing",
        float(f"{1000 * measured:.3g}"),
        "ms",
        tolerance,
        "make the model smaller",
    )


def check_real_time_factor(bench: Bench, tolerance: float | None) -> Outcome:
    """Seconds of work per second of audio, with as many callers as threads."""
    contract, threads = bench.contract, bench.subject.spec.threads
    samples = min(round(_LONG_SECONDS * contract.sample_rate), contract.chunk_samples)
    chunk = quiet_noise(samples)[None]
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(bench.run, [chunk] * threads))
        seconds = time.perf_counter() - started
    factor = seconds * contract.sample_rate / (threads * samples)
    says = f"{factor:.3g} s per second of audio with {threads} thread{'s' if threads > 1 else ''}, a timing"
    return _limited(says, float(f"{factor:.3g}"), "s/s", tolerance, "use more threads or a GPU, or make the model smaller")


def check_memory(bench: Bench, tolerance: float | None) -> Outcome:
    """Peak memory of the model's process, with ONNX Runtime and reading the file."""
    try:
        import resource
    except ImportError:  # not POSIX
        return skipped("this system does not report the peak memory of a process")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
    says = f"{peak:.0f} MB at most in the model's process, with {bench.subject.spec.threads} callers"
    return _limited(says, round(peak), "MB", tolerance, "make the model smaller, or declare a shorter chunk_samples")


def _limited(says: str, measured: float, unit: str, limit: float | None, remedy: str) -> Outcome:
    figure = {"measured": measured, "tolerance": limit, "unit": unit}
    if limit is not None and measured > limit:
        return failed(f"{says}; the limit is {limit:g} {unit}", remedy, **figure)
    return passed(says, **figure)


def _seconds(value: float) -> str:
    return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"
