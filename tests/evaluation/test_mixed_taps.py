"""The mix of taps through an evaluation: its record, its files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_world import run, said
from corpus import DIM, write_task, write_tones
from kind_makers import write_kind
from layered_model import layered
from onnx import helper, numpy_helper
from onnx_models import constant

from xares_onnx.errors import MachineError, UsageError
from xares_onnx.evaluation.comparison import compare
from xares_onnx.evaluation.evaluation import Evaluation, evaluate
from xares_onnx.evaluation.record import TaskResult, read_predictions, read_result
from xares_onnx.scoring.mixing import _Spool

pytestmark = pytest.mark.usefixtures("shared_process")


class World:
    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.model = layered(folder / "layered.onnx")
        self.task = write_task(folder, "tones")
        write_tones(self.data)

    def run(self, *taps: str, model: Path | None = None, tasks: tuple[Path, ...] = (), **options: Any) -> Evaluation:
        arguments: dict[str, Any] = {"data": self.data, "cache": self.folder / "cache", "threads": 1, **options}
        return evaluate(model or self.model, [str(task) for task in tasks or (self.task,)], taps=taps, **arguments)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("mix"))


def of_mix(done: Evaluation) -> list[TaskResult]:
    return [record for record in done.result.tasks if record.tap == "mix"]


# ---------------------------------------------------------------- what it leaves


def test_the_mix_is_one_more_tap_with_its_weights(world: World, tmp_path: Path) -> None:
    done = world.run("mix", output=tmp_path / "mix.json")
    taps = ["embeddings", "layer.0", "layer.1", "layer.2", "layer.3"]
    assert done.result.encoder.taps == taps
    assert done.result.settings["taps"] == ["mix"]
    layers = [r for r in done.result.tasks if r.tap != "mix"]
    plain = world.run("all-layers")
    assert [(r.tap, r.method, r.score) for r in layers] == [(r.tap, r.method, r.score) for r in plain.result.tasks]
    (record,) = of_mix(done)
    assert (record.method, record.status) == ("linear", "ok")
    assert record.score is not None
    assert record.score > 0.75
    assert record.tuning is not None
    assert record.tuning.mix is not None
    assert list(record.tuning.mix) == taps
    assert sum(weight for (weight,) in record.tuning.mix.values()) == pytest.approx(1)
    assert record.tuning.convergence.relative_gradient_norm is not None
    assert not record.tuning.convergence.limit_reached
    assert list(done.result.averages_by_tap) == [*taps, "mix"]
    assert done.result.averages_by_tap["mix"]["own"]["head"].weighted == pytest.approx(record.score)

    read = read_result(tmp_path / "mix.json")
    assert read.tasks == done.result.tasks
    predictions = read_predictions(tmp_path / "mix.json", record)
    assert float((predictions["target"] == predictions["prediction"]).mean()) == pytest.approx(record.score)


def test_the_same_bytes_with_two_threads_and_compare_pairs_the_mix(world: World, tmp_path: Path) -> None:
    paths = [tmp_path / f"{threads}.json" for threads in (1, 2)]
    for threads, path in enumerate(paths, start=1):
        world.run("stream1", "stream3", "mix", output=path, threads=threads, methods=["head"], shots=[2] * (threads == 1))
    records = [next(r for r in read_result(path).tasks if r.tap == "mix") for path in paths]
    assert records[0].tuning == records[1].tuning
    assert records[0].shots == []  # a draw of few clips has no selection clips to choose by, and mixes nothing
    assert records[0].tuning is not None
    assert records[0].tuning.mix is not None
    assert list(records[0].tuning.mix) == ["stream1", "stream3"]
    one, two = (read_predictions(path, record) for path, record in zip(paths, records, strict=True))
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)
    done = compare(paths[0], paths[1])
    assert [(row.tap, row.difference) for row in done.tasks] == [(None, 0), ("stream3", 0), ("mix", 0)]


@pytest.mark.usefixtures("heads_in_this_process")
def test_frames_are_mixed_and_a_head_that_does_not_converge_is_not(world: World, tmp_path: Path) -> None:
    events = write_kind(tmp_path, "events")
    captions = write_kind(tmp_path, "captions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xares_onnx.scoring.kinds.captions.Captions.train", _nothing)
        done = world.run("stream0", "stream2", "mix", data=tmp_path / "data", tasks=(events, captions))
    mixed, not_mixed = of_mix(done)
    assert (mixed.task, mixed.status) == ("events", "ok")
    assert mixed.tuning is not None
    assert mixed.tuning.mix is not None
    assert sum(weight for (weight,) in mixed.tuning.mix.values()) == pytest.approx(1)
    assert (not_mixed.task, not_mixed.status) == ("captions", "not_applicable")
    assert not_mixed.reason == (
        "the mix is learned with a head that converges, and that of captions is trained for a set time; "
        "choose a layer by its own score"
    )


def _nothing(*_: Any) -> Any:
    from xares_onnx.errors import ScoreUndefinedError

    raise ScoreUndefinedError("not trained")


# ---------------------------------------------------------------- what cannot be mixed


def test_taps_of_other_dimensions_are_left_out_and_named(world: World, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = onnx.load(layered(tmp_path / "m.onnx", more=[helper.make_node("MatMul", ["stream1", "narrow"], ["small"])]))
    model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal((DIM, 5)).astype(np.float32), "narrow"))
    onnx.save(model, tmp_path / "m.onnx")
    done = world.run("small", "stream1", "stream2", "mix", model=tmp_path / "m.onnx", methods=["head"])
    (record,) = of_mix(done)
    assert record.tuning is not None
    assert list(record.tuning.mix or ()) == ["stream1", "stream2"]
    note = "small are not in the mix, whose layers have 12 dimensions"
    assert note in record.notes
    assert f"tones: {note}" in done.result.notes
    (record,) = of_mix(world.run("small", "stream1", "mix", model=tmp_path / "m.onnx", methods=["head"]))
    assert (record.status, record.reason) == (
        "not_applicable",
        "no two taps have the same number of dimensions, so there is nothing to mix",
    )


def test_taps_that_drop_different_clips_are_not_mixed(world: World, tmp_path: Path) -> None:
    more = [
        helper.make_node("ReduceMax", ["audio"], ["peak"], axes=[1], keepdims=1),
        helper.make_node("Sub", ["limit", "peak"], ["room"]),
        helper.make_node("Sqrt", ["room"], ["root"]),
        constant("last", [2]),
        helper.make_node("Unsqueeze", ["root", "last"], ["factor"]),
        helper.make_node("Mul", ["stream1", "factor"], ["broken"]),
    ]
    model = onnx.load(layered(tmp_path / "m.onnx", more=more))
    model.graph.initializer.append(numpy_helper.from_array(np.array([[0.97]], np.float32), "limit"))
    onnx.save(model, tmp_path / "m.onnx")
    write_tones(tmp_path / "data", noise=2.5)
    done = world.run(
        "stream1", "broken", "mix", model=tmp_path / "m.onnx", data=tmp_path / "data", allow_drops=True, methods=["head"]
    )
    (record,) = of_mix(done)
    assert record.status == "not_applicable"
    assert record.reason == "broken dropped other clips than stream1 did, so they cannot be mixed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--taps", "mix", "--protocol", "xares"), "--taps mix is not part of protocol xares; leave --protocol out"),
        (
            ("--taps", "mix", "--method", "knn"),
            "--taps mix learns its weights with a head, which --method knn leaves out; leave --method out",
        ),
        (
            ("--taps", "stream1,mix"),
            "--taps stream1,mix mixes one tap; name another, or mix alone for all layers",
        ),
    ],
)
def test_what_cannot_be_asked_for(world: World, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(
        "evaluate", str(world.model), "--tasks", str(world.task), "--data", str(world.data), *arguments, "--quiet"
    )
    assert (code, out, said(err)) == (2, "", message)


def test_a_tap_cannot_be_called_mix(world: World, tmp_path: Path) -> None:
    model = onnx.load(world.model)
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["mix" if name == "embeddings" else name for name in names]
    model.graph.output[0].name = "mix"
    onnx.save(model, tmp_path / "m.onnx")
    code, _, err = run("evaluate", str(tmp_path / "m.onnx"), "--tasks", str(world.task), "--data", str(world.data),
                       "--taps", "mix", "--quiet")  # fmt: skip
    assert code == 3
    assert said(err) == "the model has a tap 'mix', as the mix of taps is called; rename that tensor in the model"


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"a": [0.5], "b": [0.6]}, "must sum to 1"),
        ({"a": [1.5]}, "<= 1"),
        ({"a": [0.5, 0.5]}, "a weight per layer and head"),
        ({}, "a weight per"),
    ],
)
def test_weights_that_are_none_are_refused(world: World, tmp_path: Path, mix: dict[str, list[float]], message: str) -> None:
    world.run(output=tmp_path / "r.json", methods=["head"])
    content = json.loads((tmp_path / "r.json").read_text())
    content["tasks"][0]["tuning"]["mix"] = mix
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message):
        read_result(tmp_path / "r.json")


def test_a_temporary_file_that_cannot_be_made_is_an_error_of_the_machine(tmp_path: Path) -> None:
    with pytest.raises(MachineError), _Spool(tmp_path / "absent"):
        pass
