"""The safetensors format, written and read part by part.

A file is the length of its header (8 bytes, little-endian), the header (JSON, padded with spaces), and the bytes of the
tensors one after another. The header gives each tensor's dtype, shape, and where its bytes begin and end, counted from the
end of the header.

The package safetensors writes whole arrays, and maps whole files to read them. Here frames are larger than memory; a model's
process has no room to map them, and would die if another machine removed the file meanwhile.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

HEADER_BYTES = 4096  # reserved for the header, so that frames can be written before it; a page, which mapping needs
_LENGTH_BYTES = 8
_ALIGNMENT = 8
_DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64"}
_READ_DTYPES: dict[str, np.dtype[Any]] = {code: np.dtype(name) for name, code in _DTYPES.items()}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    first_byte: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def load(self, file: BinaryIO) -> npt.NDArray[Any]:
        array = np.empty(self.count, self.dtype)
        file.seek(self.first_byte)
        if file.readinto(array.view(np.uint8)) != array.nbytes:  # type: ignore[attr-defined]
            raise ValueError("the file became shorter while it was read")
        return array.reshape(self.shape)

    def mapped(self, path: Path) -> npt.NDArray[Any]:
        if not self.count:  # an empty part of a file cannot be mapped
            return np.empty(self.shape, self.dtype)
        return np.memmap(path, self.dtype, "r", self.first_byte, self.shape).view(np.ndarray)


def tensors_of(file: BinaryIO) -> dict[str, Tensor]:
    """The tensors of a file by their names. Raises `ValueError`, `KeyError` or `TypeError` if no store wrote it."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    entries = json.loads(file.read(min(length, HEADER_BYTES)))
    if not isinstance(entries, dict):
        raise TypeError("the header is no object")
    tensors = {}
    for name, entry in entries.items():
        dtype, shape, (start, stop) = _READ_DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        tensor = Tensor(dtype, shape, _LENGTH_BYTES + length + start)
        sound = min(shape, default=0) >= 0 <= start and stop - start == tensor.count * dtype.itemsize
        if not sound or _LENGTH_BYTES + length + stop > size:
            raise ValueError(f"tensor {name} does not lie in its file")
        tensors[name] = tensor
    return tensors


def tensors_header(tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], least_bytes: int = 0) -> bytes:
    """Length and header of a file with these tensors (dtype, shape) in order, padded to `least_bytes` in all."""
    entries, start = {}, 0
    for name, (dtype, shape) in tensors.items():
        stop = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": _DTYPES[dtype.name], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = msgspec.json.encode(entries)
    aligned = math.ceil(len(text) / _ALIGNMENT) * _ALIGNMENT
    text = text.ljust(max(aligned, least_bytes - _LENGTH_BYTES))
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
