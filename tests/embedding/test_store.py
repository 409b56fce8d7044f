"""The store: what is read is what was written, whole, or it is not there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shard_makers import small_disk

from xares_onnx import files
from xares_onnx.data.shards import Drop
from xares_onnx.embedding.store import STORE_VERSION, Clip, EmbeddedShard, Header, Store, prune
from xares_onnx.errors import DiskFullError, MachineError

KEY = "ab" + "0" * 38
HOUR, DAY = 3_600, 86_400

# Text that has broken one file format or another.
ODD = ("plain", "", "two\nlines", "\r\n", "\u2028\x85\x1c", '"}\\', "日本語", "\x00\x7f", '{"clip": 1}')


def shard(clips: int = 5, seed: int = 0, **header: Any) -> EmbeddedShard:
    """One crop for the first clip, two for the second, and so on."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(clips), np.arange(clips) + 1)
    drops = [Drop(f"drop {text}", f"reason {text}") for text in ODD]
    facts = {
        "store_version": STORE_VERSION,
        "model": "model.onnx",
        "model_sha256": "abcdef" * 10,
        "task": "mine",
        "shard": "a.tar",
        "expected": clips + len(drops),
        "damage": None,
        "audio_seconds": 1.5,
    }
    return EmbeddedShard(
        Header(**{**facts, **header}),
        rng.standard_normal((len(owners), 7)).astype(np.float32),
        owners.astype(np.int64),
        [Clip(f"clip {i} {text}", 0.1 * i, json.dumps({"label": text})) for i, text in zip(range(clips), ODD, strict=False)],
        drops,
    )


def assert_equal(found: EmbeddedShard | None, written: EmbeddedShard) -> None:
    assert found is not None
    assert (found.header, found.clips, found.drops) == (written.header, written.clips, written.drops)
    for ours, theirs in ((found.pooled, written.pooled), (found.clip_of_crop, written.clip_of_crop)):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def parts(root: Path) -> tuple[Path, Path]:
    """Tensors and rows of the only shard."""
    (tensors,), (rows,) = root.glob("*/*.safetensors"), root.glob("*/*.jsonl")
    return tensors, rows


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("clips", [0, 1, 5])
def test_what_is_written_is_read(clips: int, tmp_path: Path) -> None:
    written = shard(clips, damage="cut")
    ours = Store(tmp_path / "deep" / "store")
    assert KEY not in ours
    assert ours.read(KEY) is None
    ours.write(KEY, written)
    assert KEY in ours
    assert_equal(ours.read(KEY), written)
    assert_equal(Store(tmp_path / "deep" / "store").read(KEY), written)
    assert ours.read("cd" + KEY[2:]) is None


def test_writing_again_replaces(tmp_path: Path) -> None:
    ours = Store(tmp_path)
    ours.write(KEY, shard(3))
    ours.write(KEY, shard(2, seed=1))
    assert_equal(ours.read(KEY), shard(2, seed=1))
    assert len(list(tmp_path.glob("*/*"))) == 2


def test_a_listing_names_every_shard(tmp_path: Path) -> None:
    ours = Store(tmp_path)
    for number in range(3):
        ours.write(f"{number:040}", shard(number, shard=f"{number}.tar"))
    entries = list(ours.entries())
    assert [(key, header.shard) for key, header, *_ in entries] == [(f"{n:040}", f"{n}.tar") for n in range(3)]
    assert sum(size for _, _, size, _ in entries) == sum(path.stat().st_size for path in tmp_path.glob("*/*"))


# ---------------------------------------------------------------- damage


def test_a_shard_cut_anywhere_is_not_there(tmp_path: Path) -> None:
    ours, written = Store(tmp_path), shard()
    ours.write(KEY, written)
    for path in parts(tmp_path):
        whole = path.read_bytes()
        for cut in range(0, len(whole) - 1, 7):  # the last byte of the rows is a line's end
            path.write_bytes(whole[:cut])
            assert ours.read(KEY) is None, (path.suffix, cut)
        path.write_bytes(whole)
    assert_equal(ours.read(KEY), written)


