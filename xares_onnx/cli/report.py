"""`report`: results as a page, Markdown, a table, or a block for a model card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .app import app, put, reported, say
from .options import CacheOption, DebugOption

FORMATS = {".html": "html", ".htm": "html", ".md": "md", ".csv": "csv", ".yaml": "model-index", ".yml": "model-index"}
_ENDINGS = ".html, .md, .csv or .yaml"


@app.command()
@reported
def report(
    results: Annotated[list[Path], typer.Argument(help="Files that `evaluate` wrote; several appear side by side.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help=f"Where to write: {_ENDINGS}. [default: Markdown on stdout]")
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="html, md, csv or model-index. [default: by the file extension]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Folder of the shards that were scored, to include sound of the worst clips in the page."
        ),
    ] = None,
    cache: CacheOption = None,
    debug: DebugOption = False,
) -> None:
    """Show one or several results: as an HTML page that needs no network, Markdown, CSV, or a block for a model card."""
    chosen = _format(output, format_)
    if data is not None and chosen != "html":
        raise UsageError("--data includes sound in an HTML page; write one with -o report.html")
    from ..evaluation.differences import Side
    from ..evaluation.record import make_room
    from ..files import write_aside
    from ..report.board import make_board

    paths = list({path.resolve(): path for path in results}.values())
    if output is not None:
        if output.resolve() in {path.resolve() for path in paths}:
            raise UsageError(f"-o {output} would overwrite a result; name another file")
        make_room(output)
    names = [path.name for path in paths]
    sides = [Side.read(path, None if names.count(path.name) == 1 else str(path)) for path in paths]
    board = make_board(sides)
    if chosen == "html":
        from ..report.page.html import html

        text = html(board, data=data, cache=cache)
    elif chosen == "csv":
        from ..report.table import board_table, csv_text

        text = csv_text(board_table(board))
    elif chosen == "md":
        from ..report.markdown import markdown

        text = markdown(board)
    else:
        from ..report.model_index import model_index

        text = model_index(board)
    if output is None:
        put(text, sys.stdout)
        return
    write_aside(output, text.encode("utf-8", "backslashreplace"))
    for note in board.notes:
        say(f"note: {note}")
    put(f"wrote {output}\n", sys.stdout)


def _format(output: Path | None, name: str | None) -> str:
    if name is not None:
        if name not in FORMATS.values():
            raise UsageError(f"--format {name!r} must be html, md, csv or model-index")
        return name
    if output is None:
        return "md"
    if output.suffix.lower() not in FORMATS:
        raise UsageError(f"-o {output} must end in {_ENDINGS}, or --format must name the format")
    return FORMATS[output.suffix.lower()]
