"""The two protocols' choices (DESIGN section 6), and who trains, selects and is tested in every fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..data.selection import key_hash
from ..data.task import Task
from .protocol import Protocol

Indices = npt.NDArray[np.int64]

VALID_SHARE = 10  # one training clip in ten selects
CROSS_VALIDATION_FOLDS = 5


@dataclass(frozen=True)
class Fold:
    """Clip indices of one fold. kNN has nothing to select, so it searches `train` and, held out of it, `held_out`."""

    name: str
    train: Indices
    valid: Indices
    test: Indices
    held_out: Indices


def make_folds(
    protocol: Protocol,
    task: Task,
    parts: Mapping[str, Indices],
    shards_of_part: Mapping[str, frozenset[str]],
    keys: Sequence[str],
    strata: Indices,
) -> tuple[list[Fold], list[str]]:
    """The folds of a task, and what must be said about them.

    `parts` holds clip indices by split or fold name, `shards_of_part` the content digests of their shards, `keys` and
    `strata` are those of every clip: each stratum, such as a class, is divided in the same proportion.
    """
    names = list(parts)
    if task.data.folds is not None:
        folds = []
        for name in names:
            others = np.concatenate([parts[other] for other in names if other != name])
            if protocol.corrected:
                train, valid = hold_out(others, keys, strata)
                folds.append(Fold(name, train, valid, parts[name], held_out=valid))
            else:
                folds.append(Fold(name, others, parts[name], parts[name], held_out=others[:0]))
        return folds, []
    train, test = parts["train"], parts["test"]
    official = parts.get("valid", train[:0])
    shards = {name: shards_of_part.get(name, frozenset()) for name in ("train", "valid", "test")}
    if not protocol.corrected:
        valid = official if "valid" in parts else test
        return [Fold("test", train, valid, test, held_out=train[:0])], []
    if shards["train"] & shards["test"]:
        pool = np.unique(np.concatenate([train, test]))
        note = f"train and test share clips, so {len(pool)} clips are cross-validated in {CROSS_VALIDATION_FOLDS} folds"
        return cross_validation(pool, keys, strata), [note]
    if "valid" in parts and not shards["valid"] & (shards["test"] | shards["train"]):
        return [Fold("test", train, official, test, held_out=train[:0])], []
    train, valid = hold_out(train, keys, strata)
    why = "valid and test share clips" if shards["valid"] & shards["test"] else "there is no validation split of its own"
    note = f"{why}, so {len(valid)} of {len(train) + len(valid)} training clips select the epoch"
    return [Fold("test", train, valid, test, held_out=valid)], [note]


def hold_out(clips: Indices, keys: Sequence[str], strata: Indices) -> tuple[Indices, Indices]:
    """(train, valid): one clip in ten, stratified, chosen by key hash. A stratum's only clip stays in training."""
    ordered = _by_stratum_and_hash(clips, keys, strata, salt="")
    labels = strata[ordered]
    several = ordered[np.isin(labels, np.flatnonzero(np.bincount(labels) > 1))] if len(ordered) else ordered
    valid = several[VALID_SHARE // 2 :: VALID_SHARE] if len(several) > VALID_SHARE // 2 else several[:1]
    return np.setdiff1d(clips, valid), np.sort(valid)


def cross_validation(clips: Indices, keys: Sequence[str], strata: Indices) -> list[Fold]:
    """Five folds of equal size, stratified, chosen by a seeded key hash."""
    ordered = _by_stratum_and_hash(clips, keys, strata, salt="cross-validation/0/")
    folds = []
    for number in range(CROSS_VALIDATION_FOLDS):
        test = np.sort(ordered[number::CROSS_VALIDATION_FOLDS])
        train, valid = hold_out(np.setdiff1d(clips, test), keys, strata)
        folds.append(Fold(str(number), train, valid, test, held_out=valid))
    return folds


def _by_stratum_and_hash(clips: Indices, keys: Sequence[str], strata: Indices, salt: str) -> Indices:
    return np.array(sorted(clips.tolist(), key=lambda clip: (strata[clip], key_hash(salt + keys[clip]))), dtype=np.int64)
