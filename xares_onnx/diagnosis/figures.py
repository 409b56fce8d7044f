"""What is recorded of an operator: how far its output differs, by itself and as it comes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from .places import Place

_SAME = 1e-9  # noise of the same arithmetic in another order
_SCALED = 0.1  # of the expected noise: what an error that scales the tensor may have, since chance scales by far less


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


@dataclass
class Sums:
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
class Tracked:
    """What is gathered of one operator."""

    cumulative: Sums = field(default_factory=Sums)
    local: Sums | None = None
    batched: Sums | None = None
    pooled: tuple[list[npt.NDArray[np.float32]], list[npt.NDArray[np.float32]]] = field(default_factory=lambda: ([], []))


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
