"""A property that only some machines show: 8-bit weights whose products overflow on CPUs without VNNI."""

from __future__ import annotations

from ..encoder.integer_products import LARGEST, Product
from ..encoder.processor import pair_sums
from ..errors import quoted
from .findings import Outcome, passed, skipped, warned
from .model_under_test import Bench

_NAMED = 3  # products in the sentence; the details list all
_HERE = {
    "exact": "this processor adds in 32 bits, so no figure here shows it",
    "saturating": "this processor is one of them, so every figure here has it",
    "unknown": "whether this processor is one of them cannot be told",
}


def check_saturation(bench: Bench, tolerance: float | None) -> Outcome:
    """Computed from weights and types, so it does not depend on this machine."""
    products = bench.graph.products
    if not products:
        return skipped("the model multiplies no 8-bit numbers")
    wrong = sorted((product for product in products if product.saturates), key=lambda product: -product.share)
    most = 0.0 if tolerance is None else tolerance
    figure = {"measured": len(wrong), "tolerance": most, "unit": f"of {len(products)} products"}
    if len(wrong) <= most:
        largest = max(product.largest for product in products)
        return passed(
            f"on every processor: two neighbouring products add up to at most {largest:,} of {LARGEST:,}", **figure
        )
    named = "; ".join(_described(product) for product in wrong[:_NAMED])
    return warned(
        f"{len(wrong)} of {len(products)} 8-bit products can pass 16 bits on x86-64 without VNNI, where ONNX Runtime "
        f"saturates: {named}; {_HERE[pair_sums()]}",
        "quantise to 7 bits (reduce_range=True) or to unsigned weights, or set session.x64quantprecision to 1 where the "
        "model runs",
        details=tuple(_described(product) for product in wrong),
        **figure,
    )


def _described(product: Product) -> str:
    name = f"{product.operator} {quoted(product.name)}"
    if not product.constant:
        return f"{name} of two computed operands"
    return f"{name} up to {product.largest:,}, {100 * product.share:.2g} % of its pairs of weights"
