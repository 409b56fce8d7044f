"""How far the tensors of two graphs are apart on clips: each operator as it comes, and fed with what the reference has.

An operator is measured *cumulatively* by its output in both models, and *locally* by what B makes of A's own tensors, from
one paired tensor to the next: there only its own error shows. Clip after clip is put through, and tensors are exposed a
bounded number at a time, so memory depends neither on how many clips nor on how many tensors there are. Runs in the worker
process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..encoder.contract.contract import Contract
from ..encoder.limits import memory_bytes
from ..encoder.model_file import check_unchanged
from ..encoder.spec import EncoderInfo
from ..encoder.worker import Beat, Tell, limit_memory
from ..errors import ModelError
from ..progress import Doing, Progress
from .graph import Graph
from .pairing import pair, unpaired
from .patterns import pattern_of
from .places import Place, places
from .running import Feeds, PartSession, RunError, clip_samples, feeds_of, types_of
from .surgery import cut_out, load, side_by_side

_GROUP_BYTES = 192 << 20  # of exposed tensors of one clip, in both models together
_MOST_POOLED = 4_096  # values per clip that CKA compares
_BATCH = 3  # clips in one call, for what depends on neighbours
_MOST_FAILURES = 40  # parts that do not run alone, before local figures are given up
# The noise, as a share of power, that an operator has by itself: in float32 by another order of sums, in float16 by
# rounding, in integers by 8 bits. What its kind has in the rest of the model counts instead, if that is more.
_EXPECTED = {"float32": 1e-8, "float16": 1e-5, "integer": 1e-4}
_SAME = 1e-9  # noise of the same arithmetic in another order
_FEWEST_PEERS = 2
_SCALED = 0.1  # of the expected noise: what an error that scales the tensor may have, since chance scales by far less
_SHOWN_PATTERNS = 8  # suspects whose error is looked at along time and channels


class StepFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One operator of A and B, and how far its output differs. Noise is the power of the difference over that of A's."""

    operator: str
    name: str
    place: Place
    tensor_a: str
    tensor_b: str
    integer: bool
    weighted: bool
    """Whether it has constant matrices."""
    types: tuple[int, int]
    """Of both tensors, as `TensorProto.DataType` counts them."""
    shape: tuple[int, ...]
    """Of A's tensor, for one clip."""
    cosine: float
    noise: float
    cka: float | None
    local_cosine: float | None
    local_noise: float | None
    """Null if this part of B does not run by itself."""
    local_gain: float
    """The part of the local noise that a constant factor explains."""
    batch_noise: float | None
    """Local noise if clips share a call, where that is more; null if they do not."""
    expected: float
    """Local noise of its kind."""
    shape_b: tuple[int, ...] | None = None
    """Of B's tensor, if it is another."""
    local_shape: tuple[int, ...] | None = None
    """Of what B makes of A's tensors, if that is another than A's."""
    pattern: str = ""

    @property
    def excess(self) -> float:
        """Decibels of local noise above what its kind has."""
        if self.local_shape is not None:
            return math.inf
        if self.local_noise is None:
            return -math.inf
        noise = max(self.local_noise, self.batch_noise or 0.0, self.local_gain / _SCALED)
        return 10 * math.log10(max(noise, 1e-30) / self.expected) if math.isfinite(noise) else math.inf

    @property
    def differs(self) -> bool:
        """Whether B computes it in another way than A."""
        return self.integer or self.local_shape is not None or (self.local_noise or 0.0) > _SAME or bool(self.batch_noise)

    @property
    def title(self) -> str:
        where = self.place.text
        return f"{where}: {self.operator} {self.name}" if where else f"{self.operator} {self.name}"


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """All paired operators in topological order, what was not paired, and what was used."""

    steps: list[StepFigures]
    unpaired_a: list[str]
    unpaired_b: list[str]
    layers: int
    clips: int
    seconds: float
    """Of audio."""
    opset_a: int
    opset_b: int
    notes: list[str]


_Kind = tuple[str, bool, bool]  # operator, whether it has constant matrices, whether B computes it in integers


