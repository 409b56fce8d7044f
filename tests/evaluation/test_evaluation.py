"""Whole evaluations of small data: what repeats, what differs, what is skipped, fails or has no score, and what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import CLASSES, TRIGGER, Clips, tone, tones, wav, write_encoder, write_task, write_tones
from shard_makers import write_shard

from xares_onnx.data import catalog
from xares_onnx.data.catalog import choose_tasks, shipped_tasks, suite_tasks
from xares_onnx.data.task import Task
from xares_onnx.errors import (
    DataError,
    DataMissingError,
    MachineError,
    ModelError,
    ScoreUndefinedError,
    UsageError,
    worst_exit_code,
)
from xares_onnx.evaluation import evaluation, run
from xares_onnx.evaluation.evaluation import Evaluation, evaluate
from xares_onnx.evaluation.record import TaskResult
from xares_onnx.progress import Event, Note, Progress, ignore

pytestmark = pytest.mark.usefixtures("shared_process")

MAY_DIFFER = {"seconds", "rtf", "environment", "created"}


class World:
    """A model, data and a cache that the tests of this file share; each writes its own tasks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.cache = folder, folder / "data", folder / "cache"
        self.model = write_encoder(folder / "bank.onnx")
        self.tones = write_task(folder, "tones")
        write_tones(self.data)

    def task(self, name: str, shards: dict[str, Clips], **options: Any) -> Path:
        """A task with one shard a part."""
        for part, clips in shards.items():
            write_shard(self.data / name / f"{part}-0.tar", clips)
        return write_task(self.folder, name, **options)

    def run(self, *tasks: Path, **options: Any) -> Evaluation:
        arguments: dict[str, Any] = {"model": self.model, "data": self.data, "cache": self.cache, **options}
        return evaluate(tasks=[str(task) for task in tasks], **arguments)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def three(seed: int = 0, train: int = 32, valid: int = 12, test: int = 20, **options: Any) -> dict[str, Clips]:
    counts = {"train": train, "valid": valid, "test": test}
    return {part: tones(n, 10 * seed + i, noise=2, prefix=part, **options) for i, (part, n) in enumerate(counts.items())}


