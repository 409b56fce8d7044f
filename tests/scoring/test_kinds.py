"""Whole evaluations of every kind of task: both protocols, an encoder without frames, and data that give no score."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bank_model import write_model
from corpus import Clips, wav, write_task, write_tones
from kind_makers import KINDS, SIZES, burst, clips_of, write_bank, write_kind
from quick_sweeps import quick_sweeps

from xares_onnx.embedding.store import Store
from xares_onnx.errors import UsageError, worst_exit_code
from xares_onnx.evaluation.evaluation import Evaluation, _torch_device, evaluate, plan
from xares_onnx.evaluation.record import TaskResult
from xares_onnx.probes import ctc, llm, retrieval
from xares_onnx.probes.sweep import Sweep
from xares_onnx.progress import Note

pytestmark = pytest.mark.usefixtures("shared_process")

# Score that an encoder which hears the tones reaches, and one that hears nothing does not; of an error, the greatest.
ENOUGH = {"tags": 0.9, "events": 0.8, "captions": 0.12, "transcript": 0.5, "number": 3.5}
MAY_DIFFER = {"seconds", "rtf", "environment", "created"}
pytestmark = pytest.mark.usefixtures("heads_in_this_process")  # these tests patch how heads are trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    write_bank(folder / "bank.onnx", hop=320)
    for kind in KINDS:
        write_kind(folder, kind)
    return folder


def run(folder: Path, *names: str, **options: Any) -> Evaluation:
    arguments: dict[str, Any] = {"data": folder / "data", "cache": folder / "cache", "seeds": 2, **options}
    model = arguments.pop("model", folder / "bank.onnx")
    return evaluate(model, [str(folder / f"{name}.toml") for name in names], **arguments)


def only(done: Evaluation) -> TaskResult:
    (record,) = done.result.tasks
    return record


@pytest.mark.parametrize("protocol", ["corrected", "xares"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_scored_by_both_protocols(
    folder: Path, kind: str, protocol: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (ctc, retrieval):
        monkeypatch.setattr(module, "SWEEP", replace(module.SWEEP, epochs=12))
    done = run(folder, kind, protocol=protocol, output=folder / f"{kind}-{protocol}.json")
    record = only(done)
    assert (record.status, record.reason) == ("ok", None)
    assert record.score is not None
    assert record.ci95 is not None
    assert record.ci95[0] <= record.score <= record.ci95[1]
    assert record.ci95[0] < record.ci95[1]
    assert record.score > ENOUGH[kind] if record.higher_is_better else record.score < ENOUGH[kind]
    draws = protocol == "xares" or kind in ("captions", "transcript")
    assert len(record.per_seed) == (2 if draws else 1)
    assert (record.n_test, record.clips.read) == (SIZES["test"], sum(SIZES.values()))
    assert record.metrics
    assert record.predictions is not None
    rows = np.load(folder / record.predictions, allow_pickle=False)
    assert len(rows["key"]) == len(record.per_seed) * SIZES["test"]
    assert done.errors == []
    missing_tool = protocol == "xares" and kind in ("captions", "transcript")  # no BERT vocabulary, no language model
    assert record.comparable is not missing_tool
    assert any("to be comparable" in note for note in record.notes) is missing_tool


@quick_sweeps()
def test_scores_can_be_made_again_from_what_is_kept_of_each_clip(folder: Path) -> None:
    from sklearn.metrics import average_precision_score, f1_score

    def kept(kind: str) -> tuple[TaskResult, dict[str, Any]]:
        record = only(run(folder, kind, seeds=1, output=folder / f"{kind}-kept.json"))
        assert record.predictions is not None
        return record, dict(np.load(folder / record.predictions, allow_pickle=False))

    record, rows = kept("tags")
    assert record.score == pytest.approx(average_precision_score(rows["target"], rows["prediction"], average="macro"))
    record, rows = kept("number")
    assert record.score == pytest.approx(((rows["target"] - rows["prediction"]) ** 2).mean())
    assert record.metrics["pearson"] == pytest.approx(np.corrcoef(rows["target"], rows["prediction"])[0, 1])
    record, rows = kept("transcript")
    errors, words = rows["word_errors"].sum(axis=0)
    assert words == sum(len(text.split()) for text in rows["target"])
    assert record.score == pytest.approx(1 - errors / words)
    record, rows = kept("captions")
    hits, captions, first = rows["recall"].sum(axis=0)
    assert record.score == pytest.approx((hits / captions + first / len(rows["recall"])) / 2)
    record, rows = kept("events")
    right, false, missed = rows["segments"].sum(axis=0).T
    scores = [
        f1_score(np.repeat([1, 0, 1], [r, f, m]), np.repeat([1, 1, 0], [r, f, m]), zero_division=0)
        for r, f, m in zip(right, false, missed, strict=True)
    ]
    assert record.score == pytest.approx(np.mean(scores))


@quick_sweeps()
def test_the_same_command_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """With another number of threads and another cache, too."""

    def lasting(done: Evaluation) -> Any:
        record = json.loads(done.json())
        for task in record["tasks"]:
            for name in MAY_DIFFER & set(task):
                del task[name]
        return {key: value for key, value in record.items() if key not in MAY_DIFFER}

    first = run(folder, *KINDS, seeds=1, threads=2, output=tmp_path / "a.json")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "a.predictions").iterdir()}
    again = run(folder, *KINDS, seeds=1, threads=1, cache=tmp_path / "cache", output=tmp_path / "a.json")
    assert lasting(first) == lasting(again)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a.predictions").iterdir()} == saved
    assert len(saved) == len(KINDS)


@quick_sweeps()
def test_heads_of_frames_train_from_the_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, "events", "transcript", seeds=1, limit=12)
    written: list[str] = []
    monkeypatch.setattr(Store, "write", lambda self, key, *rest: written.append(key))
    cached = run(folder, "events", "transcript", seeds=1, limit=12)
    assert written == []
    assert all(record.rtf is None and record.status == "ok" for record in cached.result.tasks)


@quick_sweeps()
def test_a_clip_only_encoder_has_no_score_where_frames_are_needed(folder: Path, tmp_path: Path) -> None:
    write_kind(folder, "events", "weighted", weight=100)
    model = write_model(tmp_path / "clip.onnx", clip_only=True)
    done = run(folder, *KINDS, "weighted", model=model, seeds=1)
    by_task = {record.task: record for record in done.result.tasks}
    for name in ("events", "transcript", "weighted"):
        record = by_task[name]
        assert (record.status, record.score, record.ci95) == ("not_applicable", None, None)
        assert "gives one vector a clip" in (record.reason or "")
    for name in ("tags", "captions", "number"):
        assert by_task[name].status == "ok"
    assert done.errors == []  # nothing is wrong with model or data
    assert done.result.averages == {}


def test_a_plan_says_what_a_clip_only_encoder_leaves_out(folder: Path, tmp_path: Path) -> None:
    said: list[Any] = []
    tasks = [str(folder / f"{kind}.toml") for kind in ("tags", "events")]
    model = write_model(tmp_path / "clip.onnx", clip_only=True)
    made = plan(model, tasks, data=folder / "data", cache=folder / "cache", observer=said.append)
    assert [row.task for row in made.rows] == ["tags"]
    assert any("events is not planned" in event.text for event in said if isinstance(event, Note))


@pytest.mark.parametrize("kind", ["events", "transcript"])
def test_fewer_frames_than_a_kind_needs(folder: Path, tmp_path: Path, kind: str) -> None:
    """One frame a second: segments take the nearest frame, but eight letters do not go into one frame."""
    model = write_bank(tmp_path / "slow.onnx", hop=16_000)
    record = only(run(folder, kind, model=model, seeds=1))
    assert record.status == ("ok" if kind == "events" else "not_applicable")
    if kind == "transcript":
        assert "fewer frames than characters" in (record.reason or "")


def test_a_hop_changes_what_is_heard_and_not_what_is_scored(folder: Path, tmp_path: Path) -> None:
    """The same recordings through encoders of 10 and 40 ms: as many segments, and nearly the same score."""
    scores, segments = [], set()
    for hop in (160, 640):
        path = write_bank(tmp_path / f"{hop}.onnx", hop=hop)
        record = only(run(folder, "events", model=path, seeds=1, output=tmp_path / f"{hop}.json"))
        assert record.predictions is not None
        counts = np.load(tmp_path / record.predictions)["segments"]
        segments.add(int((counts[..., 0] + counts[..., 2]).sum()))  # those that hold an event
        scores.append(record.score)
    assert len(segments) == 1
    assert max(scores) - min(scores) < 0.1


# ---------------------------------------------------------------- data that give no score


def relabelled(kind: str, change: Callable[[Any], Any] = lambda label: label) -> dict[str, Clips]:
    splits = {}
    for number, (split, count) in enumerate(SIZES.items()):
        made = clips_of(kind, split, count, seed=number)
        splits[split] = {key: (audio, change(label)) for key, (audio, label) in made.items()}
    return splits


@pytest.mark.parametrize(
    ("kind", "change", "status", "reason"),
    [
        ("captions", lambda label: {"one": " ", "two": 5}, "failed", "its json holds no caption"),
        ("transcript", lambda label: {"trans": " . "}, "failed", "its transcript trans is empty"),
        ("number", lambda label: {"score": 11}, "failed", "not a number from 0 to 10"),
        ("tags", lambda label: {"tags": ""}, "undefined", "have no tags"),
        ("events", lambda label: [], "undefined", "have no events"),
        *((kind, "test", "undefined", "there are no test clips") for kind in KINDS),
        *((kind, "train", "undefined", "there are no training clips") for kind in KINDS),
    ],
)
def test_what_gives_no_score_is_recorded_and_the_others_go_on(
    folder: Path, tmp_path: Path, kind: str, change: str | Callable[[Any], Any], status: str, reason: str
) -> None:
    """Another label for each clip, or a split without clips."""
    splits = {change: {}} if isinstance(change, str) else relabelled(kind, change)
    write_task(tmp_path, "tones", epochs=1)
    write_tones(tmp_path / "data", train=24, valid=8, test=12)
    write_kind(tmp_path, kind, "bad", **splits)
    done = run(tmp_path, "bad", "tones", model=folder / "bank.onnx", seeds=1, output=tmp_path / "out.json")
    bad, *good = done.result.tasks
    assert (bad.status, bad.score, bad.ci95) == (status, None, None)
    assert reason in (bad.reason or "")
    assert [record.status for record in good] == ["ok", "ok"]
    assert worst_exit_code(error.exit_code for error in done.errors) == 4
    assert json.loads((tmp_path / "out.json").read_bytes())["tasks"][0]["status"] == status


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_gives_nan_for_every_clip_gives_no_score(tmp_path: Path, kind: str) -> None:
    """The bank's last output is no number where a clip lies below -0.9: each clip is a named drop."""
    model = write_model(tmp_path / "fragile.onnx")
    deep = wav(np.full(8000, -0.95, np.float32))
    splits = {split: {key: (deep, label) for key, (_, label) in made.items()} for split, made in relabelled(kind).items()}
    done = run(tmp_path, write_kind(tmp_path, kind, **splits).stem, model=model)
    record = only(done)
    assert (record.status, record.score, record.clips.read) == ("failed", None, 0)
    assert "NaN or infinity" in (record.reason or "")
    assert worst_exit_code(error.exit_code for error in done.errors) == 4


