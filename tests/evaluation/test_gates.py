"""Gates: what may be asked for, when it is refused, what fails and what only warns; through the command line too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cli_world import World, run, said
from corpus import write_encoder, write_task, write_tones
from made_results import accuracy, classes, record, result, rng, saved, side

from xares_onnx.data.catalog import shipped_tasks
from xares_onnx.data.task import Task
from xares_onnx.errors import DataError, DataMissingError, UsageError
from xares_onnx.evaluation import evaluation
from xares_onnx.evaluation.differences import Side
from xares_onnx.evaluation.gates import Floor, Gates
from xares_onnx.evaluation.record import Average, Gate, TaskResult
from xares_onnx.progress import Progress

pytestmark = pytest.mark.usefixtures("shared_process")

SETTINGS: dict[str, Any] = {"protocol": "corrected", "seeds": 3, "limit": None, "methods": ["head", "knn"]}
ESC50 = shipped_tasks()["esc50"]


def kept(seed: int, clips: int = 200, share: float = 0.8) -> Any:
    return classes({"x": rng(seed).random((3, clips)) < share})


# ---------------------------------------------------------------- floors


@pytest.mark.parametrize(
    ("text", "floor"),
    [
        ("esc50=0.8", Floor("esc50", "head", 0.8)),
        ("esc50:knn=.5", Floor("esc50", "knn", 0.5)),
        ("librispeech:ctc=0", Floor("librispeech", "ctc", 0)),
        ("public=0.6", Floor("public", "head", 0.6)),
    ],
)
def test_a_floor_names_a_task_a_method_and_a_score(text: str, floor: Floor) -> None:
    assert Floor.parsed(text) == floor


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("esc50", "must read TASK=SCORE"),
        ("esc50=", "must read TASK=SCORE"),
        ("=0.8", "must read TASK=SCORE"),
        ("esc50=nan", "must read TASK=SCORE"),
        ("esc50=inf", "must read TASK=SCORE"),
        ("esc50=-0.1", "must read TASK=SCORE"),
        ("esc50:mlp=0.8", "method 'mlp' must be one of head, knn, "),
        ("esc50:=0.8", "method '' must be one of"),
    ],
)
def test_a_floor_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Gates.read(None, None, [text])


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("esc5=0.8", {}, "did you mean 'esc50'"),
        ("desed=0.8", {}, "names a task that is not selected"),
        ("esc50=80", {}, "write 0.8 for 80 %"),
        ("esc50:ctc=0.8", {}, "esc50 is scored by linear and knn"),
        ("clotho:knn=0.8", {}, "clotho is scored by retrieval"),
        ("esc50=0.8", {"methods": ["knn"]}, "needs a head score, which --method knn leaves out"),
        ("esc50:knn=0.8", {"methods": ["head"]}, "needs a knn score"),
        ("music=0.8", {}, "no task of music is selected"),
        ("public=0.8", {"limit": 9}, "with --limit there is none"),
        ("public:linear=0.8", {}, "write public:head"),
        ("public=1.5", {}, "write 0.015"),
    ],
)
def test_a_floor_that_could_not_be_judged_is_refused_before_any_work(text: str, settings: Any, message: str) -> None:
    tasks = [ESC50, shipped_tasks()["clotho"]]
    with pytest.raises(UsageError, match=message):
        Gates.read(None, None, [text]).check(tasks, {**SETTINGS, **settings})


def judged(*texts: str, **fields: Any) -> list[Gate]:
    average = Average(weighted=0.6, mean=0.5, ci95=None, tasks=2, complete=True, missing=[])
    records = [
        record("esc50", 0.1, tap="layer3"),  # a floor is for the model's output
        record("esc50", 0.8),
        record("esc50", 0.7, method="knn"),
        record("speechocean762", 4.0, metric="mse", higher_is_better=False),
        record("desed", None, reason="a shard is damaged"),
    ]
    made = result(records, averages={"public": {"head": average}})
    return Gates.read(None, None, texts).judge(Side("this run", made, lambda _: {}))


def test_floors_fail_below_and_errors_above() -> None:
    found = judged(
        "esc50=0.8", "esc50:knn=0.71", "esc50:linear=0.81", "speechocean762=4.1", "speechocean762=3.9", "public=0.6"
    )
    outcomes = {(gate.task, gate.method, gate.limit): (gate.status, gate.message) for gate in found}
    assert outcomes == {
        ("esc50", "knn", 0.71): ("fail", "0.700 is below 0.71"),
        ("esc50", "linear", 0.81): ("fail", "0.800 is below 0.81"),
        ("speechocean762", "head", 3.9): ("fail", "4.000 is above 3.9"),
        ("esc50", "head", 0.8): ("pass", "0.800 reaches 0.8"),
        ("speechocean762", "head", 4.1): ("pass", "4.000 stays within 4.1"),
        ("public", "head", 0.6): ("pass", "0.600 reaches 0.6"),
    }
    assert [gate.status for gate in found] == ["fail"] * 3 + ["pass"] * 3  # what failed comes first


def test_an_error_at_its_limit_passes() -> None:
    (gate,) = judged("speechocean762=4")
    assert gate.status == "pass"


def test_the_limit_of_an_error_may_be_above_1() -> None:
    Gates.read(None, None, ["speechocean762=4"]).check([shipped_tasks()["speechocean762"]], SETTINGS)


def test_no_score_fails_a_floor() -> None:
    found = judged("desed=0.1", "music=0.1")
    assert [(gate.status, gate.message) for gate in found] == [
        ("fail", "no score (failed: a shard is damaged)"),
        ("fail", "no score (no task of it has a comparable score)"),
    ]


# ---------------------------------------------------------------- baselines


def against(a: Any, b: Any, tolerance: float = 0.01) -> list[Gate]:
    return Gates(side("base", {"esc50": a}), tolerance).judge(side("this run", {"esc50": b}))


def test_a_certain_loss_fails_and_one_that_may_be_noise_warns() -> None:
    base = kept(1)
    loses = {**base, "prediction": np.where(rng(2).random(600) < 0.2, -1, base["prediction"])}
    (failed,) = against(base, loses)
    assert failed.status == "fail"
    assert failed.difference is not None
    assert failed.difference < failed.ci95[1] < -0.01  # type: ignore[index]
    assert "worse by more than 0.01 for certain" in failed.message
    (gained,) = against(loses, base)
    assert gained.status == "pass"
    (tolerated,) = against(base, loses, tolerance=0.3)
    assert (tolerated.status, tolerated.limit) == ("pass", 0.3)
    few, fewer = (classes({"x": rng(seed).random((3, 12)) < 0.8}) for seed in (1, 2))
    (unsure,) = against(few, fewer)
    assert unsure.status == "warn"
    assert "too few test clips to tell" in unsure.message
    for tolerance, status in ((0.01, "warn"), (0.02, "pass")):  # 200 clips bound a difference by 3 / 200
        (same,) = against(base, base, tolerance=tolerance)
        assert (same.status, same.difference) == (status, 0)


def test_a_score_that_is_gone_fails_and_one_not_asked_for_is_skipped() -> None:
    a = kept(1)
    base = side("base", {"esc50": a, "desed": a, "fsd50k": a})
    records = [record("esc50", accuracy(a)), record("desed", None, reason="damaged"), record("clotho", accuracy(a))]
    found = Gates(base).judge(Side("this run", result(records), lambda _: a))
    assert {gate.task: gate.status for gate in found} == {
        "desed": "fail",
        "esc50": "warn",
        "fsd50k": "skip",
        "clotho": "skip",
    }
    assert found[0].message == "no score in this run: failed: damaged"


@pytest.mark.parametrize(
    ("settings", "fields", "error", "message"),
    [
        ({"limit": 9}, {}, UsageError, "--limit"),
        ({"protocol": "xares"}, {}, UsageError, "--protocol"),
        ({}, {"definition_digest": "other"}, UsageError, "defined differently in base.json"),
        ({}, {"task": "desed"}, UsageError, "base.json has no score of any selected task"),
        ({}, {"score": 0.5}, DataError, "another run's"),
        ({}, {"predictions": None}, DataMissingError, "keeps no predictions"),
        ({}, {"predictions": "base.predictions/gone.npz"}, DataMissingError, "keep them beside base.json"),
    ],
)
def test_a_baseline_that_could_not_be_judged_is_refused_before_any_work(
    tmp_path: Path, settings: Any, fields: Any, error: type[Exception], message: str
) -> None:
    path = saved(tmp_path / "base.json", {"esc50": kept(1)})
    raw = json.loads(path.read_bytes())
    raw["tasks"][0] |= {"definition_digest": ESC50.digest(), **fields}
    path.write_text(json.dumps(raw))
    gates = Gates.read(path, None, [])
    with pytest.raises(error, match=message):
        gates.check([ESC50], {**SETTINGS, **settings})


def test_a_baseline_of_other_data_is_refused(tmp_path: Path) -> None:
    gates = Gates.read(saved(tmp_path / "base.json", {"esc50": kept(1)}), None, [])
    gates.check_data(ESC50, "data")
    gates.check_data(shipped_tasks()["desed"], "anything")
    with pytest.raises(DataError, match="other data of esc50"):
        gates.check_data(ESC50, "other")


def test_a_run_by_one_method_is_held_to_the_baselines_scores_by_that_method() -> None:
    """Its predictions by the other are not even read, for nothing is compared with them."""
    of_head, of_knn = kept(0), kept(1)
    records = [record("esc50", accuracy(of_head)), record("esc50", accuracy(of_knn), method="knn")]
    read: list[str] = []

    def predictions_of(of: TaskResult) -> Any:
        read.append(of.method)
        return of_head if of.method == "linear" else of_knn

    fields = {"definition_digest": ESC50.digest()}
    records = [msgspec.structs.replace(of, **fields) for of in records]
    tasks = [ESC50]
    for method, name in (("head", "linear"), ("knn", "knn")):
        read.clear()
        Gates(Side("base", result(records), predictions_of)).check(tasks, {**SETTINGS, "methods": [method]})
        assert read == [name]
    neighbours_only = Gates(Side("base", result(records[1:]), predictions_of))
    with pytest.raises(UsageError, match="base has no score of any selected task"):
        neighbours_only.check(tasks, {**SETTINGS, "methods": ["head"]})


def test_a_tolerance_needs_a_baseline() -> None:
    with pytest.raises(UsageError, match="requires --baseline"):
        Gates.read(None, 0.02, [])


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("gates"))
    write_tones(
        world.data, "good", train=24, valid=8, test=60, noise=8.0
    )  # enough clips, and enough mistakes, to be certain
    return world


@pytest.fixture(scope="module")
def paths(world: World) -> dict[str, Path]:
    """A baseline that is the model's own result, and one whose head and kNN are always right."""
    own = world.folder / "base.json"
    where = ["--data", str(world.data), "--cache", str(world.cache)]
    assert run("evaluate", world.model, "--tasks", world.good, "--output", str(own), "--quiet", *where)[0] == 0
    perfect = world.folder / "perfect.json"
    made = msgspec.json.decode(own.read_bytes(), type=evaluation.Result)
    records, predictions = [], {}
    for of in made.tasks:
        with np.load(own.parent / str(of.predictions)) as rows:
            columns = dict(rows)
        columns["prediction"] = columns["target"]
        predictions[of.task, of.method] = columns
        name = str(of.predictions).replace("base.", "perfect.")
        records.append(msgspec.structs.replace(of, score=1.0, predictions=name))
    evaluation.results.write_result(perfect, msgspec.structs.replace(made, tasks=records), predictions)
    return {"own": own, "perfect": perfect}


