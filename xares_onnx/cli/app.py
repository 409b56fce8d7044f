"""The app that every command shares, and its errors and output. Each module beside this one adds commands.

Heavy imports happen inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import IO, Annotated, Any, ParamSpec, TypeVar

import typer

from ..errors import XaresError, printable
from ..version import __version__
from .interrupts import INTERRUPTS, Terminated
from .start import ending

# The parser's own error class: click's, or that of the copy of click which newer versions of typer hold.
_ParserError: type[Any] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="xares-onnx",
    help="Score an audio encoder exported to ONNX on the X-ARES tasks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

P = ParamSpec("P")
R = TypeVar("R")


def run() -> int:
    """Parse the command line and run the command; the exit code."""
    try:
        return int(app(standalone_mode=False) or 0)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except _ParserError as error:  # in one line, like every other error; without arguments it is the help
        message = error.format_message()
        if "\n" in message:
            put(f"{message}\n", sys.stderr)
        else:
            command = f"{error.ctx.command_path} " if error.ctx else ""
            say(f"{message.rstrip('.')}; `{command}--help` shows what there is")
        return int(error.exit_code)


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """Errors as one line on stderr and an exit code; a traceback only with --debug."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        debug = bool(kwargs.get("debug"))
        if debug:
            os.environ["XARES_ONNX_DEBUG"] = "1"  # workers then write to our stderr
        try:
            return command(*args, **kwargs)
        except (KeyboardInterrupt, Terminated) as stop:
            INTERRUPTS.heard()
            code, sentence = ending(stop)
            say(sentence)
            raise typer.Exit(code) from None
        except XaresError as error:
            if debug:
                traceback.print_exc()
            say(one_line(error))
            raise typer.Exit(error.exit_code) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if debug:
                traceback.print_exc()
            code, sentence = ending(error)
            say(sentence)
            raise typer.Exit(code) from None

    return run


def say(text: str) -> None:
    put(f"xares-onnx: {printable(text)}\n", sys.stderr)


def put(text: str | bytes, stream: IO[Any]) -> None:
    """Write and flush. If the reader has gone, work and exit code do not change."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def one_line(error: XaresError) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if error.exit_code == 70 and len(lines) > 1:  # a worker's traceback
        return f"internal error in a worker, please report it: {lines[-1]}"
    return " ".join(lines)


def _version(value: bool) -> None:
    if value:
        put(f"{__version__}\n", sys.stdout)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def put_json(value: Any) -> None:
    from ..files import indented

    put(indented(value), sys.stdout.buffer)


def split(values: list[str] | None) -> list[str]:
    """Lists are comma-separated and repeatable."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]
