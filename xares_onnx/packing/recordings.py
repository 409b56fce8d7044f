"""Where the audio of a table's rows lies, and what decoding tells of it."""

from __future__ import annotations

import os
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..data.recordings import AudioFile, Recording, StoredFile, decode_recording
from ..encoder.decoding import Decoder
from ..errors import UsageError, quoted
from .index import Clip

_BYTES_PER_CALL = 1 << 26  # of encoded audio that is handed to the decoder at once, unless one clip has more


class Place(NamedTuple):
    """What a row's cell says about its clip: the path that names the clip, and a digest of the file if the row holds it.

    Two rows with the same path and digest are about the same clip.
    """

    path: str
    digest: bytes | None = None


class AudioSource(ABC):
    """Where the audio of a table's rows lies."""

    in_order_of_rows = False
    """Whether clips have to be read in the order of the rows, because any other is slow."""

    @abstractmethod
    def place(self, cell: Any, line: int, where: str) -> Place | None:
        """From the cell of a row, which `where` names; None if it names nothing. `UsageError` if it may not be read."""

    @abstractmethod
    def exists(self, path: str) -> bool: ...

    @abstractmethod
    def file(self, clip: Clip) -> AudioFile: ...

    def close(self) -> None:
        """Close what was opened."""
        return


class AudioFolder(AudioSource):
    """A folder that the cells' paths start from."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def place(self, cell: Any, line: int, where: str) -> Place | None:
        named = isinstance(cell, str) and cell.strip()
        return Place(path_below(self._root, cell, where)) if named else None

    def exists(self, path: str) -> bool:
        return (self._root / path).exists()

    def file(self, clip: Clip) -> AudioFile:
        return StoredFile(self._root / clip.path)


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


def decode_recordings(files: Iterable[AudioFile], decoder: Decoder, threads: int) -> Iterator[Recording | str]:
    """`decode_recording` of each file, in their order, or why it cannot be used. Files in memory wait a few at a time."""
    waiting: list[AudioFile] = []
    for file in files:
        if waiting and sum(other.bytes_held for other in (*waiting, file)) > _BYTES_PER_CALL:
            yield from decoder.each(decode_recording, waiting, Recording, threads)
            waiting = []
        waiting.append(file)
    yield from decoder.each(decode_recording, waiting, Recording, threads)
