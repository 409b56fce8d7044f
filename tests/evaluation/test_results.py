"""The record of a real evaluation: its schema, what it must hold, what can be recomputed from it, and its averages."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from corpus import tones, write_encoder, write_task, write_tones
from shard_makers import write_shard

from xares_onnx.data.catalog import in_group, shipped_tasks
from xares_onnx.data.shards import Clips, Drop
from xares_onnx.data.task import Task, load_task
from xares_onnx.errors import MachineError, UsageError
from xares_onnx.evaluation import record as results
from xares_onnx.evaluation.averages import averages, published_averages
from xares_onnx.evaluation.evaluation import evaluate
from xares_onnx.evaluation.record import Seconds, TaskResult, make_room
from xares_onnx.files import indented
from xares_onnx.metrics.intervals import Estimate

pytestmark = pytest.mark.usefixtures("shared_process")

Record = dict[str, Any]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved result: two tasks scored by head and kNN, of which one has folds, and one that a damaged shard made fail."""
    folder = tmp_path_factory.mktemp("results")
    tasks = [write_task(folder, "good"), write_task(folder, "folded", folds=3), write_task(folder, "cut")]
    for number, count in enumerate((20, 30, 16)):
        write_shard(folder / f"data/folded/fold{number}-0.tar", tones(count, number, noise=3))
    for name in ("good", "cut"):
        write_tones(folder / "data", name)
    shard = folder / "data/cut/test-0.tar"
    shard.write_bytes(shard.read_bytes()[:50_000])
    model = write_encoder(folder / "bank.onnx")
    output = folder / "out" / "result.json"
    evaluate(model, [str(task) for task in tasks], data=folder / "data", cache=folder / "cache", output=output)
    return output


@pytest.fixture
def record(path: Path) -> Record:
    loaded: Record = json.loads(path.read_bytes())
    return loaded


@pytest.fixture(scope="module")
def schema() -> Record:
    loaded: Record = json.loads((resources.files("xares_onnx.evaluation") / "result.schema.json").read_bytes())
    return loaded


# ---------------------------------------------------------------- the schema


def test_shipped_schema_is_fresh() -> None:
    shipped = (resources.files("xares_onnx.evaluation") / "result.schema.json").read_bytes()
    assert shipped == indented(results.schema()), (
        "run: python -m xares_onnx.evaluation.record > xares_onnx/evaluation/result.schema.json"
    )


def test_result_fits_the_schema(record: Record, schema: Record) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(record, schema)


def remove(*keys: str | int) -> Callable[[Record], None]:
    def change(record: Any) -> None:
        for key in keys[:-1]:
            record = record[key]
        del record[keys[-1]]

    return change


def put(value: Any, *keys: str | int) -> Callable[[Record], None]:
    def change(record: Any) -> None:
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        remove("encoder"),
        remove("schema_version"),
        remove("tasks", 0, "score"),
        remove("tasks", 0, "clips", "dropped"),
        put("0.5", "tasks", 0, "score"),
        put([0.1], "tasks", 0, "ci95"),
        put("fine", "tasks", 0, "status"),
        put("mlp", "tasks", 0, "method"),
        put(["a clip"], "tasks", 0, "clips", "dropped"),
        put({"head": {"weighted": 1}}, "averages", "public"),
    ],
)
def test_schema_refuses_what_is_no_result(record: Record, schema: Record, change: Callable[[Record], None]) -> None:
    changed = copy.deepcopy(record)
    changed["averages"]["public"] = {}
    jsonschema.validate(changed, schema)
    change(changed)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, schema)


