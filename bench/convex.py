"""Convex heads at the sizes of real tasks, on clusters in 768 dimensions whose variances fall as 1/k.

    python bench/convex.py [--clips N --classes K] [--threads N] [--device cuda]

Without sizes: those of `make realdata` and ESC-50's, against three seeds of Adam on the same folds. With sizes: one fold of
that many training clips, of which one in twenty selects, and a fifth as many test clips; 138361 and 1251 are VoxCeleb1's,
289205 and 11 NSynth's. Times are the processor's too, since a busy machine stretches the clock. Last, how far offsets and
unequal scaling move the score.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
from numpy.typing import NDArray

from xares_onnx.data.task import Head
from xares_onnx.probes.convex import Classes, FoldRows, train_convex

DIM, LABEL_NOISE, SPREAD = 768, 0.1, 0.4
SIZES = {  # clips, classes, folds; one fold trains on two thirds of the clips and selects on a sixth
    "Speech Commands of realdata": (540, 30, 1),
    "VoxLingua33 of realdata": (336, 14, 1),
    "NSynth of realdata": (264, 11, 1),
    "LibriSpeech-MF of realdata": (260, 2, 1),
    "ESC-50 of realdata": (500, 50, 5),
    "ESC-50": (2000, 50, 5),
}


def clusters(clips: int, classes: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0] / np.sqrt(1 + np.arange(DIM))[:, None]
    axes = axes.astype(np.float32)
    centres = SPREAD * rng.standard_normal((classes, DIM), dtype=np.float32)
    labels = rng.integers(0, classes, clips)
    x = np.empty((clips, DIM), np.float32)
    for start in range(0, clips, 1000):  # larger parts would count in the peak
        part = labels[start : start + 1000]
        x[start : start + 1000] = (centres[part] + rng.standard_normal((len(part), DIM), dtype=np.float32)) @ axes
    return x, np.where(rng.random(clips) < LABEL_NOISE, rng.integers(0, classes, clips), labels)


def fold(train: NDArray[np.int64], test: NDArray[np.int64], share: int) -> FoldRows:
    valid = train[3::share]
    return FoldRows(np.setdiff1d(train, valid), valid, test, held_out=valid)


def against_adam() -> None:
    """Processor seconds of both, in turns, each the lowest of three."""
    from xares_onnx.probes.linear import Classification, train_linear  # torch, which the peak memory of others would count
    from xares_onnx.probes.training import Rows

    total = np.zeros(2)
    for name, (count, classes, parts) in SIZES.items():
        x, labels = clusters(count, classes)
        clips = np.arange(count)
        if parts == 1:
            train, valid, test = np.split(clips, [count * 2 // 3, count * 5 // 6])
            folds = [FoldRows(train, valid, test, held_out=valid)]
        else:
            folds = [fold(clips[clips % parts != k], clips[clips % parts == k], 10) for k in range(parts)]
        rows = [Rows(part.train, part.valid, part.test) for part in folds]
        times = []
        for _ in range(3):
            started = time.process_time()
            train_convex(x, Classes(labels, classes), clips, folds)
            between = time.process_time()
            train_linear(x, Classification(labels, classes), clips, rows, Head(epochs=10, batch_size=32), range(3))
            times.append((between - started, time.process_time() - between))
        converged, adam = np.min(times, axis=0)
        total += (converged, adam) if "realdata" in name else 0
        print(
            f"{name}: {converged:.3f} s converged, {adam:.3f} s of three seeds of Adam, {converged / adam:.2f}x", flush=True
        )
    print(f"all of realdata: {total[0] / total[1]:.2f}x the time of three seeds of Adam")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device")
    options = parser.parse_args()
    classes = options.classes
    if not options.clips:
        against_adam()
    x, labels = clusters(options.clips * 6 // 5 if options.clips else 2000, classes)
    clips = np.arange(len(x))
    if options.clips:
        folds = [fold(clips[: options.clips], clips[options.clips :], 20)]
    else:
        folds = [fold(clips[clips % 5 != k], clips[clips % 5 == k], 10) for k in range(5)]

    def convex(embeddings: NDArray[np.float32]) -> float:
        started = time.process_time(), time.perf_counter()
        results = train_convex(
            embeddings, Classes(labels, classes), clips, folds, threads=options.threads, device=options.device
        )
        seconds.append((time.process_time() - started[0], time.perf_counter() - started[1]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / x.nbytes
        chosen = [result.tried[result.chosen].strength for result in results]
        print(
            f"  strengths {chosen}, converged {all(r.convergence.converged for r in results)}, peak {peak:.2f}x the matrix"
        )
        return float(np.mean([(result.predictions == labels[result.examples]).mean() for result in results]))

    seconds: list[tuple[float, float]] = []
    score = convex(x)
    print(f"convex: {score:.3f} in {seconds[0][0]:.2f} s of the processor, {seconds[0][1]:.2f} s by the clock")
    rng = np.random.default_rng(1)
    x *= (10 ** rng.uniform(-2, 2, DIM)).astype(np.float32)
    x += x.std(axis=0) * (10 ** rng.uniform(-2, 2, DIM)).astype(np.float32)
    print(f"offset and unequal scaling: {convex(x) - score:+.4f}")


if __name__ == "__main__":
    main()
