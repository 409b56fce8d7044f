"""HuBERT: Hsu et al., Self-Supervised Speech Representation Learning by Masked Prediction of Hidden Units (2021)."""

from __future__ import annotations

from torch import nn

from xares_onnx.exporters.core import Spec
from xares_onnx.exporters.speech import build_speech

__all__ = ["build"]


def build(checkpoint: str | None) -> tuple[nn.Module, Spec]:
    return build_speech("hubert", "HuBERT", checkpoint)
