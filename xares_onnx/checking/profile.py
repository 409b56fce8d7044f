"""Where a model spends its time, by operator and by layer, from ONNX Runtime's own profiler."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..encoder.exposure import NUMBERED
from ..encoder.measuring.layers import layer_of_each_node
from ..encoder.session import CPU
from ..encoder.worker import Tell
from ..errors import ContractError
from .findings import Part, Profile
from .kernels import Kernel, run_kernels
from .model_under_test import Subject, bench_of

_NUMBER = re.compile(rf"{re.escape(NUMBERED)}([0-9]{{1,9}})(?![0-9])")
_SECONDS = 10.0  # of audio, unless a chunk is shorter
_LEAST_RUNS, _RUN_SECONDS = 3, 2.0  # the first is not counted: it allocates


def measure_profile(subject: Subject, *, tell: Tell) -> Profile:
    """Profile a model. Runs in the worker.

    Raises:
        ModelError: The model fails, or ONNX Runtime's profile of it cannot be read.
    """
    import onnx

    bench = bench_of(subject, tell)
    spec, contract = subject.spec, bench.contract
    samples = min(round(_SECONDS * contract.sample_rate), contract.chunk_samples)
    runs = run_kernels(bench, samples, shapes=False, runs=_LEAST_RUNS, seconds=_RUN_SECONDS)[1:]
    kernels = runs[0]
    times = (np.median([[kernel.microseconds for kernel in run] for run in runs], axis=0) / 1000).tolist()
    notes = [] if spec.info.provider == CPU else ["a device works on after its kernel was started, which is what is timed"]
    layers: list[Part] = []
    try:
        model = onnx.load_model(Path(spec.info.path), format="protobuf", load_external_data=False)
        layers = _layers(kernels, times, *layer_of_each_node(model, contract.output))
    except ContractError:
        notes.append("no chain of residual layers was found, so there are no times by layer")
    operators = _parts([kernel.operator for kernel in kernels], times).values()
    return Profile(
        provider=spec.info.provider,
        seconds=samples / contract.sample_rate,
        runs=len(runs),
        milliseconds=round(sum(times), 3),
        operators=tuple(sorted(operators, key=lambda part: (-part.milliseconds, part.name))),
        layers=tuple(layers),
        note="; ".join(notes),
    )


def _layers(kernels: Iterable[Kernel], times: Sequence[float], layers: Sequence[int], count: int) -> list[Part]:
    """Layers in order, of a graph whose nodes belong to `layers`.

    A kernel that ONNX Runtime made of several nodes may have lost their names: it belongs to the layer of the kernel that
    ran before it.
    """
    names = ["before the layers", *(f"layer.{layer}" for layer in range(1, count + 1)), "after the layers"]
    at, places = 0, []
    for kernel in kernels:
        number = _NUMBER.match(kernel.node)
        if number and int(number[1]) < len(layers):
            at = layers[int(number[1])]
        places.append(names[at])
    parts = _parts(places, times)
    return [parts[name] for name in names if name in parts]


def _parts(names: Sequence[str], times: Sequence[float]) -> dict[str, Part]:
    """The parts that kernels of these names and times belong to."""
    total = float(sum(times)) or 1.0
    parts: dict[str, list[float]] = {}
    for name, milliseconds in zip(names, times, strict=True):
        parts.setdefault(name, []).append(float(milliseconds))
    return {
        name: Part(name=name, kernels=len(own), milliseconds=round(sum(own), 3), share=round(sum(own) / total, 5))
        for name, own in parts.items()
    }
