"""`download`: fetch the data of tasks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import XaresError, worst_exit_code
from .app import app, one_line, put_json, reported, say, split
from .options import DebugOption

OFFLINE_VARIABLE = "XARES_ONNX_OFFLINE"


@app.command()
@reported
def download(
    tasks: Annotated[list[str] | None, typer.Argument(help="Names, patterns such as 'vox*', or task files.")] = None,
    suite: Annotated[str | None, typer.Option(help="all, public, speech, environment or music, in place of names.")] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder to fill. [default: $XARES_ONNX_DATA, ./env, the user's data folder]"),
    ] = None,
    mirror: Annotated[str | None, typer.Option(help="URL of a mirror of the records, in place of Zenodo.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print sizes and licences, and stop.")] = False,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Use no network: check the data on disk, and report what is missing or damaged."),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table.")] = False,
    debug: DebugOption = False,
) -> None:
    """Fetch the data of tasks from Zenodo: only missing files, resumed and verified."""
    from ..data import catalog, inventory
    from ..download import download as verb
    from ..report import terminal
    from ..report.observer import TerminalObserver, stdout_console

    names = split(tasks)
    if offline or os.environ.get(OFFLINE_VARIABLE, "0") not in ("", "0"):
        folder = catalog.data_folder(data)
        with TerminalObserver(quiet=quiet) as observer:
            held = [(task, inventory.verified(task, folder, observer)) for task in verb.choose(names, suite, observer)]
        if json_:
            put_json([holding for _, holding in held])
        elif not quiet:
            terminal.print_tasks(held, folder, stdout_console())
        errors: list[XaresError] = [*inventory.faults(held, folder, complete=True)]
    else:
        with TerminalObserver(quiet=quiet) as observer:
            report = verb.download(names, suite=suite, data=data, mirror=mirror, plan=plan, observer=observer)
        if json_:
            put_json(report.tasks)
        elif not quiet and report.tasks:
            terminal.print_download(report.tasks, stdout_console(), plan=plan)
        errors = report.errors
    for error in errors:
        say(one_line(error))
    raise typer.Exit(worst_exit_code(error.exit_code for error in errors))
