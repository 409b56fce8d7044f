"""Short trainings of small heads, for tests that hold something else than how well a head is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from heads_here import train_heads_here

from xares_onnx.models import retrieval as towers
from xares_onnx.probes import ctc, retrieval


@contextmanager
def quick_sweeps() -> Iterator[None]:
    """The two highest learning rates, at most six epochs of each, and towers of a sixteenth of their width."""
    with pytest.MonkeyPatch.context() as patch:
        train_heads_here(patch)
        for module in (ctc, retrieval):
            sweep = replace(module.SWEEP, rates=module.SWEEP.rates[-2:], epochs=6, patience=2)
            patch.setattr(module, "SWEEP", sweep)
        set_width(patch, 64)
        yield


def set_width(patch: pytest.MonkeyPatch, width: int) -> None:
    """Of both towers of a retrieval head: at their own, nearly all time goes into one matrix."""
    for user in (towers, retrieval):
        patch.setattr(user, "WIDTH", width)
