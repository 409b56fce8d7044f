"""`diagnose` whole: points and the fixed file, formats and exit codes, tensors of a `.npz`, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from cli_world import run
from corpus import write_task, write_tones
from numpy.typing import NDArray
from onnx import numpy_helper
from planted_faults import FAMILIES, FAULTS, save_as

from xares_onnx.diagnosis import attribution, process
from xares_onnx.diagnosis.diagnosing import diagnose
from xares_onnx.diagnosis.findings import Diagnosis
from xares_onnx.encoder.worker import Worker
from xares_onnx.errors import UsageError
from xares_onnx.evaluation.comparison import compare

pytestmark = pytest.mark.usefixtures("shared_process")


class World:
    """An encoder of patches, a copy in 8 bits whose second layer drowns what it hears, and a task of tones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.task = str(write_task(folder, knn=False))
        write_tones(folder / "data", train=48, valid=16, test=64, noise=1.0)
        model = FAMILIES["dasheng"](17)
        times = np.arange(320) / 16_000
        bank = np.cos(2 * np.pi * np.geomspace(200, 1800, 32)[:, None, None] * times) * np.hanning(320) / 20
        set_weight(model, "stem.weight", bank)
        self.a = save_as(model, folder / "a.onnx", "float32")
        set_weight(model, "2.ffn.out.bias", np.resize([6e6, -6e6], 32))  # beside which float32 forgets the rest
        self.b = save_as(model, folder / "b.onnx", "dynamic")
        self.speech = save_as(FAMILIES["wav2vec2"](17), folder / "speech.onnx", "float32")
        self.options: dict[str, Any] = {"data": folder / "data", "cache": folder / "cache", "clips": 4, "threads": 1}

    def diagnose(self, **options: Any) -> Diagnosis:
        return diagnose(self.a, self.b, [self.task], **{**self.options, **options})


