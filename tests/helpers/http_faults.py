"""A server on this machine that plays Zenodo's record API, or a mirror of it, and misbehaves on request."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import numpy as np


def content(size: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@dataclass
class Asked:
    """One request: for which file or record, from which byte on, and under which condition."""

    name: str
    start: int | None
    if_range: str | None
    user_agent: str
    at: float


Fault = Callable[["_Handler", bytes, int | None], None]


@dataclass
class Zenodo:
    """Records by number and files by name. `faults` are used up, one a request for that file or record; a fault that is
    not in a list is for every request. `edit` changes a record's description before it is sent.
    """

    layout: str = "new"  # new, old, rdm: the API's answers; static: a plain folder; proxied: links to zenodo.org itself
    records: dict[str, dict[str, bytes]] = field(default_factory=dict)
    faults: dict[str, list[Fault] | Fault] = field(default_factory=dict)
    edit: Callable[[dict[str, Any]], Any] = lambda answer: None
    etags: bool = True
    asked: list[Asked] = field(default_factory=list)
    busiest: int = 0
    url: str = ""
    busy: int = 0
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def starts(self, name: str) -> list[int | None]:
        """The byte from which each request for a file asked on."""
        return [asked.start for asked in self.asked if asked.name == name]

    def fault(self, name: str) -> Fault | None:
        with self.lock:
            found = self.faults.get(name)
            if isinstance(found, list):
                return found.pop(0) if found else None
            return found

    def describe(self, number: str) -> dict[str, Any]:
        base = "https://zenodo.org" if self.layout == "proxied" else self.url
        entries = []
        for name, data in self.records[number].items():
            entry = {"key": name, "size": len(data), "checksum": f"md5:{hashlib.md5(data).hexdigest()}"}
            api = f"{base}/api/records/{number}/files/{name}"
            links = {
                "old": {"self": f"{base}/api/files/0a1b2c3d-bucket/{name}"},
                "rdm": {"self": api, "content": f"{api}/content"},
                "static": {},
            }.get(self.layout, {"self": f"{api}/content"})
            entries.append({**entry, "links": links})
        answer: dict[str, Any] = {"id": int(number), "files": entries, "metadata": {"license": {"id": "cc-by-4.0"}}}
        if self.layout == "rdm":
            answer["files"] = {"enabled": True, "entries": {entry["key"]: entry for entry in entries}}
            answer["metadata"] = {"rights": [{"id": "cc-by-4.0", "title": {"en": "…"}}]}
            answer["id"] = number
        return self.edit(answer) or answer


@contextmanager
def serving(zenodo: Zenodo) -> Iterator[Zenodo]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"zenodo": zenodo}))
    server.daemon_threads = True
    zenodo.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield zenodo
    finally:
        zenodo.over.set()
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    zenodo: Zenodo
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        zenodo, path = self.zenodo, unquote(self.path)
        with zenodo.lock:
            zenodo.busy += 1
            zenodo.busiest = max(zenodo.busiest, zenodo.busy)
        try:
            self._answer(zenodo, path)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with zenodo.lock:
                zenodo.busy -= 1

    def _answer(self, zenodo: Zenodo, path: str) -> None:
        found = self._find(zenodo, path)
        name, data, etag = found or (path, b"", None)
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(ranged[1]) if ranged else None
        agent = self.headers.get("User-Agent", "")
        zenodo.asked.append(Asked(name, start, self.headers.get("If-Range"), agent, time.monotonic()))
        self.etag = etag if zenodo.etags else None
        if fault := zenodo.fault(name):
            fault(self, data, start)
        elif found is None:
            self.head(404, {"Content-Length": "0"})
        elif start is not None and self.headers.get("If-Range") in (None, self.etag):
            part = data[start:]
            said = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.head(206, {"Content-Length": str(len(part)), "Content-Range": said})
            self.wfile.write(part)
        else:
            self.head(200, {"Content-Length": str(len(data))})
            self.wfile.write(data)

    @staticmethod
    def _find(zenodo: Zenodo, path: str) -> tuple[str, bytes, str | None] | None:
        static = zenodo.layout == "static"
        described = re.fullmatch(r"/(\d+)/files\.json" if static else r"/api/records/(\d+)", path)
        if described and described[1] in zenodo.records:
            return described[1], json.dumps(zenodo.describe(described[1])).encode(), None
        pattern = {
            "static": r"/(?P<number>\d+)/(?P<name>[^/]+)",
            "old": r"/api/files/0a1b2c3d-bucket/(?P<name>[^/]+)",
        }.get(zenodo.layout, r"/api/records/(?P<number>\d+)/files/(?P<name>[^/]+)/content")
        asked = re.fullmatch(pattern, path)
        for number, files in zenodo.records.items():
            if asked and asked["name"] in files and asked.groupdict().get("number", number) == number:
                data = files[asked["name"]]
                return asked["name"], data, f'"{hashlib.md5(data).hexdigest()}"'
        return None

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {"ETag": self.etag, **headers}.items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass

    def begin(self, data: bytes, start: int | None) -> bytes:
        """The head that is right for a request, and the bytes that should follow."""
        part = data[start or 0 :]
        said = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.head(206 if start else 200, {"Content-Length": str(len(part)), **said})
        return part


# ---------------------------------------------------------------- what can go wrong


def truncated(at: int) -> Fault:
    """The connection ends in good order after `at` more bytes."""

    def answer(handler: _Handler, data: bytes, start: int | None) -> None:
        handler.wfile.write(handler.begin(data, start)[:at])
        handler.close_connection = True

    return answer


def ended_early(at: int) -> Fault:
    """No length is given, and the bytes end after `at`, as if that were all."""

    def answer(handler: _Handler, data: bytes, start: int | None) -> None:
        handler.head(200, {"Connection": "close"})
        handler.wfile.write(data[:at])
        handler.close_connection = True

    return answer


def reset(at: int) -> Fault:
    """The connection is cut after `at` more bytes, as when a machine dies."""

    def answer(handler: _Handler, data: bytes, start: int | None) -> None:
        handler.wfile.write(handler.begin(data, start)[:at])
        handler.wfile.flush()
        time.sleep(0.02)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(handler.connection.detach())
        handler.close_connection = True

    return answer


def stalled(at: int) -> Fault:
    """Nothing comes any more after `at` bytes, and the connection stays."""

    def answer(handler: _Handler, data: bytes, start: int | None) -> None:
        handler.wfile.write(handler.begin(data, start)[:at])
        handler.zenodo.over.wait(200)
        handler.close_connection = True

    return answer


def dripping(handler: _Handler, data: bytes, start: int | None) -> None:
    """A byte now and then, so that the connection never looks dead."""
    for byte in handler.begin(data, start):
        handler.wfile.write(bytes([byte]))
        if handler.zenodo.over.wait(0.05):
            break
    handler.close_connection = True


def wrong_bytes(handler: _Handler, data: bytes, start: int | None) -> None:
    handler.wfile.write(bytes(byte ^ 1 for byte in handler.begin(data, start)))


def announced(difference: int) -> Fault:
    """A Content-Length that is not that of the file."""

    def answer(handler: _Handler, data: bytes, start: int | None) -> None:
        handler.head(200, {"Content-Length": str(len(data) + difference), "Connection": "close"})
        handler.wfile.write(data[: len(data) + min(difference, 0)])
        handler.close_connection = True

    return answer


def too_much(handler: _Handler, data: bytes, start: int | None) -> None:
    """No length is given, and more comes than the file has."""
    handler.head(200, {"Connection": "close"})
    handler.wfile.write(data + b"more")
    handler.close_connection = True


def status(number: int, **headers: str) -> Fault:
    def answer(handler: _Handler, data: bytes, start: int | None) -> None:
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        handler.head(number, {"Content-Length": "0", **named})

    return answer


def range_ignored(handler: _Handler, data: bytes, start: int | None) -> None:
    handler.begin(data, None)
    handler.wfile.write(data)


def range_of(first: int, total: int = 0, shift: int = 0) -> Fault:
    """206, from the byte `first` on instead of the one asked for, or of a file of `total` bytes."""

    def answer(handler: _Handler, data: bytes, start: int | None) -> None:
        begin = first if first >= 0 else (start or 0) + shift
        part = data[begin:]
        said = f"bytes {begin}-{len(data) - 1}/{total or len(data)}"
        handler.head(206, {"Content-Length": str(len(part)), "Content-Range": said})
        handler.wfile.write(part)

    return answer


def range_unsaid(handler: _Handler, data: bytes, start: int | None) -> None:
    """206 without saying of what."""
    handler.head(206, {"Content-Length": str(len(data))})
    handler.wfile.write(data)


def compressed(handler: _Handler, data: bytes, start: int | None) -> None:
    handler.head(200, {"Content-Encoding": "gzip", "Content-Length": str(len(data))})
    handler.wfile.write(data)


def html(handler: _Handler, data: bytes, start: int | None) -> None:
    page = b"<!doctype html><title>Maintenance</title>"
    handler.head(200, {"Content-Type": "text/html", "Content-Length": str(len(page))})
    handler.wfile.write(page)


def endless(handler: _Handler, data: bytes, start: int | None) -> None:
    """Json that never ends."""
    handler.head(200, {"Content-Type": "application/json", "Connection": "close"})
    handler.wfile.write(b'{"files": [')
    while not handler.zenodo.over.is_set():
        handler.wfile.write(b"     " * 20_000)


def garbage(handler: _Handler, data: bytes, start: int | None) -> None:
    """Not HTTP at all."""
    handler.wfile.write(b"\x00\x01 not http\r\n\r\n")
    handler.close_connection = True
