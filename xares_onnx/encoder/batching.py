"""Which chunks share a call of the model, so that a GPU works on more than one clip at a time."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Batching(msgspec.Struct, frozen=True):
    """The rule by which chunks share a call: equally long ones of a window of consecutive chunks.

    So the calls of a shard depend on the shard alone.
    """

    items: int = 1
    """Most chunks in a call."""
    call_samples: int = 0
    """Most samples of several chunks in a call."""
    window_samples: int = 0
    """A window ends with the chunk that makes it this long."""

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """The numbers of a window's chunks in each call, from their lengths in samples; the longest chunks first."""
        groups: list[list[int]] = []
        for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
            length = lengths[number]
            room = max(1, min(self.items, self.call_samples // length))
            if groups and lengths[groups[-1][0]] == length and len(groups[-1]) < room:
                groups[-1].append(number)
            else:
                groups.append([number])
        return groups
