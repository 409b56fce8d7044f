"""Groups of operators that may be put back to float, and what each regains at the output.

Scoring a group on tasks takes minutes, so every group is tried first on a few clips: how near the output comes to the
reference's. Those that regain the most for their bytes are then scored. Runs in the worker process, but for `groups_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from ..encoder.spec import EncoderInfo
from ..encoder.worker import Beat, Tell
from ..errors import ModelError, UsageError
from ..progress import Doing, Progress
from .figures import Measurement, StepFigures
from .graph import Graph
from .opening import Paired, open_pair
from .running import PartSession, RunError, clip_samples, feeds_of, types_of
from .surgery import serialized, spliced

_MOST_GROUPS = 24
_CLIPS = 8


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Operators that are put back to float together, by their number in the measurement."""

    title: str
    steps: tuple[int, ...]


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the output when a group was put back to float.

    `noise` is that of the output against A's, `more_bytes` what the file gained; both null if the parts of the two graphs do
    not fit together.
    """

    group: Group
    noise: float | None
    more_bytes: int | None


class Trials(msgspec.Struct, frozen=True, kw_only=True):
    noise: float
    """Of B as it is."""
    trials: list[Trial]
    notes: list[str]


def groups_of(measurement: Measurement) -> list[Group]:
    """Groups of what B computes in another way: suspects alone, parts of layers, layers, kinds of operators."""
    steps = measurement.steps
    differing = [number for number, step in enumerate(steps) if step.differs]
    groups: dict[tuple[int, ...], str] = {}

    def add(title: str, numbers: Sequence[int]) -> None:
        if numbers:
            groups.setdefault(tuple(numbers), title)

    suspects = sorted((number for number in differing if steps[number].excess > 10), key=lambda n: -steps[n].excess)
    for number in suspects[:8]:
        add(steps[number].title, [number])
    places = list(dict.fromkeys(steps[number].place for number in differing))
    for place in places:
        if place.text and place.part:
            add(place.text, [number for number in differing if steps[number].place == place])
    for layer in dict.fromkeys(place.layer for place in places if place.layer >= 0):
        of_layer = [number for number in differing if steps[number].place.layer == layer]
        add(msgspec.structs.replace(steps[of_layer[0]].place, part="").text, of_layer)
    for kind in dict.fromkeys((steps[number].operator, steps[number].weighted) for number in differing):
        of_kind = [number for number in differing if (steps[number].operator, steps[number].weighted) == kind]
        if len(of_kind) > 1:
            add(f"every {kind[0]}" + (" without weights" if kind[0] == "MatMul" and not kind[1] else ""), of_kind)
    add("all of them", differing)
    chosen = sorted(groups.items(), key=lambda entry: -_loss(steps, entry[0]) / (len(entry[0]) + 1))[:_MOST_GROUPS]
    kept = {numbers for numbers, _ in chosen} | {tuple(differing)}
    return [Group(title=title, steps=numbers) for numbers, title in groups.items() if numbers in kept]


def _loss(steps: Sequence[StepFigures], numbers: Sequence[int]) -> float:
    return sum(min(max(steps[number].local_noise or 0.0, steps[number].batch_noise or 0.0), 10.0) for number in numbers)


def try_groups(
    infos: tuple[EncoderInfo, EncoderInfo],
    threads: int,
    trust: bool,
    measurement: Measurement,
    groups: list[Group],
    waveforms: list[npt.NDArray[np.float32]],
    *,
    tell: Tell,
) -> Trials:
    """Put each group back to float, and see how near the output comes to A's on a few clips."""
    splicer = Splicer(infos, threads, trust, measurement, tell)
    most = clip_samples(*splicer.paired.contracts)
    clips = [waveform[:most] for waveform in waveforms[:_CLIPS]]
    expected = splicer.outputs(splicer.paired.a, 0, clips)
    noise = _noise(expected, splicer.outputs(splicer.paired.b, 1, clips))
    trials, failed = [], []
    for count, group in enumerate(groups):
        try:
            graph = splicer.graph(group.steps)
            outputs = splicer.outputs(graph, 1, clips)
            more = graph.model.ByteSize() - splicer.paired.b.model.ByteSize()
            trials.append(Trial(group=group, noise=_noise(expected, outputs), more_bytes=more))
        except (RunError, ModelError) as error:
            failed.append(f"{group.title} could not be put back to float: {error}")
            trials.append(Trial(group=group, noise=None, more_bytes=None))
        tell(Progress("measure", "groups", count + 1, len(groups)))
    return Trials(noise=noise, trials=trials, notes=[*splicer.notes, *failed[:1]])


