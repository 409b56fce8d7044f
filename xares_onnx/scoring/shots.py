"""How little labelled data an encoder needs: heads on a few training clips per class, scored on the task's test clips.

Each draw orders the training clips of every class by a hash of the draw's number and the clip's key, and takes the first:
so a draw does not depend on the order of shards, two models train on the same clips, and more clips per class include the
fewer. So few clips leave none for selection, so every head has the default strength without selection clips, 1e-3. On the
synthetic suite 1e-2 and 1e-1 score no better, and worse on pitch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from ..data.selection import key_hash
from ..errors import ScoreUndefinedError, UsageError
from .folds import Fold, Indices
from .kinds.classes import Classes
from .kinds.kind import Outcome
from .scoring import score

if TYPE_CHECKING:
    from ..probes.convex import ConvexResult

DRAWS = 10
MAX_SHOTS = 1000


class Shots(msgspec.Struct, frozen=True, kw_only=True):
    """Heads on so many training clips per class."""

    clips_per_class: int
    score: float | None
    """Mean over folds, then over draws; null if there is none."""
    ci95: tuple[float, float] | None
    """95 % interval over draws and over test clips (or groups of them)."""
    draws: list[float]
    """Score of each draw of training clips."""
    note: str | None = None
    """Why there is no score, or that some classes have fewer training clips."""


def checked_shots(counts: Sequence[int]) -> tuple[int, ...]:
    """The counts, sorted, each once. Raises `UsageError` for one outside 1 to 1000."""
    if wrong := [count for count in counts if not 1 <= count <= MAX_SHOTS]:
        raise UsageError(f"--shots {wrong[0]} must lie between 1 and {MAX_SHOTS} clips per class")
    return tuple(sorted(set(counts)))


def score_shots(
    kind: Classes, counts: Sequence[int], on_draw: Callable[[int, int], None] = lambda fitted, heads: None
) -> list[Shots]:
    """The score with few training clips per class, of 10 draws.

    Clips are drawn from those that a fold trains on and those that it holds out, because nothing is selected. A class with
    fewer clips contributes all of them; a count that no class of any fold reaches has no score. As many heads are fitted at
    once as the kind has threads, each by one of them, so any number of threads gives the same bytes.

    Args:
        kind: The task with its data and folds.
        counts: Training clips per class.
        on_draw: Called with the number of fitted heads, and of all.

    Returns:
        One row per count, in the order of `counts`.
    """
    sizes = [_class_sizes(kind, fold) for fold in kind.folds]
    largest = max(int(class_sizes.max()) for class_sizes in sizes)
    possible = [count for count in counts if count <= largest]
    from ..probes.convex import over_folds

    heads = [(fold, draw, count) for fold in range(len(kind.folds)) for draw in range(DRAWS) for count in possible]
    orders = {(fold, draw): list(_drawn_order(kind, kind.folds[fold], draw)) for fold, draw, _ in heads}

    def fit(number: int, _: int, fitted: Callable[[], None]) -> Outcome | ScoreUndefinedError:
        fold, draw, count = heads[number]
        train = np.sort(np.concatenate([clips[:count] for clips in orders[fold, draw]]))
        try:
            result = _fitted(kind, train, kind.folds[fold].test)
        except ScoreUndefinedError as error:
            return error
        finally:
            fitted()
        return Outcome(fold, draw, result.examples, result.predictions)

    fits = over_folds(fit, len(heads), kind.tools.threads, lambda done: on_draw(done, len(heads))) if heads else []
    outcomes: dict[int, list[Outcome]] = {count: [] for count in possible}
    undefined: dict[int, str] = {}
    for (_, _, count), outcome in zip(heads, fits, strict=True):
        if isinstance(outcome, ScoreUndefinedError):
            undefined[count] = str(outcome)
        else:
            outcomes[count].append(outcome)
    rows = []
    for count in counts:
        if count not in possible:
            note = f"no class has {count} training clips; the largest has {largest}"
        else:
            note = undefined.get(count) or _fewer(sizes, count)
        if count not in possible or count in undefined:
            rows.append(Shots(clips_per_class=count, score=None, ci95=None, draws=[], note=note))
            continue
        scored = score(kind, f"shots {count}", outcomes[count])
        rows.append(
            Shots(clips_per_class=count, score=scored.score, ci95=scored.ci95, draws=scored.per_seed, note=note or None)
        )
    return rows


def _pool(fold: Fold) -> Indices:
    return np.concatenate([fold.train, fold.held_out])


def _class_sizes(kind: Classes, fold: Fold) -> Indices:
    """Training clips of each class that has any."""
    return np.unique(kind.classes[_pool(fold)], return_counts=True)[1]


def _fewer(sizes: Sequence[Indices], count: int) -> str:
    fewer, classes = max((int((class_sizes < count).sum()), len(class_sizes)) for class_sizes in sizes)
    return f"{fewer} of {classes} classes have fewer than {count} training clips and give all they have" if fewer else ""


def _drawn_order(kind: Classes, fold: Fold, draw: int) -> Iterator[Indices]:
    """The training clips of one class after another, each class in the order of this draw."""
    pool = _pool(fold)
    ordered = np.array(sorted(pool.tolist(), key=lambda clip: key_hash(f"shots/{draw}/{kind.dataset.keys[clip]}")), np.int64)
    classes = kind.classes[ordered]
    for label in np.unique(classes):
        yield ordered[classes == label]


def _fitted(kind: Classes, train: Indices, test: Indices) -> ConvexResult:
    from ..probes import convex

    class FewClips(convex.Classes):
        strengths: Sequence[float] = (convex.Classes.without_selection,)

    dataset = kind.dataset
    none = train[:0]
    rows = convex.FoldRows(dataset.crops_of(train), none, dataset.crops_of(test), held_out=none)
    objective = FewClips(kind.classes[dataset.clip_of_crop], len(kind.task.target.class_names))
    return convex.fit_fold(dataset.embeddings, objective, dataset.clip_of_crop, rows)
