"""The events of a clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# Far above the rounding of decimal times, far below the distance of two samples. A frame centre that lies less than this
# before a boundary of an event or segment counts as on it.
TOLERANCE_SECONDS = 1e-6


@dataclass(frozen=True)
class Events:
    """A clip's events, in any order; they may overlap, have no length, and reach beyond the clip.

    `onsets` and `offsets` (events,) are in seconds, `classes` (events,) are class indices. `outside` counts further events,
    whose class is unknown.
    """

    onsets: Floats
    offsets: Floats
    classes: Indices
    outside: int = 0

    def within(self, seconds: float) -> Events:
        """The events cut to a clip of `seconds`, without those that lie outside (or reach in by 1 us or less)."""
        onsets, offsets = self.onsets.clip(0, seconds), self.offsets.clip(0, seconds)
        instant = self.offsets - self.onsets <= TOLERANCE_SECONDS
        inside = np.where(instant, (self.onsets >= 0) & (self.onsets < seconds), offsets - onsets > TOLERANCE_SECONDS)
        return Events(onsets[inside], offsets[inside], self.classes[inside], self.outside)
