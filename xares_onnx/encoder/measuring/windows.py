"""Frames of a model whose input is a fixed window: nothing grows there, so parts of the window are changed instead.

What changes in the output says which axis holds the frames, and of a local model exactly which samples each frame sees.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract.frame_law import fit_frame_law, law_holds
from .layouts import moving_axis
from .probe import Probe

_CHANGES = 3  # noises, since one may by chance move a few values along an axis that holds no frames


class Window:
    """A fixed window of `samples` and what the outputs `names` are for one noise.

    Of a model that takes features it is a window of so many frames of them: each is changed as a whole.
    """

    def __init__(self, probe: Probe, names: list[str], samples: int) -> None:
        self._probe, self._names = probe, names
        self._noise = probe.adapter.values(probe.noise(samples))
        self.length = self._noise.shape[1]
        self.plain = dict(zip(names, probe.run_values(names, self._noise), strict=True))
        quarter = self.length // 4
        self._firsts = [self._changed(names, 0, quarter, seed) for seed in range(1, _CHANGES + 1)]
        self._lasts = [self._changed(names, self.length - quarter, self.length, seed) for seed in range(1, _CHANGES + 1)]

    def time_axis(self, name: str, batch: int | None) -> int | None:
        """The axis of an output that holds frames; None for one vector a window. `ContractError` where it cannot be seen."""
        firsts, lasts = ([outputs[name] for outputs in group] for group in (self._firsts, self._lasts))
        return moving_axis(self.plain[name], firsts, lasts, batch)

    def measure_frames(self) -> tuple[int, int] | None:
        """Hop and receptive field (`FrameLaw`'s) from the samples, or frames of features, that each output frame sees.

        None where frames see the whole window, as with attention or a normalisation over it.
        """
        (output,) = self._probe.run_values([self._probe.contract.output], self._noise)
        plain = self._probe.adapter.frames(output, 1)[0]
        low, high = self.length // 4, 3 * self.length // 4

        def differ(start: int, stop: int) -> npt.NDArray[np.intp]:
            (output,) = self._changed([self._probe.contract.output], start, stop, 1).values()
            frames = self._probe.adapter.frames(output, 1)[0]
            return np.flatnonzero((frames != plain).any(axis=1))

        def ended(samples: int) -> int:
            """How many frames lie within the first samples."""
            changed = differ(samples, self.length)
            return int(changed[0]) if len(changed) else len(plain)

        def begun(samples: int) -> int:
            """How many frames see any of the first samples."""
            changed = differ(0, samples)
            return int(changed[-1]) + 1 if len(changed) else 0

        ends = fit_frame_law(ended, low, high)
        if ends is None or not law_holds(ends, ended, low, high):
            return None
        if begun(low) == len(plain):  # a recurrent model: a frame sees all that came before it
            return ends.hop, ends.receptive_field
        begins = fit_frame_law(begun, low, high)
        if begins is None or begins.hop != ends.hop or not law_holds(begins, begun, low, high):
            return None
        return ends.hop, ends.receptive_field + begins.receptive_field - 1

    def _changed(self, names: list[str], start: int, stop: int, seed: int) -> dict[str, npt.NDArray[Any]]:
        """Outputs for other noise from `start` to `stop`, as loud as before, so that little else moves."""
        noise = self._noise.copy()
        noise[:, start:stop] = np.random.default_rng(seed).permuted(self._noise[0], axis=0)[: stop - start]
        return dict(zip(names, self._probe.run_values(names, noise), strict=True))