def write_group(
    infos: tuple[EncoderInfo, EncoderInfo],
    threads: int,
    trust: bool,
    measurement: Measurement,
    steps: tuple[int, ...],
    path: str,
    *,
    tell: Tell,
) -> int:
    """Write B with some operators as they are in A; returns the file's bytes."""
    splicer = Splicer(infos, threads, trust, measurement, tell)
    content = serialized(splicer.graph(steps).model)
    return Path(path).write_bytes(content)


class Splicer:
    """Two loaded models, of which one is given operators of the other."""

    def __init__(
        self, infos: tuple[EncoderInfo, EncoderInfo], threads: int, trust: bool, measurement: Measurement, tell: Tell
    ) -> None:
        self._threads, self._tell, self._steps = threads, tell, measurement.steps
        paired, _, _ = open_pair(infos, threads, trust, tell)
        self.notes: list[str] = []
        if paired.a.opset != paired.b.opset:
            paired = Paired(self._converted(paired), paired.b, paired.steps, paired.contracts)
        self.paired = paired
        known = paired.a.maker.keys()
        self._tensors = {step.tensor_b: step.tensor_a for step in self._steps if step.tensor_a in known}
        self._types = (
            {step.tensor_a: step.types[0] for step in self._steps},
            {step.tensor_b: step.types[1] for step in self._steps},
        )

    def _converted(self, paired: Paired) -> Graph:
        from onnx import version_converter

        self.notes.append(f"A has opset {paired.a.opset} and B {paired.b.opset}, so A's operators were converted")
        try:
            return Graph(version_converter.convert_version(paired.a.model, paired.b.opset))
        except Exception as error:  # onnx's converter raises whatever its C++ throws
            raise UsageError(
                f"A has opset {paired.a.opset} and B {paired.b.opset}, and A cannot be converted; export both with one, or "
                " leave the points out by --no-points"
            ) from error

    def graph(self, numbers: Sequence[int]) -> Graph:
        """B with the operators of some numbers as in A. Raises `ModelError` if they do not fit together."""
        chosen = [self._steps[number].tensor_b for number in numbers if self._steps[number].tensor_b in self._tensors]
        if len(chosen) < len(numbers):
            raise ModelError("A has lost these operators in the conversion")
        return Graph(spliced(self.paired.b, self.paired.a, self._tensors, chosen, self._types))

    def outputs(self, graph: Graph, side: int, clips: Sequence[npt.NDArray[np.float32]]) -> list[npt.NDArray[np.float32]]:
        """The embeddings of clips by a graph that is fed as A (0) or B (1) is."""
        self._tell(Doing("loading the model", 30.0))
        session = PartSession(lambda: graph.model, self._threads)
        self._tell(Doing("running the model"))
        contract, types = self.paired.contracts[side], types_of(graph.model)
        values = []
        for clip in clips:
            values.append(session.run(feeds_of([clip], contract, types))[contract.output].astype(np.float32))
            self._tell(Beat())
        return values


def _noise(expected: Sequence[npt.NDArray[np.float32]], values: Sequence[npt.NDArray[np.float32]]) -> float:
    power = difference = 0.0
    for x, y in zip(expected, values, strict=True):
        if x.ndim != y.ndim:
            return float("inf")
        common = tuple(slice(0, min(one, other)) for one, other in zip(x.shape, y.shape, strict=True))
        with np.errstate(all="ignore"):
            difference += float(((x[common].astype(np.float64) - y[common]) ** 2).sum())
            power += float((x.astype(np.float64) ** 2).sum())
        difference += abs(x.size - y.size) / max(x.size, 1) * power / max(len(expected), 1)
    noise = difference / power if power else float(difference > 0)
    return noise if np.isfinite(noise) else float("inf")
