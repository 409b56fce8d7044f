"""Which clips train, select and test in every fold, by either protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..data.selection import key_hash
from ..data.task import Task
from ..errors import quoted
from .protocol import Protocol

Indices = npt.NDArray[np.int64]

VALID_SHARE = 10  # one training clip in ten selects
CROSS_VALIDATION_FOLDS = 5


@dataclass(frozen=True)
class Fold:
    """Clip indices of one fold. `held_out` are training clips held out for selection; a kNN searches them too."""

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
    """Divide a task's clips into folds.

    Official splits and folds stay as they are. `corrected` cross-validates if train and test share clips, and holds training
    clips out for selection if there are no selection clips of their own. Each stratum is divided in the same proportion.

    Args:
        protocol: Decides which clips may select.
        task: Says whether its parts are folds or splits.
        parts: Clip indices by split or fold name.
        shards_of_part: Content digests of the shards of each split, by which shared clips are recognised.
        keys: Key of every clip; draws are made by its hash.
        strata: (clips,) the stratum of every clip, such as its class.
        groups: Name of every clip's group, such as its speaker, which a division should keep whole.

    Returns:
        The folds, and notes for the record: how clips were divided, and which groups a division splits.
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
    reason = "valid and test share clips" if shards["valid"] & shards["test"] else "there is no validation split of its own"
    note = f"{reason}, so {len(valid)} of {len(train) + len(valid)} training clips are held out for selection"
    return [Fold("test", train, valid, test, held_out=valid)], [note]


def hold_out(
    clips: Indices, keys: Sequence[str], strata: Indices, groups: Sequence[str] | None = None
) -> tuple[Indices, Indices]:
    """(train, valid): one clip in ten, stratified, chosen by key hash. A stratum's only clip stays in training.

    With `groups`, a name for each clip, whole groups are held out, as near to one clip in ten as they allow.
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

    With `groups`, a name for each clip, folds consist of whole groups and are as equal as these allow; fewer than five
    groups make a fold each. If one group has all clips, or most strata lie in one group each and could not be both trained
    and tested, clips are chosen one by one.
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

    A last stratum has all clips, so that groups are spread evenly in size too.
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
            present, numbers = np.unique([position[clip] for clip in member.tolist()], return_counts=True)
            groups_of_stratum[present] += 1
            self.counts.append((np.append(present, everything), np.append(numbers, len(member)).astype(np.float64)))
        self.alone = [bool((groups_of_stratum[present[:-1]] == 1).any()) for present, _ in self.counts]
        """Whether a group holds all clips of a stratum."""
        several = self.totals[:-1] > 1
        self.classes_apart = float(np.mean(groups_of_stratum[several] == 1)) if several.any() else 0.0
        """Share of the strata of several clips whose clips are all of one group."""

    def spread(self, chosen: Sequence[int], bins: int) -> list[list[int]]:
        """Distribute the groups `chosen` over `bins`, each to the bin in which it makes the strata most even.

        Unevenness is the sum over bins and strata of (clips - expected)^2 / expected. A group adds
        clips (2 present + clips) / expected to the part of it that depends on the bin.
        """
        present = np.zeros((bins, len(self.totals)))
        contents: list[list[int]] = [[] for _ in range(bins)]
        for group in chosen:
            stratum, numbers = self.counts[group]
            added = ((2 * present[:, stratum] + numbers) * numbers / self.totals[stratum]).sum(axis=1)
            best = int(added.argmin())
            present[best, stratum] += numbers
            contents[best].append(group)
        return contents

    def clips_of(self, chosen: Sequence[int]) -> Indices:
        return np.sort(np.concatenate([self.members[group] for group in chosen]))


def _held_groups(clips: Indices, strata: Indices, groups: Sequence[str]) -> Indices:
    """Clips of whole groups, about one clip in ten; none if no group can be held out, or less than half of that."""
    all_groups = _Groups(clips, strata, groups, salt="")
    wanted = len(clips) / VALID_SHARE
    movable = [group for group in range(len(all_groups.members)) if not all_groups.alone[group]]
    small = [group for group in movable if len(all_groups.members[group]) <= 1.5 * wanted]
    size = sum(len(all_groups.members[group]) for group in small)
    if size >= wanted / 2:  # there is enough without the groups that are too large
        movable, bins = small, max(1, round(size / wanted))
    else:
        bins = min(VALID_SHARE, len(movable))
    if not movable:
        return clips[:0]

    def unevenness(content: Sequence[int]) -> tuple[bool, float]:
        expected = all_groups.totals / VALID_SHARE
        present = np.zeros(len(expected))
        for group in content:
            stratum, numbers = all_groups.counts[group]
            present[stratum] += numbers
        return bool(present[-1] < wanted / 2), float(((present - expected) ** 2 / expected).sum())

    left, held = all_groups.totals.copy(), []
    for group in min(all_groups.spread(movable, bins), key=unevenness):
        stratum, numbers = all_groups.counts[group]
        if (left[stratum] > numbers).all():  # a stratum keeps some training clips
            left[stratum] -= numbers
            held.append(group)
    valid = all_groups.clips_of(held) if held else clips[:0]
    return valid if len(valid) >= wanted / 2 else clips[:0]


def _tested_groups(clips: Indices, strata: Indices, groups: Sequence[str], salt: str) -> list[Indices]:
    """The test clips of each fold; none if whole groups cannot be both trained and tested on."""
    all_groups = _Groups(clips, strata, groups, salt)
    count = len(all_groups.members)
    if count < 2 or all_groups.classes_apart > 0.5:
        return []
    contents = all_groups.spread(range(count), min(CROSS_VALIDATION_FOLDS, count))
    return [all_groups.clips_of(content) for content in contents]


def _split_officially(parts: Mapping[str, Indices], groups: Sequence[str]) -> list[str]:
    """A note on groups in both train and test, or in several folds; empty if there are none."""
    parts_of: dict[str, set[str]] = {}
    for part, clips in parts.items():
        for clip in clips.tolist() if part != "valid" else ():
            parts_of.setdefault(groups[clip], set()).add(part)
    split = sorted(group for group, parts_of_group in parts_of.items() if len(parts_of_group) > 1)
    if not split:
        return []
    overlap = "are both in train and in test" if "train" in parts else "are in several folds"
    return [f"{len(split)} of {len(parts_of)} groups, such as {quoted(split[0])}, {overlap}: scores may be too high"]


def _share_groups(some: Indices, others: Indices, groups: Sequence[str]) -> bool:
    return not {groups[clip] for clip in some.tolist()}.isdisjoint(groups[clip] for clip in others.tolist())
