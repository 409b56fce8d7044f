"""Chunks of a waveform, and the exact time of every frame.

A waveform is cut into consecutive chunks of `chunk_samples`. A last chunk shorter than one second (or than the model's
minimum) is padded with zeros up to that, and frames in the padding are dropped.

Chunks of a contract with `chunk_overlap` begin where the next frame of the one before would, and the last one is padded with
zeros to a whole frame: so the frames do not depend on `chunk_samples`, and every sample is in one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .contract.contract import Contract

MIN_CHUNK_SECONDS = 1.0


@dataclass(frozen=True)
class Chunk:
    """Samples [start, stop) of a waveform, which the model sees padded with zeros at the end to `length`."""

    start: int
    stop: int
    length: int


def plan_chunks(samples: int, contract: Contract, *, pad_short_clips: bool = True) -> list[Chunk]:
    """Plan the chunks of a waveform.

    Args:
        samples: The waveform's length.
        contract: The model's chunk length, minimum and sampling rate.
        pad_short_clips: Whether a clip shorter than a second is padded. X-ARES feeds it as it is, if the model can take it.
    """
    if contract.chunk_overlap:
        return _overlapping(samples, contract)
    shortest = max(round(MIN_CHUNK_SECONDS * contract.sample_rate), contract.min_samples)
    chunks = []
    for start in range(0, samples, contract.chunk_samples):
        stop = min(start + contract.chunk_samples, samples)
        minimum = shortest if pad_short_clips or start else contract.min_samples
        chunks.append(Chunk(start, stop, max(stop - start, min(minimum, contract.chunk_samples))))
    return chunks


def _overlapping(samples: int, contract: Contract) -> list[Chunk]:
    law = contract.law
    assert law is not None
    most = law.frames(contract.chunk_samples)
    window = max(law.receptive_field, law.hop)
    frames = max(0, -(-(samples - window) // law.hop)) + 1
    chunks = []
    for first in range(0, frames, most):
        start = first * law.hop
        length = max(law.first_length_with(min(most, frames - first)), contract.min_samples)
        chunks.append(Chunk(start, min(start + length, samples), length))
    return chunks


def cut(waveform: npt.NDArray[np.float32], chunk: Chunk) -> npt.NDArray[np.float32]:
    """The chunk's samples (length,), padded."""
    samples = waveform[chunk.start : chunk.stop]
    return np.pad(samples, (0, chunk.length - len(samples))) if len(samples) < chunk.length else samples


def frame_centers(chunk: Chunk, frames: int, contract: Contract) -> npt.NDArray[np.float64]:
    """The centre of each frame of a chunk, (frames,), in samples from the start of the waveform.

    Raises:
        ValueError: The encoder is clip-only.
    """
    if contract.hop_samples is None or contract.first_frame_center_samples is None:
        raise ValueError("a clip-only encoder has no frames")
    return chunk.start + contract.first_frame_center_samples + contract.hop_samples * np.arange(frames, dtype=np.float64)


def frames_inside(chunk: Chunk, frames: int, samples: int, contract: Contract) -> int:
    """How many leading frames of a chunk are kept: those whose centre - hop/2 lies before the end of the waveform.

    A waveform's first frame is always kept.

    Args:
        chunk: The chunk.
        frames: How many frames the model gave for it.
        samples: The waveform's length.
        contract: The model's hop and first frame centre.
    """
    if contract.hop_samples is None:
        return frames
    inside = int(np.count_nonzero(frame_centers(chunk, frames, contract) - contract.hop_samples / 2 < samples))
    return max(inside, 1) if chunk.start == 0 else inside
