"""What each of X-ARES's choices does to a score: one at a time in place of the corrected protocol's own, and all together.

    python bench/protocols.py MODEL.onnx DATA [TASK...]

Prints a Markdown table. Heads have three seeds everywhere, so that a difference is not one of seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from xares_onnx.evaluation import evaluation
from xares_onnx.evaluation.evaluation import evaluate
from xares_onnx.scoring import folds
from xares_onnx.scoring.kinds import Kind
from xares_onnx.scoring.protocol import Protocol

XARES = Protocol("xares")
CHOICES = ("selection", "crops", "arithmetic", "all")


@contextmanager
def choice(name: str) -> Iterator[None]:
    """`selection` of epochs and splits; `crops` and their padding; `arithmetic` of heads, kNN, targets and metrics."""
    make_folds, start, crops = folds.make_folds, Kind.__init__, Protocol.crops

    def begin(self: Kind, task: Any, protocol: Protocol, *rest: Any) -> None:
        start(self, task, XARES, *rest)

    changes = {
        "selection": mock.patch.object(evaluation, "make_folds", lambda _, *rest: make_folds(XARES, *rest)),
        "crops": mock.patch.object(Protocol, "crops", lambda _, task: crops(XARES, task)),
        "arithmetic": mock.patch.object(Kind, "__init__", begin),
    }
    with changes[name]:
        yield


def scores(model: Path, data: Path, tasks: list[str], protocol: str) -> dict[tuple[str, str], float]:
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
