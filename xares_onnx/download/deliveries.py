"""A record's files into the folders of the tasks that they are for: found, fetched, linked or unpacked, a few at a time."""

from __future__ import annotations

import fnmatch
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..data import catalog
from ..data.manifest import Manifest
from ..data.task import Task
from ..errors import DiskFullError, DownloadError, MachineError, XaresError
from ..files import copy_aside, disk_error, file_checksum, made_aside
from ..progress import Note, Observer, Progress
from . import zip_files as archives
from .transfer import Client, ServerDownError, discard_part, fetch
from .zenodo import RemoteFile

CONNECTIONS = 3
_STRIKES = 3  # files or records in a row that a server fails: the rest is not asked for
_TICK_SECONDS = 0.1
_LEAVE_SECONDS = 1.0


@dataclass
class Wanted:
    """A file of a record, and the tasks that it is for; from an archive, each takes what matches its patterns."""

    file: RemoteFile
    tasks: list[Task]
    archive: bool = False


# Of one task a file's name, its checksum, and how it came there.
Placed = tuple[Task, str, str, Literal["present", "fetched", "linked", "unpacked"]]


@dataclass
class Delivered:
    """What a delivery found or made."""

    files: list[Placed]
    archive: tuple[str, str] | None = None


@dataclass
class Delivery:
    """One file into the folders of all its tasks: found, else fetched into the first, and linked into the others."""

    client: Client
    wanted: Wanted
    folder: Path
    manifests: dict[str, Manifest]
    tally: Tally
    notes: Notes

    def make(self) -> Delivered:
        try:
            return self._unpack() if self.wanted.archive else self._place()
        except OSError as error:
            raise disk_error(error, self.folder / self.wanted.tasks[0].name / self.wanted.file.name) from error

    def _place(self) -> Delivered:
        file, tasks = self.wanted.file, self.wanted.tasks
        held = {task.name: self._checksum_if_there(task) for task in tasks}
        checksum = next((found for found in held.values() if found), None)
        source = next((self._path(task) for task in tasks if held[task.name]), None)
        files: list[Placed] = []
        for task in tasks:
            status: Literal["present", "fetched", "linked"] = "present"
            if held[task.name]:
                discard_part(self._path(task))
            else:
                status = "linked" if source else "fetched"
                checksum = self._bring(task, source, checksum)
            source = source or self._path(task)
            assert checksum is not None
            files.append((task, file.name, checksum, status))
        self.tally.put(file.name, file.size)
        return Delivered(files)

    def _bring(self, task: Task, source: Path | None, checksum: str | None) -> str:
        path = self._path(task)
        path.parent.mkdir(parents=True, exist_ok=True)
        if source is None:
            if self.wanted.file.checksum is None:
                said = f"record {task.data.zenodo} gives no checksum of {path.name} that is known here"
                self.notes.put(f"{said}: only its size is checked")
            return fetch(self.client, self.wanted.file, path, lambda done: self.tally.put(self.wanted.file.name, done))
        _link(source, path)
        assert checksum is not None
        return checksum

    def _checksum_if_there(self, task: Task) -> str | None:
        """The checksum of the task's copy where it is the record's file; None where there is none.

        Raises `DownloadError` where another file has its name that was not downloaded by us: it is not ours to replace.
        """
        file, path, manifest = self.wanted.file, self._path(task), self.manifests[task.name]
        if manifest.holds(path.parent, file.name, file.checksum):
            return manifest.files[file.name].checksum
        if not os.path.lexists(path):
            return None
        if path.is_file() and path.stat().st_size == file.size:
            checksum = file_checksum(path, file.algorithm, self.client.check_stop)
            if file.checksum == checksum or (file.checksum is None and file.name not in manifest.files):
                return checksum
        if file.name not in manifest.files:
            raise DownloadError(f"{path} is not the file that the record has; move it away, and download again")
        self.notes.put(f"{path} is damaged, or an earlier version; it is fetched again")
        return None

    def _unpack(self) -> Delivered:
        file, tasks = self.wanted.file, self.wanted.tasks
        if all(self.manifests[task.name].has_unpacked(self.folder / task.name, file.name, file.checksum) for task in tasks):
            self.tally.put(file.name, file.size)
            return self._all_unpacked()
        archive = self._path(tasks[0])
        checksum = self._checksum_if_there(tasks[0]) or self._bring(tasks[0], None, None)
        globs = {task.name: set(catalog.part_globs(task).values()) for task in tasks}
        names = archives.members(archive, lambda name: any(matches(name, each) for each in globs.values()))
        homes = {name: [task for task in tasks if matches(name, globs[task.name])] for name in names}
        targets = {name: self.folder / first.name / name for name, (first, *_) in homes.items()}
        self.notes.put(f"{file.name} is here; unpacking {len(targets)} of its files")
        ours = {name for name, (first, *_) in homes.items() if name in self.manifests[first.name].files}
        checksums = archives.extract(archive, targets, ours, self.client.check_stop) if targets else {}
        files: list[Placed] = []
        for name, (first, *others) in homes.items():
            files.append((first, name, checksums[name], "unpacked"))
            for task in others:
                _link(targets[name], self.folder / task.name / name)
                files.append((task, name, checksums[name], "linked"))
        archive.unlink()
        return Delivered(files, (file.name, checksum))

    def _all_unpacked(self) -> Delivered:
        name, files = self.wanted.file.name, list[Placed]()
        for task in self.wanted.tasks:
            held = list(self.manifests[task.name].files.items())
            files += [(task, shard, one.checksum, "present") for shard, one in held if one.archive == name]
        return Delivered(files, (name, self.manifests[self.wanted.tasks[0].name].archives[name]))

    def _path(self, task: Task) -> Path:
        return self.folder / task.name / self.wanted.file.name