def test_every_field_is_written(record: Record) -> None:
    assert record["schema_version"] == 1
    assert {"schema_version", "encoder", "environment", "settings", "created", "tasks", "averages"} <= set(record)
    assert {"file", "sha256", "bytes", "contract", "taps"} <= set(record["encoder"])
    assert all(set(field) == {"value", "source"} for field in record["encoder"]["contract"].values())
    assert {"versions", "provider", "machine"} <= set(record["environment"])
    assert {"protocol", "seeds"} <= set(record["settings"])
    wanted = (
        "task title domain status reason method tap metric higher_is_better score ci95 metrics per_fold per_seed n_test "
        "weight comparable published clips data_digest definition_digest seconds audio_hours rtf predictions"
    )
    for task in record["tasks"]:
        assert set(wanted.split()) <= set(task)
        assert set(task["clips"]) == {"expected", "read", "dropped", "events_outside"}
        assert set(task["seconds"]) == {"embed", "train", "score"}
    assert [(task["task"], task["method"], task["status"]) for task in record["tasks"]] == [
        ("good", "linear", "ok"),
        ("good", "knn", "ok"),
        ("folded", "linear", "ok"),
        ("folded", "knn", "ok"),
        ("cut", "linear", "failed"),
        ("cut", "knn", "failed"),
    ]
    average = record["averages"]["own"]["knn"]
    assert set(average) == {"weighted", "mean", "ci95", "tasks", "complete", "missing"}


def test_a_task_with_a_score_and_one_without(record: Record) -> None:
    good, cut = record["tasks"][0], record["tasks"][-1]
    assert 0.3 < good["score"] < 1
    assert good["ci95"][0] < good["score"] < good["ci95"][1]
    assert good["reason"] is None
    assert good["per_seed"] == [good["score"]]
    assert good["n_test"] == 48
    assert good["clips"] == {"expected": 136, "read": 136, "dropped": [], "events_outside": 0}
    assert good["audio_hours"] == pytest.approx(136 * 0.4 / 3600)
    assert set(good["metrics"]) == {"macro_f1", "balanced_accuracy"}
    assert cut["score"] is None
    assert cut["ci95"] is None
    assert cut["predictions"] is None
    assert "test-0.tar" in cut["reason"]


def test_scores_can_be_recomputed_from_the_predictions(path: Path, record: Record) -> None:
    for task in record["tasks"][:4]:
        with np.load(path.parent / task["predictions"], allow_pickle=False) as rows:
            key, fold, seed, target, prediction = (rows[name] for name in ("key", "fold", "seed", "target", "prediction"))
        assert len({len(column) for column in (key, fold, seed, target, prediction)}) == 1
        assert len(set(key)) == task["n_test"]
        right = target == prediction
        assert len(set(fold)) == (1 if task["task"] == "good" else 3)
        assert set(seed) == {0}  # nothing is drawn
        by_fold = [np.mean([right[(fold == f) & (seed == s)].mean() for s in np.unique(seed)]) for f in np.unique(fold)]
        by_seed = [np.mean([right[(fold == f) & (seed == s)].mean() for f in np.unique(fold)]) for s in np.unique(seed)]
        assert by_fold == pytest.approx(task["per_fold"])
        assert by_seed == pytest.approx(task["per_seed"])
        assert np.mean(by_seed) == pytest.approx(task["score"])
        shards = {"test-0.tar", "test-1.tar"} if task["task"] == "good" else {f"fold{i}-0.tar" for i in range(3)}
        assert {str(k).split("/")[0] for k in key} == shards


