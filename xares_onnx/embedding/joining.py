"""A shard's pieces become the one file per shard and tap that everything else reads.

The joined file has the bytes that it would have if the shard had been embedded at once, apart from the model's own rounding
if chunks share calls. Two processes may join the same shard: each writes the same, and whoever is second finds the pieces
gone and the shard there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext

import msgspec
import numpy as np

from ..encoder.worker import Beat, Tell
from ..errors import MachineError
from ..progress import Doing, Event, Progress
from .embed import EmbedSpec, ShardReport, check_shard, embed_shard, header_of, in_order, indexed, used_drops
from .pieces import Piece
from .store import EmbeddedShard, PieceGoneError, Store

_DISK_SECONDS = 900.0  # longest wait for a slow disk
_ROUNDS = 3  # in which pieces may be removed or damaged between their check and the join


def join_shard(spec: EmbedSpec, pieces: tuple[Piece, ...], complete: bool, *, tell: Tell) -> ShardReport:
    """Join all pieces of a shard in the store, and remove them.

    Args:
        spec: Of the whole shard.
        pieces: All that it has.
        complete: Whether to embed pieces that the store lacks. Otherwise the shard is left to whoever embeds these.
        tell: Receives events and signs of life.

    Raises:
        MachineError: Pieces vanish again and again, or the disk cannot be written to.
    """
    started = time.perf_counter()

    def quietly(event: Event | Beat) -> None:
        tell(Beat() if isinstance(event, Progress) else event)  # these clips were counted with their pieces' own jobs

    store, embedded = Store(spec.store), list[ShardReport]()
    keys = [spec.key(tap) for tap in range(len(spec.model.info.taps))]
    for _ in range(_ROUNDS):
        tell(Doing("joining the pieces of a shard", _DISK_SECONDS))
        lacking = [piece for piece in pieces if not _are_there(store, [piece.name(key) for key in keys])]
        if lacking and not _are_there(store, keys):
            if not complete:
                break
            reports = [embed_shard(msgspec.structs.replace(spec, piece=piece), tell=quietly) for piece in lacking]
            embedded += reports
            continue
        try:
            if not lacking:
                _join(store, spec, keys, pieces, tell)
        except PieceGoneError:  # another process has joined and removed them, or somebody has pruned the store
            continue
        for key in keys:
            store.remove_pieces(key)
        break
    else:
        raise MachineError(f"the pieces of {spec.shard.name} vanish from {store.root} again and again; run again")
    clips, seconds = sum(report.clips for report in embedded), sum(report.audio_seconds for report in embedded)
    return ShardReport(keys[0], clips, float(seconds), time.perf_counter() - started)


def _join(store: Store, spec: EmbedSpec, keys: Sequence[str], pieces: Sequence[Piece], tell: Tell) -> None:
    index = indexed(spec.shard, spec.shard_stamp)
    check_shard(spec)
    for key, tap in zip(keys, spec.model.info.taps, strict=True):
        framed = spec.frames and not tap.contract.clip_only
        parts = []
        with store.spool(key, tap.contract.dim) if framed else nullcontext() as spool:
            for piece in pieces:
                tell(Beat())
                part = store.read(piece.name(key), frames=False)
                if part is None:
                    raise PieceGoneError
                parts.append(part)
                if spool is not None:
                    store.copy_frames(piece.name(key), spool)
            clips = [clip for part in parts for clip in part.clips]
            drops = [*used_drops(index, spec.selected), *(drop for part in parts for drop in part.drops)]
            firsts = np.cumsum([0, *(len(part.clips) for part in parts)])
            joined = EmbeddedShard(
                header_of(spec, clips, len(drops), index.damage),
                np.concatenate([part.pooled for part in parts]),
                np.concatenate([part.clip_of_crop + first for part, first in zip(parts, firsts, strict=False)]),
                clips,
                in_order(drops),
            )
            store.write(key, joined, spool)


def _are_there(store: Store, names: Sequence[str]) -> bool:
    """Whether the store has all of these, undamaged."""
    return all(name in store for name in names) and all(store.read(name, frames=False) is not None for name in names)
