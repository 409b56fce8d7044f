"""Fetch the data of tasks: their Zenodo records' shards into `DATA/<task>`, each file whole, verified and in its place."""

from __future__ import annotations

import fnmatch
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import filelock
import msgspec

from . import archives, catalog
from .errors import DataMissingError, DiskFullError, DownloadError, MachineError, UsageError, XaresError
from .events import Note, Observer, Progress, ignore
from .files import TEMPORARY_SUFFIX, copy_aside, disk_error, file_checksum, made_aside
from .manifest import Manifest, read_manifest
from .records import Address, Record, RemoteFile, is_plain
from .task import Task
from .transfer import Client, Patience, ServerDownError, fetch

CONNECTIONS = 3
_STATE_FOLDER = ".xares-onnx"  # in the data folder: locks
_STRIKES = 3  # files or records in a row that a server fails: the rest is not asked for
_TICK_SECONDS = 0.1
_LEAVE_SECONDS = 1.0


class FileReport(msgspec.Struct, frozen=True):
    """What became of one file of a record for one task."""

    name: str
    bytes: int
    status: Literal["missing", "present", "fetched", "linked", "unpacked", "failed"]
    reason: str | None = None


class TaskReport(msgspec.Struct):
    """One task: its record, how much of it the task takes, and how much of that is not there (at the start)."""

    task: str
    record: str
    license: str | None
    bytes: int
    missing_bytes: int
    files: list[FileReport] = []


@dataclass
class Downloaded:
    """What a download did, or would do; `errors` are those of single files and tasks, in order."""

    tasks: list[TaskReport] = field(default_factory=list)
    errors: list[XaresError] = field(default_factory=list)


@dataclass
class _Wanted:
    """A file of a record, and the folders of the tasks that it is for."""

    file: RemoteFile
    tasks: list[Task]
    archive: bool = False


@dataclass
class _Share:
    """A record, and what of it goes to which of the chosen tasks."""

    record: Record
    tasks: list[Task]
    wanted: list[_Wanted]


# Of one task a file's name, its checksum, and how it came there.
_File = tuple[Task, str, str, Literal["present", "fetched", "linked", "unpacked"]]


@dataclass
class _Done:
    """What a job found or made."""

    files: list[_File]
    archive: tuple[str, str] | None = None


def choose(names: Sequence[str], suite: str | None, observer: Observer = ignore) -> list[Task]:
    """The tasks to fetch. Named ones must have a record; in a suite, those without are said and left out."""
    if bool(names) == bool(suite):
        raise UsageError(
            "name tasks, or a suite by --suite public; with --plan, `xares-onnx download` says how large they are and stops"
        )
    chosen = catalog.suite_tasks(suite) if suite else catalog.named_tasks(names)
    for task in chosen:
        if task.data.zenodo is None:
            if not suite and task.domain != "synthetic":
                raise DataMissingError(f"{task.name} has no record to download: {_unpublished(task)}")
            observer(Note(f"{task.name} is left out: {_unpublished(task)}"))
    for task in chosen:
        for glob in catalog.part_globs(task).values():
            if task.data.zenodo and "/" in glob:
                raise UsageError(
                    f"{task.name} has its shards at {glob!r}, and files of a record lie in no folders; download them by hand"
                )
    return [task for task in chosen if task.data.zenodo]


def download(
    names: Sequence[str] = (),
    *,
    suite: str | None = None,
    data: Path | None = None,
    mirror: str | None = None,
    plan: bool = False,
    patience: Patience | None = None,
    observer: Observer = ignore,
) -> Downloaded:
    """Fetch what is missing of the tasks' records; with `plan`, only say what that is.

    What fails leaves the rest done, and is in `errors`. Raises `UsageError`, `DataMissingError` for a named task without a
    record, and `DiskFullError` before anything is fetched where not all of it would fit.
    """
    address = Address.parse(mirror) if mirror else Address()
    chosen = choose(names, suite, observer)
    folder = catalog.data_folder(data, to_fill=True)
    if not address.encrypted:
        observer(Note(f"{address.host} is asked over plain http: checksums too can be changed on the way"))
    done, notes = Downloaded(), _Notes(observer)
    with Client(address, patience, connections=CONNECTIONS, note=notes.put) as client:
        shares = _shares(client, chosen, done, notes)
        for share in shares:
            done.tasks += _reports(share, folder)
        if plan:
            return done
        _check_space(shares, folder)
        strikes = _Strikes()
        for share in shares:
            with _locked(folder, share.record.number, observer):
                _fetch_share(client, share, folder, done, strikes, observer, notes)
    return done


