"""Frames of a model whose input is a fixed window: nothing can grow, so parts of the window are changed instead.

What changes in the output shows which axis holds the frames, and for a local model exactly which samples each frame sees.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract.contract import Contract
from ..contract.frame_law import FrameLaw, fit_frame_law, law_holds
from .frame_times import law_in_samples
from .layouts import movement, moving_axis
from .probe import Probe

_CHANGES = 3  # noises, because one may by chance change a few values along an axis that holds no frames


class Window:
    """A fixed window of noise, and the outputs `names` for it.

    `length` counts its values along time: samples, or frames of features, which are changed as a whole. `plain` are the
    outputs by name.
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
        """The axis of an output that holds frames; None for one vector per window.

        Raises:
            ContractError: No measurement shows it.
        """
        firsts, lasts = ([outputs[name] for outputs in group] for group in (self._firsts, self._lasts))
        return moving_axis(self.plain[name], firsts, lasts, batch)

    def movement(self, name: str, axis: int) -> float:
        """How far a change moves along an axis of an output, as a share of it, from the first to the last quarter."""
        firsts, lasts = ([outputs[name] for outputs in group] for group in (self._firsts, self._lasts))
        return movement(self.plain[name], firsts, lasts, axis)

    def measure_laws(self, contracts: Sequence[Contract]) -> list[FrameLaw | None]:
        """The frame law of each contract's output, in samples, from what each of its frames sees.

        None if its frames see the whole window, as with attention or a normalisation over it.
        """
        names = [contract.output for contract in contracts]
        adapters = [self._probe.session.adapter(contract) for contract in contracts]

        def frames_of(outputs: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[np.float32]]:
            return [adapter.frames(outputs[name], 1)[0] for name, adapter in zip(names, adapters, strict=True)]

        plain = frames_of(dict(zip(names, self._probe.run_values(names, self._noise), strict=True)))

        @functools.cache
        def changed_frames(start: int, stop: int) -> list[npt.NDArray[np.intp]]:
            """The frames of each output that see any of the values from `start` to `stop`."""
            changed = frames_of(self._changed(names, start, stop, 1))
            return [np.flatnonzero((a != b).any(axis=1)) for a, b in zip(changed, plain, strict=True)]

        def law_of(number: int) -> FrameLaw | None:
            def changed(start: int, stop: int) -> npt.NDArray[np.intp]:
                return changed_frames(start, stop)[number]

            law = _law_of_local_frames(changed, len(plain[number]), self.length)
            return None if law is None else law_in_samples(law, contracts[number].features)

        return [law_of(number) for number in range(len(contracts))]

    def _changed(self, names: list[str], start: int, stop: int, seed: int) -> dict[str, npt.NDArray[Any]]:
        """The outputs for other noise from `start` to `stop`, as loud as before, so that little else changes."""
        noise = self._noise.copy()
        noise[:, start:stop] = np.random.default_rng(seed).permuted(self._noise[0], axis=0)[: stop - start]
        return dict(zip(names, self._probe.run_values(names, noise), strict=True))


def _law_of_local_frames(
    changed_frames: Callable[[int, int], npt.NDArray[np.intp]], frames: int, length: int
) -> FrameLaw | None:
    """The law of frames that each see a part of the window, in the window's values; None if it shows none."""
    low, high = length // 4, 3 * length // 4

    def complete(values: int) -> int:
        """How many frames see the first values alone."""
        changed = changed_frames(values, length)
        return int(changed[0]) if len(changed) else frames

    def begun(values: int) -> int:
        """How many frames see any of the first values."""
        changed = changed_frames(0, values)
        return int(changed[-1]) + 1 if len(changed) else 0

    ends = fit_frame_law(complete, low, high)
    if ends is None or not law_holds(ends, complete, low, high):
        return None
    if begun(low) == frames:  # a recurrent model: a frame sees all that came before it
        return ends
    begins = fit_frame_law(begun, low, high)
    if begins is None or begins.hop != ends.hop or not law_holds(begins, begun, low, high):
        return None
    return FrameLaw(ends.hop, ends.receptive_field + begins.receptive_field - 1)
