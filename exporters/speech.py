"""wav2vec 2.0, HuBERT, WavLM, data2vec and MERT: strided convolutions on the waveform, then a transformer.

The file holds the normalisation of the checkpoint's preprocessor, each clip by itself, and gives the last hidden state.

Sources: Baevski et al., wav2vec 2.0: A Framework for Self-Supervised Learning of Speech Representations (2020); Hsu et al.,
HuBERT: Self-Supervised Speech Representation Learning by Masked Prediction of Hidden Units (2021); Chen et al., WavLM:
Large-Scale Self-Supervised Pre-Training for Full Stack Speech Processing (2021); Baevski et al., data2vec: A General
Framework for Self-supervised Learning in Speech, Vision and Language (2022); Li et al., MERT: Acoustic Music Understanding
Model with Large-Scale Self-supervised Training (2023).
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

from xares_onnx.errors import UsageError
from xares_onnx.exporters.core import Spec
from xares_onnx.exporters.pretrained import Checkpoint, LastHiddenState

__all__ = ["SpeechEncoder", "ZeroMeanUnitVariance", "build"]

# Family: the `model_type` of its checkpoints, and its title.
FAMILIES = {
    "data2vec": ("data2vec-audio", "data2vec audio"),
    "hubert": ("hubert", "HuBERT"),
    "mert": ("mert_model", "MERT"),
    "wav2vec2": ("wav2vec2", "wav2vec 2.0"),
    "wavlm": ("wavlm", "WavLM"),
}


class ZeroMeanUnitVariance(nn.Module):
    """float32 [batch, samples] -> the same, each clip minus its mean and divided by its standard deviation."""

    def forward(self, audio: Tensor) -> Tensor:
        centred = audio - audio.mean(dim=-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + 1e-7)  # as the preprocessor has it


class SpeechEncoder(nn.Module):
    """float32 [batch, samples] in [-1, 1] -> the last hidden state [batch, frames, dim]."""

    def __init__(self, model: nn.Module, *, normalize: bool) -> None:
        super().__init__()
        self.front_end = ZeroMeanUnitVariance() if normalize else nn.Identity()
        self.body = LastHiddenState(model)

    def forward(self, audio: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.front_end(audio))
        return hidden


def build(family: str, checkpoint: str | None) -> tuple[nn.Module, Spec]:
    """The encoder of a checkpoint of one of `FAMILIES`, and what it declares.

    Raises:
        UsageError: The checkpoint is missing, incomplete or of another family.
    """
    model_type, title = FAMILIES[family]
    local = Checkpoint.find(model_type, checkpoint, *(["music_hubert"] if family == "mert" else []))
    settings = local.preprocessor()
    normalize, rate = settings.get("do_normalize"), settings.get("sampling_rate")
    if not isinstance(normalize, bool) or not isinstance(rate, int):
        raise UsageError(
            f"{local.folder}/preprocessor_config.json must have do_normalize (true or false) and sampling_rate (in Hz)"
        )
    model = local.load(config=_music_config(local) if family == "mert" else None)
    config = model.config
    if getattr(config, "add_adapter", False):
        raise UsageError(f"{local.folder} has an adapter after its encoder, which is not supported; use the plain encoder")
    hop, receptive = 1, 1
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        receptive += (kernel - 1) * hop
        hop *= stride
    spec = Spec(
        model_type=model_type,
        sample_rate=rate,
        hop_samples=hop,
        receptive_field_samples=receptive,
        first_frame_center_samples=receptive / 2,
        min_samples=receptive,
        license=local.license,
        source=local.source,
        comment=f"{title}, last hidden state; normalisation of each clip {'inside' if normalize else 'not used'}",
    )
    return SpeechEncoder(model, normalize=normalize), spec


def _music_config(checkpoint: Checkpoint) -> transformers.PreTrainedConfig:
    """The config of a MERT checkpoint as a HuBERT's: its own code adds a spectrogram, or scales of residuals, that no
    published checkpoint uses. `attention_relax` subtracts the largest score before the softmax, and so changes nothing.
    """
    config = checkpoint.config()
    for name in ("feature_extractor_cqt", "deepnorm"):
        if config.get(name):
            raise UsageError(
                f"{checkpoint.folder}/config.json has {name}=true, which is not supported; use MERT v1 as published"
            )
    own = {name: value for name, value in config.items() if name not in ("model_type", "architectures", "auto_map")}
    try:
        return transformers.HubertConfig(**own)
    except (TypeError, ValueError) as error:
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{checkpoint.folder}/config.json is not a MERT's: {detail}") from error
