"""Fetching the data of tasks: what a record says, where files go, who may fetch at once, and what is said at the end."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import http_faults as faults
import pytest
from download_world import IMPATIENT, QUICK, RECORD, Place, error_text
from shard_makers import small_disk, task_toml

from xares_onnx.data import catalog
from xares_onnx.data.manifest import Manifest
from xares_onnx.download import deliveries, download
from xares_onnx.download import zip_files as archives
from xares_onnx.download.zenodo import Address
from xares_onnx.errors import DataMissingError, DiskFullError, MachineError, UsageError

# ---------------------------------------------------------------- what a record says


@pytest.mark.parametrize("layout", ["new", "old", "rdm", "static", "proxied"])
def test_every_layout_of_a_record_is_read(layout: str, place: Place) -> None:
    place.zenodo.layout = layout
    done = place.fetch()
    assert done.errors == []
    assert place.there() == place.files
    (report,) = done.tasks
    assert (report.record, report.license, report.bytes) == (RECORD, "cc-by-4.0", 309_000)
    assert all(asked.name in {RECORD, *place.files} or layout == "static" for asked in place.zenodo.asked)


def test_only_what_the_task_needs_is_asked_for(place: Place) -> None:
    place.zenodo.records[RECORD] |= {"other.tar": b"o", "train.zip": b"z", "xtrain0.tar": b"x", "train0.tar.md5": b"m"}
    assert place.fetch().errors == []
    assert {asked.name for asked in place.zenodo.asked} == {RECORD, *place.files}


def replaced(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the first file's entry; None removes a key."""

    def edit(answer: dict[str, Any]) -> None:
        entry = answer["files"][0]
        entry.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del entry[key]

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            replaced(links={"self": "file:///etc/passwd"}),
            r"lists 'train0\.tar' at 'file:///etc/passwd', which is not on 127",
        ),
        (replaced(links={"self": "https://elsewhere.example/train0.tar"}), "which is not on 127.* it is not followed"),
        (replaced(links={"self": "http://127.0.0.1:1/train0.tar"}), "which is not on 127"),
        (replaced(links={"self": "//elsewhere.example/x"}), "which is not on 127"),
        (replaced(links={"self": "http://[::1/x"}), "which is not on 127"),
        (
            replaced(key="train/../../../evil.tar"),
            r"a file named 'train/\.\./\.\./\.\./evil\.tar', which is not a plain file name",
        ),
        (replaced(key="train\\..\\evil.tar"), "which is not a plain file name"),
        (replaced(key="train\x1b[2J.tar"), "which is not a plain file name"),
        (replaced(key="train" + "x" * 300 + ".tar"), "which is not a plain file name"),
        (replaced(key="train1.tar"), r"has two files named 'train1\.tar'"),
        (replaced(size=-1), "with a size of -1 bytes"),
        (replaced(size=1 << 50), "with a size of 1125899906842624 bytes, which no shard has"),
        (replaced(size="many"), "does not describe record 101 in a known format"),
        (replaced(size=None), "does not describe record 101"),
        (replaced(checksum="md5:xyz"), "with 'md5:xyz', which is not a checksum"),
        (lambda answer: answer.update(files=None), "does not describe record 101"),
        (lambda answer: answer.update(id=102), "sent record 102 instead of 101"),
        (lambda answer: answer.update(files=[]), r"record 101 has no file that matches test\*\.tar, for mine"),
        (lambda answer: [1, 2, 3], "does not describe record 101"),
    ],
)
def test_an_unsafe_description_of_a_record_is_refused(
    edit: Callable[[dict[str, Any]], Any], says: str, place: Place
) -> None:
    place.zenodo.edit = edit
    done = place.fetch()
    assert re.search(says, error_text(done)), error_text(done)
    assert error_text(done).startswith("mine: ")
    assert done.errors[0].exit_code == 4
    assert {asked.name for asked in place.zenodo.asked} == {RECORD}
    assert not place.data.exists()


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (faults.html, "does not describe record 101 .* in '<!doctype html><title>"),
        (faults.endless, "sent more than any record's description"),
        (faults.stalled(5), "record 101: nothing arrived for 1 s, 2 times in a row"),
        (faults.dripping, "its reply took more than 1 s, 2 times in a row"),
        (faults.status(503), "record 101: 127.* answered 503 Service Unavailable, 4 times in a row"),
        (
            faults.status(404),
            r"cannot be fetched from 127\S+: 127\S+ answered 404 Not Found, not there: http://.*; 127.* 404",
        ),
        (faults.status(403), "answered 403 Forbidden, not open to everyone"),
        (faults.status(302, Location="http://elsewhere.example/"), "redirects to http://elsewhere.example/, which is not"),
        (faults.garbage, "4 times in a row"),
    ],
)
def test_a_useless_reply_says_why_after_enough_attempts(fault: faults.Fault, says: str, place: Place) -> None:
    place.zenodo.faults[RECORD] = fault
    sentence = error_text(place.fetch(patience=IMPATIENT if "2 times" in says else QUICK))
    assert re.search(says, sentence), sentence
    assert not place.data.exists()


