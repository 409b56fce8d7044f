"""Several outputs of one model in one pass: each is scored as a model would be whose only output it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_world import run, said, table
from corpus import DIM, write_encoder, write_task, write_tones
from feature_models import HOPS, feature_model
from kind_makers import clips_of, write_kind
from layered_model import layered
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx_models import constant, make_external, value

from xares_onnx.embedding.embed import embed_shard
from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.encoder.worker import Worker
from xares_onnx.errors import ContractError, DiskFullError, ModelError, UsageError
from xares_onnx.evaluation import planning
from xares_onnx.evaluation.differences import Side
from xares_onnx.evaluation.evaluation import Evaluation, evaluate, plan
from xares_onnx.evaluation.record import TaskResult
from xares_onnx.report.board import make_board

pytestmark = pytest.mark.usefixtures("shared_process")

FLOAT = TensorProto.FLOAT


def only(source: Path, tensor: str, path: Path) -> Path:
    """The same model with one tensor inside it as its only output."""
    model: ModelProto = onnx.load(source)
    del model.graph.output[:]
    model.graph.output.append(value(tensor, FLOAT, None))
    onnx.save(model, path)
    return path


class World:
    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        self.model = layered(folder / "layered.onnx")
        self.task = write_task(folder, "tones")
        write_tones(self.data)

    def run(self, model: Path | None = None, *, cache: str = "cache", **options: Any) -> Evaluation:
        arguments: dict[str, Any] = {"data": self.data, "cache": self.folder / cache, "threads": 1, **options}
        return evaluate(model or self.model, [str(self.task)], **arguments)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("taps"))


def same_score(one: TaskResult, other: TaskResult) -> bool:
    named = ("score", "ci95", "metrics", "per_fold", "per_seed", "n_test", "clips", "audio_hours", "data_digest", "notes")
    return [getattr(one, name) for name in named] == [getattr(other, name) for name in named]


# ---------------------------------------------------------------- layers


def test_every_layer_has_the_score_of_a_model_that_ends_there(world: World, tmp_path: Path) -> None:
    done = world.run(taps=["all-layers"], output=tmp_path / "all.json")
    assert done.result.encoder.taps == ["embeddings", "layer.0", "layer.1", "layer.2", "layer.3"]
    assert [(r.tap, r.method) for r in done.result.tasks] == [
        (tap, method) for tap in (None, *done.result.encoder.taps[1:]) for method in ("linear", "knn")
    ]
    tensors = {"embeddings": "embeddings"} | {f"layer.{i}": f"stream{i}" for i in range(4)}
    for number, (tap, tensor) in enumerate(tensors.items()):
        alone = world.run(only(world.model, tensor, tmp_path / f"{tensor}.onnx"), output=tmp_path / f"{tap}.json")
        for method in ("linear", "knn"):
            (mine,) = (r for r in done.result.tasks if (r.tap or "embeddings", r.method) == (tap, method))
            (theirs,) = (r for r in alone.result.tasks if r.method == method)
            assert same_score(mine, theirs)
            assert theirs.tap is None
            assert mine.predictions is not None
            rows, expected = (np.load(tmp_path / str(r.predictions), allow_pickle=False) for r in (mine, theirs))
            assert all(np.array_equal(rows[name], expected[name]) for name in expected)
            assert (f".{number}." in mine.predictions) == (number > 0)
        own = {"own": done.result.averages_by_tap[tap]["own"]}
        assert own == alone.result.averages
    assert done.result.averages == done.result.averages_by_tap["embeddings"]
    scores = {r.score for r in done.result.tasks}
    assert len(scores) > 4  # taps differ, or nothing was shown


def test_all_layers_are_embedded_in_one_pass(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from xares_onnx.encoder import encoder

    calls: list[Any] = []
    kind: type[Worker] = encoder.Worker
    call = kind.call

    def counted(self: Worker, function: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(function)
        return call(self, function, *arguments, **options)

    monkeypatch.setattr(kind, "call", counted)
    first = world.run(taps=["all-layers"], cache="one-pass")
    assert calls.count(embed_shard) == 4  # one a shard
    calls.clear()
    again = world.run(taps=["all-layers"], cache="one-pass")
    assert embed_shard not in calls
    assert all(same_score(one, other) for one, other in zip(first.result.tasks, again.result.tasks, strict=True))


def test_one_lost_layer_is_made_again(world: World) -> None:
    first = world.run(taps=["all-layers"], cache="lost")
    files = sorted((world.folder / "lost/store").glob("*/*.safetensors"))
    assert len(files) == 4 * 5
    files[7].unlink()
    files[12].write_bytes(b"damaged")
    again = world.run(taps=["all-layers"], cache="lost")
    assert all(same_score(one, other) for one, other in zip(first.result.tasks, again.result.tasks, strict=True))


def test_the_last_layer_that_is_the_output_stands_there_once(tmp_path: Path) -> None:
    model = onnx.load(layered(tmp_path / "m.onnx"))
    model.graph.node.remove(next(node for node in model.graph.node if node.op_type == "Tanh"))
    for node in model.graph.node:
        node.output[:] = ["embeddings" if name == "stream3" else name for name in node.output]
    onnx.save(model, tmp_path / "m.onnx")
    with load_encoder(tmp_path / "m.onnx", taps=["all-layers"]) as encoder:
        assert [tap.name for tap in encoder.info.taps] == ["embeddings", "layer.0", "layer.1", "layer.2"]
        assert encoder.info.notes == ("layer.3 is the model's output 'embeddings' and is listed under that name",)


def test_a_model_without_layers_is_refused_by_a_sentence(world: World) -> None:
    model = str(write_encoder(world.folder / "bank.onnx"))
    code, out, err = run(
        "evaluate", model, "--taps", "all-layers", "--tasks", str(world.task), "--data", str(world.data), "--quiet"
    )
    assert (code, out) == (3, "")
    assert said(err) == ("no chain of residual layers leads to output 'embeddings'; name tensors by --taps instead")


# ---------------------------------------------------------------- outputs and tensors by name


def test_named_taps_are_scored_in_the_order_given(world: World, tmp_path: Path) -> None:
    """The first is the model's; outputs and inner tensors alike."""
    done = world.run(taps=["stream2", "embeddings"], output=tmp_path / "named.json")
    assert done.result.encoder.taps == ["stream2", "embeddings"]
    assert done.result.encoder.contract["output"] == {"value": "stream2", "source": "--taps"}
    assert done.result.settings["taps"] == ["stream2", "embeddings"]
    layers = world.run(taps=["all-layers"])
    for tap, same in (("stream2", "layer.2"), ("embeddings", "embeddings")):
        (mine,) = (r for r in done.result.tasks if (r.tap or "stream2", r.method) == (tap, "knn"))
        (theirs,) = (r for r in layers.result.tasks if (r.tap or "embeddings", r.method) == (same, "knn"))
        assert same_score(mine, theirs)
    assert done.result.averages == done.result.averages_by_tap["stream2"]


