"""The page about a user's own task: its code and its commands are run as they stand there, and print what it shows."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli_world import run

from xares_onnx.data.audio import READABLE_EXTENSIONS
from xares_onnx.packing.columns import _CAPTIONS, _TARGETS, PATHS, SPLIT_OF
from xares_onnx.packing.labels import KINDS

PAGE = (Path(__file__).parents[2] / "docs/your-own-task.md").read_text()
EXAMPLE = PAGE.split("\n## From end to end")[1].split("\n## ")[0]


def test_the_page_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XARES_ONNX_CACHE", str(tmp_path / "cache"))
    (code,) = re.findall(r"```python\n(.*?)```", EXAMPLE, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    commands = re.findall(r"^    xares-onnx ((?:export|pack|evaluate) (?!MODEL).*)$", EXAMPLE, flags=re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["export", "pack", "evaluate"]
    printed = []
    for command in commands:
        code_, out, err = run(*shlex.split(command))
        assert code_ == 0, err
        printed.append(out)
    shown = "\n".join(line.removeprefix("    ") for line in EXAMPLE.splitlines())
    assert printed[1].strip() in shown  # what was packed, to the letter
    follows = printed[1].strip().splitlines()[-1].replace("MODEL", "logmel.onnx")
    assert follows == f"xares-onnx {commands[2]}"  # the command that it prints is the page's next one
    (saved,) = (tmp_path / "results").glob("*.json")
    head, knn = json.loads(saved.read_bytes())["tasks"]
    (row,) = (line for line in shown.splitlines() if line.startswith("| mine "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert int(cells[8]) == head["n_test"]
    for record, cell in ((head, cells[3]), (knn, cells[6])):
        assert record["status"] == "ok"
        assert record["score"] == pytest.approx(float(cell), abs=0.1)


def test_every_column_and_kind_is_on_the_page() -> None:
    words = set(re.findall(r"`(\w+)`", PAGE))
    assert {*PATHS, *_TARGETS, "split", "fold", "group"} <= words
    assert all(_CAPTIONS.fullmatch(word) for word in words if word.startswith("caption"))
    (named,) = re.findall(r"\| `split` \| (.*?) \|", PAGE)
    assert set(SPLIT_OF) - {"training", "testing"} <= set(re.findall(r"\w+", named))
    code, out, _ = run("pack", "--help")
    assert code == 0
    assert {"m4a", "mp4"}.isdisjoint(READABLE_EXTENSIONS)
    options = set(re.findall(r"`(--[a-z-]+)", PAGE))
    assert len(options) > 8
    assert all(option in out for option in options)
    assert all(kind in out for kind in KINDS)
