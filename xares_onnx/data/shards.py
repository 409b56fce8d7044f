"""webdataset tars: the samples of a shard, and what is lost or damaged in it.

The reader is tarfile, not webdataset's: the latter ends silently at the first damage, hides one of two equal keys,
passes on the json of a link without its audio, and imports torch into every worker. Members are never extracted; a
sample is two byte ranges of the shard, so that any subset can be read in any order by any thread.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from ..errors import ClipError, DataError, DataMissingError, LabelError, escaped, quoted
from .audio import AUDIO_EXTENSIONS

MAX_AUDIO_BYTES = 1 << 31
MAX_LABEL_BYTES = 1 << 20
MAX_SHARD_LABEL_BYTES = 1 << 27  # of all clips of a shard, whose labels are in memory together
MAX_KEY = 1_000  # characters
_MAX_HEADER_BYTES = 1 << 20  # of a name or attributes with a header of their own; tarfile reads them whole
_EXTRA_HEADERS = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)
_TAIL_BLOCK = 1 << 20
# What tarfile raises at damaged headers.
_DAMAGE = (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError, RecursionError)


class Drop(msgspec.Struct, frozen=True):
    """A clip that is not used: its key within the shard, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Extent:
    """A byte range of the shard file."""

    offset: int
    size: int


@dataclass(frozen=True)
class Sample:
    key: str
    audio: Extent
    label: Extent


@dataclass
class ShardIndex:
    """The samples of one shard in the order of their first members, and the drops that its headers show."""

    samples: list[Sample] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    damage: str | None = None

    @property
    def expected(self) -> int:
        return len(self.samples) + len(self.drops)


@dataclass
class _Group:
    audio: list[Extent] = field(default_factory=list)
    label: list[Extent] = field(default_factory=list)
    fault: str | None = None


def index_shard(path: Path) -> ShardIndex:
    """Read the headers of all members. A clip's key is its members' name up to the last dot; hidden files are skipped.

    webdataset cuts at the first dot instead, which makes one clip of every `blues.00001.wav` of a genre.

    Raises:
        DataMissingError: The shard does not exist.
        DataError: It cannot be opened. Damage inside is recorded, not raised.
    """
    index = ShardIndex()
    groups: dict[str, _Group] = {}
    size = _file_size(path)
    for member in _members(path, index):
        if member.isdir() or _is_meta(member.name):
            continue
        name = escaped(member.name)
        stem, _, extension = name.rpartition(".")
        extension = extension.lower()
        nameless = stem.rpartition("/")[2][:1] in ("", ".")
        if nameless or (extension != "json" and extension not in AUDIO_EXTENSIONS):
            continue
        group = groups.setdefault(stem if len(stem) <= MAX_KEY else f"{stem[:80]}…", _Group())
        if len(stem) > MAX_KEY:
            group.fault = f"its name is longer than {MAX_KEY} characters"
            continue
        if not member.isreg() or member.issparse():
            group.fault = "a link or a special file"
        elif member.offset_data + member.size > size:
            group.fault = "the shard ends inside it"
            index.damage = f"the shard ends inside member {quoted(name)}"
        else:
            part = Extent(member.offset_data, member.size)
            (group.label if extension == "json" else group.audio).append(part)
    label_bytes = 0
    for key, group in groups.items():
        reason = _unusable(group)
        label_bytes += 0 if reason else group.label[0].size
        if not reason and label_bytes > MAX_SHARD_LABEL_BYTES:
            reason = f"the labels of its shard are larger than {MAX_SHARD_LABEL_BYTES >> 20} MiB"
        if reason:
            index.drops.append(Drop(key, reason))
            continue
        index.samples.append(Sample(key, group.audio[0], group.label[0]))
        # webdataset hides one of two equal keys; here the first is used, and each further one is a named drop.
        extra = max(len(group.audio), len(group.label)) - 1
        index.drops.extend(Drop(key, "a second clip with the same key") for _ in range(extra))
    return index


def read_extent(path: Path, extent: Extent) -> bytes:
    """The bytes of one extent of a shard; raises as `ShardReader.read` does."""
    with open_shard(path) as shard:
        return shard.read(extent)


def read_label(path: Path, extent: Extent) -> str:
    """The json beside a clip, as ASCII text; `ClipError` if it is not json."""
    return label_text(read_extent(path, extent))


def label_text(data: bytes) -> str:
    """A clip's json as ASCII text, from the file's content; `ClipError` if it is not json."""
    try:
        return json.dumps(json.loads(data))
    except (ValueError, RecursionError) as error:
        raise ClipError(f"its json cannot be read ({error})") from error


