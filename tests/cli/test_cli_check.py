"""`xares-onnx check`: what stands on which stream in each format, exit codes, and the user's pyproject.toml."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import onnx_models as models
import pytest
from check_models import declared, never_ends_on_dc, sound
from cli_world import run, said, table
from layered_model import layered
from onnx_models import save

from xares_onnx.checking.registry import PROPERTIES
from xares_onnx.encoder import limits
from xares_onnx.encoder.encoder import load_encoder

GOOD, HOP, STATE = "good.onnx", "hop.onnx", "state.onnx"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_process: None) -> Path:
    """Three models in a folder without a pyproject.toml, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    save(sound(), tmp_path / GOOD)
    save(declared(models.encoder(), xares__hop_samples="320"), tmp_path / HOP)
    save(declared(models.stateful()), tmp_path / STATE)
    return tmp_path


def check(model: str, *arguments: str) -> tuple[int, str, str]:
    return run("check", model, "--device", "cpu", "--threads", "2", *arguments)


def results(out: str) -> dict[str, str]:
    return {row[0]: row[1] for row in table(out)}


def test_a_good_model_is_a_table_and_nothing_else(folder: Path) -> None:
    code, out, err = check(GOOD)
    assert (code, err) == (0, "")
    by_property = results(out)
    assert list(by_property) == list(PROPERTIES)
    assert set(by_property.values()) == {"pass", "skip"}
    first, *_, contract, last = out.splitlines()
    assert first.startswith("encoder good.onnx  ")
    assert "4 dimensions, a frame every 10 ms, 16000 Hz, CPU" in first
    assert "hop_samples=160 (measured, as declared in metadata)" in contract
    assert last.startswith("26 pass, 6 skip in ")


def test_a_faulty_model_exits_1_with_a_remedy(folder: Path) -> None:
    code, out, err = check(HOP)
    assert (code, err) == (1, "")
    assert results(out)["hop"] == "fail"
    (line,) = [line for line in out.splitlines() if line.startswith("fail ")]
    assert line.startswith("fail hop: metadata declares hop_samples=320, but 160 was measured; correct the declaration")
    assert "; with a wrong hop every frame label is at a wrong time" in line


@pytest.mark.parametrize("format_", ["text", "json", "junit", "github"])
def test_an_unusable_model_exits_3_in_every_format(format_: str, folder: Path) -> None:
    code, out, err = check(STATE, "--format", format_)
    assert code == 3
    assert said(err).startswith("the model keeps a state: input 'state' takes output 'new_state'")
    assert "inputs" in out
    assert "the model keeps a state" in out


def test_a_hanging_model_exits_3_with_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_process: None
) -> None:
    load_encoder(save(sound(), tmp_path / "quick.onnx"))  # the process has started, so a silence is the model's
    monkeypatch.setattr(limits, "SILENCE_SECONDS", 3.0)
    monkeypatch.chdir(tmp_path)
    save(never_ends_on_dc(), tmp_path / "loop.onnx")
    code, out, err = check("loop.onnx", "--format", "json")
    assert code == 3
    assert "no sign of life" in said(err)
    report = json.loads(out)
    status = {finding["property"]: finding["status"] for finding in report["findings"]}
    assert (status["hop"], status["finite"], status["rank"]) == ("pass", "fail", "skip")
    assert report["unusable"] == said(err)


def test_a_check_that_ends_early_says_the_failure_first(folder: Path) -> None:
    _, out, _ = check(STATE)
    heading, failure, *_, last = out.splitlines()
    assert heading.startswith("encoder state.onnx  ")
    assert failure.startswith("fail inputs: the model keeps a state")
    assert results(out) == {"loads": "pass", "inputs": "fail"}
    assert last.startswith(f"1 fail, 1 pass, {len(PROPERTIES) - 2} properties were not reached in ")
    assert out.count("fail inputs: ") == 1


def test_a_stopped_check_says_the_failure_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_process: None
) -> None:
    load_encoder(save(sound(), tmp_path / "quick.onnx"))
    monkeypatch.setattr(limits, "SILENCE_SECONDS", 3.0)
    monkeypatch.chdir(tmp_path)
    save(never_ends_on_dc(), tmp_path / "loop.onnx")
    code, out, _ = check("loop.onnx", "--profile")
    assert code == 3
    assert out.splitlines()[1].startswith("fail finite: ")
    reached = list(PROPERTIES)[: list(PROPERTIES).index("finite") + 1]
    assert list(results(out)) == reached
    assert f"{len(PROPERTIES) - len(reached)} properties were not reached" in out