def _shares(client: Client, chosen: Sequence[Task], done: Downloaded, notes: _Notes) -> list[_Share]:
    """Ask for every record once, and divide its files among the tasks that share it."""
    by_record: dict[str, list[Task]] = {}
    for task in chosen:
        by_record.setdefault(str(task.data.zenodo), []).append(task)
    shares, strikes = [], _Strikes()
    for number, tasks in by_record.items():
        try:
            if strikes.out:
                raise DownloadError(f"record {number} is not asked for, since {client.address.host} failed {_STRIKES} times")
            record = client.record(number)
            strikes.record(None)
            shares.append(_Share(record, tasks, _wanted(record, tasks)))
        except DownloadError as error:
            strikes.record(error)
            done.errors.append(DownloadError(f"{', '.join(task.name for task in tasks)}: {error}"))
        notes.flush()
    return shares


def _wanted(record: Record, tasks: Sequence[Task]) -> list[_Wanted]:
    """Files that match a task's shard patterns; where none matches one of them, the record's zip archives too."""
    files: dict[str, _Wanted] = {}
    zips = [file for file in record.files if file.name.lower().endswith(".zip")]
    for task in tasks:
        globs = set(catalog.part_globs(task).values())
        matching = [file for file in record.files if _matches(file.name, globs)]
        lacking = [glob for glob in sorted(globs) if not any(_matches(file.name, {glob}) for file in matching)]
        if lacking and not zips:
            raise DownloadError(f"record {record.number} holds nothing that matches {lacking[0]}, for {task.name}")
        for file in [*matching, *(zips if lacking else ())]:
            if not is_plain(file.name) or file.name.endswith(TEMPORARY_SUFFIX):
                raise DownloadError(f"record {record.number} has a file named {file.name!r}, which is no plain file name")
            known = files.setdefault(file.name, _Wanted(file, [], archive=file not in matching))
            if known.file != file:
                raise DownloadError(f"record {record.number} has two files named {file.name!r}")
            known.tasks.append(task)
    return list(files.values())


def _reports(share: _Share, folder: Path) -> list[TaskReport]:
    """What each task of a record takes and lacks, to go by names, sizes and what the manifest says."""
    reports = []
    for task in share.tasks:
        files = []
        manifest = read_manifest(folder / task.name)
        for wanted in share.wanted:
            if task in wanted.tasks:
                there = _seems_present(wanted, folder / task.name, manifest)
                files.append(FileReport(wanted.file.name, wanted.file.size, "present" if there else "missing"))
        missing = sum(file.bytes for file in files if file.status == "missing")
        total = sum(file.bytes for file in files)
        reports.append(TaskReport(task.name, share.record.number, share.record.license, total, missing, files))
    return reports


def _seems_present(wanted: _Wanted, folder: Path, manifest: Manifest | None) -> bool:
    if wanted.archive:
        return manifest is not None and _unpacked(manifest, folder, wanted.file)
    path = folder / wanted.file.name
    return path.is_file() and path.stat().st_size == wanted.file.size


def _unpacked(manifest: Manifest, folder: Path, file: RemoteFile) -> bool:
    """Whether everything that came out of an archive still lies there."""
    known = manifest.archives.get(file.name)
    out_of_it = [name for name, held in manifest.files.items() if held.archive == file.name]
    return (
        known is not None and known == (file.checksum or known) and all(manifest.holds(folder, name) for name in out_of_it)
    )


def _check_space(shares: Sequence[_Share], folder: Path) -> None:
    """That everything missing fits, a copy for each task that links could save, and archives beside what is in them."""
    needed: dict[int, tuple[Path, int]] = {}
    for share in shares:
        for wanted in share.wanted:
            home = folder / wanted.tasks[0].name
            if any(_seems_present(wanted, folder / task.name, read_manifest(folder / task.name)) for task in wanted.tasks):
                continue
            part = home / (wanted.file.name + TEMPORARY_SUFFIX)
            size = wanted.file.size * (2 if wanted.archive else 1) - (part.stat().st_size if part.is_file() else 0)
            existing = next(place for place in (home, *home.absolute().parents) if place.exists())
            device = existing.stat().st_dev
            needed[device] = (existing, needed.get(device, (home, 0))[1] + max(size, 0))
    for existing, size in needed.values():
        archives.check_space(existing, size, "what is missing")


