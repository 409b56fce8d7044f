"""What an evaluation is asked to do, checked before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from ..data.task import HEAD_KINDS, HEADS, HeadKind, Task
from ..errors import UsageError, nearest
from ..scoring.protocol import Protocol, ProtocolName

Method = Literal["head", "knn"]
METHODS: tuple[Method, ...] = ("head", "knn")
MAX_SEEDS = 100


def family_of(method: str) -> Method:
    """`knn` for nearest neighbours, `head` for a trained head of any kind (`linear`, `ctc`, ...)."""
    return "knn" if method == "knn" else "head"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What an evaluation was asked to do; in the record as it is."""

    protocol: ProtocolName = "corrected"
    seeds: int = 3
    methods: tuple[Method, ...] = METHODS
    limit: int | None = None
    allow_drops: bool = False
    heads: dict[str, HeadKind] = {}
    """Heads other than the tasks' own, by task."""
    lm: str | None = None
    vocabulary: str | None = None
    taps: tuple[str, ...] = ()
    """Outputs or inner tensors to score, or `all-layers`; none: the model's output."""
    trust: bool = False
    """Whether the limits on the model's size, memory and time were lifted."""


def checked_settings(
    protocol: ProtocolName,
    seeds: int | None,
    methods: Sequence[Method],
    limit: int | None,
    allow_drops: bool,
    heads: Sequence[str],
    lm: str | None,
    vocabulary: Path | None,
    taps: Sequence[str],
    trust: bool,
) -> Settings:
    if protocol not in ("corrected", "xares"):
        raise UsageError(f"protocol {protocol!r} must be corrected or xares")
    if unknown := [method for method in methods if method not in METHODS]:
        raise UsageError(f"method {unknown[0]!r} must be head or knn")
    seeds = seeds if seeds is not None else Protocol(protocol).default_seeds
    if not 1 <= seeds <= MAX_SEEDS:
        raise UsageError(f"--seeds {seeds} must lie between 1 and {MAX_SEEDS}")
    if limit is not None and limit < 1:
        raise UsageError(f"--limit {limit} must be 1 or more")
    chosen = tuple(method for method in METHODS if method in methods) or METHODS
    by_task: dict[str, HeadKind] = {}
    for pair in heads:
        task, _, kind = pair.partition("=")
        if kind not in HEAD_KINDS:
            raise UsageError(f"--head {pair!r} must read TASK=KIND, with a kind of {', '.join(HEAD_KINDS)}")
        by_task[task] = kind
    return Settings(
        protocol=protocol,
        seeds=seeds,
        methods=chosen,
        limit=limit,
        allow_drops=allow_drops,
        heads=by_task,
        lm=lm,
        vocabulary=None if vocabulary is None else str(vocabulary),
        taps=tuple(taps),
        trust=trust,
    )


def with_heads(selection: Sequence[tuple[Task, Path]], settings: Settings) -> list[tuple[Task, Path]]:
    """The tasks with the heads that were asked for. Under X-ARES's protocol a language model that is named is its own."""
    names = [task.name for task, _ in selection]
    if unknown := [name for name in settings.heads if name not in names]:
        raise UsageError(
            f"--head {unknown[0]}={settings.heads[unknown[0]]} names no task that is scored{nearest(unknown[0], names)}"
        )
    found = []
    for task, folder in selection:
        wanted = settings.heads.get(task.name)
        if wanted is None and settings.protocol == "xares" and settings.lm and "llm" in HEADS[task.kind]:
            wanted = "llm"
        found.append((task.with_head(wanted) if wanted else task, folder))
        if found[-1][0].head.kind == "llm" and settings.lm is None:
            raise UsageError(f"the llm head of {task.name} needs a language model; name its folder by --lm")
    return found