def test_a_reply_at_the_second_attempt_or_address_is_used(place: Place) -> None:
    place.zenodo.faults[RECORD] = [faults.reset(10), faults.status(307, Location="/api/records/101?moved")]
    place.zenodo.faults["/api/records/101?moved"] = [
        faults.status(301, Location="/api/records/101"),
    ]
    assert place.fetch().errors == []


def test_a_record_of_versions_stands_for_its_newest(place: Place) -> None:
    place.zenodo.edit = lambda answer: answer.update(id=102, conceptrecid=RECORD)
    assert place.fetch().errors == []


@pytest.mark.parametrize("checksum", [None, "crc32:12345678"])
def test_without_a_checksum_the_size_is_checked_and_a_note_says_so(checksum: str | None, place: Place) -> None:
    place.zenodo.edit = replaced(checksum=checksum)
    place.zenodo.faults["train0.tar"] = [faults.truncated(100_000)]
    assert place.fetch().errors == []
    assert place.there() == place.files
    assert [note for note in place.notes if "trying" not in note] == [
        "record 101 gives no checksum of a known kind for train0.tar: only its size is checked"
    ]
    held = json.loads((place.home / ".xares-onnx.json").read_text())["files"]["train0.tar"]["checksum"]
    assert held == f"md5:{hashlib.md5(place.files['train0.tar']).hexdigest()}"
    asked = len(place.zenodo.asked)
    assert place.fetch().errors == []
    assert len(place.zenodo.asked) == asked + 1


def test_other_checksums(place: Place) -> None:
    sha = hashlib.sha256(place.files["train0.tar"]).hexdigest()
    place.zenodo.edit = replaced(checksum=f"sha256:{sha.upper()}")
    assert place.fetch().errors == []
    place.zenodo.edit = replaced(checksum=f"sha256:{'0' * 64}")
    assert "train0.tar" in error_text(place.fetch())


# ---------------------------------------------------------------- mirrors


@pytest.mark.parametrize(
    "mirror",
    [
        "file:///data",
        "ftp://mirror.example/",
        "mirror.example",
        "http://",
        "https://a b/",
        "https://m.example/?q=1",
        "x",
        "/",
    ],
)
def test_a_mirror_is_an_address(mirror: str, place: Place) -> None:
    with pytest.raises(UsageError, match=r"is not an address; give one such as https://mirror\.example/zenodo"):
        place.fetch(mirror=mirror)


def test_a_mirror_with_a_password_is_not_printed(place: Place) -> None:
    with pytest.raises(UsageError, match="would be printed; leave them out"):
        place.fetch(mirror="https://me:secret@mirror.example/")


