"""Texts of strangers in what is printed: bounded, escaped, no markup, no formula, and no command to a build server."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_models as models
import pytest
from bounds import bounded
from made_results import ENCODER, classes, saved

from xares_onnx.errors import UsageError, foreign, printable, quoted

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")

COMMANDS = ["::stop-commands::x1", "::error::all is well", "##[add-mask]secret", "##vso[task.complete]x"]
EVIL = "a\x1b[31m\x9b31m\u202e<script>\u2066|`b`"
FORMULAS = [
    "=1+1",
    "+1",
    "-1",
    "@A1",
    "\N{FULLWIDTH EQUALS SIGN}1+1",
    "\N{FULLWIDTH PLUS SIGN}1",
    "\N{FULLWIDTH HYPHEN-MINUS}1",
]
FORMULAS += ["\N{FULLWIDTH COMMERCIAL AT}A1", " =1+1"]
_COMMAND = re.compile(r"^\s*::|##\[|##vso", re.MULTILINE)


def result(path: Path, file: str, title: str = "T", right: float = 1.0, **of_record: Any) -> Path:
    """A result of an encoder of this file name, in one task of this title."""
    hits = np.random.default_rng(7).random((1, 40)) < right
    saved(path, {"esc50": classes({"test": hits})}, encoder=msgspec.structs.replace(ENCODER, file=file))
    raw = msgspec.json.decode(path.read_bytes())
    raw["tasks"][0] |= {"title": title, **of_record}
    path.write_bytes(msgspec.json.encode(raw))
    return path


def harmless(text: str, *, lines: str = "") -> None:
    """No control characters, and no command but those whose lines start as `lines`."""
    for line in text.splitlines():
        assert line.isprintable(), line
        assert not _COMMAND.search(line) or (lines and line.startswith(lines)), line


@pytest.mark.parametrize("name", ["::stop-commands::x##[group]x##vso[x]"])
def test_a_model_that_is_a_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.save(models.encoder(metadata={"xares.source": f"{name}\n{name}"}), tmp_path / f"{name}.onnx")
    arguments = ("--tasks", "synthetic_colour", "--limit", "4", "--method", "knn", "--cache", tmp_path / "cache")
    outcome = bounded("evaluate", tmp_path, *arguments, "--output", tmp_path / "out.json", memory=8 << 30)
    assert outcome.code == 0
    harmless(outcome.out + outcome.err)
    assert outcome.out.startswith("encoder ")


@pytest.mark.parametrize("format_", ["text", "junit", "github"])
def test_a_check_of_a_model_that_is_a_command(format_: str, tmp_path: Path) -> None:
    (tmp_path / "::stop-commands::x##[group].onnx").write_bytes(b"none")
    outcome = bounded("check", tmp_path, "--format", format_, seconds=30)
    harmless(outcome.out + outcome.err, lines="::error " if format_ == "github" else "")


@pytest.mark.parametrize("file", [COMMANDS[0], f"{COMMANDS[2]}{COMMANDS[3]}", EVIL])
@pytest.mark.parametrize("format_", ["md", "csv", "model-index"])
def test_a_report(format_: str, file: str, tmp_path: Path) -> None:
    paths = [result(tmp_path / "a.json", file, EVIL), result(tmp_path / "b.json", "b", EVIL, right=0.5)]
    outcome = bounded("report", *paths[: 1 if format_ == "model-index" else 2], "--format", format_, seconds=30)
    assert outcome.code == 0, outcome.err
    harmless(outcome.out)
    if format_ == "md":
        assert "<script>" not in outcome.out
        assert not re.search(r"(?<!\\)`", outcome.out)


@pytest.mark.parametrize("format_", ["github", "text", "junit"])
def test_a_comparison_for_a_build_server(format_: str, tmp_path: Path) -> None:
    file = f"{COMMANDS[0]}{COMMANDS[2]}{EVIL}"
    a, b = result(tmp_path / "a.json", "a.onnx", EVIL), result(tmp_path / "b.json", file, EVIL, right=0.5)
    outcome = bounded("compare", a, b, "--format", format_)
    assert outcome.code == 1, outcome.err
    text = re.sub(r"^::(error|warning) title=[^\n]*\n", "", outcome.out, flags=re.MULTILINE)
    harmless(text + outcome.err)


def test_formulas_in_csv(tmp_path: Path) -> None:
    paths = [result(tmp_path / f"{number}.json", text, text) for number, text in enumerate(FORMULAS)]
    outcome = bounded("report", *paths, "--format", "csv")
    heading, *rows = csv.reader(io.StringIO(outcome.out))
    assert len(rows) == len(FORMULAS)
    for row in rows:
        for column in ("model", "file", "title"):
            assert row[heading.index(column)].startswith("'")


def test_long_texts_in_a_report(tmp_path: Path) -> None:
    path = result(tmp_path / "a.json", "f" * 1_000_000, "t" * 1_000_000)
    outcome = bounded("report", path, seconds=30)
    assert outcome.code == 0
    assert len(outcome.out) < 20_000


# ---------------------------------------------------------------- the formatter itself


@pytest.mark.parametrize("text", ["", "short", "x" * 200])
def test_short_texts_stay(text: str) -> None:
    assert foreign(text) == printable(text) == text
    assert quoted(text) == repr(text)


def test_long_texts_keep_their_start_and_end() -> None:
    text = "a" + "x" * 10_000 + "z"
    for short in (foreign(text), quoted(text)[1:-1]):
        assert len(short) == 200
        assert short[0] + short[-1] == "az"
        assert "…" in short
    assert len(quoted(list(range(10_000)))) == 200
    assert len(str(UsageError("a" * 10_000_000))) == 2_000


@pytest.mark.parametrize(
    "character", ["\x00", "\x1b", "\n", "\r", "\x85", "\x9b", "\u2028", "\u202e", "\u2066", "\u200f", "\ud800"]
)
def test_control_and_direction_characters_are_escaped(character: str) -> None:
    for text in (printable(character), foreign(character), quoted(character)):
        assert text.isprintable()
        text.encode()
