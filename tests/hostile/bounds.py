"""The command line in a child with bounds on time and memory, so that what breaks does not take the tests with it."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import cli_world
import pytest

SECONDS, MEMORY = 200.0, 2 << 30  # more address space than the process has when it starts
LONGEST = 3_000  # characters of everything that is printed for one error


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def bounded(*arguments: object, seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """Exit code and both streams of a command; the test fails if it does not end in time."""
    with tempfile.TemporaryFile() as answer:
        with warnings.catch_warnings():  # of forking beside threads, from Python 3.12 on
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            _answer([str(argument) for argument in arguments], answer.fileno(), memory)
        deadline = time.monotonic() + seconds
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                pytest.fail(f"no end within {seconds:.0f} s")
            time.sleep(0.01)
        answer.seek(0)
        content = answer.read()
    assert content, "the process died"
    return Outcome(*json.loads(content))


def refused(outcome: Outcome, code: int, says: str) -> None:
    """With the exit code, one short sentence, and nothing else on either stream but notes."""
    *notes, last = outcome.err.splitlines()
    assert says in last
    assert outcome.code == code
    assert last.startswith("xares-onnx: ")
    assert all(note.startswith("note: ") for note in notes)
    assert len(outcome.err) + len(outcome.out) < LONGEST
    assert "Traceback" not in outcome.err


def _answer(arguments: list[str], descriptor: int, memory: int) -> None:
    """In the child: run, write the outcome, end."""
    try:
        os.setsid()
        if Path("/proc/self/statm").exists():
            import resource

            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
        code, out, err = cli_world.run(*arguments)
        os.write(descriptor, json.dumps([code, out[-100_000:], err[-100_000:]]).encode())
    finally:
        os._exit(0)
