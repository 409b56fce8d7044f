"""Splits where a table has none: 80 % train, 10 % valid, 10 % test, stratified, by unit and by hash.

A unit is what must stay together: clips of one group, and copies of one recording. Who goes where depends on paths,
strata and the seed, not on the order of the table.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Indices = npt.NDArray[np.int64]
Draws = npt.NDArray[np.uint64]

SPLITS = ("train", "valid", "test")
TRAIN, VALID, TEST = range(3)
_SHARE = 10  # one clip in ten for valid, one for test


def make_units(groups: Indices, contents: Indices) -> Indices:
    """(clips,) the unit of each clip: clips of equal group, or of equal content, are of one unit, and so on through both.

    `groups` (clips,) may be -1 where a clip is of no group.
    """
    count = len(groups)
    grouped = np.flatnonzero(groups >= 0)
    _, contents = np.unique(contents, return_inverse=True)
    _, teams = np.unique(groups[grouped], return_inverse=True)
    # A graph of clips, contents and groups.
    others = np.concatenate([count + contents, count + contents.max(initial=-1) + 1 + teams])
    clips = np.concatenate([np.arange(count), grouped])
    size = int(others.max(initial=count - 1)) + 1
    _, units = connected_components(coo_array((np.ones(len(clips), np.int8), (clips, others)), shape=(size, size)))
    return np.unique(units[:count], return_inverse=True)[1].astype(np.int64)


def pool_small(strata: Indices, units: Indices) -> Indices:
    """(clips,) strata from 0, those of fewer than three units as one: for kinds whose classes need not all be trained."""
    strata = np.unique(strata, return_inverse=True)[1]
    pairs = np.unique(np.stack([strata, units]), axis=1)
    small = np.bincount(pairs[0]) < len(SPLITS)
    return np.unique(np.where(small[strata], -1, strata), return_inverse=True)[1].astype(np.int64)


def draw(path: str, seed: int) -> bytes:
    """Sixteen bytes of a clip's own, for `make_splits`."""
    return hashlib.sha256(f"{seed}/{path}".encode()).digest()[:16]


def make_splits(draws: Draws, strata: Indices, units: Indices) -> Indices:
    """(clips,) 0 train, 1 valid, 2 test, by what was drawn for each clip.

    `draws` (clips, 2): the first for the order in which units choose, the second for what they choose. `strata` and `units`
    (clips,) count from 0.

    A stratum of several units is in train and test, one of three and more in valid too, as far as units of several strata
    allow it; it is never in test and not in train. Where every clip is its own unit, each split has its share of each
    stratum, rounded.
    """
    if not len(units):
        return np.zeros(0, np.int64)
    first = np.lexsort((draws[:, 1], draws[:, 0], units))
    starts = np.unique(units[first], return_index=True)[1]
    draws = draws[first[starts]]  # a unit's are those of its clip with the lowest
    sizes = np.bincount(units)
    # How many clips of which stratum each unit has: those of unit u are rows first_row[u] to first_row[u + 1].
    (unit_of_row, stratum_of_row), counts = np.unique(np.stack([units, strata]), axis=1, return_counts=True)
    first_row = np.searchsorted(unit_of_row, np.arange(len(sizes) + 1))
    units_of = np.bincount(stratum_of_row)  # units with clips of each stratum

    def members(unit: int) -> list[tuple[int, int]]:
        rows = slice(first_row[unit], first_row[unit + 1])
        return list(zip(stratum_of_row[rows].tolist(), counts[rows].tolist(), strict=True))

    left = _quotas(np.bincount(strata), units_of).tolist()  # of each stratum and split; below 0 where there are too many
    chosen = np.full(len(sizes), -1, np.int64)
    present: list[set[int]] = [set(), set(), set()]

    def put(unit: int, split: int) -> None:
        chosen[unit] = split
        for stratum, count in members(unit):
            left[stratum][split] -= count
            present[split].add(stratum)

    # Those choose first that are no larger than a split's share, in the order drawn; of the others the smallest.
    place = np.empty_like(sizes)
    place[np.lexsort((draws[:, 0], np.where(sizes <= max(1, len(units) // _SHARE), 0, sizes)))] = np.arange(len(sizes))
    by_stratum = unit_of_row[np.lexsort((place[unit_of_row], stratum_of_row))]
    ends = np.cumsum(units_of)
    for stratum in np.argsort(units_of, kind="stable").tolist():  # those with few units choose first
        having = by_stratum[ends[stratum] - units_of[stratum] : ends[stratum]]
        for split in {1: (TRAIN,), 2: (TEST, TRAIN)}.get(len(having), (TEST, VALID, TRAIN)):
            if stratum not in present[split]:
                free = having[chosen[having] < 0]
                if len(free):
                    put(int(free[0]), split)
    for unit in np.lexsort((draws[:, 0], -sizes)).tolist():  # large units first: small ones fill what is left
        if chosen[unit] < 0:
            put(unit, _pick(members(unit), left, draws[unit, 1] / 2**64))
    for stratum in sorted(present[TEST] - present[TRAIN]):  # its units of other strata left it no choice
        if not (chosen[having := by_stratum[ends[stratum] - units_of[stratum] : ends[stratum]]] == TRAIN).any():
            chosen[having[chosen[having] == TEST][:1]] = TRAIN
    return chosen[units]


def _quotas(clips: Indices, units: Indices) -> Indices:
    """(strata, splits)"""
    share = (clips + _SHARE // 2) // _SHARE
    test = np.where(units >= 2, np.maximum(share, 1), 0)
    valid = np.where(units >= 3, np.maximum(share, 1), 0)
    return np.stack([clips - test - valid, valid, test], axis=1)


def _pick(members: list[tuple[int, int]], left: list[list[int]], draw: float) -> int:
    """A split that the unit fits into, drawn in proportion to what is left there; else the one with the most left."""
    room = [sum(count * left[stratum][split] for stratum, count in members) for split in range(3)]
    fits = [room[split] if all(count <= left[stratum][split] for stratum, count in members) else 0 for split in range(3)]
    if not any(fits):
        return room.index(max(room))
    mark = draw * sum(fits)
    for split, weight in enumerate(fits):
        mark -= weight
        if mark < 0:
            return split
    return max(range(3), key=fits.__getitem__)
