"""Shards out of a record's zip archives: the members that are asked for, inside their folder, no more than fits."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..errors import DiskFullError, DownloadError, printable
from ..files import file_checksum, made_aside
from .zenodo import is_plain

# Encoded audio hardly shrinks, silence in PCM does; deflate itself ends at 1032.
_MAX_RATIO = 100
_MAX_MEMBERS = 100_000
_BLOCK = 1 << 20
# What zipfile and the decompressors raise at bytes that are not what they should be.
_DAMAGE = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, ValueError, RuntimeError, MemoryError)


def members(archive: Path, wanted: Callable[[str], bool]) -> dict[str, int]:
    """Base name -> unpacked size of every member whose base name is wanted.

    Raises `DownloadError` where the archive is damaged, or made to do harm: a path that leads out of it, a link, a
    member that unpacks to a hundred times its size, two of one name.
    """
    with _opened(archive) as opened:
        return {name: info.file_size for name, info in _chosen(archive, opened, wanted).items()}


def extract(
    archive: Path, targets: Mapping[str, Path], replaceable: Collection[str], beat: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Unpack members to `targets` by base name, each whole or not at all. Returns their checksums (md5).

    A target that is there already is left, as an interrupted extraction left it, where it is what the member would be; it
    is replaced where its name is `replaceable`. `zipfile` holds a member to its declared size and checks its CRC.
    `beat` is called now and then, and may raise to stop. Raises as `members`, `DiskFullError`, `MachineError`.
    """
    checksums = {}
    with _opened(archive) as opened:
        chosen = _chosen(archive, opened, targets.__contains__)
        there = {name for name, info in chosen.items() if _is_unpacked(info, targets[name], beat)}
        for name in chosen.keys() - there - set(replaceable):
            if os.path.lexists(targets[name]):
                raise DownloadError(f"{targets[name]} is in the way of one in {archive.name}; move it away, and try again")
        needed = sum(info.file_size for name, info in chosen.items() if name not in there)
        check_space(next(iter(targets.values())).parent, needed, f"what is in {archive.name}")
        for name, info in chosen.items():
            if name not in there:
                _write(opened, info, targets[name], beat)
            checksums[name] = file_checksum(targets[name], "md5", beat)
    return checksums


def _is_unpacked(info: zipfile.ZipInfo, target: Path, beat: Callable[[], None]) -> bool:
    if not target.is_file() or target.stat().st_size != info.file_size:
        return False
    crc = 0
    with target.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            beat()
            crc = zlib.crc32(block, crc)
    return crc == info.CRC


def _write(opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, beat: Callable[[], None]) -> None:
    with made_aside(target) as aside, aside.open("wb") as out, opened.open(info) as member:
        while block := member.read(_BLOCK):
            beat()
            out.write(block)
        out.flush()
        os.fsync(out.fileno())


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raises `DiskFullError` where fewer bytes are free than needed."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"{what} needs {needed / 1e9:.2f} GB in {folder}, where {free / 1e9:.2f} GB are free; free some space, or name "
            "another folder by --data"
        )


@contextmanager
def _opened(archive: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(archive) as opened:
            yield opened
    except _DAMAGE as error:
        raise DownloadError(f"archive {archive} cannot be unpacked ({printable(str(error))})") from error


def _chosen(archive: Path, opened: zipfile.ZipFile, wanted: Callable[[str], bool]) -> dict[str, zipfile.ZipInfo]:
    infos = opened.infolist()
    if len(infos) > _MAX_MEMBERS:
        raise DownloadError(f"archive {archive} holds {len(infos)} members, more than any record of shards")
    chosen: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        path = PurePosixPath(info.filename)
        if info.is_dir() or not wanted(path.name):
            continue
        fault = _fault(info, path, path.name in chosen)
        if fault:
            raise DownloadError(f"archive {archive} is not unpacked: its member {printable(info.filename)[:200]!r} {fault}")
        chosen[path.name] = info
    if sum(info.file_size for info in chosen.values()) > _MAX_RATIO * archive.stat().st_size:  # members may overlap
        raise DownloadError(f"archive {archive} is not unpacked: it claims to hold more than {_MAX_RATIO} times its size")
    return chosen


def _fault(info: zipfile.ZipInfo, path: PurePosixPath, twice: bool) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if path.is_absolute() or ".." in path.parts or not is_plain(path.name):
        return "has a path that leads elsewhere"
    if kind not in (0, stat.S_IFREG):
        return "is a link or a special file"
    if info.flag_bits & 1:
        return "is encrypted"
    if info.file_size > _MAX_RATIO * max(info.compress_size, 1):
        return f"claims to unpack to more than {_MAX_RATIO} times its size"
    return "has the name of another" if twice else None