def _line(number: int, change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        lines[number] = change(lines[number])
        return b"".join(lines)

    return changed


def _pooled(**changes: Any) -> Callable[[Any], Any]:
    return lambda header: {**header, "pooled": {**header["pooled"], **changes}}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: np.random.default_rng(0).bytes(len(data)), id="random"),
        pytest.param(lambda data: bytes(len(data)), id="zeros"),
        pytest.param(_line(2, lambda line: b""), id="a clip less"),
        pytest.param(_line(2, lambda line: line + line), id="a clip more"),
        pytest.param(_line(-1, lambda line: b""), id="a drop less"),
        pytest.param(_line(1, lambda line: b"5\n"), id="a number"),
        pytest.param(_line(1, lambda line: b"[1]\n"), id="a list"),
        pytest.param(_line(1, lambda line: b"{}\n"), id="nothing"),
        pytest.param(_line(1, lambda line: b'{"clip": {"key": 5}}\n'), id="another clip"),
        pytest.param(_line(1, lambda line: b"\xff" + line), id="not UTF-8"),
        pytest.param(_line(0, lambda line: b"{}\n"), id="another header"),
        pytest.param(lambda data: data.replace(b'"store_version":2', b'"store_version":1'), id="an older version"),
    ],
)
def test_damaged_rows_are_not_there_until_written_again(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    ours, written = Store(tmp_path), shard()
    ours.write(KEY, written)
    _, rows = parts(tmp_path)
    right = rows.read_bytes()
    assert change(right) != right
    rows.write_bytes(change(right))
    assert ours.read(KEY) is None
    ours.write(KEY, written)
    assert_equal(ours.read(KEY), written)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda header: [], id="a list"),
        pytest.param(lambda header: {**header, "pooled": 5}, id="a number"),
        pytest.param(lambda header: {**header, "pooled": {}}, id="nothing of it"),
        pytest.param(lambda header: {"clip_of_crop": header["clip_of_crop"]}, id="a tensor less"),
        pytest.param(lambda header: {**header, "offsets": header["clip_of_crop"]}, id="offsets without frames"),
        pytest.param(_pooled(dtype="BF16"), id="an unknown dtype"),
        pytest.param(_pooled(dtype=["F32"]), id="a list for a dtype"),
        pytest.param(_pooled(shape=[-1, -60]), id="a negative shape"),
        pytest.param(_pooled(shape=[1 << 62, 4]), id="an endless shape"),
        pytest.param(_pooled(shape=[1 << 40, 4], data_offsets=[0, 1 << 44]), id="more than the file has"),
        pytest.param(_pooled(shape=[0.5, 120]), id="half a crop"),
        pytest.param(_pooled(shape="15"), id="a text for a shape"),
        pytest.param(_pooled(data_offsets=[-240, 0]), id="before the file"),
        pytest.param(_pooled(data_offsets=[0]), id="no end"),
    ],
)
def test_headers_that_do_not_fit_their_file_are_not_there(change: Callable[[Any], Any], tmp_path: Path) -> None:
    ours = Store(tmp_path)
    ours.write(KEY, shard())
    tensors, _ = parts(tmp_path)
    data = tensors.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    other = json.dumps(change(header)).encode().ljust(end - 8)
    tensors.write_bytes(len(other).to_bytes(8, "little") + other + data[end:])
    assert change(header) != header
    for frames in (True, False):
        assert ours.read(KEY, frames=frames) is None


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(shard(4), id="fewer crops"),
        pytest.param(replace(shard(), clip_of_crop=np.zeros(15, np.int64)), id="crops of one clip"),
        pytest.param(replace(shard(), clip_of_crop=shard().clip_of_crop + 1), id="a clip that there is not"),
        pytest.param(replace(shard(), pooled=shard().pooled[:-1]), id="a crop less"),
    ],
)
def test_tensors_that_do_not_fit_their_rows_are_not_there(other: EmbeddedShard, tmp_path: Path) -> None:
    ours = Store(tmp_path)
    ours.write(KEY, shard())
    _, rows = parts(tmp_path)
    right = rows.read_bytes()
    ours.write(KEY, other)
    rows.write_bytes(right)
    assert ours.read(KEY) is None


def test_one_part_alone_is_not_there(tmp_path: Path) -> None:
    ours = Store(tmp_path)
    for lost in (0, 1):
        ours.write(KEY, shard())
        parts(tmp_path)[lost].unlink()
        assert KEY not in ours
        assert ours.read(KEY) is None
        assert list(ours.entries()) == []


# ---------------------------------------------------------------- writers that are killed


def _killed_writer(root: Path, renames: int) -> None:
    """A process that writes a shard and is killed when it is about to rename for the (renames + 1)-th time."""
    script = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_store import KEY, Store, shard
with Store(Path({str(root)!r})).spool(KEY, 1):  # marks the store
    pass
rename, left = os.replace, [{renames}]
def replace(*paths):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    rename(*paths)
os.replace = replace
Store(Path({str(root)!r})).write(KEY, shard())
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=200).returncode == -signal.SIGKILL


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("renames", [0, 1])
def test_what_a_killed_writer_leaves_is_not_read_and_goes_once_it_is_old(renames: int, tmp_path: Path) -> None:
    _killed_writer(tmp_path, renames)
    ours = Store(tmp_path)
    left = list(tmp_path.glob("*/*"))
    assert len(left) == renames + 1
    assert KEY not in ours
    assert ours.read(KEY) is None
    assert list(ours.entries()) == []
    assert ours.remove_leftovers() == 0  # their writer may be at work
    assert list(tmp_path.glob("*/*")) == left
    ours.write(KEY, shard())
    assert_equal(ours.read(KEY), shard())
    long_ago = time.time() - 2 * HOUR
    for path in tmp_path.glob("*/*"):
        os.utime(path, (long_ago, long_ago))
    assert ours.remove_leftovers() > 0
    assert sorted(tmp_path.glob("*/*")) == sorted(parts(tmp_path))
    assert_equal(ours.read(KEY), shard())


