"""Where in an encoder an operator lies: in which layer, and in which part of it. Runs in the worker process."""

from __future__ import annotations

import msgspec

from ..encoder.measuring.layers import residual_branches, residual_layers
from ..errors import ContractError
from .graph import Graph, Step


class Place(msgspec.Struct, frozen=True):
    """`layer` counts from 1; 0 is what lies before the first, and one more than the last what lies after. `part` is
    `attention`, `feed-forward`, `convolution`, or empty."""

    layer: int
    part: str = ""
    layers: int = 0

    @property
    def text(self) -> str:
        if self.layer == 0:
            return "before layer 1"
        name = f"layer {self.layer}" if self.layer <= self.layers else f"after layer {self.layers}"
        return f"{name}'s {self.part}" if self.part and self.layer <= self.layers else name


def places(graph: Graph, output: str) -> list[Place]:
    """The place of every step of a graph."""
    try:
        stream = residual_layers(graph.model, output)
    except ContractError:
        return _in_turn(graph)
    layers = len(stream) - 1
    ends = [graph.maker.get(name, -1) for name in stream]
    depends: list[set[int]] = []  # of each node, the ends before it
    for i in range(len(graph.nodes)):
        own: set[int] = set()
        for name in graph.reads[i]:
            if (maker := graph.maker.get(name)) is not None:
                own |= depends[maker]
                own |= {k for k, end in enumerate(ends) if end == maker}
        depends.append(own)
    branches = residual_branches(graph.model, output)

    def place(step: Step) -> Place:
        i = step.nodes[-1]
        layer = max(depends[i], default=-1) + 1
        containing = [branch for branch in branches if branch.nodes & set(step.nodes)]
        kinds = [branch.kind for branch in sorted(containing, key=lambda branch: len(branch.nodes))]
        joined = next((branch.kind for branch in branches if branch.join in step.nodes), "")
        part = (kinds or [joined])[0] if 0 < layer <= layers else ""
        return Place(layer, part, layers)

    return [place(step) for step in graph.steps]


def _in_turn(graph: Graph) -> list[Place]:
    """Without residual layers each operator with a matrix begins one, as in a stack of recurrent or convolutional layers."""
    in_turn, layer = [], 0
    total = sum(_begins(step) for step in graph.steps)
    for step in graph.steps:
        layer += _begins(step)
        in_turn.append(Place(layer, "", total))
    return in_turn


def _begins(step: Step) -> bool:
    return (
        step.measured
        and bool(step.weights)
        and step.operator in ("LSTM", "GRU", "RNN", "Conv", "MatMul", "Attention", "Einsum")
    )
