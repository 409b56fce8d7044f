"""The command line: parse, call, print. Heavy imports happen inside the commands, so that `--help` is quick."""

from __future__ import annotations

import errno
import functools
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Annotated, Any, ParamSpec, TypeVar

import typer

from .errors import UsageError, XaresError, printable, worst_exit_code
from .version import __version__

# The parser's own error class: click's, or that of the copy of click which newer versions of typer hold.
_ParserError: type[Any] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="xares-onnx",
    help="Score an audio encoder exported to ONNX on the X-ARES tasks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
cache_app = typer.Typer(help="Stored embeddings: list them, remove them.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

P = ParamSpec("P")
R = TypeVar("R")

DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder with a folder of shards a task. [default: $XARES_ONNX_DATA, ./env]")
]
CacheOption = Annotated[
    Path | None, typer.Option("--cache", help="Folder of stored embeddings. [default: $XARES_ONNX_CACHE, the user's cache]")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show a traceback where something fails.")]


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that everything is put away as on Ctrl-C."""


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 gate, 2 usage, 3 model, 4 data, 5 machine, 70 our fault, 130/143 interrupted."""
    signal.signal(signal.SIGTERM, _on_terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        code = 130
    except _ParserError as error:  # in one line, like every other error; without arguments it is the help
        code, message = error.exit_code, error.format_message()
        if "\n" in message:
            _put(f"{message}\n", sys.stderr)
        else:
            command = f"{error.ctx.command_path} " if error.ctx else ""
            _say(f"{message.rstrip('.')}; `{command}--help` shows what there is")
    sys.exit(code)


def _on_terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _reported(command: Callable[P, R]) -> Callable[P, R]:
    """Errors as one line on stderr and an exit code; a traceback only with --debug."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        debug = bool(kwargs.get("debug"))
        if debug:
            os.environ["XARES_ONNX_DEBUG"] = "1"  # workers then write to our stderr
        try:
            return command(*args, **kwargs)
        except (KeyboardInterrupt, _Terminated) as stop:
            _say("interrupted; finished shards are stored, so the same command goes on from there")
            raise typer.Exit(130 if isinstance(stop, KeyboardInterrupt) else 143) from None
        except XaresError as error:
            if debug:
                traceback.print_exc()
            _say(_one_line(error))
            raise typer.Exit(error.exit_code) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if debug:
                traceback.print_exc()
            if isinstance(error, MemoryError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                _say(
                    f"the {'memory' if isinstance(error, MemoryError) else 'disk'} of this machine does not suffice: {error}"
                )
                raise typer.Exit(5) from None
            _say(f"internal error, please report it: {type(error).__name__}: {error} (--debug shows where)")
            raise typer.Exit(70) from None

    return run


def _say(text: str) -> None:
    _put(f"xares-onnx: {printable(text)}\n", sys.stderr)


def _put(text: str | bytes, stream: IO[Any]) -> None:
    """Write at once. Where whoever reads it is gone, the work and its exit code do not depend on that."""
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _one_line(error: XaresError) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if error.exit_code == 70 and len(lines) > 1:  # a worker's traceback
        return f"internal error in a worker, please report it: {lines[-1]}"
    return " ".join(lines)


def _version(value: bool) -> None:
    if value:
        _put(f"{__version__}\n", sys.stdout)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
@_reported
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
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or an ONNX Runtime provider.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads that call the model. [default: all cores]")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print clips, hours, disk and time, and stop.")] = False,
    allow_drops: Annotated[bool, typer.Option("--allow-drops", help="Score in spite of many dropped clips.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the result, or the plan, as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no table.")] = False,
    debug: DebugOption = False,
) -> None:
    """Score a model: embed each task's data, train heads and a kNN, and report every score with an interval."""
    from . import evaluation
    from .report import terminal

    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads} must be 1 or more")
    arguments: dict[str, Any] = {
        "suite": suite,
        "data": data,
        "cache": cache,
        "protocol": protocol,
        "seeds": seeds,
        "limit": limit,
        "heads": _split(head),
        "lm": lm,
        "vocabulary": vocabulary,
        "contract": contract or (),
        "device": device,
        "threads": threads,
    }
    names = _split(tasks)
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
                methods=_split(method) or evaluation.METHODS,  # type: ignore[arg-type]
                allow_drops=allow_drops,
                observer=observer,
            )
    if plan:
        if json_:
            _put_json({"tasks": made.rows, "total": made.total, "rtf": made.rtf})
        else:
            terminal.print_plan(made, terminal.stdout_console())
        return
    if json_:
        _put(done.json().encode(), sys.stdout.buffer)
    elif not quiet:
        terminal.print_result(done.result, terminal.stdout_console(), saved=str(done.path))
    for error in done.errors:
        _say(_one_line(error))
    raise typer.Exit(worst_exit_code(error.exit_code for error in done.errors))


