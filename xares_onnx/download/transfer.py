"""Fetch a file over HTTP: politely, resumed where it stopped, whole and verified before it gets its name.

A file grows as `NAME.part`, beside a note (`NAME.part.json`) of which file it belongs to. It is continued only if the note
fits and the server confirms the very byte at which it goes on; otherwise it starts from nothing.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx2
import msgspec

from ..errors import DownloadError, foreign, printable
from ..files import TEMPORARY_SUFFIX, disk_error, file_checksum, write_aside
from ..version import __version__
from .zenodo import MAX_ANSWER_BYTES, Address, Record, RemoteFile, origin, parse_record

USER_AGENT = f"xares-onnx/{__version__}"
_NOTE_SUFFIX = ".json"
_PASSING = {408, 425, 429, 500, 502, 503, 504}
_MAX_REDIRECTS = 5
_MEBIBYTE = 1 << 20
_TELL_SECONDS = 0.1


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how often to wait for a server. Waits double from the first to the longest.

    `longest_asked_seconds` is the longest pause that a server may ask for, `stall_seconds` the longest silence and the time
    over which `slowest_bytes_per_second` is judged, `answer_seconds` the time for a record's description.
    """

    attempts: int = 5
    first_wait_seconds: float = 1
    longest_wait_seconds: float = 60
    longest_asked_seconds: float = 600
    stall_seconds: float = 30
    slowest_bytes_per_second: float = 100
    answer_seconds: float = 120


class ServerDownError(DownloadError):
    """A file or record failed in every attempt; others from the same server may fail too."""


class StoppedError(Exception):
    """The transfer was stopped by whoever started it."""


