"""What continuous integration reads: whatever a text holds, it stays the text of its case."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xares_onnx.errors import MachineError
from xares_onnx.report.ci import Case, github, junit, markdown_cell, write_step_summary

CASES = [
    Case("frames", "hop", "fail", "declared 320, measured 160", "correct it", 0.25),
    Case("frames", "law", "pass", "one law"),
    Case("values", "gain", "warn", "moves", "say why"),
    Case("values", "parity", "skip", "no reference"),
]
HOSTILE = 'a]]>&<b "c"\x00\x1b[31m\ud800 % ::error::x\r\n::warning::y,file=z ##[group]'


def texts(root: ElementTree.Element, path: str, attribute: str) -> list[str]:
    return [element.attrib[attribute] for element in root.findall(path)]


def test_junit_counts_suites_and_outcomes() -> None:
    root = ElementTree.fromstring(junit("model.onnx", CASES))
    assert root.tag == "testsuites"
    counts = ("tests", "failures", "errors", "skipped")
    assert [root.attrib[name] for name in ("name", *counts, "time")] == ["model.onnx", "4", "1", "0", "1", "0.250"]
    assert [[suite.attrib[name] for name in ("name", *counts)] for suite in root] == [
        ["frames", "2", "1", "0", "0"],
        ["values", "2", "0", "0", "1"],
    ]
    assert texts(root, ".//testcase", "name") == ["hop", "law", "gain", "parity"]
    assert texts(root, ".//testcase", "classname") == ["frames", "frames", "values", "values"]
    (failure,) = root.findall(".//failure")
    assert (failure.attrib["message"], failure.text) == ("declared 320, measured 160", "correct it")
    assert texts(root, ".//skipped", "message") == ["no reference"]
    assert [element.text for element in root.findall(".//system-out")] == ["one law", "warning: moves\nsay why"]


@pytest.mark.parametrize("status", ["pass", "warn", "fail", "skip"])
def test_junit_takes_any_text(status: str) -> None:
    root = ElementTree.fromstring(junit(HOSTILE, [Case(HOSTILE, HOSTILE, status, HOSTILE, HOSTILE)]).encode())  # type: ignore[arg-type]
    assert root.attrib["name"].startswith('a]]>&<b "c"\\x00\\x1b[31m\\ud800 %')
    assert len(root.findall(".//testcase")) == 1


@given(st.text())
def test_junit_is_valid_for_any_name(text: str) -> None:
    case = Case(text, text, "fail", text, text)
    ElementTree.fromstring(junit(text, [case]).encode())


def test_github_annotates_failures_and_warnings() -> None:
    lines = github("model.onnx", CASES, file="models/a,b.onnx", summary="1 failed").splitlines()
    assert lines == [
        "::error file=models/a%2Cb.onnx,title=model.onnx%3A hop::declared 320, measured 160%0Acorrect it",
        "::warning file=models/a%2Cb.onnx,title=model.onnx%3A gain::moves%0Asay why",
        "1 failed",
    ]


def test_github_without_a_file() -> None:
    text = github("model", CASES[:1], file=None, summary="")
    assert text == "::error title=model%3A hop::declared 320, measured 160%0Acorrect it\n"


def test_nothing_in_a_text_becomes_a_command() -> None:
    cases = [Case("s", HOSTILE, "fail", HOSTILE, HOSTILE), Case("s", HOSTILE, "pass", HOSTILE)]
    lines = github(HOSTILE, cases, file=HOSTILE, summary=HOSTILE).splitlines()
    assert len([line for line in lines if re.match(r"\s*::", line)]) == 1
    assert not [line for line in lines[1:] if "##[" in line]
    head, _, message = lines[0].removeprefix("::error ").partition("::")
    assert [part.partition("=")[0] for part in head.split(",")] == ["file", "title"]
    assert unquote(message.partition("%0A")[0]).startswith('a]]>&<b "c"')
    assert "\x1b" not in lines[0]


def test_a_step_summary_is_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert not write_step_summary("# one")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert write_step_summary("# one")
    assert write_step_summary("# two\n")
    assert (tmp_path / "summary.md").read_text() == "# one\n# two\n"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "missing/summary.md"))
    with pytest.raises(MachineError, match=r"the step summary .* cannot be written"):
        write_step_summary("# three")


def test_a_table_cell_holds_no_markup() -> None:
    assert markdown_cell("a | b\n<img src=x> [c](d) `e` *f*") == r"a \| b &lt;img src=x&gt; \[c\](d) \`e\` \*f\*"