def set_weight(model: onnx.ModelProto, name: str, values: NDArray[np.float64]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _one_process(_shared_worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    class Borrowed(Worker):
        def call(self, *arguments: Any, **options: Any) -> Any:
            return _shared_worker.call(*arguments, **options)

    monkeypatch.setattr(process, "Worker", Borrowed)


@pytest.fixture
def world(_made: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(attribution.Judge, "time_ratio", lambda *_: 1.0)  # seconds per group
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return _made


def test_the_fixed_file_regains_what_the_broken_layer_lost(world: World) -> None:
    fixed = world.folder / "fixed.onnx"
    result = world.diagnose(groups=1, fix=fixed, budget=3.0)
    assert result.lost is not None
    assert result.lost.points > 20
    assert result.failed
    assert result.steps[result.suspects[0]].name == "2.ffn.out.MatMul"
    best = result.regained[0]
    assert best.points is not None
    assert best.points.points > 0.5 * result.lost.points
    assert best.more_bytes is not None
    assert best.more_bytes > 0
    assert result.fix is not None
    assert result.fix.path == str(fixed)
    assert result.fix.lost.points <= 3.0
    assert result.fix.made_by.endswith("quantize_dynamic")
    assert "2.ffn.out.MatMul" in result.fix.excluded
    assert fixed.stat().st_size < world.a.stat().st_size
    names = {node.name for node in onnx.load(fixed).graph.node if node.op_type == "MatMulInteger"}
    assert names  # the rest is still in 8 bits
    assert any("quantize_dynamic" in line and '"2.ffn.out.MatMul"' in line for line in result.fix.recipe)
    options = {name: world.options[name] for name in ("data", "cache", "threads")}
    again = compare(world.a, fixed, [world.task], methods=["head"], limit=200, **options)
    assert again.tasks[0].difference == pytest.approx(-result.fix.lost.points / 100, abs=1e-9)


def test_no_file_is_written_that_is_not_within_the_budget(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from xares_onnx.diagnosis import fixing

    monkeypatch.setattr(fixing, "_next", lambda *_: None)  # nothing more to put back to float
    target = world.folder / "never.onnx"
    result = world.diagnose(groups=1, fix=target, budget=0.0)
    assert result.fix is not None
    assert result.fix.path is None
    assert result.exit_code == 1
    assert "no file was written" in result.fix.verdict
    assert not target.exists()


def test_each_format_says_it(world: World) -> None:
    arguments = ["diagnose", str(world.a), str(world.b), "--tasks", world.task, "--no-points", "--clips", "3"]
    arguments += ["--data", str(world.options["data"]), "--cache", str(world.options["cache"]), "--threads", "1"]
    assert run(*arguments, "--format", "yaml")[0] == 2
    page = world.folder / "page.html"
    code, out, _ = run(*arguments, "--html", str(page))
    assert code == 0
    assert out.startswith("suspect: layer 2's feed-forward: MatMul 2.ffn.out.MatMul")
    assert "Drift along the depth" in out
    assert "after layer 3" in out
    text = page.read_text()
    assert "2.ffn.out.MatMul" in text
    assert text.count("<svg") == 1  # no points, so no drawing of them
    assert "<script" not in text
    code, out, _ = run(*arguments, "--format", "json")
    record = json.loads(out)
    assert record["lost"] is None
    assert record["steps"][record["suspects"][0]]["name"] == "2.ffn.out.MatMul"
    code, out, _ = run(*arguments, "--format", "github")
    assert out.startswith("::warning ")
    assert "MatMul 2.ffn.out.MatMul" in out.splitlines()[0]


# ---------------------------------------------------------------- named tensors


def tensors_of(path: Path, names: list[str], waveform: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    model = onnx.load(path)
    for name in names:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(names, {"audio": waveform}), strict=True))


def reference(path: Path, tensors: dict[str, NDArray[np.float32]], waveform: NDArray[np.float32]) -> Path:
    np.savez(path, rate=np.array(16_000), waveform=waveform, **tensors)
    return path


NAMES = {
    "encoder.stem": "stem.gelu.Mul2.out",
    "1.attention.join": "1.attention.join.out",
    "2.ffn.norm": "2.ffn.norm.LayerNormalization.out",
    "3.ffn.join": "3.ffn.join.out",
}


def test_the_first_tensor_that_departs_from_an_npz(world: World) -> None:
    waveform = (0.1 * np.random.default_rng(0).standard_normal((3, 8_000))).astype(np.float32)
    made = tensors_of(world.speech, list(NAMES.values()), waveform)
    npz = reference(world.folder / "torch.npz", {name: made[tensor] for name, tensor in NAMES.items()}, waveform)
    result = diagnose(npz, world.speech, threads=1)
    assert [figures.right for figures in result.named] == [True] * 4
    assert result.exit_code == 0
    model = FAMILIES["wav2vec2"](17)
    FAULTS["coupled"](model, 2)
    other = save_as(model, world.folder / "coupled.onnx", "float32")
    result = diagnose(npz, other, threads=1)
    assert [figures.right for figures in result.named] == [True, True, False, False]
    assert result.verdict.startswith("wrong from 2.ffn.norm on (LayerNormalization 2.ffn.norm.")
    assert result.exit_code == 1
    code, out, _ = run("diagnose", str(npz), str(other), "--threads", "1", "--cache", str(world.options["cache"]))
    assert code == 1
    assert "1.attention.join" in out


def test_a_tensor_that_is_wrong_in_its_last_frames_alone(world: World) -> None:
    waveform = (0.1 * np.random.default_rng(0).standard_normal((1, 8_000))).astype(np.float32)
    made = tensors_of(world.speech, list(NAMES.values()), waveform)
    wrong = made["3.ffn.join.out"].copy()
    wrong[:, -3:] += 1.0
    tensors = {"first": made["stem.gelu.Mul2.out"], "3.ffn.join": wrong}
    result = diagnose(reference(world.folder / "last.npz", tensors, waveform), world.speech, threads=1)
    assert result.verdict.startswith("wrong from 3.ffn.join on (Add 3.ffn.join): wrong only in the last 3 of ")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"waveform": np.zeros(100, np.float32), "x": np.ones(3, np.float32)}, "must hold `rate`"),
        ({"rate": np.array(16_000), "waveform": np.zeros(100, np.float32)}, "holds no tensor beside"),
        ({"rate": np.array(16_000), "waveform": np.full(9, np.nan, np.float32), "x": np.ones(3, np.float32)}, "finite"),
        ({"rate": np.array(0.5), "waveform": np.zeros(9, np.float32), "x": np.ones(3, np.float32)}, "whole rate"),
        ({"rate": np.array([object()])}, "no .npz file of plain arrays"),
    ],
)
def test_an_npz_that_is_no_reference_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        diagnose(tmp_path / "r.npz", tmp_path / "missing.onnx")


def test_arguments_that_exclude_each_other(world: World) -> None:
    with pytest.raises(UsageError, match="--fix needs the points"):
        world.diagnose(points=False, fix=world.folder / "x.onnx")
    with pytest.raises(UsageError, match="--budget"):
        world.diagnose(budget=-1)
    with pytest.raises(UsageError, match="--fix takes operators from A"):
        diagnose(world.folder / "torch.npz", world.speech, fix=world.folder / "x.onnx")
