"""Which job starts next. No processes, no clock: the caller says what has happened, and asks what may start.

    scheduler = Scheduler(Slots(encoders=2))
    scheduler.add(jobs)
    scheduler.close()
    while not scheduler.finished:
        for job in scheduler.start():
            ...  # run it elsewhere
        scheduler.done(key)  # or failed(key), or lost(key)

Encoders take the shards of one task after another, the longest first, so that its head can start while they go on with the
next task. Several encoders take first the tasks whose heads take longest: with one, tasks come in the order they were added.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .jobs import Job

J = TypeVar("J", bound=Job)
LOSSES = 2  # of one job, before the loss counts as the job's failure


@dataclass(frozen=True)
class Slots:
    """How many jobs may run at once.

    Attributes:
        encoders: Jobs on encoders.
        heads: Head jobs, if no encoder has work.
        heads_beside: Head jobs, if encoders have work.
        memory: Bytes that running head jobs may read in all; a single one may read more.
    """

    encoders: int = 1
    heads: int = 1
    heads_beside: int = 1
    memory: float = math.inf


class Scheduler(Generic[J]):
    """The state of every job: waiting, running, done or failed."""

    def __init__(self, slots: Slots, losses: int = LOSSES) -> None:
        self._slots = slots
        self._most_losses = losses
        self._waiting: dict[str, J] = {}  # in the order they were added
        self._running: dict[str, J] = {}
        self._done: set[str] = set()
        self._losses: dict[str, int] = {}
        self._groups: dict[str, int] = {}  # the order in which groups were added
        self._begun: dict[str, int] = {}  # the order in which encoders took up groups
        self._open = True
        self._stopped = False

    @property
    def finished(self) -> bool:
        """Whether no job is left, and none will come."""
        return not (self._open or self._waiting or self._running)

    @property
    def running(self) -> list[J]:
        return list(self._running.values())

    def resize(self, slots: Slots) -> None:
        """Use other numbers of slots from now on; jobs that run already go on."""
        self._slots = slots

    def add(self, jobs: Iterable[J]) -> None:
        """Add jobs. One whose key is waiting, running or done is left out: what it would make is there, or on the way.

        After `stop` none is added.
        """
        for job in jobs:
            if self._stopped or job.key in self._waiting or job.key in self._running or job.key in self._done:
                continue
            self._groups.setdefault(job.group, len(self._groups))
            self._waiting[job.key] = job

    def repeat(self, jobs: Iterable[J]) -> None:
        """Add jobs that may be done already: what they made was lost."""
        jobs = list(jobs)
        self._done -= {job.key for job in jobs}
        self.add(jobs)

    def close(self) -> None:
        """Say that no further job will be added, except by `repeat`."""
        self._open = False

    def start(self) -> list[J]:
        """The jobs that may start now; from now on they count as running."""
        started: list[J] = []
        waiting = self._encoder_queue()
        while waiting and self._count("encoder") < self._slots.encoders:
            job = waiting.pop()
            self._begun.setdefault(job.group, len(self._begun))
            started.append(self._run(job))
        busy = self._open or self._count("encoder") or waiting
        most = self._slots.heads_beside if busy else self._slots.heads
        ready = [job for job in self._waiting.values() if job.slot == "head" and self._is_ready(job)]
        for job in sorted(ready, key=lambda job: -job.weight):
            heads = [other for other in self._running.values() if other.slot == "head"]
            fits = sum(other.memory for other in heads) + job.memory <= self._slots.memory
            if len(heads) < most and (fits or not heads):
                started.append(self._run(job))
        return started

    def done(self, key: str) -> None:
        """A running job is done."""
        del self._running[key]
        self._done.add(key)

    def failed(self, key: str) -> set[str]:
        """A running job failed: jobs that need it are dropped, and what else only these would have needed.

        Returns:
            The groups that have lost jobs by it.
        """
        job = self._running.pop(key)
        dropped: list[J] = []
        gone = {key}
        while above := [other for other in self._waiting.values() if not gone.isdisjoint(other.needs)]:
            dropped += above
            gone = {other.key for other in above}
            for other in above:
                del self._waiting[other.key]
        below = dropped
        while below:
            needed = {need for other in self._waiting.values() for need in other.needs}
            idle = {need for other in below for need in other.needs} - needed
            below = [self._waiting.pop(need) for need in idle if need in self._waiting]
        return {other.group for other in dropped} or {job.group}

    def lost(self, key: str) -> bool:
        """What ran a job is gone (a killed process, a lost node). Whether the job waits again; else call `failed`."""
        self._losses[key] = self._losses.get(key, 0) + 1
        if self._losses[key] > self._most_losses or self._stopped:
            return False
        self._waiting = {key: self._running.pop(key), **self._waiting}
        return True

    def stop(self) -> None:
        """Start no further job on an encoder. Heads whose embeddings are all there still run."""
        self._stopped, self._open = True, False
        self._waiting = {key: job for key, job in self._waiting.items() if job.slot == "head" and self._is_ready(job)}

    def _run(self, job: J) -> J:
        self._running[job.key] = self._waiting.pop(job.key)
        return job

    def _count(self, slot: str) -> int:
        return sum(job.slot == slot for job in self._running.values())

    def _is_ready(self, job: J) -> bool:
        return not any(need in self._waiting or need in self._running for need in job.needs)

    def _encoder_queue(self) -> list[J]:
        """The waiting jobs on encoders, the next one last."""
        head_weights: dict[str, float] = {}
        if self._slots.encoders > 1:
            for job in self._waiting.values():
                if job.slot == "head":
                    head_weights[job.group] = head_weights.get(job.group, 0.0) + job.weight

        def turn(group: str) -> tuple[float, float, int]:
            return self._begun.get(group, math.inf), -head_weights.get(group, 0.0), self._groups[group]

        places = {group: place for place, group in enumerate(sorted(self._groups, key=turn))}
        queue = [job for job in self._waiting.values() if job.slot == "encoder" and (not job.needs or self._is_ready(job))]
        queue.sort(key=lambda job: (places[job.group], -job.weight))
        queue.reverse()
        return queue
