"""The chunks that share a call of the model, so that a GPU works on more than one clip at a time."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Batching(msgspec.Struct, frozen=True):
    """The rule by which chunks share a call: chunks of equal length, out of a window of consecutive chunks.

    So the calls of a shard depend on the shard alone.
    """

    items: int = 1
    """Maximum number of chunks per call."""
    call_samples: int = 0
    """Maximum number of samples in a call of several chunks."""
    window_samples: int = 0
    """A window ends with the chunk that makes it this long."""

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Divide a window's chunks into calls, the longest chunks first.

        Args:
            lengths: Samples of each chunk of the window.

        Returns:
            Numbers of the chunks in each call.
        """
        groups: list[list[int]] = []
        for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
            length = lengths[number]
            room = max(1, min(self.items, self.call_samples // length))
            if groups and lengths[groups[-1][0]] == length and len(groups[-1]) < room:
                groups[-1].append(number)
            else:
                groups.append([number])
        return groups
