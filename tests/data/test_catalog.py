"""Choosing tasks, finding their folders and shards, and the digests kept of them."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
from shard_makers import task_toml
from xares_facts import facts, others

from xares_onnx.data import catalog
from xares_onnx.data.catalog import (
    SUITES,
    Digests,
    cache_folder,
    data_folder,
    find_parts,
    missing_data,
    named_tasks,
    on_disk,
    part_globs,
    shipped_tasks,
    suite_tasks,
)
from xares_onnx.data.selection import prepare
from xares_onnx.data.task import Task, load_task
from xares_onnx.errors import DataMissingError, UnknownTaskError, UsageError
from xares_onnx.progress import ignore

# ---------------------------------------------------------------- choosing tasks


def names(tasks: list[Task]) -> list[str]:
    return [task.name for task in tasks]


def test_tasks_are_named_or_matched_each_once_in_the_order_given() -> None:
    assert names(named_tasks(["gtzan_genre", "esc50"])) == ["gtzan_genre", "esc50"]
    assert names(named_tasks(["vox*", "esc50", "voxlingua33", "vox*"])) == ["voxceleb1", "voxlingua33", "esc50"]
    assert set(names(named_tasks(["*"]))) == set(shipped_tasks())
    assert named_tasks([]) == []


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("esc-50", "; did you mean 'esc50'"),
        ("voxceleb", "; did you mean 'voxceleb1'"),
        ("ESC50", ""),
        ("qqqqqqqq", ""),
        ("zz*", ""),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnknownTaskError) as caught:
        named_tasks(["gtzan_genre", name])
    assert str(caught.value).startswith(f"there is no task {name!r}{nearest}")
    assert "`xares-onnx tasks` lists them" in str(caught.value)
    assert caught.value.exit_code == 2


def test_two_files_cannot_share_a_name(tmp_path: Path) -> None:
    for number, (name, classes) in enumerate([("esc50", 'classes = ["a", "b"]'), ("mine", 'classes = ["a", "b"]')]):
        (tmp_path / f"{number}.toml").write_text(task_toml(name, classes=classes))
    (tmp_path / "2.toml").write_text(task_toml("mine"))
    with pytest.raises(UsageError, match=r"0\.toml uses the name 'esc50' of another task"):
        named_tasks([str(tmp_path / "0.toml")])
    with pytest.raises(UsageError, match=r"2\.toml uses the name 'mine' of another task"):
        named_tasks([str(tmp_path / "1.toml"), str(tmp_path / "2.toml")])
    assert names(named_tasks([str(tmp_path / "1.toml")] * 2)) == ["mine"]


def test_suites() -> None:
    suites = {suite: set(names(suite_tasks(suite))) for suite in SUITES}
    private = {row[0] for row in facts if row[2] == "private"}
    assert (
        suites["private"]
        == private
        == {"finger_snap", "inside_outside_car", "key_scratching", "liveenv", "subway_broadcast"}
    )
    assert suites["public"] == {row[0] for row in facts + others} - private
    assert suites["all"] == suites["public"] | private
    for domain in ("speech", "environment", "music"):
        assert suites[domain] == {row[0] for row in facts + others if row[1] == domain}
    assert suites["synthetic"] == set(shipped_tasks()) - suites["all"]
    assert [len(suites[name]) for name in ("all", "public", "private")] == [28, 23, 5]
    with pytest.raises(UsageError, match="there is no suite 'musik'; choose from all, public"):
        suite_tasks("musik")


def test_tasks_come_by_domain_public_ones_first() -> None:
    order = [(task.domain, task.private) for task in shipped_tasks().values()]
    domains = ["speech", "environment", "music", "synthetic"]
    assert order == sorted(order, key=lambda entry: (domains.index(entry[0]), entry[1]))


# ---------------------------------------------------------------- folders


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with no environment variables set and a data folder of the user elsewhere."""
    monkeypatch.chdir(tmp_path)
    for variable in (catalog.DATA_VARIABLE, catalog.CACHE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(catalog.platformdirs, "user_data_dir", lambda *_, **__: str(tmp_path / "user"))
    monkeypatch.setattr(catalog.platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "usercache"))
    return tmp_path