def test_the_other_formats_list_what_was_not_reached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
    report = json.loads(check(STATE, "--format", "json")[1])
    assert [finding["property"] for finding in report["findings"] if finding["reached"]] == ["loads", "inputs"]
    root = ElementTree.fromstring(check(STATE, "--format", "junit")[1].encode())
    assert root.attrib["skipped"] == str(len(PROPERTIES) - 2)
    _, out, _ = check(STATE, "--format", "github")
    assert f"{len(PROPERTIES) - 2} properties were not reached" in out
    summary = (folder / "summary.md").read_text()
    assert [line.split(" | ")[0] for line in summary.splitlines() if line.startswith("| ")][1:] == ["| inputs", "| loads"]


@pytest.mark.parametrize("format_", ["text", "junit", "github"])
@pytest.mark.parametrize("model", [".", "..", "../here", "./"])
def test_a_folder_has_a_name(
    model: str, format_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_process: None
) -> None:
    for name in ("here", "here/below"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.chdir(tmp_path / ("here/below" if model == ".." else "here"))
    save(declared(models.encoder(), xares__hop_samples="320"), tmp_path / "here/model.onnx")
    code, out, _ = check(model, "--format", format_)
    assert code == 1
    start = {"text": "encoder here  ", "junit": 'name="xares-onnx check here"', "github": "title=here%3A hop::"}[format_]
    assert start in out


def test_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
    layered(folder / "layered.onnx", layers=2, output="stream2")
    code, out, _ = check("layered.onnx", "--profile")
    assert code == 0
    (heading,) = [line for line in out.splitlines() if line.startswith("profile: ")]
    assert " ms in the kernels of CPU for 10 s of audio with one thread, the median of " in heading
    rows = {row[0]: row for row in table(out)}
    assert {"operator", "layer", "Conv", "before the layers", "layer.1", "layer.2", "after the layers"} <= set(rows)
    assert rows["Conv"][3].endswith(" %")
    assert check("layered.onnx", "--profile", "--format", "github")[0] == 0
    summary = (folder / "summary.md").read_text()
    assert "| layer | kernels | ms | share |" in summary
    assert "| layer.1 | " in summary
    report = json.loads(check("layered.onnx", "--profile", "--format", "json")[1])
    assert report["profile"]["provider"] == "CPUExecutionProvider"
    assert [part["name"] for part in report["profile"]["layers"]][1:3] == ["layer.1", "layer.2"]
    assert set(report["profile"]["operators"][0]) == {"name", "kernels", "milliseconds", "share"}
    assert json.loads(check("layered.onnx", "--format", "json")[1])["profile"] is None


def test_json(folder: Path) -> None:
    code, out, err = check(HOP, "--format", "json")
    assert (code, err) == (1, "")
    report = json.loads(out)
    assert report["schema_version"] == 1
    assert report["contract"]["sample_rate"] == {"value": 16000, "source": "metadata"}
    assert report["model"]["opsets"] == {"ai.onnx": 17, "vendor": 1}
    assert report["model"]["ir_version"] == 8
    (hop,) = [finding for finding in report["findings"] if finding["property"] == "hop"]
    assert {key: hop[key] for key in ("status", "measured", "tolerance", "unit")} == {
        "status": "fail",
        "measured": 160,
        "tolerance": "as declared",
        "unit": "samples",
    }
    assert hop["remedy"]


def test_junit(folder: Path) -> None:
    code, out, err = check(HOP, "--format", "junit")
    assert (code, err) == (1, "")
    root = ElementTree.fromstring(out.encode())
    assert [root.attrib[key] for key in ("tests", "failures", "skipped")] == [str(len(PROPERTIES)), "1", "6"]
    (failed,) = [case for case in root.iter("testcase") if case.find("failure") is not None]
    assert failed.attrib["name"] == "hop"
    assert [case.attrib["name"] for case in root.iter("testcase")] == list(PROPERTIES)


def test_github(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "summary.md"))
    code, out, err = check(HOP, "--format", "github")
    assert (code, err) == (1, "")
    annotation, last = out.splitlines()
    assert annotation.startswith("::error file=hop.onnx,title=hop.onnx%3A hop::metadata declares hop_samples=320, but")
    assert last.startswith("1 fail, 25 pass, 6 skip in ")
    summary = (folder / "summary.md").read_text()
    rows = [line for line in summary.splitlines() if line.startswith("| ")]
    assert rows[1].startswith("| hop | **fail** | 160 samples | as declared | metadata declares hop\\_samples=320")
    assert len(rows) == 1 + len(PROPERTIES)


