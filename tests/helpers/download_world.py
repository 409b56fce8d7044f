"""A task whose data are a record of a server on this machine, and how the tests fetch them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from http_faults import Zenodo, content
from shard_makers import task_toml

from xares_onnx.download.download import Downloaded, download
from xares_onnx.download.transfer import Patience
from xares_onnx.progress import Event, Note

RECORD = "101"
QUICK = Patience(
    attempts=4,
    first_wait_seconds=0.01,
    longest_wait_seconds=0.02,
    longest_asked_seconds=5,
    stall_seconds=5,
    answer_seconds=10,
)
# For servers that never send what they should; elsewhere a busy machine must not look like one.
IMPATIENT = msgspec.structs.replace(QUICK, attempts=2, stall_seconds=1, answer_seconds=1)


class Place:
    """A folder with a task's file, its data folder, and the server that has them."""

    def __init__(self, folder: Path, zenodo: Zenodo) -> None:
        self.folder, self.zenodo, self.data = folder, zenodo, folder / "data"
        self.task = self.write_task("mine")
        self.files = {
            "train0.tar": content(300_000, 1),
            "train1.tar": content(2_000, 2),
            "valid0.tar": content(3_000, 3),
            "test0.tar": content(4_000, 4),
        }
        zenodo.records[RECORD] = {**self.files, "README.md": b"not a shard"}
        self.events: list[Event] = []

    @property
    def home(self) -> Path:
        return self.data / "mine"

    @property
    def notes(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Note)]

    def write_task(self, name: str, record: str = RECORD, **changes: str) -> str:
        path = self.folder / f"{name}.toml"
        path.write_text(task_toml(name, crop_seconds=f'zenodo = "{record}"', **changes))
        return str(path)

    def fetch(self, names: Sequence[str] = (), **options: Any) -> Downloaded:
        arguments = {"data": self.data, "mirror": self.zenodo.url, "patience": QUICK, **options}
        return download(names or [self.task], observer=self.events.append, **arguments)

    def there(self, name: str = "mine") -> dict[str, bytes]:
        """Every file of a task that is seen, but for our own notes."""
        return {path.name: path.read_bytes() for path in (self.data / name).iterdir() if path.name != ".xares-onnx.json"}


def error_text(done: Downloaded) -> str:
    """The one sentence of a download in which something failed."""
    (error,) = done.errors
    return str(error)
