"""Properties of the provider: nodes that fell back to the CPU, and whether the CPU gives the same embeddings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..encoder.session import CPU, Session
from ..errors import MachineError, ModelError, ModelLimitError, printable
from .findings import Outcome, failed, passed, skipped, warned
from .model_under_test import Bench, difference
from .parity import TOLERANCES

_COMPARED = ("noise", "speech-like", "chirp")
# ONNX Runtime keeps nodes that compute shapes on the CPU on purpose: a few integers, needed there. On one H200 all of the 80
# that a wav2vec2 leaves there, and the 76 of a dasheng, are of these.
_OF_SHAPES = {
    "Shape",
    "Size",
    "Gather",
    "Unsqueeze",
    "Squeeze",
    "Concat",
    "Slice",
    "Reshape",
    "Cast",
    "Equal",
    "Where",
    "Range",
    "ConstantOfShape",
    "Expand",
    "Add",
    "Sub",
    "Mul",
    "Div",
}


def check_placement(bench: Bench, tolerance: float | None) -> Outcome:
    """Count the nodes that run on the CPU although another provider was chosen."""
    spec = bench.subject.spec
    if spec.info.provider == CPU:
        return skipped("the model ran on the CPU, where every node belongs")
    placed = Session(Path(spec.info.path), spec.device, record_placement=True).placement
    if placed is None:
        return skipped("this ONNX Runtime does not report where nodes are placed; a later one does")
    on_cpu = [printable(operator) for provider, operator in placed if provider == CPU]
    fallen = Counter(operator for operator in on_cpu if operator not in _OF_SHAPES)
    of_shapes = len(on_cpu) - fallen.total()
    most = 0.0 if tolerance is None else tolerance
    figure = {"measured": fallen.total(), "tolerance": most, "unit": f"of {len(placed)} nodes"}
    if fallen.total() > most:
        listed = ", ".join(f"{count} {name}" for name, count in fallen.most_common(8))
        return warned(
            f"{fallen.total()} of {len(placed)} nodes fell to the CPU: {listed}",
            "each copy to the CPU and back waits for the device; export with operators that the provider has",
            details=tuple(f"{name}: {count}" for name, count in fallen.most_common()),
            **figure,
        )
    if of_shapes:
        says = f"{len(placed) - of_shapes} of {len(placed)} nodes run on {spec.info.provider}, and the rest compute shapes"
        return passed(says, **figure)
    return passed(f"all {len(placed)} nodes run on {spec.info.provider}", **figure)


def check_devices(bench: Bench, tolerance: float | None, other: Session | None = None) -> Outcome:
    """Compare the same sounds on the CPU (or in the session `other`) and on the model's provider."""
    spec = bench.subject.spec
    if spec.info.provider == CPU and other is None:
        return skipped("the model ran on the CPU alone")
    limit = TOLERANCES[bench.facts.precision] if tolerance is None else tolerance
    try:
        other = other or Session(Path(spec.info.path), "cpu", front=spec.info.front)
        worst, name = max(
            (
                difference(bench.embed(bench.signals[name]), other.run(_prepared(bench, name), bench.contract)[0]),
                name,
            )
            for name in _COMPARED
        )
    except (MachineError, ModelLimitError):
        raise
    except ModelError as error:
        return failed(
            f"the model runs on {spec.info.provider} but not on the CPU: {error}", "export operators that both have"
        )
    figure = {"measured": float(f"{worst:.3g}"), "tolerance": limit, "unit": "of the largest"}
    says = f"{spec.info.provider} and the CPU differ by {worst:.1e} of the largest value, the most on {name}"
    if worst <= limit:
        return passed(says, **figure)
    return failed(
        says, "keep front ends in float32, and switch TF32 and fast-math kernels off where scores must agree", **figure
    )


def _prepared(bench: Bench, name: str) -> npt.NDArray[np.float32]:
    return bench.normalized(bench.signals[name])[None]
