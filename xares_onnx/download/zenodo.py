"""Zenodo records: where one is asked for, and which files it says it has.

An answer of the API is a stranger's: names, sizes, checksums and links are checked before anything is done with them.
Three layouts of it are read: `files` as a list, whose links lead to a bucket (before October 2023) or to
`.../files/NAME/content` (since), and `files` as an object with `entries` (InvenioRDM's own).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec

from ..errors import DownloadError, UsageError, printable
from ..files import CHECKSUM_ALGORITHMS

ZENODO = "https://zenodo.org"
MAX_ANSWER_BYTES = 1 << 23
MAX_FILE_BYTES = 1 << 40
_MAX_NAME = 200
_PORTS = {"http": 80, "https": 443}

Origin = tuple[str, str, int]


class RemoteFile(msgspec.Struct, frozen=True):
    """One file of a record. `checksum` is `<algorithm>:<hex digest>`, or None where the record gives none that we know."""

    name: str
    size: int
    checksum: str | None
    url: str

    @property
    def algorithm(self) -> str:
        """What its checksum is of, or ours where it has none."""
        return self.checksum.partition(":")[0] if self.checksum else "md5"


class Record(msgspec.Struct, frozen=True):
    number: str
    license: str | None
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True)
class Address:
    """Where records are asked for: Zenodo, or a mirror of it. `url` ends without a slash."""

    url: str = ZENODO

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises `UsageError` for anything but plain http and https addresses."""
        url = text.strip().rstrip("/")
        if origin(url) is None or urlsplit(url).query or urlsplit(url).fragment or not url.isprintable() or " " in url:
            raise UsageError(f"mirror {text!r} is no address; give one such as https://mirror.example/zenodo")
        if "@" in urlsplit(url).netloc:
            raise UsageError("an address with a user's name or password in it would be printed; give one without")
        return cls(url)

    @property
    def origin(self) -> Origin:
        found = origin(self.url)
        assert found is not None
        return found

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def encrypted(self) -> bool:
        """Whether nobody on the way can change what is sent: https, or this machine itself."""
        scheme, host, _ = self.origin
        return scheme == "https" or _is_loopback(host)

    def answer_urls(self, number: str) -> list[tuple[str, str | None]]:
        """Where a record's description may lie, and the folder of its files where links do not count: the API; on a
        mirror also a plain folder, `URL/NUMBER/files.json` with the files beside it.
        """
        api = (f"{self.url}/api/records/{number}", None)
        folder = f"{self.url}/{number}"
        return [api] if self.url == ZENODO else [api, (f"{folder}/files.json", folder)]


def origin(url: str) -> Origin | None:
    """Scheme, host and port of an http or https address; None of any other."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname:
            return None
        return parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme]
    except ValueError:
        return None


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in a folder, on any system: no separators, no drive, not hidden, not `..`."""
    return (
        0 < len(name) <= _MAX_NAME and name.isprintable() and not name.startswith(".") and not set(name) & set('/\\:*?"<>|')
    )


def parse_record(number: str, payload: bytes, address: Address, folder: str | None = None) -> Record:
    """The record that an answer describes; `folder` is where its files lie, None for where its links say.

    Raises `DownloadError` where the answer is no record, or one that nobody should follow.
    """
    try:
        answer = msgspec.json.decode(payload, type=_Answer)
        listed = answer.files.entries if isinstance(answer.files, _Entries) else answer.files
        entries = list(listed.values()) if isinstance(listed, dict) else listed
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        start = printable(payload[:40].decode("utf-8", "replace"))
        raise DownloadError(
            f"{address.host} does not describe record {number} in a way that this program knows: {error}, in {start!r}..."
        ) from error
    if answer.id is not None and number not in (str(answer.id), str(answer.conceptrecid)):  # or the newest of its versions
        raise DownloadError(f"{address.host} answers with record {printable(str(answer.id))} where {number} was asked for")
    return Record(number, _license(answer.metadata), tuple(_file(number, entry, address, folder) for entry in entries))


class _Entry(msgspec.Struct):
    key: str
    size: int
    checksum: str | None = None
    links: dict[str, Any] = {}


class _Entries(msgspec.Struct):
    entries: dict[str, _Entry] | list[_Entry]


class _Metadata(msgspec.Struct):
    license: Any = None
    rights: Any = None


class _Answer(msgspec.Struct):
    files: list[_Entry] | _Entries
    id: int | str | None = None
    conceptrecid: int | str | None = None
    metadata: _Metadata = msgspec.field(default_factory=_Metadata)


def _license(metadata: _Metadata) -> str | None:
    """The identifiers as they stand: `{"id": …}`, a list of such, or a text."""
    value = metadata.license or metadata.rights
    each = value if isinstance(value, list) else [value]
    found = [one.get("id") if isinstance(one, dict) else one for one in each]
    names = [printable(name)[:80] for name in found if isinstance(name, str) and name]
    return ", ".join(names) or None


def _file(number: str, entry: _Entry, address: Address, folder: str | None) -> RemoteFile:
    said = f"record {number} at {address.host} lists {printable(entry.key)[:_MAX_NAME]!r}"
    if not 0 <= entry.size <= MAX_FILE_BYTES:
        raise DownloadError(f"{said} with a size of {entry.size} bytes, which no shard has")
    checksum = entry.checksum
    if checksum is not None and re.fullmatch("[0-9a-fA-F]{32}", checksum):
        checksum = f"md5:{checksum}"
    algorithm, _, digest = (checksum or "").lower().partition(":")
    if algorithm in CHECKSUM_ALGORITHMS:
        if not re.fullmatch(f"[0-9a-f]{{{2 * hashlib.new(algorithm, usedforsecurity=False).digest_size}}}", digest):
            raise DownloadError(f"{said} with {printable(checksum or '')[:99]!r}, which is no checksum")
        checksum = f"{algorithm}:{digest}"
    else:
        checksum = None
    return RemoteFile(entry.key, entry.size, checksum, _url(said, number, entry, address, folder))


def _url(said: str, number: str, entry: _Entry, address: Address, folder: str | None) -> str:
    """Where a file's bytes are: never on another host than the one that was asked."""
    name = quote(entry.key, safe="")
    if folder is not None:
        return f"{folder}/{name}"
    given = next((link for key in ("content", "self", "download") if isinstance(link := entry.links.get(key), str)), None)
    if given is None:
        return f"{address.url}/api/records/{number}/files/{name}/content"
    if address.url != ZENODO and given.startswith(f"{ZENODO}/"):  # a proxy passes on the links of what it stands for
        given = address.url + given.removeprefix(ZENODO)
    if origin(given) != address.origin or "@" in urlsplit(given).netloc:
        raise DownloadError(f"{said} at {printable(given)[:200]!r}, which is not on {address.host}: it is not followed")
    return given


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
