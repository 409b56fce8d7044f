"""A clip's file: where it lies, whether it can be decoded, and a digest of what is heard."""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
from dataclasses import dataclass
from pathlib import Path

from ..data.audio import AUDIO_EXTENSIONS, READABLE_EXTENSIONS, decode_blocks
from ..errors import ClipError, UsageError


@dataclass(frozen=True)
class Heard:
    """`content` is a digest of the samples as an encoder gets them, mono, and of their rate."""

    content: bytes
    seconds: float
    size: int


def place(root: Path, name: str, where: str) -> str:
    """The path of a file below `root`, itself resolved, with `/`; `UsageError` where it leads out, by a link too."""
    try:
        name.encode()
        relative = os.path.relpath(Path(name).resolve(), root) if os.path.isabs(name) else name
        below = posixpath.normpath(Path(relative).as_posix())
        target = (root / below).resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a zero byte, half a character, links in a circle
        raise UsageError(f"{where} names the file {name!r}, which cannot be ({error})") from error
    if below == ".." or below.startswith("../") or not target.is_relative_to(root):
        raise UsageError(f"{where} names {name!r}, which lies outside {root}; the table's paths start there")
    return below


def hear(path: Path) -> Heard:
    """Decode a file from end to end, a block at a time.

    Raises `ClipError` where an evaluation would drop it.
    """
    extension = path.name.rpartition(".")[2].lower() if "." in path.name else ""
    try:
        found = path.stat()
    except OSError as error:
        raise ClipError(f"it cannot be read ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):  # a pipe would wait for ever
        raise ClipError("it is no regular file")
    if extension not in READABLE_EXTENSIONS:
        known = f"{extension} audio" if extension in AUDIO_EXTENSIONS else "its kind of file"
        raise ClipError(f"{known} is not read; convert it, as by `ffmpeg -i {path.name} {path.stem}.flac`")
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
    return Heard(digest.digest(), seconds, found.st_size)