@pytest.mark.parametrize(
    ("mirror", "encrypted"),
    [
        ("https://m.example/a/", True),
        ("http://localhost:80", True),
        ("http://127.0.0.1:8000", True),
        ("http://[::1]:1/x", True),
        ("http://m.example", False),
    ],
)
def test_only_http_to_another_machine_is_unencrypted(mirror: str, encrypted: bool) -> None:
    assert Address.parse(mirror).encrypted == encrypted


def test_plain_http_is_noted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xares_onnx.download.zenodo._is_loopback", lambda host: False)
    assert place.fetch().errors == []
    assert place.notes[0].endswith("is reached over plain http: data and checksums can be changed on the way")


def test_the_least_that_a_plain_folder_needs(place: Place) -> None:
    def least(answer: dict[str, Any]) -> dict[str, Any]:
        return {"files": [{key: entry[key] for key in ("key", "size", "checksum")} for entry in answer["files"]]}

    place.zenodo.layout, place.zenodo.edit = "static", least
    done = place.fetch()
    assert done.errors == []
    assert place.there() == place.files
    assert done.tasks[0].license is None


def test_zenodo_itself_is_asked_at_its_api() -> None:
    assert Address().answer_urls("14614287") == [("https://zenodo.org/api/records/14614287", None)]


def test_a_mirror_in_a_folder_of_a_host(place: Place) -> None:
    """Its plain folders lie under the address that is given, wherever that is."""
    address = Address.parse("https://m.example/mirrors/zenodo/")
    assert address.answer_urls("7") == [
        ("https://m.example/mirrors/zenodo/api/records/7", None),
        ("https://m.example/mirrors/zenodo/7/files.json", "https://m.example/mirrors/zenodo/7"),
    ]


# ---------------------------------------------------------------- which tasks


def test_a_name_or_a_suite_is_needed(place: Place) -> None:
    for names, suite in (((), None), (("esc50",), "public")):
        with pytest.raises(UsageError, match="name tasks, or a suite by --suite public; with --plan"):
            download.choose(names, suite)


def test_tasks_without_a_record(place: Place) -> None:
    with pytest.raises(DataMissingError, match="liveenv has no record to download: its data were never published"):
        place.fetch(["esc50", "liveenv"])
    (place.folder / "own.toml").write_text(task_toml("own"))
    with pytest.raises(DataMissingError, match="own has no record to download: its task file names no Zenodo record"):
        place.fetch([str(place.folder / "own.toml")])
    assert place.zenodo.asked == []


def test_a_suite_leaves_out_what_has_no_record(place: Place) -> None:
    chosen = download.choose((), "environment", place.events.append)
    assert {task.name for task in chosen} >= {"esc50", "clotho"}
    assert all(task.data.zenodo for task in chosen)
    assert "liveenv is left out: its data were never published" in place.notes


def test_a_pattern_with_a_folder_is_refused(place: Place) -> None:
    task = place.write_task("deep", splits='splits = { train = "sub/train*.tar", test = "test*.tar" }')
    with pytest.raises(
        UsageError, match=r"deep has its shards at 'sub/train\*\.tar', but files of a record lie in no folders"
    ):
        place.fetch([task])


def test_a_plan_fetches_nothing(place: Place) -> None:
    place.home.mkdir(parents=True)
    (place.home / "train0.tar").write_bytes(place.files["train0.tar"])
    done = place.fetch(plan=True)
    (report,) = done.tasks
    assert (report.bytes, report.missing_bytes, report.license) == (309_000, 9_000, "cc-by-4.0")
    assert {file.name: file.status for file in report.files}["train1.tar"] == "missing"
    assert [asked.name for asked in place.zenodo.asked] == [RECORD]
    assert set(place.there()) == {"train0.tar"}


def test_all_28_records_are_planned(place: Place) -> None:
    """Every shipped task with a record takes the shards that its patterns name from it."""
    chosen = catalog.suite_tasks("public")
    for task in chosen:
        assert task.data.zenodo is not None
        names = [glob.replace("*", "0000") for glob in catalog.part_globs(task).values()]
        place.zenodo.records.setdefault(task.data.zenodo, {}).update(dict.fromkeys(names, b"x" * 10))
    done = download.download(suite="public", data=place.data, mirror=place.zenodo.url, plan=True, patience=QUICK)
    assert done.errors == []
    assert [report.task for report in done.tasks if not report.missing_bytes] == ["librispeechmalefemale"]
    assert {report.task for report in done.tasks} == {task.name for task in chosen}
    assert len(place.zenodo.asked) == 22  # two tasks share a record


