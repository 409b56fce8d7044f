"""`compare`: two models, or their results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError, foreign, printable, worst_exit_code
from .app import app, put, put_json, reported, say, split
from .options import (
    CacheOption,
    ContractOption,
    DataOption,
    DebugOption,
    DevicesOption,
    DropsOption,
    EngineOption,
    FormatOption,
    HeadOption,
    LanguageModelOption,
    LimitOption,
    MethodOption,
    SeedsOption,
    SuiteOption,
    TasksOption,
    ThreadsOption,
    TrustOption,
    VocabularyOption,
    WorkersOption,
    check_counts,
)

FORMATS = ("text", "json", "junit", "github")


@app.command()
@reported
def compare(
    a: Annotated[Path, typer.Argument(help="The present model: an .onnx file, a folder with one, or a result.json.")],
    b: Annotated[Path, typer.Argument(help="Its replacement: likewise.")],
    tasks: TasksOption = None,
    suite: SuiteOption = None,
    data: DataOption = None,
    cache: CacheOption = None,
    method: MethodOption = None,
    protocol: Annotated[str | None, typer.Option(help="corrected, or xares for X-ARES's own choices.")] = None,
    seeds: SeedsOption = None,
    limit: LimitOption = None,
    head: HeadOption = None,
    lm: LanguageModelOption = None,
    vocabulary: VocabularyOption = None,
    contract: ContractOption = None,
    device: DevicesOption = "auto",
    threads: ThreadsOption = None,
    workers: WorkersOption = None,
    engine: EngineOption = "local",
    allow_drops: DropsOption = False,
    trust: TrustOption = False,
    tolerance: Annotated[
        float, typer.Option(help="Tolerated loss of score, as a fraction; exit code 1 if B certainly loses more.")
    ] = 0.01,
    format_: FormatOption = "text",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; of the text, the verdict alone.")] = False,
    debug: DebugOption = False,
) -> None:
    """Compare B with A on the same clips: scores with paired intervals, embeddings, size, speed and memory."""
    from ..evaluation import comparison
    from ..report import ci
    from ..report import comparison as report
    from ..report.observer import TerminalObserver, stdout_console

    if format_ not in FORMATS:
        raise UsageError(f"--format {format_!r} must be {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")
    check_counts(threads=threads, workers=workers)
    settings: dict[str, Any] = {"methods": split(method) or None, "protocol": protocol}
    with TerminalObserver(quiet=quiet) as observer:
        result = comparison.compare(
            a,
            b,
            split(tasks),
            suite=suite,
            data=data,
            cache=cache,
            seeds=seeds,
            limit=limit,
            contract=contract or (),
            device=device,
            threads=threads,
            workers=workers,
            engine=engine,
            allow_drops=allow_drops,
            trust=trust,
            heads=split(head),
            lm=lm,
            vocabulary=vocabulary,
            tolerance=tolerance,
            observer=observer,
            **settings,
        )
    title = f"{foreign(result.b.file)} against {foreign(result.a.file)}"
    if format_ == "json":
        put_json(result)
    elif format_ == "junit":
        put(ci.junit(title, report.cases(result)), sys.stdout)
    elif format_ == "github":
        text = report.markdown(result)
        file = None if b.is_absolute() else b.as_posix()
        written = ci.write_step_summary(text)
        put(ci.github(title, report.cases(result), file=file, summary=result.verdict if written else text), sys.stdout)
    elif quiet:
        put(f"{printable(result.verdict)}\n", sys.stdout)
    else:
        report.print_comparison(result, stdout_console())
    for failure in result.failures:
        say(f"{failure.model}: {failure.message}")
    if result.failed:
        first = result.failed[0]
        name = report.score_name(first)
        say(f"B is worse by more than {first.tolerance:g} for certain on {len(result.failed)} of the scores, {name} first")
    codes = [failure.exit_code for failure in result.failures] + [1] * bool(result.failed)
    raise typer.Exit(worst_exit_code(codes))
