"""Shards that come in zip archives: out of harm's way, whole or not at all, and no archive left behind."""

from __future__ import annotations

import io
import re
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import http_faults as faults
import pytest
from download_world import RECORD, Place, error_text
from http_faults import Zenodo, content

from xares_onnx.data import catalog
from xares_onnx.download import zip_files as archives
from xares_onnx.errors import DiskFullError


@pytest.fixture
def place(place: Place) -> Place:
    """The same record as one archive."""
    put(place.zenodo, zipped({f"folder/{name}": data for name, data in place.files.items()} | {"readme.txt": b"x"}))
    return place


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED, **info: Any) -> bytes:
    """`info` are ZipInfo's fields, of the first member alone."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = compression
            for field, value in info.items():
                setattr(entry, field, value)
            info = {}
            archive.writestr(entry, data)
    return out.getvalue()


def put(zenodo: Zenodo, archive: bytes, name: str = "all.zip") -> None:
    zenodo.records[RECORD] = {name: archive, "README.md": b"about"}


def test_shards_are_unpacked_and_the_archive_is_removed(place: Place) -> None:
    done = place.fetch()
    assert done.errors == []
    assert place.there() == place.files
    assert [(file.name, file.status) for file in done.tasks[0].files] == [(name, "unpacked") for name in sorted(place.files)]
    assert catalog.find_parts(catalog.named_tasks([place.task])[0], place.data) is not None
    assert place.fetch().errors == []
    assert len(place.zenodo.starts("all.zip")) == 1


def test_an_archive_is_not_fetched_if_the_record_has_the_shards(place: Place) -> None:
    place.zenodo.records[RECORD] |= place.files
    assert place.fetch().errors == []
    assert place.zenodo.starts("all.zip") == []


def test_parts_may_come_from_files_and_archives(place: Place) -> None:
    put(place.zenodo, zipped({name: place.files[name] for name in ("valid0.tar", "test0.tar")}))
    place.zenodo.records[RECORD] |= {name: place.files[name] for name in ("train0.tar", "train1.tar")}
    put_second = zipped({"nothing.txt": b"x"})
    place.zenodo.records[RECORD]["second.ZIP"] = put_second
    assert place.fetch().errors == []
    assert place.there() == place.files
    asked = len(place.zenodo.asked)
    assert place.fetch().errors == []
    assert len(place.zenodo.asked) == asked + 1


def test_an_archive_resumes_like_any_file(place: Place) -> None:
    place.zenodo.faults["all.zip"] = [faults.truncated(200_000)]
    assert place.fetch().errors == []
    assert place.zenodo.starts("all.zip") == [None, 200_000]
    assert place.there() == place.files


def test_two_tasks_share_an_archive(place: Place) -> None:
    other = place.write_task("other", splits='splits = { train = "train0*.tar", test = "test*.tar" }')
    assert place.fetch([place.task, other]).errors == []
    assert len(place.zenodo.starts("all.zip")) == 1
    assert place.there() == place.files
    assert place.there("other") == {name: place.files[name] for name in ("train0.tar", "test0.tar")}


def test_an_archive_without_what_is_needed(place: Place) -> None:
    put(place.zenodo, zipped({name: place.files[name] for name in ("train0.tar", "test0.tar")}))
    assert re.fullmatch(
        r"record 101 is here, but no data for mine: .*/data/mine holds no valid\*\.tar", error_text(place.fetch())
    )


# ---------------------------------------------------------------- interrupted


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_extraction_is_done_again(after: int, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it writes a member: some are there, one is half there under another name, none is noted down."""
    write, written = archives._write, []

    def dying(opened: Any, info: zipfile.ZipInfo, target: Path, beat: Callable[[], None]) -> None:
        if len(written) == after:
            target.with_name(target.name + ".0123abcd.part").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(target)
        write(opened, info, target, beat)

    monkeypatch.setattr(archives, "_write", dying)
    with pytest.raises(KeyboardInterrupt):
        place.fetch()
    monkeypatch.setattr(archives, "_write", write)
    task = catalog.named_tasks([place.task])[0]
    assert catalog.find_parts(task, place.data) is None
    assert (place.home / "all.zip").exists()
    assert place.fetch().errors == []
    assert place.there() == place.files
    assert len(place.zenodo.starts("all.zip")) == 1


def test_a_missing_or_damaged_shard_of_an_archive_is_fetched_again(place: Place) -> None:
    place.fetch()
    (place.home / "train1.tar").unlink()
    (place.home / "test0.tar").write_bytes(b"damaged")
    assert place.fetch().errors == []
    assert place.there() == place.files
    assert len(place.zenodo.starts("all.zip")) == 2


def test_another_file_in_the_way_of_a_shard_is_not_replaced(place: Place) -> None:
    place.home.mkdir(parents=True)
    (place.home / "train1.tar").write_bytes(b"mine")
    assert "data/mine/train1.tar is in the way of a file of that name in all.zip; move it away, and try again" in error_text(
        place.fetch()
    )
    assert (place.home / "train1.tar").read_bytes() == b"mine"
    assert not (place.home / "train0.tar").exists()
    (place.home / "train1.tar").unlink()
    assert place.fetch().errors == []
    assert len(place.zenodo.starts("all.zip")) == 1


# ---------------------------------------------------------------- archives made to do harm


