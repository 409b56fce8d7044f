"""`diagnose`: where a copy of a model lost its points."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .app import app, put, put_json, reported, say, split
from .options import (
    CacheOption,
    ContractOption,
    DataOption,
    DebugOption,
    SeedsOption,
    SuiteOption,
    TasksOption,
    ThreadsOption,
    TrustOption,
    check_counts,
)

FORMATS = ("text", "json", "github")


@app.command()
@reported
def diagnose(
    a: Annotated[Path, typer.Argument(help="The reference: an .onnx file, a folder with one, or a .npz of inner tensors.")],
    b: Annotated[Path, typer.Argument(help="Its copy, quantised or exported again: an .onnx file, or a folder with one.")],
    tasks: TasksOption = None,
    suite: SuiteOption = None,
    data: DataOption = None,
    cache: CacheOption = None,
    fix: Annotated[
        Path | None, typer.Option("--fix", help="Write the cheapest file within the budget of A, checked and compared.")
    ] = None,
    budget: Annotated[float, typer.Option(help="Points that the fixed file may lose against A.")] = 0.5,
    points: Annotated[
        bool, typer.Option("--points/--no-points", help="Whether tasks are scored, or tensors compared alone.")
    ] = True,
    groups: Annotated[int, typer.Option(help="Groups of operators that are put back to float and scored.")] = 4,
    clips: Annotated[int, typer.Option(help="Clips that tensors are compared on.")] = 32,
    limit: Annotated[int, typer.Option(help="At most N clips per split are scored, chosen by key hash.")] = 200,
    seeds: SeedsOption = None,
    contract: ContractOption = None,
    threads: ThreadsOption = None,
    trust: TrustOption = False,
    tolerance: Annotated[
        float, typer.Option(help="Tolerated loss of score, as a fraction; exit code 1 if B certainly loses more.")
    ] = 0.01,
    format_: Annotated[str, typer.Option("--format", help="text, json or github.")] = "text",
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page too: the drift drawn, points regained, tables.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; of the text, the verdict alone.")] = False,
    debug: DebugOption = False,
) -> None:
    """Find which operators of B depart from A, what each costs in points of the tasks, and the file that regains them."""
    from ..diagnosis.diagnosing import diagnose as find
    from ..errors import printable
    from ..files import check_target
    from ..report import ci
    from ..report import diagnosis as report
    from ..report.observer import TerminalObserver, stdout_console

    if format_ not in FORMATS:
        raise UsageError(f"--format {format_!r} must be text, json or github")
    for target in (fix, html):
        if target is not None:
            check_target(target)
    check_counts(threads=threads, groups=groups, clips=clips, limit=limit)
    with TerminalObserver(quiet=quiet) as observer:
        result = find(
            a,
            b,
            split(tasks),
            suite=suite,
            data=data,
            cache=cache,
            fix=fix,
            budget=budget,
            points=points,
            groups=groups,
            clips=clips,
            limit=limit,
            seeds=seeds,
            contract=contract or (),
            threads=threads,
            trust=trust,
            tolerance=tolerance,
            observer=observer,
        )
    if html is not None:
        from ..files import write_aside
        from ..report.page.diagnosed import page

        write_aside(html, page(result).encode())
    if format_ == "json":
        put_json(result)
    elif format_ == "github":
        text = report.markdown(result)
        file = None if b.is_absolute() else b.as_posix()
        title = f"{result.b} against {result.a}"
        written = ci.write_step_summary(text)
        put(ci.github(title, report.cases(result), file=file, summary=result.verdict if written else text), sys.stdout)
    elif quiet:
        put(f"{printable(result.verdict)}\n", sys.stdout)
    else:
        report.print_diagnosis(result, stdout_console())
    if result.failed:
        say(f"B is worse by more than {tolerance:g} for certain on {len(result.failed)} of the scores")
    raise typer.Exit(result.exit_code)
