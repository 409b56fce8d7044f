"""A stranger's audio outside an evaluation: decoded in a process within walls, for `pack` and for a report's sounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ClipError, DataError, ModelError, XaresError
from ..progress import Doing, ignore
from .walls import Walls
from .worker import Beat, Tell, Worker, limit_memory

T = TypeVar("T")

_SILENCE_SECONDS = 120.0
_MEMORY = 4 << 30


class Decoder(Worker):
    """A process that reads some files and writes none.

    Args:
        reads: The files, or folders of them.
    """

    subject = "the process that decodes audio"

    def __init__(self, reads: Iterable[Path]) -> None:
        super().__init__(Walls(reads=tuple(str(path.absolute()) for path in reads), writes=()))

    def begin(self) -> None:
        """Start the process, which takes a moment, before there is work."""
        self._start()

    def each(self, function: Callable[[Any], T], items: Sequence[Any], returns: type[T], threads: int = 1) -> list[T | str]:
        """`function` of every item, or a text that says why a clip cannot be used.

        A clip that ends the process is found by halves, and costs no other clip.

        Args:
            function: Picklable; it raises `ClipError`.
            items: Picklable.
            returns: The type of its result.
            threads: That decode at once.
        """
        try:
            kind: Any = list[returns | str]  # type: ignore[valid-type]
            outcomes: list[T | str] = self.call(
                _each, function, items, threads, returns=kind, silence_limit=_SILENCE_SECONDS, observer=ignore
            )
            return outcomes
        except (ModelError, DataError) as error:
            if len(items) == 1:
                return [str(error)]
        middle = len(items) // 2
        return [
            outcome for part in (items[:middle], items[middle:]) for outcome in self.each(function, part, returns, threads)
        ]

    def _fault(self, fate: str, *, out_of_memory: bool) -> XaresError:
        return DataError(f"{fate}{'; it may need more memory than its limit' if out_of_memory else ''}")


def _each(function: Callable[[Any], Any], items: Sequence[Any], threads: int, *, tell: Tell) -> list[Any]:
    tell(Doing("decoding a clip"))
    limit_memory(_MEMORY + threads * (256 << 20))
    with ThreadPoolExecutor(threads) as pool:
        outcomes = []
        for outcome in pool.map(lambda item: _outcome(function, item), items):
            outcomes.append(outcome)
            tell(Beat())
    return outcomes


def _outcome(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except ClipError as error:
        return str(error)
    except MemoryError:
        return "it needs more memory than there is"