def lasting(done: Evaluation) -> Any:
    """The record without what may differ between two runs."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(inner) for key, inner in value.items() if key not in MAY_DIFFER}
        return [strip(inner) for inner in value] if isinstance(value, list) else value

    return strip(json.loads(done.json()))


def records(done: Evaluation, **wanted: Any) -> list[TaskResult]:
    return [r for r in done.result.tasks if all(getattr(r, name) == value for name, value in wanted.items())]


# ---------------------------------------------------------------- the same number twice


def test_the_same_command_gives_the_same_record(world: World, tmp_path: Path) -> None:
    """Again from the cache; and from nothing, with another number of threads."""
    output = tmp_path / "out" / "result.json"
    first = world.run(world.tones, output=output)
    saved = {path.name: path.read_bytes() for path in (tmp_path / "out/result.predictions").iterdir()}
    cached = world.run(world.tones, output=output)
    assert lasting(cached) == lasting(first)
    for threads in (1, 2):
        fresh = world.run(world.tones, output=output, cache=tmp_path / f"cache{threads}", threads=threads)
        assert lasting(fresh) == lasting(first)
        assert fresh.result.tasks[0].rtf
        assert {path.name: path.read_bytes() for path in (tmp_path / "out/result.predictions").iterdir()} == saved
    assert cached.result.tasks[0].rtf is None  # nothing was embedded
    assert cached.result.tasks[0].audio_hours == first.result.tasks[0].audio_hours > 0
    assert 0.4 < first.result.tasks[0].score < 1  # type: ignore[operator]


def test_a_task_scores_the_same_in_any_company(world: World) -> None:
    other = world.task("company", three(1))
    alone, together = world.run(world.tones), world.run(other, world.tones)
    scores = [[(r.score, r.ci95) for r in records(done, task="tones")] for done in (alone, together)]
    assert scores[0] == scores[1]
    assert [r.task for r in together.result.tasks] == ["company", "company", "tones", "tones"]


def test_seeds_add_heads_and_change_none(world: World) -> None:
    one, four = (world.run(world.tones, seeds=seeds, protocol="xares") for seeds in (1, 4))
    assert records(four, method="linear")[0].per_seed[0] == records(one, method="linear")[0].score
    assert len(set(records(four, method="linear")[0].per_seed)) > 1
    assert records(four, method="knn")[0].per_seed == [records(one, method="knn")[0].score]
    assert four.result.settings["seeds"] == 4


def test_converged_heads_have_no_seeds(world: World) -> None:
    one, four = world.run(world.tones, seeds=1), world.run(world.tones, seeds=4)
    assert [record.per_seed for record in records(four)] == [[record.score] for record in records(one)]
    assert [record.ci95 for record in records(four)] == [record.ci95 for record in records(one)]


def test_digests_name_data_and_definition(world: World) -> None:
    def digests(name: str, seed: int, **options: Any) -> tuple[str | None, str]:
        (record,) = records(world.run(world.task(name, three(seed), **options), methods=["knn"]))
        return record.data_digest, record.definition_digest

    first = digests("digest", 2)
    other_data, same_definition = digests("digest", 3)
    assert (other_data == first[0], same_definition == first[1]) == (False, True)
    same_data, other_definition = digests("digest", 2, epochs=7)
    assert (same_data == first[0], other_definition == first[1]) == (True, False)


# ---------------------------------------------------------------- protocols and settings


def test_the_two_protocols(world: World) -> None:
    """Crops of 1 s of clips of 2.5 s: under X-ARES two examples a clip and no tail, else one prediction from both."""
    clips = {
        part: tones(n, i, seconds=2.5, noise=4, prefix=part) for i, (part, n) in enumerate({"train": 24, "test": 16}.items())
    }
    task = world.task("crops", clips, splits=("train", "test"), crop_seconds=1.0)
    corrected, published = world.run(task), world.run(task, protocol="xares")
    assert (corrected.result.settings["protocol"], published.result.settings["protocol"]) == ("corrected", "xares")
    assert (corrected.result.settings["seeds"], published.result.settings["seeds"]) == (3, 1)
    rows = corrected.predictions["crops", "linear"]
    assert len(rows["key"]) == 16
    rows = published.predictions["crops", "linear"]
    assert [np.sum(rows["key"] == key) for key in np.unique(rows["key"])] == [2] * 16
    record = records(published, method="linear")[0]
    assert record.score == pytest.approx(np.mean(rows["target"] == rows["prediction"]))
    assert record.n_test == 16
    assert [note.split(",")[0] for note in records(corrected)[0].notes] == ["there is no validation split of its own"]
    assert records(published)[0].notes == []  # selected on test, as X-ARES does; the protocol says so
    knn = [records(done, method="knn")[0].score for done in (corrected, published)]
    assert knn[0] != knn[1]


def test_folds_are_tested_in_turn(world: World) -> None:
    counts = {"fold0": 16, "fold1": 20, "fold2": 12}
    task = world.task("folds", {part: tones(n, i, noise=2) for i, (part, n) in enumerate(counts.items())}, folds=3)
    done = world.run(task, seeds=2)
    for record in records(done):
        assert record.n_test == 48
        assert len(record.per_fold) == 3
        assert record.score == pytest.approx(np.mean(record.per_fold))
    rows = done.predictions["folds", "linear"]
    tested = {(str(fold), str(key).split("/")[0]) for fold, key in zip(rows["fold"], rows["key"], strict=True)}
    assert tested == {(str(i), f"fold{i}-0.tar") for i in range(3)}


def test_a_task_that_tests_on_its_training_clips_is_cross_validated(world: World) -> None:
    """X-ARES's subway_broadcast, by its shipped file: one shard for every split."""
    rng = np.random.default_rng(0)
    clips = {f"c{i:02}": (wav(tone(CLASSES[i % 2], rng, noise=1)), {"broadcasting": i % 2}) for i in range(40)}
    write_shard(world.data / "subway_broadcast" / "subway_broadcast-0.tar", clips)
    done = evaluate(world.model, ["subway_broadcast"], data=world.data, cache=world.cache)
    for record in records(done):
        assert (record.n_test, len(record.per_fold)) == (40, 5)
        assert record.clips.expected == 40
        assert "cross-validated in 5 folds" in record.notes[0]
    assert any("subway_broadcast: train and test share clips" in note for note in done.result.notes)
    published = evaluate(
        world.model, ["subway_broadcast"], data=world.data, cache=world.cache, protocol="xares", methods=["knn"]
    )
    assert published.result.tasks[0].per_fold == [published.result.tasks[0].score]


