"""Inner tensors of a model as further outputs, in a copy in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from ..errors import ContractError, nearest, quoted

if TYPE_CHECKING:
    import onnx


ALL_LAYERS = "all-layers"
NUMBERED = "node."


class Exposure(msgspec.Struct, frozen=True):
    """Inner tensors that become outputs.

    `cuts` are inputs of Slice nodes that each tensor goes through first: if a model pads its input and cuts its output, its
    layers hold the padding too.
    """

    tensors: tuple[str, ...]
    cuts: tuple[tuple[str, ...], ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs, in the order of `tensors`."""
        return tuple(f"{tensor}.cut" if self.cuts else tensor for tensor in self.tensors)


def exposing(model: onnx.ModelProto, exposure: Exposure) -> bytes:
    """Serialise a model with more outputs; weights in other files stay there. `model` is changed.

    Raises:
        ContractError: The model has no such tensor.
    """
    computed = [name for node in model.graph.node for name in node.output if name]
    for tensor, output in zip(exposure.tensors, exposure.outputs, strict=True):
        if tensor not in computed:
            raise ContractError(
                f"the model has no output or inner tensor {quoted(tensor)}{nearest(tensor, computed)}; name another by "
                "--taps"
            )
        for i, bounds in enumerate(exposure.cuts):
            last = i == len(exposure.cuts) - 1
            tensor, source = output if last else f"{output}.{i}", tensor
            model.graph.node.add(op_type="Slice", name=f"{tensor}.node", input=[source, *bounds], output=[tensor])
        if output not in {value.name for value in model.graph.output}:
            model.graph.output.add(name=output)
    content: bytes = model.SerializeToString()
    return content


def numbered(model: onnx.ModelProto) -> bytes:
    """Serialise a model whose nodes are named by their numbers; weights in other files stay there. `model` is changed.

    Nodes that ONNX Runtime makes of these have names that begin with one of theirs, or none of theirs.
    """
    for number, node in enumerate(model.graph.node):
        node.name = f"{NUMBERED}{number}"
    content: bytes = model.SerializeToString()
    return content
