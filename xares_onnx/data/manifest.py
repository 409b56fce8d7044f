"""`.xares-onnx.json` beside a task's shards: which files were downloaded, and their checksums."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..errors import quoted
from ..files import CHECKSUM_ALGORITHMS, write_aside
from ..foreign import ForeignFileError, decode_json, read_small

MANIFEST_NAME = ".xares-onnx.json"
_MAX_BYTES = 64_000_000  # a few hundred bytes a file
_MAX_SIZE = 1 << 60


class Held(msgspec.Struct, frozen=True):
    """A file as it was when it was verified; `archive` is the zip that it was unpacked from."""

    size: int
    checksum: str
    mtime_ns: int
    archive: str | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in CHECKSUM_ALGORITHMS:
            raise ValueError(f"unknown checksum {quoted(self.checksum)}")
        if not (0 <= self.size <= _MAX_SIZE and abs(self.mtime_ns) < 1 << 63):
            raise ValueError("a size or time that no file has")

    @property
    def algorithm(self) -> str:
        return self.checksum.partition(":")[0]


class Manifest(msgspec.Struct):
    """What a task takes from a record, and what of that is on disk.

    `wanted` holds the sizes of all files that the task takes, on disk or not; `files` those on disk, and `archives` the
    checksums of the zips that were unpacked and removed.
    """

    record: str
    license: str | None = None
    source: str = ""
    wanted: dict[str, int] = {}
    files: dict[str, Held] = {}
    archives: dict[str, str] = {}
    version: int = 1

    def __post_init__(self) -> None:
        if not all(0 <= size <= _MAX_SIZE for size in self.wanted.values()):
            raise ValueError("a size that no file has")

    def holds(self, folder: Path, name: str, checksum: str | None = None) -> bool:
        """Whether a file is as it was when it was verified, by its size and time; its content is not read."""
        held = self.files.get(name)
        try:
            stat = (folder / name).stat()
        except OSError:
            return False
        return (
            held is not None
            and (held.size, held.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
            and checksum in (None, held.checksum)
        )

    def has_unpacked(self, folder: Path, archive: str, checksum: str | None = None) -> bool:
        """Whether everything unpacked from an archive is still as it was."""
        known = self.archives.get(archive)
        shards = [name for name, held in list(self.files.items()) if held.archive == archive]
        return known is not None and checksum in (None, known) and all(self.holds(folder, name) for name in shards)

    def lacking(self, folder: Path) -> list[str]:
        """Names of wanted files and unpacked shards that are not on disk."""
        shards = [name for name, held in self.files.items() if held.archive and not (folder / name).exists()]
        return [name for name in self.wanted if name not in self.archives and not (folder / name).exists()] + shards

    def keep(self, folder: Path, name: str, checksum: str, archive: str | None = None) -> None:
        """Record a file that was just verified."""
        stat = (folder / name).stat()
        self.files[name] = Held(stat.st_size, checksum, stat.st_mtime_ns, archive)

    def save(self, folder: Path) -> None:
        write_aside(folder / MANIFEST_NAME, msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=1))


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a task's folder; None if there is none or it cannot be read."""
    try:
        manifest = decode_json(read_small(folder / MANIFEST_NAME, _MAX_BYTES), Manifest)
    except ForeignFileError:
        return None
    return manifest if manifest.version == 1 else None
