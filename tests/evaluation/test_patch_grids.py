"""A frame task scored on the tokens of a spectrogram transformer: as on the canonical model's frames, at the same times."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from feature_models import BANDS, front_end
from onnx import ModelProto, TensorProto, helper
from onnx_models import value
from patch_grids import as_tokens, declared
from shard_makers import RATE, encoded, noise, sine, write_shard

from xares_onnx.evaluation.evaluation import evaluate

pytestmark = pytest.mark.usefixtures("shared_process")
PITCHES = {"low": 300.0, "mid": 800.0, "top": 2_100.0}
SECONDS = 3.0
TASK = """
name = "beeps"
title = "Beeps"
domain = "environment"
[data]
splits = { train = "train.tar", valid = "valid.tar", test = "test.tar" }
[target]
kind = "events"
start = "onset"
end = "offset"
label = "label"
separator = ","
classes = ["low", "mid", "top"]
[score]
metric = "segment_f1_macro"
segment_seconds = 0.1
"""


class World(NamedTuple):
    folder: Path
    model: Path
    scores: dict[str, float]
    """Of the canonical model, by method and metric."""


def log_mel() -> ModelProto:
    """Kaldi's, float32 [batch, samples] -> [batch, frames, 80]."""
    nodes, initializers = front_end("kaldi", RATE)
    nodes.append(helper.make_node("Transpose", ["bands"], ["embeddings"], perm=[0, 2, 1]))
    inputs = [value("audio", TensorProto.FLOAT, ["batch", "samples"])]
    outputs = [value("embeddings", TensorProto.FLOAT, ["batch", "frames", BANDS["kaldi"]])]
    graph = helper.make_graph(nodes, "log_mel", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def scene(seed: int) -> tuple[bytes, Any]:
    """Three beeps in noise, each of its own pitch, and where they lie."""
    rng = np.random.default_rng(seed)
    clip, events = 0.02 * noise(SECONDS, seed), []
    for label, pitch in PITCHES.items():
        onset = round(float(rng.uniform(0, SECONDS - 1)), 3)
        beep = sine(pitch, float(rng.uniform(0.3, 0.9)), amplitude=0.02)
        start = round(onset * RATE)
        clip[start : start + len(beep)] += beep
        events.append({"onset": onset, "offset": onset + len(beep) / RATE, "label": label})
    return encoded(clip), events


def scores(model: Path, folder: Path, *contract: str) -> dict[str, float]:
    evaluation = evaluate(
        model, [str(folder / "beeps.toml")], data=folder, cache=folder / "cache", contract=contract, device="cpu", threads=1
    )
    (task,) = evaluation.result.tasks
    assert (task.status, task.n_test) == ("ok", 10)
    return {f"{task.method} {task.metric}": task.score or 0.0, **task.metrics}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("grids")
    (folder / "beeps.toml").write_text(TASK)
    for number, (split, clips) in enumerate({"train": 16, "valid": 6, "test": 10}.items()):
        (folder / "beeps").mkdir(exist_ok=True)
        write_shard(folder / f"beeps/{split}.tar", {f"{split}{i}": scene(100 * number + i) for i in range(clips)})
    model = folder / "logmel.onnx"
    onnx.save(log_mel(), model)
    return World(folder, model, scores(model, folder))


@pytest.mark.parametrize("first", ["frequency", "time"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_a_grid_scores_as_its_frames(first: Any, prefix: int, world: World) -> None:
    form: dict[str, Any] = {"bands": 4, "first": first, "prefix": prefix}
    grid = world.folder / f"{first}{prefix}.onnx"
    onnx.save(as_tokens(onnx.load(world.model), **form), grid)
    assert 0.7 < world.scores["linear segment_f1_macro"] < 1
    assert scores(grid, world.folder, *declared(**form)) == pytest.approx(world.scores, abs=2e-3)


def test_a_grid_that_is_read_in_the_other_order_scores_less(world: World) -> None:
    """Frames at wrong times: what the test above would miss if times did not count."""
    grid = world.folder / "wrong.onnx"
    onnx.save(as_tokens(onnx.load(world.model), bands=4, first="frequency", prefix=0), grid)
    wrong = scores(grid, world.folder, *declared(bands=4, first="time", prefix=0))
    assert wrong["linear segment_f1_macro"] < world.scores["linear segment_f1_macro"] - 0.2
