"""How many clips of each class are in training and test, and whether that can give a score."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from ..errors import DataError, quoted
from .index import Index
from .labels import Labels

_FEW_TRAINED, _FEW_TESTED = 2, 30
_SHOWN = 5


@dataclass
class Balance:
    """Clips per class. `add` every clip before `stratum`; `count` the parts before using their counts."""

    kind: str
    clips: Counter[str] = field(default_factory=Counter)
    of_part: Counter[tuple[str, str]] = field(default_factory=Counter)
    parts: dict[str, int] = field(default_factory=dict)

    def add(self, classes: Collection[str]) -> None:
        """Count a clip of these classes."""
        self.clips.update(classes)

    @cached_property
    def names(self) -> list[str]:
        """The vocabulary in alphabetical order."""
        return sorted(self.clips)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names, 1)}

    def stratum(self, classes: Collection[str]) -> int:
        """The number of a clip's rarest class, from 1; 0 if it has none."""
        rarest = min(classes, key=lambda name: (self.clips[name], name), default=None)
        return 0 if rarest is None else self._numbers[rarest]

    def check_vocabulary(self) -> None:
        """Raises `DataError` if there is nothing to learn."""
        if self.kind == "class" and len(self.clips) < 2:
            (only,) = self.clips
            raise DataError(f"every clip is of class {quoted(only)}: there is nothing to tell apart")
        if self.kind in ("tags", "events") and not self.clips:
            raise DataError(f"no clip has any {self.kind}: there is nothing to learn")

    def count(self, index: Index, labels: Labels) -> None:
        """Count the clips of each part, once they have parts."""
        for part, (clips, _) in index.parts().items():
            self.parts[part] = clips
            for clip in index.of_part(part):
                self.of_part.update((name, part) for name in labels.classes(json.loads(clip.label or "")))

    @cached_property
    def _all(self) -> Counter[str]:
        """Clips by class, of all parts."""
        counts: Counter[str] = Counter()
        for (name, _), clips in self.of_part.items():
            counts[name] += clips
        return counts

    def table(self) -> dict[str, dict[str, int]]:
        """Clips by class and part."""
        return {name: {part: self.of_part[name, part] for part in self.parts} for name in self.names}

    def trained_and_tested(self, folds: bool) -> Iterator[tuple[str, dict[str, int], dict[str, int]]]:
        """For each test part: its name, and by class the clips in training and in test."""
        for test in self.parts if folds else ("test",):
            tested = {name: self.of_part[name, test] for name in self.names}
            trained = {name: self._all[name] - tested[name] if folds else self.of_part[name, "train"] for name in self.names}
            yield test, trained, tested


def check_balance(balance: Balance, folds: bool) -> list[str]:
    """Notes on small parts and classes.

    Raises:
        DataError: An evaluation would have no score.
    """
    notes = []
    smallest = min(balance.parts.values()) if folds else balance.parts["test"]
    if balance.kind == "captions" and smallest < 2:
        raise DataError("a single test clip always ranks first; captions need two test clips or more")
    few: set[str] = set()
    for test, trained, tested in balance.trained_and_tested(folds):
        where = f"fold {test}" if folds else "test"
        untrained = [name for name in balance.names if tested[name] and not trained[name]]
        if untrained and balance.kind == "class":
            raise DataError(
                f"class {quoted(untrained[0])} is tested in {where} but has no training clip, so there is no score"
                f"{_more(untrained)}; leave it out, or divide the clips otherwise"
            )
        if untrained:
            notes.append(f"{len(untrained)} classes are tested in {where} but have no training clip: {_names(untrained)}")
        if balance.names and not any(tested.values()):
            raise DataError(f"no clip of {where} has any {balance.kind}, so there is no score; divide the clips otherwise")
        if balance.names and not any(trained.values()):
            raise DataError(f"no training clip for {where} has any {balance.kind}; divide the clips otherwise")
        if balance.kind == "class" and sum(map(bool, trained.values())) < 2:
            raise DataError(f"the training clips for {where} are all of one class; divide the clips otherwise")
        few |= {name for name in balance.names if trained[name] < _FEW_TRAINED or (not folds and not tested[name])}
    if few:
        notes.append(
            f"{len(few)} of {len(balance.names)} classes have fewer than {_FEW_TRAINED} training clips"
            f"{'' if folds else ' or no test clip'}: {_names(sorted(few))}"
        )
    if smallest < _FEW_TESTED:
        clips = f"{smallest} clip{'' if smallest == 1 else 's'}"
        notes.append(f"the {'smallest fold' if folds else 'test split'} has {clips}: expect a wide interval")
    return notes


def _names(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _more(names: list[str]) -> str:
    return f" (nor have {len(names) - 1} others)" if len(names) > 1 else ""
