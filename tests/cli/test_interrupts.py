"""Signals that come at moments at which Python drops exceptions, and signals while something is being closed."""

from __future__ import annotations

import subprocess
import sys

import pytest

DROPPED = """
import signal, time, weakref
from xares_onnx.cli.interrupts import INTERRUPTS, Terminated
signal.signal(signal.SIGINT, signal.default_int_handler)
INTERRUPTS.install()
class Thing: pass
thing = Thing()
reference = weakref.ref(thing, lambda _: signal.raise_signal(signal.{name}))
try:
    del thing
    print("dropped", flush=True)
    time.sleep(100)
except (KeyboardInterrupt, Terminated) as error:
    INTERRUPTS.heard()
    print(type(error).__name__, flush=True)
time.sleep(1)
"""

CLOSING = """
import signal, time
from xares_onnx.cli.interrupts import INTERRUPTS, Terminated
INTERRUPTS.install()
def close():
    try:
        raise OSError("in between")
    except OSError:
        time.sleep(1.5)
    print("closed", flush=True)
try:
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        close()
except Terminated:
    INTERRUPTS.heard()
    print("heard", flush=True)
time.sleep(1)
"""


@pytest.mark.parametrize(("name", "error"), [("SIGINT", "KeyboardInterrupt"), ("SIGTERM", "Terminated")])
def test_a_dropped_signal_comes_again(name: str, error: str) -> None:
    out, err = run(DROPPED.format(name=name))
    assert out == ["dropped", error]
    assert "ignored in" in err  # Python's words on the first one


def test_closing_is_not_interrupted_by_what_began_it() -> None:
    assert run(CLOSING)[0] == ["closed", "heard"]


def run(script: str) -> tuple[list[str], str]:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90, check=True)
    return done.stdout.split(), done.stderr
