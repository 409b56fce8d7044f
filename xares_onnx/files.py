"""Files that are whole or absent, and stamps that change when a file is replaced."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from .errors import DataMissingError, DiskFullError, MachineError, UsageError

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
        status = path.stat()
    except OSError as error:
        raise DataMissingError(f"{path} cannot be read ({error.strerror})") from error
    name = str(path.resolve()).encode("utf-8", "backslashreplace").decode()
    return name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


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


def check_target(path: Path) -> None:
    """Raise `UsageError` if what lies under the name of a file to write is a link, a pipe, a device or a folder."""
    try:
        mode = path.lstat().st_mode
    except OSError:  # nothing is there, or writing will say why not
        return
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise UsageError(f"{path} is {kind}, which is never written to or replaced; name a file, new or old")


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that are missing, for the user alone: others must not put files there.

    Raises:
        DiskFullError, MachineError: It cannot be made.
    """
    try:
        missing = [folder, *folder.parents]
        for each in reversed(missing[: next((n for n, each in enumerate(missing) if each.is_dir()), None)]):
            each.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise disk_error(error, folder) from error


def is_own(status: os.stat_result) -> bool:
    """Whether a file, by its own status and not that of what it links to, is a regular one of this user."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == getattr(os, "geteuid", lambda: status.st_uid)()


def remove_own(path: Path) -> int:
    """Remove a file of this user, in a folder that is no link; the bytes that this freed, 0 if it is another's or gone.

    Raises:
        MachineError: It cannot be removed.
    """
    try:
        if os.unlink not in os.supports_dir_fd:
            status = path.lstat()
            if is_own(status):
                path.unlink()
            return status.st_size if is_own(status) else 0
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:  # in the folder that was opened, which nobody can put a link in place of
            status = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
            if not is_own(status):
                return 0
            os.unlink(path.name, dir_fd=folder)
            return status.st_size
        finally:
            os.close(folder)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise disk_error(error, path) from error


def solid_bytes(status: os.stat_result) -> int:
    """The bytes of a file that lie on the disk: a hole costs nothing to make, and must not pass for weights."""
    return min(status.st_size, getattr(status, "st_blocks", status.st_size) * 512)


def write_aside(path: Path, data: bytes | memoryview, *, anew: bool = False) -> None:
    """Write to a temporary sibling, flush it to disk, rename it into place. A killed writer leaves only the sibling.

    Args:
        path: The file; by default nothing may lie there but a regular file.
        data: Its content.
        anew: Whether whatever lies there is replaced; for files of a cache, whose names are ours.

    Raises:
        UsageError: A link, pipe or device lies there.
        DiskFullError: The disk is full. The sibling is removed, here and below.
        MachineError: The file cannot be written.
    """
    with made_aside(path, anew=anew) as aside, aside.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def made_aside(path: Path, *, anew: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` to write: renamed to `path` if the block succeeds, removed if it raises.

    Raises:
        UsageError: A link, pipe or device lies there; with `anew` it is replaced.
        DiskFullError: The disk is full, here or in the block.
        MachineError: Any other `OSError`, here or in the block.
    """
    if not anew:
        check_target(path)
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
    with made_aside(path) as aside, source.open("rb") as original, aside.open("xb") as copy:
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
