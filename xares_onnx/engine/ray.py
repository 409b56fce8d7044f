"""The engine of a cluster, by Ray Core: paths go out, status comes back.

Every actor keeps a process of its own for its jobs, as on one machine, so that a stranger's model never runs in an actor,
and Ray never unpickles what that process sends. Ray neither restarts actors nor repeats their calls: the scheduler does,
which knows what is stored.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ..embedding.embed import ShardReport
from ..encoder.encoder import Encoder
from ..encoder.session import CUDA
from ..encoder.spec import ModelOptions, ModelSpec
from ..encoder.walls import Walls
from ..encoder.worker import Worker, was_killed
from ..errors import MachineError, UsageError, XaresError
from ..progress import Event, Note
from .cluster import LOCAL, check_address, connection, examined, on_node, present_nodes, requested_nodes
from .engine import Done, Failed, Report, Resized, Told
from .jobs import AnyJob, AnyReport, EmbedJob, HeadReport, Slot
from .local import HeadWorker, encoders_per_device
from .nodes import Expectation, expectation
from .scheduler import Slots
from .seats import Node, Seat, Seats, Shares

_THREADS = 8  # of one encoder, unless --threads and --workers say otherwise: more share one interpreter's decoding
_WAIT_SECONDS = 30.0  # for the first actor on a node, before a note says that it is waited for
_WATCH_SECONDS = 2.0  # between two looks at which nodes there are
_NODELESS_SECONDS = 600.0  # that jobs wait for new nodes when all are gone
_JOIN_SECONDS = 5.0
_HEAD_MEMORY = 0.5  # of all nodes' memory, for what running heads read


# ---------------------------------------------------------------- on the nodes


@dataclass(frozen=True)
class _Failure:
    error: XaresError
    lost: bool


class _Runner:
    """The actor: runs one job after another in its process, and sends events while it does."""

    def __init__(self, spec: ModelSpec, walls: Walls, environment: dict[str, str | None]) -> None:
        for name, value in environment.items():  # Ray sets the number of OpenMP's threads, and processes inherit it
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        self._encoder = Encoder(spec, Worker(walls))
        self._head = HeadWorker()

    def ready(self) -> int:
        return os.getpid()

    def run(self, job: AnyJob) -> Iterator[Event | AnyReport | _Failure]:
        events: queue.SimpleQueue[Event | AnyReport | _Failure] = queue.SimpleQueue()
        threading.Thread(target=lambda: events.put(self._end_of(job, events.put)), daemon=True).start()
        while True:
            event = events.get()
            yield event
            if isinstance(event, ShardReport | HeadReport | _Failure):
                return

    def _end_of(self, job: AnyJob, observer: Callable[[Event], None]) -> AnyReport | _Failure:
        try:
            if isinstance(job, EmbedJob):
                function, arguments = job.call(self._encoder.spec.device, self._encoder.spec.threads)
                return self._encoder.call(function, *arguments, returns=ShardReport, observer=observer)
            return self._head.call(job.function, *job.arguments, returns=HeadReport, silence_limit=None, observer=observer)
        except XaresError as error:
            lost = was_killed(error)
            error.__cause__ = None  # it need not be picklable
            return _Failure(error, lost)
        except BaseException:
            return _Failure(XaresError(traceback.format_exc()), lost=False)


# ---------------------------------------------------------------- on the driver


class RayEngine:
    """Actors on the nodes of a cluster, each started with its first job.

    Args:
        encoder: The measured encoder.
        shares: How nodes are divided among encoders.
        expected: What a node must have and see to take part.

    Raises:
        MachineError: A node cannot take part.
    """

    def __init__(self, encoder: Encoder, shares: Shares, expected: Expectation) -> None:
        device = "cuda" if encoder.info.provider == CUDA else encoder.spec.device  # Ray shows an actor its GPU alone
        self._spec = msgspec.structs.replace(encoder.spec, device=device)
        self._walls = encoder.worker.walls
        self._shares = shares
        self._expected = expected
        self._environment = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "XARES_ONNX_DEBUG")}
        self._seats = Seats(shares.most)
        self._nodes: dict[str, Node] = {}
        self._seen: set[str] = set()
        self._actors: list[Any] = []
        self._incidents: list[str] = []
        self._threads: list[threading.Thread] = []  # all of them, as in `LocalEngine`
        self._closing = threading.Event()
        self._resources = contextlib.ExitStack()
        present = present_nodes()
        admitted, refusals = examined(present, expected)
        for node, refusal in refusals.items():
            raise MachineError(f"node {present[node].name} {refusal}")
        self._welcome(admitted)
        self._workers = self._seats.count("encoder")
        if not self._workers:
            lack = "a GPU" if shares.per_gpu else "a CPU"
            raise MachineError(f"no node of the Ray cluster has {lack} to give; add nodes, or run with --engine local")

    def own(self, resources: contextlib.ExitStack) -> None:
        """Close these at the end."""
        self._resources.enter_context(resources)

    @property
    def slots(self) -> Slots:
        # Never 0: with all nodes gone, a job waits for new ones.
        encoders, heads = max(1, self._seats.count("encoder")), max(1, self._seats.count("head"))
        memory = _HEAD_MEMORY * sum(node.memory for node in list(self._nodes.values()))  # nodes come and go
        return Slots(encoders=encoders, heads=heads, heads_beside=heads, memory=memory)

    def described(self) -> dict[str, Any]:
        incidents = {"incidents": list(self._incidents)} if self._incidents else {}
        return {"engine": "ray", "workers": self._workers, **incidents}

    def start(self, job: AnyJob, report: Callable[[Report], None]) -> None:
        if not self._threads:
            threading.Thread(target=self._watch, args=(job, report), daemon=True).start()
        thread = threading.Thread(target=self._run, args=(job, report), daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """End every actor and its process, and the connection; a cluster that was started for this run ends too."""
        import ray

        self._closing.set()
        with self._seats.changed:
            self._seats.changed.notify_all()
        for actor in self._actors:
            with contextlib.suppress(Exception):  # it, or Ray, may be gone
                ray.kill(actor)
        for thread in self._threads:
            if thread.is_alive():  # one that a signal kept from starting cannot be joined
                thread.join(_JOIN_SECONDS)
        self._resources.close()

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------- jobs, each in a thread of its own

    def _run(self, job: AnyJob, report: Callable[[Report], None]) -> None:
        ending: Report
        try:
            ending = self._ending(job, report)
        except BaseException as error:  # in a thread nobody else would see it
            ending = Failed(job, error)
        report(ending)

    def _ending(self, job: AnyJob, report: Callable[[Report], None]) -> Done | Failed:
        import ray
        from ray.exceptions import RayError, RayTaskError

        seat = self._seat_with_actor(job, report)
        try:
            for reference in seat.actor.run.options(num_returns="streaming").remote(job):
                match ray.get(reference):
                    case _Failure(error, lost):
                        return Failed(job, error, lost)
                    case ShardReport() | HeadReport() as done:
                        return Done(job, done)
                    case event:
                        report(Told(job, event))
            raise RuntimeError(f"the actor of {job.key} ended without a report")
        except RayTaskError as error:
            raise XaresError(str(error)) from error
        except RayError as error:
            seat.actor = None
            gone = MachineError(f"what ran it on node {seat.name} is gone ({type(error).__name__})")
            return Failed(job, gone, lost=True)
        finally:
            self._seats.give(seat)

    def _seat_with_actor(self, job: AnyJob, report: Callable[[Report], None]) -> Seat:
        """A seat for the job. One where no actor can be started is given up."""
        import ray
        from ray.exceptions import RayError

        while True:
            seat = self._idle_seat(job.slot)
            if seat.actor is not None:
                return seat
            try:
                actor = self._new_actor(seat)
                ready = actor.ready.remote()
                if not ray.wait([ready], timeout=_WAIT_SECONDS)[0]:
                    report(Told(job, Note(f"node {seat.name} is still busy with other work of the cluster; waiting for it")))
                ray.get(ready)
            except RayError as error:
                self._seats.drop(functools.partial(operator.is_, seat))
                self._happened(f"node {seat.name} cannot start an actor ({type(error).__name__}); others go on", job, report)
                report(Resized(self.slots))
            else:
                seat.actor = actor
                return seat

    def _idle_seat(self, slot: Slot) -> Seat:
        patience = time.monotonic() + _NODELESS_SECONDS
        with self._seats.changed:
            while not self._closing.is_set():
                if seat := self._seats.take(slot):
                    return seat
                if self._seats.count(slot):
                    patience = time.monotonic() + _NODELESS_SECONDS
                elif time.monotonic() > patience:
                    raise MachineError(
                        "every node of the Ray cluster is gone; run again when there are some: shards are kept"
                    )
                self._seats.changed.wait(1.0)
        raise MachineError("the run is over")

    def _new_actor(self, seat: Seat) -> Any:
        import ray

        options: dict[str, Any] = {
            "num_cpus": seat.cpus,
            "num_gpus": seat.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": on_node(seat.node),
        }
        spec = msgspec.structs.replace(self._spec, threads=seat.threads)
        actor = ray.remote(_Runner).options(**options).remote(spec, self._walls, self._environment)
        self._actors.append(actor)
        return actor

    # ---------------------------------------------------------------- nodes that come and go

    def _watch(self, job: AnyJob, report: Callable[[Report], None]) -> None:
        """In a thread: follow the cluster. Notes are told as if by `job`, the first."""
        while not self._closing.wait(_WATCH_SECONDS):
            try:
                present = present_nodes()
                new = {node: present[node] for node in present.keys() - self._seen}
                admitted, refusals = examined(new, self._expected)
            except Exception:  # the connection is closing, or a node went at that moment: look again
                continue
            gone = self._nodes.keys() - present.keys()
            self._seen |= refusals.keys()
            for node in gone:
                self._happened(f"node {self._nodes.pop(node).name} is gone; its unfinished jobs run elsewhere", job, report)
            for node, refusal in refusals.items():
                self._happened(f"node {new[node].name} is new and gets no work: it {refusal}", job, report)
            self._seats.drop(lambda seat, gone=frozenset(gone): seat.node in gone)  # type: ignore[misc]
            self._welcome(admitted)
            if gone or admitted:
                report(Resized(self.slots))

    def _happened(self, text: str, job: AnyJob, report: Callable[[Report], None]) -> None:
        """Say what became of a node, and keep it for the record: beside the machine, since no score depends on it."""
        self._incidents.append(text)
        report(Told(job, Note(text)))

    def _welcome(self, present: Iterable[Node]) -> None:
        for node in present:
            self._seen.add(node.id)
            self._nodes[node.id] = node
            self._seats.add(self._shares.of(node))


# ---------------------------------------------------------------- opening


def open_ray(encoder: Encoder, options: ModelOptions, cache: Path, paths: Sequence[Path]) -> RayEngine:
    """Start a cluster on this machine (`ray`), or join one (`ray:ADDRESS`, `ray:auto`).

    Args:
        encoder: The measured encoder.
        options: Those of the model; `engine`, `workers` and `threads` matter here.
        cache: The folder that holds the store.
        paths: The folders of the shards.

    Raises:
        UsageError: The device is one by its number, or several.
        MachineError: There is no such cluster, or a node of it cannot take part.
    """
    if options.device.startswith("cuda:"):  # a list, a number, or cuda:all
        raise UsageError(f"--device {options.device!r}: Ray hands out the GPUs of all nodes; --device cuda uses them")
    _, _, address = options.engine.partition(":")
    check_address(address)
    with contextlib.ExitStack() as resources:
        resources.enter_context(connection(address or LOCAL))
        seen = [*paths, Path(encoder.info.path), *([encoder.info.front] if encoder.info.front else [])]
        expected = resources.enter_context(expectation(cache.absolute(), seen, encoder.info))
        per_gpu = encoders_per_device(encoder, "cuda:0") if encoder.info.provider == CUDA else 0
        shares = _shares(options, per_gpu, sum(node.cpus for node in present_nodes().values()))
        engine = RayEngine(encoder, shares, expected)
        if address and shares.most and shares.most > engine.slots.encoders:
            resources.enter_context(requested_nodes(shares))
        engine.own(resources.pop_all())
    encoder.close()  # its process has measured the model, and would keep memory of this node
    return engine


def _shares(options: ModelOptions, per_gpu: int, cpus: int) -> Shares:
    """`--threads` are those of each encoder here, since nodes may differ."""
    fitting = min(_THREADS, cpus // options.workers) if options.workers else _THREADS
    return Shares(options.threads or max(1, fitting), options.workers, per_gpu)
