"""A property of the output: whether it is an embedding, or what a classifier makes of one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ..encoder.measuring.layers import layers_of
from ..errors import ContractError, quoted
from .findings import Outcome, passed, skipped, warned
from .model_under_test import Bench, Frames
from .tail import Tail

_NAME = re.compile(
    r"(?:^|[^a-z])(logits?|log_?prob\w*|probs?|probabilit(y|ies)|posteriors?|predictions?|preds?|scores?|classes|labels?|"
    r"(clip|frame|segment)wise_output)(?:$|[^a-z])"
)
_SUM = 1e-3  # most that rows of probabilities in half precision differ from 1


def check_head(bench: Bench, tolerance: float | None) -> Outcome:
    contract, tail = bench.contract, bench.graph.tail
    rows = bench.finite().values()
    if not rows:
        return skipped("no signal gives finite frames")
    sign = _sign(contract.output, tail, np.concatenate(list(rows)))
    if sign is None:
        return passed(f"{quoted(contract.output)} shows no sign of a classifier's head", measured="embedding")
    tap = _tap_before(bench, tail)
    remedy = f"score the encoder before its head: --taps {quoted(tap)}" if tap else "name a tensor before the head by --taps"
    return warned(f"{quoted(contract.output)} is a classifier's output: {sign}", remedy, measured="classifier")


def _sign(output: str, tail: Tail, rows: Frames) -> str | None:
    """What shows that rows (frames, dim) are of a classifier; None if nothing does."""
    if tail.activation:
        return f"it ends in {tail.activation}"
    if rows.shape[1] > 1:
        values = rows.astype(np.float64)
        if values.min() >= 0 and np.abs(values.sum(axis=1) - 1).max() < _SUM:
            return "its values are probabilities, which sum to 1"
        if values.max() <= 0 and np.abs(np.exp(values).sum(axis=1) - 1).max() < _SUM:
            return "its values are logarithms of probabilities, which sum to 1"
    if 0 < tail.after < tail.before and _NAME.search(output.lower()):
        return f"by its name, and the linear layer from {tail.before} to {tail.after} that it ends in"
    return None


def _tap_before(bench: Bench, tail: Tail) -> str:
    """The last layer's output, or what enters the last linear layer; empty if neither is found."""
    import onnx

    model = onnx.load_model(Path(bench.subject.spec.info.path), format="protobuf", load_external_data=False)
    try:
        last = layers_of(model, bench.contract.output).tensors[-1]
    except ContractError:
        last = ""
    return last if last and last != bench.contract.output else tail.features
