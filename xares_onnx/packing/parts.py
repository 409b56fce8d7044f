"""The part of each clip: its split or fold by the table, or a split that is made."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from ..errors import DataError, quoted
from .columns import Columns
from .index import Index
from .splits import SPLITS, TEST, draw, make_splits, make_units, pool_small

MAX_FOLDS = 1_000


def name_parts(index: Index, columns: Columns, seed: int, note: Callable[[str], None]) -> bool:
    """Give every clip its split or its fold's number.

    Args:
        index: Has the parts that the table names, if any; clips get theirs here.
        columns: Whether the table names splits, folds or neither, in which case splits are made.
        seed: For splits that are made.
        note: Receives the numbers of folds with other names.

    Returns:
        Whether the parts are folds.

    Raises:
        DataError: Train or test is empty, or cannot be made.
    """
    parts = list(index.parts())
    if columns.split:
        for needed, other in (("test", "train"), ("train", "test")):
            if needed not in parts:
                raise DataError(
                    f"no clip is in the split {needed}, only in {', '.join(parts)}; name some clips so, or leave the column "
                    f"{quoted(columns.split)} out to have splits made"
                    + (f"; {other} alone gives no score" if len(parts) == 1 else "")
                )
        return False
    if columns.fold:
        if len(parts) > MAX_FOLDS:
            raise DataError(
                f"column {quoted(columns.fold)} names {len(parts)} folds, and each would train a head of its own; join them "
                f"to {MAX_FOLDS} at most"
            )
        if len(parts) < 2:
            raise DataError(f"every clip is in fold {quoted(parts[0])}; a test needs at least two folds")
        _number_folds(index, parts, note)
        return True
    _make_splits(index, columns, seed)
    return False


def _number_folds(index: Index, parts: Sequence[str], note: Callable[[str], None]) -> None:
    numbers = [int(part) if re.fullmatch(r"0|[1-9][0-9]{0,5}", part) else -1 for part in parts]
    if min(numbers) < 0:
        numbers = list(range(len(parts)))
        note("folds are numbered: " + ", ".join(f"{part} is {number}" for part, number in zip(parts, numbers, strict=True)))
    index.rename_parts({part: str(number) for part, number in zip(parts, numbers, strict=True)})


def _make_splits(index: Index, columns: Columns, seed: int) -> None:
    _, count = index.count()
    ids, strata, groups, contents = (np.zeros(count, np.int64) for _ in range(4))
    draws, teams = bytearray(), dict[str, int]()
    for i, (clip, path, team, content, stratum) in enumerate(index.units()):
        ids[i], strata[i] = clip, stratum
        groups[i] = -1 if team is None else teams.setdefault(team, len(teams))
        contents[i] = int.from_bytes(content[:8], signed=True)
        draws += draw(path, seed)
    units = make_units(groups, contents)
    if not count or units.max() < 1:
        reason = f"all {count} clips belong together" if count > 1 else "there is only one clip"
        raise DataError(f"train and test cannot be made: {reason}")
    if columns.labels.kind == "class":
        strata = np.unique(strata, return_inverse=True)[1].astype(np.int64)
    else:
        strata = pool_small(strata, units)
    chosen = make_splits(np.frombuffer(draws, ">u8").astype(np.uint64).reshape(-1, 2), strata, units)
    if TEST not in chosen:
        raise DataError(
            "no class has clips for both training and test: each has a single clip, or clips that belong together"
        )
    index.set_parts((SPLITS[split], clip) for split, clip in zip(chosen.tolist(), ids.tolist(), strict=True))
