"""Deliver a record's files into the folders of their tasks: found, fetched, linked or unpacked, a few at a time."""

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
from . import zip_files
from .transfer import Client, ServerDownError, discard_part, fetch
from .zenodo import RemoteFile

CONNECTIONS = 3
_STRIKES = 3  # after so many failures of the server in a row, the rest is not requested
_TICK_SECONDS = 0.1
_LEAVE_SECONDS = 1.0


@dataclass
class Wanted:
    """A file of a record, and the tasks that it is for. From an archive, each task takes what matches its patterns."""

    file: RemoteFile
    tasks: list[Task]
    archive: bool = False


# A task, the name and checksum of a file in its folder, and how the file came there.
Placed = tuple[Task, str, str, Literal["present", "fetched", "linked", "unpacked"]]


@dataclass
class Delivered:
    """The files of a delivery. `archive` is the name and checksum of the zip that they were unpacked from."""

    files: list[Placed]
    archive: tuple[str, str] | None = None


@dataclass
class Delivery:
    """One file into the folders of all its tasks: if none has it, it is fetched into the first and linked into the rest."""

    client: Client
    wanted: Wanted
    folder: Path
    manifests: dict[str, Manifest]
    tally: Tally
    notes: Notes

    def deliver(self) -> Delivered:
        """Raises an `XaresError`, or `StoppedError` if the client was stopped."""
        try:
            return self._unpack() if self.wanted.archive else self._place()
        except OSError as error:
            raise disk_error(error, self.folder / self.wanted.tasks[0].name / self.wanted.file.name) from error

    def _place(self) -> Delivered:
        file, tasks = self.wanted.file, self.wanted.tasks
        checksums = {task.name: self._checksum_if_there(task) for task in tasks}
        checksum = next(filter(None, checksums.values()), None)
        source = next((self._path(task) for task in tasks if checksums[task.name]), None)
        files: list[Placed] = []
        for task in tasks:
            status: Literal["present", "fetched", "linked"] = "present"
            if checksums[task.name]:
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
                self.notes.put(
                    f"record {task.data.zenodo} gives no checksum of a known kind for {path.name}: only its size is checked"
                )
            return fetch(self.client, self.wanted.file, path, lambda done: self.tally.put(self.wanted.file.name, done))
        _link(source, path)
        assert checksum is not None
        return checksum

    def _checksum_if_there(self, task: Task) -> str | None:
        """The checksum of the task's copy if it is the record's file; None if it is missing or has to be fetched again.

        Raises `DownloadError` for another file of that name that was not downloaded here: the user's files are not replaced.
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
        names = zip_files.members(archive, lambda name: any(matches(name, each) for each in globs.values()))
        tasks_of = {name: [task for task in tasks if matches(name, globs[task.name])] for name in names}
        targets = {name: self.folder / first.name / name for name, (first, *_) in tasks_of.items()}
        self.notes.put(f"{file.name} is here; unpacking {len(targets)} of its files")
        replaceable = {name for name, (first, *_) in tasks_of.items() if name in self.manifests[first.name].files}
        checksums = zip_files.extract(archive, targets, replaceable, self.client.check_stop) if targets else {}
        files: list[Placed] = []
        for name, (first, *others) in tasks_of.items():
            files.append((first, name, checksums[name], "unpacked"))
            for task in others:
                _link(targets[name], self.folder / task.name / name)
                files.append((task, name, checksums[name], "linked"))
        archive.unlink()
        return Delivered(files, (file.name, checksum))

    def _all_unpacked(self) -> Delivered:
        name, files = self.wanted.file.name, list[Placed]()
        for task in self.wanted.tasks:
            shards = list(self.manifests[task.name].files.items())
            files += [(task, shard, held.checksum, "present") for shard, held in shards if held.archive == name]
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
    """Run deliveries on a few threads, and handle their outcomes on the calling thread.

    If it is interrupted, what was fetched so far stays. The threads are daemons: a socket that waits for a server must not
    keep an interrupted program from ending.

    Args:
        deliveries: All files of a record.
        client: Its `stop` is set if this is interrupted.
        strikes: Failures of the server so far. Once they are out, the deliveries that wait are not tried.
        finished: Called once per delivery with its files or its error, in the order in which they end.
        tally: Reports bytes to the observer.
        notes: Passes the threads' notes to the observer.
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
                results.put((delivery, delivery.deliver()))
            except BaseException as error:
                results.put((delivery, error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(CONNECTIONS, len(deliveries)))]
    for thread in threads:
        thread.start()
    left = len(deliveries)
    try:
        while left:
            notes.flush()
            tally.report()
            try:
                delivery, outcome = results.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                continue
            left -= 1
            if isinstance(outcome, BaseException) and not isinstance(outcome, XaresError):
                raise outcome
            finished(delivery.wanted, outcome)
            if isinstance(outcome, MachineError) or strikes.out:
                culprit = "the machine" if isinstance(outcome, MachineError) else client.address.host
                while not waiting.empty():
                    left -= 1
                    finished(waiting.get().wanted, DownloadError(f"it was not tried, since {culprit} failed the others"))
    except BaseException:
        client.stop.set()
        for thread in threads:
            thread.join(_LEAVE_SECONDS)
        raise
    notes.flush()
    tally.report(last=True)


class Tally:
    """Bytes of a record's files on disk. Threads put them in; the thread that waits for these reports them now and then."""

    def __init__(self, name: str, sizes: dict[str, int], total: int, observer: Observer) -> None:
        """`sizes` has the bytes of each file at the start, so that a rate counts this run alone."""
        self._name, self._observer = name, observer
        self._sizes, self._total = dict(sizes), total
        self._reported, self._reported_at = -1, 0.0

    def put(self, name: str, done: int) -> None:
        self._sizes[name] = done

    def report(self, *, last: bool = False) -> None:
        now, done = time.monotonic(), sum(self._sizes.values())
        if done != self._reported and (last or now - self._reported_at >= _TICK_SECONDS):
            self._reported, self._reported_at = done, now
            self._observer(Progress("download", self._name, done, self._total))


class Notes:
    """Notes of threads, passed to the observer by the thread that waits for them."""

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
    """Failures of the server in a row. Other errors do not count."""

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
    """The same file under a second name, or a copy if the file system cannot link. Each can be deleted without the other."""
    try:
        with made_aside(path) as aside:
            os.link(source, aside)
    except DiskFullError:
        raise
    except MachineError:
        copy_aside(source, path)


def matches(name: str, globs: set[str]) -> bool:
    """Whether a name matches any of the patterns."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