@pytest.mark.parametrize("kind", ["tags", "events", "number"])
def test_huge_embeddings_are_scored_like_any_others(folder: Path, tmp_path: Path, kind: str) -> None:
    """Those of 1e30 are finite, but their squares are not: heads normalise them all the same."""
    record = only(run(folder, kind, model=write_bank(tmp_path / "huge.onnx", gain=1e30), seeds=1))
    assert record.status == "ok"
    assert record.score is not None
    # Nothing is too quiet for the epsilon of a LayerNorm now: frames of silence look like any others.
    assert record.score < ENOUGH[kind] if kind == "number" else record.score > ENOUGH[kind] / 2


def test_events_outside_the_vocabulary_are_counted(folder: Path) -> None:
    def with_others(events: Any) -> Any:
        return [*events, {"onset": 0.1, "offset": 0.2, "label": "siren"}, {"onset": 0, "offset": 1, "label": "low,bell"}]

    write_kind(folder, "events", "outside", **relabelled("events", with_others))
    record = only(run(folder, "outside", seeds=1))
    assert record.status == "ok"
    assert record.clips.events_outside == 2 * sum(SIZES.values())
    assert record.clips.dropped == []
    assert any("are of no class of the vocabulary" in note for note in record.notes)


@quick_sweeps()
@pytest.mark.parametrize("kind", ["events", "transcript"])
def test_a_clip_without_a_label_takes_its_frames_along(folder: Path, tmp_path: Path, kind: str) -> None:
    """The first of each split: the scores are those of the data without it."""
    spoilt, without = {}, {}
    for split, made in relabelled(kind).items():
        first, *others = list(made)[:16]
        spoilt[split] = {first: (made[first][0], {"unlabelled": 1}), **{key: made[key] for key in others}}
        without[split] = {key: made[key] for key in others}
    write_kind(tmp_path, kind, "spoilt", **spoilt)
    write_kind(tmp_path, kind, "without", **without)
    model = folder / "bank.onnx"
    one, other = run(tmp_path, "spoilt", "without", model=model, allow_drops=True, seeds=1).result.tasks
    assert [drop.key.rpartition("/")[2] for drop in one.clips.dropped] == ["test-000", "train-000", "valid-000"]
    assert other.score is not None
    assert (one.score, one.per_seed, one.metrics) == (other.score, other.per_seed, other.metrics)


