"""The jobs of an evaluation: small picklable records, each a pure function of itself and of the files that it names.

A job may run twice, on any machine that sees these files, and leaves the same bytes: embeddings in the store, or an outcome
in a file. Only its report comes back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import msgspec

from ..embedding.embed import EmbedSpec, ShardReport, embed_shard
from ..embedding.joining import join_shard
from ..embedding.pieces import Piece

Slot = Literal["encoder", "head"]


class Job(Protocol):
    """What a scheduler knows of a job.

    Attributes:
        key: Names what the job makes; two jobs of equal keys make the same.
        group: The task that it works for.
        slot: What it occupies while it runs.
        weight: What it costs, in any unit that jobs of its slot share.
        memory: Bytes that it reads into memory; 0 for a job on an encoder, whose memory does not depend on the job.
        needs: Keys of the jobs that must be done before. A key that no scheduled job has counts as done.
    """

    @property
    def key(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def slot(self) -> Slot: ...
    @property
    def weight(self) -> float: ...
    @property
    def memory(self) -> int: ...
    @property
    def needs(self) -> tuple[str, ...]: ...


class EmbedJob(msgspec.Struct, frozen=True, kw_only=True):
    """Embed one shard or one piece of it, or join the pieces of one. Its report is a `ShardReport`."""

    key: str
    """The name in the store of the first tap's embeddings, `spec.name()`."""
    spec: EmbedSpec
    clips: int
    weight: float
    """Bytes of audio: known without decoding, and near to hours among the shards of a task. A join has its whole shard's,
    and so goes before further pieces."""
    joins: tuple[Piece, ...] = ()
    """The pieces to join; none to embed what the spec names."""
    complete: bool = True
    """Whether a join embeds the pieces that the store lacks; otherwise they are left to others."""
    slot: Literal["encoder"] = "encoder"
    memory: int = 0
    needs: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        return self.spec.task

    def call(self, device: str, threads: int) -> tuple[Callable[..., ShardReport], tuple[Any, ...]]:
        """What an encoder's process on this device has to call, as `function(*arguments, tell=...)`."""
        model = msgspec.structs.replace(self.spec.model, device=device, threads=threads)
        spec = msgspec.structs.replace(self.spec, model=model)
        return (join_shard, (spec, self.joins, self.complete)) if self.joins else (embed_shard, (spec,))


class HeadReport(msgspec.Struct, frozen=True):
    """The report of a head job: the keys that it lacks in the store (it then made nothing), else none."""

    lacking: tuple[str, ...] = ()


class HeadJob(msgspec.Struct, frozen=True, kw_only=True):
    """Call `function(*arguments, tell=...)`, which trains and scores on stored embeddings and returns a `HeadReport`."""

    key: str
    group: str
    function: Callable[..., HeadReport]
    """By its name in a module; it is pickled."""
    arguments: tuple[Any, ...]
    weight: float
    memory: int
    needs: tuple[str, ...]
    slot: Literal["head"] = "head"


AnyJob = EmbedJob | HeadJob
AnyReport = ShardReport | HeadReport
