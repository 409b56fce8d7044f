"""The command line: parse, call, print. Nothing is imported before signals are handled (`start`)."""

from typing import Any

from .start import main

__all__ = ["app", "main"]


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import commands  # noqa: F401 - each adds itself
    from .app import app

    return app
