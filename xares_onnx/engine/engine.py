"""What every engine is, and the loop that drives one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import DataError, MachineError, ModelError, XaresError
from ..progress import Event
from .jobs import AnyJob, AnyReport
from .scheduler import Scheduler, Slots


@dataclass(frozen=True)
class Told:
    """A running job reports progress, or a note."""

    job: AnyJob
    event: Event


@dataclass(frozen=True)
class Done:
    """A job is done."""

    job: AnyJob
    report: AnyReport


@dataclass(frozen=True)
class Failed:
    """A job failed. `lost`: what ran it is gone by no fault of the job, so it may run again."""

    job: AnyJob
    error: BaseException
    lost: bool = False


@dataclass(frozen=True)
class Resized:
    """The engine has other slots from now on: nodes came or went."""

    slots: Slots


Report = Told | Done | Failed | Resized


class Engine(Protocol):
    """Runs jobs somewhere. `close` ends everything that it started, running jobs included."""

    @property
    def slots(self) -> Slots:
        """How many jobs it can run at once."""

    def described(self) -> dict[str, Any]:
        """What the record of a result says of it: `engine`; `workers`, its encoders; `incidents`, such as nodes lost."""

    def start(self, job: AnyJob, report: Callable[[Report], None]) -> None:
        """Begin a job and return at once.

        `report` may be called from any thread: with `Told` while the job runs, and once with `Done` or `Failed` in the end.
        """

    def close(self) -> None: ...


class Client(Protocol):
    """Whoever wants the jobs done. All methods are called in the thread that called `drive`."""

    def told(self, job: AnyJob, event: Event) -> None:
        """A job reports progress, or a note."""

    def done(self, job: AnyJob, report: AnyReport) -> Iterable[AnyJob]:
        """A job is done. Returns jobs to run again, for what it found to be lost."""

    def failed(self, groups: set[str], error: XaresError) -> None:
        """These groups have failed; if the error is not one of data, only heads whose embeddings are all there still run."""

    def lost(self, job: AnyJob, error: BaseException) -> None:
        """What ran a job is gone; the job will run again."""


@dataclass(frozen=True)
class Planned:
    """The jobs of a group."""

    jobs: Iterable[AnyJob]


@dataclass(frozen=True)
class Unplanned:
    """A group has no jobs, because of an error."""

    group: str
    error: XaresError


Plan = Callable[["Desk"], Iterator[Planned | Unplanned]]


class ClosedError(Exception):
    """The run is over; raised in the thread that plans it."""


class Desk:
    """Where everything that happens arrives, for the one thread that decides."""

    def __init__(self) -> None:
        self._inbox: queue.Queue[Any] = queue.Queue()
        self._closed = threading.Event()

    def put(self, item: Any) -> None:
        self._inbox.put(item)

    def tell(self, call: Callable[[], None]) -> None:
        """Let the deciding thread make a call, such as that of an observer. Raises `ClosedError` if no plan is wanted."""
        if self._closed.is_set():
            raise ClosedError
        self.put(call)

    def next(self) -> Any:
        while True:
            try:
                return self._inbox.get(timeout=1.0)  # with a limit, since Ctrl-C cannot end an endless wait everywhere
            except queue.Empty:
                continue

    def close(self) -> None:
        self._closed.set()


class _AllPlanned:
    pass


def drive(engine: Engine, scheduler: Scheduler[AnyJob], plan: Plan, client: Client) -> None:
    """Run every job to its end.

    Args:
        engine: Runs them.
        scheduler: Orders them.
        plan: Yields the jobs of one group after another, in a thread of its own, so that the jobs of planned groups run
            meanwhile. It talks to the client through `Desk.tell` alone.
        client: Hears what becomes of the jobs.

    Raises:
        XaresError: A failure that is neither the data's, the model's nor the machine's.
    """
    desk = Desk()
    threading.Thread(target=_plan, args=(plan, desk), daemon=True).start()
    try:
        while not scheduler.finished:
            for job in scheduler.start():
                engine.start(job, desk.put)
            if not scheduler.finished:
                _take(desk.next(), desk, scheduler, client)
    finally:
        desk.close()


def _plan(plan: Plan, desk: Desk) -> None:
    try:
        for planned in plan(desk):
            desk.put(planned)
        desk.put(_AllPlanned())
    except ClosedError:
        pass
    except BaseException as error:
        desk.put(error)


def _take(item: Any, desk: Desk, scheduler: Scheduler[AnyJob], client: Client) -> None:
    match item:
        case Told(job, event):
            client.told(job, event)
        case Planned(jobs):
            scheduler.add(jobs)
        case _AllPlanned():
            scheduler.close()
        case Resized(slots):
            scheduler.resize(slots)
        case Done(job, report):
            scheduler.done(job.key)
            scheduler.repeat(client.done(job, report))
        case Failed(job, error, lost):
            if lost and scheduler.lost(job.key):
                client.lost(job, error)
            else:
                _fail(scheduler.failed(job.key), error, desk, scheduler, client)
        case Unplanned(group, error):
            _fail({group}, error, desk, scheduler, client)
        case BaseException():
            raise item
        case _:
            item()


def _fail(groups: set[str], error: BaseException, desk: Desk, scheduler: Scheduler[AnyJob], client: Client) -> None:
    if not isinstance(error, DataError | ModelError | MachineError):
        raise error
    client.failed(groups, error)
    if not isinstance(error, DataError):  # no further group can succeed
        desk.close()
        scheduler.stop()
