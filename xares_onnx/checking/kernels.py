"""What ONNX Runtime ran, by its own profiler: every kernel, with its time and the types and shapes of its tensors.

The profile is a file of the model's process, with names and shapes that a stranger chose: it is bounded and read as such.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ..encoder.session import CPU, Profiling, Session
from ..encoder.worker import Beat
from ..errors import ModelError, foreign
from ..foreign import ForeignFileError, decode_json, read_small
from .model_under_test import Bench
from .signals import quiet_noise

_MAX_BYTES = 128 << 20  # 20 runs of a model of 10,000 nodes
_MOST_RUNS = 20
_KERNEL = "_kernel_time"
_TYPES = {"float": "float32", "double": "float64"}  # as ONNX Runtime names them

Shape = tuple[int, ...]


class Tensor(msgspec.Struct, frozen=True):
    """A tensor's type, named as in NumPy, and shape."""

    type: str
    shape: Shape

    @property
    def values(self) -> int:
        return math.prod(self.shape)


class Kernel(msgspec.Struct, frozen=True):
    """One call of one kernel. `microseconds` does not count the nodes of graphs inside it.

    Tensors that are missing, and weights that the kernel keeps in a form of its own, are not among `inputs`.
    """

    node: str
    operator: str
    provider: str
    microseconds: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class _Arguments(msgspec.Struct):
    op_name: str = ""
    provider: str = ""
    input_type_shape: list[dict[str, Shape]] = []
    output_type_shape: list[dict[str, Shape]] = []


class _Event(msgspec.Struct):
    name: str = ""
    cat: str = ""
    ts: int = 0
    dur: int = 0
    args: _Arguments = msgspec.field(default_factory=_Arguments)


def run_kernels(bench: Bench, samples: int, *, shapes: bool, runs: int = 1, seconds: float = 0.0) -> list[list[Kernel]]:
    """The kernels of each of some equal runs, in the order in which they began. The model is loaded anew for it.

    Args:
        bench: The model.
        samples: Length of the noise that it hears.
        shapes: Whether the shapes of weights are told; times are then not those of other sessions. Otherwise nodes are named
            by their numbers in the file.
        runs: How many at least.
        seconds: For how long there are more.

    Raises:
        ModelError: The model fails, or the profile cannot be read.
    """
    spec = bench.subject.spec
    session = Session(
        Path(spec.info.path),
        "cpu" if spec.info.provider == CPU else spec.device,
        front=spec.info.front,
        profiling=Profiling(Path(bench.subject.scratch) / "kernels", shapes),
    )
    noise = bench.normalized(quiet_noise(samples))[None]
    bench.tell(Beat())
    count, end = 0, time.perf_counter() + seconds
    with _limited_files(_MAX_BYTES):
        while count < runs or (time.perf_counter() < end and count < _MOST_RUNS):
            session.run(noise, bench.contract)
            bench.tell(Beat())
            count += 1
        path = session.end_profiling()
    try:
        kernels = read_kernels(path)
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    size, rest = divmod(len(kernels), count)
    if rest or not size:
        raise ModelError("equal runs of the model differ in the kernels they ran")
    return [kernels[start : start + size] for start in range(0, len(kernels), size)]


@contextlib.contextmanager
def _limited_files(limit: int) -> Iterator[None]:
    """Cap the files that this process writes meanwhile, in bytes, on systems that can (POSIX): a loop in a model writes a
    record per turn.
    """
    try:
        import resource
    except ImportError:  # not POSIX
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def read_kernels(path: Path) -> list[Kernel]:
    """The kernels in a profile, in the order in which they began. Raises `ModelError` if it cannot be read."""
    try:
        events = decode_json(read_small(path, _MAX_BYTES), list[_Event])
    except ForeignFileError as error:
        raise ModelError(f"ONNX Runtime's profile of the model cannot be read: {error}") from error
    nodes = [event for event in events if event.cat == "Node" and event.name.endswith(_KERNEL)]
    nodes.sort(key=lambda event: (event.ts, -event.dur))
    return [
        Kernel(
            node=event.name.removesuffix(_KERNEL),
            operator=foreign(event.args.op_name),
            provider=foreign(event.args.provider),
            microseconds=own,
            inputs=tuple(_tensors(event.args.input_type_shape)),
            outputs=tuple(_tensors(event.args.output_type_shape)),
        )
        for event, own in zip(nodes, _own_times(nodes), strict=True)
    ]


def _own_times(events: list[_Event]) -> list[int]:
    """The time of each event without those inside it, of events in the order in which they began."""
    own = [max(event.dur, 0) for event in events]
    around: list[int] = []
    for i, event in enumerate(events):
        while around and events[around[-1]].ts + events[around[-1]].dur <= event.ts:
            around.pop()
        if around:
            own[around[-1]] = max(0, own[around[-1]] - event.dur)
        around.append(i)
    return own


def _tensors(shapes: list[dict[str, Shape]]) -> Iterator[Tensor]:
    for entry in shapes:
        for name, shape in entry.items():
            yield Tensor(_TYPES.get(name, name), shape)