def test_the_data_folder_is_the_option_then_the_variable_then_the_default(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert data_folder(None) == place / "user"
    (place / "env").mkdir()
    assert data_folder(None) == Path("env")
    (place / "named").mkdir()
    monkeypatch.setenv("XARES_ONNX_DATA", "named")
    assert data_folder(None) == Path("named")
    (place / "given").mkdir()
    assert data_folder(place / "given") == place / "given"
    monkeypatch.setenv("XARES_ONNX_DATA", "")
    assert data_folder(None) == Path("env")


def test_a_named_data_folder_must_exist(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "env").mkdir()
    with pytest.raises(DataMissingError, match="data folder none does not exist; --data names") as caught:
        data_folder(Path("none"))
    assert caught.value.exit_code == 4
    monkeypatch.setenv("XARES_ONNX_DATA", "none")
    with pytest.raises(DataMissingError, match="data folder none does not exist"):
        data_folder(None)


def test_a_folder_to_fill_need_not_exist(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_folder(Path("new"), to_fill=True) == Path("new")
    monkeypatch.setenv("XARES_ONNX_DATA", "other")
    assert data_folder(None, to_fill=True) == Path("other")
    (place / "file").touch()
    with pytest.raises(DataMissingError, match="data folder file does not exist"):
        data_folder(Path("file"), to_fill=True)


def test_the_cache_folder_is_the_option_then_the_variable_then_the_default(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder(None) == place / "usercache"
    monkeypatch.setenv("XARES_ONNX_CACHE", "named")
    assert cache_folder(None) == Path("named")
    assert cache_folder(Path("given")) == Path("given")


# ---------------------------------------------------------------- what is on disk


def fill(folder: Path, *paths: str, size: int = 10_000_000) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with (folder / path).open("wb") as file:
            file.truncate(size)


def test_parts_are_found_by_their_patterns(tmp_path: Path) -> None:
    task = shipped_tasks()["freemusicarchive"]
    assert find_parts(task, tmp_path) is None
    files = [f"freemusicarchive/fma_small_{name}.tar" for name in ("train01", "train00", "valid0", "test0")]
    fill(
        tmp_path,
        *files,
        "freemusicarchive/other.tar",
        "freemusicarchive/fma_small_train00.tar.part",
        "elsewhere/fma_small_train9.tar",
    )
    (tmp_path / "freemusicarchive" / "fma_small_train_folder.tar").mkdir()
    parts = find_parts(task, tmp_path)
    assert parts is not None
    assert {part: [path.name for path in paths] for part, paths in parts.items()} == {
        "train": ["fma_small_train00.tar", "fma_small_train01.tar"],
        "valid": ["fma_small_valid0.tar"],
        "test": ["fma_small_test0.tar"],
    }
    assert on_disk(task, tmp_path) == "4 shards, 0.04 GB"


def test_a_task_that_lacks_a_part_has_no_data(tmp_path: Path) -> None:
    task = shipped_tasks()["esc50"]
    assert on_disk(task, tmp_path) == "no"
    fill(tmp_path, *(f"esc50/wds-audio-fold-{fold}-0.tar" for fold in (1, 2, 4)))
    assert find_parts(task, tmp_path) is None
    assert on_disk(task, tmp_path) == "3 shards, 0.03 GB, lacks 3, 5"
    assert "holds no wds-audio-fold-3-*.tar" in missing_data(task, tmp_path)


def test_a_shard_in_two_parts_is_one_on_disk(tmp_path: Path) -> None:
    fill(tmp_path, "subway_broadcast/subway_broadcast0.tar")
    assert on_disk(shipped_tasks()["subway_broadcast"], tmp_path) == "1 shards, 0.01 GB"


def test_a_broken_link_is_not_a_shard(tmp_path: Path) -> None:
    fill(tmp_path, "subway_broadcast/subway_broadcast0.tar")
    task = shipped_tasks()["subway_broadcast"]
    (tmp_path / "subway_broadcast" / "subway_broadcast1.tar").symlink_to(tmp_path / "gone")
    assert on_disk(task, tmp_path) == "1 shards, 0.01 GB"
    (tmp_path / "subway_broadcast" / "subway_broadcast0.tar").unlink()
    assert on_disk(task, tmp_path) == "no"
    assert find_parts(task, tmp_path) is None
    assert "holds no subway_broadcast*.tar" in missing_data(task, tmp_path)


@pytest.mark.parametrize(
    ("task", "how"),
    [
        ("esc50", "`xares-onnx download esc50` fetches Zenodo record 14614287, or name another folder by --data"),
        ("finger_snap", "its data were never published; if you have them, put the tars there"),
        ("mine", "put its shards there, or name another folder by --data"),
    ],
)
def test_a_message_on_missing_data_says_how_to_get_them(task: str, how: str, tmp_path: Path) -> None:
    chosen = shipped_tasks()[task] if task in shipped_tasks() else load_task(Path("mine.toml"), task_toml())
    first = next(iter(part_globs(chosen).values()))
    assert missing_data(chosen, tmp_path) == f"no data for {task}: {tmp_path / task} holds no {first}; {how}"


def test_synthetic_tasks_are_built_in(tmp_path: Path) -> None:
    assert on_disk(shipped_tasks()["synthetic_pitch"], tmp_path) == "built in"


# ---------------------------------------------------------------- digests


def test_a_shard_is_read_once_for_its_digest_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, read = tmp_path / "a.tar", []
    shard.write_bytes(b"1" * 1_000)
    digest = catalog.file_digest
    monkeypatch.setattr(catalog, "file_digest", lambda path: read.append(path) or digest(path))
    sha = hashlib.sha256(b"1" * 1_000).hexdigest()
    assert Digests(tmp_path / "cache").of(shard)[0] == sha
    assert Digests(tmp_path / "cache").of(shard)[0] == sha
    assert len(read) == 1

    before = shard.stat()
    time.sleep(0.05)  # the clock of a file system may tick only a hundred times per second
    shard.write_bytes(b"2" * 1_000)  # of the same size, and put back to the same time
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Digests(tmp_path / "cache").of(shard)[0] == hashlib.sha256(b"2" * 1_000).hexdigest()
    assert len(read) == 2

    (note,) = (tmp_path / "cache" / "digests").iterdir()
    for damaged in (b"", b"[]", note.read_bytes()[:-5], b'["x", 5]'):
        note.write_bytes(damaged)
        assert Digests(tmp_path / "cache").of(shard)[0] == hashlib.sha256(b"2" * 1_000).hexdigest()


def test_digests_of_parts_name_every_file_once(tmp_path: Path) -> None:
    shards = [tmp_path / name for name in ("a.tar", "b.tar")]
    for shard in shards:
        shard.write_bytes(shard.name.encode())
    seen: list[Any] = []
    found = Digests(tmp_path / "cache").of_parts("mine", {"train": shards, "test": shards[1:]}, seen.append)
    assert {path: digest for path, (digest, _) in found.items()} == {
        path: hashlib.sha256(path.name.encode()).hexdigest() for path in shards
    }
    assert [(event.done, event.total) for event in seen] == [(0, 2), (1, 2), (2, 2)]
    with pytest.raises(DataMissingError, match=r"none\.tar cannot be read"):
        Digests(tmp_path / "cache").of_parts("mine", {"train": [tmp_path / "none.tar"]}, ignore)


def test_chosen_tasks_come_with_the_folder_of_their_data(tmp_path: Path) -> None:
    data, cache = tmp_path / "data", tmp_path / "cache"
    fill(data, *(f"esc50/wds-audio-fold-{fold}-0.tar" for fold in range(1, 6)))
    timbre, esc50 = (shipped_tasks()[name] for name in ("synthetic_timbre", "esc50"))
    chosen = catalog.choose_tasks(["synthetic_timbre", "esc50"], None, data, cache, ignore)
    assert chosen == [(timbre, catalog.synthetic_folder(cache)), (esc50, data)]
    assert not cache.exists()  # a synthetic task is built when it is prepared


def test_a_synthetic_task_is_built_once_when_it_is_prepared(tmp_path: Path) -> None:
    ((task, folder),) = catalog.choose_tasks(["synthetic_timbre"], None, None, tmp_path, ignore)
    events: list[Any] = []
    prepared = prepare(task, folder, Digests(tmp_path), None, events.append)
    assert {part: [path.name for path in paths] for part, paths in prepared.parts.items()} == {
        part: [f"{part}-000000.tar"] for part in ("train", "valid", "test")
    }
    assert [(event.done, event.total) for event in events[:2]] == [(0, 1), (1, 1)]
    again: list[Any] = []
    assert prepare(task, folder, Digests(tmp_path), None, again.append).digest() == prepared.digest()
    assert [event.total for event in again] == [3] * 4  # shards to digest only
