"""Tensors inside a graph: which of them are the outputs of an encoder's layers, and how any is made an output of the model.

Layers are found where the residual stream passes from one to the next.

A residual join adds to a tensor what weights have made of it: x + f(x). A transformer layer has two joins, a conformer
layer four; what repeats along the chain of joins is a layer. A layer's output is what the next layer's first join adds to,
so a normalisation that closes a layer belongs to it. Names are not looked at: they differ between exporters, and may lie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import ContractError
from ..exposure import Exposure

if TYPE_CHECKING:
    import onnx

_ADDITIONS = {"Add", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"}  # the last two as ONNX Runtime fuses them
_WEIGHTED = {
    "Attention",
    "Conv",
    "ConvInteger",
    "ConvTranspose",
    "DynamicQuantizeMatMul",
    "Einsum",
    "FusedConv",
    "FusedMatMul",
    "GRU",
    "Gemm",
    "LSTM",
    "MatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "MultiHeadAttention",
    "QAttention",
    "QLinearConv",
    "QLinearMatMul",
    "Softmax",
}
_FEWEST = 2  # layers, below which nothing repeats
_DEEPEST = 3  # joins within joins


_KEEPS_AXES = {"Cast", "Dropout", "Identity", "LayerNormalization", "SimplifiedLayerNormalization", "Slice"}


def layers_of(model: onnx.ModelProto, output: str) -> Exposure:
    """The stream of `residual_layers` as outputs that are cut in time as `output` is."""
    graph = _Graph(model, output)
    stream = residual_layers(model, output)
    return Exposure(tuple(stream), graph.cuts_behind(stream[-1]))


@dataclass(frozen=True)
class _Join:
    """A residual join: its node, the tensor that is added to, and what makes the other operand of it."""

    node: int
    skip: str
    branch: int  # nodes between the two, as bits
    made_by: tuple[tuple[str, int], ...]


def residual_layers(model: onnx.ModelProto, output: str) -> list[str]:
    """Tensors of the residual stream on the way to `output`: what goes into the first layer, then each layer's output.

    Raises `ContractError` where no chain of two or more equal layers is found.
    """
    graph = _Graph(model, output)
    joins = list(graph.joins())
    nested = [sum(1 for other in joins if other.branch >> join.node & 1) for join in joins]
    for depth in range(_DEEPEST):
        chain = graph.chain([join for join, level in zip(joins, nested, strict=True) if level == depth])
        period, repeats = _repetition([join.made_by for join in chain])
        if repeats >= _FEWEST:
            stream = [join.skip for join in chain[len(chain) - period * repeats :: period]]
            return [*stream, graph.end_of_last(stream[-1], chain[-period - 1].node, chain[-1].node)]
    raise ContractError(
        f"no chain of residual layers leads to output {output!r}, so its layers cannot be told; name tensors by --taps"
    )


class _Graph:
    """The part of a graph that leads from its inputs to one output: nodes in their order, ancestors as bits."""

    def __init__(self, model: onnx.ModelProto, output: str) -> None:
        self._nodes = list(model.graph.node)
        self._output = output
        self._made_at = {name: i for i, node in enumerate(self._nodes) for name in node.output if name}
        self._inputs = [list(dict.fromkeys(_inputs_of(node))) for node in self._nodes]
        constants = {tensor.name for tensor in model.graph.initializer}
        self._fed = {value.name for value in model.graph.input} - constants
        # Bit i stands for node i; nodes are in topological order, as ONNX demands.
        self._ancestors: list[int] = []
        self._live: list[bool] = []  # whether a node depends on an input at all: a constant is no operand
        for i, inputs in enumerate(self._inputs):
            makers = [self._made_at[name] for name in inputs if name in self._made_at]
            if any(maker >= i for maker in makers):
                raise ContractError("the nodes of its graph are out of order, so its layers cannot be told; export it again")
            bits = 1 << i
            for maker in makers:
                bits |= self._ancestors[maker]
            self._ancestors.append(bits)
            self._live.append(any(name in self._fed for name in inputs) or any(self._live[maker] for maker in makers))
        self._descendants = [1 << i for i in range(len(self._nodes))]
        for i in reversed(range(len(self._nodes))):
            for name in self._inputs[i]:
                if name in self._made_at:
                    self._descendants[self._made_at[name]] |= self._descendants[i]

    def joins(self) -> Iterator[_Join]:
        """Every residual join on the way to the output, in topological order."""
        wanted = self._ancestors[self._made_at[self._output]] if self._output in self._made_at else 0
        for i, node in enumerate(self._nodes):
            if node.op_type in _ADDITIONS and wanted >> i & 1:
                left, right = node.input[0], node.input[1]
                for skip, other in ((left, right), (right, left)):
                    if (branch := self._between(skip, other)) is None:
                        continue
                    made_by = Counter(self._nodes[k].op_type for k in _bits(branch) if self._nodes[k].op_type in _WEIGHTED)
                    if made_by:
                        yield _Join(i, skip, branch, tuple(sorted(made_by.items())))
                    break

    def chain(self, joins: Sequence[_Join]) -> list[_Join]:
        """The joins of one stream: each adds to what comes of the one before. The last is the one nearest to the output."""
        chain: list[_Join] = []
        for join in reversed(joins):
            if not chain or self._ancestors_of(chain[-1].skip) >> join.node & 1:
                chain.append(join)
        return chain[::-1]

    def end_of_last(self, last_but_one: str, its_join: int, last_join: int) -> str:
        """The output of the last layer: as far behind its last join as the layer before it ends behind its own.

        `its_join` is the last join of that layer, whose output is `last_but_one`. Where the graph ends sooner, its output.
        """
        steps: list[str] = []  # kinds of node from the end of a layer back to its last join
        at = self._made_at[last_but_one]
        while at != its_join:
            steps.append(self._nodes[at].op_type)
            before = [self._made_at[name] for name in self._inputs[at] if name in self._made_at]
            at = next(maker for maker in before if self._ancestors[maker] >> its_join & 1)
        at, position = last_join, list(self._nodes[its_join].output).index(last_but_one) if not steps else 0
        for kind in reversed(steps):
            followers = [i for i in _bits(self._descendants[at]) if set(self._inputs[i]) & set(self._nodes[at].output)]
            matching = [i for i in followers if self._nodes[i].op_type == kind and i != at]
            if not matching:
                return self._output
            at = matching[0]
        names = self._nodes[at].output
        return names[position] if position < len(names) and names[position] else self._output

    def cuts_behind(self, tensor: str) -> tuple[tuple[str, ...], ...]:
        """What cuts a tensor on its way to the output, where nothing else moves its axes: Slices' inputs but the first."""
        cuts: list[tuple[str, ...]] = []
        name = self._output
        while name != tensor:
            node = self._nodes[self._made_at[name]]
            if node.op_type not in _KEEPS_AXES:
                return ()
            if node.op_type == "Slice" and len(node.input) > 1:
                cuts.append(tuple(node.input[1:]))
            name = node.input[0]
            if name not in self._made_at:
                return ()
        return tuple(reversed(cuts))

    def _between(self, skip: str, other: str) -> int | None:
        """The nodes that make `other` from `skip`, both of them computed; None where it is not made from it."""
        if other not in self._made_at or not self._live[self._made_at[other]] or skip == other:
            return None
        end = self._ancestors[self._made_at[other]]
        if skip in self._made_at:
            start = self._made_at[skip]
            if not (self._live[start] and end >> start & 1):
                return None
            fused = self._nodes[start].op_type != "Add" and self._nodes[start].op_type in _ADDITIONS
            same, after = (set(self._nodes[start].output) if fused else {skip}), self._descendants[start] & end
        elif skip in self._fed:  # the model's input itself
            same, after = {skip}, end
        else:
            return None
        branch = 0
        for i in _bits(after):
            if same & set(self._inputs[i]):
                branch |= self._descendants[i]
        return (branch & end) or None

    def _ancestors_of(self, tensor: str) -> int:
        return self._ancestors[self._made_at[tensor]] if tensor in self._made_at else 0


def _repetition(kinds: Sequence[object]) -> tuple[int, int]:
    """(period, repeats) of what repeats at the end of a sequence: what covers most of it, in the least steps."""
    best = (1, 0)
    for period in range(1, len(kinds) // _FEWEST + 1):
        last = kinds[len(kinds) - period :]
        repeats = 1
        while (stop := len(kinds) - period * repeats) >= period and kinds[stop - period : stop] == last:
            repeats += 1
        if repeats >= _FEWEST and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def _inputs_of(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, its inner graphs too."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            for inner in graph.node:
                yield from _inputs_of(inner)


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low
