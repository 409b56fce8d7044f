"""What was packed, as a table."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from ..errors import foreign, printable
from ..packing import Packed
from .tables import empty_table

_MAX_CLASSES = 12
_MAX_DROPS = 5


def print_packed(packed: Packed, console: Console) -> None:
    """Print the clips per class and split, what was left out, and the command that comes next."""
    columns = ", ".join(f"{column} as {meaning}" for column, meaning in packed.columns.items())
    console.print(f"task {foreign(packed.task.title)}: {packed.task.kind}; read {printable(columns)}")
    table = empty_table(console, ("",), tuple(packed.parts))
    table.add_row("clips", *(str(part.clips) for part in packed.parts.values()))
    table.add_row("minutes", *(f"{part.seconds / 60:.1f}" for part in packed.parts.values()))
    if packed.classes:
        table.add_section()
    for name, counts in list(packed.classes.items())[:_MAX_CLASSES]:
        table.add_row(foreign(name), *(str(counts[part]) for part in packed.parts))
    if len(packed.classes) > _MAX_CLASSES:
        table.add_row(f"... and {len(packed.classes) - _MAX_CLASSES} more")
    console.print(table, soft_wrap=False)
    for drop in packed.dropped[:_MAX_DROPS]:
        console.print(Text(f"left out: {foreign(drop.key)}: {printable(drop.reason)}", style="yellow"))
    if len(packed.dropped) > _MAX_DROPS:
        console.print(Text(f"left out: {len(packed.dropped) - _MAX_DROPS} more, all named in packed.json", style="yellow"))
    console.print(printable(packed.command) if packed.command else "checked; nothing was written")
