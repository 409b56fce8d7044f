"""`compare`: models and results in every combination, what is measured beside the scores, the verdict, and all formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import numpy as np
import onnx
import pytest
from cli_world import run, said
from corpus import DIM, write_encoder, write_task, write_tones
from made_results import classes, rng, saved
from onnx import numpy_helper

import xares_onnx
from xares_onnx.encoder import processor, speed
from xares_onnx.errors import DataError, ModelError, UsageError
from xares_onnx.evaluation.comparison import compare
from xares_onnx.evaluation.differences import AverageDifference
from xares_onnx.evaluation.evaluation import evaluate
from xares_onnx.evaluation.verdict import Comparison, Speed, verdict
from xares_onnx.progress import Event, Progress

pytestmark = pytest.mark.usefixtures("shared_process")


class World:
    """An encoder, a copy that hears four of its bands only, and one with other dimensions; a task, and their results."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.cache = folder, folder / "data", folder / "cache"
        self.task = str(write_task(folder))
        write_tones(self.data, train=64, valid=24, test=120, noise=2)
        self.a = write_encoder(folder / "full.onnx")
        self.b = self.changed("deaf.onnx", np.eye(DIM) * (np.arange(DIM) < 4))
        self.less = self.changed("less.onnx", np.eye(DIM)[:8])
        self.options: dict[str, Any] = {"data": self.data, "cache": self.cache}
        for model in (self.a, self.b):
            evaluate(model, [self.task], output=folder / f"{model.stem}.json", **self.options)
        self.results = folder / "full.json", folder / "deaf.json"

    def changed(self, name: str, mix: Any) -> Path:
        """The encoder with other filters: `mix` times its own."""
        model = onnx.load(write_encoder(self.folder / name))
        (filters,) = (tensor for tensor in model.graph.initializer if tensor.name == "filters")
        mixed = np.einsum("ij,jks->iks", mix, numpy_helper.to_array(filters)).astype(np.float32)
        filters.CopyFrom(numpy_helper.from_array(mixed, "filters"))
        model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = len(mixed)
        onnx.save(model, self.folder / name)
        return self.folder / name

    def compare(self, a: Path, b: Path, **options: Any) -> Comparison:
        return compare(a, b, options.pop("tasks", [self.task]), **{**self.options, **options})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def of_models(world: World) -> Comparison:
    return world.compare(world.a, world.b)


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_TURN_SECONDS", 0.001)


def test_models_and_their_results_say_the_same(world: World, of_models: Comparison) -> None:
    of_results = compare(*world.results)
    assert of_results.tasks == of_models.tasks
    assert {d.method: d.verdict for d in of_models.tasks} == {"linear": "worse", "knn": "worse"}
    for mixed in (world.compare(world.results[0], world.b), world.compare(world.a, world.results[1])):
        assert mixed.tasks == of_models.tasks
        assert (mixed.drift, mixed.memory) == (None, None)
    swapped = compare(*world.results[::-1])
    for forth, back in zip(of_models.tasks, swapped.tasks, strict=True):
        assert back.difference == pytest.approx(-forth.difference)
        assert back.ci95 == pytest.approx((-forth.ci95[1], -forth.ci95[0]))  # type: ignore[index]
    assert {d.method for d in of_models.failed} == {"linear", "knn"}
    assert swapped.failed == []


def test_a_model_against_itself(world: World) -> None:
    found = world.compare(world.a, world.a)
    assert found.outcome == "unclear"  # 120 clips cannot exclude a loss of 0.01
    assert all((d.difference, d.alike) == (0, True) for d in found.tasks)
    assert all(d.ci95 == pytest.approx((-3 / 120, 3 / 120), rel=0.03) for d in found.tasks)
    (drift,) = found.drift or []
    assert (drift.cosine_min, drift.cka) == (pytest.approx(1), pytest.approx(1))
    assert found.verdict.startswith("B against A: every clip is scored alike; ")


def test_embeddings_drift(world: World, of_models: Comparison) -> None:
    (drift,) = of_models.drift or []
    assert drift.clips == 64 + 24 + 120
    with xares_onnx.load_encoder(world.a, cache=world.cache) as encoder:
        assert encoder.contract.dim == DIM
    assert 0 < drift.cosine_min < drift.cosine_p05 < drift.cosine_mean < 0.99  # type: ignore[operator]
    assert 0 < drift.cka < 1  # type: ignore[operator]
    (other,) = world.compare(world.a, world.less, methods=["knn"]).drift or []
    assert other.cosine_mean is None
    assert 0 < other.cka < 1  # type: ignore[operator]


def test_costs_are_measured_together(of_models: Comparison) -> None:
    assert of_models.speed is not None
    assert of_models.speed.together
    assert of_models.speed.low <= of_models.speed.ratio <= of_models.speed.high  # type: ignore[operator]
    assert of_models.speed.rtf_a > 0
    assert of_models.memory is None or min(of_models.memory.bytes_a, of_models.memory.bytes_b) > 20e6
    assert of_models.size_ratio == pytest.approx(of_models.b.bytes / of_models.a.bytes)


