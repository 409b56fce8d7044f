"""The events of a clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

# Seconds: far above the rounding of decimal times, far below the distance of two samples. A centre that lies no further
# before a boundary, of an event or of a segment, is taken to lie on it.
TOLERANCE_SECONDS = 1e-6


@dataclass(frozen=True)
class Events:
    """A clip's events, in any order; they may overlap, last no time, and reach beyond the clip.

    `onsets` and `offsets` (events,) seconds, `classes` (events,) class indices. `outside` counts the events of no known
    class; they are not among these.
    """

    onsets: Floats
    offsets: Floats
    classes: Indices
    outside: int = 0

    def within(self, seconds: float) -> Events:
        """The events cut to a clip of that length, without those that lie outside (or reach in by 1 us or less)."""
        onsets, offsets = self.onsets.clip(0, seconds), self.offsets.clip(0, seconds)
        instant = self.offsets - self.onsets <= TOLERANCE_SECONDS
        inside = np.where(instant, (self.onsets >= 0) & (self.onsets < seconds), offsets - onsets > TOLERANCE_SECONDS)
        return Events(onsets[inside], offsets[inside], self.classes[inside], self.outside)
