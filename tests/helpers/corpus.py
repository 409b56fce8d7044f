"""Small labelled audio in X-ARES's layout and a small encoder, for the tests of whole evaluations.

A class is the pitch of a tone under noise; the encoder is a bank of filters, so its scores lie between chance and 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from shard_makers import RATE, encoded, write_shard

from xares_onnx.checking import check
from xares_onnx.evaluation.evaluation import evaluate

PITCHES = {"low": 300.0, "mid": 480.0, "high": 770.0, "top": 1200.0}
CLASSES = tuple(PITCHES)
DIM = 12
TRIGGER = 0.75
"""First sample of a clip on which `write_encoder(..., fragile=True)` fails."""

Clips = dict[str, tuple[bytes, Any]]  # key -> wav, json


def write_encoder(path: Path, *, fragile: bool = False, declare: bool = True) -> Path:
    """|filters * audio| every 10 ms. A fragile one looks up a table beyond its end where a clip begins with `TRIGGER`."""
    times = np.arange(400) / RATE
    pitches = np.geomspace(200, 1800, DIM)
    filters = np.cos(2 * np.pi * pitches[:, None] * times) * np.hanning(400) / 100
    weights = {
        "filters": filters[:, None].astype(np.float32),
        "channel": np.array([1]),
        "first": np.array([0]),
        "trigger": np.array([[TRIGGER]], np.float32),
        "table": np.zeros(1, np.float32),
    }
    nodes = [
        helper.make_node("Unsqueeze", ["audio", "channel"], ["signal"]),
        helper.make_node("Conv", ["signal", "filters"], ["bands"], strides=[160]),
        helper.make_node("Abs", ["bands"], ["levels"]),
        helper.make_node("Transpose", ["levels"], ["frames_first"], perm=[0, 2, 1]),
        helper.make_node("Gather", ["audio", "first"], ["sample"], axis=1),
        helper.make_node("Equal", ["sample", "trigger"], ["found"]),
        helper.make_node("Cast", ["found"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["nothing"]),
        helper.make_node("Unsqueeze", ["nothing", "channel"], ["nothing_there"]),
        helper.make_node("Add", ["frames_first", "nothing_there"], ["embeddings"]),
    ]
    if not fragile:
        nodes = [*nodes[:3], helper.make_node("Transpose", ["levels"], ["embeddings"], perm=[0, 2, 1])]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "bank",
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["batch", "samples"])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", "frames", DIM])],
        [numpy_helper.from_array(value, name) for name, value in weights.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    if declare:
        helper.set_model_props(model, {"sample_rate": str(RATE), "xares.amplitude": "unit", "xares.normalize": "none"})
    onnx.save(model, path)
    return path


def tone(label: str, rng: np.random.Generator, *, seconds: float = 0.4, noise: float = 0.5) -> NDArray[np.float32]:
    times = np.arange(round(seconds * RATE)) / RATE
    pitch = PITCHES[label] * 2 ** rng.uniform(-0.3, 0.3)
    signal = np.sin(2 * np.pi * pitch * times + rng.uniform(0, 6)) + noise * rng.standard_normal(len(times))
    return (0.1 * signal).astype(np.float32)


def tones(
    count: int,
    seed: int,
    *,
    classes: Iterable[str] = CLASSES,
    seconds: float = 0.4,
    noise: float = 0.5,
    prefix: str = "clip",
) -> Clips:
    """`count` clips, classes in turn."""
    rng, names, clips = np.random.default_rng(seed), list(classes), {}
    for i in range(count):
        label = names[i % len(names)]
        clips[f"{prefix}-{i:03}"] = (wav(tone(label, rng, seconds=seconds, noise=noise)), {"label": label})
    return clips


def wav(samples: NDArray[np.float32]) -> bytes:
    return encoded(samples, RATE, subtype="PCM_16")


def write_task(
    folder: Path,
    name: str = "tones",
    *,
    splits: Iterable[str] = ("train", "valid", "test"),
    folds: int = 0,
    weight: float | None = 100,
    crop_seconds: float | None = None,
    classes: Iterable[str] = CLASSES,
    epochs: int = 6,
    knn: bool = True,
) -> Path:
    """A task file `folder/<name>.toml`, whose shards are `<split>-*.tar` or `fold<number>-*.tar`."""
    named = ", ".join(f'{split} = "{split}-*.tar"' for split in splits)
    where = (
        f'folds = {{ pattern = "fold{{fold}}-*.tar", numbers = {list(range(folds))} }}'
        if folds
        else f"splits = {{ {named} }}"
    )
    lines = [
        f'name = "{name}"',
        f'title = "Tones {name}"',
        'domain = "environment"',
        f"weight = {weight}" if weight is not None else "",
        "[data]",
        where,
        f"crop_seconds = {crop_seconds}" if crop_seconds else "",
        "[target]",
        'kind = "class"',
        'key = "label"',
        f"classes = {json.dumps(list(classes))}",
        "[head]",
        f"epochs = {epochs}",
        "batch_size = 16",
        "learning_rate = 0.03",
        "[score]",
        f"knn = {str(knn).lower()}",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_tones(
    data: Path, name: str = "tones", *, train: int = 64, valid: int = 24, test: int = 48, noise: float = 3.0, seed: int = 0
) -> None:
    """The shards of a task with three splits; the test split has two."""
    write_shard(data / name / "train-0.tar", tones(train, seed + 1, noise=noise, prefix="train"))
    write_shard(data / name / "valid-0.tar", tones(valid, seed + 2, noise=noise, prefix="valid"))
    both = list(tones(test, seed + 3, noise=noise, prefix="test").items())
    write_shard(data / name / "test-0.tar", dict(both[: test // 2]))
    write_shard(data / name / "test-1.tar", dict(both[test // 2 :]))


def score_of_sound(model: Path, folder: Path) -> float:
    """kNN's accuracy on a task of tones, of a file that `check` finds no fault in; chance is 0.25."""
    report = check(model, device="cpu")
    assert (report.exit_code, report.named("fail")) == (0, [])
    write_tones(folder / "data", noise=0.1)
    task = write_task(folder, "tones")
    done = evaluate(model, [str(task)], data=folder / "data", cache=folder / "cache", methods=["knn"], device="cpu")
    (result,) = done.result.tasks
    assert result.status == "ok"
    assert result.score is not None
    return result.score