def test_speed_of_results_is_what_was_recorded(world: World) -> None:
    recorded = compare(*world.results).speed
    assert recorded is not None
    assert not recorded.together
    rtfs = [json.loads(path.read_bytes())["tasks"][0]["rtf"] for path in world.results]
    assert (recorded.rtf_a, recorded.rtf_b) == pytest.approx(tuple(rtfs))
    assert "as recorded, not measured together" in compare(*world.results).verdict


def test_a_model_beside_a_result_is_evaluated_as_that_was(world: World, tmp_path: Path) -> None:
    evaluate(world.a, [world.task], output=tmp_path / "a.json", protocol="xares", limit=30, methods=["knn"], **world.options)
    found = world.compare(tmp_path / "a.json", world.b)
    assert found.settings == {"protocol": "xares", "seeds": 1, "limit": 30}
    assert [d.method for d in found.tasks] == ["knn"]
    assert found.tasks[0].clips == 30
    with pytest.raises(UsageError, match="--limit 30 and this run with 20"):
        world.compare(tmp_path / "a.json", world.b, limit=20)


def test_events_tell_of_which_model_they_are(world: World) -> None:
    told: list[Event] = []
    world.compare(world.a, world.b, methods=["knn"], observer=told.append)
    tasks = {event.task for event in told if isinstance(event, Progress) and event.stage == "embed"}
    assert tasks == {"tones of full.onnx", "tones of deaf.onnx"}
    assert any(isinstance(event, Progress) and event.stage == "measure" for event in told)


