"""The command `download`: two of them at once, progress, messages and exit codes, and a run without network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import http_faults as faults
import pytest
from cli_world import run
from cli_world import said as one_line
from download_world import RECORD, Place

from xares_onnx.progress import Progress

ROOT = Path(__file__).parents[2]


def start(place: Place) -> subprocess.Popen[bytes]:
    command = ["download", place.task, "--data", str(place.data), "--mirror", place.zenodo.url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "xares_onnx", *command], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )


def test_two_processes_fetch_a_record_once(place: Place) -> None:
    go = threading.Event()

    def slow(handler: faults._Handler, data: bytes, start: int | None) -> None:
        go.wait(200)
        handler.wfile.write(handler.begin(data, start))

    place.zenodo.faults["train0.tar"] = [slow]
    one = start(place)
    while not place.zenodo.starts("train0.tar") and one.poll() is None:
        time.sleep(0.01)
    other = start(place)
    while len(place.zenodo.starts(RECORD)) < 2 and other.poll() is None:
        time.sleep(0.01)
    assert other.stderr is not None
    second = other.stderr.readline()
    go.set()
    (_, first), (_, rest) = one.communicate(timeout=200), other.communicate(timeout=200)
    assert (one.returncode, other.returncode) == (0, 0), first + second + rest
    assert b"another process is downloading record 101; waiting for it" in second
    assert all(len(place.zenodo.starts(name)) == 1 for name in place.files)
    assert place.there() == place.files


# ---------------------------------------------------------------- progress


def test_progress_counts_bytes_of_this_run(place: Place) -> None:
    place.home.mkdir(parents=True)
    (place.home / "train0.tar").write_bytes(place.files["train0.tar"])
    place.fetch()
    told = [event for event in place.events if isinstance(event, Progress)]
    assert {(event.stage, event.task, event.total) for event in told} == {("download", "mine", 309_000)}
    assert told[0].done >= 300_000  # what was there is no progress
    assert told[-1].done == 309_000
    assert [event.done for event in told] == sorted(event.done for event in told)


# ---------------------------------------------------------------- the command


def test_the_command(place: Place) -> None:
    arguments = ("download", place.task, "--data", str(place.data), "--mirror", place.zenodo.url)
    code, out, err = run(*arguments, "--plan")
    assert (code, err) == (0, "")
    row = next(line for line in out.splitlines() if line.startswith("| mine"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["mine", "101", "cc-by-4.0", "4", "309 kB", "309 kB"]
    code, out, err = run(*arguments)
    assert code == 0
    assert "fetched" in out
    assert err == "mine: downloading done, 309 kB\n"
    code, out, err = run(*arguments, "--json")
    assert code == 0
    assert {file["status"] for file in json.loads(out)[0]["files"]} == {"present"}
    assert run(*arguments, "--quiet") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "name tasks, or a suite by --suite public"),
        (["esc51"], 2, "there is no task 'esc51'; did you mean 'esc50'"),
        (["--suite", "musik"], 2, "there is no suite 'musik'"),
        (["esc50", "--mirror", "file:///x"], 2, "mirror 'file:///x' is not an address"),
        (["liveenv"], 4, "liveenv has no record to download: its data were never published"),
        (["esc50", "--data", "nowhere", "--offline"], 4, "data folder nowhere does not exist"),
        (["esc50", "--mirror", "http://127.0.0.1:9", "--data", "pyproject.toml"], 4, "data folder pyproject.toml does not"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], code: int, says: str, place: Place) -> None:
    done = run("download", *arguments)
    assert done[0] == code
    assert one_line(done[2]).startswith(says)
    assert done[1] == ""


def test_a_failure_is_one_line_and_code_4(place: Place) -> None:
    place.zenodo.faults["train0.tar"] = faults.status(404)
    code, out, err = run("download", place.task, "--data", str(place.data), "--mirror", place.zenodo.url, "--quiet")
    assert (code, out) == (4, "")
    assert one_line(err).startswith("mine: 1 of 4 files of record 101 could not be fetched, first train0.tar: 127.0.0.1")


@pytest.mark.parametrize("by", ["option", "environment"])
def test_offline_reports_missing_or_damaged_data(by: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["download", place.task, "--data", str(place.data), "--mirror", place.zenodo.url]
    place.fetch()
    asked = len(place.zenodo.asked)
    if by == "option":
        arguments.append("--offline")
    else:
        monkeypatch.setenv("XARES_ONNX_OFFLINE", "1")
    code, out, err = run(*arguments)
    assert code == 0
    assert "good: 4 by checksum" in out
    path = place.home / "train0.tar"
    path.write_bytes(b"wrong" + place.files["train0.tar"][5:])
    code, out, err = run(*arguments)
    assert code == 4
    assert "xares-onnx: mine: 1 damaged, first train0.tar: its checksum is no longer md5:" in err
    path.unlink()
    code, out, err = run(*arguments, "--quiet")
    assert code == 4
    assert one_line(err).startswith("mine: 1 damaged, first train0.tar: it was downloaded and is gone")
    (place.home / ".xares-onnx.json").unlink()
    (place.home / "train1.tar").unlink()
    code, out, err = run(*arguments, "--quiet")
    assert code == 4
    assert len(place.zenodo.asked) == asked
