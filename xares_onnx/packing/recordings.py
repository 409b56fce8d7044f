"""Where a clip's file is, by its name in a table."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path

from ..errors import UsageError, quoted

_MAX_NAME = 255  # bytes of a file's or folder's name, on nearly every system


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
