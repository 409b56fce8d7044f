"""wav2vec 2.0: Baevski et al., wav2vec 2.0: A Framework for Self-Supervised Learning of Speech Representations (2020)."""

from __future__ import annotations

from torch import nn

from xares_onnx.exporters.core import Spec
from xares_onnx.exporters.speech import build_speech

__all__ = ["build"]


def build(checkpoint: str | None) -> tuple[nn.Module, Spec]:
    return build_speech("wav2vec2", "wav2vec 2.0", checkpoint)
