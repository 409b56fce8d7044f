"""`evaluate`: score a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError, worst_exit_code
from .app import app, one_line, put, put_json, reported, say, split
from .options import (
    CacheOption,
    ContractOption,
    DataOption,
    DebugOption,
    DevicesOption,
    DropsOption,
    EngineOption,
    HeadOption,
    LanguageModelOption,
    LimitOption,
    MethodOption,
    ModelArgument,
    ProtocolOption,
    SeedsOption,
    SuiteOption,
    TapsOption,
    TasksOption,
    ThreadsOption,
    TrustOption,
    VocabularyOption,
    WorkersOption,
    check_counts,
)


@app.command()
@reported
def evaluate(
    model: ModelArgument,
    tasks: TasksOption = None,
    suite: SuiteOption = None,
    data: DataOption = None,
    cache: CacheOption = None,
    output: Annotated[Path | None, typer.Option(help="Result file. [default: results/<model>-<digest>.json]")] = None,
    method: MethodOption = None,
    protocol: ProtocolOption = "corrected",
    seeds: SeedsOption = None,
    limit: LimitOption = None,
    head: HeadOption = None,
    lm: LanguageModelOption = None,
    vocabulary: VocabularyOption = None,
    contract: ContractOption = None,
    taps: TapsOption = None,
    shots: Annotated[
        list[str] | None,
        typer.Option("--shots", help="Score class tasks with that many training clips per class too: 1,2,4,8,16."),
    ] = None,
    device: DevicesOption = "auto",
    threads: ThreadsOption = None,
    workers: WorkersOption = None,
    engine: EngineOption = "local",
    plan: Annotated[bool, typer.Option("--plan", help="Print clips, hours, disk and time, and stop.")] = False,
    allow_drops: DropsOption = False,
    baseline: Annotated[
        Path | None, typer.Option(help="A result that no score may fall behind for certain; else exit code 1.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Loss against the baseline that is tolerated, in score. [default: 0.01]")
    ] = None,
    fail_under: Annotated[
        list[str] | None, typer.Option("--fail-under", help="TASK[:METHOD]=SCORE, or an average's: exit code 1 below it.")
    ] = None,
    trust: TrustOption = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result, or the plan, as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table.")] = False,
    debug: DebugOption = False,
) -> None:
    """Score a model: embed each task's data, train heads and a kNN, and report every score with an interval."""
    from ..evaluation import evaluation
    from ..evaluation.settings import METHODS
    from ..report import comparison as report
    from ..report import terminal
    from ..report.observer import TerminalObserver, stdout_console

    check_counts(threads=threads, workers=workers)
    arguments: dict[str, Any] = {
        "suite": suite,
        "data": data,
        "cache": cache,
        "protocol": protocol,
        "seeds": seeds,
        "limit": limit,
        "heads": split(head),
        "lm": lm,
        "vocabulary": vocabulary,
        "contract": contract or (),
        "taps": split(taps),
        "device": device,
        "threads": threads,
        "trust": trust,
    }
    names = split(tasks)
    with TerminalObserver(quiet=quiet) as observer:
        if plan:
            estimate = evaluation.plan(model, names, **arguments, observer=observer)
        else:
            scored = evaluation.evaluate(
                model,
                names,
                **arguments,
                workers=workers,
                engine=engine,
                output=output,
                save=True,
                methods=split(method) or METHODS,  # type: ignore[arg-type]
                shots=_counts(shots),
                allow_drops=allow_drops,
                baseline=baseline,
                tolerance=tolerance,
                fail_under=split(fail_under),
                observer=observer,
            )
    if plan:
        if json_:
            put_json({"tasks": estimate.rows, "total": estimate.total, "rtf": estimate.rtf})
        else:
            terminal.print_plan(estimate, stdout_console())
        return
    if json_:
        put(scored.json().encode(), sys.stdout.buffer)
    elif not quiet:
        if scored.result.gates:
            report.print_gates(scored.result.gates, stdout_console())
        terminal.print_result(scored.result, stdout_console(), saved=str(scored.path))
    for error in scored.errors:
        say(one_line(error))
    failed = [gate for gate in scored.result.gates if gate.status == "fail"]
    for gate in failed:
        say(f"{gate.gate.replace('_', '-')}: {gate.task} {gate.method}: {gate.message}")
    raise typer.Exit(worst_exit_code([*(error.exit_code for error in scored.errors), *[1] * bool(failed)]))


def _counts(shots: list[str] | None) -> list[int]:
    for text in split(shots):
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise UsageError(f"--shots {text!r} must be whole numbers, such as 1,2,4,8,16")
    return [int(text) for text in split(shots)]
