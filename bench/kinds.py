"""Training time of each kind of head, and how much of an evaluation is not the encoder.

    python bench/kinds.py MODEL [--dim N]

The first table is seconds for 1,000 clips and one epoch, one seed, scoring on 100 clips included; data of the size and
settings of the task it is named after. The second part evaluates MODEL on the built-in suite, from nothing.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from xares_onnx.data.catalog import shipped_tasks
from xares_onnx.data.sound_events import Events
from xares_onnx.data.task import Head
from xares_onnx.evaluation.evaluation import evaluate
from xares_onnx.probes.ctc import train_ctc
from xares_onnx.probes.frames import train_frames
from xares_onnx.probes.linear import Classification, Regression, Tagging, train_linear
from xares_onnx.probes.retrieval import train_retrieval
from xares_onnx.probes.training import Rows

CLIPS, HELD_OUT, EPOCHS = 1000, 100, 2
WORDS = ["".join(parts) for parts in itertools.product(("ba", "ki", "lo", "mu"), repeat=6)]  # 4,096


def trainings(dim: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """By name: what makes the data, and returns what trains on them."""
    rng = np.random.default_rng(0)
    clips = np.arange(CLIPS + 2 * HELD_OUT)
    rows = [Rows(clips[:CLIPS], clips[CLIPS:-HELD_OUT], clips[-HELD_OUT:])]
    pooled = rng.standard_normal((len(clips), dim)).astype(np.float32)

    def head(task: str) -> Head:
        own = shipped_tasks()[task].head
        return Head(own.kind, EPOCHS, own.batch_size, own.learning_rate, own.positive_weight)

    def frames(seconds: float, rate: int) -> list[Any]:
        values = rng.standard_normal((len(clips) * round(seconds * rate), dim), dtype=np.float32).astype(np.float16)
        return list(values.reshape(len(clips), -1, dim))

    def linear(task: str, objective: Any) -> Callable[[], Callable[[], Any]]:
        return lambda: lambda: train_linear(pooled, objective, clips, rows, head(task), [0])

    def sentences(low: int, high: int) -> list[str]:
        return [" ".join(rng.choice(WORDS, rng.integers(low, high))) for _ in clips]

    def events() -> Callable[[], Any]:
        values, times = frames(10, 25), np.arange(250) / 25
        found = [Events(*np.sort(rng.uniform(0, 10, (2, 3)), axis=0), rng.integers(0, 10, 3)) for _ in clips]
        common = {"segment_seconds": 1.0, "average": "macro"}
        seconds = [10.0] * len(clips)
        return lambda: train_frames(values, [times] * len(clips), seconds, found, rows, 10, head("desed"), [0], **common)

    def captions() -> Callable[[], Any]:
        five = list(zip(*(sentences(8, 14) for _ in range(5)), strict=True))
        return lambda: train_retrieval(
            pooled, five, clips, rows, head("clotho"), [0], vocabulary=None, arithmetic="corrected"
        )

    def transcript() -> Callable[[], Any]:
        values, texts = frames(12, 25), sentences(20, 40)
        return lambda: train_ctc(values, texts, rows, head("librispeech"), [0])

    return {
        "class (50 classes, batches of 32)": linear("esc50", Classification(rng.integers(0, 50, len(clips)), 50)),
        "tags (200 classes, batches of 64)": linear(
            "fsd50k", Tagging(rng.random((len(clips), 200)) < 0.02, 1.0, present_only=True)
        ),
        "number (batches of 32)": linear("speechocean762", Regression(rng.uniform(0, 10, len(clips)), (0, 10))),
        "events (10 s, 25 frames a second, batches of 32)": events,
        "captions (5 a clip, batches of 128)": captions,
        "transcript, ctc (12 s, 25 frames a second, batches of 4)": transcript,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--dim", type=int, default=768)
    arguments = parser.parse_args()
    made = trainings(arguments.dim)
    next(iter(made.values()))()()  # warm up
    for name, prepare in made.items():
        train = prepare()
        started = time.perf_counter()
        train()
        seconds = (time.perf_counter() - started) / EPOCHS
        print(f"{name}: {seconds:.3f} s for 1,000 clips and epoch, {arguments.dim} dimensions")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        done = evaluate(arguments.model, suite="synthetic", cache=Path(folder))
        wall = time.perf_counter() - started
    embedding = sum({record.task: record.seconds.embed for record in done.result.tasks}.values())
    training = sum(record.seconds.train for record in done.result.tasks)
    scoring = sum(record.seconds.score for record in done.result.tasks)
    print(
        f"{len(done.result.tasks)} scores of the built-in suite: {wall:.1f} s, of which embedding {embedding / wall:.0%}, "
        f"training {training / wall:.0%}, scores and intervals {scoring / wall:.0%}"
    )


if __name__ == "__main__":
    main()
