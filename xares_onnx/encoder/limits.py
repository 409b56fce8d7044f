"""How much of the machine a stranger's model may use, and how much a trusted one (`--trust`).

A limit that depends on size grows with the bytes of the model's files, because a bomb is small. Trust never lifts the rules
of `model_guard` that no honest model breaks: where weights may lie, and whose operators run.
"""

from __future__ import annotations

import msgspec

SILENCE_SECONDS = 15.0  # without a sign of life, in one load or call; a wav2vec2-base of 0.4 GB takes 1.3
_SILENCE_SECONDS_PER_GB = 60.0
_TRUSTED_SILENCE_SECONDS = 900.0
_MEASURING_SECONDS = 12.0  # of processor time, so that a busy machine refuses no model; a wav2vec2-base takes 7
_MEASURING_SECONDS_PER_GB = 600.0  # whisper hears 30 s in every run: its base of 0.08 GB takes 11
_GB = 1 << 30


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's files may hold, and the dimension of its embeddings."""

    file_bytes: int
    """Of the model and its external data together."""
    nodes: int
    """Of the graph with all functions inlined."""
    parts: int
    """Messages of the protobuf: nodes, attributes, tensors, names of values."""
    dense_bytes: int
    """Of one sparse tensor as a dense one."""
    dim: int


UNTRUSTED = Limits(file_bytes=3 * _GB, nodes=100_000, parts=2_000_000, dense_bytes=_GB, dim=1 << 15)
TRUSTED = Limits(file_bytes=1 << 50, nodes=10_000_000, parts=200_000_000, dense_bytes=1 << 50, dim=1 << 24)
LIFTED = (
    "the model is trusted: limits on its size, nodes, memory and time are lifted; where its weights lie and whose operators "
    "it uses is still checked"
)


def limits(trust: bool) -> Limits:
    return TRUSTED if trust else UNTRUSTED


def silence_seconds(size: int, trust: bool) -> float:
    """The longest silence of a worker that loads or runs a model with files of `size` bytes."""
    return _TRUSTED_SILENCE_SECONDS if trust else SILENCE_SECONDS + size / _GB * _SILENCE_SECONDS_PER_GB


def measuring_seconds(size: int, trust: bool) -> float:
    """The processor time for all runs that measure a model with files of `size` bytes."""
    return float("inf") if trust else _MEASURING_SECONDS + size / _GB * _MEASURING_SECONDS_PER_GB


def memory_bytes(size: int, trust: bool, threads: int = 0) -> int | None:
    """The address space of a worker that runs a model on the CPU; None for no limit.

    wav2vec2-base (0.4 GB) needs 0.6 GB for a chunk of 10 s. A bomb of a few bytes is stopped below 8 GB with 11 threads.

    Args:
        size: Of the model's files, in bytes.
        trust: Whether the limit is lifted.
        threads: That run the model, beside the one that measures it.
    """
    return None if trust else 5 * _GB + 4 * size + threads * ((_GB >> 2) + 2 * size)
