"""`evaluate`: score a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError, worst_exit_code
from .app import CacheOption, DataOption, DebugOption, TrustOption, app, one_line, put, put_json, reported, say, split


@app.command()
@reported
def evaluate(
    model: Annotated[Path, typer.Argument(help="An .onnx file, or a folder with one.")],
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", help="Names, patterns such as 'vox*', or task files; comma-separated.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help="all, public, speech, environment, music, private or synthetic.")] = None,
    data: DataOption = None,
    cache: CacheOption = None,
    output: Annotated[Path | None, typer.Option(help="Result file. [default: results/<model>-<digest>.json]")] = None,
    method: Annotated[list[str] | None, typer.Option(help="head, knn; both by default.")] = None,
    protocol: Annotated[str, typer.Option(help="corrected, or xares for X-ARES's own choices.")] = "corrected",
    seeds: Annotated[int | None, typer.Option(help="Heads a fold. [default: 3; 1 under xares]")] = None,
    limit: Annotated[int | None, typer.Option(help="At most N clips a split, chosen by key hash.")] = None,
    head: Annotated[
        list[str] | None, typer.Option("--head", help="TASK=KIND, a head other than the task's own: librispeech=llm.")
    ] = None,
    lm: Annotated[str | None, typer.Option("--lm", help="Folder of a causal language model, for the llm head.")] = None,
    vocabulary: Annotated[Path | None, typer.Option(help="BERT's vocab.txt, for captions under --protocol xares.")] = None,
    contract: Annotated[
        list[str] | None, typer.Option("--contract", help="KEY=VALUE the model does not declare, such as sample_rate=8000.")
    ] = None,
    taps: Annotated[
        list[str] | None,
        typer.Option("--taps", help="Outputs or inner tensors to score in one pass, comma-separated; or all-layers."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or an ONNX Runtime provider.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads that call the model. [default: all cores]")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print clips, hours, disk and time, and stop.")] = False,
    allow_drops: Annotated[bool, typer.Option("--allow-drops", help="Score in spite of many dropped clips.")] = False,
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
    from .. import evaluation
    from ..report import comparison as report
    from ..report import terminal
    from ..settings import METHODS

    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads} must be 1 or more")
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
    with terminal.TerminalObserver(quiet=quiet) as observer:
        if plan:
            made = evaluation.plan(model, names, **arguments, observer=observer)
        else:
            done = evaluation.evaluate(
                model,
                names,
                **arguments,
                output=output,
                save=True,
                methods=split(method) or METHODS,  # type: ignore[arg-type]
                allow_drops=allow_drops,
                baseline=baseline,
                tolerance=tolerance,
                fail_under=split(fail_under),
                observer=observer,
            )
    if plan:
        if json_:
            put_json({"tasks": made.rows, "total": made.total, "rtf": made.rtf})
        else:
            terminal.print_plan(made, terminal.stdout_console())
        return
    if json_:
        put(done.json().encode(), sys.stdout.buffer)
    elif not quiet:
        if done.result.gates:
            report.print_gates(done.result.gates, terminal.stdout_console())
        terminal.print_result(done.result, terminal.stdout_console(), saved=str(done.path))
    for error in done.errors:
        say(one_line(error))
    failed = [gate for gate in done.result.gates if gate.status == "fail"]
    for gate in failed:
        say(f"{gate.gate.replace('_', '-')}: {gate.task} {gate.method}: {gate.message}")
    raise typer.Exit(worst_exit_code([*(error.exit_code for error in done.errors), *[1] * bool(failed)]))
