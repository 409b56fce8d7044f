"""Shards made on the spot: encoded audio, tars of it, a task file over them; and a disk too small for what comes of it."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile

RATE = 16_000
Samples = npt.NDArray[np.floating[Any]]


def sine(frequency: float, seconds: float, rate: int = RATE, amplitude: float = 0.5) -> Samples:
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def noise(seconds: float, seed: int = 0, rate: int = RATE) -> Samples:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * rate))


def encoded(samples: Samples, rate: int = RATE, container: str = "WAV", subtype: str | None = None) -> bytes:
    """`samples` (frames,) or (frames, channels) as a file."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A tar member; `fields` are TarInfo's, such as `type` and `linkname`."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write_tar(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def clip_members(key: str, audio: bytes, label: Any, extension: str = "wav") -> list[tuple[tarfile.TarInfo, bytes]]:
    return [member(f"{key}.{extension}", audio), member(f"{key}.json", json.dumps(label).encode())]


def write_shard(path: Path, clips: Mapping[str, tuple[bytes, Any]]) -> Path:
    """Key -> (encoded audio, what its json holds)."""
    return write_tar(path, [part for key, (audio, label) in clips.items() for part in clip_members(key, audio, label)])


def task_toml(name: str = "mine", /, **changes: str) -> str:
    """A task of three classes in three splits. A change replaces the line of its key, or adds one to [data]."""
    lines = {
        "name": f'name = "{name}"',
        "title": 'title = "Mine"',
        "domain": 'domain = "speech"',
        "[data]": "[data]",
        "splits": 'splits = { train = "train*.tar", valid = "valid*.tar", test = "test*.tar" }',
        "crop_seconds": "",
        "[target]": "[target]",
        "kind": 'kind = "class"',
        "key": 'key = "label"',
        "classes": 'classes = ["a", "b", "c"]',
    }
    assert not set(changes) - set(lines), "a line that there is not"
    return "\n".join({**lines, **changes}.values())


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """A file system of its own at `folder`, where this user may mount one; else the test is skipped."""
    folder.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("cannot mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
