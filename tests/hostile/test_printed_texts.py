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
from cli_world import run
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


LONG = f"{EVIL}##[x]::error::{'Z' * 4000}"
_SHORT = 200  # characters of one foreign text


def short(text: str) -> None:
    """No stranger's text is longer than it may be, wherever it stands."""
    assert max(map(len, re.findall("Z+", text)), default=0) <= _SHORT


def evil_everywhere(path: Path, right: float = 1.0) -> Path:
    """A result that has a stranger's text wherever one may stand without making it another run's."""
    result(path, LONG, LONG, right, domain=LONG, notes=[LONG], published={LONG: 0.5})
    raw = msgspec.json.decode(path.read_bytes())
    (task,) = raw["tasks"]
    task["clips"] = {"expected": 2, "read": 1, "dropped": [{"key": LONG, "shard": LONG, "reason": LONG}]}
    taps = [{**task, "tap": f"{LONG}{i}"} for i in range(2)]
    lost = {**task, "task": f"{LONG}lost", "status": "failed", "score": None, "reason": LONG, "predictions": None}
    raw["tasks"] = [task, *taps, lost]
    raw["encoder"] |= {
        "taps": [LONG, f"{LONG}0", f"{LONG}1"],
        "sha256": LONG,
        "contract": {LONG: {"value": LONG, "source": LONG}},
    }
    raw["environment"] = {
        LONG: LONG,
        "machine": {"processor": LONG},
        "provider": LONG,
        "list": [LONG] * 100,
        "deep": [[[LONG]]],
    }
    raw["settings"] |= {LONG: LONG, "other": LONG}
    gate = {"gate": "baseline", "task": LONG, "method": LONG, "tap": LONG, "status": "fail", "message": LONG, "limit": 0.1}
    raw |= {"created": LONG, "notes": [LONG] * 100, "gates": [gate]}
    path.write_bytes(msgspec.json.encode(raw))
    return path


@pytest.mark.parametrize("format_", ["md", "csv", "html", "model-index"])
def test_every_text_of_a_report_is_bounded(format_: str, tmp_path: Path) -> None:
    paths = [evil_everywhere(tmp_path / "a.json"), evil_everywhere(tmp_path / "b.json", right=0.5)]
    code, out, err = run("report", *map(str, paths[: 1 if format_ == "model-index" else 2]), "--format", format_)
    assert code == 0, err
    harmless(out + err, lines="<" if format_ == "html" else "")
    short(out + err)
    assert "Z" * 50 in out  # it is there, and cut


@pytest.mark.parametrize("format_", ["text", "github", "junit"])
def test_every_text_of_a_comparison_is_bounded(format_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    paths = [evil_everywhere(tmp_path / "a.json"), evil_everywhere(tmp_path / "b.json", right=0.5)]
    code, out, err = run("compare", *map(str, paths), "--format", format_)
    assert code == 1, err
    harmless(re.sub(r"^::(error|warning) title=[^\n]*\n", "", out, flags=re.MULTILINE) + err)
    short(out + err)
    if format_ == "github":
        summary = (tmp_path / "summary.md").read_text()
        harmless(summary)
        short(summary)


@pytest.mark.parametrize("field", ["protocol", "limit", "seeds", "metric", "task", "predictions", "data_digest"])
def test_a_text_that_makes_it_another_run_is_bounded_in_the_refusal(field: str, tmp_path: Path) -> None:
    a, b = result(tmp_path / "a.json", "a"), result(tmp_path / "b.json", "b", right=0.5)
    raw = msgspec.json.decode(b.read_bytes())
    (raw["settings"] if field in ("protocol", "limit", "seeds") else raw["tasks"][0])[field] = LONG
    b.write_bytes(msgspec.json.encode(raw))
    for command in ("report", "compare"):
        _, out, err = run(command, str(a), str(b))
        harmless(out + err)
        short(out + err)


def evil_model(path: Path) -> Path:
    """An encoder with a stranger's names for its nodes, tensors and operators' outputs, and such metadata."""
    model = models.encoder(
        metadata={f"xares.{key}": LONG for key in ("source", "license")} | {"sample_rate": "16000", LONG: LONG}
    )
    names = {name: f"{LONG[:900]}{name}" for item in model.graph.node for name in item.output if name != "embeddings"}
    for item in model.graph.node:
        item.name = f"{LONG[:3000]}{item.output[0]}"
        item.input[:] = [names.get(name, name) for name in item.input]
        item.output[:] = [names.get(name, name) for name in item.output]
    model.producer_name = LONG
    return models.save(model, path)


@pytest.mark.parametrize("format_", ["text", "json", "junit", "github"])
def test_every_text_of_a_check_is_bounded(format_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    path = evil_model(tmp_path / f"::stop-commands::x##[group]\u202e\x9b{'Z' * 201}.onnx")
    outcome = bounded("check", path, "--profile", "--device", "cpu", "--format", format_, memory=8 << 30)
    assert outcome.code in (0, 1), outcome.err
    if format_ == "json":
        return  # data for programs, which are whole
    harmless(outcome.out + outcome.err, lines="::" if format_ == "github" else "")
    short(re.sub(r"file=[^,]*,", "", outcome.out) + outcome.err)  # the file's own path is the user's
    if format_ == "github":
        harmless((tmp_path / "summary.md").read_text())


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
