"""Files that are whole or not there, and stamps that tell when one was replaced."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xares_onnx import files
from xares_onnx.errors import DataMissingError, DiskFullError, MachineError
from xares_onnx.files import TEMPORARY_SUFFIX, stamp, write_aside

ROOT = Path(__file__).parents[1]


def test_a_file_is_written_with_its_folders_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_aside(path, b"one")
    assert path.read_bytes() == b"one"
    write_aside(path, memoryview(b"another"))
    assert path.read_bytes() == b"another"
    assert list(path.parent.iterdir()) == [path]


def test_nothing_is_seen_under_the_name_before_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "file.bin", []
    replace = os.replace
    write_aside(path, b"old")

    def look(source: Path, target: Path) -> None:
        seen.append((path.read_bytes(), source.read_bytes(), source.suffix, target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    write_aside(path, b"new")
    assert seen == [(b"old", b"new", TEMPORARY_SUFFIX, path)]


@pytest.mark.parametrize(
    ("number", "error", "says"),
    [
        (errno.ENOSPC, DiskFullError, "the disk is full while writing .*; free some space and run again"),
        (errno.EDQUOT, DiskFullError, "the disk is full while writing"),
        (errno.EIO, MachineError, r"cannot be written \(Input/output error\); choose another place"),
    ],
)
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(
    step: str, number: int, error: type[Exception], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.bin"
    write_aside(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(MachineError, match=says) as caught:
        write_aside(path, b"new")
    assert type(caught.value) is error
    assert caught.value.exit_code == 5
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_aside(tmp_path / "file.bin", b"new")
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_only_its_sibling(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    script = f"""
import os, signal
from pathlib import Path
from xares_onnx.files import write_aside
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
write_aside(Path({str(path)!r}), b"new")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.suffix == TEMPORARY_SUFFIX


def test_a_folder_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="cannot be written"):
        write_aside(tmp_path / "file" / "inside.bin", b"new")


def test_a_stamp_tells_every_ordinary_replacement(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"12345")
    stamps = [stamp(path)]
    assert stamp(path) == stamps[0]

    path.write_bytes(b"123456")
    stamps.append(stamp(path))

    before = path.stat()
    path.write_bytes(b"654321")  # as long, and made to look as old
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    stamps.append(stamp(path))

    other = tmp_path / "other.bin"
    other.write_bytes(b"654321")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)
    stamps.append(stamp(path))
    assert len(set(stamps)) == len(stamps)


def test_a_stamp_follows_links_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"12345")
    (tmp_path / "link.bin").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    assert stamp(path) == stamp(Path("file.bin")) == stamp(Path("link.bin"))


def test_a_stamp_of_a_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"nothing\.bin cannot be read \(No such file or directory\)"):
        stamp(tmp_path / "nothing.bin")


def test_a_stamp_names_any_path_in_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9.bin"  # a name that is not UTF-8
    path.touch()
    name = stamp(path)[0]
    assert name == f"{tmp_path.resolve()}/caf\\udce9.bin"
    assert name.encode().decode() == name


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_disk_errors_name_the_file(number: int) -> None:
    assert "here/file.bin" in str(files.disk_error(OSError(number, os.strerror(number)), Path("here/file.bin")))