@app.command("tasks")
@_reported
def list_tasks(
    name: Annotated[str | None, typer.Argument(help="One task, or a pattern.")] = None,
    data: DataOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """List the tasks: kind, metric, weight, and what is on disk. One task's name shows all about it."""
    import msgspec

    from . import catalog
    from .report import terminal

    chosen = catalog.named_tasks([name]) if name else list(catalog.shipped_tasks().values())
    folder = catalog.data_folder(data)
    rows = [(task, catalog.on_disk(task, folder)) for task in chosen]
    if json_:
        _put_json([{**msgspec.to_builtins(task), "kind": task.kind, "on_disk": disk} for task, disk in rows])
    elif len(chosen) == 1:
        terminal.print_task(chosen[0], folder, terminal.stdout_console())
    else:
        terminal.print_tasks(rows, folder, terminal.stdout_console())


@app.command()
@_reported
def export(
    family: Annotated[
        str, typer.Argument(help="dasheng, data2vec, hubert, logmel, resemblyzer, torch, wav2vec2, wavlm or whisper.")
    ],
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Weights: a file or folder, or the name of a model in the local cache; nothing is downloaded. For torch, "
            "module:factory: your own code, which is imported and run here."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="[default: <family>.onnx]")] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or fp16: of weights and arithmetic behind the front end.")] = "fp32",
    quantize: Annotated[
        str | None, typer.Option(help="int8-dynamic: linear layers in 8 bits; for the CPU, a clip at a time.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Export a known encoder family to ONNX, checked against its PyTorch module."""
    from . import exporters

    report = exporters.export(family, checkpoint, output or Path(f"{family}.onnx"), dtype=dtype, quantize=quantize)
    text = (
        f"{report.path}: {report.parameters / 1e6:.1f} M parameters, at most {report.max_abs_error:.1e} from PyTorch "
        f"over {len(report.lengths)} lengths x {len(report.batches)} batch sizes"
    )
    _put(f"{printable(text)}\n", sys.stdout)


@app.command()
@_reported
def annotate(
    model: Annotated[Path, typer.Argument(help="An .onnx file, or a folder with one.")],
    contract: Annotated[
        list[str], typer.Option("--contract", help="KEY=VALUE to declare, such as sample_rate=16000; repeatable.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; never the model itself.")],
    debug: DebugOption = False,
) -> None:
    """Write a copy of a model that declares its contract in its own metadata; graph and weights stay as they are."""
    from .annotate import annotate as write
    from .report import terminal

    with terminal.TerminalObserver() as observer:
        done = write(model, contract, output, observer=observer)
    said = [
        f"{key}={value}" + (f" (was {done.replaced[key]})" if key in done.replaced else "")
        for key, value in done.written.items()
    ]
    said += [f"{key} dropped (was {value})" for key, value in done.replaced.items() if key not in done.written]
    text = f"{done.path}: {', '.join(said) or 'nothing new'}"
    for title, names in (("unchanged", done.kept), ("weights copied", done.copied)):
        if names:
            text += f"; {title}: {', '.join(names)}"
    _put(f"{printable(text)}\n", sys.stdout)


@cache_app.command("list")
@_reported
def cache_list(cache: CacheOption = None, debug: DebugOption = False) -> None:
    """Show stored embeddings by model and task."""
    from . import catalog
    from .report import terminal
    from .store import Store

    store = Store(catalog.cache_folder(cache) / "store")
    terminal.print_cache(list(store.entries()), str(store.root), terminal.stdout_console())


@cache_app.command("prune")
@_reported
def cache_prune(
    older_than: Annotated[int | None, typer.Option(help="Embeddings not used for N days.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Embeddings of this model: its file name or the start of its sha256.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="All embeddings.")] = False,
    cache: CacheOption = None,
    debug: DebugOption = False,
) -> None:
    """Remove what killed runs left behind, and the embeddings that the options choose."""
    from . import catalog
    from .store import Store, prune

    store = Store(catalog.cache_folder(cache) / "store")
    shards, freed = prune(store, older_than_days=older_than, model=model, everything=all_)
    _put(f"removed {shards} stored shard{'' if shards == 1 else 's'}, freed {freed / 1e6:.1f} MB\n", sys.stdout)


def _put_json(value: Any) -> None:
    from .results import indented

    _put(indented(value), sys.stdout.buffer)


def _split(values: list[str] | None) -> list[str]:
    """Lists are comma-separated and repeatable."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]
