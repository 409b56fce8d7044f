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
    """Every seat of the nodes that take part, and which of them are idle. Guarded by `changed`."""

    most: int | None
    all: list[Seat] = field(default_factory=list)
    idle: list[Seat] = field(default_factory=list)
    spare: list[Seat] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def add(self, seats: Sequence[Seat]) -> None:
        self.spare += seats
        self._fill()

    def drop(self, gone: Callable[[Seat], bool]) -> None:
        self.all = [seat for seat in self.all if not gone(seat)]
        self.idle = [seat for seat in self.idle if not gone(seat)]
        self.spare = [seat for seat in self.spare if not gone(seat)]
        self._fill()

    def count(self, slot: Slot) -> int:
        return sum(seat.slot == slot for seat in self.all)

    def take(self, slot: Slot) -> Seat | None:
        """An idle seat: one that has an actor, if any has."""
        fitting = [seat for seat in self.idle if seat.slot == slot]
        if not fitting:
            return None
        seat = max(fitting, key=lambda seat: seat.actor is not None)
        self.idle.remove(seat)
        return seat

    def give(self, seat: Seat) -> None:
        if any(other is seat for other in self.all):
            self.idle.append(seat)
            self.changed.notify_all()

    def _fill(self) -> None:
        """Use spare seats, of each node in turn, as far as the number of encoders allows."""
        by_turn: dict[tuple[str, Slot], int] = {}

        def turn(seat: Seat) -> int:
            number = by_turn.get((seat.node, seat.slot), sum(s.node == seat.node and s.slot == seat.slot for s in self.all))
            by_turn[seat.node, seat.slot] = number + 1
            return number

        for _, _, seat in sorted((turn(seat), number, seat) for number, seat in enumerate(self.spare)):
            if seat.slot == "head" or self.most is None or self.count("encoder") < self.most:
                self.spare = [other for other in self.spare if other is not seat]
                self.all.append(seat)
                self.idle.append(seat)
        self.changed.notify_all()
