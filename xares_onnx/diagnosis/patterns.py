"""How an error lies in a tensor: in which items, frames and channels, or by which factor."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_WRONG = 1e-3  # of the largest error: an index below it counts as right
_EXACT = 1e-3  # the share of power that a factor or an order of channels leaves unexplained at most
_MOST_SHARE = 0.5  # of indices that a pattern may name
_NAMED = 4


def pattern_of(
    expected: npt.NDArray[np.generic], value: npt.NDArray[np.generic], time: int | None, noise: float = 0.0
) -> str:
    """What is wrong in `value` (batch, ...) against `expected`, in a few words; empty if nothing stands out.

    Args:
        expected: The reference.
        value: What is compared with it.
        time: The axis of time, None if there is none.
        noise: The share of power that is rounding.
    """
    if value.ndim != expected.ndim:
        return f"has {value.ndim} axes instead of {expected.ndim}"
    if value.shape != expected.shape:
        return _shape_pattern(expected.shape, value.shape, time)
    x, y = expected.astype(np.float64), value.astype(np.float64)
    if not np.isfinite(y).all():
        return "not finite" + _where(~np.isfinite(y), time)
    power = float((x * x).sum())
    if power == 0:
        return ""
    factor = float((x * y).sum()) / power
    if abs(factor - 1) > 0.01 and float(((y - factor * x) ** 2).sum()) < max(_EXACT, 20 * noise) * factor * factor * power:
        return f"a constant factor of {factor:.3g}"
    if (order := _order_of_channels(x, y, time)) is not None:
        return order
    error = np.abs(y - x)
    return ("wrong" + where) if (where := _where(error > _WRONG * error.max(), time, error)) else ""


def _shape_pattern(expected: tuple[int, ...], shape: tuple[int, ...], time: int | None) -> str:
    differing = [axis for axis, (one, other) in enumerate(zip(expected, shape, strict=True)) if one != other]
    if len(differing) == 1:
        axis = differing[0]
        unit = "frames" if axis == time else "items of the batch" if axis == 0 else "channels"
        missing = expected[axis] - shape[axis]
        return (
            f"{abs(missing)} {unit} {'missing' if missing > 0 else 'too many'} ({shape[axis]} instead of {expected[axis]})"
        )
    if sorted(expected) == sorted(shape):
        return f"axes swapped: {list(shape)} instead of {list(expected)}"
    return f"shape {list(shape)} instead of {list(expected)}"


def _order_of_channels(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], time: int | None) -> str | None:
    """Whether some channels stand in other places: each wrong one of `y` is another one of `x`."""
    if time is None or x.ndim < 3:
        return None
    axes = [axis for axis in range(1, x.ndim) if axis != time]
    if not axes:
        return None
    channels = max(axes, key=lambda axis: x.shape[axis])
    one = np.moveaxis(x, channels, 0).reshape(x.shape[channels], -1)
    other = np.moveaxis(y, channels, 0).reshape(x.shape[channels], -1)
    if len(one) > 4_096:
        return None
    scale = np.linalg.norm(one, axis=1).mean() or 1.0
    wrong = np.flatnonzero(np.linalg.norm(one - other, axis=1) > 0.01 * scale)
    if not 1 < len(wrong) <= len(one):
        return None
    norms = np.linalg.norm(other[wrong], axis=1)[:, None] * np.linalg.norm(one, axis=1)[None]
    cosines = (other[wrong] @ one.T) / np.maximum(norms, 1e-30)
    best = cosines.argmax(axis=1)
    if len(set(best)) < len(best) or cosines.max(axis=1).min() < 0.99 or (best == wrong).any():
        return None
    return f"channels in another order: {_span(wrong, len(one))} of {len(one)}"


def _where(wrong: npt.NDArray[np.bool_], time: int | None, error: npt.NDArray[np.float64] | None = None) -> str:
    """The items, frames and channels that an error is confined to."""
    parts = []
    axes = [(0, "batch items" if time != 0 else "frames"), *([(time, "frames")] if time else [])]
    rest = [axis for axis in range(1, wrong.ndim) if axis != time]
    if rest and time is not None:
        axes.append((max(rest, key=lambda axis: wrong.shape[axis]), "channels"))
    for axis, unit in axes:
        along = tuple(other for other in range(wrong.ndim) if other != axis)
        hit: npt.NDArray[np.bool_]
        if error is None:
            hit = np.asarray(wrong.any(axis=along))
        else:
            power = (error**2).sum(axis=along)
            hit = power > _WRONG * power.max()
        places = np.flatnonzero(hit)
        if 0 < len(places) < len(hit) and (unit == "batch items" or len(places) <= _MOST_SHARE * len(hit)):
            parts.append(f"{_span(places, len(hit))} of {len(hit)} {unit}")
    return f" only in {' and '.join(parts)}" if parts else ""


def _span(places: npt.NDArray[np.intp], total: int) -> str:
    first, last = int(places[0]), int(places[-1])
    if len(places) == last - first + 1:
        if last == total - 1:
            return f"the last {len(places)}" if first else "all"
        if first == 0:
            return f"the first {len(places)}"
        return f"{first} to {last}" if len(places) > 1 else f"number {first}"
    named = ", ".join(str(int(place)) for place in places[:_NAMED])
    return f"{len(places)} ({named}{', ...' if len(places) > _NAMED else ''})"
