"""Inputs that carry no audio and take the same numbers in every call, such as CLAP's `is_longer`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ...errors import ContractError, foreign, quoted

PREFIX = "constant."
_MOST_VALUES = 4096  # in a declaration; the shape of the input may repeat them
_MOST_BYTES = 1 << 24  # of the whole input, for one item
_TYPES: dict[str, np.dtype[Any]] = {
    **{f"tensor({name})": np.dtype(name) for name in ("bool", "float16")},
    "tensor(float)": np.dtype("float32"),
    "tensor(double)": np.dtype("float64"),
    **{f"tensor({sign}int{bits})": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


class Constant(msgspec.Struct, frozen=True):
    """Numbers for one input. `shape` is that of the input, with None for the batch; `values` are repeated to fill it."""

    type: str
    shape: tuple[int | None, ...]
    values_shape: tuple[int, ...]
    values: tuple[bool | int | float, ...]

    def array(self, batch: int) -> npt.NDArray[Any]:
        """The input for a call of `batch` items."""
        values = np.array(self.values, _TYPES[self.type]).reshape(self.values_shape)
        return np.broadcast_to(values, [batch if size is None else size for size in self.shape]).copy()


def parsed(text: str) -> list[Any] | bool | int | float:
    """A number, true, false, or lists of them, from JSON.

    Raises:
        ValueError: It is anything else, or longer than 4,096 numbers.
    """
    value = json.loads(text.lower() if text in ("True", "False") else text)
    flat = _flat(value)
    if not 0 < len(flat) <= _MOST_VALUES:
        raise ValueError
    for number in flat:
        if not isinstance(number, bool | int | float) or not math.isfinite(number):
            raise ValueError
    return value  # type: ignore[no-any-return]


def constant_of(name: str, type_name: str, shape: Sequence[int | str | None], text: str, source: str) -> Constant:
    """The declared numbers in the type and shape of an input.

    Args:
        name: Name of the input.
        type_name: Its type, as ONNX Runtime writes it.
        shape: Its shape in the graph. A dynamic first axis is the batch; another one is as long as the declared list.
        text: What was declared, as `parsed` reads it.
        source: Where it was declared.

    Raises:
        ContractError: The numbers do not fit.
    """
    says = (
        f"{source} declares {foreign(PREFIX + name)}={foreign(text[:60])}, but input {quoted(name)} is {type_name} "
        f"{foreign(str(list(shape)))}"
    )
    if type_name not in _TYPES:
        raise ContractError(f"{says}; only numbers and booleans can be declared")
    try:
        values = np.array(parsed(text))
    except ValueError:  # lists of unequal lengths
        raise ContractError(f"{says}; give lists of equal lengths") from None
    given = np.array(values.tolist(), dtype=object)
    if given.ndim > len(shape):
        raise ContractError(f"{says}; give a number, or a list with at most {len(shape)} levels")
    given = given.reshape((1,) * (len(shape) - given.ndim) + given.shape)
    sizes: list[int | None] = []
    for axis, (size, length) in enumerate(zip(shape, given.shape, strict=True)):
        if isinstance(size, int):
            fits, takes = length in (1, size), f"{size} values"
            sizes.append(size)
        else:
            fits, takes = axis > 0 or length == 1, "one item, which every item of the batch is given"
            sizes.append(length if axis else None)
        if not fits:
            raise ContractError(f"{says}; its axis {axis} takes {takes}, not {length}")
    dtype = _TYPES[type_name]
    if math.prod(size or 1 for size in sizes) * dtype.itemsize > _MOST_BYTES:
        raise ContractError(f"{says}, which is more than 16 MiB; export the model without that input")
    numbers = given.ravel().tolist()
    if not all(_fits(number, dtype) for number in numbers):
        raise ContractError(f"{says}, which cannot hold it")
    return Constant(type_name, tuple(sizes), given.shape, tuple(numbers))


def _fits(number: bool | int | float, dtype: np.dtype[Any]) -> bool:
    if dtype.kind == "b":
        return number in (0, 1)
    if dtype.kind == "f":
        return abs(number) <= float(np.finfo(dtype).max)
    limits = np.iinfo(dtype)
    return float(number).is_integer() and limits.min <= number <= limits.max


def _flat(value: Any, depth: int = 0) -> list[Any]:
    if not isinstance(value, list):
        return [value]
    if depth == 8:
        raise ValueError
    return [number for item in value for number in _flat(item, depth + 1)]
