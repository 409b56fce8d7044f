"""A large shard is embedded in pieces, each a job of its own: encoders share the shard, and a killed run loses little.

X-ARES's own tools make shards of up to 80 hours. The cut depends on the shard and on which of its clips are used, on nothing
else, so that every run and every part of a job array finds the same pieces.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import msgspec

PIECE_BYTES = 128 << 20  # of audio: 70 minutes of 16-bit PCM at 16 kHz, which take a base-size encoder ten on a core


class Piece(msgspec.Struct, frozen=True):
    """The clips of a shard that are used, from number `first` to before number `stop`, in the order of the tar."""

    first: int
    stop: int

    def name(self, key: str) -> str:
        """The store's name of this piece of a shard whose own name is `key`."""
        return f"{key}.{self.first}-{self.stop}"


def shard_of(name: str) -> str:
    """The store's name of the shard that a piece is of; a shard's own name stays as it is."""
    return name.partition(".")[0]


def cut(sizes: Sequence[int], piece_bytes: int) -> list[Piece]:
    """Cut a shard into pieces of about equal bytes, as few as hold `piece_bytes` each in the mean.

    Args:
        sizes: Bytes of the audio of each clip, in the order of the tar.
        piece_bytes: Of a piece, but for its last clip.

    Returns:
        Pieces that hold every clip once, in order; none is empty, unless there is no clip.
    """
    total = sum(sizes)
    count = math.ceil(total / piece_bytes)
    pieces = []
    starts = itertools.accumulate(sizes, initial=0)
    numbered = itertools.groupby(zip(range(len(sizes)), starts, strict=False), lambda clip: clip[1] * count // total)
    if count > 1:
        for _, clips in numbered:
            numbers = [number for number, _ in clips]
            pieces.append(Piece(numbers[0], numbers[-1] + 1))
    return pieces or [Piece(0, len(sizes))]


def most_pieces(shard_bytes: int, piece_bytes: int) -> int:
    """The number of pieces that a shard has at most, by its size alone."""
    return max(1, math.ceil(shard_bytes / piece_bytes))
