"""The one door to a stranger's small files: sidecars, task files, manifests, settings, tables, vocabularies.

Only a regular file is read, never a pipe or a device that might not end, and only up to a limit. Before a text is parsed,
its nesting, the parts of its dotted keys and the digits of its numbers are bounded: TOML's parser takes time and memory in
the square of a key's parts, and a number of 5,000 digits cannot be printed.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from .errors import foreign

T = TypeVar("T")

SMALL_BYTES = 64_000  # of a file that holds a few settings
_BLOCK = 1 << 16
_MAX_DEPTH = 32
_MAX_PARTS = 16  # of a dotted key
_MAX_ARRAYS = 1_000
_MAX_WORD = 200  # characters of a number or a bare key

# Both match at every quote, closed or not, so that a scan takes time in proportion to the text. As in tomllib, up to two
# quotes before the three that close a text belong to it.
_TOML_TEXT = re.compile(
    r"""\"{3}(?:\\.|[^\\])*?(?:\"{3,5}|\Z) | '{3}.*?(?:'{3,5}|\Z) | "(?:\\.|[^"\\\n])*+"? | '[^'\n]*+'? | \#[^\n]*+""",
    re.DOTALL | re.VERBOSE,
)
_JSON_TEXT = re.compile(r'"(?:\\.|[^"\\])*+"?', re.DOTALL)
_LONG_WORD = re.compile(rf"(?<![\w+-])[\w+-]{{{_MAX_WORD + 1}}}")
_LONG_KEY = re.compile(rf"(?<![\w-])[\w-]++(?:[ \t]*+\.[ \t]*+[\w-]++){{{_MAX_PARTS}}}")


class ForeignFileError(Exception):
    """A file cannot be used; the text is a clause that says why, such as `it is not a regular file`."""


class NoFileError(ForeignFileError):
    """There is no such file."""


def open_regular(path: Path, *, links: bool = True) -> BinaryIO:
    """Open a regular file to read; a pipe or a device is neither waited for nor read.

    Args:
        path: The file.
        links: Whether `path` may be a link to a regular file.

    Raises:
        NoFileError: It does not exist.
        ForeignFileError: It cannot be opened, or is no regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        if not links and path.is_symlink():
            raise ForeignFileError("it is a link")
        descriptor = os.open(path, flags | (0 if links else getattr(os, "O_NOFOLLOW", 0)))
    except FileNotFoundError as error:
        raise NoFileError(error.strerror) from error
    except OSError as error:
        raise ForeignFileError(error.strerror or str(error)) from error
    except ValueError as error:  # a null byte or half a surrogate pair
        raise ForeignFileError("its name is no path") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ForeignFileError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_small(path: Path, limit: int = SMALL_BYTES, *, links: bool = True) -> bytes:
    """The bytes of a regular file that has at most `limit` of them.

    Raises:
        NoFileError: It does not exist.
        ForeignFileError: It cannot be read, is no regular file, or is larger.
    """
    with open_regular(path, links=links) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size + 1) if size <= limit else None  # of `limit` bytes, a read would take the memory at once
            while data is not None and len(data) <= limit and (more := file.read(_BLOCK)):  # it grows, or tells no size
                data += more
        except OSError as error:
            raise ForeignFileError(error.strerror or str(error)) from error
    if data is None or len(data) > limit:
        most = f"{limit / 1e6:g} MB" if limit >= 1_000_000 else f"{limit / 1e3:g} kB"
        raise ForeignFileError(f"it is larger than {most}")
    return data


def parse_toml(data: bytes) -> dict[str, Any]:
    """Parse TOML, in time and memory in proportion to its size.

    Raises:
        ForeignFileError: It is not valid, nested too deeply, or has a key or number that is too long.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ForeignFileError(f"it is not UTF-8 text: {error}") from error
    bare = _TOML_TEXT.sub(lambda match: "" if match[0][0] == "#" else "x", text)
    _check(bare)
    if _LONG_KEY.search(bare):
        raise ForeignFileError(f"it has a dotted key of more than {_MAX_PARTS} parts")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ForeignFileError(f"it is not valid TOML: {foreign(str(error))}") from error


def parse_json(data: bytes, type: type[T]) -> T:
    """Parse JSON into `type`, which msgspec checks.

    Raises:
        ForeignFileError: It is not valid, not of the type, nested too deeply, or has a number that is too long.
    """
    _check(_JSON_TEXT.sub("x", data.decode("latin-1")))  # all its marks are ASCII
    return decode_json(data, type)


def decode_json(data: bytes, type: type[T]) -> T:
    """`parse_json` of a file that is too large to look through first, or that a record type bounds."""
    try:
        return msgspec.json.decode(data, type=type)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise ForeignFileError(f"it is not valid json: {foreign(str(error))}") from error


def read_arrays(path: Path, limit: int) -> dict[str, Any]:
    """The arrays of a `.npz` file, by name; nothing in it is unpickled.

    Args:
        path: The file.
        limit: Bytes that it may hold, uncompressed.

    Raises:
        NoFileError: It does not exist.
        ForeignFileError: It cannot be read, holds more, or something else.
    """
    import numpy as np

    with open_regular(path) as opened:
        try:
            with zipfile.ZipFile(opened) as archive:
                members = archive.infolist()
                if sum(member.file_size for member in members) > limit or len(members) > _MAX_ARRAYS:
                    raise ForeignFileError(f"it holds more than {limit >> 20} MiB, or more than {_MAX_ARRAYS} arrays")
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except ForeignFileError:
            raise
        except Exception as error:  # zipfile, zlib, numpy and its tokenizer raise different ones for a damaged file
            raise ForeignFileError(
                f"it is no .npz file of plain arrays: {foreign(str(error) or type(error).__name__)}"
            ) from error
    if any(not isinstance(array, np.ndarray) for array in arrays.values()):
        raise ForeignFileError("it holds something other than arrays")
    return arrays


def _check(bare: str) -> None:
    """Bound the numbers, bare keys and nesting of a text without its quoted parts."""
    if _LONG_WORD.search(bare):
        raise ForeignFileError(f"it has a key or a number of more than {_MAX_WORD} characters")
    depth = 0
    for match in re.finditer(r"[\[\]{}]", bare):
        depth += 1 if match[0] in "[{" else -1
        if depth > _MAX_DEPTH:
            raise ForeignFileError(f"it is nested deeper than {_MAX_DEPTH}")