@dataclass
class _Sums:
    """Sums over clips for one operator."""

    xx: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    dd: float = 0.0
    shape_b: tuple[int, ...] | None = None

    def add(self, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> None:
        if x.shape != y.shape:
            self.shape_b = tuple(y.shape)
            if x.ndim != y.ndim:
                self.dd = math.inf
                return
            common = tuple(slice(0, min(one, other)) for one, other in zip(x.shape, y.shape, strict=True))
            x, y = x[common], y[common]
        x, y = x.ravel().astype(np.float32, copy=False), y.ravel().astype(np.float32, copy=False)
        with np.errstate(all="ignore"):
            difference = x - y
            self.xx += float(np.vdot(x, x))
            self.yy += float(np.vdot(y, y))
            self.xy += float(np.vdot(x, y))
            self.dd += float(np.vdot(difference, difference))

    @property
    def noise(self) -> float:
        noise = self.dd / self.xx if self.xx > 0 else (0.0 if self.dd == 0 else math.inf)
        return noise if math.isfinite(noise) else math.inf

    @property
    def gain(self) -> float:
        gain = (self.xy / self.xx - 1) ** 2 if self.xx > 0 else 0.0
        return gain if math.isfinite(gain) else 0.0

    @property
    def cosine(self) -> float:
        norm = math.sqrt(self.xx * self.yy) if self.xx * self.yy > 0 else 0.0
        cosine = self.xy / norm if norm > 0 else float(self.xx == self.yy)
        return max(-1.0, min(1.0, cosine)) if math.isfinite(cosine) else 0.0


@dataclass
class _Tracked:
    """What is gathered of one operator."""

    cumulative: _Sums = field(default_factory=_Sums)
    local: _Sums | None = None
    batched: _Sums | None = None
    pooled: tuple[list[npt.NDArray[np.float32]], list[npt.NDArray[np.float32]]] = field(default_factory=lambda: ([], []))


@dataclass(frozen=True)
class _Probed:
    """Of a tensor: its shape for one clip, the axis of time if it has one, its type, its bytes."""

    shape: tuple[int, ...]
    time: int | None
    kind: int
    size: int


@dataclass(frozen=True)
class Paired:
    """Two loaded models and their paired, measured steps: `steps` holds (number in A, number in B)."""

    a: Graph
    b: Graph
    steps: list[tuple[int, int]]
    contracts: tuple[Contract, Contract]

    @property
    def tensors(self) -> dict[str, str]:
        """Tensors of A by those of B."""
        return {self.b.steps[j].output: self.a.steps[i].output for i, j in self.steps}


def open_pair(
    infos: tuple[EncoderInfo, EncoderInfo], threads: int, trust: bool, tell: Tell
) -> tuple[Paired, list[str], list[str]]:
    """Load both models and pair them; also the names of what was not paired in A and in B."""
    limit_memory(memory_bytes(sum(info.scan.solid_bytes for info in infos), trust, threads))
    graphs = []
    for info in infos:
        tell(Doing("reading the model", 60.0))
        check_unchanged(Path(info.path), info.scan.stamps)
        graph = Graph(load(Path(info.path), trust=trust))
        output = info.contract.output
        keep = cut_out(graph, [output] if output in graph.maker else graph.outputs)
        keep.metadata_props.extend(graph.model.metadata_props)
        graphs.append(Graph(_with_types(keep, graph.model)))
        tell(Beat())
    tell(Doing("pairing the operators", 120.0))
    a, b = graphs
    pairs = pair(a, b)
    steps = [(i, j) for i, j in sorted(pairs.b_of.items()) if a.steps[i].measured]
    lost = [[f"{s.operator} {s.name}" for s in unpaired(g, k)] for g, k in ((a, pairs.b_of), (b, pairs.a_of))]
    return Paired(a, b, steps, (infos[0].contract, infos[1].contract)), lost[0], lost[1]


def _with_types(part: Any, whole: Any) -> Any:
    outputs = {value.name: value for value in whole.graph.output}
    names = [value.name for value in part.graph.output]
    del part.graph.output[:]
    part.graph.output.extend(outputs[name] for name in names)
    return part


def measure(
    infos: tuple[EncoderInfo, EncoderInfo],
    threads: int,
    trust: bool,
    waveforms: list[npt.NDArray[np.float32]],
    *,
    tell: Tell,
) -> Measurement:
    """Measure every paired operator of two models on waveforms (samples,) at A's rate.

    Raises:
        ModelError: A model cannot be read or run, or nothing is paired.
    """
    paired, lost_a, lost_b = open_pair(infos, threads, trust, tell)
    if not paired.steps:
        raise ModelError("no operator of the one model could be paired with one of the other; are they the same encoder?")
    return _Measuring(paired, threads, waveforms, tell).measurement(lost_a, lost_b)


class _Measuring:
    def __init__(self, paired: Paired, threads: int, waveforms: Sequence[npt.NDArray[np.float32]], tell: Tell) -> None:
        self._paired, self._threads, self._tell = paired, threads, tell
        self._a, self._b = paired.a, paired.b
        self._notes: list[str] = []
        self._types = (types_of(self._a.model), types_of(self._b.model))
        most = clip_samples(*paired.contracts)
        self._waveforms = [waveform[:most] for waveform in waveforms]
        self._most = most
        self._dead: set[int] = set()  # pairs whose part of B does not run alone
        self._probed = self._probe()
        self._places = places(self._a, paired.contracts[0].output)

    def measurement(self, lost_a: list[str], lost_b: list[str]) -> Measurement:
        tracked: dict[int, _Tracked] = {}
        groups = list(self._groups())
        for number, group in enumerate(groups):
            tracked |= self._measure_group(group, number, len(groups))
        figures = self._figures(tracked)
        worst = sorted(range(len(figures)), key=lambda k: -figures[k].excess)[:_SHOWN_PATTERNS]
        worst = [k for k in worst if figures[k].excess > 10]
        patterns = self._patterns(worst, figures)
        figures = [
            msgspec.structs.replace(step, pattern=patterns.get(k, "")) if k in patterns else step
            for k, step in enumerate(figures)
        ]
        rate = self._paired.contracts[0].sample_rate
        return Measurement(
            steps=figures,
            unpaired_a=lost_a,
            unpaired_b=lost_b,
            layers=max((place.layers for place in self._places), default=0),
            clips=len(self._waveforms),
            seconds=sum(len(waveform) for waveform in self._waveforms) / rate,
            opset_a=self._a.opset,
            opset_b=self._b.opset,
            notes=self._notes,
        )

    # ---------------------------------------------------------------- shapes

    def _names(self, number: int) -> tuple[str, str]:
        i, j = self._paired.steps[number]
        return self._a.steps[i].output, self._b.steps[j].output

    def _feeds(self, side: int, waveforms: Sequence[npt.NDArray[np.float32]]) -> Feeds:
        return feeds_of(waveforms, self._paired.contracts[side], self._types[side])

    def _probe(self) -> tuple[dict[str, _Probed], dict[str, _Probed]]:
        """Shape, type and axis of time of every paired tensor, by two clips of noise."""
        contracts = self._paired.contracts
        rng = np.random.default_rng(3)
        lengths = [self._most]
        if not any(contract.fixed_window for contract in contracts):
            shorter = max(int(0.6 * self._most), *(contract.min_samples for contract in contracts))
            lengths += [shorter] if shorter < self._most else []
        clips = [(0.1 * rng.standard_normal(length)).astype(np.float32) for length in lengths]
        probed: list[dict[str, _Probed]] = []
        for side, graph in enumerate((self._a, self._b)):
            names = list(dict.fromkeys(self._names(k)[side] for k in range(len(self._paired.steps))))
            of_side: dict[str, _Probed] = {}
            for start in range(0, len(names), 64):
                session = PartSession(cut_out(graph, names[start : start + 64]), self._threads)
                self._tell(Beat())
                results = [session.run(self._feeds(side, [clip])) for clip in clips]
                self._tell(Beat())
                for name, value in results[0].items():
                    other = results[-1][name].shape
                    changed = [
                        axis for axis, size in enumerate(value.shape) if value.ndim == len(other) and other[axis] != size
                    ]
                    kind = {"float32": 1, "float16": 10, "float64": 11}.get(value.dtype.name, 1)
                    of_side[name] = _Probed(value.shape, changed[0] if changed else None, kind, value.nbytes)
            probed.append(of_side)
        return probed[0], probed[1]

    def _groups(self) -> Iterator[list[int]]:
        """Numbers of pairs, as many at a time as may be exposed."""
        group: list[int] = []
        size = 0
        for number in range(len(self._paired.steps)):
            name_a, name_b = self._names(number)
            own = 2 * self._probed[0][name_a].size + 2 * self._probed[1][name_b].size
            if group and size + own > _GROUP_BYTES:
                yield group
                group, size = [], 0
            group.append(number)
            size += own
        if group:
            yield group

    # ---------------------------------------------------------------- clips

    def _measure_group(self, group: Sequence[int], done: int, total: int) -> dict[int, _Tracked]:
        tracked = {number: _Tracked() for number in group}
        sessions = _Sessions(self, group)
        batches = [[waveform] for waveform in self._waveforms]
        for count, batch in enumerate(batches):
            self._put_through(sessions, group, batch, tracked, batched=False)
            self._tell(Progress("measure", "tensors", done * len(batches) + count + 1, total * len(batches)))
        contracts = self._paired.contracts
        if (
            all(contract.dynamic_batch and contract.fixed_batch is None for contract in contracts)
            and len(self._waveforms) > 1
        ):
            length = min(len(waveform) for waveform in self._waveforms[:_BATCH])
            batch = [waveform[:length] for waveform in self._waveforms[:_BATCH]]
            self._put_through(sessions, group, batch, tracked, batched=True)
        return tracked

    def _put_through(
        self,
        sessions: _Sessions,
        group: Sequence[int],
        batch: Sequence[npt.NDArray[np.float32]],
        tracked: Mapping[int, _Tracked],
        *,
        batched: bool,
    ) -> None:
        values_a, values_b, local = sessions.run(batch)
        for number in group:
            name_a, name_b = self._names(number)
            x, of_step = values_a[name_a], tracked[number]
            if batched:
                if number in local:
                    of_step.batched = of_step.batched or _Sums()
                    of_step.batched.add(x, local[number])
                continue
            y = values_b[name_b]
            of_step.cumulative.add(x, y)
            for pooled, value, probed in zip(
                of_step.pooled, (x, y), (self._probed[0][name_a], self._probed[1][name_b]), strict=True
            ):
                with np.errstate(all="ignore"):
                    vector = value.mean(axis=probed.time, dtype=np.float32) if probed.time is not None else value
                pooled.append(vector.ravel()[:_MOST_POOLED].astype(np.float32))
            if number in local:
                of_step.local = of_step.local or _Sums()
                of_step.local.add(x, local[number])

    # ---------------------------------------------------------------- figures

    def _figures(self, tracked: Mapping[int, _Tracked]) -> list[StepFigures]:
        noises: dict[_Kind, dict[int, float]] = {}
        for number, of_step in tracked.items():
            if of_step.local is not None and of_step.local.shape_b is None:
                noises.setdefault(self._kind(number), {})[number] = of_step.local.noise
        figures = []
        for number, of_step in sorted(tracked.items()):
            i, j = self._paired.steps[number]
            step_a, step_b = self._a.steps[i], self._b.steps[j]
            name_a, name_b = self._names(number)
            local = of_step.local
            batch_noise = of_step.batched.noise if of_step.batched is not None else None
            usual = local.noise if local is not None else 0.0
            expected = self._expected(number, noises)
            coupled = batch_noise is not None and batch_noise > 30 * max(usual, expected)
            figures.append(
                StepFigures(
                    operator=step_a.operator,
                    name=step_a.name,
                    place=self._places[i],
                    tensor_a=name_a,
                    tensor_b=name_b,
                    integer=step_b.integer,
                    weighted=any(self._a.tensors[name].dims for name in step_a.weights if name in self._a.tensors),
                    types=(self._probed[0][name_a].kind, self._probed[1][name_b].kind),
                    shape=self._probed[0][name_a].shape,
                    cosine=of_step.cumulative.cosine,
                    noise=of_step.cumulative.noise,
                    cka=cka(*of_step.pooled),
                    local_cosine=None if local is None else local.cosine,
                    local_noise=None if local is None else local.noise,
                    local_gain=0.0 if local is None else local.gain,
                    batch_noise=batch_noise if coupled else None,
                    expected=expected,
                    shape_b=of_step.cumulative.shape_b,
                    local_shape=None if local is None else local.shape_b,
                )
            )
        return figures

    def _kind(self, number: int) -> _Kind:
        i, j = self._paired.steps[number]
        return self._a.steps[i].operator, bool(self._a.steps[i].weights), self._b.steps[j].integer

    def _expected(self, number: int, noises: Mapping[_Kind, Mapping[int, float]]) -> float:
        """The local noise of the operator's kind: the median of the others, or more if its arithmetic explains more."""
        *_, integer = self._kind(number)
        halves = 10 in (self._probed[0][self._names(number)[0]].kind, self._probed[1][self._names(number)[1]].kind)
        floor = _EXPECTED["integer" if integer else "float16" if halves else "float32"]
        others = [noise for other, noise in noises.get(self._kind(number), {}).items() if other != number]
        if len(others) < _FEWEST_PEERS:
            others = [
                n for (*_, quantized), each in noises.items() if quantized == integer for k, n in each.items() if k != number
            ]
        finite = [noise for noise in others if math.isfinite(noise)]
        return max(floor, float(np.median(finite))) if len(finite) >= _FEWEST_PEERS else floor

    def _patterns(self, worst: Sequence[int], figures: Sequence[StepFigures]) -> dict[int, str]:
        """How the error of some pairs lies in time, channels and items."""
        patterns: dict[int, str] = {}
        for number in worst:
            sessions = _Sessions(self, [number])
            batch = self._waveforms[:1]
            if figures[number].batch_noise is not None:
                length = min(len(waveform) for waveform in self._waveforms[:_BATCH])
                batch = [waveform[:length] for waveform in self._waveforms[:_BATCH]]
            values_a, _, local = sessions.run(batch)
            name_a, _ = self._names(number)
            if number in local:
                patterns[number] = pattern_of(
                    values_a[name_a], local[number], self._probed[0][name_a].time, figures[number].expected
                )
            self._tell(Beat())
        return patterns


class _Sessions:
    """The two models with some tensors exposed, and B's parts that make them of A's tensors."""

    def __init__(self, measuring: _Measuring, group: Sequence[int]) -> None:
        self._m = measuring
        self._group = group
        a, b = measuring._a, measuring._b
        self._tensors = {name_b: name_a for name_a, name_b in map(measuring._names, range(len(measuring._paired.steps)))}
        outputs_b = list(dict.fromkeys(measuring._names(number)[1] for number in group))
        self._part = self._local()
        needed = dict.fromkeys(measuring._names(number)[0] for number in group)
        needed |= dict.fromkeys(
            self._tensors[name] for name in (self._part.inputs if self._part else ()) if name in self._tensors
        )
        self._session_a = PartSession(cut_out(a, list(needed)), measuring._threads)
        measuring._tell(Beat())
        self._session_b = PartSession(cut_out(b, outputs_b), measuring._threads)
        measuring._tell(Beat())

    def _local(self) -> PartSession | None:
        while numbers := [number for number in self._group if number not in self._m._dead]:
            types = {name: self._m._probed[1][name].kind for name in self._tensors}
            outputs = {self._m._names(number)[1]: f"local{number}" for number in numbers}
            try:
                session = PartSession(side_by_side(self._m._b, outputs, types), self._m._threads)
            except RunError as error:
                self._drop(error, numbers)
                continue
            self._m._tell(Beat())
            return session
        return None

    def _drop(self, error: RunError, numbers: Sequence[int]) -> None:
        """Leave out the part that does not run by itself; all, if nobody knows which it is."""
        culprit = {f"local{number}": number for number in numbers}.get((error.node or "").split("/")[0])
        self._m._dead.update([culprit] if culprit is not None and len(self._m._dead) < _MOST_FAILURES else numbers)

    def run(self, batch: Sequence[npt.NDArray[np.float32]]) -> tuple[Feeds, Feeds, dict[int, npt.NDArray[Any]]]:
        """Exposed tensors of A and of B by name, and by number of pair what B makes of A's tensors."""
        values_a = self._session_a.run(self._m._feeds(0, batch))
        values_b = self._session_b.run(self._m._feeds(1, batch))
        feeds = self._m._feeds(1, batch)
        while self._part is not None:
            for name in self._part.inputs & self._tensors.keys():
                kind = {10: np.float16, 11: np.float64}.get(self._m._probed[1][name].kind, np.float32)
                feeds[name] = values_a[self._tensors[name]].astype(kind, copy=False)
            try:
                results = self._part.run(feeds)
            except RunError as error:
                self._drop(error, [number for number in self._group if number not in self._m._dead])
                self._part = self._local()
                continue
            return values_a, values_b, {int(name.removeprefix("local")): value for name, value in results.items()}
        return values_a, values_b, {}


def cka(x: Sequence[npt.NDArray[np.float32]], y: Sequence[npt.NDArray[np.float32]]) -> float | None:
    """Linear CKA of two lists of vectors, one per clip, by their Gram matrices; None if it is not defined."""
    if len(x) < 3 or len({len(vector) for vector in (*x,)}) != 1 or len({len(vector) for vector in y}) != 1:
        return None
    grams = []
    for vectors in (x, y):
        matrix = np.stack(vectors).astype(np.float64)
        matrix -= matrix.mean(axis=0)
        grams.append(matrix @ matrix.T)
    scale = float(np.linalg.norm(grams[0]) * np.linalg.norm(grams[1]))
    value = float((grams[0] * grams[1]).sum()) / scale if scale > 0 else math.nan
    return min(1.0, value) if math.isfinite(value) else None
