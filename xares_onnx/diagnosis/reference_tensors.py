"""A model against named inner tensors of the program that it was exported from: the first that departs, and how.

The file is a `.npz` with `rate` in Hz, `waveform` (samples,) or (batch, samples), and one array per tensor, in the order in
which they were computed, as hooks of torch modules write them. A tensor is found in the graph by its values if the model
still computes it, else by the path of its name in the names of the nodes, else by its place among those that were found.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..data.audio import MAX_RATE, MIN_RATE
from ..encoder.limits import memory_bytes
from ..encoder.model_file import check_unchanged
from ..encoder.spec import EncoderInfo
from ..encoder.worker import Beat, Tell, limit_memory
from ..errors import UsageError
from ..foreign import ForeignFileError, read_arrays
from ..progress import Doing, Progress
from .graph import Graph, Step
from .patterns import pattern_of
from .running import PartSession, feeds_of, types_of
from .surgery import cut_out, load

_MOST_BYTES = 2 << 30
_EXPOSED = 32  # tensors at a time
_SAME_TENSOR = 0.98  # cosine from which two tensors of one size are taken for the same
_RIGHT = {"float32": 1e-6, "float16": 1e-3, "integer": 3e-2}  # noise, as a share of power


class NamedFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of the reference, and what was found for it in the model."""

    name: str
    tensor: str | None
    """Null if nothing in the graph fits."""
    title: str
    found_by: str
    """`values`, `name` or `place`."""
    cosine: float
    noise: float
    right: bool
    pattern: str
    shape: tuple[int, ...]


class Reference(msgspec.Struct, frozen=True):
    """`waveforms` (batch, samples) at `rate` Hz, and the tensors by name in order."""

    rate: int
    waveforms: npt.NDArray[np.float32]
    tensors: dict[str, npt.NDArray[np.float32]]


def read_tensors(path: Path) -> Reference:
    """Read a reference. Nothing in it is unpickled. Raises `UsageError` if it cannot be read, or holds something else."""
    try:
        arrays = read_arrays(path, _MOST_BYTES)
    except ForeignFileError as error:
        raise UsageError(f"reference {path} cannot be read ({error}); give a second or two of a few clips") from error
    rate, waveform = arrays.pop("rate", None), arrays.pop("waveform", None)
    tensors = {name: array.astype(np.float32) for name, array in arrays.items() if array.dtype.kind == "f" and array.size}
    if rate is None or rate.size != 1 or rate.dtype.kind not in "iuf" or waveform is None or waveform.dtype.kind != "f":
        raise UsageError(f"reference {path} must hold `rate`, one number in Hz, and `waveform`, floats in [-1, 1]")
    hertz = float(rate.reshape(-1)[0])
    if not (MIN_RATE <= hertz <= MAX_RATE and hertz.is_integer()):
        raise UsageError(f"reference {path}: rate={hertz:g} must be a whole rate from {MIN_RATE} to {MAX_RATE} Hz")
    if waveform.ndim not in (1, 2) or not waveform.size or not np.isfinite(waveform).all():
        raise UsageError(f"reference {path}: waveform must be finite, (samples,) or (batch, samples), not {waveform.shape}")
    if not tensors:
        raise UsageError(f"reference {path} holds no tensor beside `waveform` and `rate`; add inner tensors by their names")
    return Reference(int(hertz), np.atleast_2d(waveform.astype(np.float32)), tensors)


def compare_tensors(
    info: EncoderInfo,
    threads: int,
    trust: bool,
    waveforms: npt.NDArray[np.float32],
    tensors: dict[str, npt.NDArray[np.float32]],
    *,
    tell: Tell,
) -> list[NamedFigures]:
    """What the model has for each tensor, in their order. Runs in the worker.

    Args:
        info: The model.
        threads: Of the model.
        trust: Whether limits are lifted.
        waveforms: (batch, samples) at the model's rate.
        tensors: By name.
    """
    size = sum(tensor.nbytes for tensor in tensors.values())
    limit_memory(memory_bytes(info.scan.solid_bytes + size, trust, threads))
    tell(Doing("reading the model", 60.0))
    check_unchanged(Path(info.path), info.scan.stamps)
    graph = Graph(load(Path(info.path), trust=trust))
    tell(Doing("running the model", 30.0))
    feeds = feeds_of(list(waveforms), info.contract, types_of(graph.model))
    best: dict[str, tuple[float, int]] = {}  # by name: cosine, number of the step
    for start in range(0, len(graph.steps), _EXPOSED):
        for number, value in _values(graph, range(start, min(start + _EXPOSED, len(graph.steps))), feeds, threads):
            for name, tensor in tensors.items():
                likeness = _likeness(tensor, value)
                if likeness > best.get(name, (-1.0, -1))[0]:
                    best[name] = likeness, number
        tell(Progress("measure", "tensors", min(start + _EXPOSED, len(graph.steps)), len(graph.steps)))
    chosen = _chosen(graph, tensors, best)
    figures = []
    for name, tensor in tensors.items():
        tell(Beat())
        if name not in chosen:
            figures.append(_missing(name, tensor))
            continue
        number, found_by = chosen[name]
        ((_, value),) = _values(graph, [number], feeds, threads)
        figures.append(_figures(name, tensor, graph.steps[number], value, found_by))
    return figures