# ---------------------------------------------------------------- what is there already


def test_a_second_run_asks_for_nothing_again_and_reads_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.fetch()
    monkeypatch.setattr(deliveries, "file_checksum", lambda *_: pytest.fail("a file was read again"))
    asked = len(place.zenodo.asked)
    done = place.fetch()
    assert done.errors == []
    assert {file.status for file in done.tasks[0].files} == {"present"}
    assert [one.name for one in place.zenodo.asked[asked:]] == [RECORD]


def test_files_put_there_by_hand_are_taken_if_they_are_the_record_s(place: Place) -> None:
    place.home.mkdir(parents=True)
    (place.home / "train0.tar").write_bytes(place.files["train0.tar"])
    assert place.fetch().errors == []
    assert place.zenodo.starts("train0.tar") == []
    assert place.there() == place.files
    assert place.notes == ["record 101: verifying files that are already here: 1"]


@pytest.mark.parametrize("data", [b"mine", b"x" * 300_000])
def test_another_file_of_that_name_is_not_replaced(data: bytes, place: Place) -> None:
    place.home.mkdir(parents=True)
    (place.home / "train0.tar").write_bytes(data)
    done = place.fetch()
    assert "train0.tar is not the file that the record has; move it away, and download again" in error_text(done)
    assert (place.home / "train0.tar").read_bytes() == data
    assert len(place.there()) == 4


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_what_was_downloaded_and_is_damaged_is_fetched_again(damage: str, place: Place) -> None:
    place.fetch()
    path = place.home / "train0.tar"
    path.write_bytes(b"wrong" + place.files["train0.tar"][5:] if damage == "flipped" else place.files["train0.tar"][:-1])
    done = place.fetch()
    assert done.errors == []
    assert place.there() == place.files
    assert place.notes[-1] == f"{path} is damaged, or an earlier version; it is fetched again"
    assert [file.status for file in done.tasks[0].files] == ["present", "fetched", "present", "present"]


def test_a_touched_file_is_read_and_not_fetched(place: Place) -> None:
    place.fetch()
    os.utime(place.home / "train0.tar", (1, 1))
    assert place.fetch().errors == []
    assert len(place.zenodo.starts("train0.tar")) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"record": "101", "version": 2}', "nonsense", '{"record": 5}'])
def test_an_unreadable_manifest_is_written_anew(text: str, place: Place) -> None:
    place.fetch()
    (place.home / ".xares-onnx.json").write_text(text)
    assert place.fetch().errors == []
    assert len(place.zenodo.starts("train0.tar")) == 1
    assert json.loads((place.home / ".xares-onnx.json").read_text())["files"].keys() == place.files.keys()


def test_an_incomplete_set_of_shards_does_not_pass_for_all(place: Place) -> None:
    """Two shards of training data, one of which did not come: what is there would be scored without a word."""
    task = catalog.named_tasks([place.task])[0]
    place.zenodo.faults["train1.tar"] = faults.status(404)
    place.fetch()
    assert all(catalog.shards_on_disk(task, place.data).values())
    assert catalog.find_parts(task, place.data) is None
    assert "holds no train1.tar; `xares-onnx download TASK.toml` fetches Zenodo record 101" in catalog.missing_data(
        task, place.data
    )
    assert catalog.on_disk(task, place.data) == "3 shards, 0.00 GB, download unfinished"
    place.zenodo.faults.clear()
    place.fetch()
    assert catalog.find_parts(task, place.data) is not None


