"""How far the tensors of two graphs are apart on clips: each operator as it comes, and fed with what the reference has.

An operator is measured *cumulatively* by its output in both models, and *locally* by what B makes of A's own tensors, from
one paired tensor to the next: there only its own error shows. Clip after clip is put through, and tensors are exposed a
bounded number at a time, so memory depends neither on how many clips nor on how many tensors there are. Runs in the worker
process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..encoder.spec import EncoderInfo
from ..encoder.worker import Beat, Tell
from ..errors import ModelError
from ..progress import Doing, Progress
from .figures import Measurement, StepFigures, Sums, Tracked, cka
from .opening import Paired, open_pair
from .patterns import pattern_of
from .places import places
from .running import Feeds, PartSession, RunError, clip_samples, feeds_of, types_of
from .surgery import cut_out, side_by_side

_GROUP_BYTES = 384 << 20  # of exposed tensors of one clip, in both models together
_MOST_POOLED = 4_096  # values per clip that CKA compares
_BATCH = 3  # clips in one call, for what depends on neighbours
_MOST_FAILURES = 40  # parts that do not run alone, before local figures are given up
# The noise, as a share of power, that an operator has by itself: in float32 by another order of sums, in float16 by
# rounding, in integers by 8 bits. What its kind has in the rest of the model counts instead, if that is more.
_EXPECTED = {"float32": 1e-8, "float16": 1e-5, "integer": 1e-4}
_LOADING_PATIENCE = 30.0  # more seconds of silence, since three sessions are loaded
_FEWEST_PEERS = 2
_SHOWN_PATTERNS = 8  # suspects whose error is looked at along time and channels


_Kind = tuple[str, bool, bool]  # operator, whether it has constant matrices, whether B computes it in integers


@dataclass(frozen=True)
class _Probed:
    """Of a tensor: its shape for one clip, the axis of time if it has one, its type, its bytes."""

    shape: tuple[int, ...]
    time: int | None
    kind: int
    size: int


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
        tracked: dict[int, Tracked] = {}
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
                session = PartSession(partial(cut_out, graph, names[start : start + 64]), self._threads)
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
            own = self._probed[0][name_a].size + 2 * self._probed[1][name_b].size  # B's by itself, too
            if group and size + own > _GROUP_BYTES:
                yield group
                group, size = [], 0
            group.append(number)
            size += own
        if group:
            yield group

    # ---------------------------------------------------------------- clips

    def _measure_group(self, group: Sequence[int], done: int, total: int) -> dict[int, Tracked]:
        tracked = {number: Tracked() for number in group}
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
        tracked: Mapping[int, Tracked],
        *,
        batched: bool,
    ) -> None:
        values_a, values_b, local = sessions.run(batch)
        for number in group:
            name_a, name_b = self._names(number)
            x, of_step = values_a[name_a], tracked[number]
            if batched:
                if number in local:
                    of_step.batched = of_step.batched or Sums()
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
                of_step.local = of_step.local or Sums()
                of_step.local.add(x, local[number])

    # ---------------------------------------------------------------- figures

    def _figures(self, tracked: Mapping[int, Tracked]) -> list[StepFigures]:
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
        measuring._tell(Doing("loading parts of the models", _LOADING_PATIENCE))
        self._part = self._local()
        needed = dict.fromkeys(measuring._names(number)[0] for number in group)
        needed |= dict.fromkeys(
            self._tensors[name] for name in (self._part.inputs if self._part else ()) if name in self._tensors
        )
        self._session_a = PartSession(partial(cut_out, a, list(needed)), measuring._threads)
        measuring._tell(Beat())
        self._session_b = PartSession(partial(cut_out, b, outputs_b), measuring._threads)
        measuring._tell(Doing("running the models"))

    def _local(self) -> PartSession | None:
        while numbers := [number for number in self._group if number not in self._m._dead]:
            types = {name: self._m._probed[1][name].kind for name in self._tensors}
            outputs = {self._m._names(number)[1]: f"local{number}" for number in numbers}
            try:
                session = PartSession(partial(side_by_side, self._m._b, outputs, types), self._m._threads)
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
