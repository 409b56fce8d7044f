"""The tasks, the folders of their shards, and the digests of these."""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

import msgspec
import platformdirs

from ..errors import DataMissingError, UnknownTaskError, UsageError, foreign, quoted
from ..files import TEMPORARY_SUFFIX, Stamp, make_private, stamp, write_aside
from ..foreign import ForeignFileError, decode_json, read_small
from ..progress import Note, Observer, Progress
from . import synthetic
from .manifest import read_manifest
from .shards import file_digest
from .task import Task, load_task

DATA_VARIABLE = "XARES_ONNX_DATA"
CACHE_VARIABLE = "XARES_ONNX_CACHE"
_DOMAIN_ORDER = ("speech", "environment", "music", "synthetic")

SUITES = ("all", "public", "speech", "environment", "music", "private", "synthetic")

Parts = dict[str, list[Path]]  # part ("train", "valid", "test", or a fold's number) -> its shards


@functools.cache
def shipped_tasks() -> dict[str, Task]:
    """Every task of the package by name, ordered by domain and title."""
    folder = resources.files("xares_onnx.tasks")
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".toml")]
    tasks = [load_task(Path(entry.name), entry.read_text(encoding="utf-8")) for entry in files]
    tasks.sort(key=lambda task: (_DOMAIN_ORDER.index(task.domain), task.private, task.title.lower()))
    return {task.name: task for task in tasks}


def suite_tasks(suite: str) -> list[Task]:
    """The tasks of a suite. `all` is every task that is not synthetic; a domain includes its private tasks.

    Raises:
        UsageError: `suite` is not one of `SUITES`.
    """
    if suite not in SUITES:
        raise UsageError(f"there is no suite {quoted(suite)}; choose from {', '.join(SUITES)}")
    return [task for task in shipped_tasks().values() if in_group(task, suite)]


def in_group(task: Task, group: str) -> bool:
    """Whether a task belongs to a suite, or to the average of that name."""
    if group == "synthetic" or task.domain == "synthetic":
        return group == task.domain
    if group in ("public", "private"):
        return task.private == (group == "private")
    return group in ("all", task.domain)


def named_tasks(names: Iterable[str]) -> list[Task]:
    """Tasks by name, by pattern (`'vox*'`) or by the path of a task file, each once, in the order of `names`.

    Raises:
        UnknownTaskError: No task has the name or matches the pattern.
        UsageError: A task file uses the name of another task.
        TaskFileError: A task file cannot be used.
    """
    chosen: dict[str, Task] = {}
    for name in names:
        if name.endswith(".toml"):
            task = load_task(Path(name))
            if (shipped_tasks() | chosen).get(task.name, task) != task:
                raise UsageError(f"task file {name} uses the name {quoted(task.name)} of another task; give it another name")
            tasks = [task]
        else:
            tasks = [task for task in shipped_tasks().values() if fnmatch.fnmatchcase(task.name, name)]
        if not tasks:
            raise UnknownTaskError.named(name, shipped_tasks())
        chosen.update({task.name: task for task in tasks})
    return list(chosen.values())


def data_folder(option: Path | None, *, to_fill: bool = False) -> Path:
    """The data folder: `option`, else $XARES_ONNX_DATA, else ./env if it exists (X-ARES's own), else the user's.

    Args:
        option: The value of --data.
        to_fill: Whether the folder may be missing, since a download will make it.

    Raises:
        DataMissingError: The folder that the option or the variable names does not exist.
    """
    if option is not None:
        if not option.is_dir() and not (to_fill and not option.exists()):
            raise DataMissingError(
                f"data folder {option} does not exist; --data names the folder that holds a folder per task"
            )
        return option
    if from_environment := os.environ.get(DATA_VARIABLE):
        return data_folder(Path(from_environment), to_fill=to_fill)
    own = Path("env")
    return own if own.is_dir() else Path(platformdirs.user_data_dir("xares-onnx", appauthor=False))


def cache_folder(option: Path | None) -> Path:
    """The cache folder: `option` (--cache), else $XARES_ONNX_CACHE, else the user's."""
    return option or Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("xares-onnx", appauthor=False))


def part_globs(task: Task) -> dict[str, str]:
    """The shard pattern of each part: of each split, or of each fold by its number."""
    if task.data.folds is not None:
        return {str(number): task.data.folds.glob(number) for number in task.data.folds.numbers}
    return {str(split): glob for split, glob in (task.data.splits or {}).items()}


def find_parts(task: Task, folder: Path) -> Parts | None:
    """The shards of each part in `folder/<task name>`, sorted; None if a part has none, or a download is unfinished."""
    parts = shards_on_disk(task, folder)
    return parts if all(parts.values()) and not _undelivered(task, folder) else None


def shard_folders(selection: Iterable[tuple[Task, Path]]) -> list[Path]:
    """The folders of the shards of all tasks that have data, each given with the folder of its data; absolute, sorted."""
    parts = [find_parts(task, folder) or {} for task, folder in selection]
    return sorted({path.parent.absolute() for of_task in parts for paths in of_task.values() for path in paths})


def on_disk(task: Task, folder: Path) -> str:
    """A few words for people on how much of a task's data is on disk."""
    if task.domain == "synthetic":
        return "built in"
    parts = shards_on_disk(task, folder)
    shards = {path for paths in parts.values() for path in paths}
    if not shards:
        return "no"
    lacking = [part for part, paths in parts.items() if not paths]
    size = sum(path.stat().st_size for path in shards) / 1e9
    unfinished = ", download unfinished" if _undelivered(task, folder) else ""
    return f"{len(shards)} shards, {size:.2f} GB" + (f", lacks {', '.join(lacking)}" if lacking else unfinished)


