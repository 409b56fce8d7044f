"""The settings of an evaluation, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from ..data.task import HEAD_KINDS, HEADS, HeadKind, Task
from ..encoder.spec import ModelOptions
from ..errors import UsageError, nearest
from ..scoring.mixing import MIX, check_mix
from ..scoring.protocol import Protocol, ProtocolName
from ..scoring.shots import checked_shots

Method = Literal["head", "knn"]
METHODS: tuple[Method, ...] = ("head", "knn")
MAX_SEEDS = 100


def family_of(method: str) -> Method:
    """`knn` for nearest neighbours, `head` for a trained head of any kind (`linear`, `ctc`, ...)."""
    return "knn" if method == "knn" else "head"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How tasks are scored. The result records it as it is."""

    protocol: ProtocolName = "corrected"
    seeds: int = 3
    methods: tuple[Method, ...] = METHODS
    limit: int | None = None
    allow_drops: bool = False
    heads: dict[str, HeadKind] = {}
    """By task, heads that replace the task's own."""
    lm: str | None = None
    vocabulary: str | None = None
    taps: tuple[str, ...] = ()
    """Outputs or inner tensors to score, `all-layers`, `mix`; empty for the model's output."""
    shots: tuple[int, ...] = ()
    """Numbers of training clips per class that heads are scored with as well."""
    trust: bool = False
    """Whether the limits on the model's size, memory and time were lifted."""

    @property
    def mix(self) -> bool:
        """Whether the learned mix of all taps is scored too."""
        return MIX in self.taps


def checked_settings(
    options: ModelOptions,
    *,
    protocol: ProtocolName,
    seeds: int | None,
    limit: int | None,
    heads: Sequence[str],
    lm: str | None,
    vocabulary: Path | None,
    methods: Sequence[Method] = METHODS,
    allow_drops: bool = False,
    shots: Sequence[int] = (),
) -> Settings:
    """The settings that these arguments ask for; `heads` holds "TASK=KIND". Raises `UsageError` for an invalid argument."""
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
    if shots and protocol != "corrected":
        raise UsageError("--shots is not part of protocol xares; leave --protocol out")
    if shots and "head" not in chosen:
        raise UsageError("--shots trains heads, which --method knn leaves out; leave --method out")
    check_mix(options.taps, corrected=protocol == "corrected", heads="head" in chosen)
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
        taps=options.taps,
        shots=checked_shots(shots),
        trust=options.trust,
    )


def with_heads(selection: Sequence[tuple[Task, Path]], settings: Settings) -> list[tuple[Task, Path]]:
    """The selection (tasks with their data folders), each task with the head that the settings choose.

    Under X-ARES's protocol a task that may have the `llm` head takes it if `lm` is set. Raises `UsageError` if a head's task
    is not selected, or if an `llm` head lacks its language model.
    """
    names = [task.name for task, _ in selection]
    if unknown := [name for name in settings.heads if name not in names]:
        raise UsageError(
            f"--head {unknown[0]}={settings.heads[unknown[0]]} names a task that is not selected{nearest(unknown[0], names)}"
        )
    tasks = []
    for task, folder in selection:
        kind = settings.heads.get(task.name)
        if kind is None and settings.protocol == "xares" and settings.lm and "llm" in HEADS[task.kind]:
            kind = "llm"
        if kind is not None:
            task = task.with_head(kind)
        if task.head.kind == "llm" and settings.lm is None:
            raise UsageError(f"the llm head of {task.name} needs a language model; name its folder by --lm")
        tasks.append((task, folder))
    return tasks
