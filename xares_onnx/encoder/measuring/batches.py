"""Whether a model takes batches, and whether an item of one is embedded as it is alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..contract.contract import Contract
from .probe import Probe

COUPLING_TOLERANCE = 1e-3  # times the largest embedding value; float32 kernels differ by about 1e-6 between batch sizes


def may_take_pairs(contract: Contract) -> bool:
    """Windows of several items are cut into as many calls as the model needs."""
    return bool(contract.windows) or (contract.fixed_batch is None and "B" in contract.input_layout)


def loud_pair(probe: Probe, samples: int) -> npt.NDArray[np.float32]:
    """(2, samples): noise and a neighbour nine times as loud."""
    pair = probe.noise(samples, batch=2)
    pair[1] = np.clip(pair[1] * 9, -1, 1)
    return pair


def batching(together: npt.NDArray[np.float32], alone: npt.NDArray[np.float32]) -> dict[str, bool]:
    """The contract's fields on batches.

    Args:
        together: The embeddings of a `loud_pair`, (2, frames, dim).
        alone: Those of its first item by itself, (1, frames, dim).
    """
    if together.shape != (2, *alone.shape[1:]):
        return {"dynamic_batch": False, "batch_coupled": False}
    scale = float(np.abs(alone).max()) or 1.0
    coupled = not bool(np.abs(together[:1] - alone).max() <= COUPLING_TOLERANCE * scale)
    return {"dynamic_batch": True, "batch_coupled": coupled}
