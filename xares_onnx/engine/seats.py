"""Who may run where on the nodes of a cluster. No processes and no cluster: the caller says which nodes there are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .jobs import Slot


@dataclass(frozen=True)
class Node:
    """A node with what Ray has free on it."""

    id: str
    name: str
    cpus: int
    gpus: int
    memory: float


@dataclass
class Seat:
    """Room for one actor on a node. `cpus` and `gpus` are its share by Ray's count, `threads` what it really uses."""

    slot: Slot
    node: str
    name: str
    cpus: float
    gpus: float
    threads: int
    actor: Any = None


@dataclass(frozen=True)
class Shares:
    """How nodes are divided among encoders.

    Attributes:
        threads: Of one encoder.
        most: Encoders in all; None for as many as fit.
        per_gpu: Encoders on one GPU; 0 if they run on the CPU.
    """

    threads: int
    most: int | None
    per_gpu: int

    def of(self, node: Node) -> list[Seat]:
        """As many seats for encoders as the node has room for, and of heads as many, or one per GPU.

        An encoder and a head share their cores, as on one machine, so each takes half of them by Ray's count.
        """
        encoders = node.gpus * self.per_gpu if self.per_gpu else node.cpus // min(self.threads, max(1, node.cpus))
        if not encoders:
            return []
        heads = node.gpus if self.per_gpu else encoders
        threads = max(1, min(self.threads, node.cpus // encoders))
        gpus = 1 / (self.per_gpu + 1) if self.per_gpu else 0.0
        cpus = min(threads, node.cpus / encoders) / 2
        encoder = Seat("encoder", node.id, node.name, cpus, gpus, threads)
        head = Seat("head", node.id, node.name, cpus, gpus, threads)
        return [*(replace(encoder) for _ in range(encoders)), *(replace(head) for _ in range(heads))]


@dataclass
class Seats:
    """Every seat of the nodes that take part, and which of them are idle; any thread may call.

    Attributes:
        most: Encoders in all; None for as many as there are.
        spare: Seats beyond this number.
        changed: Held while they change, and notified then.
    """

    most: int | None
    all: list[Seat] = field(default_factory=list)
    idle: list[Seat] = field(default_factory=list)
    spare: list[Seat] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def add(self, seats: Sequence[Seat]) -> None:
        with self.changed:
            self.spare += seats
            self._fill()

    def drop(self, gone: Callable[[Seat], bool]) -> None:
        """Give up seats, the busy ones among them too; spare ones take their place."""
        with self.changed:
            self.all, self.idle, self.spare = (
                [seat for seat in seats if not gone(seat)] for seats in (self.all, self.idle, self.spare)
            )
            self._fill()

    def count(self, slot: Slot) -> int:
        with self.changed:
            return sum(seat.slot == slot for seat in self.all)

    def take(self, slot: Slot) -> Seat | None:
        """An idle seat: one that has an actor, if any has."""
        with self.changed:
            fitting = [seat for seat in self.idle if seat.slot == slot]
            if not fitting:
                return None
            seat = max(fitting, key=lambda seat: seat.actor is not None)
            self.idle = [other for other in self.idle if other is not seat]
            return seat

    def give(self, seat: Seat) -> None:
        """A seat that was taken is idle again, unless it has been given up meanwhile."""
        with self.changed:
            if any(other is seat for other in self.all):
                self.idle.append(seat)
                self.changed.notify_all()

    def _fill(self) -> None:
        """Use spare seats, of each node in turn, as far as the number of encoders allows."""
        turns: dict[tuple[str, Slot], int] = {}
        for seat in self.all:
            turns[seat.node, seat.slot] = turns.get((seat.node, seat.slot), 0) + 1
        queue = []
        for number, seat in enumerate(self.spare):
            turn = turns.get((seat.node, seat.slot), 0)
            turns[seat.node, seat.slot] = turn + 1
            queue.append((turn, number))
        used = set()
        for _, number in sorted(queue):
            seat = self.spare[number]
            if seat.slot == "head" or self.most is None or self.count("encoder") < self.most:
                used.add(number)
                self.all.append(seat)
                self.idle.append(seat)
        self.spare = [seat for number, seat in enumerate(self.spare) if number not in used]
        self.changed.notify_all()