class ShardReader:
    """An open shard. It has one position, so each thread opens its own."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file

    def read(self, extent: Extent) -> bytes:
        """The bytes of one extent.

        Raises:
            ClipError: The shard ends inside the extent.
            DataError: The shard cannot be read.
        """
        try:
            self._file.seek(extent.offset)
            parts, left = [], extent.size
            while left and (part := self._file.read(left)):
                parts.append(part)
                left -= len(part)
        except OSError as error:
            raise _unreadable(self._path, error) from error
        if left:
            raise ClipError("the shard ends inside this clip")
        return parts[0] if len(parts) == 1 else b"".join(parts)


@contextmanager
def open_shard(path: Path) -> Iterator[ShardReader]:
    """A shard to read extents of; `DataError` if it cannot be opened."""
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from error
    with file:
        yield ShardReader(path, file)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"shard {path} cannot be read ({error.strerror})")


def parse_label(text: str) -> dict[str, Any]:
    """A clip's json object, from text. A list (of events) becomes {"events": [...]}.

    Raises:
        LabelError: It is neither an object nor a list, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise LabelError("its json is nested too deeply") from error
    if isinstance(value, list):
        return {"events": value}
    if not isinstance(value, dict):
        raise LabelError("its json is neither an object nor a list")
    return value


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hex.

    Raises:
        DataMissingError: The file does not exist.
        DataError: It cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise DataMissingError(f"{path} is not there any more; was it moved while this ran?") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from error


# A regular file's header as GNU tar and Python write it, without a prefix of the name: name, mode, uid and gid, size, mtime,
# checksum, type, link and owner, device. Each number is octal.
_NUMBER = rb"(?:[0-7]{7}[\0 ]|[0-7]{6}[\0 ]{2}|\0{8})"
_PLAIN_FILE = re.compile(
    rb"(.{100})" + _NUMBER * 3 + rb"([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})[\0 ]{2}0.{172}" + _NUMBER * 2 + rb"\0.{166}",
    re.DOTALL,
)


class _Header(tarfile.TarInfo):
    """A member's header. tarfile's own class would read as much as a hostile header claims, and takes thrice the time."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        plain = _PLAIN_FILE.fullmatch(buf)
        if plain and 256 + sum(buf) - sum(buf[148:156]) == int(plain[3], 8):
            header = cls(plain[1].partition(b"\0")[0].decode(encoding, errors))
            header.size = int(plain[2], 8)
            return header
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTRA_HEADERS and header.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header

    def _proc_pax(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """Skip a header for all members that follow: tarfile would give each a copy of it, and none says where one lies."""
        if self.type != tarfile.XGLTYPE:
            return super()._proc_pax(archive)  # type: ignore[misc, no-any-return]
        file: Any = archive.fileobj
        file.seek(-(-self.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, 1)
        try:
            return self.fromtarfile(archive)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error

    def _proc_gnusparse_10(self, next: tarfile.TarInfo, *_: object) -> None:
        """Skip the member's map, for which tarfile may read to the end of the file. Sparse members are dropped anyway."""
        next.sparse = b""


def _members(path: Path, index: ShardIndex) -> Iterator[tarfile.TarInfo]:
    try:
        archive = tarfile.open(path, "r:", tarinfo=_Header)  # noqa: SIM115 - closed below; plain tar only, nothing is decompressed
    except FileNotFoundError as error:
        raise DataMissingError(f"shard {path} does not exist") from error
    except _DAMAGE as error:
        index.damage = f"not a plain tar file ({error})"
        return
    except OSError as error:
        raise DataError(f"shard {path} cannot be read ({error.strerror})") from error
    with archive:
        try:
            end = 0
            while (member := archive.next()) is not None:
                if archive.offset <= end:  # a negative size, which older tarfiles accept, leads back for ever
                    raise tarfile.ReadError(f"a header before byte {end} points back")
                end = archive.offset
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
                yield member
        except (*_DAMAGE, OSError) as error:
            index.damage = index.damage or f"the tar is damaged ({error})"
            return
        # tarfile takes both a damaged header and the end of the file for the end of the archive.
        index.damage = index.damage or _missing_end(path, archive.offset)


def _missing_end(path: Path, offset: int) -> str | None:
    """What is wrong with the end of the tar, which is one or more blocks of zeros up to the end of the file."""
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            return "the tar has no end mark: it was cut off or is still being written"
        while block:
            if block.strip(b"\0"):
                return f"the tar is damaged at byte {offset}"
            block = file.read(_TAIL_BLOCK)
    return None


def _unusable(group: _Group) -> str | None:
    if group.fault:
        return group.fault
    if not group.audio:
        return "no audio beside its json"
    if not group.label:
        return "no json beside its audio"
    if group.audio[0].size > MAX_AUDIO_BYTES or group.label[0].size > MAX_LABEL_BYTES:
        return "larger than any plausible clip"
    return None


def _is_meta(name: str) -> bool:
    """Whether a member is webdataset's own note: it, or its folder, is named `__…__`."""
    return re.match(r"__[^/]*__(/|$)", name) is not None


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataMissingError(f"shard {path} cannot be read ({error.strerror})") from error


class Clips(msgspec.Struct, frozen=True, kw_only=True):
    expected: int
    read: int
    dropped: list[Drop]
    """Every clip that is not in the score, and why."""
    events_outside: int = 0
    """Events of no class of the vocabulary, left out of targets and score."""


# With more dropped clips than both of these, the score is no longer that of the data set.
MAX_DROP_SHARE, MAX_DROPS = 0.01, 2
