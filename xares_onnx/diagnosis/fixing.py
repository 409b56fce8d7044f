"""The cheapest file within a budget of points: groups are put back to float one after another, most points per byte first.

The file is made from A by ONNX Runtime's own quantizer with those nodes left out, if that is how B was made; else B's graph
gets A's operators. It is kept if `check` finds no fault that B does not have, and if `compare` finds it within the budget.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..checking import check
from ..errors import XaresError
from ..evaluation.differences import Side
from ..files import check_target
from ..progress import Note
from .attribution import LEAST_BYTES, Judge, points_of
from .findings import Fix, Points, Regained
from .groups import Group
from .requantizing import Recipe, recipe_of, requantize

_LEAST_GAIN = 0.05  # of the noise that is left, below which a group is not worth another scoring
_REQUANTIZED_NEAR = 0.25  # points that a requantised file may score below the spliced one


def fix_within(
    judge: Judge, side_a: Side, side_b: Side, regained: Sequence[Regained], path: Path, budget: float, tolerance: float
) -> Fix:
    """Write the cheapest file that loses at most `budget` points against A, and say how to make it again."""
    check_target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen: list[Regained] = []
    lost = points_of(side_b, side_a)
    candidate = Path(judge.b.info.path)
    steps: tuple[int, ...] = ()
    while lost.points > budget and (entry := _next(judge, regained, steps)) is not None:
        steps = tuple(sorted({*steps, *entry.steps}))
        chosen.append(entry)
        candidate, side = judge.with_float(steps, f"B with {len(chosen)} groups in float")
        lost = points_of(side, side_a)
    excluded = sorted({judge.measurement.steps[step].name for step in steps})
    recipe = judge.process.call(recipe_of, (judge.a.info, judge.b.info), judge.options.trust, excluded, returns=Recipe)
    made_by = "A's operators put into B"
    if steps and recipe.dynamic:
        remade = judge.folder / "requantized" / candidate.name
        remade.parent.mkdir()
        for beside in candidate.parent.glob("*"):
            if beside.name != candidate.name:
                shutil.copyfile(beside, remade.parent / beside.name)
        try:
            judge.process.call(requantize, judge.a.info, recipe, str(remade.absolute()), returns=int)
            lost_again = points_of(judge.side(remade, "the requantised file"), side_a)
            if lost_again.points <= max(budget, lost.points + _REQUANTIZED_NEAR):
                candidate, lost, made_by = remade, lost_again, "onnxruntime.quantization.quantize_dynamic"
        except XaresError as error:
            judge.observer(Note(f"A could not be quantised anew, so A's operators were put into B: {error}"))
    return _kept(judge, candidate, path, chosen, excluded, lost, budget, made_by, recipe)


def _next(judge: Judge, regained: Sequence[Regained], steps: tuple[int, ...]) -> Regained | None:
    """The group to add to `steps`: first the one of most points per byte; then, since what a group regains depends on those
    before it, the one that brings the embeddings nearest to A's for its bytes; None if there is no other.
    """
    if not regained:
        return None
    if not steps and regained[0].points is not None and regained[0].points.points > 0:
        return regained[0]
    rest = [entry for entry in regained if entry.noise is not None and not set(entry.steps) <= set(steps)]
    unions = [Group(title=entry.title, steps=tuple(sorted({*steps, *entry.steps}))) for entry in rest]
    trials = judge.try_groups([*unions, Group(title="so far", steps=steps)])
    *found, so_far = trials
    best, most = None, 0.0
    for entry, trial in zip(rest, found, strict=True):
        if trial.noise is not None and so_far.noise is not None:
            gain = max(so_far.noise - trial.noise, 0.0)
            cheapness = gain / max((trial.more_bytes or 0) - (so_far.more_bytes or 0), LEAST_BYTES)
            if gain > _LEAST_GAIN * so_far.noise and cheapness > most:
                best, most = entry, cheapness
    return best or max(rest, key=lambda entry: len(entry.steps), default=None)


def _faults(judge: Judge, path: Path) -> set[str]:
    """The properties that `check` finds a model to lack."""
    return set(check(path, contract=judge.options.contract, device="cpu", trust=judge.options.trust).named("fail"))


def _kept(
    judge: Judge,
    candidate: Path,
    path: Path,
    chosen: Sequence[Regained],
    excluded: list[str],
    lost: Points,
    budget: float,
    made_by: str,
    recipe: Recipe,
) -> Fix:
    faults = _faults(judge, candidate)
    if faults:  # those that B has too are not the fix's
        faults -= _faults(judge, Path(judge.b.info.path))
    size = candidate.stat().st_size
    within = lost.points <= budget
    kept = within and not faults
    if kept:
        shutil.copyfile(candidate, path)
    share = size / judge.a.info.scan.bytes
    loses = Points(points=-lost.points, ci95=lost.ci95, by_task=lost.by_task).text
    if kept:
        verdict = f"{path.name} keeps {share:.0%} of A's bytes and scores {loses} against A; `check` finds nothing new"
    elif faults:
        verdict = f"no file was written: `check` finds {', '.join(sorted(faults))} in the one within the budget"
    else:
        verdict = f"no file was written: the best scores {loses} against A, and the budget is {budget:g} points"
    return Fix(
        path=str(path) if kept else None,
        groups=[entry.title for entry in chosen],
        excluded=excluded,
        bytes=size,
        lost=lost,
        budget=budget,
        made_by=made_by,
        recipe=recipe.lines,
        verdict=verdict,
    )
