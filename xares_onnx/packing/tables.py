"""Tables of labels, a row at a time: csv, tsv, jsonl, parquet, or a folder whose sub-folders are classes.

A row is its number, as an editor or reader of the file counts, and its cells by column. csv and tsv are UTF-8 with the
columns' names in the first line. A tsv cell that begins and ends with `"` is read as in csv; other tsv cells are taken as
they are, since tsv is not usually quoted. White space around the cells of both is ignored.
"""

from __future__ import annotations

import csv
import io
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import msgspec

from ..data.audio import AUDIO_EXTENSIONS
from ..errors import DataError, DataMissingError, UsageError, foreign, quoted
from ..foreign import ForeignFileError, NoFileError, open_regular
from .arrow_files import ParquetRows
from .recordings import AudioFolder, AudioSource

Row = tuple[int, dict[str, Any]]

MAX_LINE_BYTES = 1 << 24
MAX_COLUMNS = 10_000


class Table(ABC):
    """One table. `rows` starts again at each call.

    Attributes:
        audio_column: The column with the audio; None to find it by its name.
        kinds: The kind of label of the columns whose type tells it.
        labels: The columns that are labels whatever their name.
        notes: For the user.
    """

    unit: ClassVar[str] = "line"
    audio_column: str | None = None
    kinds: Mapping[str, str] = MappingProxyType({})
    labels: Collection[str] = ()
    notes: Sequence[str] = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._opened():
            self.columns: tuple[str, ...] = tuple(self._read_columns())
        if len(self.columns) > MAX_COLUMNS:
            raise DataError(f"table {path} has {len(self.columns)} columns; leave out those that mean nothing here")
        if repeated := sorted(name for name, count in Counter(self.columns).items() if count > 1):
            raise UsageError(f"{path} has two columns {quoted(repeated[0])}; rename one")

    @abstractmethod
    def _read_columns(self) -> list[str]: ...

    @abstractmethod
    def _read_rows(self, wanted: Collection[str]) -> Iterator[Row]: ...

    def rows(self, wanted: Collection[str]) -> Iterator[Row]:
        """Every row that is not blank, with its cells in the `wanted` columns. `DataError` names an unreadable line."""
        with self._opened():
            yield from self._read_rows(wanted)

    def at(self, number: int) -> str:
        """A row, for messages."""
        return f"{self.path.name} {self.unit} {number}"

    def audio(self, root: Path) -> AudioSource:
        """Where the clips' audio lies, of a table whose paths start at `root`."""
        return AudioFolder(root)

    @contextmanager
    def _opened(self) -> Iterator[None]:
        try:
            yield
        except NoFileError as error:
            raise DataMissingError(f"table {self.path} does not exist") from error
        except ForeignFileError as error:
            raise DataError(f"table {self.path} cannot be read ({error})") from error
        except UnicodeDecodeError as error:
            raise DataError(f"table {self.path} is not UTF-8 ({error.reason}); save it as UTF-8") from error
        except OSError as error:
            raise DataError(f"table {self.path} cannot be read ({error.strerror})") from error