def overlapping(files: dict[str, bytes]) -> bytes:
    """Many members that are one and the same stretch of the archive, so that it unpacks to far more than it is."""
    data = content(100_000, 5)
    archive = zipped({"train000.tar": data, "valid0.tar": b"v", "test0.tar": b"t"})
    end = archive.index(b"PK\x05\x06")
    start = archive.index(b"PK\x01\x02")
    first = archive[start : archive.index(b"PK\x01\x02", start + 4)]
    copies = b"".join(first.replace(b"train000.tar", f"train{n:03}.tar".encode()) for n in range(200))
    directory = copies + archive[start + len(first) : end]
    return archive[:start] + directory + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 202, 202, len(directory), start, 0)


def lying(files: dict[str, bytes]) -> bytes:
    """A member that unpacks to more than its headers say, in a way that its checksum covers."""
    data = bytes(50_000)
    archive = zipped({"train0.tar": data, **{n: files[n] for n in ("valid0.tar", "test0.tar")}}, zipfile.ZIP_DEFLATED)
    return archive.replace(struct.pack("<L", len(data)), struct.pack("<L", 1_000))


HARM: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str]] = {
    "up": (lambda files: zipped({f"../{name}": data for name, data in files.items()}), "has a path that leads elsewhere"),
    "far up": (lambda files: zipped({"a/../../../train0.tar": b"x"}), "has a path that leads elsewhere"),
    "absolute": (lambda files: zipped({"/etc/train0.tar": b"x"}), "has a path that leads elsewhere"),
    "backslashes": (lambda files: zipped({"train\\..\\..\\x.tar": b"x"}), "has a path that leads elsewhere"),
    "a link": (
        lambda files: zipped({"train0.tar": b"/etc/passwd"}, external_attr=(stat.S_IFLNK | 0o777) << 16),
        "is a link or a special file",
    ),
    "a device": (
        lambda files: zipped({"train0.tar": b""}, external_attr=(stat.S_IFCHR | 0o777) << 16),
        "is a link or a special file",
    ),
    "a bomb": (
        lambda files: zipped({"train0.tar": bytes(30_000_000)}, zipfile.ZIP_DEFLATED),
        "claims to unpack to more than 100 times its size",
    ),
    "members that overlap": (overlapping, "claims to contain more than 100 times its size"),
    "two of a name": (lambda files: zipped({"a/train0.tar": b"x", "b/train0.tar": b"y"}), "has the name of another"),
    "encrypted": (lambda files: encrypted(zipped({"train0.tar": b"x" * 99})), "is encrypted"),
    "more than it says": (lying, "cannot be unpacked"),
    "cut off": (lambda files: zipped(files)[:-100], r"cannot be unpacked \(File is not a zip file\)"),
    "flipped": (lambda files: flipped(zipped(files)), r"cannot be unpacked \(Bad CRC-32 for file 'train0.tar'\)"),
    "not deflate": (lambda files: flipped(zipped(files, zipfile.ZIP_DEFLATED), 8), "cannot be unpacked"),
    "no zip": (lambda files: b"<html>", "cannot be unpacked"),
    "a zip of nothing": (lambda files: b"", "cannot be unpacked"),
}


def encrypted(archive: bytes) -> bytes:
    made = bytearray(archive)
    made[archive.index(b"PK\x01\x02") + 8] |= 1
    return bytes(made)


def flipped(archive: bytes, count: int = 1) -> bytes:
    made = bytearray(archive)
    for n in range(count):
        made[1_000 + n] ^= 0xFF
    return bytes(made)


@pytest.mark.parametrize("case", HARM)
def test_a_harmful_archive_is_refused(case: str, place: Place) -> None:
    make, says = HARM[case]
    put(place.zenodo, make(place.files))
    before = {path for path in place.folder.rglob("*") if place.data not in path.parents}
    sentence = error_text(place.fetch())
    assert re.search(says, sentence), sentence
    assert sentence.startswith("mine: 1 of 1 files of record 101 could not be fetched, first all.zip: archive ")
    assert {path for path in place.folder.rglob("*") if place.data not in path.parents} - {place.data} == before
    assert not any(path.is_symlink() for path in place.home.iterdir())
    assert sum(path.stat().st_size for path in place.home.iterdir()) < 2 * 310_000 + 2_000
    assert not (place.home / "train0.tar").exists()


def test_what_an_archive_claims_must_fit(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own size is looked at before it is fetched, what is in it before it is unpacked."""
    shard = content(100_000, 1) + content(10_000, 2) * 100
    put(place.zenodo, zipped(place.files | {"train0.tar": shard}, zipfile.ZIP_DEFLATED))
    usage = archives.shutil.disk_usage(place.folder)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage._replace(free=500_000))
    done = place.fetch()
    assert isinstance(done.errors[0], DiskFullError)
    assert "unpacking all.zip needs 0.00 GB in" in error_text(done)
    assert set(place.there()) == {"all.zip"}


def test_members_that_are_not_wanted_may_be_anything(place: Place) -> None:
    members = {"../../evil.sh": b"x", "bomb": bytes(10_000_000), **place.files}
    put(place.zenodo, zipped(members, zipfile.ZIP_DEFLATED))
    assert place.fetch().errors == []
    assert place.there() == place.files


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_every_compression(compression: int, place: Place) -> None:
    put(place.zenodo, zipped(place.files, compression))
    assert place.fetch().errors == []
    assert place.there() == place.files
