"""`pack`: a task of one's own from a folder of audio and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .app import app, put_json, reported
from .options import DebugOption


@app.command()
@reported
def pack(
    audio: Annotated[Path, typer.Argument(metavar="AUDIO_DIR", help="The folder that the table's paths start in.")],
    labels: Annotated[
        Path | None,
        typer.Argument(
            metavar="LABELS",
            help="csv, tsv, jsonl or parquet with columns path, and label, labels, events, caption, transcript or score. "
            "Without it, classes are the sub-folders.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the shards and the task file.")] = None,
    name: Annotated[str, typer.Option(help="Of the task: DIR/NAME.toml and DIR/NAME/.")] = "mine",
    title: Annotated[str | None, typer.Option(help="As tables show it. [default: the name]")] = None,
    domain: Annotated[
        str | None, typer.Option(help="speech, environment or music. [default: environment; speech for transcripts]")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The column of labels, where several could be.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="What --target is: class, tags, events, captions, transcript or number.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Between tags. [default: the first of | ; , that occurs in them]")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Column, such as speaker, whose clips stay in one split. [default: group, if any]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the splits that are made.")] = 0,
    low: Annotated[float | None, typer.Option(help="Lowest score. [default: of the data, rounded]")] = None,
    high: Annotated[float | None, typer.Option(help="Highest score. [default: of the data, rounded]")] = None,
    crop_seconds: Annotated[float | None, typer.Option(help="Cut clips into crops of this length.")] = None,
    segment_seconds: Annotated[float, typer.Option(help="Length of the segments that events are scored in.")] = 1.0,
    leaks: Annotated[
        str, typer.Option(help="A recording in two of the table's splits: refuse, drop (test keeps it) or keep.")
    ] = "refuse",
    allow_drops: Annotated[bool, typer.Option("--allow-drops", help="Pack in spite of many unusable clips.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Check everything, write nothing.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print what was packed as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table.")] = False,
    debug: DebugOption = False,
) -> None:
    """Make a task of your own from a folder of audio and a table of its labels."""
    import msgspec

    from .. import packing
    from ..report import packed as report
    from ..report.observer import TerminalObserver, stdout_console

    if output is None and not check:
        raise UsageError("name the folder to write by -o DIR, or check only by --check")
    with TerminalObserver(quiet=quiet) as observer:
        done = packing.pack(
            audio,
            labels,
            None if check else output,
            name=name,
            title=title,
            domain=domain,
            target=target,
            kind=kind,
            separator=separator,
            group=group,
            seed=seed,
            low=low,
            high=high,
            crop_seconds=crop_seconds,
            segment_seconds=segment_seconds,
            leaks=leaks,
            allow_drops=allow_drops,
            observer=observer,
        )
    if json_:
        put_json(msgspec.to_builtins(done))
    elif not quiet:
        report.print_packed(done, stdout_console())
