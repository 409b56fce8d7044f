"""Records of a measured encoder: enough to name its embeddings and to open it again in a worker."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from .batching import Batching
from .contract.contract import Contract
from .exposure import Exposure
from .model_file import ModelScan
from .session import CPU

GPU_BATCH = 32  # most chunks in one call
_CALL_SECONDS = 160  # most audio in one call of several chunks
_WINDOW_SECONDS = 900  # audio of the chunks among which those of equal length share calls
_WINDOW_BYTES = 1 << 28  # most embedding values of a window, so that many taps need no more memory than one
_GPU_CALLERS = 2  # one prepares a call while the device runs the other's; each has handles and workspace of its own


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How the caller wants a model to be read and run; `load_encoder` describes each option."""

    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    engine: str = "local"
    contract: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()
    trust: bool = False


class Tap(msgspec.Struct, frozen=True):
    """An output whose embeddings are scored, and its name in results."""

    name: str
    contract: Contract


class EncoderInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A measured model: content, contract, provider. Enough to name its embeddings without loading it."""

    path: str
    scan: ModelScan
    contract: Contract
    provider: str
    onnxruntime: str
    notes: tuple[str, ...] = ()
    more_taps: tuple[Tap, ...] = ()
    """Further outputs that are scored in the same pass as the contract's."""
    exposure: Exposure | None = None
    """Inner tensors that become outputs for these taps."""
    batch_difference: float | None = None
    """Largest difference of a chunk alone from the same chunk in a full call, as a share of the largest embedding value;
    None if a chunk is always alone."""

    @property
    def front(self) -> Path | None:
        """The graph that makes the features."""
        front = self.contract.frontend_model
        return Path(self.path).parent / front.file if front else None

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Every scored output, the contract's first."""
        return (Tap(self.contract.output, self.contract), *self.more_taps)

    @property
    def batching(self) -> Batching:
        """Which chunks share a call. On the CPU none do: that is as fast, and clips then cannot affect each other."""
        if self.provider == CPU or self.contract.batch_coupled or not self.contract.dynamic_batch:
            return Batching()
        rate = self.contract.sample_rate
        framed = [tap.contract for tap in self.taps if tap.contract.hop_samples]
        bytes_per_sample = sum(4 * contract.dim / (contract.hop_samples or 1) for contract in framed)
        window = min(_WINDOW_SECONDS * rate, int(_WINDOW_BYTES / bytes_per_sample) if bytes_per_sample else sys.maxsize)
        return Batching(GPU_BATCH, _CALL_SECONDS * rate, window)


class ModelSpec(msgspec.Struct, frozen=True):
    """What a worker needs to open the encoder; picklable."""

    info: EncoderInfo
    device: str
    threads: int
    trust: bool = False  # lifts limits on size, memory and time (`limits`)

    @property
    def callers(self) -> int:
        """Threads that call the model at once. Clips are decoded on `threads` threads."""
        return self.threads if self.info.provider == CPU else min(self.threads, _GPU_CALLERS)
