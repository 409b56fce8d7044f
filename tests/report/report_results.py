"""Results of hand-made predictions, as an evaluation would have written them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from xares_onnx.data.catalog import shipped_tasks
from xares_onnx.data.shards import Clips
from xares_onnx.evaluation.averages import averages
from xares_onnx.evaluation.record import Encoder, Result, Seconds, TaskResult, prediction_file, write_result
from xares_onnx.metrics.bootstrap import point
from xares_onnx.metrics.intervals import estimates, interval
from xares_onnx.scoring.protocol import Protocol
from xares_onnx.scoring.scoring import Predictions, generator, scorers_of

CORRECTED = Protocol("corrected")


def predictions(targets: Sequence[Any], answers: Sequence[Sequence[Any]], keys: Sequence[str] | None = None) -> Predictions:
    """Predictions of one fold, from the targets of its clips and the answers of each seed."""
    names = list(keys) if keys is not None else [f"test-0.tar/clip{i:03}" for i in range(len(targets))]
    seeds = len(answers)
    return {
        "key": np.array(names * seeds),
        "fold": np.array(["test"] * len(names) * seeds),
        "seed": np.repeat(np.arange(seeds), len(names)),
        "target": np.concatenate([np.asarray(targets)] * seeds),
        "prediction": np.concatenate([np.asarray(of_seed) for of_seed in answers]),
    }


def right(clips: Sequence[int], of: int = 100) -> Predictions:
    """Predictions of one seed for `of` clips of class 0 and 1 in turn, right for these `clips` only."""
    targets = np.arange(of, dtype=np.int32) % 2
    answers: npt.NDArray[np.int32] = np.where(np.isin(np.arange(of), list(clips)), targets, 1 - targets).astype(np.int32)
    return predictions(targets, [answers])


def record(task: str, arrays: Predictions, method: str = "linear", tap: str | None = None, **changes: Any) -> TaskResult:
    """The record of a shipped task, with the score and interval that these predictions give."""
    shipped = shipped_tasks()[task]
    scorers = scorers_of(arrays, shipped.score.metric, CORRECTED)
    scores = point(scorers)
    by = "knn" if method == "knn" else "head"
    (estimate,) = estimates([scorers], generator(task, by), None, "share" if shipped.score.higher_is_better else "error")
    published = shipped.published.linear if shipped.published and method != "knn" else {}
    built = TaskResult(
        task=task,
        title=shipped.title,
        domain=shipped.domain,
        status="ok",
        method=method,  # type: ignore[arg-type]
        tap=tap,
        metric=shipped.score.metric,
        higher_is_better=shipped.score.higher_is_better,
        score=float(scores.mean()),
        ci95=interval(estimate),
        per_seed=[float(score) for score in scores.mean(axis=0)],
        n_test=scorers[0].clips,
        weight=shipped.weight,
        clips=Clips(expected=200, read=200, dropped=[]),
        data_digest="d" * 64,
        definition_digest=shipped.digest(),
        seconds=Seconds(embed=1, train=1, score=1),
        audio_hours=0.5,
        rtf=0.01,
        published=dict(published),
    )
    return msgspec.structs.replace(built, **changes)


def result(
    records: Sequence[TaskResult], name: str = "model", taps: Sequence[str] = ("embeddings",), **changes: Any
) -> Result:
    main = [r for r in records if r.tap is None]
    built = Result(
        encoder=Encoder(
            file=f"{name}.onnx",
            sha256=(name.encode().hex() * 64)[:64],
            bytes=1_000_000 * (1 + len(name)),
            parameters=250_000,
            contract={
                "dim": {"value": 64, "source": "measured"},
                "hop_samples": {"value": 160, "source": "measured"},
                "sample_rate": {"value": 16000, "source": "default"},
            },
            taps=list(taps),
        ),
        environment={"provider": "CPUExecutionProvider", "machine": {"processor": "x86_64"}},
        settings={"protocol": "corrected", "seeds": 1, "limit": None, "vocabulary": None, "lm": None},
        created="2026-01-02T03:04:05+00:00",
        tasks=list(records),
        averages=averages(main, {}),
    )
    return msgspec.structs.replace(built, **changes)


def save(
    folder: Path,
    name: str,
    tasks: Mapping[str, Predictions],
    methods: Mapping[str, str] | None = None,
    taps: Mapping[str, Mapping[str, Predictions]] | None = None,
    records: Mapping[str, Mapping[str, Any]] | None = None,
    **changes: Any,
) -> Path:
    """Write a result of `tasks` with its predictions; `taps` are further ones, `records` changes of a task's record."""
    path = folder / f"{name}.json"
    built, arrays = [], {}
    several = {"embeddings": tasks, **(taps or {})}
    for number, (tap, of_tap) in enumerate(several.items()):
        for task, of_task in of_tap.items():
            method = (methods or {}).get(task, "linear")
            by = f"{method}.{number}" if number else method
            more = dict((records or {}).get(task, {}))
            built.append(
                record(
                    task,
                    of_task,
                    method,
                    tap if number else None,
                    **{"predictions": prediction_file(path, task, by), **more},
                )
            )
            arrays[task, by] = of_task
    write_result(path, result(built, name, tuple(several), **changes), arrays)
    return path