def _fetch_share(
    client: Client,
    share: _Share,
    folder: Path,
    done: Downloaded,
    strikes: _Strikes,
    observer: Observer,
    notes: _Notes,
) -> None:
    """All files of one record, a few at a time. The manifests are written here alone, after each file."""
    manifests = {task.name: _manifest(share, task, folder, client.address) for task in share.tasks}
    reports = {report.task: report for report in done.tasks}
    tally = _Tally(share, observer)
    outcomes: dict[str, dict[str, FileReport]] = {task.name: {} for task in share.tasks}
    failures: list[tuple[_Wanted, XaresError]] = []

    def finished(wanted: _Wanted, outcome: _Done | XaresError) -> None:
        strikes.record(outcome if isinstance(outcome, XaresError) else None)
        if isinstance(outcome, XaresError):
            failures.append((wanted, outcome))
            for task in wanted.tasks:
                failed = FileReport(wanted.file.name, wanted.file.size, "failed", str(outcome))
                outcomes[task.name][wanted.file.name] = failed
            return
        for task, name, checksum, status in outcome.files:
            archive = outcome.archive[0] if outcome.archive else None
            manifests[task.name].keep(folder / task.name, name, checksum, archive)
            size = (folder / task.name / name).stat().st_size
            outcomes[task.name][name] = FileReport(name, size, status)
        for task in wanted.tasks:
            if outcome.archive:
                manifests[task.name].archives[outcome.archive[0]] = outcome.archive[1]
            manifests[task.name].save(folder / task.name)

    jobs = [_Job(client, wanted, folder, manifests, tally, notes) for wanted in share.wanted]
    _run(jobs, client, strikes, finished, tally, notes)
    for name, files in outcomes.items():
        reports[name].files = [files[key] for key in sorted(files)]
    if failures:
        done.errors.append(_summary(share, failures))
        return
    for task in share.tasks:
        if catalog.find_parts(task, folder) is None:
            done.errors.append(
                DownloadError(
                    f"record {share.record.number} is here, but {catalog.missing_data(task, folder).partition(';')[0]}"
                )
            )


def _run(
    jobs: Sequence[_Job],
    client: Client,
    strikes: _Strikes,
    finished: Callable[[_Wanted, _Done | XaresError], None],
    tally: _Tally,
    notes: _Notes,
) -> None:
    """Jobs on a few threads; everything they find out is handled on this one. Interrupted, they leave what they have.

    The threads are daemons: a socket that waits for a server must not keep an interrupted program from ending.
    """
    waiting: queue.SimpleQueue[_Job] = queue.SimpleQueue()
    results: queue.SimpleQueue[tuple[_Job, _Done | BaseException]] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)

    def work() -> None:
        while not client.stop.is_set():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                results.put((job, job.run()))
            except BaseException as error:
                results.put((job, error))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(CONNECTIONS, len(jobs)))]
    for thread in threads:
        thread.start()
    left = len(jobs)
    try:
        while left:
            notes.flush()
            tally.tell()
            try:
                job, outcome = results.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                continue
            left -= 1
            if isinstance(outcome, BaseException) and not isinstance(outcome, XaresError):
                raise outcome
            finished(job.wanted, outcome)
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


@dataclass
class _Job:
    """One file into the folders of all its tasks: found, else fetched into the first, and linked into the others."""

    client: Client
    wanted: _Wanted
    folder: Path
    manifests: dict[str, Manifest]
    tally: _Tally
    notes: _Notes

    def run(self) -> _Done:
        try:
            return self._unpack() if self.wanted.archive else self._place()
        except OSError as error:
            raise disk_error(error, self.folder / self.wanted.tasks[0].name / self.wanted.file.name) from error

    def _place(self) -> _Done:
        file, tasks = self.wanted.file, self.wanted.tasks
        held = {task.name: self._checksum_if_there(task) for task in tasks}
        checksum = next((found for found in held.values() if found), None)
        source = next((self._path(task) for task in tasks if held[task.name]), None)
        files: list[_File] = []
        for task in tasks:
            status: Literal["present", "fetched", "linked"] = "present"
            if not held[task.name]:
                status = "linked" if source else "fetched"
                checksum = self._bring(task, source, checksum)
            source = source or self._path(task)
            assert checksum is not None
            files.append((task, file.name, checksum, status))
        self.tally.put(file.name, file.size)
        return _Done(files)

    def _bring(self, task: Task, source: Path | None, checksum: str | None) -> str:
        path = self._path(task)
        path.parent.mkdir(parents=True, exist_ok=True)
        if source is None:
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

    def _unpack(self) -> _Done:
        file, tasks = self.wanted.file, self.wanted.tasks
        if all(_unpacked(self.manifests[task.name], self.folder / task.name, file) for task in tasks):
            self.tally.put(file.name, file.size)
            return self._all_unpacked()
        archive = self._path(tasks[0])
        checksum = self._checksum_if_there(tasks[0]) or self._bring(tasks[0], None, None)
        globs = {task.name: set(catalog.part_globs(task).values()) for task in tasks}
        names = archives.members(archive, lambda name: any(_matches(name, each) for each in globs.values()))
        homes = {name: [task for task in tasks if _matches(name, globs[task.name])] for name in names}
        targets = {name: self.folder / first.name / name for name, (first, *_) in homes.items()}
        for name, (first, *_) in homes.items():
            if os.path.lexists(targets[name]) and name not in self.manifests[first.name].files:
                raise DownloadError(f"{targets[name]} is in the way of a shard of {file.name}; move it away, and try again")
        checksums = archives.extract(archive, targets, self.client.check_stop) if targets else {}
        files: list[_File] = []
        for name, (first, *others) in homes.items():
            files.append((first, name, checksums[name], "unpacked"))
            for task in others:
                _link(targets[name], self.folder / task.name / name)
                files.append((task, name, checksums[name], "linked"))
        archive.unlink()
        return _Done(files, (file.name, checksum))

    def _all_unpacked(self) -> _Done:
        name, files = self.wanted.file.name, list[_File]()
        for task in self.wanted.tasks:
            held = self.manifests[task.name].files.items()
            files += [(task, shard, one.checksum, "present") for shard, one in held if one.archive == name]
        return _Done(files, (name, self.manifests[self.wanted.tasks[0].name].archives[name]))

    def _path(self, task: Task) -> Path:
        return self.folder / task.name / self.wanted.file.name


