"""How many cores there are to use, and one thread for the products of a scope."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import threadpool_limits


_MOUNTS_V2 = ("sys/fs/cgroup", "sys/fs/cgroup/unified")  # the second beside version 1


def one_thread() -> threadpool_limits:
    """Within it BLAS and OpenMP use one thread: how many threads share a sum decides its order, and so its last digits."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1)


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: those that it may run on, or the share of time that its cgroup allows, rounded up.

    Args:
        root: The folder of /proc and /sys.
    """
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(share) for share in _cgroup_shares(root))]))


def _cgroup_shares(root: Path) -> Iterator[float]:
    """Cores' worth of time that each cgroup around this process allows, as far as it is limited.

    A line of /proc/self/cgroup is `number:controllers:path`, of version 2 `0::path`. In a container the path may be that on
    the host, and only the topmost folder is to be seen: the container's own.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = [f"sys/fs/cgroup/{name}" for name in (controllers, "cpu")] if controllers else _MOUNTS_V2
        inner = PurePosixPath(path.lstrip("/"))
        if ".." in inner.parts:
            inner = PurePosixPath()
        for mount in mounts:
            for folder in (inner, *inner.parents):
                share = _share_v1(root / mount / folder) if controllers else _share_v2(root / mount / folder)
                if share is not None:
                    yield share


def _share_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _share_v1(folder: Path) -> float | None:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return None if quota < 0 else quota / period
    except (OSError, ValueError, ZeroDivisionError):
        return None
