"""A Hugging Face data set on disk as a table: parquet files as on the hub, or Arrow files as `save_to_disk` writes them.

Only its files of rows and its `dataset_info.json` are read; no script of a data set runs. Splits or folds are told by names:
of files (`train-00000-of-00005.parquet`), else of their folders (`test/data-00000-of-00001.arrow`).
"""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..data.audio import AUDIO_EXTENSIONS
from ..data.recordings import AudioFile, StoredBytes, StoredFile
from ..errors import DataError, UsageError, foreign, quoted
from ..foreign import ForeignFileError, parse_json, read_small
from .arrow_files import ROW_FILES, RowFile, pyarrow_for
from .columns import PATHS, SPLIT_OF
from .features import Features, decode, is_audio, kind_of, read_features, states_classes
from .index import Clip
from .recordings import AudioSource, Place, path_below
from .tables import Row, Table

_MAX_DEPTH = 4  # folders
_STATE, _MAX_STATE_BYTES = "state.json", 1 << 24
_MAX_STEM = 200
_SHARD = re.compile(r"-\d+-of-\d+$")
_FOLD = re.compile(r"fold[-_]?(\d{1,6})", re.IGNORECASE)
_HEADERS = (  # of encoded audio; a name's ending may be that of the file it was converted from
    (re.compile(rb"(RIFF|RIFX|RF64)....WAVE", re.DOTALL), "wav"),
    (re.compile(rb"fLaC"), "flac"),
    (re.compile(rb"OggS"), "ogg"),
    (re.compile(rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]"), "mp3"),
    (re.compile(rb"FORM....AIF[FC]", re.DOTALL), "aiff"),
)


@dataclass(frozen=True)
class RowsOfPart:
    """A file of rows, and the name of the split or fold that it is of; None if names tell neither."""

    path: Path
    name: str | None


def open_data_set(root: Path) -> Table | None:
    """The data set in a folder; None if the folder holds no file of rows.

    Raises:
        UsageError: It holds several configurations, or no audio.
        DataError: A file cannot be read.
    """
    files = _row_files(root)
    return DataSetTable(root, files) if files else None


class DataSetTable(Table):
    """All files of a data set, one after the other."""

    unit = "row"

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        self._files, self._part_column, self.notes = _divide(root, files)
        self._starts: list[int] = []  # the number of the row before each file's first, of the files read so far
        super().__init__(root)

    def _read_columns(self) -> list[str]:
        first = self._files[0].path
        with _open(first) as file:
            schema = file.schema
        self._features = read_features(schema.metadata, (first.parent, self.path))
        self.audio_column = _audio_column(first, schema, self._features)
        own = [name for name in schema.names if not (self._part_column and _names_part(name))]
        kinds = {name: kind_of(self._features.get(name)) for name in own if name != self.audio_column}
        self.kinds = {name: kind for name, kind in kinds.items() if kind}
        self.labels = [name for name in self.kinds if states_classes(self._features[name]) and not _names_part(name)]
        return [*own, *([self._part_column] if self._part_column else [])]

    def _read_rows(self, wanted: Collection[str]) -> Iterator[Row]:
        self._starts, number = [], 0
        for part in self._files:
            self._starts.append(number)
            stated = {self._part_column: part.name} if self._part_column else {}
            own = set(wanted) - set(stated)
            with _open(part.path, own) as file:
                if lacking := sorted(own - set(file.columns)):
                    raise DataError(f"{part.path} has no column {quoted(lacking[0])}, which {self._files[0].path.name} has")
                for cells in file.rows():
                    number += 1
                    yield number, {name: decode(self._features.get(name), cell) for name, cell in cells.items()} | stated

    def at(self, number: int) -> str:
        part, row = self.find(number)
        return f"{part.path.relative_to(self.path)} row {row + 1}"

    def find(self, number: int) -> tuple[RowsOfPart, int]:
        """The file of a row that was read, and its row there, from 0."""
        file = bisect_right(self._starts, number - 1) - 1
        return self._files[file], number - 1 - self._starts[file]

    def audio(self, root: Path) -> AudioSource:
        assert self.audio_column is not None
        return _DataSetAudio(root, self, self.audio_column)


class _DataSetAudio(AudioSource):
    """Files in the rows, or beside the files of rows."""

    in_order_of_rows = True

    def __init__(self, root: Path, table: DataSetTable, column: str) -> None:
        self._root = root
        self._table = table
        self._column = column
        self._open: RowFile | None = None

    def place(self, cell: Any, line: int, where: str) -> Place | None:
        part, _ = self._table.find(line)
        data, name = _data_and_name(cell)
        if data is not None:
            digest = _digest(data)
            stem = PurePosixPath((name or "").replace("\\", "/")).stem[:_MAX_STEM] or digest.hex()
            named = f"{stem}.{_ending(data, name or '')}"
            return Place(f"{part.name}/{named}" if part.name else named, digest)
        if not name or not name.strip():
            return None
        path = path_below(self._root, name, where)
        beside = part.path.parent.relative_to(self._root).as_posix()
        if not self.exists(path) and not os.path.isabs(name):
            path_beside = path_below(self._root, f"{beside}/{name}", where)
            path = path_beside if self.exists(path_beside) else path
        return Place(path)

    def exists(self, path: str) -> bool:
        return (self._root / path).exists()

    def file(self, clip: Clip) -> AudioFile:
        if clip.file is None:
            return StoredFile(self._root / clip.path)
        part, row = self._table.find(clip.line)
        if self._open is None or self._open.path != part.path:
            self.close()
            self._open = _open(part.path, {self._column})
        data, _ = _data_and_name((self._open.row(row) or {}).get(self._column))
        if data is None or _digest(data) != clip.file:
            raise DataError(f"{self._table.at(clip.line)} changed while this ran; run again")
        return StoredBytes(clip.path, data)

    def close(self) -> None:
        if self._open is not None:
            self._open.close()


def _data_and_name(cell: Any) -> tuple[bytes | None, str | None]:
    """The encoded audio of a row and its file's name, as far as the cell has them."""
    data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
    return data if isinstance(data, bytes) and data else None, name if isinstance(name, str) else None


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _ending(data: bytes, name: str) -> str:
    """What kind of audio it is: by its first bytes, else by the name."""
    by_name = name.rpartition(".")[2].lower()
    by_bytes = next((ending for header, ending in _HEADERS if header.match(data)), None)
    return by_bytes or (by_name if by_name in AUDIO_EXTENSIONS else "bin")


# ---------------------------------------------------------------- files and columns


def _open(path: Path, wanted: Collection[str] | None = None) -> RowFile:
    try:
        return ROW_FILES[path.suffix](path, wanted)
    except ForeignFileError as error:
        raise DataError(f"{path} cannot be read ({error})") from error


def _row_files(root: Path) -> list[Path]:
    """The files of rows below a folder, by folder and name; where a folder's `state.json` lists its files, those."""
    paths: list[Path] = []
    for name, folders, files in os.walk(root):
        folder = Path(name)
        depth = len(folder.relative_to(root).parts)
        folders[:] = sorted(other for other in folders if depth < _MAX_DEPTH and not other.startswith("."))
        listed = _listed(folder) if _STATE in files else sorted(file for file in files if not file.startswith("cache-"))
        paths += [folder / file for file in listed if Path(file).suffix in ROW_FILES]
    return paths


def _listed(folder: Path) -> list[str]:
    """The files that `save_to_disk` wrote to a folder."""
    try:
        state = parse_json(read_small(folder / _STATE, _MAX_STATE_BYTES), dict[str, Any])
        names = [entry["filename"] for entry in state["_data_files"]]
    except (ForeignFileError, LookupError, TypeError) as error:
        raise DataError(f"{folder / _STATE} does not list the files of a data set; save it again") from error
    if state.get("_indices_data_files"):
        raise DataError(f"{folder} was saved with an indices mapping; save it again after Dataset.flatten_indices()")
    if not all(isinstance(name, str) and name == PurePosixPath(name).name and "\\" not in name for name in names):
        raise DataError(f"{folder / _STATE} names a file that lies elsewhere; save the data set again")
    return names


def _divide(root: Path, files: Sequence[Path]) -> tuple[list[RowsOfPart], str | None, list[str]]:
    """Each file with the split or fold that names tell, the column that this is (None: neither), and notes for the user.

    Raises:
        UsageError: The files are of several configurations.
    """
    parts: list[tuple[Path, str | None, str | None]] = []
    configurations: dict[str, Path] = {}
    notes: list[str] = []
    for path in files:
        *folders, _ = path.relative_to(root).parts
        stem = _SHARD.sub("", path.stem)
        named = (stem, *reversed(folders))
        split = next(filter(None, map(_split_of, named)), None)
        fold = next((match[1] for match in map(_FOLD.search, named) if match), None)
        rest = [name for name in folders if name != "data" and not _split_of(name) and not _FOLD.search(name)]
        configurations.setdefault("/".join(rest), path.parent)
        parts.append((path, split, fold))
    if len(configurations) > 1:
        first, second = list(configurations.values())[:2]
        raise UsageError(f"{root} holds several data sets, such as in {first} and {second}; name one of these folders")
    splits, folds = ({part[place] for part in parts} for place in (1, 2))
    if {"train", "test"} <= splits or {"train", "valid"} <= splits:
        if "test" not in splits:
            parts = [(path, "test" if split == "valid" else split, fold) for path, split, fold in parts]
            notes.append("no file is named for a test split: valid is the test")
        if others := [path.name for path, split, _ in parts if split is None]:
            notes.append(f"{len(others)} files are left out, whose names tell no split, such as {foreign(others[0])}")
        return [RowsOfPart(path, split) for path, split, _ in parts if split], "split", notes
    if len(folds) > 1 and None not in folds:
        return [RowsOfPart(path, fold) for path, _, fold in parts], "fold", notes
    return [RowsOfPart(path, None) for path, _, _ in parts], None, notes


def _split_of(name: str) -> str | None:
    """The split that a name such as `esc50-train`, `validation.clean` or `test` tells."""
    words = re.split(r"[-_.\s]+", name.lower())
    return next((SPLIT_OF[word] for word in (words[-1], *words) if word in SPLIT_OF), None)


def _names_part(column: str) -> bool:
    return column.strip().lower() in ("split", "fold")


def _audio_column(path: Path, schema: Any, features: Features) -> str:
    """The column with audio: an Audio feature, else bytes with a path, else a name that says so.

    Raises:
        UsageError: There is none, or several.
    """
    types = pyarrow_for(path).types
    stated = [name for name in schema.names if is_audio(features.get(name))]
    held = [
        field.name
        for field in schema
        if types.is_struct(field.type) and {"bytes", "path"} & {inner.name for inner in field.type}
    ]
    named = [name for word in reversed(PATHS) for name in schema.names if name.strip().lower() == word]
    for names in (stated, held, named[:1]):
        if len(names) > 1 and "audio" not in names:
            raise UsageError(
                f"{path.name} has several columns of audio, {' and '.join(map(quoted, names[:2]))}; leave one in it"
            )
        if names:
            column = "audio" if "audio" in names else names[0]
            kind = schema.field(column).type
            if not (column in held or types.is_binary(kind) or types.is_large_binary(kind) or types.is_string(kind)):
                raise UsageError(
                    f"column {quoted(column)} of {path.name} holds {foreign(str(kind))}, not encoded audio; save the data "
                    "set with it cast to Audio()"
                )
            return column
    shown = ", ".join(map(quoted, schema.names[:12]))
    raise UsageError(
        f"{path} has no column of audio; it has {shown}. If it is a table of labels, name it after the folder with the audio"
    )
