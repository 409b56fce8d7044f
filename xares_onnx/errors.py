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
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# Characters of a message, so that what slipped through `foreign` is no flood either.
_MAX_MESSAGE = 2_000
_MAX_FOREIGN = 200
_MAX_KNOWN = 1_000  # names among which a close one is looked for


class XaresError(Exception):
    exit_code = 70

    def __init__(self, message: str = "") -> None:
        super().__init__(_cut(message, _MAX_MESSAGE))


class UsageError(XaresError, ValueError):
    exit_code = 2


class UnknownTaskError(UsageError):
    @classmethod
    def named(cls, name: str, known: Iterable[str]) -> UnknownTaskError:
        return cls(f"there is no task {quoted(name)}{nearest(name, known)}; `xares-onnx tasks` lists them")


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


def escaped(text: str) -> str:
    """Text on one line, with what is not printable escaped: control characters, and those that turn the text's direction."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def printable(text: str) -> str:
    """Text to print: on one line, escaped, and no command to a build server, which takes `::` at the start of a line and
    `##[` anywhere in it for one. A line of ours that holds a stranger's text begins with a word of ours all the same.
    """
    text = escaped(text).replace("##", r"#\x23")
    return rf":\x3a{text[2:]}" if text.startswith("::") else text


def foreign(text: str) -> str:
    """A stranger's text, such as a name in a model or a cell of a table, for a message or a line of output: `printable`, and
    at most 200 characters.
    """
    return printable(_cut(text, _MAX_FOREIGN))


def sentences(text: str) -> str:
    """Text of ours with a stranger's in it, such as a cell or a remark, to print: `printable`, and cut like a message."""
    return printable(_cut(text, _MAX_MESSAGE))


def quoted(value: object) -> str:
    """A stranger's text or value in quotes, for a message: as `repr` writes it, and at most 200 characters of it."""
    return repr(_cut(value, _MAX_FOREIGN)) if isinstance(value, str) else _cut(repr(value), _MAX_FOREIGN)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _cut(text: str, most: int) -> str:
    """Text of at most `most` characters: of a longer one the start and the end."""
    if len(text) <= most:
        return text
    end = most // 4
    return f"{text[: most - end - 1]}\N{HORIZONTAL ELLIPSIS}{text[-end:]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The clause `; did you mean 'esc50' or 'fsd50k'?`, or nothing if no known name is close."""
    if len(name) > _MAX_FOREIGN:  # the search takes time in the square of the name
        return ""
    names = [other for other in itertools.islice(known, _MAX_KNOWN) if len(other) <= _MAX_FOREIGN]
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
