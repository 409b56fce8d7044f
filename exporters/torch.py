"""Any `torch.nn.Module` from waveform to frames: `xares-onnx export torch package.module:factory`.

`factory()` returns the module: float32 [batch, samples] in [-1, 1] -> [batch, frames, dim], each clip by itself. Its
attributes declare what cannot be measured: `sample_rate` always; `min_samples`, `max_samples`, `chunk_samples`,
`first_frame_center_samples`, `license`, `source`, `comment` and `model_type` as needed. A child named `front_end` stays
in float32 if the rest is made smaller. Importing a module runs its code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xares_onnx.encoder.contract.frame_law import FrameLaw, fit_frame_law, law_holds
from xares_onnx.errors import ModelError, UsageError
from xares_onnx.exporters.core import Spec

__all__ = ["build"]

_NUMBERS = ("min_samples", "max_samples", "chunk_samples", "first_frame_center_samples")


def build(family: str, checkpoint: str | None) -> tuple[nn.Module, Spec]:
    """The module that `module:factory` returns, and what it declares; its frame law is measured.

    Raises:
        UsageError: There is no such factory, or it returns no usable module.
        ModelError: The module fails on noise, or its frames follow no law.
    """
    if checkpoint is None or not all(part for part in checkpoint.partition(":")):
        raise UsageError(f"{family} needs module:factory, such as my_package.my_encoder:build")
    encoder = _module_of(checkpoint)
    declared = {name: getattr(encoder, name) for name in _NUMBERS if getattr(encoder, name, None) is not None}
    rate = getattr(encoder, "sample_rate", None)
    if not isinstance(rate, int) or rate < 1:
        raise UsageError(
            f"the module of {checkpoint} must declare its sampling rate in Hz: set module.sample_rate, such as 16000"
        )
    for name, value in declared.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or (name != _NUMBERS[-1] and value != int(value)):
            raise UsageError(f"the module of {checkpoint} has {name}={value!r}, which must be a number of samples")
    law = _law(encoder, checkpoint, rate, declared)
    spec = Spec(
        model_type=f"{getattr(encoder, 'model_type', type(encoder).__name__)}",
        sample_rate=rate,
        hop_samples=law.hop,
        receptive_field_samples=law.receptive_field,
        first_frame_center_samples=declared.pop("first_frame_center_samples", law.receptive_field / 2),
        license=f"{getattr(encoder, 'license', 'not stated')}",
        source=f"{getattr(encoder, 'source', checkpoint)}",
        comment=f"{getattr(encoder, 'comment', 'a torch module')}",
        **({"min_samples": max(1, law.first_length_with(1))} | declared),
    )
    return encoder, spec


def _module_of(checkpoint: str) -> nn.Module:
    name, _, attribute = checkpoint.partition(":")
    with _current_folder_importable():
        try:
            factory: Any = import_module(name)
            for part in attribute.split("."):
                factory = getattr(factory, part)
            module = factory()
        except Exception as error:  # the user's own code may raise anything
            detail = next(iter(str(error).splitlines()), "")
            raise UsageError(f"{checkpoint} gives no module: {type(error).__name__}: {detail}") from error
    if not isinstance(module, nn.Module):
        raise UsageError(f"{checkpoint} returns {type(module).__name__}, which must be a torch.nn.Module")
    return module.eval().cpu()


@contextmanager
def _current_folder_importable() -> Iterator[None]:
    """As `python -m` has it; a console script has its own folder on the path instead."""
    original = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = original


def _law(encoder: nn.Module, checkpoint: str, rate: int, declared: dict[str, Any]) -> FrameLaw:
    """The frame law, measured between about one and three seconds, or within the lengths that the module declares."""
    longest = declared.get("max_samples", 3 * rate + 1)
    low = max(declared.get("min_samples", 1), min(rate, longest // 3))
    high = min(3 * low + 1, longest)

    @torch.no_grad()
    def frames(samples: int) -> int:
        audio = 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(0))
        try:
            shape = tuple(encoder(audio).shape)
        except Exception as error:
            detail = next(iter(str(error).splitlines()), type(error).__name__)
            raise ModelError(f"the module of {checkpoint} fails on {samples} samples: {detail}") from error
        if len(shape) != 3 or shape[0] != 1:
            raise ModelError(f"the module of {checkpoint} gives {shape} for one clip; it must give [batch, frames, dim]")
        return int(shape[1])

    law = fit_frame_law(frames, low, high)
    if law is None or not law_holds(law, frames, low, high):
        raise ModelError(
            f"the frames of {checkpoint} do not grow evenly with its input, {frames(low)} at {low} samples and "
            f"{frames(high)} at {high}; an encoder must give frames at a constant hop"
        )
    return law
