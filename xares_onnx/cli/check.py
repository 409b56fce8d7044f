"""`check`: whether a model is what an encoder must be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer

from ..errors import UsageError, nearest
from .app import app, put, put_json, reported, say
from .options import ContractOption, DebugOption, DeviceOption, FormatOption, ModelArgument, ThreadsOption, TrustOption

Format = Literal["text", "json", "junit", "github"]


@app.command()
@reported
def check(
    model: ModelArgument,
    reference: Annotated[
        Path | None, typer.Option(help="Another model, or a .npz of waveforms and embeddings, to agree with.")
    ] = None,
    contract: ContractOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="Folder where the measured contract is kept.")] = None,
    trust: TrustOption = False,
    profile: Annotated[bool, typer.Option("--profile", help="Time it by operator and by layer, too.")] = False,
    format_: FormatOption = "text",
    debug: DebugOption = False,
) -> None:
    """Check a model without data: contract, lengths, batches, values, parity, cost. 0 well, 1 faulty, 3 cannot be used.

    How much each property counts is set in [tool.xares-onnx.check] of the nearest pyproject.toml.
    """
    if format_ not in get_args(Format):
        raise UsageError(
            f"--format {format_!r} must be one of {', '.join(get_args(Format))}{nearest(format_, get_args(Format))}"
        )
    from ..checking import check as measure
    from ..checking import read_settings
    from ..report import checks, ci
    from ..report.observer import TerminalObserver, stdout_console

    settings = read_settings(Path.cwd())
    with TerminalObserver() as observer:
        report = measure(
            model,
            reference=reference,
            contract=contract or (),
            device=device,
            threads=threads,
            cache=cache,
            trust=trust,
            settings=settings,
            profile=profile,
            observer=observer,
        )
    match format_:
        case "json":
            put_json(report)
        case "junit":
            put(ci.junit(f"xares-onnx check {report.name}", checks.cases(report)).encode(), sys.stdout.buffer)
        case "github":
            text = ci.github(report.name, checks.cases(report), file=model.as_posix(), summary=checks.summary(report))
            put(text, sys.stdout)
            ci.write_step_summary(checks.markdown(report))
        case _:
            checks.print_check(report, stdout_console())
    if report.unusable is not None:
        say(report.unusable)
    raise typer.Exit(report.exit_code)
