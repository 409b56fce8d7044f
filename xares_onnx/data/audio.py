"""Audio: encoded bytes to mono float32, resampled and cropped.

A stranger's file is decoded block by block and mixed down at once, so that many channels or a false header cannot ask
for more memory than `MAX_FRAMES` samples.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import BinaryIO, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from ..errors import ClipError
from . import audio

Waveform = npt.NDArray[np.float32]
CropRule = Literal["keep-tails", "whole-crops"]

READABLE_EXTENSIONS = frozenset(
    {"wav", "flac", "ogg", "oga", "mp3", "opus", "aif", "aiff", "aifc", "au", "caf", "w64", "rf64"}
)
# libsndfile cannot read the others: such a clip is a named drop, not an unknown file.
AUDIO_EXTENSIONS = READABLE_EXTENSIONS | {"m4a", "mp4", "aac", "wma", "webm", "amr"}
MAX_SECONDS = 2 * 3600
MAX_FRAMES = 1 << 28  # 1 GiB of mono float32
MIN_RATE, MAX_RATE = 100, 1_000_000  # Hz; a header that claims another rate lies
MIN_TAIL_SECONDS = 1.0
LONG_SECONDS = 900.0
_LONG_FRAMES = 1 << 26
DECODING_SECONDS = 20.0  # of processor time, for a clip of any length; libsndfile takes a hundredth
_LEAST_SPEED = 60.0  # times real time, beside that
_BLOCK_SAMPLES = 1 << 19  # of all channels together


def decode(data: bytes, seconds: float = math.inf) -> tuple[Waveform, int]:
    """Decode an audio file.

    Args:
        data: The encoded file.
        seconds: Where to stop; a little more may be returned.

    Returns:
        Mono samples (frames,), the mean of the channels, and the sampling rate in Hz.

    Raises:
        ClipError: libsndfile cannot read the bytes, or they contain no samples, NaN or infinity.
    """
    # soundfile keeps a file object in a reference cycle; closing the buffer frees the bytes at once.
    blocks: list[Waveform] = []
    frames = 0
    with _Bytes(data) as buffer, _opened(buffer) as (file, rate):
        for block in _blocks(file, rate):
            blocks.append(block)
            frames += len(block)
            if frames >= seconds * rate:
                break
    return _joined(blocks), rate


def load(data: bytes, target_rate: int, alone: AbstractContextManager[object]) -> tuple[Waveform, float]:
    """Decode an audio file and resample it.

    Args:
        data: The encoded file.
        target_rate: In Hz.
        alone: Entered while a recording longer than `LONG_SECONDS` is in memory, which may take a gigabyte.

    Returns:
        Mono samples (frames,) at `target_rate`, and the seconds of the file.

    Raises:
        ClipError: As `decode` and `resample` do.
    """
    with ExitStack() as held:
        with _Bytes(data) as buffer, _opened(buffer) as (file, rate):
            long = min(LONG_SECONDS * rate, _LONG_FRAMES)
            blocks: list[Waveform] = []
            frames, is_alone = 0, False
            for block in _blocks(file, rate):
                blocks.append(block)
                frames += len(block)
                if not is_alone and max(frames, file.frames) > long:  # the header may say less than there is
                    held.enter_context(alone)
                    is_alone = True
            samples = _joined(blocks)
        return resample(samples, rate, target_rate), len(samples) / rate


def decode_blocks(source: BinaryIO) -> Iterator[tuple[Waveform, int]]:
    """`decode` block by block, so that a long recording is never in memory whole. Yields at least one block, or raises."""
    with _opened(source) as (file, rate):
        for samples in _blocks(file, rate):
            yield samples, rate


@contextmanager
def _opened(source: BinaryIO) -> Iterator[tuple[soundfile.SoundFile, int]]:
    """An audio file and its sampling rate. What libsndfile or soundfile raise until it is closed becomes a `ClipError`."""
    try:
        with soundfile.SoundFile(source) as file:
            rate = int(file.samplerate)
            if not MIN_RATE <= rate <= MAX_RATE:
                raise ClipError(f"sampling rate {rate} Hz is not plausible")
            yield file, rate
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise _undecodable(error) from error


def _blocks(file: soundfile.SoundFile, rate: int) -> Iterator[Waveform]:
    limit = min(MAX_FRAMES, MAX_SECONDS * rate)
    # The header may lie about the length: blocks are read until the decoder says that it ends.
    frames = 0
    started = time.thread_time()
    block_frames = max(1, _BLOCK_SAMPLES // file.channels)
    while len(block := file.read(block_frames, dtype="float32", always_2d=True)):
        frames += len(block)
        if frames > limit:
            raise ClipError(f"longer than {limit / rate / 60:.0f} minutes")
        if time.thread_time() - started > DECODING_SECONDS + frames / rate / _LEAST_SPEED:
            raise ClipError("it takes longer to decode than any plausible clip")
        samples = _mono(block)
        if not np.isfinite(samples).all():
            raise ClipError("audio holds NaN or infinite samples")
        yield samples
    if not frames:
        raise ClipError("audio holds no samples")


def _joined(blocks: Sequence[Waveform]) -> Waveform:
    return np.concatenate(blocks) if len(blocks) > 1 else np.ascontiguousarray(blocks[0])


class _Bytes(io.BytesIO):
    """Ignores seeks to impossible places, which damaged headers cause: an exception in the callback would be printed."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def _mono(block: npt.NDArray[np.float32]) -> Waveform:
    """Mean of the channels, (frames, channels) to (frames,). Column by column: nine times as fast as `mean(axis=1)`."""
    channels = block.shape[1]
    if channels == 1:
        return block[:, 0]
    total: Waveform = block[:, 0] + block[:, 1]
    for channel in range(2, channels):
        total += block[:, channel]
    total /= np.float32(channels)
    return total