def gated(world: World, *arguments: str) -> tuple[int, str, str]:
    where = ["--data", str(world.data), "--cache", str(world.cache), "--tasks", world.good]
    return run("evaluate", world.model, "--output", str(world.folder / "out.json"), *where, *arguments)


def test_its_own_result_is_no_loss(world: World, paths: dict[str, Path]) -> None:
    code, out, _ = gated(world, "--baseline", str(paths["own"]))
    assert code == 0
    assert out.index("baseline") < out.index("task ")  # gates before scores
    recorded = json.loads((world.folder / "out.json").read_bytes())
    assert [(gate["status"], gate["difference"]) for gate in recorded["gates"]] == [("warn", 0)] * 2  # 60 clips
    assert recorded["settings"]["baseline"]["file"] == "base.json"
    assert recorded["settings"]["tolerance"] == 0.01


def test_a_loss_ends_in_exit_code_1(world: World, paths: dict[str, Path]) -> None:
    code, out, err = gated(world, "--baseline", str(paths["perfect"]), "--quiet", "--tolerance", "0.001")
    assert (code, out) == (1, "")
    assert err.startswith("xares-onnx: baseline: good linear: 1.000 -> ")
    recorded = json.loads((world.folder / "out.json").read_bytes())
    assert recorded["gates"][0]["status"] == "fail"
    assert recorded["gates"][0]["ci95"][1] < -0.001


