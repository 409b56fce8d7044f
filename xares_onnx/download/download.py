"""Fetch the data of tasks: the shards of their Zenodo records into `DATA/<task>`, each file whole and verified."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import filelock
import msgspec

from ..data import catalog
from ..data.manifest import Manifest, read_manifest
from ..data.task import Task
from ..errors import DataMissingError, DiskFullError, DownloadError, MachineError, UsageError, XaresError, quoted
from ..files import TEMPORARY_SUFFIX, disk_error, remove_leftovers
from ..progress import Note, Observer, ignore
from . import zip_files
from .deliveries import CONNECTIONS, Delivered, Delivery, Notes, Strikes, Tally, Wanted, deliver, matches
from .transfer import Client, Patience
from .zenodo import Address, Record, RemoteFile, is_plain

_STATE_FOLDER = ".xares-onnx"  # in the data folder: locks
_POLL_SECONDS = 0.1


class FileReport(msgspec.Struct, frozen=True):
    """What became of one file of a record for one task."""

    name: str
    bytes: int
    status: Literal["missing", "present", "fetched", "linked", "unpacked", "failed"]
    reason: str | None = None


class TaskReport(msgspec.Struct):
    """One task: its record, the bytes that the task takes from it, and those that were missing at the start.

    A missing file that several tasks share counts for the first of them, since it is fetched once.
    """

    task: str
    record: str
    license: str | None
    bytes: int
    missing_bytes: int
    files: list[FileReport] = []


@dataclass
class Downloaded:
    """What a download did, or would do. `errors` are those of records and tasks, in order."""

    tasks: list[TaskReport] = field(default_factory=list)
    errors: list[XaresError] = field(default_factory=list)


@dataclass
class _Share:
    """A record, and which of its files go to which of the chosen tasks."""

    record: Record
    tasks: list[Task]
    wanted: list[Wanted]


def choose(names: Sequence[str], suite: str | None, observer: Observer = ignore) -> list[Task]:
    """The tasks to fetch, by names or by a suite. A suite's tasks without a record are noted and left out.

    Raises:
        UsageError: Neither names nor a suite, or both; or a task's shards lie in folders, which no record has.
        DataMissingError: A named task has no record.
    """
    if bool(names) == bool(suite):
        raise UsageError(
            "name tasks, or a suite by --suite public; with --plan, `xares-onnx download` only shows their sizes"
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
                    f"{task.name} has its shards at {quoted(glob)}, but files of a record lie in no folders; download "
                    "them by hand"
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
    """Fetch the missing files of tasks' records.

    Args:
        names: Names, patterns or task files.
        suite: A suite instead of names.
        data: The data folder; it may be missing. None for the default.
        mirror: Address of a mirror of Zenodo.
        plan: Only report what is missing.
        patience: How long to wait for the server, and how often to ask it.
        observer: Receives progress of stage `download`, and notes.

    Returns:
        A report per task, and the errors of those that failed; the others are complete.

    Raises:
        UsageError: As `choose`, or the mirror's address is unusable.
        DataMissingError: A named task has no record.
        DiskFullError: The missing files do not fit; nothing was fetched.
        MachineError: The data folder cannot be written.
    """
    address = Address.parse(mirror) if mirror else Address()
    chosen = choose(names, suite, observer)
    folder = catalog.data_folder(data, to_fill=True)
    if not address.encrypted:
        observer(Note(f"{address.host} is reached over plain http: data and checksums can be changed on the way"))
    done, notes = Downloaded(), Notes(observer)
    try:
        with Client(address, patience, connections=CONNECTIONS, note=notes.put) as client:
            shares = _shares(client, chosen, done, notes)
            for share in shares:
                done.tasks += _reports(share, folder)
            if not plan:
                _check_space(shares, folder)
                _fetch_shares(client, shares, folder, done, observer, notes)
    except OSError as error:
        raise disk_error(error, folder) from error
    return done


def _shares(client: Client, chosen: Sequence[Task], done: Downloaded, notes: Notes) -> list[_Share]:
    """Request each record once, and assign its files to the tasks that share it."""
    by_record: dict[str, list[Task]] = {}
    for task in chosen:
        by_record.setdefault(str(task.data.zenodo), []).append(task)
    shares, strikes = [], Strikes()
    for number, tasks in by_record.items():
        try:
            if strikes.out:
                raise DownloadError(f"record {number} is not requested, since {client.address.host} failed several times")
            record = client.record(number)
            strikes.record(None)
            shares.append(_Share(record, tasks, _wanted(record, tasks)))
        except DownloadError as error:
            strikes.record(error)
            done.errors.append(DownloadError(f"{', '.join(task.name for task in tasks)}: {error}"))
        notes.flush()
    return shares


def _wanted(record: Record, tasks: Sequence[Task]) -> list[Wanted]:
    """Files that match a task's shard patterns; if a pattern has no match, the record's zip archives too."""
    files: dict[str, Wanted] = {}
    zips = [file for file in record.files if file.name.lower().endswith(".zip")]
    for task in tasks:
        globs = set(catalog.part_globs(task).values())
        matching = [file for file in record.files if matches(file.name, globs)]
        lacking = [glob for glob in sorted(globs) if not any(matches(file.name, {glob}) for file in matching)]
        if lacking and not zips:
            raise DownloadError(f"record {record.number} has no file that matches {lacking[0]}, for {task.name}")
        for file in [*matching, *(zips if lacking else ())]:
            if not is_plain(file.name) or file.name.endswith(TEMPORARY_SUFFIX):
                raise DownloadError(
                    f"record {record.number} has a file named {quoted(file.name)}, which is not a plain file name"
                )
            wanted = files.setdefault(file.name, Wanted(file, [], archive=file not in matching))
            if wanted.file != file:
                raise DownloadError(f"record {record.number} has two files named {quoted(file.name)}")
            wanted.tasks.append(task)
    return list(files.values())


def _reports(share: _Share, folder: Path) -> list[TaskReport]:
    """What each task takes from a record and lacks, judged by names, sizes and manifests."""
    reports, coming = [], set[str]()
    for task in share.tasks:
        manifest = read_manifest(folder / task.name)
        files, missing = [], 0
        for wanted in share.wanted:
            if task not in wanted.tasks:
                continue
            file = wanted.file
            present = _seems_present(wanted, folder / task.name, manifest)
            files.append(FileReport(file.name, file.size, "present" if present else "missing"))
            if not present and file.name not in coming:
                coming.add(file.name)
                missing += file.size
        total = sum(file.bytes for file in files)
        reports.append(TaskReport(task.name, share.record.number, share.record.license, total, missing, files))
    return reports


def _seems_present(wanted: Wanted, folder: Path, manifest: Manifest | None) -> bool:
    if wanted.archive:
        return manifest is not None and manifest.has_unpacked(folder, wanted.file.name, wanted.file.checksum)
    return _seems_whole(folder, wanted.file)


def _seems_whole(folder: Path, file: RemoteFile) -> bool:
    path = folder / file.name
    return path.is_file() and path.stat().st_size == file.size


def _check_space(shares: Sequence[_Share], folder: Path) -> None:
    """Raises `DiskFullError` if what is missing does not fit: shared files count once, archives beside what they contain."""
    needed: dict[int, tuple[Path, int]] = {}
    for share in shares:
        for wanted in share.wanted:
            home = folder / wanted.tasks[0].name
            if any(_seems_present(wanted, folder / task.name, read_manifest(folder / task.name)) for task in wanted.tasks):
                continue
            size = wanted.file.size - _part_size(home, wanted.file)
            if wanted.archive:  # its content needs space beside it
                size = wanted.file.size + (0 if _seems_whole(home, wanted.file) else size)
            existing = next(place for place in (home, *home.absolute().parents) if place.exists())
            device = existing.stat().st_dev
            needed[device] = (existing, needed.get(device, (home, 0))[1] + size)
    for existing, size in needed.values():
        zip_files.check_space(existing, size, "what is missing")


def _fetch_shares(
    client: Client, shares: Sequence[_Share], folder: Path, done: Downloaded, observer: Observer, notes: Notes
) -> None:
    """One record after another, until the server fails several times in a row or the machine fails."""
    strikes = Strikes()
    for share in shares:
        if strikes.out or any(isinstance(error, MachineError) for error in done.errors):
            why = f"{client.address.host} failed several times" if strikes.out else "an earlier one failed on this machine"
            names = ", ".join(task.name for task in share.tasks)
            done.errors.append(DownloadError(f"{names}: record {share.record.number} was not tried, since {why}"))
            continue
        with _locked(folder, share.record.number, observer):
            _fetch_share(client, share, folder, done, strikes, observer, notes)


def _fetch_share(
    client: Client, share: _Share, folder: Path, done: Downloaded, strikes: Strikes, observer: Observer, notes: Notes
) -> None:
    """All files of one record, a few at a time."""
    for task in share.tasks:
        remove_leftovers(folder / task.name)
    ledger = _Ledger(share, folder, client.address, strikes)
    unread = sum(
        _seems_whole(folder / task.name, wanted.file)
        and not ledger.manifests[task.name].holds(folder / task.name, wanted.file.name)
        for wanted in share.wanted
        for task in wanted.tasks
    )
    if unread:
        observer(Note(f"record {share.record.number}: verifying files that are already here: {unread}"))
    tally = Tally(share.tasks[0].name, *_sizes_on_disk(share, folder, ledger.manifests), observer)
    deliveries = [Delivery(client, wanted, folder, ledger.manifests, tally, notes) for wanted in share.wanted]
    try:
        deliver(deliveries, client, strikes, ledger.enter, tally, notes)
    except MachineError as error:  # a manifest cannot be saved: an error of this record, beside what other records gave
        done.errors.append(error)
        return
    for report in done.tasks:
        if report.task in ledger.files:
            report.files = sorted(ledger.files[report.task], key=lambda file: file.name)
    if ledger.failures:
        done.errors.append(_summary(share, ledger.failures))
        return
    for task in share.tasks:
        if catalog.find_parts(task, folder) is None:
            lacks = catalog.missing_data(task, folder).partition(";")[0]
            done.errors.append(DownloadError(f"record {share.record.number} is here, but {lacks}"))


class _Ledger:
    """What became of the files of one record. It alone writes the tasks' manifests, and saves them after each file."""

    def __init__(self, share: _Share, folder: Path, address: Address, strikes: Strikes) -> None:
        self._folder, self._strikes = folder, strikes
        self.manifests = {task.name: _manifest(share, task, folder, address) for task in share.tasks}
        self.files: dict[str, list[FileReport]] = {task.name: [] for task in share.tasks}
        self.failures: list[tuple[Wanted, XaresError]] = []
        for name, manifest in self.manifests.items():
            manifest.save(folder / name)  # before the first file, so that an incomplete set never passes for all

    def enter(self, wanted: Wanted, outcome: Delivered | XaresError) -> None:
        """Record how a delivery ended."""
        if isinstance(outcome, XaresError):
            self._strikes.record(outcome)
            self.failures.append((wanted, outcome))
            for task in wanted.tasks:
                self.files[task.name].append(FileReport(wanted.file.name, wanted.file.size, "failed", str(outcome)))
            return
        self._strikes.record(None)
        for task, name, checksum, status in outcome.files:
            self.manifests[task.name].keep(self._folder / task.name, name, checksum, outcome.archive and outcome.archive[0])
            size = self.manifests[task.name].files[name].size
            self.files[task.name].append(FileReport(name, size, status))
        for task in wanted.tasks:
            if outcome.archive:
                self.manifests[task.name].archives[outcome.archive[0]] = outcome.archive[1]
            self.manifests[task.name].save(self._folder / task.name)