def duration(data: bytes) -> float:
    """Seconds of audio by the file's own header, for estimates; `ClipError` if that cannot be read."""
    try:
        info = soundfile.info(_Bytes(data))
        return min(float(info.frames / info.samplerate), MAX_SECONDS)
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _undecodable(error) from error


def _undecodable(error: Exception) -> ClipError:
    text = getattr(error, "error_string", None) or str(error)
    return ClipError(f"audio cannot be decoded ({text.removeprefix('Error : ').strip().rstrip('.')})")


def resample(samples: Waveform, rate: int, target_rate: int) -> Waveform:
    """Resample (frames,) from `rate` Hz to `target_rate` Hz by soxr's HQ recipe.

    Raises:
        ClipError: There are too few samples to give one.
    """
    if rate == target_rate:
        return samples
    resampled: Waveform = soxr.resample(samples, rate, target_rate, quality="HQ").astype(np.float32, copy=False)
    if not len(resampled):
        raise ClipError(f"{len(samples)} samples at {rate} Hz are too few to resample")
    return resampled


def crop(samples: Waveform, rate: int, crop_seconds: float | None, rule: CropRule) -> list[Waveform]:
    """Cut a clip (frames,) into consecutive crops.

    Args:
        samples: (frames,) of the clip.
        rate: Hz.
        crop_seconds: Length of a crop; None for one crop, the whole clip.
        rule: `keep-tails` pads nothing: a tail of 1 s or more is a crop of its own, and so is a clip shorter than a crop.
            `whole-crops` (X-ARES) drops the tail, and zero-pads a clip shorter than one crop.
    """
    if crop_seconds is None:
        return [samples]
    size = round(crop_seconds * rate)
    whole = len(samples) // size
    crops = [samples[i * size : (i + 1) * size] for i in range(whole)]
    tail = samples[whole * size :]
    if rule == "keep-tails":
        if len(tail) >= MIN_TAIL_SECONDS * rate or not whole:
            crops.append(tail)
    elif not whole:
        crops.append(np.pad(samples, (0, size - len(samples))))
    return crops


def resampler_version() -> str:
    return f"soxr {soxr.__version__} HQ"


def decoder_version() -> str:
    return f"{soundfile.__libsndfile_version__}"


class CropSettings(msgspec.Struct, frozen=True):
    """How clips are cropped and padded for the model; it differs between protocols."""

    seconds: float | None
    rule: audio.CropRule = "keep-tails"
    pad_short_clips: bool = True
    keep_padding: bool = False
