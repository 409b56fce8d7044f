"""The synthetic suite: a profile, with no average that would rank encoders; a gate on one only if it is named."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from report_results import predictions, right, save
from rich.console import Console

from xares_onnx.data.catalog import shipped_tasks
from xares_onnx.evaluation.differences import Side, find_differences
from xares_onnx.evaluation.gates import Floor, Gates
from xares_onnx.evaluation.record import Result, read_result
from xares_onnx.report.board import Board, make_board
from xares_onnx.report.markdown import markdown
from xares_onnx.report.page.html import html
from xares_onnx.report.profile import aspects
from xares_onnx.report.remarks import headline
from xares_onnx.report.terminal import print_result

VOWEL, PITCH, ESC = "synthetic_vowel", "synthetic_pitch", "esc50"


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [
        save(tmp_path, name, {VOWEL: right(range(n)), PITCH: right(range(n - 20))}) for name, n in (("a", 90), ("b", 60))
    ]


def board(*paths: Path) -> Board:
    return make_board([Side.read(path) for path in paths])


def printed(result: Result) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_result(result, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_every_synthetic_task_has_an_aspect() -> None:
    tasks = shipped_tasks()
    assert {row.task for row in aspects(tasks)} == {name for name, task in tasks.items() if task.domain == "synthetic"}
    chance = {row.task: row.chance for row in aspects([PITCH, "synthetic_number"])}
    assert chance == {PITCH: pytest.approx(1 / 12), "synthetic_number": None}


def test_a_report_has_a_profile_and_no_average(paths: list[Path]) -> None:
    compared = board(*paths)
    assert compared.averages == ()
    assert "no average: the synthetic suite says what an encoder keeps" in headline(compared)
    text = markdown(compared)
    assert "weighted average" not in text
    assert "| what is kept | by the task | metric | chance | a | b |" in text
    assert "| pitch | Pitch class | accuracy | 0.083 | 0.700 ★ | 0.400 |" in text
    page = html(compared)
    assert '<section id="profile"' in page
    assert "is best with" not in page


def test_other_tasks_keep_their_average(tmp_path: Path) -> None:
    path = save(tmp_path, "c", {ESC: right(range(60)), VOWEL: right(range(20))})
    compared = board(path)
    assert [row.tasks for row in compared.averages] == [(ESC,)]
    text = printed(read_result(path))
    assert "what is kept" in text
    (average,) = (line for line in text.splitlines() if line.startswith("| public"))
    assert "0.600" in average
    assert not any(line.startswith("| synthetic ") for line in text.splitlines())


def test_without_synthetic_tasks_there_is_no_profile(tmp_path: Path) -> None:
    path = save(tmp_path, "d", {ESC: right(range(60))})
    assert "what is kept" not in printed(read_result(path)) + markdown(board(path)) + html(board(path))


def test_a_terminal_shows_a_profile_without_an_average(paths: list[Path]) -> None:
    text = printed(read_result(paths[0]))
    assert "weighted average" not in text
    (row,) = (line for line in text.splitlines() if "Pitch class" in line and "pitch" in line.split("|")[1])
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "pitch", "Pitch class", "accuracy", "0.083", "0.700", "",
    ]  # fmt: skip


def test_no_average_is_compared_and_none_gated_by_a_baseline(paths: list[Path]) -> None:
    a, b = (Side.read(path) for path in paths)
    assert find_differences(a, b).averages == []
    assert {gate.task for gate in Gates(baseline=a).judge(b)} == {VOWEL, PITCH}


def test_a_floor_that_names_the_average_is_judged(paths: list[Path]) -> None:
    gates = Gates(floors=(Floor.parsed("synthetic=0.6"),))
    settings: dict[str, Any] = {"methods": ["head"], "limit": None, "protocol": "corrected"}
    gates.check([shipped_tasks()[name] for name in (VOWEL, PITCH)], settings)
    statuses = [gates.judge(Side.read(path))[0].status for path in paths]
    assert statuses == ["pass", "fail"]


def test_an_error_metric_is_marked_lower_is_better(tmp_path: Path) -> None:
    path = save(tmp_path, "n", {"synthetic_number": predictions([1.0, 2.0, 3.0], [[1.0, 2.0, 4.0]])})
    assert "| noise | Noisiness | MSE, lower is better |  | 0.333 |" in markdown(board(path))
