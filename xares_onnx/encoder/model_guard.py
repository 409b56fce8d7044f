"""What a model's protobuf may hold, checked before ONNX Runtime reads it.

Loading inlines nested functions, makes sparse tensors dense and opens the files that tensors name. All of that is bounded
here by arithmetic alone: nothing is inlined, checked by onnx or shape-inferred. Runs in the worker process.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from ..errors import ModelError, quoted
from .limits import Limits

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

# The domains of ONNX Runtime's own operators. All others come from libraries, which are never loaded.
_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc"})
_COMPILED = "EPContext"  # names a file, or carries code for one machine
_MAX_DEPTH = 100  # of graphs in graphs and functions in functions
_MAX_RANK = 100
_MAX_NAMES = 1_000  # inputs and outputs of the graph
_MAX_NAME = 1_000  # characters
_MAX_TEXT = 10_000  # characters of any other name: of a node, an operator, a function, an axis
_UNBOUNDED = {"doc_string", "value", "key"}  # documentation, which is never read; metadata has a bound of its own
_MAX_METADATA = 16 << 20  # characters
# At a location such as */_ORT_MEM_ADDR_/*, ONNX Runtime reads memory instead of a file, with an address as offset.
_MEMORY = "_MEM_ADDR_"
# Bits per value by `TensorProto.DataType`; texts have no fixed size, and types of 2 and 4 bits are packed.
_BITS = {
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13, 14), 64),
    **{8: 0, 15: 128, 21: 4, 22: 4, 23: 4, 25: 2, 26: 2},
}


def check_model(path: Path, model: onnx.ModelProto, limits: Limits) -> tuple[int, tuple[str, ...]]:
    """Check what a model holds.

    Args:
        path: The model's file.
        model: Its protobuf, without external data.
        limits: The limits on its size and number of parts.

    Returns:
        How many values its tensors hold, and the locations of its external data.

    Raises:
        ModelError: It is damaged, or holds what is refused.
    """
    import onnx

    if not model.graph.node or not model.graph.output:
        raise ModelError(f"{path} is not an ONNX file: it holds no graph")
    tensors = []
    for message in messages(path, model, limits):
        match message:
            case onnx.TensorProto():
                tensors.append(message)
            case onnx.SparseTensorProto():
                if 16 * _elements(path, message.dims, "a sparse tensor") > limits.dense_bytes:
                    raise ModelError(f"{path} has a sparse tensor of more than {limits.dense_bytes >> 30} GB as a dense one")
    _check_names(path, model)
    _Operators(path, model, limits).check()
    locations = [_check_tensor(path, tensor) for tensor in tensors]
    values = sum(_elements(path, tensor.dims, tensor.name) for tensor in tensors)
    return values, tuple(sorted({location for location in locations if location}))


def messages(path: Path, model: onnx.ModelProto, limits: Limits) -> Iterator[Message]:
    """Every message of a model, at any depth: graphs, nodes, tensors, functions.

    Raises:
        ModelError: There are too many, or a text is not UTF-8; protobuf then returns bytes.
    """
    from google.protobuf.message import Message

    waiting: list[Message] = [model]
    seen = 0
    while waiting:
        message = waiting.pop()
        yield message
        seen += 1
        if seen + len(waiting) > limits.parts:
            raise ModelError(f"{path} holds more than {limits.parts} nodes, attributes and tensors")
        for field, value in message.ListFields():
            if field.message_type is not None:
                waiting.extend([value] if isinstance(value, Message) else value)
            elif field.type == field.TYPE_STRING:
                for text in [value] if isinstance(value, str | bytes) else value:
                    if isinstance(text, bytes):
                        raise ModelError(f"{path} is damaged: its {field.name} is not UTF-8 text")
                    if len(text) > _MAX_TEXT and field.name not in _UNBOUNDED:
                        raise ModelError(f"{path} has a {field.name} of more than {_MAX_TEXT} characters")


def _check_names(path: Path, model: onnx.ModelProto) -> None:
    """Bound the names and the metadata, which end up in messages and in the record."""
    values = [*model.graph.input, *model.graph.output]
    if len(values) > _MAX_NAMES or any(len(value.name) > _MAX_NAME for value in values):
        raise ModelError(
            f"{path} has more than {_MAX_NAMES} inputs and outputs, or a name of more than {_MAX_NAME} characters among them"
        )
    if any(len(value.type.tensor_type.shape.dim) > _MAX_RANK for value in values):
        raise ModelError(f"{path} has an input or output of more than {_MAX_RANK} dimensions")
    if sum(len(entry.key) + len(entry.value) for entry in model.metadata_props) > _MAX_METADATA:
        raise ModelError(f"{path} has metadata of more than {_MAX_METADATA >> 20} MB")


# ---------------------------------------------------------------- nodes and functions


class _Size(NamedTuple):
    """Nodes with all functions inlined, and how many graphs and functions lie in one another."""

    nodes: int
    levels: int


class _Operators:
    """Checks whose operators a model uses, and how many nodes it has with all functions inlined.

    Each function is counted once, so a bomb of 2^1000 nodes is counted as fast as any model. The depth below a function is
    kept with its size: in a file that defines the innermost first, none is deep by itself.
    """

    def __init__(self, path: Path, model: onnx.ModelProto, limits: Limits) -> None:
        self._path, self._model, self._limit = path, model, limits.nodes
        self._functions = {
            (_domain(function.domain), function.name, function.overload): function for function in model.functions
        }
        if len(self._functions) < len(model.functions):  # which of them would run is undefined
            raise ModelError(f"{path} is damaged: it defines a function twice")
        self._sizes: dict[tuple[str, str, str], _Size | None] = {}  # None while a function is being counted

    def check(self) -> None:
        for key in self._functions:  # uncalled ones too: ONNX Runtime reads them all
            self._function(key, 0)
        self._nodes(self._model.graph.node, 0)

    def _function(self, key: tuple[str, str, str], depth: int) -> _Size:
        """What a function that is called at some depth adds; `levels` counts it and the deepest below it."""
        if key not in self._sizes:
            self._sizes[key] = None
            function = self._functions[key]
            defaults = self._graphs(function.attribute_proto, depth)
            body = self._nodes(function.node, depth + 1)
            self._sizes[key] = _Size(body.nodes + defaults.nodes, max(1 + body.levels, defaults.levels))
        size = self._sizes[key]
        if size is None:
            raise ModelError(f"{self._path} has a function {quoted(key[1])} that calls itself, so it cannot be loaded")
        self._check_depth(depth + size.levels)
        return size

    def _check_depth(self, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ModelError(f"{self._path} nests graphs and functions deeper than {_MAX_DEPTH}")

    def _nodes(self, nodes: Iterable[onnx.NodeProto], depth: int) -> _Size:
        self._check_depth(depth)
        count, levels = 0, 0
        for node in nodes:
            count += 1
            key = (_domain(node.domain), node.op_type, node.overload)
            if key in self._functions:
                inlined = self._function(key, depth)
                count, levels = count + inlined.nodes, max(levels, inlined.levels)
            elif node.op_type == _COMPILED:
                raise ModelError(
                    f"{self._path} holds a part compiled for one machine ({_COMPILED}), which may name any file; export it "
                    "without that part"
                )
            elif node.domain not in _DOMAINS:
                raise ModelError(
                    f"{self._path} needs operator {quoted(node.op_type)} of domain {quoted(node.domain)}, which ONNX "
                    "Runtime lacks; custom operators are never loaded, so export the model with standard ones"
                )
            if node.attribute:
                inner = self._graphs(node.attribute, depth)
                count, levels = count + inner.nodes, max(levels, inner.levels)
            if count > self._limit:
                raise ModelError(
                    f"{self._path} has more than {self._limit} nodes with all functions inlined; if you trust it, --trust "
                    "lifts the limit"
                )
        return _Size(count, levels)

    def _graphs(self, attributes: Iterable[onnx.AttributeProto], depth: int) -> _Size:
        count, levels = 0, 0
        for attribute in attributes:
            if attribute.ref_attr_name and attribute.type in (attribute.GRAPH, attribute.GRAPHS):
                raise ModelError(
                    f"{self._path} passes a graph to a function, which may multiply it without end; export it with its "
                    "functions inlined"
                )
            for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                inner = self._nodes(graph.node, depth + 1)
                count, levels = count + inner.nodes, max(levels, 1 + inner.levels)
        return _Size(count, levels)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


# ---------------------------------------------------------------- tensors


def _elements(path: Path, dims: Sequence[int], name: str) -> int:
    if len(dims) > _MAX_RANK:
        raise ModelError(f"{path} is damaged: tensor {quoted(name)} has {len(dims)} dimensions")
    if any(dim < 0 for dim in dims):
        raise ModelError(f"{path} is damaged: tensor {quoted(name)} has a negative dimension")
    return math.prod(dims)


def _check_tensor(path: Path, tensor: onnx.TensorProto) -> str | None:
    """The location of a tensor's external data, if it has any. Raises `ModelError` if it claims more than there is."""
    import onnx

    damaged = f"{path} is damaged: tensor {quoted(tensor.name)} "
    elements = _elements(path, tensor.dims, tensor.name)
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        raise ModelError(f"{path} has a tensor {quoted(tensor.name)} of type {tensor.data_type}, which is not supported")
    size = (elements * bits + 7) // 8
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if len(entries) < len(tensor.external_data):  # which of them counts is undefined
            raise ModelError(f"{damaged}has two locations")
        return _checked_location(path, entries, size)
    if tensor.HasField("raw_data"):
        if (held := len(tensor.raw_data)) != size:
            raise ModelError(f"{damaged}claims {_number(size)} bytes and holds {held}")
        return None
    fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
    held = max(len(tensor.string_data), *map(len, fields))
    packed = 8 // bits if 0 < bits < 8 else 1
    if elements > held * packed:
        raise ModelError(f"{damaged}claims {_number(elements)} values and holds {held * packed}")
    return None