def deliver(
    deliveries: Sequence[Delivery],
    client: Client,
    strikes: Strikes,
    finished: Callable[[Wanted, Delivered | XaresError], None],
    tally: Tally,
    notes: Notes,
) -> None:
    """Make deliveries on a few threads; what they find out is handled on this one. Interrupted, they leave what they have.

    The threads are daemons: a socket that waits for a server must not keep an interrupted program from ending.
    """
    waiting: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[Delivery, Delivered | BaseException]] = queue.SimpleQueue()
    for delivery in deliveries:
        waiting.put(delivery)

    def work() -> None:
        while not client.stop.is_set():
            try:
                delivery = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                results.put((delivery, delivery.make()))
            except BaseException as error:
                results.put((delivery, error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(CONNECTIONS, len(deliveries)))]
    for thread in threads:
        thread.start()
    left = len(deliveries)
    try:
        while left:
            notes.flush()
            tally.tell()
            try:
                delivery, outcome = results.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                continue
            left -= 1
            if isinstance(outcome, BaseException) and not isinstance(outcome, XaresError):
                raise outcome
            finished(delivery.wanted, outcome)
            if isinstance(outcome, MachineError) or strikes.out:
                why = "the machine" if isinstance(outcome, MachineError) else client.address.host
                while not waiting.empty():
                    left -= 1
                    finished(waiting.get().wanted, DownloadError(f"it was not tried, since {why} failed the others"))
    except BaseException:
        client.stop.set()
        for thread in threads:
            thread.join(_LEAVE_SECONDS)
        raise
    notes.flush()
    tally.tell(last=True)


class Tally:
    """Bytes of a record's files that are there, as threads report them; told now and then by the thread that waits."""

    def __init__(self, name: str, there: dict[str, int], total: int, observer: Observer) -> None:
        """`there` is what each file begins with, so that a rate is that of this run alone."""
        self._name, self._observer = name, observer
        self._sizes, self._total = dict(there), total
        self._told = -1
        self._at = 0.0

    def put(self, name: str, done: int) -> None:
        self._sizes[name] = done

    def tell(self, *, last: bool = False) -> None:
        now, done = time.monotonic(), sum(self._sizes.values())
        if done != self._told and (last or now - self._at >= _TICK_SECONDS):
            self._told, self._at = done, now
            self._observer(Progress("download", self._name, done, self._total))


class Notes:
    """What threads have to say, told by the thread that waits for them."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._texts: queue.SimpleQueue[str] = queue.SimpleQueue()

    def put(self, text: str) -> None:
        self._texts.put(text)
        if threading.current_thread() is threading.main_thread():
            self.flush()

    def flush(self) -> None:
        while not self._texts.empty():
            self._observer(Note(self._texts.get()))


class Strikes:
    """Failures of the server in a row. What is not its fault counts for nothing."""

    def __init__(self) -> None:
        self._count = 0

    @property
    def out(self) -> bool:
        return self._count >= _STRIKES

    def record(self, error: XaresError | None) -> None:
        if error is None:
            self._count = 0
        elif isinstance(error, ServerDownError):
            self._count += 1


def _link(source: Path, path: Path) -> None:
    """The same bytes under a second name where the file system can do that, else a copy; either can be deleted alone."""
    try:
        with made_aside(path) as aside:
            os.link(source, aside)
    except DiskFullError:
        raise
    except MachineError:
        copy_aside(source, path)


def matches(name: str, globs: set[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
