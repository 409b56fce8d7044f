"""`tasks` lists the tasks and their data on disk; `cache` lists and removes stored embeddings."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import worst_exit_code
from .app import app, one_line, put, put_json, reported, say
from .options import CacheOption, DataOption, DebugOption

cache_app = typer.Typer(help="Stored embeddings: list them, remove them.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


@app.command("tasks")
@reported
def list_tasks(
    name: Annotated[str | None, typer.Argument(help="One task, or a pattern.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every shard: check its checksum if the record has one, else every header.")
    ] = False,
    data: DataOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """List the tasks with kind, metric, weight and data on disk. The name of one task shows its details."""
    import msgspec

    from ..data import catalog, inventory
    from ..report import terminal
    from ..report.observer import TerminalObserver, stdout_console

    chosen = catalog.named_tasks([name]) if name else list(catalog.shipped_tasks().values())
    folder = catalog.data_folder(data)
    with TerminalObserver() as observer:
        rows = [
            (task, inventory.verified(task, folder, observer) if verify else inventory.holding(task, folder))
            for task in chosen
        ]
    if json_:
        put_json(
            [
                {
                    **msgspec.to_builtins(task),
                    "kind": task.kind,
                    "on_disk": held.on_disk,
                    "holding": msgspec.to_builtins(held),
                }
                for task, held in rows
            ]
        )
    elif len(rows) == 1:
        terminal.print_task(*rows[0], folder, stdout_console())
    else:
        terminal.print_tasks(rows, folder, stdout_console())
    errors = inventory.faults(rows, folder)
    for error in errors:
        say(one_line(error))
    raise typer.Exit(worst_exit_code(error.exit_code for error in errors))


@cache_app.command("list")
@reported
def cache_list(cache: CacheOption = None, debug: DebugOption = False) -> None:
    """Show stored embeddings by model and task."""
    from ..data import catalog
    from ..embedding.store import Store
    from ..report import terminal
    from ..report.observer import stdout_console

    store = Store(catalog.cache_folder(cache) / "store")
    terminal.print_cache(list(store.entries()), str(store.root), stdout_console())


@cache_app.command("prune")
@reported
def cache_prune(
    older_than: Annotated[int | None, typer.Option(help="Embeddings not used for N days.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Embeddings of this model: its file name or the start of its sha256.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="All embeddings.")] = False,
    cache: CacheOption = None,
    debug: DebugOption = False,
) -> None:
    """Remove the leftovers of killed runs, and the embeddings that the options select."""
    from ..data import catalog
    from ..embedding.store import Store, prune

    store = Store(catalog.cache_folder(cache) / "store")
    shards, freed = prune(store, older_than_days=older_than, model=model, everything=all_)
    put(f"removed {shards} stored shard{'' if shards == 1 else 's'}, freed {freed / 1e6:.1f} MB\n", sys.stdout)
