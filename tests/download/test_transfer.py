"""One file of a record, from a server that does everything wrong that a server can do."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import http_faults as faults
import pytest
from download_world import IMPATIENT, QUICK, RECORD, Place, error_text
from http_faults import Fault, Zenodo

from xares_onnx.download.download import download
from xares_onnx.version import __version__

ROOT = Path(__file__).parents[2]
SIZE = 300_000


def wait_until(condition: Callable[[], bool], seconds: float = 250) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


# ---------------------------------------------------------------- faults that pass


# What goes wrong in turn, and the bytes from which the file is then asked for; `...` depends on what was on its way.
PASSING: dict[str, tuple[list[Fault], list[Any]]] = {
    "nothing": ([], [None]),
    "truncated": ([faults.truncated(100_000)], [None, 100_000]),
    "ended early without a length": ([faults.ended_early(100_000)], [None, 100_000]),
    "dies midway": ([faults.reset(100_000)], [None, ...]),
    "dies before the first byte": ([faults.reset(0)], [None, None]),
    "dies again and again": ([faults.reset(30_000)] * 9, [None] + [...] * 9),
    "stalls": ([faults.stalled(100_000)], [None, 100_000]),
    "drips": ([faults.dripping], [None, ...]),
    "announced longer": ([faults.announced(1_000)], [None, None]),
    "announced shorter": ([faults.announced(-1_000)], [None, None]),
    "sends too much": ([faults.too_much], [None, None]),
    "wrong bytes once": ([faults.wrong_bytes], [None, None]),
    "wrong bytes at the end": ([faults.truncated(100_000), faults.wrong_bytes], [None, 100_000, None]),
    "range refused": ([faults.truncated(100_000), faults.status(416)], [None, 100_000, None]),
    "range ignored": ([faults.truncated(100_000), faults.range_ignored], [None, 100_000]),
    "range from elsewhere": ([faults.truncated(100_000), faults.range_of(0)], [None, 100_000, None]),
    "range one byte early": ([faults.truncated(100_000), faults.range_of(-1, shift=-1)], [None, 100_000, None]),
    "range one byte late": ([faults.truncated(100_000), faults.range_of(-1, shift=1)], [None, 100_000, None]),
    "range of another length": ([faults.truncated(100_000), faults.range_of(-1, total=SIZE + 1)], [None, 100_000, None]),
    "range unsaid": ([faults.truncated(100_000), faults.range_unsaid], [None, 100_000, None]),
    "a range unasked for": ([faults.range_of(0)], [None, None]),
    "compressed": ([faults.compressed], [None, None]),
    "429": ([faults.status(429)], [None, None]),
    "429 in the middle": ([faults.truncated(100_000), faults.status(429)], [None, 100_000, 100_000]),
    "503, 502, 500": ([faults.status(503), faults.status(502), faults.status(500)], [None, None, None, None]),
    "not http": ([faults.garbage], [None, None]),
}


@pytest.mark.parametrize("case", PASSING)
def test_passing_faults_are_retried(case: str, place: Place) -> None:
    wrong, starts = PASSING[case]
    place.zenodo.faults["train0.tar"] = list(wrong)
    done = place.fetch(patience=IMPATIENT if case in ("stalls", "drips") else QUICK)
    assert done.errors == []
    assert place.there() == place.files
    found = place.zenodo.starts("train0.tar")
    assert len(found) == len(starts)
    assert all(b is ... or a == b for a, b in zip(found, starts, strict=True))
    assert found == sorted(found, key=lambda start: start or 0) or starts[-1] is None
    assert len(place.notes) == len(wrong) - (case == "range ignored")
    assert {file.status for task in done.tasks for file in task.files} == {"fetched"}


def test_only_the_same_version_is_continued(place: Place) -> None:
    """The server is told which version the first bytes are of, and gives the whole file where it has another."""
    place.zenodo.faults["train0.tar"] = [faults.truncated(100_000)]
    place.fetch()
    first, second = [asked for asked in place.zenodo.asked if asked.name == "train0.tar"]
    assert first.if_range is None
    assert second.if_range is not None
    assert second.if_range.strip('"') in (place.home / ".xares-onnx.json").read_text()


@pytest.mark.parametrize("etags", [True, False])
def test_bytes_of_another_version_are_not_mixed_in(etags: bool, place: Place) -> None:
    """A file that changes between two attempts, on a server that keeps no promise about it."""
    place.zenodo.etags = etags
    old = faults.content(SIZE, 99)

    def other(handler: faults._Handler, data: bytes, start: int | None) -> None:
        handler.etag = handler.etag and '"old"'
        faults.truncated(100_000)(handler, old, start)

    place.zenodo.faults["train0.tar"] = [other]
    assert place.fetch().errors == []
    assert place.there() == place.files


def test_a_server_that_says_it_has_another_version_is_not_continued_from(place: Place) -> None:
    """It heeds no condition, but names the version that its bytes are of: no need to wait for the checksum."""
    old = faults.content(SIZE, 99)

    def other(handler: faults._Handler, data: bytes, start: int | None) -> None:
        handler.etag = '"old"'
        faults.truncated(100_000)(handler, old, start)

    place.zenodo.faults["train0.tar"] = [other, faults.range_of(-1)]
    assert place.fetch().errors == []
    assert place.there() == place.files
    assert not [note for note in place.notes if "checksum" in note]


# ---------------------------------------------------------------- faults that stay


@pytest.mark.parametrize(
    ("fault", "requests", "says"),
    [
        (faults.status(503), 4, r"train0\.tar: 127\.0\.0\.1:\d+ answered 503 Service Unavailable, 4 times in a row"),
        (faults.status(429), 4, r"answered 429 Too Many Requests, 4 times in a row"),
        (faults.status(404), 1, r"answered 404 Not Found, not there: http://"),
        (faults.status(403), 1, r"answered 403 Forbidden, not open to everyone"),
        (faults.reset(0), 4, "4 times in a row"),
        (faults.stalled(0), 2, r"nothing arrived for 1 s, 2 times in a row"),
        (faults.wrong_bytes, 2, r"arrived twice with another checksum than 127.* lists \(md5:[0-9a-f]{32}\)"),
        (faults.announced(5), 4, "announced 300005 bytes, but the record lists 300000"),
        (faults.too_much, 4, "more bytes arrived than the 300000 that the record lists"),
        (
            faults.status(302, Location="http://localhost.example/train0.tar"),
            1,
            r"redirects to http://localhost\.example/",
        ),
        (
            faults.status(302, Location="file:///etc/passwd"),
            1,
            r"redirects to file://\S*/etc/passwd, which is not followed",
        ),
        (faults.status(301, Location="/api/records/101/files/train0.tar/content"), 6, "answered 301 Moved Permanently"),
    ],
)
def test_a_lasting_fault_is_one_sentence_and_the_other_files_arrive(
    fault: Fault, requests: int, says: str, place: Place
) -> None:
    place.zenodo.faults["train0.tar"] = fault
    done = place.fetch(patience=IMPATIENT if "nothing arrived" in says else QUICK)
    sentence = error_text(done)
    assert sentence.startswith("mine: 1 of 4 files of record 101 could not be fetched, first train0.tar: ")
    assert sentence.endswith("; the rest is kept, and the same command run again goes on")
    assert re.search(says, sentence), sentence
    assert done.errors[0].exit_code == 4
    assert len(place.zenodo.starts("train0.tar")) == requests
    assert {name for name in place.there() if not name.startswith("train0.tar.part")} == set(place.files) - {"train0.tar"}
    assert {file.name: file.status for file in done.tasks[0].files}["train0.tar"] == "failed"

    place.zenodo.faults.clear()
    assert place.fetch().errors == []
    assert place.there() == place.files


def test_wrong_bytes_are_not_kept(place: Place) -> None:
    place.zenodo.faults["train0.tar"] = faults.wrong_bytes
    place.fetch()
    assert set(place.there()) == set(place.files) - {"train0.tar"}


def test_a_range_that_is_always_ignored_ends(place: Place) -> None:
    """Each attempt starts anew and dies at another place: that is no progress for ever."""
    place.zenodo.faults["train0.tar"] = [faults.truncated(n) for n in [50_000, 100_000] * 20]

    def ignoring(fault: Fault) -> Fault:
        return lambda handler, data, start: fault(handler, data, None)

    place.zenodo.faults["train0.tar"] = [ignoring(fault) for fault in place.zenodo.faults["train0.tar"]]
    assert "4 times in a row" in error_text(place.fetch())
    assert len(place.zenodo.starts("train0.tar")) < 10


# ---------------------------------------------------------------- politeness


@pytest.mark.parametrize("asked", ["seconds", "date", "reset"])
def test_a_requested_pause_is_kept(asked: str, place: Place) -> None:
    until = []

    def pausing(handler: faults._Handler, data: bytes, start: int | None) -> None:
        moment = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2)
        until.append(time.monotonic() + (1 if asked == "seconds" else moment.timestamp() - time.time()))
        headers = {
            "seconds": {"Retry_After": "1"},
            "date": {"Retry_After": format_datetime(moment, usegmt=True)},
            "reset": {"X_RateLimit_Reset": str(int(moment.timestamp()))},
        }[asked]
        faults.status(429, **headers)(handler, data, start)

    place.zenodo.faults["train0.tar"] = [pausing]
    assert place.fetch().errors == []
    _, again = [one.at for one in place.zenodo.asked if one.name == "train0.tar"]
    assert again >= until[0] - 0.05


def test_a_pause_is_kept_by_all_connections(place: Place) -> None:
    """Two other requests are under way when it is asked for, and end once it is known; none begins before it is over."""
    asked, known = list[float](), list[float]()

    def refusing(handler: faults._Handler, data: bytes, start: int | None) -> None:
        wait_until(lambda: place.zenodo.busy == 3)
        asked.append(time.monotonic())
        faults.status(429, Retry_After="1")(handler, data, start)

    def slow(handler: faults._Handler, data: bytes, start: int | None) -> None:
        wait_until(lambda: any("429" in note for note in place.notes))
        known.append(time.monotonic())
        handler.wfile.write(handler.begin(data, start))

    names = [f"train{number}.tar" for number in range(2, 8)]
    place.zenodo.records[RECORD] = {"train0.tar": b"x", **dict.fromkeys(names, b"y"), "valid0.tar": b"v", "test0.tar": b"t"}
    place.zenodo.faults |= {**dict.fromkeys(names, slow), "train0.tar": [refusing]}
    assert place.fetch().errors == []
    assert [one.name for one in place.zenodo.asked if min(known) < one.at < asked[0] + 0.95] == []


@pytest.mark.parametrize("nonsense", ["soon", "-5", "1e9", "Wed, 99 Nov 2025 00:00:00 GMT"])
def test_a_senseless_pause_is_replaced_by_the_default(nonsense: str, place: Place) -> None:
    place.zenodo.faults["train0.tar"] = [faults.status(503, Retry_After=nonsense)]
    assert place.fetch().errors == []
    assert "trying again in 0.01 s" in place.notes[0]


def test_a_pause_that_is_too_long_ends_the_download(place: Place) -> None:
    place.zenodo.records[RECORD] |= {f"train{number:02}.tar": b"x" for number in range(30)}
    place.zenodo.faults["train0.tar"] = [faults.status(429, Retry_After="3600")]
    done = place.fetch()
    assert "asked for a pause of 3600 s; run again after it" in error_text(done)
    assert len(place.zenodo.asked) < 8


def test_a_few_connections_at_once_under_our_name(place: Place) -> None:
    def slow(handler: faults._Handler, data: bytes, start: int | None) -> None:
        wait_until(lambda: place.zenodo.busiest >= 2, seconds=2)  # less than the client waits for an answer
        time.sleep(0.05)
        handler.wfile.write(handler.begin(data, start))

    names = [f"train{number:02}.tar" for number in range(12)]
    place.zenodo.records[RECORD] = {"valid0.tar": b"v", "test0.tar": b"t"} | dict.fromkeys(names, b"x")
    place.zenodo.faults |= dict.fromkeys(names, slow)
    assert place.fetch().errors == []
    assert 2 <= place.zenodo.busiest <= 3
    assert {asked.user_agent for asked in place.zenodo.asked} == {f"xares-onnx/{__version__}"}


def test_a_server_that_fails_several_files_gets_no_more_requests(place: Place) -> None:
    names = [f"train{number:02}.tar" for number in range(30)]
    place.zenodo.records[RECORD] = {"valid0.tar": b"v", "test0.tar": b"t"} | dict.fromkeys(names, b"x")
    place.zenodo.faults |= dict.fromkeys([*names, "valid0.tar", "test0.tar"], faults.status(503))
    done = place.fetch()
    assert error_text(done).startswith("mine: 32 of 32 files of record 101 could not be fetched, first ")
    assert len(place.zenodo.asked) < 1 + 4 * 8
    assert sum("it was not tried, since 127.0.0.1" in str(file.reason) for file in done.tasks[0].files) > 20


def test_after_a_failed_record_the_next_is_not_requested(place: Place) -> None:
    names = [f"train{number}.tar" for number in range(4)]
    place.zenodo.records = {record: dict.fromkeys([*names, "valid.tar", "test.tar"], b"x") for record in ("101", "102")}
    place.zenodo.faults = dict.fromkeys([*names, "valid.tar", "test.tar"], faults.status(503))
    done = place.fetch([place.task, place.write_task("second", "102")])
    assert re.fullmatch(r"second: record 102 was not tried, since 127\S+ failed several times", str(done.errors[1]))
    assert len(done.errors) == 2


# ---------------------------------------------------------------- resumed by another run


def part(place: Place, data: bytes, **note: object) -> Path:
    """What a killed run left of train0.tar."""
    checksum = f"md5:{hashlib.md5(place.files['train0.tar']).hexdigest()}"
    path = place.home / "train0.tar.part"
    place.home.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    fields = {"size": SIZE, "checksum": checksum, "etag": None, **note}
    path.with_name("train0.tar.part.json").write_text(json.dumps(fields))
    return path


@pytest.mark.parametrize(
    ("case", "starts"),
    [
        ("half", [120_000]),
        ("all", []),
        ("too long", [None]),
        ("no note", [None]),
        ("a note that is none", [None]),
        ("of another size", [None]),
        ("of another content", [None]),
        ("wrong at the start", [120_000, None]),
        ("all, but wrong", [None]),
        ("of an older version on the server", [120_000]),
        ("empty", [None]),
    ],
)
def test_what_an_earlier_run_left(case: str, starts: list[int | None], place: Place) -> None:
    good = place.files["train0.tar"]
    half = good[:120_000]
    match case:
        case "all":
            part(place, good)
        case "too long":
            part(place, good + b"x")
        case "no note":
            part(place, half).with_name("train0.tar.part.json").unlink()
        case "a note that is none":
            part(place, half).with_name("train0.tar.part.json").write_text("[]")
        case "of another size":
            part(place, half, size=SIZE + 1)
        case "of another content":
            part(place, half, checksum="md5:" + "0" * 32)
        case "wrong at the start":
            part(place, b"wrong" + half[5:])
        case "all, but wrong":
            part(place, b"wrong" + good[5:])
        case "of an older version on the server":
            part(place, b"old" + half[3:], etag='"older"')
        case "empty":
            part(place, b"")
        case _:
            part(place, half)
    assert place.fetch().errors == []
    assert place.there() == place.files
    assert place.zenodo.starts("train0.tar") == starts


def test_a_run_that_was_killed_just_after_a_file_had_its_name(place: Place) -> None:
    part(place, b"").unlink()
    (place.home / "train0.tar").write_bytes(place.files["train0.tar"])
    assert place.fetch().errors == []
    assert place.there() == place.files
    assert place.zenodo.starts("train0.tar") == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_is_continued(number: signal.Signals, place: Place) -> None:
    place.zenodo.faults["train0.tar"] = [faults.stalled(100_000)]
    command = ["download", place.task, "--data", str(place.data), "--mirror", place.zenodo.url, "--quiet"]
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from xares_onnx.cli import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script, *command], env=environment, stderr=subprocess.PIPE, text=True)
    unfinished = place.home / "train0.tar.part"
    wait_until(lambda: process.poll() is not None or (unfinished.exists() and unfinished.stat().st_size == 100_000))
    process.send_signal(number)
    _, err = process.communicate(timeout=25)  # although its socket would wait for 30 s
    codes = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 143, signal.SIGINT: 130}
    assert process.returncode == codes[number]
    assert err == "" if number == signal.SIGKILL else err.startswith("xares-onnx: interrupted; ")
    assert not (place.home / "train0.tar").exists()
    assert unfinished.stat().st_size == 100_000
    assert place.fetch().errors == []
    assert place.there() == place.files
    assert place.zenodo.starts("train0.tar")[1:] == [100_000]


def test_an_unreachable_server_is_an_error(tmp_path: Path) -> None:
    place = Place(tmp_path, Zenodo())
    with socket.socket() as taken:  # and deaf, so that no other process listens there
        taken.bind(("127.0.0.1", 0))
        mirror = f"http://127.0.0.1:{taken.getsockname()[1]}"
        done = download([place.task], data=place.data, mirror=mirror, patience=QUICK)
    assert "record 101: " in error_text(done)
    assert re.search(r"127\.0\.0\.1:\d+ cannot be reached \(.*refused\), 4 times in a row", error_text(done))
    assert not place.data.exists()
