"""SIGINT and SIGTERM as exceptions, raised again until they are heard.

Python drops an exception that is raised in the callback of a weak reference, in `__del__` or in the garbage collector, and
with it a Ctrl-C that comes at such a moment.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

_AGAIN_SECONDS = 0.3


class Terminated(BaseException):
    """SIGTERM, as an exception, so that everything is closed as on Ctrl-C."""


class Interrupts:
    """The handlers of this process. Made for its main thread."""

    def __init__(self) -> None:
        self._unheard: int | None = None

    def install(self) -> None:
        """Handle SIGTERM, and SIGINT if Python does: a shell has the jobs in its background ignore it."""
        signal.signal(signal.SIGTERM, self._raise)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._raise)
        if hasattr(signal, "setitimer"):  # not on Windows
            signal.signal(signal.SIGALRM, self._again)

    def heard(self) -> None:
        """The exception has arrived where it is reported."""
        self._unheard = None
        self._arm(0)

    def ignore(self) -> None:
        """What comes now is too late: the exit code is known, and the interpreter must end in peace."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        self._arm(0)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._unheard = number
        self._arm(_AGAIN_SECONDS)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def _again(self, number: int, frame: FrameType | None) -> None:
        if self._unheard is None:
            return
        if _on_its_way(sys.exc_info()[1]):  # it is closing what is open
            self._arm(_AGAIN_SECONDS)
        else:
            self._raise(self._unheard, frame)

    def _arm(self, seconds: float) -> None:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, seconds)


def _on_its_way(error: BaseException | None) -> bool:
    """Whether an interruption is being handled, perhaps among other errors."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt | Terminated):
            return True
        error = error.__context__
    return False


INTERRUPTS = Interrupts()