def test_limit_takes_a_fixed_subset_that_is_not_comparable(world: World) -> None:
    keys: list[set[str]] = []
    for limit in (8, 20):
        done = world.run(world.tones, limit=limit)
        for record in records(done):
            assert (record.n_test, record.clips.expected, record.clips.read) == (limit, 3 * limit, 3 * limit)
            assert record.status == "ok"
            assert not record.comparable
        assert done.result.averages == {}
        assert done.result.settings["limit"] == limit
        keys.append(set(done.predictions["tones", "knn"]["key"].tolist()))
    assert keys[0] < keys[1]
    assert {key.split("/")[0] for key in keys[1]} == {"test-0.tar", "test-1.tar"}  # chosen over the split, not a shard


def test_methods(world: World) -> None:
    no_knn = write_task(world.folder / "other", "tones", knn=False)
    assert [r.method for r in records(world.run(world.tones, methods=["knn"]))] == ["knn"]
    assert [r.method for r in records(world.run(world.tones, methods=["head"]))] == ["linear"]
    done = world.run(no_knn, methods=["knn", "head"])
    assert [r.method for r in records(done)] == ["linear"]
    assert lasting(done)["settings"]["methods"] == ["head", "knn"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "--seeds 0 must lie between 1 and 100"),
        ({"seeds": 101}, "--seeds 101"),
        ({"limit": 0}, "--limit 0 must be 1 or more"),
        ({"protocol": "mine"}, "protocol 'mine' must be corrected or xares"),
        ({"methods": ["mlp"]}, "method 'mlp' must be head or knn"),
        ({"suite": "public"}, "--tasks and --suite exclude each other"),
        ({"contract": ["sample_rate"]}, "sample_rate"),
    ],
)
def test_wrong_settings_are_refused(world: World, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        world.run(world.tones, **options)


# ---------------------------------------------------------------- which tasks


def test_a_named_task_without_data_is_refused_before_anything_runs(world: World, tmp_path: Path) -> None:
    model = tmp_path / "junk.onnx"
    model.write_text("never opened")
    names = [str(world.tones), "gtzan_genre"]
    wanted = r"no data for gtzan_genre: .*gtzan_fold_0_0000000.tar; .*Zenodo record 14722472"
    with pytest.raises(DataMissingError, match=wanted):
        evaluate(model, names, data=world.data, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ModelError, match=r"no\.onnx does not exist"):  # a wrong path is said even before
        evaluate(tmp_path / "no.onnx", names, data=world.data, cache=tmp_path / "cache")


def test_a_suite_lists_what_it_skips(world: World) -> None:
    rng = np.random.default_rng(0)
    labels = ("Inside", "Outside")
    for split, count in (("train", 24), ("test", 12)):
        clips = {f"c{i:02}": (wav(tone(CLASSES[i % 2], rng)), {"position": labels[i % 2]}) for i in range(count)}
        write_shard(world.data / "inside_outside_car" / f"inside_outside_car_{split}-0.tar", clips)
    done = evaluate(world.model, suite="private", data=world.data, cache=world.cache, methods=["knn"])
    by_task = {r.task: r for r in done.result.tasks}
    assert set(by_task) == {task.name for task in suite_tasks("private") if task.knn}
    assert by_task["inside_outside_car"].status == "ok"
    skipped = by_task["key_scratching"]
    assert (skipped.status, skipped.score) == ("skipped", None)
    assert "holds no key_scratching_train*.tar" in (skipped.reason or "")
    assert done.errors == []  # a suite takes what there is
    assert "key_scratching" in done.result.averages["all"]["knn"].missing
    assert "public" not in done.result.averages


def test_a_suite_without_any_data_is_refused(world: World) -> None:
    with pytest.raises(DataMissingError, match=r"no task of suite music has data: .*Zenodo"):
        evaluate(world.model, suite="music", data=world.data, cache=world.cache)


def test_without_a_choice_every_task_on_disk(world: World, tmp_path: Path) -> None:
    (tmp_path / "subway_broadcast").mkdir()
    write_shard(tmp_path / "subway_broadcast" / "subway_broadcast-0.tar", {})
    assert choose_tasks([], None, tmp_path, tmp_path / "cache", ignore) == [(shipped_tasks()["subway_broadcast"], tmp_path)]


def test_without_data_the_synthetic_suite_and_it_is_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XARES_ONNX_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env").mkdir()
    said: list[Event] = []
    chosen = [task.name for task, _ in choose_tasks([], None, None, tmp_path / "cache", said.append)]
    assert chosen == [task.name for task in shipped_tasks().values() if task.domain == "synthetic"]
    assert [event.text for event in said if isinstance(event, Note)] == [
        "no data in env, so the built-in synthetic suite is scored; --data names another folder"
    ]
    monkeypatch.setattr(catalog, "suite_tasks", lambda suite: [shipped_tasks()["synthetic_timbre"]])  # building all is slow
    done = evaluate(world.model, cache=world.cache, limit=20, methods=["knn"])
    assert [r.task for r in records(done, status="ok")] == ["synthetic_timbre"]
    assert any("the built-in synthetic suite is scored" in note for note in done.result.notes)
    with pytest.raises(DataMissingError, match="holds no task's data"):  # a folder that was named should have some
        choose_tasks([], None, tmp_path, tmp_path / "cache", ignore)


# ---------------------------------------------------------------- lost clips


def broken(clips: Clips, *keys: str) -> Clips:
    return {key: (b"not audio", label) if key in keys else (audio, label) for key, (audio, label) in clips.items()}


def relabelled(clips: Clips, label: str, *keys: str) -> Clips:
    return {
        key: (audio, {"label": label}) if key in keys or not keys else (audio, old) for key, (audio, old) in clips.items()
    }


def test_a_few_lost_clips_are_named_and_the_rest_is_scored(world: World) -> None:
    shards = three(4)
    shards["test"] = relabelled(broken(shards["test"], "test-003"), "purple", "test-005")
    done = world.run(world.task("few", shards))
    for record in records(done):
        assert (record.status, record.comparable, record.n_test) == ("ok", True, 18)
        assert (record.clips.expected, record.clips.read) == (64, 62)
        reasons = {drop.key: drop.reason for drop in record.clips.dropped}
        assert set(reasons) == {"test-0.tar/test-003", "test-0.tar/test-005"}
        assert "cannot be decoded" in reasons["test-0.tar/test-003"]
        assert "unknown label label='purple'" in reasons["test-0.tar/test-005"]
    assert done.errors == []


def test_too_many_lost_clips_fail_the_task_and_the_others_go_on(world: World) -> None:
    shards = three(5)
    shards["train"] = broken(shards["train"], "train-000", "train-001", "train-002")
    task = world.task("many", shards)
    done = world.run(task, world.tones)
    assert [(r.task, r.status) for r in done.result.tasks] == [("many", "failed")] * 2 + [("tones", "ok")] * 2
    failed = done.result.tasks[0]
    assert (failed.score, failed.ci95, failed.predictions, failed.n_test) == (None, None, None, 0)
    assert (failed.reason or "").startswith(
        "3 of 64 clips were dropped, the first train-0.tar/train-000: audio cannot be decoded"
    )
    assert len(failed.clips.dropped) == 3
    assert [type(error) for error in done.errors] == [DataError]
    assert "many" in done.result.averages["own"]["head"].missing

    allowed = world.run(task, allow_drops=True)
    for record in records(allowed):
        assert (record.status, record.comparable, record.n_test) == ("ok", False, 20)
        assert "3 of 64 clips were dropped" in record.notes
    assert allowed.errors == []
    assert allowed.result.averages == {}
    assert "many: 3 of 64 clips were dropped" in allowed.result.notes


def test_a_damaged_shard_fails_its_task(world: World) -> None:
    task = world.task("cut", three(6))
    shard = world.data / "cut/train-0.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    done = world.run(task, world.tones)
    assert [r.status for r in done.result.tasks] == ["failed", "failed", "ok", "ok"]
    assert "a shard is damaged" in (done.result.tasks[0].reason or "")
    assert [error.exit_code for error in done.errors] == [4]
    allowed = world.run(task, allow_drops=True)
    assert {(r.status, r.comparable) for r in records(allowed)} == {("ok", False)}
    assert any("train-0.tar" in note for note in records(allowed)[0].notes)


def test_data_that_vanish_after_the_choice_are_an_error_and_not_a_skip(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanished(*_: Any) -> None:
        raise DataMissingError("train-0.tar is not there any more")

    monkeypatch.setattr(run, "prepare", vanished)
    done = world.run(world.tones)
    assert {r.status for r in done.result.tasks} == {"failed"}
    assert worst_exit_code(error.exit_code for error in done.errors) == 4


# ---------------------------------------------------------------- no score


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("notest", lambda s: {**s, "test": relabelled(s["test"], "purple")}, "there are no test clips in fold test"),
        (
            "single",
            lambda s: {**s, "train": relabelled(s["train"], "low")},
            "the training clips of fold test are all of one class",
        ),
        ("notrain", lambda s: {**s, "train": relabelled(s["train"], "?")}, "there are no training clips in fold test"),
        ("nothing", lambda s: {part: relabelled(clips, "?") for part, clips in s.items()}, "there are no training clips"),
    ],
)
def test_what_cannot_be_scored_is_undefined(
    world: World, name: str, change: Callable[[dict[str, Clips]], dict[str, Clips]], reason: str
) -> None:
    task = world.task(name, change(three(7)))
    done = world.run(task, allow_drops=True)
    for record in records(done):
        assert (record.status, record.score, record.ci95) == ("undefined", None, None)
        assert reason in (record.reason or "")
        assert record.clips.expected == 64
    assert [(type(error), error.exit_code) for error in done.errors] == [(ScoreUndefinedError, 4)]
    assert name in str(done.errors[0])
    assert reason in str(done.errors[0])
    assert done.result.averages == {}


