"""How a model is called: waveforms to its inputs, its output to (items, frames, dim), as its contract says.

A layout has one letter per axis: B the batch, T the time, F the bins of features, D the dimension, 1 an axis of size one.
Features are computed here, so that all callers of a model count in samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ContractError, quoted
from .contract.contract import Contract
from .features import features_of

FLOAT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
LENGTH_TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
MASK_TYPES = {**FLOAT_TYPES, **LENGTH_TYPES, "tensor(bool)": np.bool_}


class Adapter:
    """Fills a model's inputs and reads its output.

    Args:
        contract: The model's layouts, amplitude and front end.
        types: The type of each input by name, as ONNX Runtime writes it, such as `tensor(float)`.
    """

    def __init__(self, contract: Contract, types: Mapping[str, str]) -> None:
        self._contract = contract
        self._types = types

    def feeds(self, waveforms: npt.NDArray[np.float32], held: Sequence[int] | None = None) -> dict[str, npt.NDArray[Any]]:
        """The model's inputs, by name.

        Lengths count every sample, or frame of features, with padding: many models build a mask of max(lengths), and fail if
        that is shorter than the input. A fixed batch is filled up by repeating the waveforms.

        Args:
            waveforms: (items, samples) in [-1, 1].
            held: How many leading samples of each are the clip's own, and not padding; all by default.
        """
        contract, (items, samples) = self._contract, waveforms.shape
        own = np.maximum(samples if held is None else held, min(self._least_held(), samples))
        own = np.broadcast_to(own, items)
        if contract.frontend is not None:
            own = np.array([contract.frontend.frames_held(int(count)) for count in own])
        return self.feeds_of(self.values(waveforms, held), own)

    def values(self, waveforms: npt.NDArray[np.float32], held: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
        """Waveforms (items, samples) at the model's amplitude, or their features (items, frames, bins)."""
        values = waveforms * np.float32(32768) if self._contract.amplitude == "int16" else waveforms
        return values if self._contract.frontend is None else features_of(values, self._contract.frontend, held)

    def feeds_of(
        self, values: npt.NDArray[np.float32], own: npt.NDArray[np.intp] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """The model's inputs, by name, for what `values` returned.

        `own` (items,) says how many leading samples or frames of each are not padding; all by default.
        """
        contract, (items, length) = self._contract, values.shape[:2]
        rows = np.arange(contract.fixed_batch or items) % items
        if len(rows) != items:
            values = values[rows]
        feeds: dict[str, npt.NDArray[Any]] = {contract.input: self._arranged(values)}
        if contract.lengths_input is not None:
            dtype = LENGTH_TYPES[self._types[contract.lengths_input]]
            feeds[contract.lengths_input] = np.full(len(rows), length, dtype=dtype)
        if contract.mask_input is not None:
            mask = np.arange(length) < np.broadcast_to(length if own is None else own, items)[rows][:, None]
            feeds[contract.mask_input] = mask.astype(MASK_TYPES[self._types[contract.mask_input]])
        for name, constant in (contract.constants or {}).items():
            feeds[name] = constant.array(len(rows))
        return feeds

    def _arranged(self, values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """(batch, samples) or (batch, frames, bins) in the layout and type of the input."""
        layout = self._contract.input_layout
        letters = layout.replace("1", "")
        if "B" not in letters:
            values = values[0]
        present = [axis for axis in "BTF" if axis in letters]
        values = values.transpose([present.index(axis) for axis in letters])
        sizes = dict(zip(letters, values.shape, strict=True))
        arranged = values.reshape([sizes.get(axis, 1) for axis in layout])
        return np.ascontiguousarray(arranged, FLOAT_TYPES[self._types[self._contract.input]])

    def _least_held(self) -> int:
        """The samples of one frame: a mask counts at least these, because a model that sees only padding may give NaN."""
        contract = self._contract
        if not contract.fixed_window:
            return contract.min_samples
        return math.ceil(max(contract.receptive_field_samples or 0, contract.hop_samples or 0, 1))

    def frames(self, result: npt.NDArray[Any], items: int) -> npt.NDArray[np.float32]:
        """The model's output as float32 (items, frames, dim); a clip-only encoder gives one frame.

        Args:
            result: The output as the model gives it.
            items: How many waveforms it was fed.

        Raises:
            ContractError: Its rank or its axes of size one are not those that were measured, or its tokens are no grid.
        """
        layout, output = self._contract.output_layout, self._contract.output
        if result.ndim != len(layout):
            raise ContractError(f"output {quoted(output)} changes its rank from {len(layout)} to {result.ndim}")
        single = tuple(i for i, axis in enumerate(layout) if axis == "1")
        if any(result.shape[i] != 1 for i in single):
            raise ContractError(f"output {quoted(output)} has shape {list(result.shape)}, but {layout} was measured")
        axes = layout.replace("1", "")
        result = np.squeeze(result.astype(np.float32, copy=False), single)
        result = result.transpose([axes.index(axis) for axis in "BTD" if axis in axes])
        if "T" not in axes:
            result = result[..., None, :]
        if "B" not in axes:
            result = result[None]
        result = result if self._contract.fixed_batch is None else result[:items]
        return self._contract.tokens.frames(result, output) if self._contract.tokens and "T" in axes else result
