"""Properties of quantised models: whether their arithmetic is what they are called, and whether their scales are sane."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import MachineError, ModelError, ModelLimitError, quoted
from .arithmetic import in_full, shares
from .findings import Outcome, failed, passed, skipped, warned
from .kernels import Kernel, run_kernels
from .model_under_test import Bench
from .quantized import Folded

# Dynamic quantisation of linear layers alone leaves four fifths of a model of two layers behind a large front end in float.
_LEAST_SHARE = 0.1
_MOST_UNDONE = 0.5
_MOST_SATURATED = 0.05
_NAMED = 3  # tensors in the sentence; the details list all
_SECONDS = 1.0


def check_arithmetic(bench: Bench, tolerance: float | None) -> Outcome:
    """Counted from what ONNX Runtime ran, so the fusions of its version and this provider are in it.

    Half precision is only reported: many providers compute in float32 then, on purpose.
    """
    kept, half = bench.graph.kept, bench.facts.precision == "fp16"
    least = tolerance if tolerance is not None else _LEAST_SHARE if kept else None
    figure: dict[str, Any] = {"tolerance": None if least is None else f">= {least:g}", "unit": "of the multiply-adds"}
    if not kept and not half:
        return _check_folded(bench.graph.folded, figure)
    contract = bench.contract
    samples = min(max(round(_SECONDS * contract.sample_rate), contract.min_samples), contract.chunk_samples)
    try:
        (kernels,) = run_kernels(bench, samples, shapes=True)
    except (MachineError, ModelLimitError):
        raise
    except ModelError as error:
        return skipped(f"what ONNX Runtime ran cannot be told: {error}")
    by_precision = shares(kernels)
    if not by_precision:
        return skipped("the model multiplies no matrices")
    share = sum(part for precision, part in by_precision.items() if not in_full(precision))
    figure["measured"] = float(f"{share:.3g}")
    figure["details"] = tuple(f"{precision}: {part:.6f} of the multiply-adds" for precision, part in by_precision.items())
    provider = bench.session.provider.removesuffix("ExecutionProvider")
    says = ", ".join(f"{100 * part:.3g} % in {precision}" for precision, part in by_precision.items())
    undone = _undone(kernels, kept)
    if undone > _MOST_UNDONE:
        return warned(
            f"{100 * undone:.3g} % of the weights that are kept in 8 bits or less are made float in every run, before "
            f"{provider} multiplies them; multiply-adds: {says}",
            "quantise activations too, by QuantizeLinear and DequantizeLinear at both inputs of a product, or by "
            "quantize_dynamic",
            **figure,
        )
    as_kept = "8 bits or less" if kept else "half precision"
    if least is not None and share < least:
        return warned(
            f"weights are kept in {as_kept}, but most of the arithmetic on {provider} is not: {says}",
            "quantise the operators that do most of the work, which --profile names",
            **figure,
        )
    return passed(f"weights are kept in {as_kept}; multiply-adds on {provider}: {says}", **figure)


def _check_folded(folded: Folded, figure: dict[str, Any]) -> Outcome:
    if 2 * folded.on_a_grid <= folded.weights or not folded.weights:
        return skipped("no weights are kept in less than float32")
    return warned(
        f"{100 * folded.on_a_grid / folded.weights:.3g} % of the weights are multiples of one step, as in 8 bits, but "
        "are kept and multiplied in float: quantised once, and folded back",
        "export again without folding constants after the quantisation, so that DequantizeLinear stays in the file",
        measured=0.0,
        **figure,
    )


def _undone(kernels: Iterable[Kernel], kept: Sequence[tuple[int, ...]]) -> float:
    """The share of the weights kept in 8 bits or less that DequantizeLinear made float."""
    shapes = set(kept)
    inputs = [kernel.inputs[0] for kernel in kernels if kernel.operator == "DequantizeLinear" and kernel.inputs]
    undone = sum(tensor.values for tensor in inputs if tensor.shape in shapes)
    return undone / max(1, sum(math.prod(shape) for shape in kept))


def check_scales(bench: Bench, tolerance: float | None) -> Outcome:
    """Computed from the file."""
    scales, weights = bench.graph.scales, bench.graph.weights
    if not scales and not weights:
        return skipped("nothing in the model is quantised")
    wrong = [entry for entry in scales if entry.wrong]
    limit = _MOST_SATURATED if tolerance is None else tolerance
    most = max((entry.saturated for entry in weights), default=0.0)
    figure = {"measured": float(f"{most:.3g}"), "tolerance": limit, "unit": "at the ends"}
    if wrong:
        faults = [", ".join(f"{count} {fault}" for fault, count in entry.wrong.items()) for entry in wrong]
        lines = [f"{quoted(entry.name)} ({fault} of {entry.count})" for entry, fault in zip(wrong, faults, strict=True)]
        return failed(
            f"scales that cannot be right in {len(wrong)} of {len(scales)} tensors of them: {'; '.join(lines[:_NAMED])}",
            "quantise again; a channel of zeros needs a scale all the same, such as 1",
            details=tuple(lines),
            **figure,
        )
    clipped = sorted((entry for entry in weights if entry.saturated > limit), key=lambda entry: -entry.saturated)
    if clipped:
        lines = [f"{quoted(entry.name)} {100 * entry.saturated:.2g} %" for entry in clipped]
        return warned(
            f"many 8-bit weights sit at the ends of their range, where larger ones were cut, in {len(clipped)} of "
            f"{len(weights)} tensors: {'; '.join(lines[:_NAMED])}",
            "quantise again with scales from the largest weight, one per channel",
            details=tuple(lines),
            **figure,
        )
    return passed(
        f"all {sum(entry.count for entry in scales)} scales are positive and finite; at most {100 * most:.2g} % of a "
        "tensor's weights sit at the ends of their range",
        **figure,
    )
