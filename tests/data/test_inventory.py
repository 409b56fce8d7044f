"""What lies on disk of a task, what is known of it, and what is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_world import run, table
from corpus import tones, write_task
from download_world import Place
from http_faults import Zenodo, serving
from shard_makers import clip_members, encoded, member, sine, write_shard, write_tar

from xares_onnx.data.catalog import named_tasks
from xares_onnx.data.inventory import faults, holding, verified


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "XARES_ONNX_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XARES_ONNX_DATA", str(tmp_path / "data"))
    with serving(Zenodo()) as zenodo:
        yield Place(tmp_path, zenodo)


@pytest.fixture
def by_hand(tmp_path: Path) -> str:
    """A task whose shards nobody downloaded."""
    for part, clips in (("train", 6), ("valid", 2), ("test", 3)):
        write_shard(tmp_path / "data" / "hand" / f"{part}-0.tar", tones(clips, 0))
    return str(write_task(tmp_path, "hand"))


def test_a_holding_of_a_download_has_its_size_and_licence(place: Place) -> None:
    task = named_tasks([place.task])[0]
    assert holding(task, place.data).record_bytes is None
    place.fetch()
    held = holding(task, place.data)
    assert (held.shards, held.bytes, held.record_bytes, held.license) == (4, 309_000, 309_000, "cc-by-4.0")
    assert (held.lacking, held.unfinished_bytes, held.check) == ([], 0, None)
    code, out, err = run("tasks", place.task)
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (lines["size"], lines["licence"]) == ("309 kB", "cc-by-4.0")
    assert "checked" not in lines


def test_an_intact_download_is_verified_by_checksum(place: Place) -> None:
    place.fetch()
    code, out, err = run("tasks", place.task, "--verify")
    assert code == 0
    assert "checked           good: 4 by checksum\n" in out
    assert err == "mine: verifying done, 309 kB\n"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b"wrong" + path.read_bytes()[5:]), "its checksum is no longer md5:"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-7]),
            "it has 299993 bytes, but had 300000 when it was downloaded",
        ),
        (lambda path: path.unlink(), "it was downloaded and is gone"),
    ],
)
def test_a_damaged_download_is_named(damage: object, reason: str, place: Place) -> None:
    place.fetch()
    damage(place.home / "train0.tar")  # type: ignore[operator]
    code, out, err = run("tasks", place.task, "--verify")
    assert code == 4
    assert "checked           1 damaged\n" in out
    assert f"mine/train0.tar: {reason}" in out
    assert f"xares-onnx: mine: 1 damaged, first train0.tar: {reason}" in err
    assert err.endswith("; `xares-onnx download mine` fetches them again\n")
    assert run("tasks", place.task)[0] == 0  # nothing is read without being asked to
    assert place.fetch().errors == []
    assert run("tasks", place.task, "--verify")[0] == 0


def test_verification_does_not_trust_times(place: Place) -> None:
    import os

    place.fetch()
    path = place.home / "train0.tar"
    stat = path.stat()
    path.write_bytes(b"wrong" + path.read_bytes()[5:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert place.fetch().errors == []  # the same time and size: not read again
    assert verified(named_tasks([place.task])[0], place.data).check.damaged[0].shard == "train0.tar"  # type: ignore[union-attr]


def test_shards_put_there_by_hand_are_read_header_by_header(by_hand: str, place: Place) -> None:
    code, out, _ = run("tasks", by_hand, "--verify")
    assert code == 0
    assert "checked           good: 3 by headers: 11 clips\n" in out


def test_a_truncated_shard_put_there_by_hand_is_damaged(by_hand: str, place: Place) -> None:
    shard = place.data / "hand" / "test-0.tar"
    shard.write_bytes(shard.read_bytes()[:40_000])
    code, out, err = run("tasks", by_hand, "--verify")
    assert code == 4
    assert "hand/test-0.tar: the shard ends inside member" in out
    assert "hand: 1 damaged, first test-0.tar: the shard ends inside member" in err
    assert err.endswith("; replace them by intact ones\n")


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "empty"), (b"nonsense" * 999, "not a plain tar"), (bytes(10_240), "no clip")]
)
def test_a_file_that_is_not_a_shard_is_damaged(data: bytes, reason: str, by_hand: str, place: Place) -> None:
    (place.data / "hand" / "test-0.tar").write_bytes(data)
    code, out, _ = run("tasks", by_hand, "--verify")
    assert code == 4
    assert reason in out


def test_unusable_clips_are_counted_but_are_not_damage(by_hand: str, place: Place) -> None:
    audio = encoded(sine(440, 0.1))
    members = [*clip_members("a", audio, {"label": "a"}), member("b.wav", audio), member("c.json", b"{}")]
    write_tar(place.data / "hand" / "test-0.tar", members)
    code, out, _ = run("tasks", by_hand, "--verify")
    assert code == 0
    assert "3 by headers: 9 clips, 2 unusable" in out


def test_a_task_without_data_is_not_damaged(place: Place) -> None:
    place.data.mkdir()
    code, out, err = run("tasks", place.task, "--verify")
    assert (code, err) == (0, "")
    assert "checked           nothing is there" in out
    assert run("tasks", "synthetic_*", "--verify")[0] == 0


def test_unfinished_downloads_are_reported(place: Place) -> None:
    place.fetch()
    shutil.move(place.home / "train0.tar", place.home / "train0.tar.part")
    held = holding(named_tasks([place.task])[0], place.data)
    assert (held.unfinished_bytes, held.on_disk) == (300_000, "3 shards, 0.00 GB, download unfinished")
    assert "unfinished        300 kB of downloads\n" in run("tasks", place.task)[1]


def test_a_shard_is_in_a_table_with_what_is_known_of_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shipped tasks, one downloaded."""
    named = named_tasks([place.task, place.write_task("other", "102")])
    monkeypatch.setattr("xares_onnx.data.catalog.shipped_tasks", lambda: {task.name: task for task in named})
    place.fetch()
    (place.home / "valid0.tar").write_bytes(b"damaged")
    code, out, _ = run("tasks", "--verify")
    assert code == 4
    rows = {row[0]: row[6:] for row in table(out)}
    assert rows == {
        "mine": ["309 kB", "cc-by-4.0", "4 shards, 0.00 GB", "1 damaged"],
        "other": ["", "", "no", ""],
    }
    assert "mine/valid0.tar: it has 7 bytes, but had 3000 when it was downloaded\n" in out
    records = json.loads(run("tasks", "--verify", "--json")[1])
    assert records[0]["holding"]["check"]["damaged"] == [
        {"shard": "valid0.tar", "reason": "it has 7 bytes, but had 3000 when it was downloaded"}
    ]
    assert records[1]["holding"]["license"] is None


def test_missing_parts_are_faults_only_if_all_data_are_required(place: Place) -> None:
    task = named_tasks([place.task])[0]
    rows = [(task, verified(task, place.data))]
    assert faults(rows, place.data) == []
    (error,) = faults(rows, place.data, complete=True)
    assert "no data for mine: " in str(error)
    assert error.exit_code == 4


def test_a_hostile_manifest_reads_nothing_outside(place: Place) -> None:
    place.fetch()
    path = place.home / ".xares-onnx.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../../../etc/passwd"] = manifest["files"]["train0.tar"]
    path.write_text(json.dumps(manifest))
    check = verified(named_tasks([place.task])[0], place.data).check
    assert check is not None
    assert check.by_checksum == 4
    manifest["files"]["train0.tar"]["checksum"] = "shake_128:00"
    path.write_text(json.dumps(manifest))
    assert verified(named_tasks([place.task])[0], place.data).check.by_headers == 4  # type: ignore[union-attr]