def _sizes_on_disk(share: _Share, folder: Path, manifests: dict[str, Manifest]) -> tuple[dict[str, int], int]:
    """Bytes of each file that seem to be on disk already, and the bytes of all files when they are whole."""
    sizes = {}
    for wanted in share.wanted:
        homes = [(folder / task.name, manifests[task.name]) for task in wanted.tasks]
        whole = any(_seems_present(wanted, home, manifest) for home, manifest in homes)
        sizes[wanted.file.name] = wanted.file.size if whole else _part_size(homes[0][0], wanted.file)
    return sizes, sum(wanted.file.size for wanted in share.wanted)


def _part_size(home: Path, file: RemoteFile) -> int:
    part = home / (file.name + TEMPORARY_SUFFIX)
    return min(part.stat().st_size, file.size) if part.is_file() else 0


@contextmanager
def _locked(folder: Path, number: str, observer: Observer) -> Iterator[None]:
    """One process at a time fetches a record. A killed process leaves no lock behind."""
    path = folder / _STATE_FOLDER / f"{number}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            observer(Note(f"another process is downloading record {number}; waiting for it"))
            lock.acquire(poll_interval=_POLL_SECONDS)
    except (OSError, NotImplementedError) as error:
        raise MachineError(f"{path} cannot be locked ({error}); choose another data folder by --data") from error
    try:
        yield
    finally:
        lock.release()


