"""Which operator of one graph is which of another, whatever their names: by structure, and by weights where that stops.

Three rules in turn until none finds more. *Forward*: two operators of one kind that read paired tensors. *By weights*: two
operators of one kind whose constant matrices are alike, as those of a quantised copy are. *Backward*: the operators of one
kind that make what a paired operator reads. Between two fusions of one subgraph nothing is paired, and the weights behind
it begin anew. Runs in the worker process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .graph import Graph, Step

_COMMUTATIVE = frozenset({"Add", "Mul"})
_ALIKE = 0.6  # correlation of two matrices that are one; independent ones of 256 values have less than 0.3
_LEAST_VALUES = 32  # of a matrix that identifies an operator
_SAMPLED = 4_096  # values of a matrix that are compared


@dataclass
class Pairs:
    """Numbers of steps: `b_of[a]` of the step of B that step `a` of A is, `a_of` the reverse."""

    b_of: dict[int, int] = field(default_factory=dict)
    a_of: dict[int, int] = field(default_factory=dict)

    def add(self, a: int, b: int) -> None:
        self.b_of[a], self.a_of[b] = b, a


def pair(a: Graph, b: Graph) -> Pairs:
    """Pair the steps of two graphs."""
    return _Pairing(a, b).pairs()


class _Pairing:
    def __init__(self, a: Graph, b: Graph) -> None:
        self._a, self._b = a, b
        self._pairs = Pairs()
        self._tensors: dict[str, str] = {}  # float tensors of A -> of B
        inputs = [[name for name in graph.fed if name in graph.data] for graph in (a, b)]
        self._tensors.update(zip(*inputs, strict=False))
        self._shapes = [[_shapes(graph, step) for step in graph.steps] for graph in (a, b)]
        self._signatures = [[_signature(graph, step) for step in graph.steps] for graph in (a, b)]

    def pairs(self) -> Pairs:
        while True:
            before = len(self._pairs.b_of)
            self._forward()
            self._by_weights()
            if len(self._pairs.b_of) == before:
                self._backward()
            if len(self._pairs.b_of) == before:
                return self._pairs

    def _add(self, i: int, j: int) -> None:
        self._pairs.add(i, j)
        for name_a, name_b in zip(self._a.steps[i].outputs, self._b.steps[j].outputs, strict=False):
            self._tensors[name_a] = name_b

    def _forward(self) -> None:
        readers: dict[str, list[int]] = {}
        for j, step in enumerate(self._b.steps):
            for name in step.inputs:
                readers.setdefault(name, []).append(j)
        for i, step in enumerate(self._a.steps):
            if i in self._pairs.b_of or any(name not in self._tensors for name in step.inputs):
                continue
            wanted = [self._tensors[name] for name in step.inputs]
            candidates = [j for j in readers.get(wanted[0], ()) if self._free(i, j) and self._reads(j, wanted)]
            if candidates:
                self._add(i, max(candidates, key=lambda j: (self._likeness(i, j), -j)))

    def _reads(self, j: int, wanted: Sequence[str]) -> bool:
        step = self._b.steps[j]
        if step.operator in _COMMUTATIVE:
            return sorted(step.inputs) == sorted(wanted)
        return list(step.inputs) == list(wanted)

    def _free(self, i: int, j: int) -> bool:
        return j not in self._pairs.a_of and self._a.steps[i].operator == self._b.steps[j].operator

    def _likeness(self, i: int, j: int) -> float:
        """How alike two steps' weights are: their correlation if they have any, below 0 if their shapes differ."""
        ours, theirs = self._signatures[0][i], self._signatures[1][j]
        if ours is not None and theirs is not None and ours[0] == theirs[0]:
            return max(correlation(ours[1], theirs[1]), correlation(ours[1], theirs[2]))
        return 0.0 if self._shapes[0][i] == self._shapes[1][j] else -1.0

    def _by_weights(self) -> None:
        """Pair operators by their matrices: the best of every other, in both directions."""
        of_b: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for j, signature in enumerate(self._signatures[1]):
            if signature is not None and j not in self._pairs.a_of:
                of_b.setdefault((self._b.steps[j].operator, signature[0]), []).append(j)
        likeness: dict[tuple[int, int], float] = {}
        for i, signature in enumerate(self._signatures[0]):
            if signature is None or i in self._pairs.b_of:
                continue
            for j in of_b.get((self._a.steps[i].operator, signature[0]), ()):
                likeness[i, j] = self._likeness(i, j)
        for (i, j), value in sorted(likeness.items(), key=lambda entry: -entry[1]):
            if value >= _ALIKE and i not in self._pairs.b_of and j not in self._pairs.a_of:
                self._add(i, j)

    def _backward(self) -> None:
        for i, j in list(self._pairs.b_of.items()):
            ours, theirs = self._a.steps[i], self._b.steps[j]
            if len(ours.inputs) != len(theirs.inputs):
                continue
            for name_a, name_b in zip(ours.inputs, theirs.inputs, strict=True):
                one, other = self._a.step_of.get(name_a), self._b.step_of.get(name_b)
                if one is None or other is None or one in self._pairs.b_of or not self._free(one, other):
                    continue
                if self._likeness(one, other) >= 0:
                    self._add(one, other)


def correlation(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm > 0 else 0.0


def _shapes(graph: Graph, step: Step) -> tuple[tuple[int, ...], ...]:
    """Sorted dimensions of a step's constant tensors of several values; those of a quantised copy are the same."""
    dims = (sorted(graph.tensors[name].dims) for name in step.weights if name in graph.tensors)
    return tuple(sorted(tuple(d) for d in dims if np.prod(d) >= _LEAST_VALUES))


def _signature(graph: Graph, step: Step) -> tuple[tuple[int, ...], npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """Of a step's largest matrix: its sorted dimensions, and the centred values at some places, as it is and transposed."""
    sized = [(size, name) for name in step.weights if (size := _size(graph, name)) >= _LEAST_VALUES]
    if not sized:
        return None
    values = graph.constant(max(sized)[1])
    if values is None or values.dtype.kind not in "fiu" or values.ndim < 2:
        return None
    return tuple(sorted(d for d in values.shape if d > 1)), _sampled(values), _sampled(values.swapaxes(-1, -2))


def _size(graph: Graph, name: str) -> int:
    while name not in graph.tensors and name in graph.maker:
        reads = [read for read in graph.reads[graph.maker[name]] if read in graph.constants]
        if not reads:
            return 0
        name = reads[0]
    return int(np.prod(graph.tensors[name].dims)) if name in graph.tensors else 0


def _sampled(values: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    flat = values.reshape(-1)
    chosen = flat[:: max(1, -(-flat.size // _SAMPLED))].astype(np.float64)
    centred: npt.NDArray[np.float64] = chosen - chosen.mean()
    return centred


def unpaired(graph: Graph, paired: Iterable[int]) -> list[Step]:
    """The steps that were not paired and would be measured."""
    known = set(paired)
    return [step for i, step in enumerate(graph.steps) if i not in known and step.measured]
