"""Zenodo records: the addresses of their descriptions, and the files that they list.

A reply of the API is a stranger's: names, sizes, checksums and links are checked before anything is done with them.
Three layouts are read: `files` as a list, whose links lead to a bucket (before October 2023) or to
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

from ..errors import DownloadError, UsageError, printable, quoted
from ..files import CHECKSUM_ALGORITHMS

ZENODO = "https://zenodo.org"
MAX_ANSWER_BYTES = 1 << 23
MAX_FILE_BYTES = 1 << 40
_MAX_NAME = 200
_PORTS = {"http": 80, "https": 443}

Origin = tuple[str, str, int]


class RemoteFile(msgspec.Struct, frozen=True):
    """One file of a record. `checksum` is `<algorithm>:<hex digest>`, or None if the record has none of a known kind."""

    name: str
    size: int
    checksum: str | None
    url: str

    @property
    def algorithm(self) -> str:
        """The algorithm of its checksum, or the default if it has none."""
        return self.checksum.partition(":")[0] if self.checksum else "md5"


class Record(msgspec.Struct, frozen=True):
    number: str
    license: str | None
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True)
class Address:
    """The server of records: Zenodo, or a mirror of it. `url` ends without a slash."""

    url: str = ZENODO

    @classmethod
    def parse(cls, text: str) -> Address:
        """The address of a mirror; `UsageError` unless it is a plain http or https address."""
        url = text.strip().rstrip("/")
        if origin(url) is None or urlsplit(url).query or urlsplit(url).fragment or not url.isprintable() or " " in url:
            raise UsageError(f"mirror {quoted(text)} is not an address; give one such as https://mirror.example/zenodo")
        if "@" in urlsplit(url).netloc:
            raise UsageError("the mirror's address contains a user name or password, which would be printed; leave them out")
        return cls(url)

    @property
    def origin(self) -> Origin:
        checked = origin(self.url)
        assert checked is not None
        return checked

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def encrypted(self) -> bool:
        """Whether nobody on the way can change what is sent: https, or a server on this machine."""
        scheme, host, _ = self.origin
        return scheme == "https" or _is_loopback(host)

    def answer_urls(self, number: str) -> list[tuple[str, str | None]]:
        """Where a record's description may be, each with the folder of its files, None if its links name them.

        That is the API; on a mirror also a plain folder, `URL/NUMBER/files.json` with the files beside it.
        """
        api = (f"{self.url}/api/records/{number}", None)
        folder = f"{self.url}/{number}"
        return [api] if self.url == ZENODO else [api, (f"{folder}/files.json", folder)]


def origin(url: str) -> Origin | None:
    """Scheme, host and port of an http or https address; None for any other."""
    try:
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname:
            return None
        return parts.scheme, parts.hostname, parts.port or _PORTS[parts.scheme]
    except ValueError:
        return None


def is_plain(name: str) -> bool:
    """Whether a name is that of a file in a folder, on any system: no separator, no drive, not hidden, not `..`."""
    return (
        0 < len(name) <= _MAX_NAME and name.isprintable() and not name.startswith(".") and not set(name) & set('/\\:*?"<>|')
    )


def parse_record(number: str, payload: bytes, address: Address, folder: str | None = None) -> Record:
    """Read a record's description.

    Args:
        number: The requested record.
        payload: The reply.
        address: The server that sent it.
        folder: The address of the files' folder; None if the links in the reply name them.

    Raises:
        DownloadError: The reply does not describe the record, or lists a file that it would be unsafe to fetch.
    """
    try:
        answer = msgspec.json.decode(payload, type=_Answer)
        listed = answer.files.entries if isinstance(answer.files, _Entries) else answer.files
        entries = list(listed.values()) if isinstance(listed, dict) else listed
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        start = printable(payload[:40].decode("utf-8", "replace"))
        raise DownloadError(
            f"{address.host} does not describe record {number} in a known format: {error}, in {quoted(start)}..."
        ) from error
    if answer.id is not None and number not in (str(answer.id), str(answer.conceptrecid)):  # or the newest of its versions
        raise DownloadError(f"{address.host} sent record {printable(str(answer.id))} instead of {number}")
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
    """The identifiers as written, from `{"id": …}`, a list of these, or a text."""
    value = metadata.license or metadata.rights
    licenses = value if isinstance(value, list) else [value]
    identifiers = [license.get("id") if isinstance(license, dict) else license for license in licenses]
    names = [printable(name)[:80] for name in identifiers if isinstance(name, str) and name]
    return ", ".join(names) or None


def _file(number: str, entry: _Entry, address: Address, folder: str | None) -> RemoteFile:
    listed = f"record {number} at {address.host} lists {quoted(entry.key)}"
    if not 0 <= entry.size <= MAX_FILE_BYTES:
        raise DownloadError(f"{listed} with a size of {entry.size} bytes, which no shard has")
    checksum = entry.checksum
    if checksum is not None and re.fullmatch("[0-9a-fA-F]{32}", checksum):
        checksum = f"md5:{checksum}"
    algorithm, _, digest = (checksum or "").lower().partition(":")
    if algorithm in CHECKSUM_ALGORITHMS:
        if not re.fullmatch(f"[0-9a-f]{{{2 * hashlib.new(algorithm, usedforsecurity=False).digest_size}}}", digest):
            raise DownloadError(f"{listed} with {quoted(checksum or '')}, which is not a checksum")
        checksum = f"{algorithm}:{digest}"
    else:
        checksum = None
    return RemoteFile(entry.key, entry.size, checksum, _url(listed, number, entry, address, folder))


def _url(listed: str, number: str, entry: _Entry, address: Address, folder: str | None) -> str:
    """The address of a file's content, which is always on the host of the record."""
    name = quote(entry.key, safe="")
    if folder is not None:
        return f"{folder}/{name}"
    texts = (text for key in ("content", "self", "download") if isinstance(text := entry.links.get(key), str))
    link = next(texts, None)
    if link is None:
        return f"{address.url}/api/records/{number}/files/{name}/content"
    if address.url != ZENODO and link.startswith(f"{ZENODO}/"):  # a proxy passes on the links of the server behind it
        link = address.url + link.removeprefix(ZENODO)
    if origin(link) != address.origin or "@" in urlsplit(link).netloc:
        raise DownloadError(f"{listed} at {quoted(link)}, which is not on {address.host}: it is not followed")
    return link


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
