"""The engine of one machine: encoders and heads, each in a process that can be killed, started with its first job."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..embedding.embed import ShardReport
from ..encoder.devices import chosen_devices, cuda_bytes
from ..encoder.encoder import Encoder
from ..encoder.session import CUDA
from ..encoder.spec import ModelOptions
from ..encoder.walls import Walls
from ..encoder.worker import Worker, was_killed
from ..errors import MachineError, XaresError
from ..progress import Event, Observer
from .engine import Done, Failed, Report, Told
from .jobs import AnyJob, EmbedJob, HeadJob, HeadReport
from .scheduler import Slots

_JOIN_SECONDS = 5.0  # for a thread whose process has been killed


class HeadWorker(Worker):
    """A process that trains heads: it runs no stranger's code.

    Its threads share one arena, since arenas of their own keep what is freed in them: 70 MB in the fit of a large head on
    two threads. Otherwise it keeps the system's allocator.
    """

    subject = "the process that trains heads"
    environment: Mapping[str, str] = {"MALLOC_ARENA_MAX": "1"}

    def __init__(self) -> None:
        super().__init__(Walls(gpu=True))

    def _fault(self, fate: str, *, out_of_memory: bool) -> XaresError:
        return MachineError(f"{fate}{'; free some memory' if out_of_memory else ''}, and run again: embeddings are kept")


class LocalEngine:
    """Processes on this machine.

    Args:
        encoder: The measured encoder. Its own process is the first of the encoders; all share its number of threads.
        devices: Of the encoders, one each.
        slots: As many encoders as devices, and how many heads may run.
    """

    def __init__(self, encoder: Encoder, devices: Sequence[str], slots: Slots) -> None:
        self.slots = slots
        threads = max(1, encoder.spec.threads // len(devices))
        specs = [msgspec.structs.replace(encoder.spec, device=device, threads=threads) for device in devices]
        workers = [encoder.worker, *(Worker(encoder.worker.walls) for _ in specs[1:])]
        # The last of each list is used next, so that a process that runs already is preferred to one that does not.
        self._encoders = [Encoder(spec, worker) for spec, worker in zip(specs, workers, strict=True)][::-1]
        self._heads = [HeadWorker() for _ in range(max(slots.heads, slots.heads_beside))]
        self._workers: list[Worker] = [*workers, *self._heads]
        # All of them: a Ctrl-C while one is freed would be late, as no exception leaves the callback of a weak reference.
        self._threads: list[threading.Thread] = []
        self._closed = False

    def described(self) -> dict[str, Any]:
        return {"engine": "local", "workers": self.slots.encoders}

    def start(self, job: AnyJob, report: Callable[[Report], None]) -> None:
        thread = threading.Thread(target=self._run, args=(job, report), daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """Kill every process."""
        self._closed = True
        for worker in self._workers:
            worker.close()
        for thread in self._threads:
            if thread.is_alive():  # one that a signal kept from starting cannot be joined
                thread.join(_JOIN_SECONDS)
        for worker in self._workers:  # that started in the meantime
            worker.close()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, job: AnyJob, report: Callable[[Report], None]) -> None:
        def observer(event: Event) -> None:
            report(Told(job, event))

        ending: Report
        try:
            if self._closed:
                raise MachineError("the run is over")
            ending = Done(job, self._embed(job, observer) if isinstance(job, EmbedJob) else self._train(job, observer))
        except BaseException as error:  # in a thread nobody else would see it
            ending = Failed(job, error, lost=was_killed(error))
        report(ending)

    def _embed(self, job: EmbedJob, observer: Observer) -> ShardReport:
        encoder = self._encoders.pop()
        try:
            function, arguments = job.call(encoder.spec.device, encoder.spec.threads)
            return encoder.call(function, *arguments, returns=ShardReport, observer=observer)
        finally:
            self._encoders.append(encoder)

    def _train(self, job: HeadJob, observer: Observer) -> HeadReport:
        worker = self._heads.pop()
        try:
            return worker.call(job.function, *job.arguments, returns=HeadReport, silence_limit=None, observer=observer)
        finally:
            self._heads.append(worker)


# ---------------------------------------------------------------- how many encoders and heads

_MOST_HEADS = 4  # at once, when no encoder has work: a part of every head runs on one core
_CORES_PER_HEAD = 4
_GPU_ENCODERS = 4  # on one GPU: of a bare loop's speed one gave 0.47 to 0.70, two 0.69 to 0.95, four 0.81 to 0.90 (an H200)
_GPU_SHARE = 0.8  # of its memory, for all encoders on it
_GPU_BYTES = 2 << 30  # of one encoder: context, libraries and workspace
_GPU_MODEL_FACTOR = 2  # and its weights, with room for as much again


def open_engine(encoder: Encoder, options: ModelOptions) -> LocalEngine:
    """The engine that the options ask for.

    Raises:
        UsageError: The devices are invalid.
        MachineError: A device is not there.
    """
    devices = chosen_devices(options.device)
    workers = options.workers or len(devices) * encoders_per_device(encoder, devices[0])
    placed = [devices[number % len(devices)] for number in range(workers)]
    free = _free_bytes()
    heads = 1 if free is None else max(1, min(_MOST_HEADS, encoder.spec.threads // _CORES_PER_HEAD))
    return LocalEngine(encoder, placed, Slots(encoders=workers, heads=heads, memory=(free or 0) / 2))


def _free_bytes() -> int | None:
    """Memory that processes may take without swapping, as Linux estimates it; None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def encoders_per_device(encoder: Encoder, device: str) -> int:
    """How many encoders keep a device busy: one, or as many on a GPU as its memory holds."""
    if encoder.info.provider != CUDA:
        return 1
    _, _, number = device.partition(":")
    memory = cuda_bytes(int(number) if number.isdecimal() else 0)
    one = _GPU_BYTES + _GPU_MODEL_FACTOR * encoder.info.scan.bytes
    fit = _GPU_ENCODERS if memory is None else int(_GPU_SHARE * memory / one)
    return 4 if fit >= 4 else 2 if fit >= 2 else 1