# ---------------------------------------------------------------- what ends a run


def test_a_model_that_fails_ends_the_run_and_the_record_stays(world: World, tmp_path: Path) -> None:
    """The model is sound until a clip that it cannot take: the task before is scored, those after are not run."""
    shards = three(8)
    rng = np.random.default_rng(0)
    bad = tone("low", rng)
    bad[0] = TRIGGER
    shards["test"] = {**shards["test"], "test-999": (wav(bad), {"label": "low"})}
    fatal, after = world.task("fatal", shards), world.task("after", three(9))
    output = tmp_path / "result.json"
    fragile = write_encoder(tmp_path / "fragile.onnx", fragile=True)
    done = world.run(world.tones, fatal, after, model=fragile, methods=["head"], output=output)
    assert [(r.task, r.status) for r in done.result.tasks] == [("tones", "ok"), ("fatal", "failed"), ("after", "skipped")]
    assert [type(error) for error in done.errors] == [ModelError]
    assert worst_exit_code(error.exit_code for error in done.errors) == 3
    assert "fragile.onnx failed on an input" in (done.result.tasks[1].reason or "")
    assert "the run ended at fatal" in (done.result.tasks[2].reason or "")
    saved = json.loads(output.read_bytes())
    assert [task["status"] for task in saved["tasks"]] == ["ok", "failed", "skipped"]
    assert saved["tasks"][0]["score"] == done.result.tasks[0].score
    assert (tmp_path / saved["tasks"][0]["predictions"]).exists()


