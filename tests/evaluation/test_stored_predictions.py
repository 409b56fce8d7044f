"""What a result keeps is enough to score it again, to the last bit, whatever the kind of task; hostile files are refused."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import tones, write_task
from kind_makers import KINDS, write_bank, write_kind
from made_results import classes, rng, saved
from quick_sweeps import quick_sweeps
from shard_makers import write_shard

from xares_onnx.errors import DataError, DataMissingError, UsageError
from xares_onnx.evaluation import record as results
from xares_onnx.evaluation.differences import Side, find_differences, verified
from xares_onnx.evaluation.evaluation import Evaluation, evaluate
from xares_onnx.evaluation.record import read_predictions, read_result
from xares_onnx.files import indented
from xares_onnx.metrics.bootstrap import point
from xares_onnx.metrics.intervals import estimates, interval
from xares_onnx.scoring.scoring import generator

# ---------------------------------------------------------------- scored again


@pytest.fixture(scope="module", params=["corrected", "xares"])
@quick_sweeps()
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """Every kind, classes in folds, and classes in crops."""
    folder = tmp_path_factory.mktemp(request.param)
    tasks = [write_kind(folder, kind, epochs=2) for kind in KINDS]
    tasks.append(write_task(folder, "folded", folds=3))
    for number, count in enumerate((16, 24, 12)):
        write_shard(folder / f"data/folded/fold{number}-0.tar", tones(count, number, noise=3))
    tasks.append(write_task(folder, "cropped", crop_seconds=1.0))
    for number, part in enumerate(("train", "valid", "test")):
        clips = {**tones(12, number, seconds=2.5, noise=4, prefix="long"), **tones(8, number + 9, noise=4)}
        write_shard(folder / f"data/cropped/{part}-0.tar", clips)
    model = write_bank(folder / "bank.onnx", hop=320)
    return evaluate(
        model,
        [str(task) for task in tasks],
        data=folder / "data",
        cache=folder / "cache",
        output=folder / "result.json",
        protocol=request.param,
        seeds=2,
    )


def test_every_score_and_interval_comes_out_of_what_is_kept(done: Evaluation) -> None:
    assert done.path is not None
    side = Side.read(done.path)
    records = list(side.scored().values())
    assert {record.metric for record in records} == {
        "accuracy",
        "mean_average_precision",
        "segment_f1_macro",
        "recall_at_1",
        "one_minus_wer",
        "mse",
    }
    assert {record.method for record in records} == {"linear", "knn", "retrieval", "ctc"}
    for record in records:
        _, scorers = verified(side, record)
        scores = point(scorers)
        assert float(scores.mean()) == record.score
        assert scores.mean(axis=1).tolist() == record.per_fold
        assert scores.mean(axis=0).tolist() == record.per_seed
        scale = "share" if record.higher_is_better else "error"
        method = "knn" if record.method == "knn" else "head"
        assert interval(estimates([scorers], generator(record.task, method), None, scale)[0]) == record.ci95
        assert sum(scorer.clips for scorer in scorers) == record.n_test


def test_a_result_compared_with_itself(done: Evaluation) -> None:
    assert done.path is not None
    side = Side.read(done.path)
    found = find_differences(side, done.side("in memory"))
    assert len(found.tasks) == len(side.scored())
    for difference in found.tasks:
        assert (difference.difference, difference.alike) == (0, True)


# ---------------------------------------------------------------- files that are no results


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return saved(tmp_path / "result.json", {"esc50": classes({"x": rng(1).random((3, 20)) < 0.8})})


def test_a_result_reads_back(path: Path) -> None:
    assert indented(read_result(path)) == path.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a result"),
        (b"not json", "is not a result"),
        (b"[]", "is not a result"),
        (b"{}", "schema_version"),
        (b'{"schema_version": 2}', "has schema_version 2, and this version of xares-onnx reads 1"),
        (b'{"schema_version": 1}', "missing required field `encoder`"),
        (b'{"schema_version": "1"}', "is not a result"),
        (b'{"schema_version": 1, "a": ' + b"[" * 100_000, "is not a result"),
        (b"\xff\xfe\x00", "is not a result"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "r.json"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_result(file)


def test_no_file_and_too_large_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no result file"):
        read_result(tmp_path / "gone.json")
    with pytest.raises(UsageError, match=r"it is not a regular file\); name the JSON file"):
        read_result(tmp_path)
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UsageError, match="it is larger than 33"):
        read_result(huge)


def test_unknown_fields_are_of_a_later_version(path: Path) -> None:
    raw = json.loads(path.read_bytes())
    raw["tasks"][0]["later"] = raw["later"] = 1
    path.write_text(json.dumps(raw))
    assert read_result(path).tasks[0].task == "esc50"


# ---------------------------------------------------------------- files that are no predictions


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def lying_header() -> bytes:
    """An array that claims a million million rows."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    return buffer.getvalue() + bytes(80)


ROWS: dict[str, Any] = {"key": np.array(["a", "b"]), "fold": np.array(["x", "x"]), "seed": np.array([0, 0])}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not hold predictions"),
        (b"PK\x03\x04 cut", "does not hold predictions"),
        (npz(key=ROWS["key"]), "there is no column 'fold'"),
        (npz(fold=ROWS["fold"]), "there is no column 'key'"),
        (npz(**{**ROWS, "target": np.arange(3)}), "differ in length"),
        (npz(**{**ROWS, "target": np.array(1)}), "differ in length"),
        (npz(**{**ROWS, "seed": np.array([0.0, 0.5])}), "must be texts, and seed a whole number"),
        (npz(**{**ROWS, "key": np.array([{}, {}], object)}), "allow_pickle"),
        (zipped("key.npy", b"no array"), "does not hold predictions"),
        (zipped("key.npy", lying_header()), "does not hold predictions"),
    ],
)
def test_what_are_no_predictions_is_refused(path: Path, content: bytes, message: str) -> None:
    (record,) = read_result(path).tasks
    (path.parent / str(record.predictions)).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_predictions(path, record)


def test_a_bomb_is_not_unpacked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = read_result(path).tasks
    read_predictions(path, record)
    monkeypatch.setattr(results, "_MAX_PREDICTION_BYTES", 100)
    with pytest.raises(DataError, match="holds more than"):
        read_predictions(path, record)


@pytest.mark.parametrize("place", ["../up.npz", "/etc/passwd", "a/../../up.npz", "a\\..\\up.npz", "nul\0.npz"])
def test_predictions_lie_beside_their_result(path: Path, place: str) -> None:
    raw = json.loads(path.read_bytes())
    raw["tasks"][0]["predictions"] = place
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="outside its own folder"):
        read_predictions(path, read_result(path).tasks[0])


def test_predictions_that_are_not_there(path: Path) -> None:
    (record,) = read_result(path).tasks
    file = path.parent / str(record.predictions)
    file.unlink()
    with pytest.raises(DataMissingError, match=r"keep them beside result\.json"):
        read_predictions(path, record)
    file.mkdir()
    with pytest.raises(DataError, match="does not hold predictions as an evaluation writes them: it is not a regular file"):
        read_predictions(path, record)


def test_an_unknown_metric_is_data_that_do_not_fit(path: Path) -> None:
    raw = json.loads(path.read_bytes())
    raw["tasks"][0]["metric"] = "bleu"
    path.write_text(json.dumps(raw))
    side = Side.read(path)
    with pytest.raises(DataError, match="there is no metric 'bleu'"):
        verified(side, side.result.tasks[0])
