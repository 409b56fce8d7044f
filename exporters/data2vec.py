"""data2vec for audio: Baevski et al., data2vec: A General Framework for Self-supervised Learning (2022)."""

from __future__ import annotations

from torch import nn

from xares_onnx.exporters.core import Spec
from xares_onnx.exporters.speech import build_speech

__all__ = ["build"]


def build(checkpoint: str | None) -> tuple[nn.Module, Spec]:
    return build_speech("data2vec-audio", "data2vec audio", checkpoint)
