"""Write shards: tars of each clip's file as it is and of its json. The same clips give the same bytes."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..data.recordings import AudioFile
from ..errors import ClipError, DataError
from ..files import disk_error

MAX_SHARD_CLIPS = 5000
MAX_SHARD_BYTES = 500_000_000


@dataclass(frozen=True)
class Member:
    key: str
    file: AudioFile
    size: int
    label: bytes


def key_of(path: str) -> str:
    """A clip's key: its path without the ending, changed so that nothing in it looks like an ending or a hidden file."""
    stem = path.rpartition(".")[0]
    safe = re.sub(r"[^\w/-]", "_", stem)
    return f"clip{safe}" if safe.startswith("_") else safe


def write_shards(pattern: str, members: Iterable[Member]) -> list[Path]:
    """Write clips, in their order, into as many shards as they need.

    Args:
        pattern: Path of a shard, to be formatted with its number.
        members: The clips.

    Returns:
        The shards' paths.

    Raises:
        DataError: A file changed since it was checked.
        MachineError: A shard cannot be written.
    """
    written: list[Path] = []
    for shard in _in_shards(members):
        path = Path(pattern.format(len(written)))
        with _shard(path) as tar:
            for member in shard:
                _add_file(tar, member)
                tar.addfile(_header(f"{member.key}.json", len(member.label)), io.BytesIO(member.label))
        written.append(path)
    return written


def _in_shards(members: Iterable[Member]) -> Iterator[Iterator[Member]]:
    """An iterator of members per shard. Each must be used up before the next."""
    source = iter(members)
    waiting = next(source, None)

    def shard() -> Iterator[Member]:
        nonlocal waiting
        clips = size = 0
        while waiting is not None and (not clips or (clips < MAX_SHARD_CLIPS and size + waiting.size <= MAX_SHARD_BYTES)):
            clips, size = clips + 1, size + waiting.size
            yield waiting
            waiting = next(source, None)

    while waiting is not None:
        yield shard()


@contextmanager
def _shard(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with path.open("wb") as file:
            with closing(tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)) as tar:
                yield tar
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(error, path) from error


def _add_file(tar: tarfile.TarFile, member: Member) -> None:
    changed = DataError(f"{member.file.name} changed while this ran; run again")
    try:
        file, size = member.file.open()
    except ClipError as error:
        raise changed from error
    with file:
        if size != member.size:
            raise changed
        extension = member.file.name.rpartition(".")[2].lower()
        tar.addfile(_header(f"{member.key}.{extension}", member.size), file)
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header


def _header(name: str, size: int) -> tarfile.TarInfo:
    """The header of a regular file without owner and time."""
    header = tarfile.TarInfo(name)
    header.size = size
    return header
