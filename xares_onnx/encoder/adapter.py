"""How a model is called: waveforms to its inputs, its output to (items, frames, dim), as its contract says.

A layout has one letter per axis: B the batch, T the time, F the bins of features, D the dimension, 1 an axis of size one.
Features are computed here, so that all callers of a model count in samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ContractError, ModelError, quoted
from .contract.contract import Contract, FrontendModel
from .features import features_of

FLOAT_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
LENGTH_TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
MASK_TYPES = {**FLOAT_TYPES, **LENGTH_TYPES, "tensor(bool)": np.bool_}


Run = Callable[[list[str], dict[str, npt.NDArray[Any]]], list[npt.NDArray[Any]]]
"""Gives the named outputs of a model for its inputs by name."""


class Graph(Protocol):
    """A loaded graph: the type of each input by name, as ONNX Runtime writes it, such as `tensor(float)`."""

    types: dict[str, str]

    def run_raw(self, outputs: list[str], feeds: dict[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]: ...


class Adapter:
    """Fills a model's inputs and reads its output.

    Args:
        contract: The model's layouts, amplitude and front end.
        types: The type of each input by name, as ONNX Runtime writes it, such as `tensor(float)`.
        front: The graph of the contract's `frontend_model`, if it has one.
    """

    def __init__(self, contract: Contract, types: Mapping[str, str], front: Graph | None = None) -> None:
        self._contract = contract
        self._types = types
        self._front = front

    def feeds(self, waveforms: npt.NDArray[np.float32], held: Sequence[int] | None = None) -> dict[str, npt.NDArray[Any]]:
        """The model's inputs, by name.

        Lengths count every sample, or frame of features, with padding: many models build a mask of max(lengths), and fail if
        that is shorter than the input. A fixed batch is filled up by repeating the waveforms.

        Args:
            waveforms: (items, samples) in [-1, 1].
            held: How many leading samples of each are the clip's own, and not padding; all by default.
        """
        return self.feeds_of(self.values(waveforms, held), self._own(waveforms, held))

    def results(
        self, run: Run, outputs: list[str], waveforms: npt.NDArray[np.float32], held: Sequence[int] | None = None
    ) -> list[npt.NDArray[Any]]:
        """The named outputs for waveforms (items, samples), as `results_of` gives them."""
        return self.results_of(run, outputs, self.values(waveforms, held), self._own(waveforms, held))

    def results_of(
        self,
        run: Run,
        outputs: list[str],
        values: npt.NDArray[np.float32],
        own: npt.NDArray[np.intp] | None = None,
    ) -> list[npt.NDArray[Any]]:
        """The named outputs for what `values` returned, as the model gives them.

        If the contract has windows, they are (items, windows, ...): the outputs for all windows of an item, one after the
        other, without their axes of size one.

        Raises:
            ModelError: There is no whole window, or the model fails.
        """
        windows = self._contract.windows
        if not windows:
            return run(outputs, self.feeds_of(values, own))
        cut = windows.cut(values)
        items, count = cut.shape[:2]
        if not count:
            raise ModelError(f"{values.shape[1]} values are less than a window of {windows.length}")
        flat = cut.reshape(items * count, *cut.shape[2:])
        parts: list[list[npt.NDArray[Any]]] = [[] for _ in outputs]
        for start in range(0, len(flat), windows.per_call):
            part = flat[start : start + windows.per_call]
            results = run(outputs, self.feeds_of(part))
            for of_output, name, result in zip(parts, outputs, results, strict=True):
                of_output.append(self._of_windows(result, name, len(part)))
        joined = [np.concatenate(of_output) for of_output in parts]
        return [values.reshape(items, count, *values.shape[1:]) for values in joined]

    def _of_windows(self, result: npt.NDArray[Any], output: str, windows: int) -> npt.NDArray[Any]:
        """(windows, ...) of one call, without axes of size one."""
        batch = self._batch or windows
        if "B" not in self._contract.input_layout:
            result = result[None]
        if result.shape[:1] != (batch,):
            raise ContractError(
                f"output {quoted(output)} has shape {list(result.shape)} for {batch} windows, and its first axis must hold "
                "them",
                about="output",
            )
        return result[:windows].reshape(windows, *([size for size in result.shape[1:] if size != 1] or [1]))

    @property
    def _batch(self) -> int | None:
        """The only batch that the model takes."""
        return self._contract.windows.batch if self._contract.windows else self._contract.fixed_batch

    def _own(self, waveforms: npt.NDArray[np.float32], held: Sequence[int] | None) -> npt.NDArray[np.intp]:
        """How many leading samples, or frames of features, of each waveform are not padding."""
        items, samples = waveforms.shape
        own = np.maximum(samples if held is None else held, min(self._least_held(), samples))
        own = np.broadcast_to(own, items)
        features = self._contract.features
        return own if features is None else np.array([features.frames_held(int(count)) for count in own])

    def values(self, waveforms: npt.NDArray[np.float32], held: Sequence[int] | None = None) -> npt.NDArray[np.float32]:
        """Waveforms (items, samples) at the model's amplitude, or their features (items, frames, bins)."""
        contract = self._contract
        values = waveforms * np.float32(32768) if contract.amplitude == "int16" else waveforms
        if contract.frontend_model:
            return self._features_by_graph(values, contract.frontend_model)
        return values if contract.frontend is None else features_of(values, contract.frontend, held)

    def _features_by_graph(self, waveforms: npt.NDArray[np.float32], front: FrontendModel) -> npt.NDArray[np.float32]:
        assert self._front is not None
        adapter, output = Adapter(front.contract, self._front.types), front.contract.output
        alone = front.contract.batch_coupled or not front.contract.dynamic_batch
        features = []
        for start in range(0, len(waveforms), 1 if alone else len(waveforms)):
            part = waveforms[start : start + 1] if alone else waveforms
            (result,) = self._front.run_raw([output], adapter.feeds(part))
            features.append(adapter.frames(result, len(part)))
        scaled: npt.NDArray[np.float32] = np.concatenate(features) * np.float32(front.scale) + np.float32(front.offset)
        return scaled

    def feeds_of(
        self, values: npt.NDArray[np.float32], own: npt.NDArray[np.intp] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """The model's inputs, by name, for what `values` returned.

        `own` (items,) says how many leading samples or frames of each are not padding; all by default.
        """
        contract, (items, length) = self._contract, values.shape[:2]
        rows = np.arange(self._batch or items) % items
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
