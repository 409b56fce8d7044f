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
    groups: Sequence[str] | None = None,
) -> tuple[list[Fold], list[str]]:
    """The folds of a task, and what must be said about them.

    `parts` holds clip indices by split or fold name, `shards_of_part` the content digests of their shards, `keys` and
    `strata` are those of every clip: each stratum, such as a class, is divided in the same proportion. So are `groups`, the
    names of what must not be split, such as a speaker: official splits and folds stay as they are, and what they split is
    said.
    """
    folds, notes = _folds(protocol, task, parts, shards_of_part, keys, strata, groups)
    if groups is not None:
        shared = shards_of_part.get("train", frozenset()) & shards_of_part.get("test", frozenset())
        if not shared:
            notes += _split_officially(parts, groups)
        elif protocol.corrected and any(_share_groups(fold.train, fold.test, groups) for fold in folds):
            notes.append("folds of whole groups cannot be both trained and tested on, so clips are divided one by one")
        if any(_share_groups(fold.train, fold.held_out, groups) for fold in folds):
            notes.append("its groups cannot be held out whole, so clips are, one by one")
    return folds, notes


def _folds(
    protocol: Protocol,
    task: Task,
    parts: Mapping[str, Indices],
    shards_of_part: Mapping[str, frozenset[str]],
    keys: Sequence[str],
    strata: Indices,
    groups: Sequence[str] | None,
) -> tuple[list[Fold], list[str]]:
    names = list(parts)
    if task.data.folds is not None:
        folds = []
        for name in names:
            others = np.concatenate([parts[other] for other in names if other != name])
            if protocol.corrected:
                train, valid = hold_out(others, keys, strata, groups)
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
        folds = cross_validation(pool, keys, strata, groups)
        return folds, [f"train and test share clips, so {len(pool)} clips are cross-validated in {len(folds)} folds"]
    if "valid" in parts and not shards["valid"] & (shards["test"] | shards["train"]):
        return [Fold("test", train, official, test, held_out=train[:0])], []
    train, valid = hold_out(train, keys, strata, groups)
    why = "valid and test share clips" if shards["valid"] & shards["test"] else "there is no validation split of its own"
    note = f"{why}, so {len(valid)} of {len(train) + len(valid)} training clips are held out for selection"
    return [Fold("test", train, valid, test, held_out=valid)], [note]


