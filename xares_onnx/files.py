"""Files that are either whole or not there, and stamps that tell whether one was replaced."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from .errors import DataMissingError, DiskFullError, MachineError

TEMPORARY_SUFFIX = ".part"

# Path, size, modification and change time in ns, inode: any ordinary way of replacing a file changes one of them.
Stamp = tuple[str, int, int, int, int]


def stamp(path: Path) -> Stamp:
    """Raises `DataMissingError` where there is no such file."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataMissingError(f"{path} cannot be read ({error.strerror})") from error
    name = str(path.resolve()).encode("utf-8", "backslashreplace").decode()
    return name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def write_aside(path: Path, data: bytes | memoryview) -> None:
    """Write to a temporary sibling, flush it to disk, rename it into place. A killed writer leaves only the sibling.

    Raises `DiskFullError` or `MachineError`, with the sibling removed.
    """
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        try:
            aside.unlink()
        except OSError:
            pass  # it was never made
        if isinstance(error, OSError):
            raise disk_error(error, path) from error
        raise


def disk_error(error: OSError, path: Path) -> MachineError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"the disk is full while writing {path}; free some space and run again: finished work is kept")
    return MachineError(f"{path} cannot be written ({error.strerror}); choose another place")
