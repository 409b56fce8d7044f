"""The command line's reference, made from the command line itself: `python docs/reference.py > docs/cli.md`.

With `--check` it says by its exit code whether docs/cli.md is what it would write.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from xares_onnx.cli import app

PAGE = Path(__file__).with_name("cli.md")


def page() -> str:
    root = typer.main.get_command(app)
    lines = [
        "# Command line",
        "",
        "Made from the help of the program itself. Lists are comma-separated and repeatable.",
        "",
    ]
    for path, command in commands(root, "xares-onnx"):
        lines += [f"## `{path}`", "", (command.help or "").strip(), ""]
        parameters = [parameter for parameter in command.params if parameter.name != "help"]
        lines += ["    " + " ".join([path, *(["[OPTIONS]"] if parameters else []), *arguments(parameters)]), ""]
        if parameters:
            lines += ["| | |", "|---|---|", *map(row, parameters), ""]
    return "\n".join(lines)


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, in the order of `--help`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def arguments(parameters: list[Any]) -> Iterator[str]:
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            name = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
            yield name if parameter.required else f"[{name}]"


def row(parameter: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    name = f"`{parameter.name.upper()}`" if is_argument else ", ".join(f"`{option}`" for option in parameter.opts)
    said = parameter.help or ""
    if parameter.default not in (None, False, "", ()) and "[default" not in said and not callable(parameter.default):
        said += f" [default: {parameter.default}]"
    if parameter.required and not is_argument:
        said += " [required]"
    if parameter.multiple:
        said += " Repeatable."
    return f"| {name} | {said.replace('|', '/').strip()} |"


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(None if PAGE.exists() and PAGE.read_text() == page() else f"{PAGE} is stale: make docs writes it anew")
    sys.stdout.write(page())
