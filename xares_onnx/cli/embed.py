"""`embed`: fill the store with embeddings."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import worst_exit_code
from .app import app, one_line, put_json, reported, say, split
from .options import (
    CacheOption,
    ContractOption,
    DataOption,
    DebugOption,
    DevicesOption,
    EngineOption,
    LimitOption,
    ModelArgument,
    ProtocolOption,
    SuiteOption,
    TapsOption,
    TasksOption,
    ThreadsOption,
    TrustOption,
    WorkersOption,
    check_counts,
)


@app.command()
@reported
def embed(
    model: ModelArgument,
    tasks: TasksOption = None,
    part: Annotated[
        str, typer.Option(help="I/N: one of N parts of about equal hours, for N machines that share --cache.")
    ] = "1/1",
    suite: SuiteOption = None,
    data: DataOption = None,
    cache: CacheOption = None,
    protocol: ProtocolOption = "corrected",
    limit: LimitOption = None,
    contract: ContractOption = None,
    taps: TapsOption = None,
    device: DevicesOption = "auto",
    threads: ThreadsOption = None,
    workers: WorkersOption = None,
    engine: EngineOption = "local",
    trust: TrustOption = False,
    json_: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no summary.")] = False,
    debug: DebugOption = False,
) -> None:
    """Embed shards and store them, without training: `evaluate` with the same options then finds them."""
    from ..evaluation import filling
    from ..report.observer import TerminalObserver, stdout_console

    check_counts(threads=threads, workers=workers)
    with TerminalObserver(quiet=quiet) as observer:
        filled = filling.embed(
            model,
            split(tasks),
            part=filling.Part.parse(part),
            suite=suite,
            data=data,
            cache=cache,
            protocol=protocol,  # type: ignore[arg-type]
            limit=limit,
            contract=contract or (),
            device=device,
            threads=threads,
            workers=workers,
            engine=engine,
            taps=split(taps),
            trust=trust,
            observer=observer,
        )
    if json_:
        done = {name: getattr(filled, name) for name in ("shards", "embedded", "all_shards", "hours")}
        put_json({"part": part, **done, "errors": [str(error) for error in filled.errors]})
    elif not quiet:
        stdout_console().print(
            f"part {part}: {filled.shards} of {filled.all_shards} shards, {filled.embedded} of them embedded now "
            f"({filled.hours:.2f} h of audio)"
        )
    for error in filled.errors:
        say(one_line(error))
    raise typer.Exit(worst_exit_code(error.exit_code for error in filled.errors))