def missing_data(task: Task, folder: Path) -> str:
    """One sentence for people: which of a task's data are missing, and how to get them."""
    globs = part_globs(task)
    without_shards = [globs[part] for part, shards in shards_on_disk(task, folder).items() if not shards]
    missing = without_shards or _undelivered(task, folder)
    where = f"{folder / task.name} holds no {foreign(missing[0])}"
    if task.data.zenodo:
        name = task.name if shipped_tasks().get(task.name) == task else "TASK.toml"
        how = f"`xares-onnx download {name}` fetches Zenodo record {task.data.zenodo}, or name another folder by --data"
    elif task.private:
        how = "its data were never published; if you have them, put the tars there"
    else:
        how = "put its shards there, or name another folder by --data"
    return f"no data for {task.name}: {where}; {how}"


def _undelivered(task: Task, folder: Path) -> list[str]:
    """Files that a download has not brought yet, or that were removed since. Without them, the rest would pass for all."""
    manifest = read_manifest(folder / task.name)
    return manifest.lacking(folder / task.name) if manifest and manifest.record == task.data.zenodo else []


def shards_on_disk(task: Task, folder: Path) -> Parts:
    """The shards of each part in `folder/<task name>`, sorted; a part without any has an empty list."""
    parts = {part: (folder / task.name).glob(glob) for part, glob in part_globs(task).items()}
    return {
        part: sorted(path for path in paths if path.is_file() and path.suffix != TEMPORARY_SUFFIX)
        for part, paths in parts.items()
    }


class Digests:
    """SHA-256 digests of shards, kept with the shards' stamps so that a rerun need not read them again."""

    def __init__(self, cache: Path) -> None:
        self._folder = cache / "digests"

    def of(self, path: Path) -> tuple[str, Stamp]:
        """Digest and stamp of a shard.

        Raises:
            DataError: It cannot be read.
            MachineError: The digest cannot be written to the cache.
        """
        now = stamp(path)
        file = self._folder / f"{hashlib.sha256(now[0].encode()).hexdigest()[:32]}.json"
        try:
            digest, then = decode_json(read_small(file), tuple[str, Stamp])
            if then == now:
                return digest, now
        except ForeignFileError:
            pass
        digest = file_digest(path)
        make_private(self._folder)
        write_aside(file, msgspec.json.encode((digest, now)), anew=True)
        return digest, now

    def of_parts(self, task: str, parts: Mapping[str, Sequence[Path]], observer: Observer) -> dict[Path, tuple[str, Stamp]]:
        """Digest and stamp of each shard of a task, each read once."""
        paths = sorted({path for shards in parts.values() for path in shards})
        digests = {}
        for done, path in enumerate(paths):
            observer(Progress("prepare", task, done, len(paths)))
            digests[path] = self.of(path)
        observer(Progress("prepare", task, len(paths), len(paths)))
        return digests


def choose_tasks(
    names: Sequence[str], suite: str | None, data: Path | None, cache: Path, observer: Observer
) -> list[tuple[Task, Path]]:
    """The tasks to score, each with the folder that `prepare` finds its data in.

    Args:
        names: Names, patterns or task files. Their data must be there.
        suite: One of `SUITES` instead of names; its tasks without data are returned too. With neither names nor suite,
            every task whose data are there, or else the synthetic suite.
        data: The data folder, None for the default (see `data_folder`).
        cache: The cache folder, where synthetic tasks lie.
        observer: Receives a note if the synthetic suite is chosen for want of data.

    Raises:
        UsageError: Both names and a suite, an unknown name or suite, or an unusable task file.
        DataMissingError: A named task, or every task of the suite, has no data.
    """
    if names and suite:
        raise UsageError("--tasks and --suite exclude each other")
    if names:
        chosen = named_tasks(names)
    elif suite:
        chosen = suite_tasks(suite)
    else:
        chosen = [task for task in shipped_tasks().values() if task.domain != "synthetic"]
    if all(task.domain == "synthetic" for task in chosen):
        return [(task, synthetic_folder(cache)) for task in chosen]
    folder = data_folder(data)
    present = [task for task in chosen if has_data(task, folder)]
    missing = [task for task in chosen if task not in present]
    if names and missing:
        raise DataMissingError(missing_data(missing[0], folder))
    if suite and not present:
        raise DataMissingError(f"no task of suite {suite} has data: {missing_data(chosen[0], folder)}")
    if not present and data is not None:
        raise DataMissingError(f"{folder} holds no task's data; `xares-onnx tasks --data {folder}` shows what is looked for")
    if not present:
        observer(Note(f"no data in {folder}, so the built-in synthetic suite is scored; --data names another folder"))
        return [(task, synthetic_folder(cache)) for task in suite_tasks("synthetic")]
    return [(task, task_folder(task, folder, cache)) for task in (chosen if suite or names else present)]


def has_data(task: Task, folder: Path) -> bool:
    """Whether `prepare` can find a task's data. A synthetic task's always: it builds them."""
    return task.domain == "synthetic" or find_parts(task, folder) is not None


def task_folder(task: Task, data: Path, cache: Path) -> Path:
    """The folder that holds `<task name>/`: of a synthetic task in the cache, of any other the data folder."""
    return synthetic_folder(cache) if task.domain == "synthetic" else data


def synthetic_folder(cache: Path) -> Path:
    """Where this version's synthetic tasks lie."""
    return cache / f"synthetic-{synthetic.VERSION}"


def build_synthetic(task: Task, folder: Path, observer: Observer) -> None:
    """Build a synthetic task's shards in `folder/<task name>`, unless they are there."""
    if not synthetic.is_built(task.name, folder / task.name):
        observer(Progress("prepare", task.name, 0, 1))
        synthetic.build(task.name, folder / task.name)
        observer(Progress("prepare", task.name, 1, 1))