def test_one_tap_is_a_model_with_that_output(world: World) -> None:
    done = world.run(taps=["stream1"])
    assert [(r.tap, r.method) for r in done.result.tasks] == [(None, "linear"), (None, "knn")]
    assert list(done.result.averages_by_tap) == ["stream1"]


def test_outputs_of_the_graph_share_their_store_with_a_plain_run(tmp_path: Path) -> None:
    """Nothing was exposed, so nothing could have changed."""
    model = layered(tmp_path / "m.onnx", outputs=["stream1", "stream2"])
    with load_encoder(model, taps=["stream1", "stream2"]) as encoder:
        assert encoder.info.exposure is None
    with load_encoder(model, taps=["stream1", "inner1"]) as encoder:
        assert encoder.info.exposure is not None
        assert encoder.info.exposure.tensors == ("inner1",)


@pytest.mark.parametrize(
    ("taps", "kind", "message"),
    [
        (["stream9"], ContractError, "no output or inner tensor 'stream9'; did you mean 'stream"),
        (["embeddings", "stream9"], ContractError, "no output or inner tensor 'stream9'"),
        (["stream1", "stream1"], UsageError, "--taps names 'stream1' twice"),
        (["all-layers", "stream1"], UsageError, "--taps all-layers stands alone"),
        (["stream1", "single"], ContractError, "output 'single' has shape"),
        (["stream1", "constant"], ContractError, "output 'constant' is the same for any input"),
        (["stream1", "lost"], ModelError, "output 'lost' gives NaN or infinity"),
        (["stream1", "length"], ContractError, "output 'length' is not a float tensor"),
        (["length", "stream1"], ContractError, "--taps: the model has no float output 'length'"),
    ],
)
def test_what_cannot_be_a_tap_is_named(taps: list[str], kind: type[Exception], message: str, tmp_path: Path) -> None:
    more = [
        helper.make_node("ReduceMean", ["stream1"], ["single"], axes=[1, 2], keepdims=0),
        helper.make_node("Mul", ["stream1", "zero"], ["constant"]),
        helper.make_node("Div", ["constant", "zero"], ["lost"]),
        helper.make_node("Shape", ["stream1"], ["length"]),
    ]
    model = onnx.load(layered(tmp_path / "m.onnx", more=more))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(kind, match=message):
        load_encoder(tmp_path / "m.onnx", taps=taps)


