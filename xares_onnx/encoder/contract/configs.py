"""Hugging Face's `config.json` of a checkpoint, translated into declarations: how a spectrogram transformer's tokens lie.

Source: the patch embedding of `ASTModel` in transformers 5, a convolution over (frequency, time) whose output is flattened
with the frequency first, after a class and a distillation token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .tokens import PREFIX, Tokens


def declared_by_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The declarations of a `config.json`, by contract key; none if its family or its numbers are not known here."""
    if raw.get("model_type") != "audio-spectrogram-transformer":
        return {}
    bins, patch, stride = (
        raw.get(key, usual) for key, usual in {"num_mel_bins": 128, "patch_size": 16, "frequency_stride": 10}.items()
    )
    if not all(type(number) is int for number in (bins, patch, stride)) or not 0 < stride <= patch <= bins <= 4096:
        return {}
    tokens = Tokens(prefix=2, bands=(bins - patch) // stride + 1)
    return {f"{PREFIX}prefix": tokens.prefix, f"{PREFIX}grid": tokens.grid}