def test_the_manifest_is_saved_before_the_first_file(place: Place) -> None:
    noted = []

    def look(handler: faults._Handler, data: bytes, start: int | None) -> None:
        noted.append(json.loads((place.home / ".xares-onnx.json").read_text())["wanted"])
        handler.wfile.write(handler.begin(data, start))

    place.zenodo.faults = dict.fromkeys(place.files, look)
    assert place.fetch().errors == []
    assert noted == [{name: len(data) for name, data in place.files.items()}] * 4


# ---------------------------------------------------------------- tasks that share a record


class Two(NamedTuple):
    place: Place
    other: str


@pytest.fixture
def two(place: Place) -> Two:
    return Two(place, place.write_task("other", splits='splits = { train = "train0*.tar", test = "test*.tar" }'))


def test_a_shared_file_is_fetched_once_and_either_copy_can_be_deleted(two: Two) -> None:
    place, shared = two.place, {"train0.tar": two.place.files["train0.tar"], "test0.tar": two.place.files["test0.tar"]}
    assert [report.missing_bytes for report in place.fetch([place.task, two.other], plan=True).tasks] == [309_000, 0]
    place.zenodo.asked.clear()
    done = place.fetch([place.task, two.other])
    assert done.errors == []
    assert place.there() == place.files
    assert place.there("other") == shared
    assert [len(place.zenodo.starts(name)) for name in (RECORD, *place.files)] == [1, 1, 1, 1, 1]
    assert {file.status for file in done.tasks[1].files} == {"linked"}
    assert (place.home / "train0.tar").samefile(place.data / "other" / "train0.tar")
    (place.home / "train0.tar").unlink()
    assert place.there("other") == shared
    assert place.fetch([place.task, two.other]).errors == []
    assert len(place.zenodo.starts("train0.tar")) == 1
    assert place.there() == place.files


def test_a_shared_file_is_copied_if_it_cannot_be_linked(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    assert two.place.fetch([two.place.task, two.other]).errors == []
    assert two.place.there("other")["train0.tar"] == two.place.files["train0.tar"]
    assert not (two.place.home / "train0.tar").samefile(two.place.data / "other" / "train0.tar")


# ---------------------------------------------------------------- locks, and little space


def test_a_folder_that_cannot_be_locked(place: Place) -> None:
    place.data.mkdir()
    (place.data / ".xares-onnx").write_text("in the way")
    with pytest.raises(MachineError, match=r"101\.lock cannot be locked"):
        place.fetch()


def test_too_little_space_is_an_error_before_anything_is_fetched(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = archives.shutil.disk_usage(place.folder)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage._replace(free=308_999))
    with pytest.raises(DiskFullError, match=r"what is missing needs 0\.00 GB in .*, but 0\.00 GB are free; free some"):
        place.fetch()
    assert [asked.name for asked in place.zenodo.asked] == [RECORD]
    place.home.mkdir(parents=True)
    (place.home / "test0.tar").write_bytes(place.files["test0.tar"])  # what is there needs no space
    assert place.fetch().errors == []


def test_a_full_disk_keeps_what_arrived(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = archives.shutil.disk_usage(place.folder)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage._replace(free=1 << 40))
    with small_disk(tmp_path / "small", kilobytes=200):
        done = place.fetch(data=tmp_path / "small" / "data")
        (error,) = done.errors
        assert isinstance(error, DiskFullError)
        assert "the disk is full while writing" in str(error)
        assert (tmp_path / "small/data/mine/train0.tar.part").stat().st_size > 50_000
        assert not (tmp_path / "small/data/mine/train0.tar").exists()


def test_a_full_disk_that_a_manifest_meets_first(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    save, saves = Manifest.save, itertools.count()

    def save_first(manifest: Manifest, folder: Path) -> None:
        if next(saves):
            raise DiskFullError(f"the disk is full while writing {folder}")
        save(manifest, folder)

    monkeypatch.setattr(Manifest, "save", save_first)
    (error,) = place.fetch().errors
    assert isinstance(error, DiskFullError)
    monkeypatch.undo()
    assert place.fetch().errors == []
    assert place.there() == place.files
