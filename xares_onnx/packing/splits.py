"""Splits for a table without any: 80 % train, 10 % valid, 10 % test, stratified, by unit and by hash.

A unit is what must stay together: clips of one group, and copies of one recording. A clip's split depends on the paths,
the strata and the seed, not on the order of the table.
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Indices = npt.NDArray[np.int64]
Draws = npt.NDArray[np.uint64]

SPLITS = ("train", "valid", "test")
TRAIN, VALID, TEST = range(3)
_SHARE = 10  # one clip in ten for valid, one for test
_NEEDED_SPLITS = {1: (TRAIN,), 2: (TEST, TRAIN)}  # by a stratum's number of units; of three and more, all


def make_units(groups: Indices, contents: Indices) -> Indices:
    """Number what must stay together: clips of the same group or content, and what these are linked to in turn.

    Args:
        groups: (clips,) the number of a clip's group, -1 if it has none.
        contents: (clips,) the same number for the same recording.

    Returns:
        (clips,) the number of each clip's unit, from 0.
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
    """Make one stratum of all that have fewer than three units, for kinds whose classes need not all be trained.

    Args:
        strata: (clips,)
        units: (clips,)

    Returns:
        (clips,) strata, numbered from 0.
    """
    strata = np.unique(strata, return_inverse=True)[1]
    pairs = np.unique(np.stack([strata, units]), axis=1)
    small = np.bincount(pairs[0]) < len(SPLITS)
    return np.unique(np.where(small[strata], -1, strata), return_inverse=True)[1].astype(np.int64)


def draw(path: str, seed: int) -> bytes:
    """Sixteen random bytes that depend on path and seed alone: two draws for `make_splits`, big-endian."""
    return hashlib.sha256(f"{seed}/{path}".encode()).digest()[:16]


def make_splits(draws: Draws, strata: Indices, units: Indices) -> Indices:
    """The split of each clip. All clips of a unit are in the same one.

    A stratum of several units is in train and test, one of three and more in valid too, as far as units of several strata
    allow it; it is never in test and not in train. If every clip is its own unit, each split has its share of each
    stratum, rounded.

    Args:
        draws: (clips, 2) random numbers, see `draw`: the first for the order in which units choose a split, the second for
            which split they choose.
        strata: (clips,) from 0.
        units: (clips,) from 0.

    Returns:
        (clips,) 0 train, 1 valid, 2 test.
    """
    if not len(units):
        return np.zeros(0, np.int64)
    return _Division(draws, strata, units).splits()[units]


class _Division:
    """Which split each unit is in (-1: none yet), and how many clips each stratum still has to put into each split."""

    def __init__(self, draws: Draws, strata: Indices, units: Indices) -> None:
        by_draw = np.lexsort((draws[:, 1], draws[:, 0], units))
        first_clips = by_draw[np.unique(units[by_draw], return_index=True)[1]]
        self.draws = draws[first_clips]  # (units, 2): a unit's are the lowest among its clips
        self.sizes = np.bincount(units)  # (units,) clips
        # A row is a unit and a stratum that it has clips of; rows are sorted by unit.
        (unit_of_row, stratum_of_row), clips_of_row = np.unique(np.stack([units, strata]), axis=1, return_counts=True)
        rows_of_unit = np.searchsorted(unit_of_row, np.arange(len(self.sizes) + 1))
        members = list(zip(stratum_of_row.tolist(), clips_of_row.tolist(), strict=True))
        self.members = [members[start:stop] for start, stop in itertools.pairwise(rows_of_unit.tolist())]
        self.units_of_stratum = self._in_order_of_choice(unit_of_row, stratum_of_row)
        unit_counts = np.bincount(stratum_of_row)
        self.left: list[list[int]] = _quotas(np.bincount(strata), unit_counts).tolist()  # below 0 if a split has too many
        self.split = np.full(len(self.sizes), -1, np.int64)  # of each unit
        self.strata_in: list[set[int]] = [set() for _ in SPLITS]

    def _in_order_of_choice(self, unit_of_row: Indices, stratum_of_row: Indices) -> list[Indices]:
        """The units of each stratum, in the order in which they choose for it.

        First those that are no larger than a split's share, as drawn; then the others, the smallest first.
        """
        share = max(1, int(self.sizes.sum()) // _SHARE)
        order = np.lexsort((self.draws[:, 0], np.where(self.sizes <= share, 0, self.sizes)))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        by_stratum = np.lexsort((rank[unit_of_row], stratum_of_row))
        return np.split(unit_of_row[by_stratum], np.cumsum(np.bincount(stratum_of_row))[:-1])

    def splits(self) -> Indices:
        """(units,) the split of each unit."""
        self._place_strata()
        self._place_rest()
        self._train_what_is_tested()
        return self.split

    def _place_strata(self) -> None:
        """Each stratum into train, valid and test, as many of these as it has units for; the rarest strata choose first."""
        for stratum in sorted(range(len(self.units_of_stratum)), key=lambda number: len(self.units_of_stratum[number])):
            units = self.units_of_stratum[stratum]
            for split in _NEEDED_SPLITS.get(len(units), (TEST, VALID, TRAIN)):
                free = units[self.split[units] < 0]
                if stratum not in self.strata_in[split] and len(free):
                    self._put(int(free[0]), split)

    def _place_rest(self) -> None:
        """Large units first, since small ones can fill what is left."""
        for unit in np.lexsort((self.draws[:, 0], -self.sizes)).tolist():
            if self.split[unit] < 0:
                self._put(unit, _pick(self.members[unit], self.left, self.draws[unit, 1] / 2**64))

    def _train_what_is_tested(self) -> None:
        """Move a unit to train for each stratum that is in test alone, since its units had to follow their other strata."""
        for stratum in sorted(self.strata_in[TEST] - self.strata_in[TRAIN]):
            units = self.units_of_stratum[stratum]
            if not (self.split[units] == TRAIN).any():  # nor has a unit been moved for another stratum
                first_tested = units[self.split[units] == TEST][:1]
                self.split[first_tested] = TRAIN

    def _put(self, unit: int, split: int) -> None:
        self.split[unit] = split
        for stratum, clips in self.members[unit]:
            self.left[stratum][split] -= clips
            self.strata_in[split].add(stratum)


def _quotas(clips: Indices, units: Indices) -> Indices:
    """(strata, splits) clips that each stratum should have in each split, from its clips and units (strata,)."""
    share = (clips + _SHARE // 2) // _SHARE
    test = np.where(units >= 2, np.maximum(share, 1), 0)
    valid = np.where(units >= 3, np.maximum(share, 1), 0)
    return np.stack([clips - test - valid, valid, test], axis=1)


def _pick(members: list[tuple[int, int]], left: list[list[int]], draw: float) -> int:
    """A split that the unit fits into, drawn in proportion to what is left there; else the one with the most left.

    `members` holds the unit's strata with its clips of each, `left` (strata, splits) the clips still to be put, `draw` lies
    in 0..1.
    """
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
