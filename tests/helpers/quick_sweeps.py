"""Short sweeps, for tests that hold something else than how well a head is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from xares_onnx.probes import ctc, retrieval


@contextmanager
def quick_sweeps() -> Iterator[None]:
    """Two learning rates, and at most six epochs of each."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (ctc, retrieval):
            sweep = replace(module.SWEEP, rates=module.SWEEP.rates[1:3], epochs=6, patience=2)
            patch.setattr(module, "SWEEP", sweep)
        yield