def test_a_broken_model_is_known_before_the_other_is_evaluated(world: World, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    told: list[Event] = []
    with pytest.raises(ModelError, match=r"broken\.onnx"):
        world.compare(world.a, broken, observer=told.append)
    assert not any(isinstance(event, Progress) and event.stage in ("embed", "train") for event in told)


def test_tasks_choose_among_stored_scores(tmp_path: Path) -> None:
    kept = classes({"x": rng(1).random((3, 30)) < 0.8})
    paths = [saved(tmp_path / f"{name}.json", {"esc50": kept, "desed": kept}) for name in "ab"]
    assert [d.task for d in compare(*paths, ["esc*"]).tasks] == ["esc50"]
    assert [d.task for d in compare(*paths).tasks] == ["esc50", "desed"]
    with pytest.raises(UsageError, match="holds no task 'clotho'"):
        compare(*paths, ["clotho"])
    with pytest.raises(UsageError, match="nothing to evaluate with --protocol"):
        compare(*paths, protocol="xares")
    other = saved(tmp_path / "c.json", {"clotho": kept})
    with pytest.raises(UsageError, match="no score of the same task"):
        compare(paths[0], other)


def test_a_task_that_fails_leaves_the_others(world: World, tmp_path: Path) -> None:
    cut = str(write_task(tmp_path, "cut"))
    write_tones(world.data, "cut", train=16, valid=8, test=8)
    shard = world.data / "cut/test-0.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    found = world.compare(world.a, world.b, tasks=[world.task, cut], methods=["knn"])
    assert [d.task for d in found.tasks] == ["tones"]
    assert [(failure.model, failure.exit_code) for failure in found.failures] == [("full.onnx", 4), ("deaf.onnx", 4)]


# ---------------------------------------------------------------- words


def word(found: Comparison, **fields: Any) -> str:
    return verdict(msgspec.structs.replace(found, **fields)).split(": ", 1)[1]


def test_the_verdict_names_losses_gains_and_costs(of_models: Comparison) -> None:
    linear, knn = of_models.tasks
    changes = {"difference": -0.008, "ci95": (-0.013, -0.003), "per_seed": [-0.01, -0.006], "verdict": "worse"}
    lost = msgspec.structs.replace(linear, **changes)
    gained = msgspec.structs.replace(knn, difference=0.02, ci95=(0.01, 0.03), per_seed=[0.02], verdict="better")
    clock = Speed(rtf_a=0.03, rtf_b=0.02, ratio=1.5, low=1.4, high=1.6, together=True)
    costs = {"speed": clock, "memory": None, "averages": []}
    text = word(of_models, tasks=[lost, gained], **costs)
    assert text.startswith(
        "loses 0.8 +- 0.5 points on Tones tones (linear); gains 2.0 +- 1.0 points on Tones tones (kNN); 1.5x"
    )
    assert word(of_models, tasks=[lost], **costs).startswith("loses 0.8 +- 0.5 points on Tones tones; ")
    doubtful = msgspec.structs.replace(lost, per_seed=[-0.03, 0.01])
    assert "Tones tones (not with every seed);" in word(of_models, tasks=[doubtful], **costs)
    same = msgspec.structs.replace(linear, difference=0.001, ci95=(-0.002, 0.004), verdict="same")
    unclear = msgspec.structs.replace(linear, difference=0.001, ci95=(-0.03, 0.04), verdict="unclear")
    text = word(of_models, tasks=[same, unclear], **costs)
    assert text.startswith("the same within 1 point on 1 of 2 scores; no difference beyond noise, but too few clips")
    average = AverageDifference(
        group="public",
        method="head",
        tap=None,
        a=0.5,
        b=0.496,
        difference=-0.004,
        ci95=(-0.007, -0.001),
        detectable=0.004,
        tolerance=0.01,
        verdict="worse",
        tasks=["esc50", "desed"],
    )
    text = word(of_models, tasks=[same], **{**costs, "averages": [average]})
    assert "; -0.4 +- 0.3 points in the head average over public tasks; 1.5x as fast" in text
    slow = msgspec.structs.replace(clock, ratio=0.5, low=0.4, high=0.6)
    assert "2.0x as slow" in word(of_models, **{**costs, "speed": slow})
    assert "within the noise of the clock" in word(of_models, **{**costs, "speed": msgspec.structs.replace(clock, low=0.9)})


@pytest.mark.parametrize(
    ("ratio", "text"), [(1.5, "1.5x"), (0.27, "0.27x"), (0.0271, "0.027x"), (13.4, "13x"), (1.0, "1.0x")]
)
def test_factors_have_two_digits(ratio: float, text: str) -> None:
    assert speed.factor(ratio) == text


# ---------------------------------------------------------------- the command line


def command(world: World, *arguments: str) -> tuple[int, str, str]:
    return run("compare", *map(str, world.results), *arguments)


def test_text_has_what_failed_first(world: World) -> None:
    code, out, err = command(world)
    assert code == 1
    assert out.startswith("worse by more than the tolerance for certain\n")
    assert "deaf.onnx against full.onnx: loses" in out
    assert said(err).startswith("B is worse by more than 0.01 for certain on 2 of the scores, tones linear first")
    assert run("compare", *map(str, world.results[::-1]))[0] == 0
    code, out, _ = command(world, "--tolerance", "0.9", "--quiet")
    assert (code, out.count("\n")) == (0, 1)


def test_json_junit_and_github(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = command(world, "--format", "json")
    read = msgspec.json.decode(out, type=Comparison)
    assert (code, read.outcome, len(read.tasks)) == (1, "worse", 2)
    code, out, _ = command(world, "--format", "junit")
    root = ElementTree.fromstring(out)
    assert (code, root.get("tests"), root.get("failures")) == (1, "2", "2")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    code, out, _ = command(world, "--format", "github")
    assert out.count("::error ") == 2
    assert "| tones linear | accuracy | 120 |" in out
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    code, out, _ = command(world, "--format", "github")
    assert "| tones linear | accuracy | 120 |" in summary.read_text()
    assert "| tones linear" not in out


def test_wrong_usage_is_one_line(world: World, tmp_path: Path) -> None:
    for arguments, message in (
        ([*map(str, world.results), "--format", "xml"], "--format 'xml' must be"),
        ([*map(str, world.results), "--tolerance", "2"], "scores are fractions"),
        ([*map(str, world.results), "--seeds", "3"], "nothing to evaluate with --seeds"),
        ([str(world.a), str(tmp_path / "gone.json")], "there is no result file"),
    ):
        code, _, err = run("compare", *arguments)
        assert code == 2
        assert message in said(err)
    assert run("compare", str(world.a), str(tmp_path / "gone.onnx"))[0] == 3


def test_other_data_end_in_exit_code_4(world: World, tmp_path: Path) -> None:
    raw = json.loads(world.results[1].read_bytes())
    for of in raw["tasks"]:
        of["data_digest"] = "other"
    other = world.folder / "other.json"
    other.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="other data of tones"):
        compare(world.results[0], other)
    assert run("compare", str(world.results[0]), str(other))[0] == 4


def test_the_processor_is_recorded_beside_the_provider(world: World, of_models: Comparison) -> None:
    sets = processor.instruction_sets()
    recorded = None if sets is None else list(sets)
    assert of_models.a.instruction_sets == of_models.b.instruction_sets == recorded
    assert json.loads(world.results[0].read_text())["environment"]["machine"]["instruction_sets"] == recorded


def test_another_processor_is_said(world: World) -> None:
    """And one that was not recorded, or is no list, is none."""
    raw = json.loads(world.results[0].read_text())
    paths = []
    for name, sets in {"old": ["avx2", "fma"], "new": ["avx2", "fma", "avx512_vnni"], "none": None, "odd": "avx2"}.items():
        raw["environment"]["machine"]["instruction_sets"] = sets
        paths.append(world.folder / f"{name}.json")
        paths[-1].write_text(json.dumps(raw))
        folder = world.folder / f"{name}.predictions"
        shutil.copytree(world.folder / "full.predictions", folder, dirs_exist_ok=True)
    old, new, none, odd = paths
    said = "the processors differ, and the numbers of a model in 8 bits may depend on them: only {}'s has avx512_vnni"
    assert said.format("B") in compare(old, new).notes
    assert said.format("A") in compare(new, old).notes
    for one, other in ((old, old), (old, none), (odd, new), (none, none)):
        assert not [note for note in compare(one, other).notes if "processors" in note]
