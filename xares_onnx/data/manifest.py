"""What was downloaded into a task's folder, and how each file can be checked: `.xares-onnx.json` beside the shards."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..files import CHECKSUM_ALGORITHMS, write_aside

MANIFEST_NAME = ".xares-onnx.json"


class Held(msgspec.Struct, frozen=True):
    """A file that was verified when it was `mtime_ns` old; `archive` is the zip that it came out of."""

    size: int
    checksum: str
    mtime_ns: int
    archive: str | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in CHECKSUM_ALGORITHMS:
            raise ValueError(f"unknown checksum {self.checksum!r}")

    @property
    def algorithm(self) -> str:
        return self.checksum.partition(":")[0]


class Manifest(msgspec.Struct):
    """`wanted` are the files of the record that the task takes, with their sizes, whether they are there yet or not;
    `archives` the checksums of those among them that are zips and unpacked.
    """

    record: str
    license: str | None = None
    source: str = ""
    wanted: dict[str, int] = {}
    files: dict[str, Held] = {}
    archives: dict[str, str] = {}
    version: int = 1

    def holds(self, folder: Path, name: str, checksum: str | None = None) -> bool:
        """Whether a file lies as it was when it was verified, to go by its size and time; its content is not read."""
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
        """Whether everything that came out of an archive still lies as it did."""
        known = self.archives.get(archive)
        shards = [name for name, held in list(self.files.items()) if held.archive == archive]
        return known is not None and checksum in (None, known) and all(self.holds(folder, name) for name in shards)

    def lacking(self, folder: Path) -> list[str]:
        """The wanted files that are not there, to go by their names."""
        shards = [name for name, held in self.files.items() if held.archive and not (folder / name).exists()]
        return [name for name in self.wanted if name not in self.archives and not (folder / name).exists()] + shards

    def keep(self, folder: Path, name: str, checksum: str, archive: str | None = None) -> None:
        """Enter a file that was just verified."""
        stat = (folder / name).stat()
        self.files[name] = Held(stat.st_size, checksum, stat.st_mtime_ns, archive)

    def save(self, folder: Path) -> None:
        write_aside(folder / MANIFEST_NAME, msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=1))


def read_manifest(folder: Path) -> Manifest | None:
    """None where nothing was downloaded, or the file is not what was written."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return manifest if manifest.version == 1 else None
