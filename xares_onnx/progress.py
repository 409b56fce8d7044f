"""Events that an observer receives while the package works. The package never prints; the command line draws these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

Stage = Literal["prepare", "embed", "train", "shots", "measure", "check", "inspect", "write", "download", "verify"]


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """How far a stage of one task is: `done` of `total` units.

    Units are files (`prepare`), clips (`embed`, `inspect`, `write`), steps (`train`), heads (`shots`), properties
    (`check`) or bytes (`download`, `verify`).
    """

    stage: Stage
    task: str
    done: int
    total: int


class Note(msgspec.Struct, frozen=True, tag="note"):
    """Something that the user must know: an assumption, a fallback, a loss. The result records it too."""

    text: str


class Doing(msgspec.Struct, frozen=True, tag="doing"):
    """What a worker is doing, for the message if it has to be stopped.

    `patience` is how many seconds it may be silent meanwhile, in addition to those of its call.
    """

    text: str
    patience: float = 0.0


Event = Progress | Note | Doing
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An observer that does nothing."""
