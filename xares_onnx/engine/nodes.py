"""Whether a node of a cluster may share the work: it sees the same folders, and its libraries give the same numbers.

The driver calls `expectation`, every node `look`, and the driver `objection`. The nodes' calls arrive by any means.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ..data import audio
from ..encoder import processor
from ..encoder.encoder import onnxruntime_distributions
from ..encoder.spec import EncoderInfo
from ..errors import XaresError
from ..files import stamp, write_aside
from ..version import __version__

_DRIVER = "driver"


class Expectation(msgspec.Struct, frozen=True):
    """What the driver has and sees. `room` is a folder in its cache, with a token from it."""

    room: str
    token: str
    sights: dict[str, str | None]
    """What there is at each path, as a digest of sizes, times and names; None if there is nothing."""
    versions: dict[str, str]
    provider: str


class Look(msgspec.Struct, frozen=True):
    """What a node has and sees. `written` is where it left the token for the driver."""

    token: str | None
    written: str | None
    sights: dict[str, str | None]
    versions: dict[str, str]
    providers: list[str]


@contextmanager
def expectation(cache: Path, paths: Sequence[Path], info: EncoderInfo) -> Iterator[Expectation]:
    """What every node must have and see. Its token lies in the cache meanwhile.

    Args:
        cache: The folder of the store.
        paths: Folders of the data, and the model.
        info: The measured encoder.

    Raises:
        MachineError: The cache cannot be written to.
    """
    room, token = cache / "nodes" / secrets.token_hex(8), secrets.token_hex(16)
    write_aside(room / _DRIVER, token.encode())
    try:
        sights = {str(path): _sight(path) for path in paths}
        yield Expectation(str(room), token, sights, _versions(bool(info.scan.integers)), info.provider)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def look(expected: Expectation, node: str) -> Look:
    """On a node, which leaves the token under its own name `node`."""
    import onnxruntime

    room = Path(expected.room)
    try:
        token = (room / _DRIVER).read_text()
    except (OSError, UnicodeDecodeError):
        token = None
    written: str | None = node
    try:
        (room / node).write_text(expected.token)  # no parents made: a missing folder stays missing
    except OSError:
        written = None
    return Look(
        token,
        written,
        {path: _sight(Path(path)) for path in expected.sights},
        _versions("8-bit products" in expected.versions),
        onnxruntime.get_available_providers(),
    )


def objection(expected: Expectation, seen: Look) -> str | None:
    """Why a node may not share the work, as a sentence without its subject; None if it may."""
    cache = Path(expected.room).parents[1]
    if seen.token != expected.token:
        return f"does not see {cache}; put --cache on a folder that all nodes share"
    if seen.written is None or not _holds(Path(expected.room) / seen.written, expected.token):
        return f"cannot write to {cache} so that it is seen here; put --cache on a folder that all nodes share"
    for path, sight in expected.sights.items():
        if sight is not None and seen.sights.get(path) != sight:
            fault = "does not see" if seen.sights.get(path) is None else "sees other files, or other times of files, in"
            return f"{fault} {path}; put it on a folder that all nodes share"
    if others := _differences(expected.versions, seen.versions):
        return f"has {' and '.join(others)}; embeddings would differ between nodes, so install the same everywhere"
    if expected.provider not in seen.providers:
        return f"has an onnxruntime without {expected.provider}, which is used here; install the same everywhere"
    return None


def _differences(expected: Mapping[str, str], seen: Mapping[str, str]) -> list[str]:
    names = [*expected, *(name for name in seen if name not in expected)]
    return [
        f"{name} {seen.get(name, 'missing')} in place of {expected.get(name, 'none')}"
        for name in names
        if seen.get(name) != expected.get(name)
    ]


def _versions(integers: bool) -> dict[str, str]:
    """Everything of a machine that shapes embeddings. `integers`: the model multiplies 8-bit numbers."""
    return {
        "xares-onnx": __version__,
        **onnxruntime_distributions(),
        "libsndfile": audio.decoder_version(),
        "resampler": audio.resampler_version(),
        **({"8-bit products": processor.pair_sums()} if integers else {}),
    }


def _sight(path: Path) -> str | None:
    """A digest of the stamps of a file, or of the files in a folder; None if nothing is there."""
    try:
        files = sorted(child for child in path.iterdir() if child.is_file()) if path.is_dir() else [path]
        stamps = [stamp(file) for file in files]
    except (OSError, XaresError):
        return None
    return hashlib.sha256(msgspec.json.encode(stamps)).hexdigest()


def _holds(path: Path, token: str) -> bool:
    try:
        return path.read_text() == token
    except (OSError, UnicodeDecodeError):
        return False