def hold_out(
    clips: Indices, keys: Sequence[str], strata: Indices, groups: Sequence[str] | None = None
) -> tuple[Indices, Indices]:
    """(train, valid): one clip in ten, stratified, chosen by key hash. A stratum's only clip stays in training.

    With `groups`, the names of what must not be split, whole groups are held out, as near to one clip in ten as they allow.
    A stratum's only group stays in training. If the groups leave nothing to hold out, clips are chosen one by one.
    """
    if groups is not None and len(valid := _held_groups(clips, strata, groups)):
        return np.setdiff1d(clips, valid), valid
    ordered = _by_stratum_and_hash(clips, keys, strata, salt="")
    labels = strata[ordered]
    several = ordered[np.isin(labels, np.flatnonzero(np.bincount(labels) > 1))] if len(ordered) else ordered
    valid = several[VALID_SHARE // 2 :: VALID_SHARE] if len(several) > VALID_SHARE // 2 else several[:1]
    return np.setdiff1d(clips, valid), np.sort(valid)


def cross_validation(
    clips: Indices, keys: Sequence[str], strata: Indices, groups: Sequence[str] | None = None
) -> list[Fold]:
    """Five folds of equal size, stratified, chosen by a seeded key hash.

    With `groups`, the names of what must not be split, folds are made of whole groups, as equal as these allow, and of fewer
    than five groups each is a fold. If one group has all clips, or most strata lie in one group each and could not be both
    trained and tested, clips are chosen one by one.
    """
    salt = "cross-validation/0/"
    tests = _tested_groups(clips, strata, groups, salt) if groups is not None else []
    if not tests:
        ordered = _by_stratum_and_hash(clips, keys, strata, salt)
        tests = [np.sort(ordered[number::CROSS_VALIDATION_FOLDS]) for number in range(CROSS_VALIDATION_FOLDS)]
    folds = []
    for number, test in enumerate(tests):
        train, valid = hold_out(np.setdiff1d(clips, test), keys, strata, groups)
        folds.append(Fold(str(number), train, valid, test, held_out=valid))
    return folds


def _by_stratum_and_hash(clips: Indices, keys: Sequence[str], strata: Indices, salt: str) -> Indices:
    return np.array(sorted(clips.tolist(), key=lambda clip: (strata[clip], key_hash(salt + keys[clip]))), dtype=np.int64)


# ---------------------------------------------------------------- groups


class _Groups:
    """The groups of some clips, the larger ones first and equal ones by hash, with the clips that each has of a stratum.

    A last stratum has all clips, so that what is even in the strata is even in size too.
    """

    def __init__(self, clips: Indices, strata: Indices, groups: Sequence[str], salt: str) -> None:
        members: dict[str, list[int]] = {}
        for clip in clips.tolist():
            members.setdefault(groups[clip], []).append(clip)
        names = sorted(members, key=lambda name: (-len(members[name]), key_hash(salt + name)))
        self.members = [np.array(members[name], np.int64) for name in names]
        _, stratum = np.unique(strata[clips], return_inverse=True)
        position = dict(zip(clips.tolist(), stratum.tolist(), strict=True))
        everything = int(stratum.max(initial=-1)) + 1
        self.totals = np.append(np.bincount(stratum, minlength=everything), len(clips)).astype(np.float64)
        self.counts: list[tuple[Indices, npt.NDArray[np.float64]]] = []  # of each group: strata, and clips in each
        groups_of_stratum = np.zeros(everything, np.int64)
        for member in self.members:
            its, numbers = np.unique([position[clip] for clip in member.tolist()], return_counts=True)
            groups_of_stratum[its] += 1
            self.counts.append((np.append(its, everything), np.append(numbers, len(member)).astype(np.float64)))
        self.alone = [bool((groups_of_stratum[its[:-1]] == 1).any()) for its, _ in self.counts]
        """Whether a group holds all clips of a stratum."""
        several = self.totals[:-1] > 1
        self.classes_apart = float(np.mean(groups_of_stratum[several] == 1)) if several.any() else 0.0
        """Share of the strata of several clips whose clips are all of one group."""

    def spread(self, chosen: Sequence[int], bins: int) -> list[list[int]]:
        """The groups `chosen` in so many bins, each group where it makes the strata most even.

        What is kept small is the sum over bins and strata of (clips - expected)^2 / expected, of which a group adds
        clips (2 present + clips) / expected to the one that depends on the bin.
        """
        present = np.zeros((bins, len(self.totals)))
        contents: list[list[int]] = [[] for _ in range(bins)]
        for group in chosen:
            its, numbers = self.counts[group]
            added = ((2 * present[:, its] + numbers) * numbers / self.totals[its]).sum(axis=1)
            best = int(added.argmin())
            present[best, its] += numbers
            contents[best].append(group)
        return contents

    def clips_of(self, chosen: Sequence[int]) -> Indices:
        return np.sort(np.concatenate([self.members[group] for group in chosen]))


def _held_groups(clips: Indices, strata: Indices, groups: Sequence[str]) -> Indices:
    """Clips of whole groups, about one clip in ten; none if no group can be held out, or less than half of that."""
    of = _Groups(clips, strata, groups, salt="")
    wanted = len(clips) / VALID_SHARE
    movable = [group for group in range(len(of.members)) if not of.alone[group]]
    small = [group for group in movable if len(of.members[group]) <= 1.5 * wanted]
    size = sum(len(of.members[group]) for group in small)
    if size >= wanted / 2:  # there is enough without the groups that are too large
        movable, bins = small, max(1, round(size / wanted))
    else:
        bins = min(VALID_SHARE, len(movable))
    if not movable:
        return clips[:0]

    def unevenness(content: Sequence[int]) -> tuple[bool, float]:
        expected = of.totals / VALID_SHARE
        present = np.zeros(len(expected))
        for group in content:
            its, numbers = of.counts[group]
            present[its] += numbers
        return bool(present[-1] < wanted / 2), float(((present - expected) ** 2 / expected).sum())

    left, held = of.totals.copy(), []
    for group in min(of.spread(movable, bins), key=unevenness):
        its, numbers = of.counts[group]
        if (left[its] > numbers).all():  # a stratum keeps some training clips
            left[its] -= numbers
            held.append(group)
    valid = of.clips_of(held) if held else clips[:0]
    return valid if len(valid) >= wanted / 2 else clips[:0]


def _tested_groups(clips: Indices, strata: Indices, groups: Sequence[str], salt: str) -> list[Indices]:
    """The test clips of each fold; none if whole groups cannot be both trained and tested on."""
    of = _Groups(clips, strata, groups, salt)
    if len(of.members) < 2 or of.classes_apart > 0.5:
        return []
    everyone = range(len(of.members))
    return [of.clips_of(content) for content in of.spread(everyone, min(CROSS_VALIDATION_FOLDS, len(everyone)))]


def _split_officially(parts: Mapping[str, Indices], groups: Sequence[str]) -> list[str]:
    """What is to be said of groups in both train and test, or in several folds."""
    parts_of: dict[str, set[str]] = {}
    for part, clips in parts.items():
        for clip in clips.tolist() if part != "valid" else ():
            parts_of.setdefault(groups[clip], set()).add(part)
    split = sorted(group for group, its in parts_of.items() if len(its) > 1)
    if not split:
        return []
    where = "are both in train and in test" if "train" in parts else "are in several folds"
    return [f"{len(split)} of {len(parts_of)} groups, such as {split[0]!r}, {where}: scores may be too high"]


def _share_groups(some: Indices, others: Indices, groups: Sequence[str]) -> bool:
    return not {groups[clip] for clip in some.tolist()}.isdisjoint(groups[clip] for clip in others.tolist())
