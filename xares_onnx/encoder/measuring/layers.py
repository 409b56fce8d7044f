"""Tensors inside a graph: which of them are the outputs of an encoder's layers.

Layers are found along the residual stream. A residual join adds to a tensor what weights have made of it: x + f(x). A
transformer layer has two joins, a conformer layer four; what repeats along the chain of joins is a layer. A layer's
output is what the next layer's first join adds to, so a normalisation that closes a layer belongs to it. Names are not
looked at: they differ between exporters, and may lie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from ...errors import ContractError, quoted
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
_FEWEST = 2  # layers
_DEEPEST = 3  # joins within joins
_KEEPS_AXES = {"Cast", "Dropout", "Identity", "LayerNormalization", "SimplifiedLayerNormalization", "Slice"}


NodeSet: TypeAlias = int
"""Nodes as the bits of a number, bit i for node i: sets of all ancestors of all nodes stay small and join fast."""


def _holds(nodes: NodeSet, node: int) -> bool:
    return bool(nodes >> node & 1)


def _members(nodes: NodeSet) -> Iterator[int]:
    """The nodes of a set in topological order."""
    while nodes:
        first = nodes & -nodes  # the lowest bit alone
        yield first.bit_length() - 1
        nodes ^= first


def layers_of(model: onnx.ModelProto, output: str) -> Exposure:
    """The layers before an output, exposed and cut in time as the output is.

    Args:
        model: The graph; weights in other files need not be loaded.
        output: The name of one of its outputs.

    Returns:
        The tensors of `residual_layers`.

    Raises:
        ContractError: No layers are found.
    """
    graph = _Graph(model, output)
    stream = _residual_layers(graph)
    return Exposure(tuple(stream), graph.cuts_after(stream[-1]))


def residual_layers(model: onnx.ModelProto, output: str) -> list[str]:
    """The residual stream before an output: the tensor that enters the first layer, then each layer's output.

    Raises:
        ContractError: No chain of two or more equal layers is found.
    """
    return _residual_layers(_Graph(model, output))


def layer_of_each_node(model: onnx.ModelProto, output: str) -> tuple[list[int], int]:
    """The layer that each node of a graph belongs to, and how many layers there are, from 1 on.

    0 for what leads to the first layer; one more than the last for what comes of it, or of none.

    Raises:
        ContractError: No layers are found.
    """
    graph = _Graph(model, output)
    stream = _residual_layers(graph)
    layers = [len(stream)] * len(model.graph.node)
    for layer, tensor in reversed(list(enumerate(stream))):
        for node in _members(graph.ancestors_of(tensor)):
            layers[node] = layer
    return layers, len(stream) - 1


def _residual_layers(graph: _Graph) -> list[str]:
    joins = list(graph.joins())
    depths = [sum(_holds(other.branch, join.node) for other in joins) for join in joins]
    for depth in range(_DEEPEST):
        chain = graph.chain([join for join, its_depth in zip(joins, depths, strict=True) if its_depth == depth])
        period, repeats = _repetition([join.weights for join in chain])
        if repeats >= _FEWEST:
            stream = [join.skip for join in chain[len(chain) - period * repeats :: period]]
            return [*stream, graph.end_of_last_layer(stream[-1], chain[-period - 1].node, chain[-1].node)]
    raise ContractError(
        f"no chain of residual layers leads to output {quoted(graph.output)}; name tensors by --taps instead"
    )


class Branch(NamedTuple):
    """What a residual join adds: the numbers of its nodes, the join's own, and what the branch is."""

    nodes: frozenset[int]
    join: int
    kind: str


def residual_branches(model: onnx.ModelProto, output: str) -> list[Branch]:
    """The branches of every residual join before an output, in topological order; none if the graph has no joins.

    A branch is called by what only it has: `attention`, `convolution`, or else `feed-forward`.
    """
    graph = _Graph(model, output)
    branches = []
    for join in graph.joins():
        operators = dict(join.weights)
        attention = operators.keys() & {"Softmax", "Attention", "MultiHeadAttention", "QAttention"}
        convolution = operators.keys() & {"Conv", "ConvInteger", "QLinearConv", "FusedConv"}
        kind = "attention" if attention else "convolution" if convolution else "feed-forward"
        branches.append(Branch(frozenset(_members(join.branch)), join.node, kind))
    return branches


@dataclass(frozen=True)
class _Join:
    """A residual join: its node, the tensor that is added to, and the branch that makes the other operand from it."""

    node: int
    skip: str
    branch: NodeSet
    weights: tuple[tuple[str, int], ...]
    """The branch's operators with weights, and how many there are of each."""