class _Tally:
    """Bytes of a record's files that are there, as threads report them; told now and then by the thread that waits."""

    def __init__(self, share: _Share, observer: Observer) -> None:
        self._name, self._observer = share.tasks[0].name, observer
        self._sizes = {wanted.file.name: 0 for wanted in share.wanted}
        self._total = sum(wanted.file.size for wanted in share.wanted)
        self._told = -1
        self._at = 0.0

    def put(self, name: str, done: int) -> None:
        self._sizes[name] = done

    def tell(self, *, last: bool = False) -> None:
        now, done = time.monotonic(), sum(self._sizes.values())
        if done != self._told and (last or now - self._at >= _TICK_SECONDS):
            self._told, self._at = done, now
            self._observer(Progress("download", self._name, done, self._total))


class _Notes:
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


class _Strikes:
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


@contextmanager
def _locked(folder: Path, number: str, observer: Observer) -> Iterator[None]:
    """One process at a time fetches a record. A killed one leaves no lock behind."""
    path = folder / _STATE_FOLDER / f"{number}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            observer(Note(f"another process is downloading record {number}; waiting for it"))
            lock.acquire(poll_interval=_TICK_SECONDS)
    except (OSError, NotImplementedError) as error:
        raise MachineError(f"{path} cannot be locked ({error}); choose another data folder by --data") from error
    try:
        yield
    finally:
        lock.release()


def _manifest(share: _Share, task: Task, folder: Path, address: Address) -> Manifest:
    """That of an earlier download of the same record, brought up to date; else a new one."""
    manifest = read_manifest(folder / task.name)
    if manifest is None or manifest.record != share.record.number:
        manifest = Manifest(share.record.number)
    manifest.license, manifest.source = share.record.license, address.url
    manifest.bytes = sum(wanted.file.size for wanted in share.wanted if task in wanted.tasks)
    return manifest


def _link(source: Path, path: Path) -> None:
    """The same bytes under a second name where the file system can do that, else a copy; either can be deleted alone."""
    try:
        with made_aside(path) as aside:
            os.link(source, aside)
    except DiskFullError:
        raise
    except MachineError:
        copy_aside(source, path)


def _summary(share: _Share, failures: Sequence[tuple[_Wanted, XaresError]]) -> XaresError:
    wanted, first = failures[0]
    if isinstance(first, MachineError) and not isinstance(first, DiskFullError):
        return first
    names = ", ".join(task.name for task in share.tasks)
    kept = len(share.wanted) - len(failures)
    of = f"{len(failures)} of {len(share.wanted)} files of record {share.record.number}"
    text = (
        f"{names}: {of} could not be fetched, first {wanted.file.name}: {first}; {kept} are here, the same command goes on"
    )
    kind = DiskFullError if any(isinstance(error, DiskFullError) for _, error in failures) else DownloadError
    return kind(text)


def _matches(name: str, globs: set[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def _unpublished(task: Task) -> str:
    if task.domain == "synthetic":
        return "it is built in"
    return "its data were never published" if task.private else "its task file names no Zenodo record"
