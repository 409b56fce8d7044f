"""Tokens of a spectrogram transformer: a few that lead, then a grid of patches, so many bands at every time.

A patch grid has frames only once the patches of one time are put together.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from ...errors import ContractError, quoted

PREFIX = "tokens."
KEYS = {f"{PREFIX}{name}": kind for name, kind in {"prefix": int, "grid": str, "bands": str, "use": str}.items()}
CHOICES = {f"{PREFIX}bands": frozenset({"mean", "concat"}), f"{PREFIX}use": frozenset({"frames", "prefix"})}
GRID_FORM = "12xT for 12 bands at every time with the frequency first, or Tx12 with the time first"
_GRID = re.compile(r"([1-9]\d{0,3})xT|Tx([1-9]\d{0,3})")
MOST_PREFIX = 1024


class Tokens(msgspec.Struct, frozen=True):
    """How the tokens of an output lie.

    `prefix` tokens lead. The rest are patches of `bands` bands: all times of the first band first if `first` is frequency,
    all bands of the first time if it is time. `join` says how the bands of one time become one frame. With `use` prefix the
    leading tokens are the vector of a clip, their mean, and the patches are dropped.
    """

    prefix: int = 0
    bands: int = 1
    first: Literal["frequency", "time"] = "frequency"
    join: Literal["mean", "concat"] = "mean"
    use: Literal["frames", "prefix"] = "frames"

    @property
    def grid(self) -> str:
        """As it is declared."""
        return f"{self.bands}xT" if self.first == "frequency" else f"Tx{self.bands}"

    def frames(self, tokens: npt.NDArray[np.float32], output: str) -> npt.NDArray[np.float32]:
        """Tokens (items, tokens, dim) to frames (items, times, dim), or (items, times, bands * dim) if they are joined.

        Raises:
            ContractError: There are no such tokens, or the rest is no grid of these bands.
        """
        items, count, dim = tokens.shape
        patches = count - self.prefix
        if patches < self.bands or patches % self.bands:
            raise ContractError(
                f"output {quoted(output)} gives {count} tokens, which are not {self.prefix} and a grid of {self.bands} "
                f"bands; correct --contract {PREFIX}prefix=N or {PREFIX}grid=12xT"
            )
        if self.use == "prefix":
            vector: npt.NDArray[np.float32] = tokens[:, : self.prefix].mean(axis=1, keepdims=True, dtype=np.float32)
            return vector
        shape = (items, self.bands, -1, dim) if self.first == "frequency" else (items, -1, self.bands, dim)
        grid = tokens[:, self.prefix :].reshape(shape)
        if self.first == "frequency":
            grid = grid.transpose(0, 2, 1, 3)  # (items, times, bands, dim)
        if self.join == "mean":
            mean: npt.NDArray[np.float32] = grid.mean(axis=2, dtype=np.float32)
            return mean
        return np.ascontiguousarray(grid).reshape(items, -1, self.bands * dim)


def parsed_grid(text: str) -> tuple[int, Literal["frequency", "time"]]:
    """Bands, and what runs first, of `12xT` or `Tx12`.

    Raises:
        ValueError: It is neither.
    """
    match = _GRID.fullmatch(text)
    if not match:
        raise ValueError
    return (int(match[1]), "frequency") if match[1] else (int(match[2]), "time")


def make_tokens(values: dict[str, Any], source: str) -> Tokens | None:
    """What is declared by `tokens.` keys, without their prefix; None if nothing is.

    Raises:
        ContractError: Leading tokens are to be used, and there are none.
    """
    if not values:
        return None
    bands, first = parsed_grid(values.get("grid", "1xT"))
    tokens = Tokens(int(values.get("prefix", 0)), bands, first, values.get("bands", "mean"), values.get("use", "frames"))
    if tokens.use == "prefix" and not tokens.prefix:
        raise ContractError(f"{source} declares {PREFIX}use=prefix, but no leading tokens; declare {PREFIX}prefix=N")
    return tokens
