"""What a model's graph says of its arithmetic and its output, from one reading of the file. Runs in the worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..encoder.integer_products import Product, integer_products
from .quantized import Folded, Scales, Weights, folded_weights, kept_matrices, quantized
from .tail import Tail, read_tail


@dataclass(frozen=True)
class GraphFacts:
    """Products of bytes, scales and weights in bytes, and the shapes of matrices that are `kept` in 8 bits or less.

    `folded` is of the float weights, if none are kept so.
    """

    products: tuple[Product, ...]
    scales: tuple[Scales, ...]
    weights: tuple[Weights, ...]
    kept: tuple[tuple[int, ...], ...]
    folded: Folded
    tail: Tail


def read_graph(path: Path, output: str, beat: Callable[[], None]) -> GraphFacts:
    """Read the file of a model that `check_model` has passed.

    Args:
        path: The `.onnx` file.
        output: The output that is scored.
        beat: Called now and then, as a sign of life.
    """
    import onnx

    model = onnx.load_model(path, format="protobuf", load_external_data=False)
    beat()
    products = []
    for product in integer_products(model, path.parent):
        products.append(product)
        beat()
    scales, weights = [], []
    for entry in quantized(model, path.parent):
        if isinstance(entry, Scales):
            scales.append(entry)
        else:
            weights.append(entry)
        beat()
    kept = kept_matrices(model)
    folded = Folded() if kept else folded_weights(model, path.parent, beat)
    return GraphFacts(tuple(products), tuple(scales), tuple(weights), kept, folded, read_tail(model, output))