# ---------------------------------------------------------------- pyproject.toml

SEVERITIES = '[tool.xares-onnx.check]\nhop = "warn"\nmemory = { severity = "error", tolerance = 1 }\nparity = "off"\n'


def test_severities_of_the_nearest_pyproject(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "pyproject.toml").write_text(SEVERITIES)
    code, out, _ = check(HOP)
    by_property = results(out)
    assert (code, by_property["hop"], by_property["memory"]) == (1, "warn", "fail")
    below = folder / "a/b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert results(check(f"../../{HOP}")[1])["hop"] == "warn"
    (folder / "a/pyproject.toml").write_text("[project]\n")
    assert results(check(f"../../{HOP}")[1])["hop"] == "fail"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[tool.xares-onnx.check]\nhopp = "off"\n', "there is no property 'hopp'; did you mean 'hop'?"),
        ('[tool.xares-onnx.check]\nhop = "of"\n', "hop = 'of' must be one of error, warn, off"),
        ("[tool.xares-onnx.check]\nhop = 3\n", 'hop must be "error", "warn" or "off", or a table'),
        ("[tool.xares-onnx.check]\nhop = { tolerance = 3 }\n", "hop takes no tolerance; set its severity"),
        ('[tool.xares-onnx.check]\nrank = { tolerance = "3" }\n', "the tolerance of rank must be a number, not '3'"),
        ("[tool.xares-onnx.check]\nrank = { tolerance = nan }\n", "the tolerance of rank must be a number, not nan"),
        ('[tool.xares-onnx.check]\nrank = { severty = "off" }\n', "rank has no 'severty'; did you mean 'severity'?"),
        ("[tool.xares-onnx]\ncheck = 3\n", "must be a table of properties"),
        ("[tool]\nxares-onnx = 3\n", "[tool.xares-onnx] must be a table"),
        ("[tool.xares-onnx.chek]\n", "[tool.xares-onnx] has no 'chek'; did you mean 'check'?"),
        ("[tool", "pyproject.toml cannot be read"),
    ],
)
def test_invalid_settings_are_usage_errors(text: str, says: str, folder: Path) -> None:
    (folder / "pyproject.toml").write_text(text)
    code, out, err = check(GOOD)
    assert (code, out) == (2, "")
    assert says in said(err)


def test_other_tools_of_a_pyproject_are_left_alone(folder: Path) -> None:
    (folder / "pyproject.toml").write_text("[tool.xares-onnx.compare]\nx = 1\n[tool.other]\n")
    assert check(GOOD)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "xml"], "--format 'xml' must be one of text, json, junit, github"),
        (["--format", "jsn"], "; did you mean 'json'"),
        (["--reference", "none.npz"], "reference none.npz cannot be read"),
        (["--reference", "none.onnx"], "the reference cannot be used: model none.onnx does not exist"),
        (["--contract", "hop=1"], "there is no contract key 'hop'"),
        (["--threads", "0"], "threads=0 must be 1 or more"),
    ],
)
def test_wrong_usage(arguments: list[str], says: str, folder: Path) -> None:
    code, out, err = check(GOOD, *arguments)
    assert (code, out) == (2, "")
    assert says in said(err)


def test_a_reference_and_declarations_on_the_command_line(folder: Path) -> None:
    code, out, _ = check(GOOD, "--reference", GOOD, "--contract", "hop_samples=160")
    assert code == 0
    assert results(out)["parity"] == "pass"
    code, out, _ = check(GOOD, "--contract", "hop_samples=320")
    assert (code, results(out)["hop"]) == (1, "fail")


def test_a_cache_keeps_the_contract(folder: Path) -> None:
    for _ in range(2):
        assert check(GOOD, "--cache", str(folder / "cache"))[0] == 0
    assert len(list((folder / "cache/models").iterdir())) == 1
