"""What each axis of an input or an output holds, from shapes and values alone. Nothing here runs a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ContractError
from ..contract.frontend import MAX_BINS

_MOST_BANDS = 256  # a fixed axis of more is time, or another encoder's dimension
_MOVES = 0.1  # of an axis' length: how far a change must move along it, from the first to the last quarter of the window
_MOVES_ALONE = 0.5  # the same if no other axis can be the dimension, and chance moves a few values


def input_layout(shape: Sequence[Any]) -> str | None:
    """The layout of a waveform input of this shape; None if the shape cannot hold one."""
    match len(shape), [i for i, size in enumerate(shape) if i and size == 1]:
        case 1, _:
            return "T"
        case 2, _:
            return "BT"
        case 3, [1, *_]:
            return "B1T"
        case 3, [2]:
            return "BT1"
    return None


def feature_layouts(shape: Sequence[Any], bins: int) -> list[str]:
    """Every layout that an input of this shape may have for features with this many bins per frame.

    The batch comes first, unless it is a batch of one. Two axes are enough for a single clip.
    """
    layouts = []
    for time in range(len(shape)):
        for bands in range(len(shape)):
            rest = [axis for axis in range(len(shape)) if axis not in (time, bands)]
            batch = rest[0] if rest and (rest[0] == 0 or shape[rest[0]] == 1) else None
            single = [axis for axis in rest if axis != batch]
            if time == bands or shape[time] == 1 or not bins_fit(shape[bands], shape[time], bins):
                continue
            if all(shape[axis] == 1 for axis in single):
                roles = {time: "T", bands: "F", batch: "B"}
                layouts.append("".join(roles.get(axis, "1") for axis in range(len(shape))))
    exact = [layout for layout in layouts if shape[layout.index("F")] == bins] or layouts
    return [layout for layout in exact if layout.startswith("B")] or exact


def bins_fit(bands: Any, time: Any, bins: int) -> bool:
    """Whether axes of these sizes may hold the bins, and the frames.

    A dynamic axis does not hold bins if the other is fixed at a size that bands have.
    """
    if isinstance(bands, int):
        return bands == bins
    return not isinstance(time, int) or time > _MOST_BANDS


def bins_shown(shape: Sequence[Any], usual: int) -> int | None:
    """Bins per frame by an input's shape: the `usual` number, or the size of the only axis that could hold them."""
    axes = _wide(shape)
    fixed = [size for size in axes if isinstance(size, int)]
    if usual in fixed or len(axes) != 2:
        return usual if usual in fixed else None
    few = [size for size in fixed if size <= (_MOST_BANDS if len(fixed) == 2 else MAX_BINS)]
    return few[0] if len(few) == 1 else None


def looks_like_features(shape: Sequence[Any]) -> bool:
    """Whether an input's shape may be that of features: two axes beside the batch, and if any is fixed, a short one."""
    axes = [size for size in shape[1:] if size != 1]
    fixed = [size for size in axes if isinstance(size, int)]
    return len(axes) == 2 and (not fixed or min(fixed) <= _MOST_BANDS)


def _wide(shape: Sequence[Any]) -> list[Any]:
    """The axes of an input that are wider than one, without the batch if that is the first of three."""
    wide = [size for size in shape if size != 1]
    return wide[1:] if len(wide) == 3 and shape[0] != 1 else wide


def batch_axis(output: npt.NDArray[Any], pair: npt.NDArray[Any] | None, fixed_batch: int | None) -> int | None:
    """The axis of an output that holds the batch; None if no axis does.

    It doubles for a `pair` of waveforms; with a fixed batch of one waveform repeated it holds equal items. If the model
    takes no pair, it is the first axis of size one.

    Raises:
        ContractError: No axis holds a fixed batch.
    """
    axes = range(output.ndim)
    if fixed_batch is not None and fixed_batch > 1:
        repeating = [axis for axis in axes if output.shape[axis] == fixed_batch and _repeats(output, axis)]
        if not repeating:
            raise ContractError(f"with a fixed batch of {fixed_batch} no axis holds the batch")
        return repeating[0]
    if pair is not None and pair.ndim == output.ndim:
        doubled = [axis for axis in axes if (output.shape[axis], pair.shape[axis]) == (1, 2)]
        if doubled:
            return doubled[0]
    return next((axis for axis in axes if output.shape[axis] == 1), None)