class _Graph:
    """The nodes that lead from a graph's inputs to one output, by number in topological order."""

    def __init__(self, model: onnx.ModelProto, output: str) -> None:
        self.output = output
        self._nodes = list(model.graph.node)
        self._maker = {name: i for i, node in enumerate(self._nodes) for name in node.output if name}
        self._inputs = [list(dict.fromkeys(_inputs_of(node))) for node in self._nodes]
        self._makers = [[self._maker[name] for name in names if name in self._maker] for names in self._inputs]
        if any(maker >= i for i, makers in enumerate(self._makers) for maker in makers):
            raise ContractError("the nodes of the graph are out of order, so its layers cannot be found; export it again")
        constants = {tensor.name for tensor in model.graph.initializer}
        self._fed = {value.name for value in model.graph.input} - constants
        self._depends_on_input = self._find_dependence()
        self._ancestors = self._find_ancestors()
        self._descendants = self._find_descendants()

    def _find_dependence(self) -> list[bool]:
        """Whether each node depends on a graph input: a constant is no operand of a residual join."""
        depends: list[bool] = []
        for names, makers in zip(self._inputs, self._makers, strict=True):
            depends.append(any(name in self._fed for name in names) or any(depends[maker] for maker in makers))
        return depends

    def _find_ancestors(self) -> list[NodeSet]:
        """Of each node, itself among them."""
        ancestors: list[NodeSet] = []
        for i, makers in enumerate(self._makers):
            nodes = 1 << i
            for maker in makers:
                nodes |= ancestors[maker]
            ancestors.append(nodes)
        return ancestors

    def _find_descendants(self) -> list[NodeSet]:
        """Of each node, itself among them."""
        descendants = [1 << i for i in range(len(self._nodes))]
        for i, makers in reversed(list(enumerate(self._makers))):
            for maker in makers:
                descendants[maker] |= descendants[i]
        return descendants

    def joins(self) -> Iterator[_Join]:
        """Every residual join before the output, in topological order."""
        if self.output not in self._maker:
            return
        for i in _members(self._ancestors[self._maker[self.output]]):
            if self._nodes[i].op_type in _ADDITIONS and (join := self._join(i)):
                yield join

    def _join(self, number: int) -> _Join | None:
        """The residual join that an addition is, if it is one."""
        left, right = self._nodes[number].input[:2]
        for skip, other in ((left, right), (right, left)):
            branch = self._between(skip, other)
            if branch:
                operators = [self._nodes[i].op_type for i in _members(branch)]
                weights = Counter(operator for operator in operators if operator in _WEIGHTED)
                return _Join(number, skip, branch, tuple(sorted(weights.items()))) if weights else None
        return None

    def chain(self, joins: Sequence[_Join]) -> list[_Join]:
        """The joins of one stream, of which each adds to what comes of the one before; the last is nearest to the output."""
        chain: list[_Join] = []
        for join in reversed(joins):
            if not chain or _holds(self.ancestors_of(chain[-1].skip), join.node):
                chain.append(join)
        return chain[::-1]

    def end_of_last_layer(self, previous_output: str, previous_join: int, last_join: int) -> str:
        """The output of the last layer: as many nodes after its last join as in the layer before it.

        `previous_join` is the last join of the layer before, and `previous_output` that layer's output. The graph's
        output, if the graph ends sooner.
        """
        steps: list[str] = []  # operators from the end of a layer back to its last join
        at = self._maker[previous_output]
        while at != previous_join:
            steps.append(self._nodes[at].op_type)
            at = next(maker for maker in self._makers[at] if _holds(self._ancestors[maker], previous_join))
        position = 0 if steps else list(self._nodes[previous_join].output).index(previous_output)
        at = last_join
        for operator in reversed(steps):
            outputs = set(self._nodes[at].output)
            readers = [i for i in _members(self._descendants[at]) if i != at and outputs & set(self._inputs[i])]
            matching = [i for i in readers if self._nodes[i].op_type == operator]
            if not matching:
                return self.output
            at = matching[0]
        names = self._nodes[at].output
        return names[position] if position < len(names) and names[position] else self.output

    def cuts_after(self, tensor: str) -> tuple[tuple[str, ...], ...]:
        """How a tensor is cut on its way to the output: of each Slice all inputs but the first.

        Nothing, if a node on the way moves its axes.
        """
        cuts: list[tuple[str, ...]] = []
        name = self.output
        while name != tensor:
            node = self._nodes[self._maker[name]]
            if node.op_type not in _KEEPS_AXES:
                return ()
            if node.op_type == "Slice" and len(node.input) > 1:
                cuts.append(tuple(node.input[1:]))
            name = node.input[0]
            if name not in self._maker:
                return ()
        return tuple(reversed(cuts))

    def _between(self, skip: str, other: str) -> NodeSet:
        """The nodes that make `other` from `skip`; none if it is not made from it, or if either is a constant."""
        if skip == other or other not in self._maker or not self._depends_on_input[self._maker[other]]:
            return 0
        before_other = self._ancestors[self._maker[other]]
        if skip in self._fed:
            names, candidates = {skip}, before_other
        elif skip in self._maker:
            start = self._maker[skip]
            if not self._depends_on_input[start] or not _holds(before_other, start):
                return 0
            operator = self._nodes[start].op_type
            fused = operator in _ADDITIONS and operator != "Add"  # the sum is one of its outputs, the branch reads another
            names = set(self._nodes[start].output) if fused else {skip}
            candidates = self._descendants[start] & before_other
        else:
            return 0
        branch: NodeSet = 0
        for i in _members(candidates):
            if names & set(self._inputs[i]):
                branch |= self._descendants[i]
        return branch & before_other

    def ancestors_of(self, tensor: str) -> NodeSet:
        return self._ancestors[self._maker[tensor]] if tensor in self._maker else 0


def _repetition(items: Sequence[object]) -> tuple[int, int]:
    """(period, repeats) of the repetition at the end of a sequence that covers most of it; the shortest period of equals."""
    best = (1, 0)
    for period in range(1, len(items) // _FEWEST + 1):
        last = items[len(items) - period :]
        repeats = 1
        while (stop := len(items) - period * repeats) >= period and items[stop - period : stop] == last:
            repeats += 1
        if repeats >= _FEWEST and period * repeats > best[0] * best[1]:
            best = (period, repeats)
    return best


def _inputs_of(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node reads, and those that its inner graphs read."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            for inner in graph.node:
                yield from _inputs_of(inner)
