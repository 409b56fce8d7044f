"""What each of X-ARES's choices does to a score: one at a time in place of the corrected protocol's own, and all together.

    python bench/protocols.py MODEL.onnx DATA [TASK...]

Prints a Markdown table. `training` is X-ARES's training alone: its optimiser and epochs, on the corrected crops, folds and
targets, scored by clip. `arithmetic` brings its training along, because under X-ARES losses and targets are of crops and
counted frames. Heads that draw have three seeds everywhere, so that a difference is not one of seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from patched_heads import heads_here

from xares_onnx.data.targets import NumberTarget
from xares_onnx.evaluation import task_scores
from xares_onnx.evaluation.evaluation import evaluate
from xares_onnx.scoring import folds
from xares_onnx.scoring.kinds import Kind, Outcome
from xares_onnx.scoring.kinds.captions import Captions
from xares_onnx.scoring.kinds.events import EventsKind
from xares_onnx.scoring.kinds.kind import outcomes_of
from xares_onnx.scoring.kinds.pooled import PooledKind
from xares_onnx.scoring.kinds.transcript import Transcript
from xares_onnx.scoring.protocol import Protocol

XARES = Protocol("xares")
CHOICES = ("selection", "crops", "training", "arithmetic", "all")


def pooled(kind: PooledKind, seeds: int, on_step: Callable[[int], None]) -> list[Outcome]:
    from xares_onnx.probes.linear import Regression, train_linear

    rows, head, target = kind.crop_rows(), kind.task.head, kind.task.target
    trained = kind.trained()
    if isinstance(target, NumberTarget):  # X-ARES clips no number, which is its arithmetic
        trained = Regression(trained.targets, (target.low, target.high))
    return outcomes_of(train_linear(kind.dataset.embeddings, trained, kind.examples_of_crops, rows, head, range(seeds)))


def events(kind: EventsKind, seeds: int, on_step: Callable[[int], None]) -> list[Outcome]:
    from xares_onnx.probes.frames import train_frames

    data, segment_seconds = kind.dataset, kind.task.score.segment_seconds
    assert segment_seconds is not None
    return outcomes_of(
        train_frames(
            data.frames,
            data.times,
            data.seconds,
            data.labels,
            kind.clip_rows(),
            len(kind.task.target.class_names),
            kind.task.head,
            range(seeds),
            segment_seconds=segment_seconds,
            average=kind.average,
        )
    )


def captions(kind: Captions, seeds: int, on_step: Callable[[int], None]) -> list[Outcome]:
    from xares_onnx.probes.retrieval import train_retrieval

    data = kind.dataset
    return outcomes_of(
        train_retrieval(
            data.embeddings,
            data.labels,
            data.clip_of_crop,
            kind.crop_rows(),
            kind.task.head,
            range(seeds),
            vocabulary=None,
            arithmetic="corrected",
        )
    )


def transcripts(kind: Transcript, seeds: int, on_step: Callable[[int], None]) -> list[Outcome]:
    from xares_onnx.probes.ctc import train_ctc

    return outcomes_of(train_ctc(kind.dataset.frames, kind.transcripts, kind.clip_rows(), kind.task.head, range(seeds)))


TRAINING: dict[Any, Any] = {PooledKind: pooled, EventsKind: events, Captions: captions, Transcript: transcripts}


@contextmanager
def choice(name: str) -> Iterator[None]:
    """`selection` and splits; `crops` and their padding; `training` of heads; `arithmetic`, also of kNN and metrics."""
    make_folds, start, crops = folds.make_folds, Kind.__init__, Protocol.crops

    def begin(self: Kind, task: Any, protocol: Protocol, *rest: Any) -> None:
        start(self, task, XARES, *rest)

    changes: dict[str, list[Any]] = {
        "selection": [mock.patch.object(task_scores, "make_folds", lambda _, *rest: make_folds(XARES, *rest))],
        "crops": [mock.patch.object(Protocol, "crops", lambda _, task: crops(XARES, task))],
        "training": [mock.patch.object(kind, "train", train) for kind, train in TRAINING.items()],
        "arithmetic": [mock.patch.object(Kind, "__init__", begin)],
    }
    with ExitStack() as stack:
        for change in changes[name]:
            stack.enter_context(change)
        yield


def scores(model: Path, data: Path, tasks: list[str], protocol: str) -> dict[tuple[str, str], float]:
    with heads_here():  # what `choice` changes would be unchanged in another process
        done = evaluate(model, tasks, suite=None if tasks else "all", data=data, protocol=protocol, seeds=3)  # type: ignore[arg-type]
    return {(r.title, "kNN" if r.method == "knn" else r.method): r.score for r in done.result.tasks if r.score is not None}


def main(model: Path, data: Path, tasks: list[str]) -> None:
    plain = scores(model, data, tasks, "corrected")
    found = {}
    for name in CHOICES[:-1]:
        with choice(name):
            found[name] = scores(model, data, tasks, "corrected")
    found["all"] = scores(model, data, tasks, "xares")
    print("| task | method | corrected | " + " | ".join(CHOICES) + " |")
    print("|---|---|---|" + "---|" * len(CHOICES))
    for key, score in plain.items():
        cells = [f"{found[name][key] - score:+.3f}" if key in found[name] else "" for name in CHOICES]
        print(f"| {key[0]} | {key[1]} | {score:.3f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