def test_a_machine_that_fails_ends_the_run(world: World, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "store").write_text("a file where the store should be")
    done = world.run(world.tones, world.task("after", three(9)), cache=tmp_path / "cache", methods=["knn"])
    assert [r.status for r in done.result.tasks] == ["failed", "skipped"]
    assert isinstance(done.errors[0], MachineError)


def test_an_output_that_cannot_be_written_is_said_before_the_work(world: World, tmp_path: Path) -> None:
    seen: list[Event] = []
    with pytest.raises(UsageError, match="is a folder"):
        world.run(world.tones, output=tmp_path, observer=seen.append)
    assert not [event for event in seen if isinstance(event, Progress)]


# ---------------------------------------------------------------- what is said and kept


def test_notes_are_told_and_recorded(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1.2", "onnxruntime-gpu": "1.3"}
    monkeypatch.setattr(evaluation, "onnxruntime_distributions", lambda: both)
    mute = write_encoder(tmp_path / "mute.onnx", declare=False)
    two = {part: clips for part, clips in three(1).items() if part != "valid"}
    task = world.task("two", two, splits=("train", "test"))
    told: list[Event] = []
    done = world.run(task, model=mute, methods=["knn"], observer=told.append)
    notes = done.result.notes
    assert notes == [event.text for event in told if isinstance(event, Note)]
    assert any("onnxruntime 1.2 and onnxruntime-gpu 1.3 are both installed" in note for note in notes)
    assert any("assumed, because the model does not declare it: sample_rate=16000" in note for note in notes)
    assert "two: there is no validation split of its own, so 3 of 32 training clips are held out for selection" in notes
    assert records(done)[0].notes == [note.removeprefix("two: ") for note in notes if note.startswith("two: ")]


@pytest.mark.parametrize(("protocol", "total_steps"), [("corrected", 12), ("xares", 3)])
def test_progress_counts_every_clip_and_step(world: World, tmp_path: Path, protocol: str, total_steps: int) -> None:
    """A step is a fit of a converged head, or an epoch."""
    told: list[Event] = []
    task = world.task("counted", three(11), epochs=3)
    world.run(task, observer=told.append, protocol=protocol, cache=tmp_path)
    for stage, total in (("embed", 64), ("train", total_steps)):
        steps = [event for event in told if isinstance(event, Progress) and event.stage == stage]
        assert [event.done for event in steps] == sorted(event.done for event in steps)
        assert (steps[0].done, steps[-1].done) == (0, total)
        assert {(event.task, event.total) for event in steps} == {("counted", total)}


def test_default_output_is_named_by_the_model(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert world.run(world.tones, methods=["knn"]).path is None
    assert list(tmp_path.iterdir()) == []  # the library writes where it was told to
    done = world.run(world.tones, methods=["knn"], save=True)
    expected = Path("results") / f"bank-{done.result.encoder.sha256[:8]}.json"
    assert done.path == expected
    assert expected.read_text() == done.json()


def test_settings_are_kept(world: World) -> None:
    assert lasting(world.run(world.tones, methods=["knn"], allow_drops=True))["settings"] == {
        "protocol": "corrected",
        "seeds": 3,
        "methods": ["knn"],
        "limit": None,
        "allow_drops": True,
        "heads": {},
        "lm": None,
        "vocabulary": None,
        "trust": False,
        "taps": [],
        "shots": [],
        "suite": None,
        "tasks": ["tones"],
        "baseline": None,
        "tolerance": None,
        "fail_under": [],
    }


def test_a_task_by_name_and_by_file_are_one(world: World) -> None:
    tasks: list[tuple[Task, Path]] = choose_tasks(
        [str(world.tones), str(world.tones)], None, world.data, world.cache, ignore
    )
    assert [task.name for task, _ in tasks] == ["tones"]
