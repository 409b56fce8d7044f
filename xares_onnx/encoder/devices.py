"""The devices that `--device` names."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable

from ..errors import MachineError, UsageError

ALL = "cuda:all"


def chosen_devices(option: str, count: Callable[[], int | None] | None = None) -> tuple[str, ...]:
    """The devices that an option names: one, as it is; or several CUDA devices.

    Args:
        option: `cuda:all`, a list such as `cuda:0,cuda:1`, or one device, which is not checked here.
        count: Tells the number of CUDA devices, None if it is unknown; that of CUDA's driver by default.

    Raises:
        UsageError: A list holds something other than CUDA devices, or one of them twice.
        MachineError: A device of the list is not there, or there is none for `cuda:all`.
    """
    names = tuple(name.strip() for name in option.split(","))
    if names != (ALL,) and len(names) == 1:
        return names
    if wrong := [name for name in names if not re.fullmatch(r"cuda:[0-9]+", name) and names != (ALL,)]:
        raise UsageError(f"--device {option!r}: {wrong[0]!r} is no CUDA device by its number; a list reads cuda:0,cuda:1")
    if len(set(names)) < len(names):
        raise UsageError(f"--device {option!r} names a device twice; --workers N runs several encoders on one device")
    number = (count or cuda_count)()
    if names == (ALL,):
        if not number:
            raise MachineError("--device cuda:all finds no CUDA device; check with nvidia-smi, or run with --device cpu")
        return tuple(f"cuda:{i}" for i in range(number))
    if number is not None and (missing := [name for name in names if int(name[5:]) >= number]):
        there = "no CUDA device" if not number else "only " + ", ".join(f"cuda:{i}" for i in range(number))
        raise MachineError(f"{missing[0]} is not there: this machine has {there}; name others by --device")
    return names


def cuda_count() -> int | None:
    """The number of CUDA devices that this process may see; None without a working driver."""
    cuda = _driver()
    number = ctypes.c_int()
    return number.value if cuda and cuda.cuDeviceGetCount(ctypes.byref(number)) == 0 else None


def cuda_bytes(device: int) -> int | None:
    """The memory of a CUDA device, in bytes; None if it is unknown."""
    cuda = _driver()
    handle, size = ctypes.c_int(), ctypes.c_size_t()
    if not cuda or cuda.cuDeviceGet(ctypes.byref(handle), device) != 0:
        return None
    return size.value if cuda.cuDeviceTotalMem_v2(ctypes.byref(size), handle) == 0 else None


def _driver() -> ctypes.CDLL | None:
    """CUDA's driver, which counts devices without any of CUDA's libraries, and allocates nothing on them."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    return cuda if cuda.cuInit(0) == 0 else None
