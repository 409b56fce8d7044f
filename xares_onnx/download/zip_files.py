"""Unpack shards from a record's zip archives: only wanted members, only into their folder, only as much as fits."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..errors import DiskFullError, DownloadError, printable, quoted
from ..files import file_checksum, made_aside
from .zenodo import is_plain

# Encoded audio hardly shrinks, silence in PCM does; deflate itself reaches 1032.
_MAX_RATIO = 100
_MAX_MEMBERS = 100_000
_BLOCK = 1 << 20
# What zipfile and the decompressors raise at damaged bytes.
_DAMAGE = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, ValueError, RuntimeError, MemoryError)


def members(archive: Path, wanted: Callable[[str], bool]) -> dict[str, int]:
    """The members whose base name is wanted.

    Returns:
        Their unpacked sizes in bytes by base name.

    Raises:
        DownloadError: The archive is damaged, or made to do harm: a path that leads out of it, a link, a member that unpacks
            to a hundred times its size, two of the same name.
    """
    with _opened(archive) as opened:
        return {name: info.file_size for name, info in _chosen(archive, opened, wanted).items()}


def extract(
    archive: Path, targets: Mapping[str, Path], replaceable: Collection[str], beat: Callable[[], None] = lambda: None
) -> dict[str, str]:
    """Unpack members, each whole or not at all. `zipfile` checks a member's declared size and its CRC.

    Args:
        archive: The zip file.
        targets: Where members go, by base name. A target that is already what the member would be, as after an interrupted
            extraction, is kept.
        replaceable: Base names of the members that may replace another file.
        beat: Called now and then; it may raise to stop.

    Returns:
        Checksums (md5) by base name.

    Raises:
        DownloadError: As `members`, or another file is in the way.
        DiskFullError: The members do not fit.
        MachineError: They cannot be written.
    """
    checksums = {}
    with _opened(archive) as opened:
        chosen = _chosen(archive, opened, targets.__contains__)
        unpacked = {name for name, info in chosen.items() if _is_unpacked(info, targets[name], beat)}
        for name in chosen.keys() - unpacked - set(replaceable):
            if os.path.lexists(targets[name]):
                raise DownloadError(
                    f"{targets[name]} is in the way of a file of that name in {archive.name}; move it away, and try again"
                )
        needed = sum(info.file_size for name, info in chosen.items() if name not in unpacked)
        check_space(next(iter(targets.values())).parent, needed, f"unpacking {archive.name}")
        for name, info in chosen.items():
            if name not in unpacked:
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
    """Raises `DiskFullError` if fewer bytes are free in `folder` than needed for `what`."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"{what} needs {needed / 1e9:.2f} GB in {folder}, but {free / 1e9:.2f} GB are free; free some space, or name "
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
        raise DownloadError(
            f"archive {archive} is not unpacked: it has {len(infos)} members, more than any record of shards"
        )
    chosen: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        path = PurePosixPath(info.filename)
        if info.is_dir() or not wanted(path.name):
            continue
        if fault := _fault(info, path, path.name in chosen):
            raise DownloadError(f"archive {archive} is not unpacked: its member {quoted(info.filename)} {fault}")
        chosen[path.name] = info
    if sum(info.file_size for info in chosen.values()) > _MAX_RATIO * archive.stat().st_size:  # members may overlap
        raise DownloadError(f"archive {archive} is not unpacked: it claims to contain more than {_MAX_RATIO} times its size")
    return chosen


def _fault(info: zipfile.ZipInfo, path: PurePosixPath, repeated: bool) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if path.is_absolute() or ".." in path.parts or not is_plain(path.name):
        return "has a path that leads elsewhere"
    if kind not in (0, stat.S_IFREG):
        return "is a link or a special file"
    if info.flag_bits & 1:
        return "is encrypted"
    if info.file_size > _MAX_RATIO * max(info.compress_size, 1):
        return f"claims to unpack to more than {_MAX_RATIO} times its size"
    return "has the name of another" if repeated else None