def _values(
    graph: Graph, numbers: range | list[int], feeds: Mapping[str, npt.NDArray[Any]], threads: int
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    names = [graph.steps[number].output for number in numbers]
    values = PartSession(partial(cut_out, graph, list(dict.fromkeys(names))), threads).run(dict(feeds))
    for number, name in zip(numbers, names, strict=True):
        yield number, values[name].astype(np.float32)


def _likeness(x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> float:
    """The cosine of two tensors of one shape but for axes of size one."""
    if x.size != y.size or [d for d in x.shape if d > 1] != [d for d in y.shape if d > 1]:
        return -1.0
    with np.errstate(all="ignore"):
        one, other = x.ravel(), y.ravel()
        norm = float(np.linalg.norm(one)) * float(np.linalg.norm(other))
        cosine = float(one @ other) / norm if norm > 0 else -1.0
    return cosine if math.isfinite(cosine) else -1.0


def _chosen(
    graph: Graph, tensors: Mapping[str, npt.NDArray[np.float32]], best: Mapping[str, tuple[float, int]]
) -> dict[str, tuple[int, str]]:
    """The step of each tensor, and how it was found."""
    chosen: dict[str, tuple[int, str]] = {}
    for name in tensors:
        likeness, number = best.get(name, (-1.0, -1))
        by_name = _by_name(graph, name)
        if likeness >= _SAME_TENSOR:
            chosen[name] = number, "values"
        elif by_name is not None:
            chosen[name] = by_name, "name"
        elif number >= 0 and likeness > 0 and all(number > other for other, _ in chosen.values()):
            chosen[name] = number, "place"
    return chosen


def _by_name(graph: Graph, name: str) -> int | None:
    """The last step in the scope of a module's path: `encoder.layers.0.norm` in `/encoder/layers.0/norm/Add`."""
    wanted = "/".join(part for part in re.split(r"[./]", name) if part)
    for number in range(len(graph.steps) - 1, -1, -1):
        step = graph.steps[number]
        for text in (step.name, step.output):
            path = "/".join(part for part in re.split(r"[./]", text) if part)
            if f"/{wanted}/" in f"/{path}/":
                return number
    return None


def _figures(
    name: str, tensor: npt.NDArray[np.float32], step: Step, value: npt.NDArray[np.float32], found_by: str
) -> NamedFigures:
    if _likeness(tensor, value) > -1.0:
        value = value.reshape(tensor.shape)
    cosine, noise = 0.0, math.inf
    if value.shape == tensor.shape:
        with np.errstate(all="ignore"):
            power = float((tensor.astype(np.float64) ** 2).sum())
            noise = float(((tensor.astype(np.float64) - value) ** 2).sum()) / power if power else math.inf
            cosine = max(_likeness(tensor, value), -1.0)
    if not math.isfinite(noise):
        noise = math.inf
    right = noise <= _RIGHT["integer" if step.integer else "float32"]
    time = 1 if tensor.ndim >= 3 else None
    return NamedFigures(
        name=name,
        tensor=step.output,
        title=f"{step.operator} {step.name}",
        found_by=found_by,
        cosine=cosine,
        noise=noise,
        right=right,
        pattern="" if right else pattern_of(tensor, value, time),
        shape=tensor.shape,
    )


def _missing(name: str, tensor: npt.NDArray[np.float32]) -> NamedFigures:
    return NamedFigures(
        name=name,
        tensor=None,
        title="",
        found_by="",
        cosine=0.0,
        noise=math.inf,
        right=False,
        pattern="nothing in the graph has its name, its values or its place",
        shape=tensor.shape,
    )
