"""Windows that a model takes one by one, closer than their length: each gives one vector, which is a frame of the clip."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from ...errors import ContractError, ContradictionError, quoted
from .frontend import WINDOWS

PREFIX = "window."
KEYS = {f"{PREFIX}{name}": int for name in ("frames", "hop_frames", "samples", "hop_samples")}
MOST_PER_CALL = 64


class Windows(msgspec.Struct, frozen=True):
    """Windows of `length` values of the model's input, `hop` values apart: frames of features, or samples of a waveform.

    A call takes up to `per_call` windows; `batch` is their number if the graph fixes it, and free places repeat the first.
    """

    length: int
    hop: int
    per_call: int = MOST_PER_CALL
    batch: int | None = None

    def count(self, values: int) -> int:
        """How many windows lie whole in so many values."""
        return max(0, (values - self.length) // self.hop + 1)

    def cut(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """(items, values) or (items, values, bins) to (items, windows, length) or (items, windows, length, bins), a view."""
        if values.shape[1] < self.length:
            return np.empty((len(values), 0, self.length, *values.shape[2:]), np.float32)
        windows: npt.NDArray[np.float32] = np.moveaxis(sliding_window_view(values, self.length, axis=1), -1, 2)
        return windows[:, :: self.hop]


def make_windows(
    values: dict[str, Any],
    source: str,
    *,
    name: str,
    axis: int | None,
    batch: int | None,
    features: bool,
    preset: str | None,
) -> tuple[Windows | None, dict[str, str]]:
    """The declared windows, or those that a preset's models are used with.

    Args:
        values: What is declared by `window.` keys, without their prefix.
        source: Where it is declared.
        name: The input's name.
        axis: The only number of frames or samples that the input takes; None if it takes many.
        batch: The only batch that it takes, which is 1 without an axis for it; None if it takes any.
        features: Whether the input takes frames of features.
        preset: The front end's preset.

    Returns:
        The windows, or None if there are none, and the source of each key.

    Raises:
        ContradictionError: The declared length is not the graph's.
        ContractError: The declarations do not fit the input, or each other.
    """
    unit, other = ("frames", "samples") if features else ("samples", "frames")
    length_key, hop_key = unit, f"hop_{unit}"
    usual = WINDOWS.get(preset or "", {})
    if not values and axis not in usual:
        return None, {}
    if wrong := [key for key in values if key.endswith(other)]:
        takes = "features" if features else "a waveform"
        raise ContractError(
            f"{source} declares {PREFIX}{wrong[0]}={values[wrong[0]]}, but input {quoted(name)} takes {takes}; declare "
            f"--contract {PREFIX}{wrong[0].replace(other, unit)}=N"
        )
    length = values.get(length_key, axis)
    if length is None:
        raise ContractError(
            f"{source} declares {PREFIX}{hop_key}={values[hop_key]}, but input {quoted(name)} takes any number of {unit}; "
            f"declare the window too, by --contract {PREFIX}{length_key}=N"
        )
    if axis is not None and length != axis:
        raise ContradictionError(
            f"{source} declares {PREFIX}{length_key}={length}, but input {quoted(name)} takes exactly {axis} {unit}; "
            "correct the declaration",
            about="input",
        )
    sources = {PREFIX + length_key: source if length_key in values else "graph", PREFIX + hop_key: source}
    if hop_key in values:
        hop = values[hop_key]
    elif length in usual:
        hop, sources[PREFIX + hop_key] = usual[length], f"preset {preset}"
    else:
        hop, sources[PREFIX + hop_key] = length, "default (end to end)"
    if hop > length:
        raise ContractError(
            f"{source} declares {PREFIX}{hop_key}={hop}, more than the window of {length} {unit}, so that what lies between "
            f"would be lost; declare --contract {PREFIX}{hop_key}=N with N up to {length}"
        )
    return Windows(length, hop, min(batch or MOST_PER_CALL, MOST_PER_CALL), batch), sources
