"""Records of an encoder as it was measured: enough to name its embeddings and to open it again in a worker."""

from __future__ import annotations

import msgspec

from ..files import Stamp
from .contract.contract import Contract
from .exposure import Exposure
from .model_file import ModelScan
from .session import CPU

GPU_BATCH = 16


class Tap(msgspec.Struct, frozen=True):
    """An output whose embeddings are scored, by the name that results call it."""

    name: str
    contract: Contract


class EncoderInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A model as it was found: content, contract, provider. Enough to name its embeddings without loading it."""

    path: str
    scan: ModelScan
    contract: Contract
    provider: str
    onnxruntime: str
    notes: tuple[str, ...] = ()
    more_taps: tuple[Tap, ...] = ()
    """Outputs that are scored beside the contract's, in the same pass."""
    exposure: Exposure | None = None
    """Inner tensors that were made outputs for them."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Every output that is scored, the contract's first."""
        return (Tap(self.contract.output, self.contract), *self.more_taps)

    @property
    def batch(self) -> int:
        """Most equal-length chunks in one call. On the CPU one: as fast, and no clip then meets another."""
        coupled = self.contract.batch_coupled or not self.contract.dynamic_batch
        return 1 if self.provider == CPU or coupled else GPU_BATCH


class ModelSpec(msgspec.Struct, frozen=True):
    """What a worker needs to have the encoder at hand; picklable."""

    info: EncoderInfo
    device: str
    threads: int
    stamp: Stamp | None = None  # of the model file as it was measured
    trust: bool = False  # lifts limits on size, memory and time (`limits`)