def test_old_orphans_are_leftovers(tmp_path: Path) -> None:
    ours = Store(tmp_path)
    ours.write(KEY, shard())
    tensors, rows = parts(tmp_path)
    tensors.unlink()
    os.utime(rows, (0, 0))
    size = rows.stat().st_size
    assert ours.remove_leftovers() == size
    assert not rows.exists()


def test_a_leftover_that_vanishes_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ab").mkdir()
    gone = tmp_path / "ab" / f"{KEY}.jsonl.01234567.part"
    gone.touch()
    os.utime(gone, (0, 0))
    stat = os.stat

    def vanishing(path: Any, **options: Any) -> os.stat_result:
        gone.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", vanishing)
    assert Store(tmp_path).remove_leftovers() == 0


# ---------------------------------------------------------------- disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", [0, 1])
def test_a_full_disk_is_said_and_leaves_nothing(
    call: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > call:
            raise OSError(code, os.strerror(code))

    ours = Store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(
            DiskFullError, match=r"the disk is full while writing .*; free some space and run again"
        ) as caught:
            ours.write(KEY, shard())
    assert caught.value.exit_code == 5
    assert KEY not in ours
    assert ours.read(KEY) is None
    assert list(ours.entries()) == []
    assert not list(tmp_path.glob("*/*.part"))
    ours.write(KEY, shard())
    assert_equal(ours.read(KEY), shard())


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Store(tmp_path)
    ours.write(KEY, shard())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DiskFullError):
        ours.write(KEY, shard(3))
    assert_equal(ours.read(KEY), shard())


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    ours, stored = Store(tmp_path / "small"), list[int]()

    def fill() -> None:
        for number in range(100):
            ours.write(f"{number:040}", shard(8, seed=number))
            stored.append(number)

    with small_disk(ours.root, kilobytes=64):
        with pytest.raises(DiskFullError):
            fill()
        assert stored
        assert not list(ours.root.glob("*/*.part"))
        assert [key for key, *_ in ours.entries()] == [f"{number:040}" for number in stored]
        assert_equal(ours.read(f"{0:040}"), shard(8))
        ours.remove(f"{0:040}")
        ours.write(f"{1:040}", shard(8, seed=1))


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(MachineError, match=r"cannot be written .* choose another place") as caught:
        Store(tmp_path / "store").write(KEY, shard())
    assert not isinstance(caught.value, DiskFullError)
    assert caught.value.exit_code == 5


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).write(KEY, shard())
    assert not list(tmp_path.glob("*/*"))


# ---------------------------------------------------------------- two processes


def test_two_processes_may_write_the_same_shard(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_store import KEY, Store, shard
for _ in range(40):
    Store(Path({str(tmp_path)!r})).write(KEY, shard())
"""
    writers = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    ours, reads = Store(tmp_path), 0
    try:
        while any(writer.poll() is None for writer in writers):
            found = ours.read(KEY)
            assert found is not None or not reads  # once whole, always whole
            if found is not None:
                assert_equal(found, shard())
                reads += 1
    finally:
        codes = [writer.wait() for writer in writers]
    assert codes == [0, 0]
    assert reads
    assert len(list(tmp_path.glob("*/*"))) == 2


# ---------------------------------------------------------------- pruning

OLD, NEW, OTHER = (digit * 40 for digit in "abc")
STORED = {OLD: ("a.onnx", "aaa111", 40), NEW: ("a.onnx", "aaa111", 2), OTHER: ("b.onnx", "bbb222", 40)}


@pytest.fixture
def filled(tmp_path: Path) -> Store:
    ours = Store(tmp_path)
    for name, (model, sha256, days) in STORED.items():
        ours.write(name, shard(2, model=model, model_sha256=sha256))
        used = time.time() - days * DAY
        os.utime(tmp_path / name[:2] / f"{name}.safetensors", (used, used))
    return ours


@pytest.mark.parametrize(
    ("chosen", "removed"),
    [
        ({}, set()),
        ({"older_than_days": 30}, {OLD, OTHER}),
        ({"older_than_days": 1}, {OLD, NEW, OTHER}),
        ({"older_than_days": 50}, set()),
        ({"model": "a.onnx"}, {OLD, NEW}),
        ({"model": "bbb"}, {OTHER}),
        ({"model": "a"}, {OLD, NEW}),
        ({"model": "c.onnx"}, set()),
        ({"model": "a.onnx", "older_than_days": 30}, {OLD}),
        ({"everything": True}, {OLD, NEW, OTHER}),
    ],
)
def test_pruning_removes_what_is_chosen(chosen: dict[str, Any], removed: set[str], filled: Store) -> None:
    sizes = {key: size for key, _, size, _ in filled.entries()}
    assert prune(filled, **chosen) == (len(removed), sum(sizes[name] for name in removed))
    assert {name for name in STORED if filled.read(name) is not None} == set(STORED) - removed
    assert len(list(filled.root.glob("*/*"))) == 2 * len(set(STORED) - removed)


def test_use_postpones_pruning(filled: Store) -> None:
    filled.touch(OLD)
    filled.touch("d" * 40)
    prune(filled, older_than_days=30)
    assert {key for key, *_ in filled.entries()} == {OLD, NEW}
