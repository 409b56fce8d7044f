"""Parquet and Arrow files, a row at a time: a stranger's, so one row bounds what is in memory, whatever a file says.

A parquet file is read page by page, and a page has 2 GiB at most by its format. Of an Arrow file the record batches are
mapped, not read; their offsets are checked before a cell is looked at, and compressed ones are refused, since they may
state any size.
"""

from __future__ import annotations

import itertools
import struct
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import DataError, UsageError, foreign
from ..foreign import open_regular

Cells = dict[str, Any]

_BUFFER_BYTES = 1 << 20  # without it, pyarrow reads a row group's column whole


class RowFile(ABC):
    """An open file. `row` is quick if the rows are asked for in their order.

    Attributes:
        schema: pyarrow's, of all columns.
    """

    schema: Any

    def __init__(self, path: Path, wanted: Collection[str] | None = None) -> None:
        """Open `path` to read the `wanted` columns, all by default."""
        self.path = path
        self._held = ExitStack()
        with self._readable(), ExitStack() as held:
            self._open(held)
            self._held = held.pop_all()
        self.columns = [name for name in self.schema.names if wanted is None or name in wanted]

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._held.close()

    def row(self, number: int) -> Cells | None:
        """The cells of a row, from 0, by column; None after the last."""
        with self._readable():
            return self._row(number)

    def rows(self) -> Iterator[Cells]:
        """All rows."""
        number = 0
        while (cells := self.row(number)) is not None:
            yield cells
            number += 1

    @abstractmethod
    def _open(self, held: ExitStack) -> None: ...

    @abstractmethod
    def _row(self, number: int) -> Cells | None: ...

    @contextmanager
    def _readable(self) -> Iterator[None]:
        arrow = pyarrow_for(self.path)
        try:
            yield
        except (arrow.ArrowException, OSError, MemoryError, RecursionError, ValueError) as error:
            reason = foreign(str(error)) or type(error).__name__
            raise DataError(f"{self.path} is not a readable {self.path.suffix[1:]} file ({reason})") from error


class ParquetRows(RowFile):
    def _open(self, held: ExitStack) -> None:
        import pyarrow.parquet

        open_regular(self.path).close()
        file = held.enter_context(pyarrow.OSFile(str(self.path)))  # of a file of Python's, pyarrow would copy each page
        self._file = held.enter_context(pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES))
        self.schema = self._file.schema_arrow
        metadata = self._file.metadata
        sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]  # of the row groups
        self._group, self._next = -1, 0
        self._batches: Iterator[Any] = iter(())

    def _row(self, number: int) -> Cells | None:
        group = bisect_right(self._starts, number) - 1
        if group >= len(self._starts) - 1:
            return None
        if group != self._group or number < self._next:
            # A batch of one row, because a page may hold one value of a gigabyte and name it in every row.
            self._batches = self._file.iter_batches(1, row_groups=[group], columns=self.columns, use_threads=False)
            self._group, self._next = group, self._starts[group]
        batch: Any = None
        while self._next <= number:
            batch = next(self._batches, None)
            if batch is None:
                raise DataError(f"{self.path} has fewer rows than it says; it is damaged")
            self._next += 1
        (cells,) = batch.to_pylist()
        return dict(cells)


class ArrowRows(RowFile):
    """A stream of record batches, as `save_to_disk` writes it, or the same with a footer."""

    def _open(self, held: ExitStack) -> None:
        import pyarrow

        open_regular(self.path).close()
        self._source = held.enter_context(pyarrow.memory_map(str(self.path)))
        self._check_messages()
        self._rewind()

    def _check_messages(self) -> None:
        """Raises `DataError` if the file holds anything but a schema and plain record batches."""
        import pyarrow

        self._to_start()
        messages = pyarrow.ipc.MessageReader.open_stream(self._source)
        kinds = [message.type for message in itertools.islice(messages, 1)]
        if kinds != ["schema"]:
            raise DataError(f"{self.path} does not begin with a schema, so it is empty or damaged")
        for message in messages:
            if message.type != "record batch" or _is_compressed(message.metadata.to_pybytes()):
                raise DataError(
                    f"{self.path} has dictionaries or compressed batches, which are not read; save it as parquet"
                )

    def _to_start(self) -> None:
        self._source.seek(0)
        self._source.seek(8 if self._source.read(6) == b"ARROW1" else 0)

    def _rewind(self) -> None:
        import pyarrow

        self._to_start()
        self._batches = pyarrow.ipc.open_stream(self._source)
        self.schema = self._batches.schema
        self._batch: Any = None
        self._start = self._stop = 0  # rows of the batch

    def _row(self, number: int) -> Cells | None:
        if number < self._start:
            self._rewind()
        while number >= self._stop:
            try:
                batch = self._batches.read_next_batch()
            except StopIteration:
                return None
            self._batch, self._checked = batch.select(self.columns), False
            self._start, self._stop = self._stop, self._stop + batch.num_rows
        if not self._checked:
            self._batch.validate(full=True)
            self._checked = True
        (cells,) = self._batch.slice(number - self._start, 1).to_pylist()
        return dict(cells)


def _is_compressed(message: bytes) -> bool:
    """Whether a record batch's message, a flatbuffer that pyarrow has verified, has a field `compression`.

    Source: Message.fbs and format/Schema.fbs of Apache Arrow: `header` is the third field of Message, `compression` the
    fourth of RecordBatch.
    """
    table = struct.unpack_from("<I", message)[0]
    header = _field(message, table, 2)
    batch = header + struct.unpack_from("<I", message, header)[0]
    return _field(message, batch, 3) > 0


def _field(message: bytes, table: int, number: int) -> int:
    """Where a table of a flatbuffer has a field; 0 if it lacks it."""
    fields = table - struct.unpack_from("<i", message, table)[0]
    size = struct.unpack_from("<H", message, fields)[0]
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", message, fields + place)[0] if place < size else 0
    return table + offset if offset else 0


ROW_FILES: dict[str, type[RowFile]] = {".parquet": ParquetRows, ".arrow": ArrowRows}


def pyarrow_for(path: Path) -> Any:
    """pyarrow. Raises `UsageError` if it is not installed, which says that `path` needs it."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f"reading {path.name} needs pyarrow: pip install 'xares-onnx[parquet]'") from error
    return pyarrow