class DelimitedTable(Table):
    """csv and tsv."""

    def __init__(self, path: Path) -> None:
        self._tabs = path.suffix.lower() == ".tsv"
        super().__init__(path)

    def _read_columns(self) -> list[str]:
        _, names = next(self._lines(), (0, []))
        if len(names) == 1 and (other := next((mark for mark in ("\t", ";", ",") if mark in names[0]), None)):
            need = "tabs, or name it .csv" if self._tabs else "commas, or name it .tsv if those are tabs"
            raise UsageError(f"the cells of {self.path} seem to be separated by {quoted(other)}; separate them by {need}")
        return names

    def _read_rows(self, wanted: Collection[str]) -> Iterator[Row]:
        lines = self._lines()
        next(lines, None)
        for number, cells in lines:
            if len(cells) != len(self.columns):
                hint = "" if self._tabs else "; a cell that holds a comma must stand in double quotes"
                raise DataError(f"{self.at(number)} has {len(cells)} cells, its first line {len(self.columns)}{hint}")
            yield number, {name: cell for name, cell in zip(self.columns, cells, strict=True) if name in wanted}

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(
            MAX_LINE_BYTES
        )  # for the whole process; the default of 128 kB is less than the events of a long clip
        with io.TextIOWrapper(open_regular(self.path), encoding="utf-8-sig", newline="") as file:
            options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if self._tabs else {"strict": True}
            reader = csv.reader(file, **options)
            try:
                for cells in reader:
                    if any(cell.strip() for cell in cells):
                        yield reader.line_num, [self._clean(cell) for cell in cells]
            except csv.Error as error:
                raise DataError(f"{self.at(reader.line_num)} cannot be read ({foreign(str(error))})") from error

    def _clean(self, cell: str) -> str:
        cell = cell.strip()
        if self._tabs and re.fullmatch(r'"(?:[^"]++|"")*+"', cell):
            return cell[1:-1].replace('""', '"').strip()
        return cell


class JsonLinesTable(Table):
    """An object per line; the columns are the keys of the first."""

    def _read_columns(self) -> list[str]:
        return list(next(self._objects(), (0, {}))[1])

    def _read_rows(self, wanted: Collection[str]) -> Iterator[Row]:
        for number, cells in self._objects():
            yield number, {name: cells.get(name) for name in wanted}

    def _objects(self) -> Iterator[Row]:
        with open_regular(self.path) as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{self.at(number)} is longer than {MAX_LINE_BYTES >> 20} MB")
                line = line.removeprefix(b"\xef\xbb\xbf").strip()
                if not line:
                    continue
                try:
                    cells = msgspec.json.decode(line)
                except (msgspec.DecodeError, RecursionError) as error:
                    raise DataError(f"{self.at(number)} is not json ({foreign(str(error))})") from error
                if not isinstance(cells, dict):
                    raise DataError(f"{self.at(number)} is not an object of columns and values")
                yield number, cells


class ParquetTable(Table):
    """Read by pyarrow, a row at a time and only the wanted columns."""

    unit = "row"

    def _read_columns(self) -> list[str]:
        with ParquetRows(self.path) as file:
            return file.columns

    def _read_rows(self, wanted: Collection[str]) -> Iterator[Row]:
        with ParquetRows(self.path, wanted) as file:
            yield from enumerate(file.rows(), 1)


class FolderTable(Table):
    """Instead of a table, the audio of a folder whose sub-folders are the classes."""

    unit = "file"
    _COLUMNS = ("path", "label")

    def _read_columns(self) -> list[str]:
        if not self.path.is_dir():
            raise DataMissingError(f"audio folder {self.path} does not exist")
        return list(self._COLUMNS)

    def _read_rows(self, wanted: Collection[str]) -> Iterator[Row]:
        number = 0
        for folder, folders, files in os.walk(self.path):
            folders.sort()
            below = Path(folder).relative_to(self.path)
            for name in sorted(files):
                if below.parts and not name.startswith(".") and name.rpartition(".")[2].lower() in AUDIO_EXTENSIONS:
                    number += 1
                    yield number, dict(zip(self._COLUMNS, ((below / name).as_posix(), below.parts[0]), strict=True))


_TABLES: dict[str, Callable[[Path], Table]] = {
    ".csv": DelimitedTable,
    ".tsv": DelimitedTable,
    ".jsonl": JsonLinesTable,
    ".parquet": ParquetTable,
}


def open_table(path: Path) -> Table:
    """Open a table of the kind that its file's ending names.

    Raises:
        UsageError: The ending is not csv, tsv, jsonl or parquet; or two columns have the same name.
        DataMissingError: The file does not exist.
        DataError: It cannot be read or is empty.
    """
    if path.suffix.lower() not in _TABLES:
        raise UsageError(f"table {path} must be {', '.join(ending[1:] for ending in _TABLES)} by its name")
    table = _TABLES[path.suffix.lower()](path)
    if not table.columns:
        raise DataError(f"table {path} is empty")
    return table
