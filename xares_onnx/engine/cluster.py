"""A Ray cluster as a driver sees it: the connection, its nodes, and what each of them answers."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import MachineError, UsageError
from ..threads import usable_cores
from ..version import __version__
from .nodes import Expectation, look, objection
from .seats import Node, Shares

LOCAL = "local"  # in place of an address: a cluster of this machine alone, for this run alone
_OBJECT_STORE_BYTES = 80 << 20  # Ray asks for 75 MiB at least; nothing large goes through it
_DEATH_SECONDS = 30.0  # from a node's end until Ray counts it among the dead
_CHECK_SECONDS = 120.0  # for one node to say what it sees


def check_address(address: str) -> None:
    """Raise `UsageError` if Ray is not installed, or a cluster cannot be joined by such an address."""
    if address.startswith("ray://"):
        raise UsageError(
            f"--engine ray:{address}: a Ray client sees no shared folder; run the command on a node, with ray:auto"
        )
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--engine ray needs the package ray, on every node: pip install 'xares-onnx[ray]'")


@contextmanager
def connection(address: str) -> Iterator[None]:
    """A connection to a cluster. `LOCAL` starts one, which ends with the block; one that the caller has is used and kept.

    Ray prints nothing, sends nothing to its makers, and leaves the handlers of signals and exceptions as they were.

    Raises:
        MachineError: There is no such cluster, or it cannot be started.
    """
    hook = sys.excepthook
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray otherwise warns of a change to come
    import ray

    sys.excepthook = hook
    if ray.is_initialized():
        yield
        return
    with _silence():
        try:
            _connect(address)
            yield
        finally:
            ray.shutdown()


@contextmanager
def _silence() -> Iterator[None]:
    """Ray prints its raylets' last words to stdout, in colour, which no option prevents; stdout is the result's."""
    from ray._private import worker

    of_ray: Any = worker
    printing = getattr(of_ray, "print_to_stdstream", None)
    of_ray.print_to_stdstream = lambda *_, **__: None
    try:
        yield
    finally:
        of_ray.print_to_stdstream = printing


def _connect(address: str) -> None:
    import ray

    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.CRITICAL}
    if address == LOCAL:
        size = {"num_cpus": usable_cores(), "object_store_memory": _OBJECT_STORE_BYTES}
        options |= {**size, "include_dashboard": False}
    in_main = threading.current_thread() is threading.main_thread()
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except SystemExit as end:
        if in_main and end.code == signal.SIGTERM:  # how Ray's own handler ends a start
            signal.signal(signal.SIGTERM, terminated)
            signal.raise_signal(signal.SIGTERM)
        raise
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = "a Ray cluster cannot be started here" if address == LOCAL else f"the Ray cluster {address} cannot be joined"
        raise MachineError(f"{what}: {first}") from error
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, terminated)


def on_node(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def present_nodes() -> dict[str, Node]:
    """The living nodes by Ray's names of them."""
    import ray

    present = {}
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            named = node["NodeName"] != node["NodeManagerAddress"]
            name = node["NodeName"] if named else f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
            has = node["Resources"]
            cpus, gpus = int(has.get("CPU", 0)), int(has.get("GPU", 0))
            present[node["NodeID"]] = Node(node["NodeID"], name, cpus, gpus, has.get("memory", 0.0))
    return present


def examined(present: Mapping[str, Node], expected: Expectation) -> tuple[list[Node], dict[str, str]]:
    """Which nodes may take part, and why others may not, by their ids. What each sees and has is asked of all at once.

    A node that goes meanwhile is in neither: Ray takes seconds to notice.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    ask = ray.remote(look)
    options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0}
    asked = {node: ask.options(**options, scheduling_strategy=on_node(node)).remote(expected, node) for node in present}
    admitted, refusals = [], {}
    for node, answer in asked.items():
        try:
            seen = ray.get(answer, timeout=_CHECK_SECONDS)
        except RayError as error:
            if isinstance(error, RayTaskError) or not _goes(node):
                last = str(error).strip().splitlines()[-1]
                refusals[node] = f"cannot run xares-onnx {__version__} ({last}); install it there, with the extra ray"
        else:
            if refusal := objection(expected, seen):
                refusals[node] = refusal
            else:
                admitted.append(present[node])
    return admitted, refusals


def _goes(node: str) -> bool:
    """Whether Ray soon counts a node among the dead."""
    deadline = time.monotonic() + _DEATH_SECONDS
    while node in present_nodes():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


@contextmanager
def requested_nodes(shares: Shares) -> Iterator[None]:
    """Ask the cluster's autoscaler for room for all encoders; a cluster without one takes no notice."""
    from ray.autoscaler.sdk import request_resources

    one: dict[str, float] = {"GPU": 1 / shares.per_gpu} if shares.per_gpu else {"CPU": shares.threads}
    request_resources(bundles=[one] * (shares.most or 0))
    try:
        yield
    finally:
        request_resources(bundles=[])
