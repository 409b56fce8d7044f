"""What the verbs tell an observer while they work. They never print; the command line draws these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

Stage = Literal["prepare", "embed", "train", "shots", "measure", "check", "inspect", "write", "download", "verify"]


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """`done` of `total` units of a stage of one task: clips to embed, training steps, heads on few clips, files to prepare,
    properties to check, clips to inspect and to write into shards, bytes to download or verify.
    """

    stage: Stage
    task: str
    done: int
    total: int


class Note(msgspec.Struct, frozen=True, tag="note"):
    """Something the user must know: an assumption, a fallback, a loss. Recorded in the result too."""

    text: str


class Doing(msgspec.Struct, frozen=True, tag="doing"):
    """What a worker is busy with, so that a worker that had to be stopped can be described; and the seconds of silence that
    it may keep meanwhile beyond those of its call."""

    text: str
    patience: float = 0.0


Event = Progress | Note | Doing
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The observer of nobody."""
