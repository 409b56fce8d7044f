"""Tokens of a spectrogram transformer, measured: which belong together, and where the frames that they make lie.

Every token sees the whole window, but what changes in the window changes the tokens at its own place most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..contract.contract import AnyFrontend
from ..contract.tokens import PREFIX, Tokens

MEASURED = "measured (where a change in the window shows)"
"""The contract's words for times of frames that see the whole window."""

_CHANGES = 6  # places in time
_SHARE = 16  # of the window that one of them changes
_MOST_LEADING = 4  # tokens
_MOST_BANDS = 64
_FEWEST_TIMES = 8
SURE = 0.95  # of the variance of where tokens change that a straight line in time explains
_EVEN = (0.85, 1.1)  # times * hop / window: frames of a whole grid span the window
_NEAR_WHOLE = 0.25  # of a hop: how far a hop of a whole number may move the last frame, to be taken for the measured one
_APART = 0.5  # share of how much tokens differ in what a change of bands does that their band explains

Values = npt.NDArray[np.float32]
Tokenise = Callable[[Values], npt.NDArray[np.float32]]
"""Values (1, length) or (1, length, bins) to tokens (tokens, dim)."""


class Times(NamedTuple):
    """Frames lie at `first + hop * number`, in the window's values. The line explains a share of what was seen."""

    hop: float
    first: float
    explained: float


