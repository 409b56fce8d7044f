"""What the tests of the worker let it do. In a module of its own, because the child imports it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from typing import Any

import numpy as np

from xares_onnx import errors
from xares_onnx.encoder.worker import Array, Beat, Tell, limit_memory
from xares_onnx.progress import Doing, Note, Progress


def add(a: int, b: int, *, tell: Tell) -> int:
    return a + b


def pid(*, tell: Tell) -> int:
    return os.getpid()


def imported(*, tell: Tell) -> list[str]:
    return sorted(sys.modules)


def array(kind: str, shape: tuple[int, ...], *, tell: Tell) -> Array:
    return Array.of(np.arange(np.prod(shape)).reshape(shape).astype(kind).T)


def speak(times: int, seconds: float, *, tell: Tell) -> int:
    """Say something of every kind, now and then."""
    words = [Beat(), Doing("waiting"), Note("still here"), Progress("embed", "task", 1, 2)]
    for i in range(times):
        time.sleep(seconds)
        tell(words[i % len(words)])
    return times


def sleep_for_ever(*, tell: Tell) -> None:
    tell(Doing("sleeping"))
    tell(Note("asleep"))
    time.sleep(10_000)


def spin_for_ever(*, tell: Tell) -> None:
    tell(Doing("spinning"))
    tell(Note("busy"))
    while True:
        pass


def core_limit(*, tell: Tell) -> int:
    import resource

    return resource.getrlimit(resource.RLIMIT_CORE)[0]


def wait_patiently(first: float, then: float, *, tell: Tell) -> int:
    """Silent for two whiles, of which the first was asked for."""
    tell(Doing("storing", patience=20.0))
    time.sleep(first)
    tell(Doing("running"))
    time.sleep(then)
    return 1


def say_and_return(*, tell: Tell) -> int:
    tell(Note("done"))
    return 0


def note_then_wait(*, tell: Tell) -> str:
    tell(Note("one"))
    time.sleep(0.3)
    return "late"


def end(how: str, *, tell: Tell) -> None:
    """End the process in a way that nothing in it can catch."""
    tell(Doing("working"))
    match how:
        case "exit":
            os._exit(7)
        case "bad_alloc":
            os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
            os._exit(1)
        case "SIGSEGV":
            ctypes.string_at(0)
        case "SIGABRT":
            os.abort()
        case _:
            os.kill(os.getpid(), signal.Signals[how])
            time.sleep(10)


def fail(name: str, text: str, *, tell: Tell) -> None:
    kind: Any = getattr(errors, name, None) or __builtins__[name]  # type: ignore[index]
    raise kind(text)


def fail_about(about: str, *, tell: Tell) -> None:
    with errors.concerning(about):
        raise errors.ContradictionError("it is so")


def ask_for_memory(limit: int, wanted: int, *, tell: Tell) -> int:
    """Bytes that were given, under a limit."""
    limit_memory(limit)
    return len(np.empty(wanted, np.uint8))


def print_everywhere(*, tell: Tell) -> str:
    print("from Python")
    print("to stderr", file=sys.stderr)
    os.write(1, b"from the system\n")
    ctypes.CDLL(None).puts(b"from C")
    ctypes.CDLL(None).fflush(None)
    return "heard"


def write_nonsense(*, tell: Tell) -> None:
    """Write to every pipe that is open, the one for answers among them, and live on."""
    tell(Doing("talking"))
    for descriptor in range(3, 20):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\x04\0\0\0\0\0\0\0what")
    time.sleep(10_000)
