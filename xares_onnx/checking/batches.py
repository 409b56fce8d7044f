"""Properties of calls with several items, and of the same item twice."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from ..encoder.measuring.batches import COUPLING_TOLERANCE
from ..errors import ModelError, ModelLimitError
from .findings import Outcome, failed, passed, skipped, warned
from .model_under_test import Bench, difference

_HALF_TOLERANCE = 0.02
_REPEAT_TOLERANCE = 1e-6
_LOUDER = 9.0


def check_dynamic_batch(bench: Bench, tolerance: float | None) -> Outcome:
    contract = bench.contract
    if why := _takes_one(bench):
        return skipped(why)
    if contract.fixed_batch is not None:
        return warned(
            f"the batch axis is frozen at {contract.fixed_batch}, so every chunk is run {contract.fixed_batch} times",
            "export with a dynamic batch axis",
            measured=contract.fixed_batch,
            tolerance="dynamic",
            unit="items",
        )
    three = _three(bench)
    bench.run_ahead(three, three[1:2])
    try:
        output = bench.embed_batch(three)
        alone = bench.embed(three[1], normalized=True)
        problem = "" if output.shape[1:] == alone.shape else f"its shape is {list(output.shape)}"
    except ModelLimitError:
        raise
    except ModelError as error:
        problem = str(error)
    if problem or not contract.dynamic_batch:
        return failed(
            f"a batch of {3 if problem else 2} fails, though the graph's batch axis is free"
            + (f": {problem}" if problem else ""),
            "export with a dynamic batch axis, and let no operator keep the batch of the example",
            measured=2 if contract.dynamic_batch else 1,
            tolerance="any",
            unit="items",
        )
    return passed("batches of 1, 2 and 3 run", measured=3, tolerance="any", unit="items")


def check_batch_invariance(bench: Bench, tolerance: float | None) -> Outcome:
    """Compare an item alone with the same item between a louder and a quieter one."""
    contract = bench.contract
    if (why := _takes_one(bench)) or contract.fixed_batch is not None:
        return skipped(why or f"the graph fixes the batch at {contract.fixed_batch}, and it is filled with one clip")
    if not contract.dynamic_batch:
        return skipped("batches do not run")
    three = _three(bench)
    worst = difference(bench.embed_batch(three)[1], bench.embed(three[1], normalized=True))
    limit = COUPLING_TOLERANCE if tolerance is None else tolerance
    figure = {"measured": _rounded(worst), "tolerance": limit, "unit": "of the largest"}
    if worst <= limit:
        by = f"differs by {worst:.1e} of the largest value" if worst else "is the same to the last bit"
        return passed(f"beside a louder neighbour an item {by}", **figure)
    says = f"an item differs by {worst:.1e} of the largest value beside a louder neighbour"
    cost = "the model is run one item at a time, which is slower on a GPU and as fast on the CPU"
    if bench.facts.precision == "int8-dynamic":
        return warned(f"{says}, as dynamic quantisation uses one scale per batch", f"nothing to do: {cost}", **figure)
    if bench.facts.precision == "fp16" and worst <= _HALF_TOLERANCE:
        return warned(f"{says}, which half precision may explain", f"nothing to do: {cost}", **figure)
    return failed(
        says,
        "normalise each item by itself, never over the batch; look for a normalisation or a maximum over axis 0",
        **figure,
    )


def check_determinism(bench: Bench, tolerance: float | None) -> Outcome:
    """Run the same input again, from two threads at once."""
    signal = bench.normalized(bench.signals["noise"])
    first = bench.embed(signal, normalized=True)
    with ThreadPoolExecutor(2) as pool:
        worst = max(difference(again[0], first) for again in pool.map(bench.run, [signal[None]] * 2))
    limit = _REPEAT_TOLERANCE if tolerance is None else tolerance
    figure = {"measured": _rounded(worst), "tolerance": limit, "unit": "of the largest"}
    if worst > limit:
        return failed(
            f"the same input gives another embedding the second time, by {worst:.1e} of the largest value",
            "export in evaluation mode (model.eval()): dropout or noise is still in the graph",
            **figure,
        )
    return passed("the same to the last bit" if worst == 0 else f"the same within {worst:.1e}", **figure)


def _takes_one(bench: Bench) -> str:
    """Why a model takes one clip per call by design; empty if it takes more."""
    contract = bench.contract
    if "B" not in contract.input_layout or "B" not in contract.output_layout:
        return "the model has no batch axis and takes one clip per call"
    return "the graph fixes the batch at 1" if contract.fixed_batch == 1 else ""


def _three(bench: Bench) -> npt.NDArray[np.float32]:
    """A louder item, an item, and a quieter one."""
    loud = np.clip(bench.signals["speech-like"] * np.float32(_LOUDER), -1, 1)
    return np.stack([bench.normalized(item) for item in (loud, bench.signals["noise"], bench.signals["quiet noise"])])


def _rounded(share: float) -> float | str:
    return float(f"{share:.3g}") if np.isfinite(share) else "not finite"
