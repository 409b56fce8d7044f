"""WavLM: Chen et al., Large-Scale Self-Supervised Pre-Training for Full Stack Speech Processing (2021)."""

from __future__ import annotations

from torch import nn

from xares_onnx.exporters.core import Spec
from xares_onnx.exporters.speech import build_speech

__all__ = ["build"]


def build(checkpoint: str | None) -> tuple[nn.Module, Spec]:
    return build_speech("wavlm", "WavLM", checkpoint)
