"""Files that are whole or absent, and stamps that change when a file is replaced."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from .errors import DataMissingError, DiskFullError, MachineError

TEMPORARY_SUFFIX = ".part"
BEAT_BYTES = 1 << 22

# Path, size, modification and change time in ns, inode: every ordinary way to replace a file changes one of them.
Stamp = tuple[str, int, int, int, int]


def stamp(path: Path) -> Stamp:
    """The stamp of a file, at the end of its links.

    Raises:
        DataMissingError: The file does not exist or its folder cannot be read.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataMissingError(f"{path} cannot be read ({error.strerror})") from error
    name = str(path.resolve()).encode("utf-8", "backslashreplace").decode()
    return name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def file_checksum(path: Path, algorithm: str, beat: Callable[[], None] = lambda: None) -> str:
    """Digest a file's content.

    Args:
        path: The file.
        algorithm: One of `CHECKSUM_ALGORITHMS`.
        beat: Called before each `BEAT_BYTES` are digested; it may raise to stop.

    Returns:
        `<algorithm>:<hex digest>`.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        while block := file.read(BEAT_BYTES):
            beat()
            digest.update(block)
    return f"{algorithm}:{digest.hexdigest()}"


def write_aside(path: Path, data: bytes | memoryview) -> None:
    """Write to a temporary sibling, flush it to disk, rename it into place. A killed writer leaves only the sibling.

    Raises:
        DiskFullError: The disk is full. The sibling is removed, here and below.
        MachineError: The file cannot be written.
    """
    with made_aside(path) as aside, aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def made_aside(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write: renamed to `path` if the block succeeds, removed if it raises.

    Raises:
        DiskFullError: The disk is full, here or in the block.
        MachineError: Any other `OSError`, here or in the block.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except BaseException as error:
        try:
            aside.unlink()
        except OSError:
            pass  # it was never written
        if isinstance(error, OSError):
            raise disk_error(error, path) from error
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary siblings of killed writers. Call it only if no writer is at work in the folder."""
    for path in folder.glob(f"*.????????{TEMPORARY_SUFFIX}"):
        if re.fullmatch(r".*\.[0-9a-f]{8}\.part", path.name, re.DOTALL):
            path.unlink(missing_ok=True)


def copy_aside(source: Path, path: Path) -> None:
    """Copy a file as `write_aside` writes one."""
    with made_aside(path) as aside, source.open("rb") as original, aside.open("wb") as copy:
        shutil.copyfileobj(original, copy, 1 << 22)
        copy.flush()
        os.fsync(copy.fileno())


def disk_error(error: OSError, path: Path) -> MachineError:
    """What to raise for a failure to write `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"the disk is full while writing {path}; free some space and run again: finished work is kept")
    return MachineError(f"{path} cannot be written ({error.strerror}); choose another place")


def indented(value: Any) -> bytes:
    """JSON that people can read."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


CHECKSUM_ALGORITHMS = ("md5", "sha1", "sha256", "sha512")
