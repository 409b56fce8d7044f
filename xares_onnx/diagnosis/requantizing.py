"""How B was quantised, as the options of ONNX Runtime's quantizer, and A quantised again with some nodes left out. Runs in
the worker process."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np

from ..encoder.spec import EncoderInfo
from ..encoder.worker import Tell
from ..errors import ModelError
from ..progress import Doing
from .graph import Graph
from .pairing import pair
from .surgery import load

_DYNAMIC = {
    "MatMulInteger": "MatMul",
    "ConvInteger": "Conv",
    "DynamicQuantizeLSTM": "LSTM",
    "DynamicQuantizeMatMul": "MatMul",
    "MatMulIntegerToFloat": "MatMul",
    "QAttention": "Attention",
}
_PATIENCE = 600.0  # seconds for the quantizer, which gives no sign of life


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """Options of ONNX Runtime's quantizer. `dynamic` says whether B was quantised without calibration."""

    dynamic: bool
    operators: list[str]
    unsigned: bool
    per_channel: bool
    reduce_range: bool
    excluded: list[str]
    lines: list[str]


def recipe_of(infos: tuple[EncoderInfo, EncoderInfo], trust: bool, excluded: list[str], *, tell: Tell) -> Recipe:
    """How B was quantised, read off its graph, without the nodes `excluded`."""
    tell(Doing("reading the models", 120.0))
    a, b = (Graph(load(Path(info.path), trust=trust)) for info in infos)
    pairs = pair(a, b)
    names = {node.op_type for node in b.nodes}
    dynamic = bool(names & _DYNAMIC.keys())
    static = not dynamic and "DequantizeLinear" in names
    operators = sorted(
        {a.steps[i].operator for i, j in pairs.b_of.items() if b.steps[j].integer and (static or a.steps[i].weighted)}
    )
    operators = [_operator(a, operator) for operator in operators]
    # What B left in float by itself is left out too, or a new quantisation would not be B's.
    own = [a.steps[i].name for i, j in pairs.b_of.items() if not b.steps[j].integer and a.steps[i].operator in operators]
    own = [name for name in own if name in {a.nodes[n].name for n in range(len(a.nodes))}]
    weights = [b.constant(name) for step in b.steps if step.integer for name in step.weights if name in b.tensors]
    whole = [w for w in weights if w is not None and w.dtype in (np.int8, np.uint8) and w.ndim > 1]
    scales = [
        b.constant(name)
        for step in b.steps
        if step.integer
        for name in step.weights
        if name in b.tensors and "scale" in name
    ]
    unsigned = bool(whole) and sum(w.dtype == np.uint8 for w in whole) * 2 > len(whole)
    reduced = bool(whole) and all(int(np.abs(w.astype(np.int16)).max()) <= (127 if unsigned else 64) for w in whole)
    per_channel = any(scale is not None and scale.size > 1 for scale in scales)
    left_out = sorted({*own, *excluded})
    return Recipe(
        dynamic=dynamic,
        operators=operators,
        unsigned=unsigned,
        per_channel=per_channel,
        reduce_range=reduced,
        excluded=left_out,
        lines=_lines(dynamic, static, operators, unsigned, per_channel, reduced, left_out, infos),
    )


def _operator(graph: Graph, operator: str) -> str:
    names = {graph.nodes[step.nodes[0]].op_type for step in graph.steps if step.operator == operator}
    return "Gemm" if operator == "MatMul" and "MatMul" not in names and "Gemm" in names else operator


def _lines(
    dynamic: bool,
    static: bool,
    operators: list[str],
    unsigned: bool,
    per_channel: bool,
    reduced: bool,
    excluded: list[str],
    infos: tuple[EncoderInfo, EncoderInfo],
) -> list[str]:
    if not dynamic and not static:
        return [
            "B is not quantised, so there are no options of a quantizer; these operators of A stay as they are:",
            *excluded,
        ]
    name = Path(infos[0].path).name
    left_out = ", ".join(f'"{each}"' for each in excluded)
    call = f'quantize_dynamic("{name}", "fixed.onnx"' if dynamic else f'quantize_static("{name}", "fixed.onnx", reader'
    kind = "QUInt8" if unsigned else "QInt8"
    listed = ", ".join(f'"{each}"' for each in operators)
    return [
        "recipe, from onnxruntime.quantization:",
        f"{call}, op_types_to_quantize=[{listed}], weight_type=QuantType.{kind}, per_channel={per_channel}, "
        f"reduce_range={reduced}, nodes_to_exclude=[{left_out}])",
    ]


def requantize(info: EncoderInfo, recipe: Recipe, path: str, *, tell: Tell) -> int:
    """Write A quantised by a dynamic recipe; returns the file's bytes.

    Raises:
        ModelError: ONNX Runtime's quantizer fails.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    tell(Doing("quantising the model", _PATIENCE))
    logging.disable(logging.WARNING)  # advice about its own preprocessing
    try:
        with TemporaryDirectory() as folder:
            source = Path(folder) / "float.onnx"
            model = load(Path(info.path))
            onnx.save(model, source)
            quantize_dynamic(
                source,
                path,
                op_types_to_quantize=recipe.operators,
                weight_type=QuantType.QUInt8 if recipe.unsigned else QuantType.QInt8,
                per_channel=recipe.per_channel,
                reduce_range=recipe.reduce_range,
                nodes_to_exclude=recipe.excluded,
            )
    except Exception as error:  # the quantizer raises whatever its parts do
        raise ModelError(f"ONNX Runtime's quantizer fails: {' '.join(str(error).split())[:200]}") from error
    finally:
        logging.disable(logging.NOTSET)
    return Path(path).stat().st_size