def test_predictions_lie_beside_the_result(path: Path, record: Record) -> None:
    named = {path.parent / task["predictions"] for task in record["tasks"] if task["predictions"]}
    assert named == set((path.parent / "result.predictions").iterdir())
    assert set(path.parent.iterdir()) == {path, path.parent / "result.predictions"}  # nothing half-written is left


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        make_room(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        make_room(tmp_path / "file" / "result.json")
    make_room(tmp_path / "new" / "deep" / "result.json")
    assert (tmp_path / "new/deep").is_dir()


# ---------------------------------------------------------------- averages


def scored(task: Task, score: float | None, method: str = "linear", **fields: Any) -> TaskResult:
    base: dict[str, Any] = {
        "task": task.name,
        "title": task.title,
        "domain": task.domain,
        "status": "ok" if score is not None else "failed",
        "method": method,
        "metric": "accuracy",
        "score": score,
        "clips": Clips(expected=0, read=0, dropped=[]),
        "definition_digest": "",
        "seconds": Seconds(embed=0, train=0, score=0),
    }
    return TaskResult(**{**base, **fields})


def members(group: str) -> list[Task]:
    return [task for task in shipped_tasks().values() if in_group(task, group)]


@pytest.mark.parametrize(
    ("encoder", "public", "everything"),
    [
        ("dasheng", 0.504, 0.683),
        ("wav2vec2", 0.262, 0.469),
        ("whisper", 0.299, 0.475),
        ("data2vec", 0.388, 0.455),
    ],
)
def test_published_averages_come_out_of_published_scores(encoder: str, public: float, everything: float) -> None:
    """The kNN table of X-ARES's README: every task's score, and the two weighted averages under it."""
    records = [
        scored(task, task.published.knn[encoder], "knn")
        for task in shipped_tasks().values()
        if task.published and encoder in task.published.knn
    ]
    assert len(records) == 20
    found = averages(records, {})
    assert found["public"]["knn"].weighted == pytest.approx(public, abs=0.001)
    assert found["all"]["knn"].weighted == pytest.approx(everything, abs=0.001)
    assert (found["public"]["knn"].tasks, found["all"]["knn"].tasks) == (16, 20)
    assert found["public"]["knn"].complete
    assert "head" not in found["public"]


@pytest.mark.parametrize(
    ("encoder", "public", "everything", "printed"),
    [
        ("dasheng", 0.694, 0.798, 0.699),
        ("wav2vec2", 0.484, 0.660, 0.490),
        ("whisper", 0.626, 0.737, 0.632),
        ("data2vec", 0.593, 0.691, 0.598),
    ],
)
def test_published_averages_of_heads_are_those_of_the_columns(
    encoder: str, public: float, everything: float, printed: float
) -> None:
    """The MLP table: its columns with its weights come out 0.005 below what X-ARES's README prints under them."""
    records = [
        scored(task, task.published.linear[encoder], published=task.published.linear, weight=task.weight)
        for task in shipped_tasks().values()
        if task.published and encoder in task.published.linear
    ]
    assert len(records) == 27
    found = averages(records, {})
    assert found["public"]["head"].weighted == pytest.approx(public, abs=0.0006)
    assert found["all"]["head"].weighted == pytest.approx(everything, abs=0.0006)
    assert (found["public"]["head"].tasks, found["all"]["head"].tasks) == (22, 27)
    assert found["public"]["head"].complete
    assert printed - found["public"]["head"].weighted == pytest.approx(0.005, abs=0.001)
    of_public = [record for record in records if not shipped_tasks()[record.task].private]
    assert published_averages(of_public, "head")[encoder] == pytest.approx(found["public"]["head"].weighted)
    assert published_averages(of_public, "knn") == {}


def test_groups_hold_their_tasks_and_no_others() -> None:
    """Each task alone: which averages it enters."""
    for task in shipped_tasks().values():
        groups = set(averages([scored(task, 0.5)], {}))
        if task.kind == "number":
            assert groups == set()
        elif task.domain == "synthetic":
            assert groups == {"synthetic"}
        elif task.private:
            assert groups == {"all", task.domain}
        else:
            assert groups == {"public", "all", task.domain}


def test_weighted_and_plain_means() -> None:
    esc50, gtzan = shipped_tasks()["esc50"], shipped_tasks()["gtzan_genre"]
    found = averages([scored(esc50, 0.9), scored(gtzan, 0.4)], {})["public"]["head"]
    assert found.weighted == pytest.approx((400 * 0.9 + 100 * 0.4) / 500)
    assert found.mean == pytest.approx(0.65)
    assert found.tasks == 2


def test_what_is_missing_is_listed() -> None:
    present = members("music")[0]
    found = averages([scored(present, 0.5), scored(present, 0.4, "knn")], {})
    for method in ("head", "knn"):
        average = found["music"][method]  # type: ignore[index]
        assert not average.complete
        lacking = [task.name for task in members("music")[1:] if method == "head" or task.knn]
        assert sorted(average.missing) == sorted(lacking)
    missing = averages([scored(shipped_tasks()["esc50"], 0.5, "knn")], {})["environment"]["knn"].missing
    assert "urbansound8k" in missing
    assert "fsdkaggle2018" not in missing  # has no kNN score to miss


def test_a_complete_average_says_so() -> None:
    found = averages([scored(task, 0.5) for task in members("music")], {})
    assert found["music"]["head"].complete
    assert found["music"]["head"].missing == []
    assert not found["all"]["head"].complete


def test_what_has_no_comparable_score_is_in_no_average() -> None:
    esc50, gtzan = shipped_tasks()["esc50"], shipped_tasks()["gtzan_genre"]
    assert averages([scored(esc50, None), scored(gtzan, 0.9, comparable=False)], {}) == {}
    found = averages([scored(esc50, 0.5), scored(gtzan, 0.9, comparable=False)], {})["public"]["head"]
    assert (found.weighted, found.tasks) == (0.5, 1)
    assert "gtzan_genre" in found.missing


def test_a_users_own_tasks_have_an_average_of_their_own(tmp_path: Path) -> None:
    """So that `public` and the domains mean the same for everybody."""
    mine = load_task(write_task(tmp_path, "mine", weight=400))
    also = load_task(write_task(tmp_path, "also", weight=100))
    light = load_task(write_task(tmp_path, "light", weight=None))
    records = [scored(shipped_tasks()["esc50"], 0.5), scored(mine, 0.7), scored(also, 0.2), scored(light, 0.9)]
    found = averages(records, {}, [mine, also, light])
    assert set(found) == {"public", "all", "environment", "own"}
    for group in ("public", "all", "environment"):
        assert (found[group]["head"].weighted, found[group]["head"].tasks) == (0.5, 1)
        assert not {"mine", "also", "light"} & set(found[group]["head"].missing)
    assert (found["own"]["head"].weighted, found["own"]["head"].tasks) == (pytest.approx(0.6), 2)
    assert found["own"]["head"].complete


def test_interval_of_an_average_is_that_of_independent_tasks() -> None:
    esc50, gtzan = shipped_tasks()["esc50"], shipped_tasks()["gtzan_genre"]
    rng = np.random.default_rng(0)

    def estimate(score: float, spread: float) -> Estimate:
        return Estimate(score, rng.normal(score, spread, 2000), (), 1e4, 1e4, "share")

    drawn = {("esc50", "linear"): estimate(0.9, 0.01), ("gtzan_genre", "linear"): estimate(0.4, 0.08)}
    found = averages([scored(esc50, 0.9), scored(gtzan, 0.4)], drawn)["public"]["head"]
    spread = np.sqrt((0.8 * 0.01) ** 2 + (0.2 * 0.08) ** 2)
    assert found.ci95 == pytest.approx((0.8 - 1.96 * spread, 0.8 + 1.96 * spread), abs=0.003)
    del drawn["esc50", "linear"]
    assert averages([scored(esc50, 0.9), scored(gtzan, 0.4)], drawn)["public"]["head"].ci95 is None


def test_a_drop_is_written_with_its_reason(schema: Record) -> None:
    clips = Clips(expected=2, read=1, dropped=[Drop("a.tar/é\x1b[31m", "audio cannot be decoded")])
    written = json.loads(indented(scored(shipped_tasks()["esc50"], 0.5, clips=clips)))
    assert written["clips"]["dropped"] == [{"key": "a.tar/é\x1b[31m", "reason": "audio cannot be decoded"}]
    jsonschema.validate(written, {**schema, "$ref": "#/$defs/TaskResult"})


def test_tasks_that_xares_skips_are_in_no_average_of_its_protocol() -> None:
    tasks = shipped_tasks()
    assert {name for name, task in tasks.items() if task.disabled} == {"finger_snap", "key_scratching", "liveenv"}
    records = [scored(tasks["finger_snap"], 0.5), scored(tasks["inside_outside_car"], 0.9)]
    assert averages(records, {})["all"]["head"].weighted == pytest.approx(0.7)
    found = averages(records, {}, protocol="xares")["all"]["head"]
    assert (found.weighted, found.mean, found.tasks) == (0.9, 0.9, 1)
    assert "liveenv" not in found.missing
    assert "liveenv" in averages(records, {})["all"]["head"].missing
    assert averages(records[:1], {}, protocol="xares") == {}
    assert [tasks["liveenv"].weight_under(name) for name in ("corrected", "xares")] == [5000, None]
