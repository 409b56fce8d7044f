"""`pack`: make a task from a folder of audio and a table of labels."""

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
    audio: Annotated[
        Path,
        typer.Argument(
            metavar="AUDIO_DIR",
            help="The folder that the paths in the table start from, or a Hugging Face data set of parquet or Arrow files.",
        ),
    ],
    labels: Annotated[
        Path | None,
        typer.Argument(
            metavar="LABELS",
            help="csv, tsv, jsonl or parquet with columns path, and label, labels, events, caption, transcript or score. "
            "Without it, labels come from a data set's own columns, or classes are the sub-folders.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the shards and the task file.")] = None,
    name: Annotated[str, typer.Option(help="Name of the task, written to DIR/NAME.toml and DIR/NAME/.")] = "mine",
    title: Annotated[str | None, typer.Option(help="Title in tables. [default: the name]")] = None,
    domain: Annotated[
        str | None, typer.Option(help="speech, environment or music. [default: environment; speech for transcripts]")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", "--label", help="The column of labels, if several are possible.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="Kind of --target: class, tags, events, captions, transcript or number.")
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Separator of tags. [default: the first of | ; , that occurs]")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Column, such as speaker, whose clips stay in one split. [default: group, if any]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of generated splits.")] = 0,
    low: Annotated[float | None, typer.Option(help="Lowest score. [default: from the data, rounded]")] = None,
    high: Annotated[float | None, typer.Option(help="Highest score. [default: from the data, rounded]")] = None,
    crop_seconds: Annotated[float | None, typer.Option(help="Cut clips into crops of this length.")] = None,
    segment_seconds: Annotated[float, typer.Option(help="Length of the segments that score events.")] = 1.0,
    leaks: Annotated[
        str, typer.Option(help="If a recording is in two splits: refuse, drop (keep it in test only) or keep.")
    ] = "refuse",
    allow_drops: Annotated[bool, typer.Option("--allow-drops", help="Pack even with many unusable clips.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Check everything, write nothing.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table.")] = False,
    debug: DebugOption = False,
) -> None:
    """Make a task of your own from a folder of audio and a table of its labels."""
    import msgspec

    from .. import packing
    from ..report.observer import TerminalObserver, stdout_console
    from ..report.packed import print_packed

    if output is None and not check:
        raise UsageError("name the output folder with -o DIR, or only check with --check")
    with TerminalObserver(quiet=quiet) as observer:
        packed = packing.pack(
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
        put_json(msgspec.to_builtins(packed))
    elif not quiet:
        print_packed(packed, stdout_console())
