"""A clip's file: its path, whether it can be decoded, and a digest of the decoded samples."""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
from dataclasses import dataclass
from pathlib import Path

from ..data.audio import AUDIO_EXTENSIONS, READABLE_EXTENSIONS, decode_blocks
from ..errors import ClipError, UsageError, quoted

_MAX_NAME = 255  # bytes of a file's or folder's name, on nearly every system


@dataclass(frozen=True)
class Recording:
    """A decoded file of `size` bytes. `content` is a digest of its mono samples, as an encoder gets them, and their rate."""

    content: bytes
    seconds: float
    size: int


def path_below(root: Path, name: str, where: str) -> str:
    """The path of a file relative to `root`, with `/`.

    Args:
        root: The audio folder, resolved.
        name: The file as the table names it.
        where: The row, for messages.

    Raises:
        UsageError: The path is invalid, or leads out of `root`, be it by a link.
    """
    try:
        name.encode()
        relative = os.path.relpath(Path(name).resolve(), root) if os.path.isabs(name) else name
        below = posixpath.normpath(Path(relative).as_posix())
        target = (root / below).resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a zero byte, half a surrogate pair, links in a circle
        raise UsageError(f"{where} names the file {quoted(name)}, which cannot exist ({error})") from error
    if any(len(os.fsencode(part)) > _MAX_NAME for part in below.split("/")):
        raise UsageError(f"{where} names the file {quoted(name)}, whose name is longer than any file's")
    if below == ".." or below.startswith("../") or not target.is_relative_to(root):
        raise UsageError(f"{where} names {quoted(name)}, which lies outside {root}; the table's paths start there")
    return below


def decode_recording(path: Path) -> Recording:
    """Decode a file from end to end, a block at a time.

    Raises:
        ClipError: An evaluation would drop it.
    """
    extension = path.name.rpartition(".")[2].lower() if "." in path.name else ""
    try:
        status = path.stat()
    except OSError as error:
        raise ClipError(f"it cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):  # reading a pipe could block for ever
        raise ClipError("it is not a regular file")
    if extension not in READABLE_EXTENSIONS:
        kind = f"{extension} audio" if extension in AUDIO_EXTENSIONS else "this kind of file"
        raise ClipError(f"{kind} is not supported; convert it, as by `ffmpeg -i {path.name} {path.stem}.flac`")
    digest, seconds = hashlib.sha256(), 0.0
    try:
        with path.open("rb") as file:
            for samples, rate in decode_blocks(file):
                if not seconds:
                    digest.update(f"{rate} Hz\n".encode())
                digest.update(samples.data)
                seconds += len(samples) / rate
    except OSError as error:
        raise ClipError(f"it cannot be read ({error.strerror})") from error
    return Recording(digest.digest(), seconds, status.st_size)
