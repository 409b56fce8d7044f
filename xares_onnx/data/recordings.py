"""What is wanted of a stranger's audio outside an evaluation: a digest and a length, or a short copy to listen to.

It runs in a process of its own (`encoder.decoding`), which imports no more than this.
"""

from __future__ import annotations

import base64
import hashlib
import io
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import soundfile

from ..errors import ClipError
from .audio import AUDIO_EXTENSIONS, READABLE_EXTENSIONS, decode, decode_blocks, resample
from .shards import Extent, read_extent

CLIP_SECONDS = 6.0
CLIP_RATE = 16_000


class AudioFile(ABC):
    """An encoded file. Its name's ending says what it is."""

    name: str
    bytes_held = 0

    @abstractmethod
    def open(self) -> tuple[BinaryIO, int]:
        """The open file and its size in bytes; `ClipError` if it cannot be opened."""


@dataclass(frozen=True)
class StoredFile(AudioFile):
    path: Path

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.path.name

    def open(self) -> tuple[BinaryIO, int]:
        try:
            status = self.path.stat()
            if not stat.S_ISREG(status.st_mode):  # reading a pipe could block for ever
                raise ClipError("it is not a regular file")
            return self.path.open("rb"), status.st_size
        except OSError as error:
            raise ClipError(f"it cannot be read ({error.strerror})") from error


@dataclass(frozen=True)
class StoredBytes(AudioFile):
    name: str
    data: bytes

    @property
    def bytes_held(self) -> int:  # type: ignore[override]
        return len(self.data)

    def open(self) -> tuple[BinaryIO, int]:
        return io.BytesIO(self.data), len(self.data)


@dataclass(frozen=True)
class Recording:
    """A decoded file of `size` bytes. `content` is a digest of its mono samples, as an encoder gets them, and their rate."""

    content: bytes
    seconds: float
    size: int


@dataclass
class Sound:
    """A `data:` URI."""

    uri: str


def decode_recording(audio: AudioFile) -> Recording:
    """Decode a file from end to end, a block at a time.

    Raises:
        ClipError: An evaluation would drop it.
    """
    stem, dot, extension = audio.name.rpartition(".")
    extension = extension.lower() if dot else ""
    file, size = audio.open()
    with file:
        if extension not in READABLE_EXTENSIONS:
            kind = f"{extension} audio" if extension in AUDIO_EXTENSIONS else "this kind of file"
            raise ClipError(f"{kind} is not supported; convert it, as by `ffmpeg -i {audio.name} {stem}.flac`")
        digest, seconds = hashlib.sha256(), 0.0
        try:
            for samples, rate in decode_blocks(file):
                if not seconds:
                    digest.update(f"{rate} Hz\n".encode())
                digest.update(samples.data)
                seconds += len(samples) / rate
        except OSError as error:
            raise ClipError(f"it cannot be read ({error.strerror})") from error
    return Recording(digest.digest(), seconds, size)


def sound_of(place: tuple[Path, Extent]) -> Sound:
    """The sound of a clip by its shard and its bytes there. Runs in the decoder's process; raises `ClipError`."""
    return Sound(data_uri(read_extent(*place)))


def data_uri(encoded: bytes) -> str:
    """The first 6 s of an audio file as a `data:` URI of mono MP3 at 16 kHz. Raises `ClipError` if it cannot be decoded."""
    samples, rate = decode(encoded, CLIP_SECONDS)
    mono = resample(samples[: int(CLIP_SECONDS * rate)], rate, CLIP_RATE)
    with io.BytesIO() as buffer:
        soundfile.write(buffer, mono.clip(-1, 1), CLIP_RATE, format="MP3", subtype="MPEG_LAYER_III")
        return f"data:audio/mpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