def growing_axis(short: tuple[int, ...], long: tuple[int, ...]) -> int | None:
    """The axis that holds the frames, from an output's shapes for a short and a longer input; None for one vector per clip.

    Raises:
        ContractError: No single axis grows.
    """
    if len(short) != len(long):
        raise ContractError("its rank follows the input's length")
    grows = [axis for axis in range(len(short)) if long[axis] > short[axis]]
    if len(grows) > 1 or any(b < a for a, b in zip(short, long, strict=True)):
        raise ContractError("no single axis holds frames that follow the input's length")
    return grows[0] if grows else None


def moving_axis(
    plain: npt.NDArray[Any], firsts: Sequence[npt.NDArray[Any]], lasts: Sequence[npt.NDArray[Any]], batch: int | None
) -> int | None:
    """The axis that holds the frames of a fixed window: along it, a change moves as it moves in the window.

    Args:
        plain: The output for the window.
        firsts: Outputs for windows whose first quarter was changed.
        lasts: Outputs for windows whose last quarter was changed.
        batch: The axis of the batch.

    Returns:
        The axis, or None for one vector per window.

    Raises:
        ContractError: The change moves along no axis, or along several.
    """
    wide = [axis for axis in range(plain.ndim) if axis != batch and plain.shape[axis] > 1]
    moved = {axis: movement(plain, firsts, lasts, axis) for axis in wide}
    best = sorted(wide, key=lambda axis: moved[axis], reverse=True)
    if len(wide) < 2:
        return best[0] if best and moved[best[0]] > _MOVES_ALONE else None
    if moved[best[0]] < max(_MOVES, *(2 * abs(moved[axis]) for axis in best[1:])):
        raise ContractError(
            "no measurement shows which axis holds the frames; declare the axes, as in --contract output_layout=BTD or BDT"
        )
    return best[0]


def movement(
    plain: npt.NDArray[Any], firsts: Sequence[npt.NDArray[Any]], lasts: Sequence[npt.NDArray[Any]], axis: int
) -> float:
    """How far along an axis, as a share of it, a change moves from the first to the last quarter of the window."""
    return _centre(lasts, plain, axis) - _centre(firsts, plain, axis)


def output_layout(shape: tuple[int, ...], batch: int | None, time: int | None) -> str:
    """The layout, as in `Contract.output_layout`, of an output whose axes of batch and time are known.

    Raises:
        ContractError: The axes that are left cannot hold a dimension.
    """
    rest = [axis for axis in range(len(shape)) if axis not in (batch, time)]
    wide = [axis for axis in rest if shape[axis] != 1]
    if len(wide) > 1:
        problem = (
            "no axis holds frames that follow the input's length" if time is None else "several axes could hold the dim"
        )
        raise ContractError(f"{problem}; an encoder gives [batch, frames, dim]")
    if not rest:
        raise ContractError(
            "one value per frame is no embedding; an encoder gives [batch, frames, dim]"
            if time is not None
            else "a single value is no embedding; an encoder gives [batch, frames, dim]"
        )
    roles = {batch: "B", time: "T", (wide or rest)[-1]: "D"}
    return "".join(roles.get(axis, "1") for axis in range(len(shape)))


def _repeats(output: npt.NDArray[Any], axis: int) -> bool:
    first = output.take([0], axis).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return bool(np.allclose(output, first, rtol=1e-3, atol=1e-3 * float(np.abs(first).max(initial=0)), equal_nan=True))


def _centre(changed: Sequence[npt.NDArray[Any]], plain: npt.NDArray[Any], axis: int) -> float:
    """The centre of a change along an axis, from 0 to 1; the middle if nothing changed."""
    others = tuple(i for i in range(plain.ndim) if i != axis)
    weights = sum(np.abs(output.astype(np.float64) - plain).sum(axis=others) for output in changed)
    total = float(np.sum(weights))
    return float(np.sum(weights * np.linspace(0, 1, plain.shape[axis]))) / total if 0 < total < np.inf else 0.5
