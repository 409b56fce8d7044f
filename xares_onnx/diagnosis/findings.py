"""The record of a diagnosis."""

from __future__ import annotations

import msgspec

from ..evaluation.differences import Difference, gate_of
from ..evaluation.record import Interval
from .figures import StepFigures
from .reference_tensors import NamedFigures


class Points(msgspec.Struct, frozen=True, kw_only=True):
    """How much better one model scores than another, in points: hundredths of the scores, averaged over the tasks."""

    points: float
    ci95: Interval | None
    by_task: dict[str, float]

    @property
    def text(self) -> str:
        half = "" if self.ci95 is None else f" +- {(self.ci95[1] - self.ci95[0]) / 2:.1f}"
        return f"{round(self.points, 1) + 0.0:+.1f}{half} points"


class Regained(msgspec.Struct, frozen=True, kw_only=True):
    """What B regains if a group of operators is computed as in A, on a file that exposes no inner tensor."""

    title: str
    operators: list[str]
    noise: float | None
    """Of the embeddings against A's, as a share of power; null if the two graphs do not fit together there."""
    more_bytes: int | None
    points: Points | None
    """Against B as it is; null if the group was not scored."""
    time_ratio: float | None
    """Time per second of audio over B's; null if it was not measured."""
    steps: list[int]


class Fix(msgspec.Struct, frozen=True, kw_only=True):
    """The file that was written: the groups that compute as in A, what it still loses, how it can be made again."""

    path: str | None
    """Null if no file within the budget passed `check` and `compare`."""
    groups: list[str]
    excluded: list[str]
    """Names of A's nodes that stay in float."""
    bytes: int
    lost: Points
    budget: float
    made_by: str
    recipe: list[str]
    verdict: str


class Departure(msgspec.Struct, frozen=True, kw_only=True):
    """The first tensor that is not the reference's: what, where, how."""

    tensor: str
    title: str
    pattern: str
    cosine: float
    snr: float | None


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """B diagnosed against A. Operators are in topological order, what regains most per byte is first."""

    schema_version: int = 1
    verdict: str
    a: str
    b: str
    bytes_a: int
    bytes_b: int
    tasks: list[str]
    clips: int
    seconds: float
    layers: int
    lost: Points | None
    """What A scores above B; null if no task was scored."""
    differences: list[Difference]
    output_noise: float
    suspects: list[int]
    """Numbers of the operators whose own error exceeds that of their kind, worst first."""
    departure: Departure | None
    steps: list[StepFigures]
    unpaired_a: list[str]
    unpaired_b: list[str]
    regained: list[Regained]
    fix: Fix | None
    named: list[NamedFigures] = []
    """The tensors of a `.npz`, if that was the reference; there are no operators of A then."""
    notes: list[str]

    @property
    def failed(self) -> list[Difference]:
        """The scores in which B is certainly worse by more than the tolerance."""
        return [difference for difference in self.differences if gate_of(difference.ci95, difference.tolerance) == "fail"]

    @property
    def exit_code(self) -> int:
        """1 if B is certainly worse by more than the tolerance, if a named tensor departs, or if no file could be kept."""
        departs = any(not figures.right for figures in self.named if figures.tensor is not None)
        return int(bool(self.failed) or departs or (self.fix is not None and self.fix.path is None))
