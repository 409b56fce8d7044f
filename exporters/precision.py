"""Smaller files: weights in half precision, or the matrices of linear layers in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import Tensor, nn

from xares_onnx.errors import UsageError

__all__ = ["LOUDNESS_STEP", "PRECISIONS", "TOLERANCE", "Precision", "halve", "quantize"]

Precision = Literal["fp32", "fp16", "int8-dynamic"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8-dynamic")

# The largest difference of a file from the float32 module, as a share of the largest absolute value in a clip's embedding.
TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 0.02, "int8-dynamic": 0.2}

# How much louder each probe clip of a batch is than the one before. Dynamic quantisation has one scale for a whole batch, so
# a quiet clip beside a loud one is lost: such a file is for clips of one loudness, or for batches of one.
LOUDNESS_STEP: dict[Precision, float] = {"fp32": 10.0, "fp16": 10.0, "int8-dynamic": 1.0}


def halve(encoder: nn.Module) -> nn.Module:
    """`encoder` itself, changed to compute in float16 except in its child `front_end`, where powers would underflow.

    Its inputs and outputs stay float32.

    Raises:
        UsageError: All of it is a front end, or a part is recurrent: loading such a file kills ONNX Runtime's process.
    """
    parts = [part for name, part in encoder.named_children() if name != "front_end"]
    if not hasattr(encoder, "front_end"):
        parts = [encoder]
    if not any(True for part in parts for _ in part.parameters()):
        raise UsageError("this encoder has no weights to keep in half precision; export it without --dtype fp16")
    if any(isinstance(module, nn.RNNBase) for part in parts for module in part.modules()):
        raise UsageError("ONNX Runtime has no recurrent layers in half precision; export it without --dtype fp16")
    for part in parts:
        part.half()
        part.register_forward_pre_hook(lambda _, inputs: _cast(inputs, torch.float32, torch.float16))
        part.register_forward_hook(lambda _, __, outputs: _cast(outputs, torch.float16, torch.float32))
    return encoder


def _cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(item, before, after) for item in value)
    return value.to(after) if isinstance(value, Tensor) and value.dtype == before else value


def quantize(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A model whose products have constant matrices in 7 of 8 bits, and activations that are quantised in each run.

    Signed weights use -64 to 64: CPUs with AVX2 or AVX-512 and without VNNI add two neighbouring products with activations
    of 0 to 255 in 16 bits that saturate at 32,767, and 2 * 64 * 255 is 32,640. A scale per output channel costs no time and
    gains about what the lost bit costs. Unsigned weights of all 8 bits would be right everywhere too and about half as far
    from float32, but take 2.3 times as long with VNNI.

    Convolutions stay as they are: a front end would suffer, and the CPU gains nothing.

    Args:
        model: Is changed.
        folder: For large temporary files.

    Raises:
        UsageError: No product has a constant matrix.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before, after = folder / "float.onnx", folder / "int8.onnx"
    # The mark of its own preprocessing, without which it logs advice; there is nothing to preprocess in a traced graph.
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    onnx.save(model, before, save_as_external_data=True, location=f"{before.name}.data")
    quantize_dynamic(
        before,
        after,
        op_types_to_quantize=["MatMul"],
        weight_type=QuantType.QInt8,
        reduce_range=True,
        per_channel=True,
        use_external_data_format=True,
    )
    quantized = onnx.load(after)
    if not any(node.op_type == "MatMulInteger" for node in quantized.graph.node):
        raise UsageError("this encoder has no linear layers to quantise; export it without --quantize")
    return quantized