def _manifest(share: _Share, task: Task, folder: Path, address: Address) -> Manifest:
    """The manifest of an earlier download of the same record, brought up to date; else a new one."""
    manifest = read_manifest(folder / task.name)
    if manifest is None or manifest.record != share.record.number:
        manifest = Manifest(share.record.number)
    manifest.license, manifest.source = share.record.license, address.url
    manifest.wanted = {wanted.file.name: wanted.file.size for wanted in share.wanted if task in wanted.tasks}
    return manifest


def _summary(share: _Share, failures: Sequence[tuple[Wanted, XaresError]]) -> XaresError:
    wanted, first = failures[0]
    if isinstance(first, MachineError) and not isinstance(first, DiskFullError):
        return first
    tasks = ", ".join(task.name for task in share.tasks)
    lost = f"{len(failures)} of {len(share.wanted)} files of record {share.record.number} could not be fetched"
    text = f"{tasks}: {lost}, first {wanted.file.name}: {first}; the rest is kept, and the same command run again goes on"
    kind = DiskFullError if any(isinstance(error, DiskFullError) for _, error in failures) else DownloadError
    return kind(text)


def _unpublished(task: Task) -> str:
    if task.domain == "synthetic":
        return "it is built in"
    return "its data were never published" if task.private else "its task file names no Zenodo record"
