"""The first and last moments of the program: streams and signals before anything is imported, an exit code at any moment.

Whatever goes wrong outside a command, such as while libraries are loaded, ends with one sentence and its code as well.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any

from .interrupts import INTERRUPTS, Terminated

_LEAST_MEMORY = 400 << 20  # of address space: with less, numerical libraries wait for memory for ever while they load


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 gate, 2 usage, 3 model, 4 data, 5 machine, 70 our fault, 130/143 interrupted."""
    try:
        INTERRUPTS.install()
        _open_streams()
        code = _limited() or _run()
        _flush(code)
        INTERRUPTS.ignore()
    except SystemExit as end:
        INTERRUPTS.ignore()
        raise end
    except BaseException as error:
        INTERRUPTS.heard()
        INTERRUPTS.ignore()
        code, sentence = ending(error)
        with contextlib.suppress(OSError):
            os.write(2, f"xares-onnx: {sentence}\n".encode("utf-8", "backslashreplace"))
        with contextlib.suppress(OSError):
            _flush(code)
    sys.exit(code)


def _flush(code: int) -> None:
    """Write what is left for stdout; after an error, that this cannot be done is no news."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter would try again
        if not code:
            raise


def _run() -> int:
    from . import commands  # noqa: F401 - each adds itself
    from .app import run

    return run()


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code and the sentence of an error that is nobody's in particular."""
    if isinstance(error, KeyboardInterrupt | Terminated):
        code = 130 if isinstance(error, KeyboardInterrupt) else 143
        return code, "interrupted; finished shards are stored, so the same command goes on from there"
    number, text = getattr(error, "errno", None), str(error)
    if isinstance(error, MemoryError) or "failed to map segment" in text or "allocate memory" in text:
        return 5, f"the memory of this machine does not suffice: {text or 'a limit is set'}"
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return 5, f"the disk of this machine does not suffice: {text}"
    if number in (errno.EMFILE, errno.ENFILE) or os.strerror(errno.EMFILE) in text:
        return 5, "too few files may be open at once; raise the limit (`ulimit -n 1024`)"
    if isinstance(error, OSError) and not _has_folder():
        return 2, "the working folder was removed; change to one that exists"
    return 70, f"internal error, please report it: {type(error).__name__}: {text} (--debug shows where)"


def _has_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _limited() -> int:
    """5 with a sentence, if this process may have too little memory to start at all."""
    try:
        import resource
    except ImportError:  # not POSIX
        return 0
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY or limit >= _LEAST_MEMORY:
        return 0
    sys.stderr.write(
        f"xares-onnx: {limit >> 20} MB of address space are too few; raise the limit (`ulimit -v`) to 1000000 or more\n"
    )
    return 5


# ---------------------------------------------------------------- streams


def _open_streams() -> None:
    """Streams that are closed become empty ones, before a file gets their number; those that break end no work."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    sys.stdout, sys.stderr = _stream(sys.stdout, 1), _stream(sys.stderr, 2)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115


def _stream(stream: Any, number: int) -> Any:
    if stream is not None and not (isinstance(stream, io.TextIOWrapper) and stream.fileno() == number):
        return stream  # somebody else's, such as a test's
    raw = io.FileIO(number, "w", closefd=False)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    # A name that the terminal cannot show is escaped.
    return io.TextIOWrapper(_Unbroken(raw), encoding, "backslashreplace", line_buffering=number == 2 or raw.isatty())


class _Unbroken(io.BufferedWriter):
    """A stream whose reader may go, as `| head` does: work and exit code do not change. Of stderr any error is such.

    Not the raw file: a signal raised in its `write`, after the system's, would have the same bytes written twice.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self._lose(error)
            return len(data)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        """Write to nothing from now on; raises `error` if it says more than that the reader is gone."""
        number = self.fileno()
        if number != 2 and not isinstance(error, BrokenPipeError):
            raise error
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
