"""Tables, CSV, Markdown and model cards of results; the Python door; and what the command line says of what it cannot do."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml
from cli_world import run, said
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from report_results import predictions, record, result, right, save

import xares_onnx
from xares_onnx import read_result, table
from xares_onnx.data.catalog import shipped_tasks
from xares_onnx.errors import UsageError
from xares_onnx.evaluation.differences import Side
from xares_onnx.evaluation.evaluation import Evaluation
from xares_onnx.report.board import make_board
from xares_onnx.report.markdown import markdown
from xares_onnx.report.model_index import model_index
from xares_onnx.report.table import csv_text
from xares_onnx.scoring.shots import Shots

ESC, VOX, SPEECH = "esc50", "voxlingua33", "speechocean762"


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    truth = np.linspace(0, 10, 40)
    layers = {"layer.0": {ESC: right(range(77))}}
    a = save(tmp_path, "a", {ESC: right(range(60)), SPEECH: predictions(truth, [truth + 3])}, taps=layers)
    b = save(tmp_path, "b", {ESC: right(range(66)), SPEECH: predictions(truth, [truth + 2])})
    return a, b


# ---------------------------------------------------------------- the Python door


def test_every_public_name_exists() -> None:
    assert {"evaluate", "compare", "load_encoder", "read_result", "table"} <= set(xares_onnx.__all__)
    for name in xares_onnx.__all__:
        assert getattr(xares_onnx, name) is not None
    for function in (xares_onnx.evaluate, xares_onnx.load_encoder, read_result, table):
        assert function.__doc__
        assert "return" in function.__annotations__
    assert (Path(xares_onnx.__file__).parent / "py.typed").is_file()


def test_a_table_is_flat_and_every_row_has_the_same_keys(two: tuple[Path, Path]) -> None:
    rows = table(two)
    assert len({tuple(row) for row in rows}) == 1
    assert all(isinstance(value, str | int | float | bool | None) for row in rows for value in row.values())
    assert [(row["model"], row["task"], row["tap"]) for row in rows] == [
        ("b", ESC, None),
        ("b", SPEECH, None),
        ("a", ESC, None),
        ("a", SPEECH, None),
        ("a", ESC, "layer.0"),
    ]
    assert [row["score"] for row in rows] == pytest.approx([0.66, 4, 0.6, 9, 0.77])
    assert [row["best"] for row in rows] == [True, True, False, False, None]
    assert [row["within_noise"] for row in rows] == [False, False, False, False, None]
    assert [row["compared_by"] for row in rows] == [None, None, "paired", "paired", None]
    own = record(ESC, right(range(60)))
    assert own.ci95 is not None
    row = rows[2]
    assert (row["ci_low"], row["ci_high"]) == own.ci95
    assert (row["dim"], row["hop_ms"], row["protocol"], row["rtf"]) == (64, 10.0, "corrected", 0.01)
    published = shipped_tasks()[ESC].published
    assert published is not None
    assert {name: row[f"published_{name}"] for name in published.linear} == published.linear


def test_a_table_takes_paths_and_results(two: tuple[Path, Path]) -> None:
    one = table(two[0])
    assert one == table(str(two[0])) == table([two[0]]) == table(read_result(two[0]))
    assert [row["best"] for row in one] == [None] * 3
    bare = table([read_result(path) for path in two])
    assert [row["compared_by"] for row in bare] == [None, None, "intervals", "intervals", None]
    evaluations = [
        Evaluation(read_result(path), {(ESC, "linear"): right(range(n))}) for path, n in zip(two, (60, 66), strict=True)
    ]
    for evaluation in evaluations:
        evaluation.result = msgspec.structs.replace(evaluation.result, tasks=evaluation.result.tasks[:1])
    assert [row["compared_by"] for row in table(evaluations)] == [None, "paired"]
    assert [row["score"] for row in table(evaluations[0])] == [0.6]
    with pytest.raises(UsageError, match="a dict is not a result"):
        table([{}])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="there is no result to report"):
        table([])


def test_a_table_tells_noise_from_the_best(tmp_path: Path) -> None:
    a, b = save(tmp_path, "a", {ESC: right(range(60))}), save(tmp_path, "b", {ESC: right(range(34, 100))})
    verdicts = {row["model"]: (row["best"], row["within_noise"], row["compared_by"]) for row in table([a, b])}
    assert verdicts == {"a": (False, True, "paired"), "b": (True, False, None)}


def test_a_table_stays_flat_whatever_a_file_holds(tmp_path: Path) -> None:
    odd: dict[str, Any] = {"protocol": {"a": [1]}, "seeds": [3], "limit": None}
    (row,) = table(save(tmp_path, "a", {ESC: right(range(60))}, settings=odd))
    assert (row["protocol"], row["seeds"]) == ("a 1", "3")


def test_a_table_becomes_a_data_frame(two: tuple[Path, Path]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(table(two))
    assert frame.query("task == 'esc50' and best == True").model.tolist() == ["b"]


# ---------------------------------------------------------------- CSV


def test_csv_parses_back(two: tuple[Path, Path]) -> None:
    rows = table(two)
    read = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert [list(row) for row in read] == [list(row) for row in rows]
    for text, row in zip(read, rows, strict=True):
        for name, value in row.items():
            if value is None:
                assert text[name] == ""
            elif isinstance(value, bool):
                assert text[name] == str(value).lower()
            elif isinstance(value, float):
                assert float(text[name]) == value
            else:
                assert text[name] == str(value)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", 'a,"b"\nc', "'a"])
def test_csv_has_no_formulas(text: str) -> None:
    [[heading], [cell]] = csv.reader(io.StringIO(csv_text([{"file": text}])))
    assert heading == "file"
    assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert csv_text([{"score": -0.5}]).splitlines()[1] == "-0.5"


# ---------------------------------------------------------------- Markdown


def test_markdown_has_the_scores_with_their_marks(two: tuple[Path, Path]) -> None:
    text = markdown(make_board([Side.read(path) for path in two]))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    (esc,) = (cells for cells in lines if cells[0] == "ESC-50")
    assert esc[1] == "accuracy"
    assert esc[2].startswith("0.660 ★ (")
    assert esc[3].startswith("0.600 (")
    published = shipped_tasks()[ESC].published
    assert published is not None
    assert esc[4:] == [f"{score:.3f}" for score in published.linear.values()]
    (error,) = (cells for cells in lines if cells[0] == "speechocean762")
    assert error[1] == "MSE ↓"
    assert error[2].startswith("4.000 ★")
    assert len({len(cells) for cells in lines if len(cells) > 3}) == 1


def test_markdown_escapes_names() -> None:
    hostile = result([record(ESC, right(range(60)), title="a|b\n# <img src=x> [x](http://y)")], "m|<b>")
    text = markdown(make_board([Side.of_result("a.json", hostile)]))
    (line,) = (line for line in text.splitlines() if "img" in line)
    assert line.startswith(r"| a\|b \# &lt;img src=x&gt; \[x\](http://y) |")
    assert "<b>" not in text


# ---------------------------------------------------------------- model cards


def test_a_model_index_has_the_fields_of_a_model_card(tmp_path: Path) -> None:
    truth = np.linspace(0, 10, 40)
    limited = {VOX: {"comparable": False}}
    spoken = predictions(["one two", "three"], [["one", "three"]])
    spoken["word_errors"] = np.array([[1, 2], [0, 1]])
    tasks = {ESC: right(range(60)), SPEECH: predictions(truth, [truth + 2]), VOX: right(range(50)), "librispeech": spoken}
    path = save(tmp_path, "a", tasks, methods={"librispeech": "ctc"}, records=limited)
    text = model_index(make_board([Side.read(path)]))
    block = yaml.safe_load(text)
    name, results = model_index_to_eval_results(block["model-index"])
    assert name == "a"
    by_type = {(r.dataset_type, r.metric_type): r for r in results}
    assert set(by_type) == {
        (ESC, "accuracy"),
        (SPEECH, "mse"),
        ("librispeech", "wer"),
        ("x-ares-public", "weighted_average"),
        ("x-ares-speech", "weighted_average"),
        ("x-ares-environment", "weighted_average"),
    }
    assert by_type[ESC, "accuracy"].metric_value == 0.6
    assert by_type[SPEECH, "mse"].metric_value == pytest.approx(4)
    assert by_type["librispeech", "wer"].metric_value == pytest.approx(1 / 3)
    assert by_type["librispeech", "wer"].task_type == "automatic-speech-recognition"
    assert by_type[ESC, "accuracy"].metric_args["ci95"] == list(record(ESC, right(range(60))).ci95 or ())
    card = ModelCard(f"---\n{text}license: mit\n---\n# a\n")
    assert isinstance(card.data, ModelCardData)
    assert card.data.eval_results is not None
    assert len(card.data.eval_results) == 6


def test_a_model_index_needs_one_model_with_comparable_scores(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a model-index describes one model, not 2"):
        model_index(make_board([Side.read(path) for path in two]))
    limited = result([record(ESC, right(range(60)), comparable=False)])
    with pytest.raises(UsageError, match="no comparable score"):
        model_index(make_board([Side.of_result("a.json", limited)]))


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("name", "start"),
    [("r.html", "<!doctype html>"), ("r.md", "## X-ARES"), ("r.csv", "model,file,"), ("r.yaml", "model-index:")],
)
def test_the_file_extension_decides_the_format(two: tuple[Path, Path], tmp_path: Path, name: str, start: str) -> None:
    code, out, err = run("report", str(two[0]), "-o", str(tmp_path / "new" / name))
    assert (code, out, err) == (0, f"wrote {tmp_path / 'new' / name}\n", "")
    assert (tmp_path / "new" / name).read_text(encoding="utf-8").startswith(start)


def test_without_a_name_markdown_goes_to_stdout(two: tuple[Path, Path]) -> None:
    code, out, _ = run("report", *map(str, two))
    assert code == 0
    assert out == markdown(make_board([Side.read(path) for path in two]))
    assert run("report", str(two[0]), "--format", "csv")[1] == csv_text(table(two[0]))


def test_a_result_named_twice_is_shown_once(two: tuple[Path, Path]) -> None:
    assert run("report", str(two[0]), str(two[0]))[1] == run("report", str(two[0]))[1]


def change(path: Path, **changes: Any) -> Path:
    changed = path.with_name("changed.json")
    changed.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return changed


@pytest.mark.parametrize(
    ("changes", "code", "sentence"),
    [
        ({"schema_version": 2}, 2, "has schema_version 2, and this version of xares-onnx reads 1; evaluate again"),
        ({"tasks": "none"}, 2, "is not a result of `xares-onnx evaluate`"),
        ({"settings": {"protocol": "xares"}}, 2, "was scored with --protocol corrected and changed.json with xares"),
    ],
)
def test_results_that_cannot_be_reported_are_refused(
    two: tuple[Path, Path], changes: dict[str, Any], code: int, sentence: str
) -> None:
    exit_code, out, err = run("report", str(two[0]), str(change(two[1], **changes)), "-o", str(two[0].with_suffix(".html")))
    assert (exit_code, out) == (code, "")
    assert sentence in said(err)
    assert not two[0].with_suffix(".html").exists()


def test_other_data_are_a_data_error(two: tuple[Path, Path]) -> None:
    tasks = json.loads(two[1].read_text())["tasks"]
    code, _, err = run("report", str(two[0]), str(change(two[1], tasks=[{**tasks[0], "data_digest": "e" * 64}])))
    assert code == 4
    assert "was scored on other data of esc50" in said(err)


def test_usage_errors_come_before_reading(two: tuple[Path, Path], tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere.json")
    for arguments, sentence in (
        ((missing, "-o", "r.pdf"), "-o r.pdf must end in .html, .md, .csv or .yaml"),
        ((missing, "--format", "pdf"), "--format 'pdf' must be html, md, csv or model-index"),
        ((missing, "-o", "r.csv", "--data", str(tmp_path)), "--data includes sound in an HTML page"),
        ((missing, "-o", str(tmp_path / "r.html")), f"there is no result file {missing}"),
        ((str(two[0]), "-o", str(two[0]), "--format", "md"), "would overwrite a result"),
    ):
        code, out, err = run("report", *arguments)
        assert (code, out) == (2, "")
        assert sentence in said(err)
    assert msgspec.json.decode(two[0].read_bytes())["schema_version"] == 1


def test_few_clips_are_a_table_of_markdown(tmp_path: Path) -> None:
    rows = [Shots(clips_per_class=count, score=score, ci95=(0.1, 0.9), draws=[]) for count, score in ((2, 0.25), (10, 0.5))]
    a = save(tmp_path, "a", {ESC: right(range(60))}, records={ESC: {"shots": rows}})
    b = save(tmp_path, "b", {ESC: right(range(50))}, records={ESC: {"shots": rows[:1]}})
    text = markdown(make_board([Side.read(a), Side.read(b)]))
    assert "| by training clips per class | model | 2 | 10 |\n| --- | --- | ---: | ---: |" in text
    assert "| ESC-50 | a | 0.250 (0.100-0.900) | 0.500 (0.100-0.900) |" in text
    assert "| ESC-50 | b | 0.250 (0.100-0.900) |  |" in text
    assert "training clips" not in markdown(make_board([Side.of_result("c", result([record(ESC, right(range(9)))]))]))