def _checked_location(model: Path, entries: dict[str, str], size: int) -> str:
    """The location, if it is a regular file in the model's folder, reached without links, that holds the tensor's bytes."""
    location = entries.get("location", "")
    problem = f"{model} keeps weights in {quoted(location)}, "
    relative = check_beside(model, location, problem)
    stat = (model.parent / relative).stat()
    offset, length = entries.get("offset", "0"), entries.get("length", str(size))
    if not all(re.fullmatch("[0-9]{1,18}", number, re.ASCII) for number in (offset, length)):
        raise ModelError(
            f"{model} is damaged: it reads bytes {quoted(offset[:30])} + {quoted(length[:30])} of {quoted(location)}"
        )
    if int(offset) + max(int(length), size) > stat.st_size:
        raise ModelError(problem + f"which ends at byte {stat.st_size}, before the weights do; get the whole file")
    return str(relative)


def check_beside(model: Path, location: str, problem: str) -> PurePosixPath:
    """A path relative to the model's folder, if it leads to a regular file there or below, without links.

    Raises:
        ModelError: It does not; the message begins with `problem`.
    """
    relative = PurePosixPath(location)
    if not location or relative.is_absolute() or ".." in relative.parts or "\\" in location or ":" in location:
        raise ModelError(problem + "outside its folder; put the file beside the model")
    if _MEMORY in location:
        raise ModelError(problem + "which ONNX Runtime reads as an address in its memory; name a file")
    path = model.parent
    for part in relative.parts:
        path = path / part
        if os.path.islink(path):  # unlike Path's, these two refuse no name
            raise ModelError(problem + "which is a link; put the file itself beside the model")
    if not os.path.isfile(path):
        raise ModelError(problem + "which does not exist; put the file beside the model")
    if path.stat().st_nlink > 1:
        raise ModelError(problem + "which is a hard link to a file elsewhere; put a copy beside the model")
    return relative


def _number(value: int) -> str:
    return str(value) if value < 1 << 64 else f"{value:.0e}" if value < 1 << 1000 else "countless"
