"""The clips of a table, in a scratch database so that memory does not grow with their number."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

Loss = Literal["missing", "unusable", "copy"]

_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE clip (
    id INTEGER PRIMARY KEY,
    path TEXT NOT NULL UNIQUE,  -- below the audio folder
    key TEXT NOT NULL,
    line INTEGER NOT NULL,      -- of the table that names the clip first
    file BLOB,                  -- digest of the encoded audio, if the line holds it
    part TEXT,                  -- split or fold
    team TEXT,                  -- group
    label TEXT,                 -- the json beside the clip
    stratum INTEGER NOT NULL DEFAULT 0,
    content BLOB,               -- digest of the decoded audio
    seconds REAL,
    size INTEGER,
    fault TEXT,                 -- why the clip is left out,
    loss TEXT                   -- and what that is
);
CREATE TABLE statement (clip INTEGER NOT NULL, line INTEGER NOT NULL, value TEXT NOT NULL);  -- of each row on its clip
"""
_INDICES = "CREATE INDEX statement_of ON statement (clip)"
_BATCH = 128


class Clip(NamedTuple):
    id: int
    path: str
    key: str
    line: int
    file: bytes | None
    part: str | None
    team: str | None
    label: str | None
    stratum: int
    content: bytes | None
    seconds: float | None
    size: int | None
    fault: str | None
    loss: str | None


