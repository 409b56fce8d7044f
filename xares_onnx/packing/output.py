"""The files of a packed task: `DIR/<name>/` with the shards and a manifest, and `DIR/<name>.toml`."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from ..data.shards import Drop
from ..errors import MachineError, UsageError
from ..files import check_target, disk_error, write_aside
from ..foreign import ForeignFileError, decode_json, read_small

MANIFEST = "packed.json"
_MAX_BYTES = 1 << 30  # a drop is a line


class Part(msgspec.Struct, frozen=True):
    """A split or a fold."""

    clips: int
    seconds: float
    shards: int


class Source(msgspec.Struct):
    audio: str
    labels: str | None


class Manifest(msgspec.Struct):
    """`packed.json` beside the shards: their source, and which of its clips they lack."""

    source: Source
    columns: dict[str, str]
    seed: int
    parts: dict[str, Part]
    dropped: list[Drop]
    notes: list[str]


def check_output(output: Path, name: str, source: Source) -> None:
    """Raises `UsageError` if the output has files that were not packed from this source."""
    if "," in str(output):
        raise UsageError(f"output {output} contains a comma, which --tasks takes for a separator; choose another")
    folder, task_file = output / name, output / f"{name}.toml"
    elsewhere = "choose another --name or -o, or move it"
    if not folder.exists():
        if task_file.exists():
            raise UsageError(f"{task_file} is there already; {elsewhere}")
        return
    try:
        manifest = decode_json(read_small(folder / MANIFEST, _MAX_BYTES), Manifest)
    except ForeignFileError:
        if folder.is_dir() and not any(folder.iterdir()) and not task_file.exists():
            return
        raise UsageError(f"{folder} contains files that were not packed here; {elsewhere}") from None
    if manifest.source != source:
        packed_from = f"{manifest.source.labels or 'the folders'} and {manifest.source.audio}"
        raise UsageError(f"{folder} was packed from {packed_from}; {elsewhere}")


@contextmanager
def scratch_folder(output: Path | None, name: str) -> Iterator[Path]:
    """A folder for the index and the fresh shards, beside the place for the shards."""
    try:
        if output is None:
            with TemporaryDirectory() as folder:
                yield Path(folder)
            return
        output.mkdir(parents=True, exist_ok=True)
        aside = output / f".{name}.part"
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
        aside.mkdir()
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except sqlite3.OperationalError as error:
        raise MachineError(
            f"the scratch file of {output or 'this check'} cannot be written ({error}); is the disk full?"
        ) from error
    except OSError as error:
        raise disk_error(error, output or Path("scratch")) from error


def put_in_place(fresh: Path, output: Path, name: str, text: str, manifest: Manifest) -> list[str]:
    """Put fresh shards in place of older ones, then the task file. A changed older task file is kept beside it.

    Returns:
        Notes for the user.
    """
    folder, task_file = output / name, output / f"{name}.toml"
    notes = []
    check_target(task_file)
    if task_file.exists() and task_file.read_bytes() != text.encode():
        before = task_file.with_name(f"{task_file.name}.before")
        os.replace(task_file, before)
        notes.append(f"{task_file.name} is written anew; the older one is kept as {before.name}")
    write_aside(fresh / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    if folder.exists():
        os.replace(folder, fresh.with_name("outdated"))
    os.replace(fresh, folder)
    write_aside(task_file, text.encode())
    return notes
