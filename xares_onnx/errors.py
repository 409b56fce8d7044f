"""Every failure that a user can do something about, with its exit code.

    XaresError                  70  a bug of ours, unless a subclass says otherwise
    ├── UsageError               2  wrong usage: unknown task, bad option, bad task file
    │   ├── UnknownTaskError
    │   └── TaskFileError
    ├── ModelError               3  the model cannot be used
    │   ├── ContractError           it does not fit the encoder contract
    │   │   └── ContradictionError      a declaration contradicts a measurement
    │   └── ModelLimitError         it exceeds a limit on size, time or memory
    ├── DataError                4  data missing or corrupt
    │   ├── DataMissingError
    │   ├── DownloadError           a record or file cannot be fetched
    │   └── ScoreUndefinedError     one task's data or embeddings give no score
    └── MachineError             5  provider, disk, host memory
        └── DiskFullError

A message is one sentence: what is wrong, then what to do. `ClipError` and `LabelError` never reach the user as errors:
each says why one clip is dropped, and the drop is counted.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class XaresError(Exception):
    exit_code = 70


class UsageError(XaresError, ValueError):
    exit_code = 2


class UnknownTaskError(UsageError):
    @classmethod
    def named(cls, name: str, known: Iterable[str]) -> UnknownTaskError:
        return cls(f"there is no task {name!r}{nearest(name, known)}; `xares-onnx tasks` lists them")


class TaskFileError(UsageError):
    pass


class ModelError(XaresError):
    """The model cannot be used.

    `about` tells programs what the message tells people: a key of the contract, or `time` (lengths), `frames` (the law of
    their number), `values` (not finite), `constant`, `run` (one call failed) or `process` (it died or was stopped).
    """

    exit_code = 3

    def __init__(self, message: str = "", *, about: str | None = None) -> None:
        super().__init__(message)
        self.about = about


@contextmanager
def concerning(about: str) -> Iterator[None]:
    """Give a `ModelError` from the block this `about`, unless it has one."""
    try:
        yield
    except ModelError as error:
        error.about = error.about or about
        raise


class ContractError(ModelError):
    pass


class ContradictionError(ContractError):
    """`about` is the declared key."""


class ModelLimitError(ModelError):
    pass


class DataError(XaresError):
    exit_code = 4


class DataMissingError(DataError):
    pass


class DownloadError(DataError):
    pass


class ScoreUndefinedError(DataError):
    pass


class MachineError(XaresError):
    exit_code = 5


class DiskFullError(MachineError):
    pass


class ClipError(Exception):
    """One clip cannot be used; the text is the reason recorded for its drop."""


class LabelError(ClipError):
    """One clip's label cannot be used."""


# Of several errors, the exit code is the first of these.
EXIT_CODE_PRECEDENCE = (70, 3, 5, 4, 1, 0)


def worst_exit_code(codes: Iterable[int]) -> int:
    """The one of several exit codes to exit with, 0 if there are none."""
    present = set(codes)
    return next((code for code in EXIT_CODE_PRECEDENCE if code in present), 0)


def printable(text: str) -> str:
    """Text on one line, with control characters escaped: a name in a stranger's file must not control the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, known: Iterable[str]) -> str:
    """The clause `; did you mean 'esc50' or 'fsd50k'?`, or nothing if no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