class Index:
    """Clips by path. Only `find`, `count` and `faults` include clips with a fault."""

    def __init__(self, folder: Path) -> None:
        self._db = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
        self._db.executescript(_TABLES)
        self._db.execute("BEGIN")

    def __enter__(self) -> Index:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._db.close()

    def find(self, path: str) -> Clip | None:
        row = self._db.execute("SELECT * FROM clip WHERE path = ?", (path,)).fetchone()
        return Clip(*row) if row else None

    def add(self, path: str, key: str, line: int, file: bytes | None, part: str | None, team: str | None) -> int:
        values = (path, key, line, file, part, team)
        columns = "(path, key, line, file, part, team)"
        number = self._db.execute(f"INSERT INTO clip {columns} VALUES (?, ?, ?, ?, ?, ?)", values).lastrowid
        assert number is not None
        return number

    def state(self, clip: int, line: int, value: str) -> None:
        """Keep what one row says about a clip, as json."""
        self._db.execute("INSERT INTO statement VALUES (?, ?, ?)", (clip, line, value))

    def statements(self, clip: int) -> list[tuple[int, str]]:
        """(line, json) of each row on a clip, by line."""
        return self._db.execute("SELECT line, value FROM statement WHERE clip = ? ORDER BY line", (clip,)).fetchall()

    def finish(self) -> None:
        """Call this after the last `state`."""
        self._db.execute(_INDICES)

    def clips(self) -> Iterator[list[Clip]]:
        """Clips without fault, by id, in batches. Clips may be changed between two batches."""
        last = 0
        while rows := self._db.execute(
            "SELECT * FROM clip WHERE id > ? AND fault IS NULL ORDER BY id LIMIT ?", (last, _BATCH)
        ).fetchall():
            batch = [Clip(*row) for row in rows]
            last = batch[-1].id
            yield batch

    def of_part(self, part: str, by: Literal["path", "id"] = "path") -> Iterator[Clip]:
        """Clips without fault of a split or fold, by path, or by id in the order of the rows."""
        last: str | int = "" if by == "path" else 0
        where = f"WHERE {by} > ? AND part = ? AND fault IS NULL ORDER BY {by}"
        while rows := self._db.execute(f"SELECT * FROM clip {where} LIMIT ?", (last, part, _BATCH)).fetchall():
            clips = [Clip(*row) for row in rows]
            yield from clips
            last = clips[-1].path if by == "path" else clips[-1].id

    def set_recordings(self, clips: Iterable[tuple[bytes, float, int, int]]) -> None:
        """From (content, seconds, size, id) of decoded audio."""
        self._db.executemany("UPDATE clip SET content = ?, seconds = ?, size = ? WHERE id = ?", clips)

    def set_labels(self, clips: Iterable[tuple[str, int]]) -> None:
        """From (json, id)."""
        self._db.executemany("UPDATE clip SET label = ? WHERE id = ?", clips)

    def set_strata(self, clips: Iterable[tuple[int, int]]) -> None:
        """From (stratum, id)."""
        self._db.executemany("UPDATE clip SET stratum = ? WHERE id = ?", clips)

    def set_parts(self, clips: Iterable[tuple[str, int]]) -> None:
        """From (split, id)."""
        self._db.executemany("UPDATE clip SET part = ? WHERE id = ?", clips)

    def rename_parts(self, names: Mapping[str, str]) -> None:
        """Rename parts all at once, so that 1 may become 2 and 2 become 1."""
        changes = "CASE part " + "WHEN ? THEN ? " * len(names) + "END"
        self._db.execute(f"UPDATE clip SET part = {changes}", [word for pair in names.items() for word in pair])

    def leave_out(self, clips: Iterable[tuple[str, int]], loss: Loss) -> None:
        """Give clips a fault, from (reason, id)."""
        faults = ((reason, loss, clip) for reason, clip in clips)
        self._db.executemany("UPDATE clip SET fault = ?, loss = ? WHERE id = ?", faults)

    def make_keys_unique(self, suffix: Callable[[str], str]) -> None:
        """Append `suffix(path)` to the keys that several clips have."""
        repeated = self._db.execute(
            "SELECT path, id FROM clip WHERE key IN (SELECT key FROM clip GROUP BY key HAVING count(*) > 1)"
        ).fetchall()
        self._db.executemany(
            "UPDATE clip SET key = key || ? WHERE id = ?", ((suffix(path), clip) for path, clip in repeated)
        )

    def count(self) -> tuple[int, int]:
        """The number of all clips, and of those without fault."""
        total, usable = self._db.execute("SELECT count(*), count(*) FILTER (WHERE fault IS NULL) FROM clip").fetchone()
        return total, usable

    def parts(self) -> dict[str, tuple[int, float]]:
        """(clips, seconds) of each split or fold, without faults."""
        rows = self._db.execute(
            "SELECT part, count(*), sum(seconds) FROM clip WHERE fault IS NULL GROUP BY part ORDER BY part"
        )
        return {part: (clips, seconds) for part, clips, seconds in rows}

    def faults(self, *losses: Loss) -> list[tuple[str, int, str]]:
        """(path, line, reason) of the clips with a fault of these kinds, by line."""
        marks = ", ".join("?" * len(losses))
        return self._db.execute(
            f"SELECT path, line, fault FROM clip WHERE loss IN ({marks}) ORDER BY line, path", losses
        ).fetchall()

    def units(self) -> Iterator[tuple[int, str, str | None, bytes, int]]:
        """(id, path, team, content, stratum) of each clip without fault, by path."""
        yield from self._db.execute("SELECT id, path, team, content, stratum FROM clip WHERE fault IS NULL ORDER BY path")

    def across(self, column: str) -> tuple[int, list[tuple[str, str]]]:
        """How many values of `content` or `team` are in several parts; and of the first, (path, part) of a clip per part."""
        usable = f"FROM clip WHERE fault IS NULL AND {column} IS NOT NULL"
        values = self._db.execute(
            f"SELECT {column} {usable} GROUP BY {column} HAVING count(DISTINCT part) > 1 ORDER BY min(path)"
        ).fetchall()
        if not values:
            return 0, []
        clips = self._db.execute(f"SELECT min(path), part {usable} AND {column} = ? GROUP BY part ORDER BY 1", values[0])
        return len(values), clips.fetchall()

    def copies(self, ranks: Sequence[str]) -> list[tuple[str, int]]:
        """(path, id) of clips whose content is also in a part of a higher rank; `ranks` from the highest."""
        rank = "CASE part " + " ".join(f"WHEN ? THEN {number}" for number in range(len(ranks))) + " END"
        return self._db.execute(
            f"""SELECT path, id FROM (
                    SELECT path, id, {rank} AS r, min({rank}) OVER (PARTITION BY content) AS best
                    FROM clip WHERE fault IS NULL)
                WHERE r > best ORDER BY path""",
            (*ranks, *ranks),
        ).fetchall()

    def pairs_of_content(self, *, same_label: bool) -> tuple[int, tuple[str, str] | None]:
        """How many recordings have several paths, with one label or with several, and two paths of the first of them."""
        condition = "count(DISTINCT label) = 1 AND count(*) > 1" if same_label else "count(DISTINCT label) > 1"
        rows = self._db.execute(
            f"SELECT min(path), max(path) FROM clip WHERE fault IS NULL GROUP BY content HAVING {condition} ORDER BY 1"
        ).fetchall()
        return len(rows), rows[0] if rows else None

    def numbers(self) -> tuple[float, float]:
        """Lowest and highest `score` of the labels."""
        low, high = self._db.execute(
            "SELECT min(json_extract(label, '$.score')), max(json_extract(label, '$.score')) FROM clip WHERE fault IS NULL"
        ).fetchone()
        return low, high
