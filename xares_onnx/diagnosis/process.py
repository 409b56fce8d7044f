"""The process in which both models of a diagnosis are read, changed and run: a third one, beside those that embed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..encoder.limits import silence_seconds
from ..encoder.spec import EncoderInfo
from ..encoder.worker import Worker
from ..errors import ModelLimitError
from ..progress import Observer

T = TypeVar("T")


class Process:
    """Calls functions of this room in a process that can be killed, with the limits for models of these sizes.

    A context manager that ends the process.
    """

    def __init__(self, infos: tuple[EncoderInfo, ...], trust: bool, observer: Observer) -> None:
        self._worker = Worker()
        self._trust, self._observer = trust, observer
        self._limit = silence_seconds(sum(info.scan.solid_bytes for info in infos), trust)

    def call(self, function: Callable[..., T], *arguments: Any, returns: type[T]) -> T:
        """`function(*arguments, tell=…)` in the process. Raises what that raises; a limit's error says how to lift it."""
        try:
            return self._worker.call(
                function, *arguments, returns=returns, silence_limit=self._limit, observer=self._observer
            )
        except ModelLimitError as error:
            if self._trust:
                raise
            raise ModelLimitError(
                f"{error}; if you trust both models, --trust lifts the limit", about=error.about
            ) from error

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.close()