def test_too_few_clips_to_tell_end_in_exit_code_0(world: World, paths: dict[str, Path]) -> None:
    """A tolerance in the middle of the interval: the loss may be larger, or not."""

    def knn(*arguments: str) -> tuple[int, str, list[Any]]:
        code, out, _ = gated(world, "--baseline", str(paths["perfect"]), "--method", "knn", *arguments)
        return code, out, json.loads((world.folder / "out.json").read_bytes())["gates"]

    low, high = knn()[2][0]["ci95"]
    assert low < high < 0
    code, out, gates = knn("--tolerance", str(-(low + high) / 2))
    assert (code, [gate["status"] for gate in gates]) == (0, ["warn", "skip"])
    assert "too few test clips to tell" in out


def test_a_floor_ends_in_exit_code_1_and_json_stays_json(world: World) -> None:
    code, out, err = gated(world, "--fail-under", "good:knn=0.99,good=0", "--json")
    assert code == 1
    assert [gate["status"] for gate in json.loads(out)["gates"]] == ["fail", "pass"]
    assert "fail-under: good knn: " in err
    assert gated(world, "--fail-under", "good=0", "--quiet")[0] == 0


def test_other_failures_come_before_a_gate(world: World) -> None:
    where = ["--data", str(world.data), "--cache", str(world.cache), "--method", "knn", "--quiet"]
    arguments = ["--tasks", f"{world.good},{world.cut}", "--fail-under", "good:knn=1,cut:knn=0"]
    assert run("evaluate", world.model, "--output", str(world.folder / "out.json"), *where, *arguments)[0] == 4


