"""Products of bytes as a CPU without VNNI makes them, in NumPy; and small graphs that multiply bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Bytes = NDArray[Any]


def product_without_vnni(activations: Bytes, weights: Bytes) -> NDArray[np.int32]:
    """(rows, K) unsigned by (K, columns) signed, as vpmaddubsw and vpmaddwd add them: pairs in 16 bits, saturating, then 32.

    Intel on the first: "multiply packed unsigned bytes by signed bytes, add horizontal pairs, saturate to 16 bits".
    """
    assert (activations.dtype, weights.dtype) == (np.uint8, np.int8)
    if activations.shape[1] % 2:
        activations, weights = np.pad(activations, ((0, 0), (0, 1))), np.pad(weights, ((0, 1), (0, 0)))
    total = np.zeros((len(activations), weights.shape[1]), np.int32)
    for k in range(0, activations.shape[1], 2):
        pair = activations[:, k : k + 2].astype(np.int32) @ weights[k : k + 2].astype(np.int32)
        total += np.clip(pair, -32_768, 32_767)
    return total


def run_without_vnni(model: ModelProto, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """A model by onnx's reference evaluator, but MatMulInteger of unsigned by signed bytes as `product_without_vnni`."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class MatMulInteger(OpRun):  # type: ignore[misc]
        op_domain = ""

        def _run(self, first: Bytes, second: Bytes, zero: Any = 0, other: Any = 0) -> tuple[NDArray[np.int32]]:
            rows = first.reshape(-1, first.shape[-1])
            product = product_without_vnni(
                rows, second
            )  # of raw bytes; zero points are taken off by sums of rows and columns
            zero, other = np.int32(zero), np.asarray(other, np.int32)
            product -= zero * second.astype(np.int32).sum(axis=0)
            product -= other * rows.astype(np.int32).sum(axis=1, keepdims=True)
            product += len(second) * zero * other
            return (product.reshape(*first.shape[:-1], -1),)

    results: list[NDArray[Any]] = ReferenceEvaluator(model, new_ops=[MatMulInteger]).run(None, feeds)
    return results


def graph(nodes: Sequence[NodeProto], tensors: dict[str, NDArray[Any]], kind: int = TensorProto.FLOAT) -> ModelProto:
    """A model from `x` of type `kind` to `y`."""
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "bytes",
            [helper.make_tensor_value_info("x", kind, None)],
            [onnx.ValueInfoProto(name="y")],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
    )
    model.ir_version = 8
    return model
