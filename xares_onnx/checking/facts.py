"""Facts from a model's file: versions, operators, precision. Parses an untrusted protobuf, in the worker.

Call it only after `scan_model` has accepted the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..encoder.model_file import ModelScan
from ..encoder.worker import Beat, Tell
from ..errors import printable
from .findings import ModelFacts

if TYPE_CHECKING:
    import onnx

_DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulIntegerToFloat"}


def read_facts(path: str, scan: ModelScan, *, tell: Tell) -> ModelFacts:
    import onnx

    tell(Beat())
    model = onnx.load_model(Path(path), format="protobuf", load_external_data=False)
    operators = Counter(printable(node.op_type) for node in _nodes(model))
    return ModelFacts(
        sha256=scan.sha256,
        bytes=scan.bytes,
        parameters=scan.parameters,
        producer=scan.producer,
        ir_version=model.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        operators=dict(operators.most_common()),
        precision=_precision(model, operators),
        metadata=scan.metadata,
    )


def _precision(model: onnx.ModelProto, operators: Counter[str]) -> Literal["fp32", "fp16", "int8-dynamic"]:
    if _DYNAMIC & operators.keys():
        return "int8-dynamic"
    half = sum(len(tensor.raw_data) for tensor in model.graph.initializer if tensor.data_type == tensor.FLOAT16)
    inputs = any(value.type.tensor_type.elem_type == 10 for value in (*model.graph.input, *model.graph.output))  # FLOAT16
    return "fp16" if half or inputs or any(_casts_to_half(node) for node in model.graph.node) else "fp32"


def _casts_to_half(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and any(attribute.name == "to" and attribute.i == 10 for attribute in node.attribute)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node as it is written: of the graph, of inner graphs, and of functions, which are not expanded."""
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                waiting.extend(graph.node)