def test_a_wrong_gate_is_said_before_the_model_is_loaded(world: World, tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{}")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    for arguments, message in (
        (["--baseline", str(tmp_path / "no.json")], "is not a result"),
        (["--baseline", str(tmp_path / "gone.json")], "there is no result file"),
        (["--fail-under", "god=0.5"], "did you mean 'good'"),
    ):
        where = ["--data", str(world.data), "--tasks", world.good, "--cache", str(world.cache)]
        code, _, err = run("evaluate", str(broken), *where, *arguments)
        assert code == 2
        assert message in said(err)


def test_a_baseline_of_other_data_is_refused_before_anything_is_embedded(tmp_path: Path) -> None:
    model, task, data = write_encoder(tmp_path / "bank.onnx"), write_task(tmp_path), tmp_path / "data"
    write_tones(data, train=16, valid=8, test=8)
    options: dict[str, Any] = {"data": data, "cache": tmp_path / "cache", "methods": ["knn"]}
    evaluation.evaluate(model, [str(task)], output=tmp_path / "base.json", **options)
    write_tones(data, train=16, valid=8, test=8, seed=5)
    embedded = []

    def watch(event: Any) -> None:
        embedded.extend([event] if isinstance(event, Progress) and event.stage == "embed" else [])

    with pytest.raises(DataError, match="other data of tones"):
        evaluation.evaluate(model, [str(task)], baseline=tmp_path / "base.json", observer=watch, **options)
    assert embedded == []


def test_a_users_task_is_gated_by_its_name() -> None:
    own: Task = msgspec.structs.replace(ESC50, name="mine")
    floors = Gates.read(None, None, ["mine=0.5", "mine:knn=0.5", "own=0.5"])
    floors.check([own], SETTINGS)
    average = Average(weighted=0.6, mean=0.6, ci95=None, tasks=1, complete=True, missing=[])
    scores = result([record("mine", 0.4), record("mine", 0.7, method="knn")], averages={"own": {"head": average}})
    gates = floors.judge(Side("this run", scores, lambda _: {}))
    assert [(gate.task, gate.method, gate.status, gate.score) for gate in gates] == [
        ("mine", "head", "fail", 0.4),
        ("mine", "knn", "pass", 0.7),
        ("own", "head", "pass", 0.6),
    ]
    for text, message in (("esc50=0.5", "names a task that is not selected"), ("public=0.5", "no task of public")):
        with pytest.raises(UsageError, match=message):
            Gates.read(None, None, [text]).check([own], SETTINGS)