class Changes:
    """How much each token of a window changes when a part of the window does."""

    def __init__(self, tokenise: Tokenise, values: Values) -> None:
        self._tokenise, self._values = tokenise, values
        self._plain = tokenise(values)
        self.tokens = len(self._plain)
        self.length = values.shape[1]

    def in_time(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The places (changes,) that were changed, in values, and the change (changes, tokens) of each token."""
        width = max(self.length // _SHARE, 1)
        starts = (np.arange(1, _CHANGES + 1) * self.length // (_CHANGES + 1)) - width // 2
        changes = []
        for seed, start in enumerate(starts.tolist(), 1):
            values = self._values.copy()
            values[0, start : start + width] = np.random.default_rng(seed).permuted(self._values[0], axis=0)[:width]
            changes.append(self._change(values))
        return starts + (width - 1) / 2, np.array(changes)

    def in_bands(self) -> npt.NDArray[np.float64]:
        """(2, tokens) the change of each token when the low, and when the high quarter of the bins change at every time."""
        bins = self._values.shape[2]
        changes = []
        for seed, part in enumerate((slice(0, bins // 4), slice(bins - bins // 4, bins)), 1):
            values = self._values.copy()
            values[..., part] = np.random.default_rng(seed).permuted(values[..., part], axis=1)
            changes.append(self._change(values))
        return np.array(changes)

    def _change(self, values: Values) -> npt.NDArray[np.float64]:
        difference = self._tokenise(values).astype(np.float64) - self._plain
        change: npt.NDArray[np.float64] = np.sqrt((difference**2).sum(axis=1))
        return change


def times(places: npt.NDArray[np.float64], changes: npt.NDArray[np.float64], tokens: Tokens) -> Times | None:
    """The times of a grid's frames by a straight line through where the patches of each band change most.

    Args:
        places: (changes,) that were changed, in values.
        changes: (changes, tokens) of each token.
        tokens: How the tokens lie.

    Returns:
        None if nothing changes.
    """
    patches = changes[:, tokens.prefix :]
    grid = patches.reshape(len(places), tokens.bands, -1)
    if tokens.first == "time":
        grid = patches.reshape(len(places), -1, tokens.bands).transpose(0, 2, 1)
    above = np.clip(grid - np.median(grid, axis=2, keepdims=True), 0, None) ** 2
    total = above.sum(axis=2)
    if not (total > 0).all():
        return None
    centers = (above * np.arange(grid.shape[2])).sum(axis=2) / total  # (changes, bands)
    x, y = centers.ravel(), np.repeat(places, tokens.bands)
    if np.ptp(x) == 0:
        return None
    hop, first = np.polyfit(x, y, 1)
    return Times(float(hop), float(first), float(np.corrcoef(x, y)[0, 1] ** 2))


def times_in_samples(measured: Times, frames: int, frontend: AnyFrontend | None, rate: int) -> tuple[int | float, float]:
    """The hop and the centre of the first frame, in samples.

    A hop near a whole number of frames of features, or of milliseconds, is that number, as encoders stride in these.

    Args:
        measured: In the window's values.
        frames: How many frames the window gives.
        frontend: Of a model that takes features.
        rate: Sampling rate in Hz.
    """
    unit = rate / 1000 if frontend is None else 1.0
    whole = max(round(measured.hop / unit), 1) * unit
    middle = measured.first + measured.hop * (frames - 1) / 2  # is known best
    hop = whole if abs(measured.hop - whole) * (frames - 1) / 2 <= _NEAR_WHOLE * whole else measured.hop
    first = middle - hop * (frames - 1) / 2
    if frontend is None:
        hop, center = hop, first + 0.5
    else:
        hop, center = hop * frontend.frame_samples, frontend.first_center_samples + first * frontend.frame_samples
    return (int(hop) if float(hop).is_integer() else hop), max(center, 0.0)


def find_grid(changes: Changes, *, has_bins: bool) -> Tokens | None:
    """The grid that the changes show, or None: first one whose bands lie one after the other, then one whose times do."""
    places, in_time = changes.in_time()
    fitting = [
        (measured.explained, tokens)
        for tokens in _grids(changes.tokens, "frequency")
        if (measured := _fitting(places, in_time, tokens, changes))
    ]
    if fitting:
        return max(fitting, key=lambda pair: pair[0])[1]
    return find_bands_within_times(changes) if has_bins else None


def find_bands_within_times(changes: Changes) -> Tokens | None:
    """The grid, if the bands of one time lie side by side; None if tokens differ in no such way.

    Only changes of bins show it, so the model must take features.
    """
    low, high = changes.in_bands()
    contrast = (low - high) / np.maximum(low + high, np.finfo(float).tiny)
    shares = {tokens: _explained_by_band(contrast, tokens) for tokens in _grids(changes.tokens, "time")}
    best = max(shares.values(), default=0.0)
    if best <= _APART:
        return None
    # A multiple of the bands explains as much: the fewest that do.
    tokens = min((tokens for tokens, share in shares.items() if share > 0.98 * best), key=lambda tokens: tokens.bands)
    return tokens if _fitting(*changes.in_time(), tokens, changes) else None


def flags(tokens: Tokens) -> str:
    """The options that declare these tokens."""
    prefix = f"--contract {PREFIX}prefix={tokens.prefix} " if tokens.prefix else ""
    return f"{prefix}--contract {PREFIX}grid={tokens.grid}"


def _grids(count: int, first: str) -> Iterator[Tokens]:
    for prefix in range(_MOST_LEADING + 1):
        for bands in range(2, _MOST_BANDS + 1):
            patches = count - prefix
            if patches % bands == 0 and patches // bands >= _FEWEST_TIMES:
                yield Tokens(prefix, bands, "frequency" if first == "frequency" else "time")


def _fitting(
    places: npt.NDArray[np.float64], in_time: npt.NDArray[np.float64], tokens: Tokens, changes: Changes
) -> Times | None:
    """The times of the frames, if they follow a straight line that spans the window."""
    measured = times(places, in_time, tokens)
    if measured is None or measured.explained < SURE:
        return None
    frames = (changes.tokens - tokens.prefix) // tokens.bands
    return measured if _EVEN[0] <= measured.hop * frames / changes.length <= _EVEN[1] else None


def _explained_by_band(contrast: npt.NDArray[np.float64], tokens: Tokens) -> float:
    """The share of the variance over tokens that the means of each band explain."""
    grid = contrast[tokens.prefix :].reshape(-1, tokens.bands)
    variance = float(grid.var())
    return float(grid.mean(axis=0).var()) / variance if variance > 0 else 0.0