# ---------------------------------------------------------------- heads and tools


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": ["transcript"]}, "must read TASK=KIND"),
        ({"heads": ["transcript=lstm"]}, "with a kind of linear, retrieval, ctc, llm"),
        ({"heads": ["transcripts=llm"]}, "names a task that is not selected; did you mean 'transcript'"),
        ({"heads": ["transcript=linear"]}, "head 'linear' does not fit transcript"),
        ({"heads": ["transcript=llm"]}, "needs a language model; name its folder by --lm"),
        ({"vocabulary": Path("nowhere.txt")}, "nowhere.txt"),
        ({"heads": ["transcript=llm"], "lm": "no/such/folder"}, "neither a folder nor a model"),
    ],
)
def test_a_wrong_choice_is_said_at_once(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(folder, "transcript", **options)


@quick_sweeps()
def test_berts_vocabulary_makes_captions_comparable(folder: Path, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "loud", "soft", "tone", "over", "under", "low", "mid", "high", "top"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    done = run(folder, "captions", protocol="xares", vocabulary=tmp_path / "vocab.txt", seeds=1)
    assert only(done).comparable
    assert len(done.result.settings["vocabulary"]) == 64
    corrected = run(folder, "captions", vocabulary=tmp_path / "vocab.txt", seeds=1)
    assert only(corrected).score == only(run(folder, "captions", seeds=1)).score
    assert any("--vocabulary is not used" in note for note in corrected.result.notes)


@pytest.mark.parametrize("name", ["captions", "transcript"])
def test_corrected_sweeps_and_xares_trains_as_the_task_says(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, function = {"captions": (retrieval, "train_retrieval"), "transcript": (ctc, "train_ctc")}[name]
    train, given, outcomes = getattr(module, function), [], []

    def watched(*arguments: Any, **options: Any) -> Any:
        given.extend(argument for argument in arguments if hasattr(argument, "batch_size"))
        outcomes.append(train(*arguments, **options))
        return outcomes[-1]

    monkeypatch.setattr(module, function, watched)
    monkeypatch.setattr(module, "SWEEP", short := Sweep((1e-3, 1e-2), 16, epochs=2, patience=1))
    run(folder, name, seeds=2)
    run(folder, name, protocol="xares", seeds=2)
    assert given[0] is short
    assert (given[1].epochs, given[1].learning_rate) == {"captions": (8, 1e-3), "transcript": (30, 0.03)}[name]
    assert [result.tuning is not None for results in outcomes for result in results] == [True, True, False, False]


def spelt_out(count: int, seed: int) -> Clips:
    """Texts of four letters and a space, a tone of 100 ms each, no pause: an encoder of that hop gives a frame each."""
    rng, clips = np.random.default_rng(seed), {}
    for number in range(count):
        letters = rng.permutation(list("ABCD")).tolist()
        letters.insert(rng.integers(1, 4), " ")
        tones = [burst(letter.lower(), 0.1, rng) for letter in letters]
        clips[f"{seed}-{number:03}"] = (wav((0.2 * np.concatenate(tones)).astype(np.float32)), {"trans": "".join(letters)})
    return clips


def test_the_llm_head_from_audio_to_a_score(taught_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder hears five tones; the language model writes what the adapter tells it, letter by letter."""
    monkeypatch.setattr(llm, "SWEEP", Sweep((1e-4, 1e-2), 8, epochs=20, patience=4))
    splits = {
        split: spelt_out(count, seed) for seed, (split, count) in enumerate({"train": 96, "valid": 16, "test": 24}.items())
    }
    task = write_kind(tmp_path, "transcript", "spoken", **splits)
    task.write_text(task.read_text().replace("batch_size = 4", "batch_size = 8").replace("0.03", "0.01"))
    model = write_bank(tmp_path / "bank.onnx", hop=1600)
    arguments: dict[str, Any] = {"model": model, "lm": str(taught_lm), "cache": tmp_path / "cache"}
    corrected = run(tmp_path, "spoken", heads=["spoken=llm"], seeds=1, output=tmp_path / "llm.json", **arguments)
    record = only(corrected)
    assert (record.method, record.status, record.comparable) == ("llm", "ok", True)
    assert record.score is not None
    assert record.score > 0.5
    said = corrected.result.settings["lm"]
    assert (said["name"], len(said["digest"]), said["device"]) == (taught_lm.name, 64, "cpu")
    checkpoints = list((tmp_path / "cache" / "checkpoints").iterdir())
    assert len(checkpoints) == len(llm.SWEEP.rates)
    written = [checkpoint.stat().st_mtime_ns for checkpoint in checkpoints]
    again = run(tmp_path, "spoken", heads=["spoken=llm"], seeds=1, output=tmp_path / "llm.json", **arguments)
    assert only(again).score == record.score
    # Each epoch writes one: nothing was trained again.
    assert [checkpoint.stat().st_mtime_ns for checkpoint in checkpoints] == written
    task.write_text(task.read_text().replace("epochs = 30", "epochs = 1"))
    xares = run(tmp_path, "spoken", protocol="xares", seeds=1, device="CPUExecutionProvider", **arguments)
    assert xares.result.settings["lm"]["device"] == "cpu"  # where the encoder was asked to run
    assert (only(xares).method, only(xares).comparable) == ("llm", True)


@quick_sweeps()
def test_a_language_model_that_no_head_wants_is_said(folder: Path, taught_lm: Path) -> None:
    done = run(folder, "tags", lm=str(taught_lm))
    assert done.result.settings["lm"] is None
    assert any("--lm is not used" in note for note in done.result.notes)
    spoken = run(folder, "transcript", lm=str(taught_lm), seeds=1)
    assert only(spoken).method == "ctc"  # the protocol's own, unless another is asked for


@pytest.mark.parametrize(
    ("device", "provider", "where"),
    [
        ("auto", "CUDAExecutionProvider", "auto"),
        ("cuda:1", "CUDAExecutionProvider", "cuda:1"),
        ("cpu", "CPUExecutionProvider", "cpu"),
        ("CPUExecutionProvider", "CPUExecutionProvider", "cpu"),
        ("CUDAExecutionProvider", "CUDAExecutionProvider", "cuda"),
        ("OpenVINOExecutionProvider", "OpenVINOExecutionProvider", "cpu"),
    ],
)
def test_a_language_model_never_goes_where_nobody_asked_for(device: str, provider: str, where: str) -> None:
    assert _torch_device(device, provider) == where