def test_a_declared_output_and_taps_must_agree(world: World) -> None:
    with pytest.raises(
        UsageError, match=r"--contract declares output=stream1, so --taps must begin with it, not with 'stream2'"
    ):
        load_encoder(world.model, contract=["output=stream1"], taps=["stream2"])


def test_each_tap_has_frames_and_times_of_its_own(tmp_path: Path) -> None:
    """One at every other frame, one with its axes turned, one vector a clip."""
    more = [
        constant("start", [0]),
        constant("end", [1 << 40]),
        constant("axis", [1]),
        constant("step", [2]),
        helper.make_node("Slice", ["stream1", "start", "end", "axis", "step"], ["every_other"]),
        helper.make_node("Transpose", ["stream1"], ["turned"], perm=[2, 0, 1]),
        helper.make_node("ReduceMean", ["stream1"], ["whole"], axes=[1], keepdims=0),
    ]
    model = layered(tmp_path / "m.onnx", more=more)
    clip = (0.1 * np.random.default_rng(0).standard_normal(16_000 * 12 + 77)).astype(np.float32)
    with load_encoder(model, taps=["stream1", "every_other", "turned", "whole"]) as encoder:
        found = {tap.name: encoder.embed([clip], 16_000, tap=tap.name)[0] for tap in encoder.info.taps}
        contracts = {tap.name: tap.contract for tap in encoder.info.taps}
        with pytest.raises(UsageError, match="there is no tap 'turn'; did you mean 'turned'"):
            encoder.embed([clip], 16_000, tap="turn")
    assert {name: (c.output_layout, c.hop_samples, c.receptive_field_samples) for name, c in contracts.items()} == {
        "stream1": ("BTD", 160, 400),
        "every_other": ("BTD", 320, 400),
        "turned": ("DBT", 160, 400),
        "whole": ("BD", None, None),
    }
    np.testing.assert_array_equal(found["turned"].frames, found["stream1"].frames)
    first_chunk = len(found["stream1"].frames[found["stream1"].times < 9.98])
    np.testing.assert_array_equal(
        found["every_other"].frames[: first_chunk // 2], found["stream1"].frames[: first_chunk // 2 * 2 : 2]
    )
    np.testing.assert_allclose(found["every_other"].times[:5], found["stream1"].times[:10:2])
    assert (found["whole"].frames.shape, found["whole"].times.shape) == ((1, DIM), (0,))


def test_the_taps_of_a_fixed_window(tmp_path: Path) -> None:
    model = onnx.load(layered(tmp_path / "m.onnx"))
    model.graph.input[0].CopyFrom(value("audio", FLOAT, [1, 8_000]))
    onnx.save(model, tmp_path / "fixed.onnx")
    with load_encoder(tmp_path / "fixed.onnx", taps=["all-layers"]) as encoder:
        assert {(t.contract.window_frames, t.contract.hop_samples) for t in encoder.info.taps} == {(48, 160)}
        assert {t.contract.first_frame_center_samples for t in encoder.info.taps} == {200.0}


@pytest.mark.parametrize("sizes", [{}, {"T": 120}], ids=["any length", "fixed window"])
@pytest.mark.parametrize("kind", ["whisper", "kaldi", "librosa"])
def test_a_tap_behind_a_front_end_has_the_times_of_a_model_that_ends_there(
    kind: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    """Before the encoder's stride, at the rate of the features, whose hop and receptive field differ from the output's."""
    inner = [
        helper.make_node("Abs", ["bands"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["inner"], perm=[0, 2, 1]),
    ]
    onnx.save(feature_model(kind, extra=inner, sizes=sizes), tmp_path / "model.onnx")
    front_end = [f"frontend.preset={kind}"]
    with load_encoder(tmp_path / "model.onnx", contract=front_end, taps=["embeddings", "inner"]) as encoder:
        output, tap = (tap.contract for tap in encoder.info.taps)
    with load_encoder(only(tmp_path / "model.onnx", "inner", tmp_path / "inner.onnx"), contract=front_end) as encoder:
        alone = encoder.contract
    assert (tap.hop_samples, output.hop_samples) == (HOPS[kind], 2 * HOPS[kind])
    assert tap.first_frame_center_samples == {"whisper": 0, "kaldi": 200, "librosa": 0}[kind]
    named = ("hop_samples", "receptive_field_samples", "first_frame_center_samples", "window_frames", "dim")
    assert [getattr(tap, name) for name in named] == [getattr(alone, name) for name in named]
    assert tap.sources["first_frame_center_samples"] == alone.sources["first_frame_center_samples"]


def test_a_tap_that_sees_the_whole_window_is_spread_over_the_features(tmp_path: Path) -> None:
    inner = [
        helper.make_node("ReduceMax", ["bands"], ["loudest"], axes=[1, 2], keepdims=1),
        helper.make_node("Sub", ["bands", "loudest"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["inner"], perm=[0, 2, 1]),
    ]
    onnx.save(feature_model("whisper", extra=inner, sizes={"T": 120}), tmp_path / "model.onnx")
    with load_encoder(
        tmp_path / "model.onnx", contract=["frontend.preset=whisper"], taps=["embeddings", "inner"]
    ) as encoder:
        tap = encoder.info.taps[1].contract
    alone = load_encoder(
        only(tmp_path / "model.onnx", "inner", tmp_path / "inner.onnx"), contract=["frontend.preset=whisper"]
    ).contract
    assert (tap.hop_samples, tap.first_frame_center_samples) == (160, 0)
    assert (alone.hop_samples, alone.first_frame_center_samples) == (160, 0)
    assert tap.sources["first_frame_center_samples"] == alone.sources["first_frame_center_samples"]


def test_a_batch_coupled_tap_decides_for_all(tmp_path: Path) -> None:
    more = [
        helper.make_node("ReduceMax", ["stream1"], ["loudest"], axes=[0, 1, 2], keepdims=1),
        helper.make_node("Div", ["stream1", "loudest"], ["coupled"]),
    ]
    model = layered(tmp_path / "m.onnx", more=more)
    with load_encoder(model, taps=["stream1"]) as encoder:
        assert not encoder.contract.batch_coupled
    with load_encoder(model, taps=["stream1", "coupled"]) as encoder:
        assert all(tap.contract.batch_coupled for tap in encoder.info.taps)


def test_weights_in_another_file_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = layered(tmp_path / "plain.onnx")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    model = onnx.load(plain)
    blob = b""
    for tensor in model.graph.initializer:
        if tensor.name.startswith(("in", "out")):
            raw = numpy_helper.to_array(tensor).tobytes()
            make_external(tensor, "weights.bin")
            tensor.external_data.add(key="offset", value=str(len(blob)))
            tensor.external_data.add(key="length", value=str(len(raw)))
            blob += raw
    (folder / "weights.bin").write_bytes(blob)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    monkeypatch.chdir(tmp_path)
    clip = (0.1 * np.random.default_rng(0).standard_normal(16_000)).astype(np.float32)
    frames = []
    for file in (plain, Path("elsewhere/m.onnx")):
        with load_encoder(file, taps=["all-layers"]) as encoder:
            frames.append(encoder.embed([clip], 16_000, tap="layer.2")[0].frames)
    np.testing.assert_array_equal(*frames)


# ---------------------------------------------------------------- losses, frames, disk


def test_a_clip_is_lost_to_the_tap_that_fails_on_it_alone(tmp_path: Path) -> None:
    """`broken` is NaN where a clip is loud."""
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
    task = write_task(tmp_path, "tones")
    write_tones(tmp_path / "data", noise=2.5)
    done = evaluate(
        tmp_path / "m.onnx",
        [str(task)],
        data=tmp_path / "data",
        cache=tmp_path / "cache",
        taps=["embeddings", "broken"],
        allow_drops=True,
        methods=["knn"],
    )
    good, broken = done.result.tasks
    assert (good.tap, broken.tap) == (None, "broken")
    assert good.clips.dropped == []
    assert 0 < len(broken.clips.dropped) < 136
    assert broken.clips.expected == good.clips.expected == broken.clips.read + len(broken.clips.dropped)
    assert {drop.reason for drop in broken.clips.dropped} == {"the model gives NaN or infinity for it"}
    assert good.comparable
    assert not broken.comparable


def test_a_plan_counts_the_heads_of_a_mix_and_the_file_that_means_go_through(tmp_path: Path) -> None:
    model, task = layered(tmp_path / "m.onnx"), write_task(tmp_path, "tones")
    write_tones(tmp_path / "data")
    arguments: dict[str, Any] = {"data": tmp_path / "data", "cache": tmp_path / "cache"}
    without, mixed = (plan(model, [str(task)], taps=["all-layers", *more], **arguments).total for more in ((), ("mix",)))
    assert mixed.train_seconds == 2 * without.train_seconds
    assert mixed.disk_bytes - without.disk_bytes == pytest.approx(5 * 4 * DIM * without.clips)


def test_frames_of_every_layer_and_the_disk_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layered(tmp_path / "m.onnx")
    task = write_kind(tmp_path, "events")
    said_first: list[str] = []
    options: dict[str, Any] = {"data": tmp_path / "data", "cache": tmp_path / "cache", "seeds": 1}
    done = evaluate(
        model, [str(task)], taps=["all-layers"], **options, observer=lambda event: said_first.append(repr(event))
    )
    notes = [event for event in said_first if "frames of 5 taps take about" in event]
    assert len(notes) == 1
    embedding = next(i for i, event in enumerate(said_first) if "stage='embed'" in event)
    assert said_first.index(notes[0]) < embedding
    assert [r.tap for r in done.result.tasks] == [None, *done.result.encoder.taps[1:]]
    for tap, tensor in (("layer.1", "stream1"), ("layer.3", "stream3")):
        alone = evaluate(only(model, tensor, tmp_path / f"{tensor}.onnx"), [str(task)], **options)
        (mine,) = (r for r in done.result.tasks if r.tap == tap)
        assert same_score(mine, alone.result.tasks[0])
    written = sum(file.stat().st_size for file in (tmp_path / "cache/store").glob("*/*.safetensors"))
    planned = plan(model, [str(task)], taps=["all-layers"], data=tmp_path / "data", cache=tmp_path / "other").total
    plain = plan(model, [str(task)], data=tmp_path / "data", cache=tmp_path / "other").total
    assert planned.disk_bytes == pytest.approx(5 * plain.disk_bytes)
    assert planned.disk_bytes == pytest.approx(written * 5 / 7, rel=0.2)
    arguments: dict[str, Any] = {"taps": ["all-layers", "mix"], "data": tmp_path / "data", "cache": tmp_path / "other"}
    with_mix = plan(model, [str(task)], **arguments).total  # of frames, which it reads where they are
    assert (with_mix.disk_bytes, with_mix.train_seconds) == (planned.disk_bytes, 2 * planned.train_seconds)

    class Full:
        free = 1000

    monkeypatch.setattr(planning.shutil, "disk_usage", lambda _: Full)
    done = evaluate(model, [str(task)], taps=["all-layers"], **{**options, "cache": tmp_path / "fresh"})
    assert isinstance(done.errors[0], DiskFullError)
    assert "frames of 5 taps take about" in str(done.errors[0])
    assert not list((tmp_path / "fresh").glob("store/*/*.safetensors"))
    assert [(r.tap, r.status) for r in done.result.tasks] == [
        (tap, "failed") for tap in (None, *done.result.encoder.taps[1:])
    ]


def test_a_tap_without_frames_has_no_score_where_frames_are_needed(tmp_path: Path) -> None:
    more = [helper.make_node("ReduceMean", ["stream1"], ["whole"], axes=[1], keepdims=0)]
    model = layered(tmp_path / "m.onnx", more=more)
    few = {split: clips_of("events", split, count, seed=0) for split, count in (("train", 16), ("valid", 8), ("test", 8))}
    task = write_kind(tmp_path, "events", **few)
    done = evaluate(model, [str(task)], taps=["whole", "stream1"], data=tmp_path / "data", cache=tmp_path / "cache", seeds=1)
    assert [(r.tap, r.status) for r in done.result.tasks] == [(None, "not_applicable"), ("stream1", "ok")]


# ---------------------------------------------------------------- what a person sees


def test_the_table_of_layers(world: World, tmp_path: Path) -> None:
    arguments = ["--tasks", str(world.task), "--data", str(world.data), "--cache", str(world.folder / "cache")]
    output = tmp_path / "out.json"
    code, out, _ = run("evaluate", str(world.model), *arguments, "--taps", "all-layers", "--output", str(output))
    assert code == 0
    rows = {row[0]: row[1:] for row in table(out)}
    result = json.loads(output.read_bytes())
    names = ["layer.0", "layer.1", "layer.2", "layer.3", "embeddings"]
    assert [name for name in rows if name in names] == names
    for name in names:
        scores = [record["score"] for record in result["tasks"] if (record["tap"] or "embeddings") == name]
        assert rows[name] == [f"{score:.3f}" for score in scores]
    heads, neighbours = (
        {r["tap"] or "embeddings": r for r in result["tasks"] if r["method"] == method} for method in ("linear", "knn")
    )
    by_head = {tap: max(trial["selection"] for trial in record["tuning"]["tried"]) for tap, record in heads.items()}
    by_knn = {tap: record["selection"] for tap, record in neighbours.items()}
    for column, selection in enumerate((by_head, by_knn)):
        assert selection[rows["best"][column]] == max(selection.values())
    assert "the best tap is the best on the selection clips" in out
    assert "flatters" not in out
    assert rows["Tones tones"][2] == rows["embeddings"][0]
    board = make_board([Side.read(output)])
    for curve in board.curves:
        assert curve.steps == tuple(names)
        method = "knn" if curve.method == "knn" else "linear"
        assert list(curve.scores) == [
            r["score"]
            for name in names
            for r in result["tasks"]
            if r["method"] == method and (r["tap"] or "embeddings") == name
        ]
    assert len(board.curves) == 2


def test_a_plain_run_says_nothing_of_taps(world: World) -> None:
    done = world.run()
    assert {r.tap for r in done.result.tasks} == {None}
    assert done.result.averages_by_tap == {}
    assert done.result.encoder.taps == ["embeddings"]