class _PassingError(Exception):
    """What may succeed at the next attempt, after `wait_seconds` if the server asked for a pause."""

    def __init__(self, reason: str, wait_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds


class _GoneError(DownloadError):
    """The server has nothing at this address, or nothing for us."""


class Client:
    """One pool of connections to one host. If the server asks for a pause, all of them pause."""

    def __init__(
        self,
        address: Address,
        patience: Patience | None = None,
        *,
        connections: int = 3,
        stop: threading.Event | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.address, self.patience, self.note = address, patience or Patience(), note
        self.stop = stop or threading.Event()
        self._resume_at = 0.0
        self._http = httpx2.Client(
            headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
            timeout=httpx2.Timeout(self.patience.stall_seconds, pool=None),
            limits=httpx2.Limits(max_connections=connections),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def record(self, number: str) -> Record:
        """Request a record's description.

        Raises:
            ServerDownError: Too many attempts failed in a row.
            DownloadError: The host has no such record, or describes it in an unknown or unsafe way.
        """
        trials, refusals = _Trials(self, f"record {number}"), list[str]()
        for url, folder in self.address.answer_urls(number):
            try:
                return parse_record(number, self._answer(url, trials), self.address, folder)
            except _GoneError as error:
                refusals.append(str(error))
            except ServerDownError as error:
                raise ServerDownError(f"record {number}: {error}") from error
        raise DownloadError(f"record {number} cannot be fetched from {self.address.host}: {'; '.join(refusals)}")

    def _answer(self, url: str, trials: _Trials) -> bytes:
        while True:
            try:
                deadline = time.monotonic() + self.patience.answer_seconds
                payload = bytearray()
                with self.exchange(url, {"Accept": "application/json"}) as response:
                    for chunk in response.iter_bytes():
                        payload += chunk
                        if len(payload) > MAX_ANSWER_BYTES:
                            raise DownloadError(f"{self.address.host} sent more than any record's description: {url}")
                        if time.monotonic() > deadline:
                            raise _PassingError(f"its reply took more than {self.patience.answer_seconds:g} s")
                    return bytes(payload)
            except _PassingError as error:
                trials.failed(error)

    @contextmanager
    def exchange(self, url: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
        """One request and the head of its reply, of status 200, 206 or 416. Redirects are followed on the same host only.

        Raises `_PassingError` for what may pass, inside the block too, and `_GoneError` for every other reply.
        """
        wait = self._resume_at - time.monotonic()
        if wait > self.patience.longest_asked_seconds:
            raise _PassingError(f"{self.address.host} asked for a pause", wait)
        self.pause(wait)
        try:
            request = self._http.build_request("GET", url, headers=headers)
            response = self._http.send(request, stream=True)
            for _ in range(_MAX_REDIRECTS):
                if response.next_request is None:
                    break
                response.close()
                target = str(response.next_request.url)
                if origin(target) != self.address.origin:
                    raise _GoneError(f"{self.address.host} redirects to {printable(target)[:200]}, which is not followed")
                response = self._http.send(response.next_request, stream=True)
            try:
                self._check(response)
                yield response
            finally:
                response.close()
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise _GoneError(
                f"{self.address.host} redirects to an invalid address: {printable(str(error))[:200]}"
            ) from error
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            reason = foreign(str(error)) or "no reply"
            raise _PassingError(f"{self.address.host} cannot be reached ({reason})") from error
        except httpx2.TimeoutException as error:
            raise _PassingError(f"nothing arrived for {self.patience.stall_seconds:g} s") from error
        except httpx2.HTTPError as error:
            raise _PassingError(printable(str(error)) or type(error).__name__) from error

    def _check(self, response: httpx2.Response) -> None:
        status = response.status_code
        if status in _PASSING:
            wait = _asked_wait(response)
            if wait is not None:
                self._resume_at = max(self._resume_at, time.monotonic() + wait)
            raise _PassingError(f"{self.address.host} answered {status} {foreign(response.reason_phrase)}".rstrip(), wait)
        if status not in (200, 206, 416):
            meaning = {401: "not open to everyone", 403: "not open to everyone", 404: "not there", 410: "withdrawn"}
            explained = f", {meaning[status]}" if status in meaning else ""
            raise _GoneError(
                f"{self.address.host} answered {status} {foreign(response.reason_phrase)}{explained}: {response.url}"
            )

    def check_stop(self) -> None:
        """Raises `StoppedError` if `stop` is set."""
        if self.stop.is_set():
            raise StoppedError

    def pause(self, seconds: float) -> None:
        """Wait, and raise `StoppedError` if `stop` is set before or meanwhile."""
        if self.stop.wait(max(seconds, 0)):
            raise StoppedError


def fetch(client: Client, file: RemoteFile, path: Path, tell: Callable[[int], None] = lambda done: None) -> str:
    """Fetch a file whole. What arrived before an error stays for the next call, unless it was wrong.

    Args:
        client: Connected to the record's host.
        file: If its record gives no checksum, only its size is checked.
        path: Where it goes.
        tell: Called with the number of bytes on disk.

    Returns:
        The checksum of what is on disk.

    Raises:
        ServerDownError: Too many attempts failed in a row.
        DownloadError: The host refuses the file, or sent wrong content twice.
        DiskFullError: The disk is full.
        MachineError: The file cannot be written.
        StoppedError: The client was stopped.
    """
    part, trials, best, damaged = Part(path, file), _Trials(client, file.name), 0, False
    while True:
        try:
            if not part.complete:
                _exchange(client, file, part, tell)
            tell(part.size)
            checksum = part.checksum(client.check_stop)
            if file.checksum in (None, checksum):
                part.finish()
                return checksum
            part.discard()
            if damaged:
                raise DownloadError(
                    f"it arrived twice with another checksum than {client.address.host} lists ({file.checksum}); "
                    "try later, or another mirror"
                )
            client.note(f"{file.name} arrived damaged: its checksum is wrong; it is fetched once more")
            damaged, best = True, 0
        except _PassingError as error:
            gained = part.size - best >= max(1, min(_MEBIBYTE, file.size // 64))
            best = max(best, part.size)
            trials.failed(error, gained=gained)
        except OSError as error:
            raise disk_error(error, path) from error


def discard_part(path: Path) -> None:
    """Remove what a run left beside a fetched file if it was killed before the note was removed."""
    part = path.with_name(path.name + TEMPORARY_SUFFIX)
    part.unlink(missing_ok=True)
    part.with_name(part.name + _NOTE_SUFFIX).unlink(missing_ok=True)


class Part:
    """The bytes of a file so far, and the note that names the file they belong to."""

    def __init__(self, path: Path, file: RemoteFile) -> None:
        self._path, self._file = path, file
        self.path = path.with_name(path.name + TEMPORARY_SUFFIX)
        self._note_path = self.path.with_name(self.path.name + _NOTE_SUFFIX)
        note = self._read_note()
        self.etag = note.etag if note else None
        if note is None or (note.size, note.checksum) != (file.size, file.checksum) or self.size > file.size:
            self.discard()

    @property
    def size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    @property
    def complete(self) -> bool:
        return self.path.exists() and self.size == self._file.size

    def begin(self, etag: str | None) -> None:
        """Start from nothing. The note is written before the first byte."""
        self.discard()
        self.etag = etag
        write_aside(self._note_path, msgspec.json.encode(_PartNote(self._file.size, self._file.checksum, etag)))

    def discard(self) -> None:
        self.etag = None
        self.path.unlink(missing_ok=True)
        self._note_path.unlink(missing_ok=True)

    def checksum(self, beat: Callable[[], None]) -> str:
        """The checksum of what is on disk, read once more, not of what arrived."""
        return file_checksum(self.path, self._file.algorithm, beat)

    def finish(self) -> None:
        """Flush to disk, and give the file its name."""
        with self.path.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(self.path, self._path)
        self._note_path.unlink(missing_ok=True)

    def _read_note(self) -> _PartNote | None:
        try:
            return msgspec.json.decode(self._note_path.read_bytes(), type=_PartNote)
        except (OSError, msgspec.MsgspecError):
            return None


class _PartNote(msgspec.Struct):
    size: int
    checksum: str | None
    etag: str | None


def _exchange(client: Client, file: RemoteFile, part: Part, tell: Callable[[int], None]) -> None:
    """Write one reply's bytes to the part. Returns only if the part is complete."""
    start = part.size
    headers = {}
    if start:
        headers["Range"] = f"bytes={start}-"
        if part.etag:
            headers["If-Range"] = part.etag
    with client.exchange(file.url, headers) as response:
        _check_head(response, file, part, start)
        if response.status_code == 200:
            start = 0
            part.begin(_strong_etag(response))
        _write(client, response, file, part, start, tell)
    if part.size < file.size:
        raise _PassingError(f"the reply ended after {part.size} of {file.size} bytes")


def _check_head(response: httpx2.Response, file: RemoteFile, part: Part, start: int) -> None:
    """Raises `_PassingError` unless the reply's head promises the requested bytes; discards the part if it cannot go on."""
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _PassingError("it arrived compressed, although it was requested as it is")
    if response.status_code == 200:
        length = response.headers.get("Content-Length", str(file.size))
        if length != str(file.size):
            raise _PassingError(f"the reply announced {printable(length)[:40]} bytes, but the record lists {file.size}")
        return
    if response.status_code == 206 and start:
        span = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", response.headers.get("Content-Range", "").strip())
        etag = _strong_etag(response)
        if (
            span
            and int(span[1]) == start <= int(span[2]) < file.size
            and span[3] in ("*", str(file.size))
            and (etag is None or part.etag in (None, etag))
        ):
            return
    part.discard()
    raise _PassingError("it cannot be continued where it stopped; it starts anew")


def _write(
    client: Client, response: httpx2.Response, file: RemoteFile, part: Part, start: int, tell: Callable[[int], None]
) -> None:
    window_start, arrived, last_told = time.monotonic(), 0, 0.0
    with part.path.open("rb+" if start else "wb", buffering=0) as out:
        out.seek(start)
        for chunk in response.iter_raw():
            client.check_stop()
            if start + len(chunk) > file.size:
                part.discard()
                raise _PassingError(f"more bytes arrived than the {file.size} that the record lists")
            rest = memoryview(chunk)
            while rest:
                rest = rest[out.write(rest) :]
            start += len(chunk)
            arrived += len(chunk)
            now = time.monotonic()
            if now - last_told >= _TELL_SECONDS:
                last_told = now
                tell(start)
            if now - window_start >= client.patience.stall_seconds:
                if arrived < client.patience.slowest_bytes_per_second * (now - window_start):
                    raise _PassingError(f"only {arrived} bytes arrived in {now - window_start:.0f} s")
                window_start, arrived = now, 0


class _Trials:
    """The attempts at one file or record that failed in a row."""

    def __init__(self, client: Client, what: str) -> None:
        self._client, self._what, self._failures = client, what, 0

    def failed(self, error: _PassingError, *, gained: bool = False) -> None:
        """Wait for the next attempt, or raise `ServerDownError`. An attempt that gained bytes starts the count anew."""
        patience = self._client.patience
        self._failures = 1 if gained else self._failures + 1
        if self._failures >= patience.attempts:
            raise ServerDownError(f"{error}, {self._failures} times in a row") from error
        wait = error.wait_seconds
        if wait is None:
            wait = min(patience.first_wait_seconds * 2 ** (self._failures - 1), patience.longest_wait_seconds)
        if wait > patience.longest_asked_seconds:
            raise ServerDownError(f"{error}, and asked for a pause of {wait:.0f} s; run again after it") from error
        self._client.note(f"{self._what}: {error}; trying again in {wait:.3g} s")
        self._client.pause(wait)


def _asked_wait(response: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait: Retry-After as a number or a date, else X-RateLimit-Reset as a time."""
    retry_after = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", retry_after):
        return float(retry_after)
    now = time.time()
    try:
        moment = parsedate_to_datetime(retry_after)
        return max((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now, 0)
    except (TypeError, ValueError, OverflowError):
        pass
    reset = response.headers.get("X-RateLimit-Reset", "").strip()
    if response.status_code == 429 and re.fullmatch(r"\d{10}", reset):
        return max(datetime.fromtimestamp(int(reset), UTC).timestamp() - now, 0)
    return None


def _strong_etag(response: httpx2.Response) -> str | None:
    etag = response.headers.get("ETag", "")
    return etag if re.fullmatch(r'"[\x21\x23-\x7e]{1,200}"', etag) else None
