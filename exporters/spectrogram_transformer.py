"""AST: Gong et al., AST: Audio Spectrogram Transformer (2021).

A vision transformer on 16 x 16 patches of Kaldi's filter banks, about 10 s of them: shorter audio is followed by features of
zero. The file pads inside, keeps the patches that lie in the audio whole, and gives them after the class and distillation
tokens, all times of the lowest band first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from xares_onnx.encoder.contract.tokens import Tokens
from xares_onnx.errors import UsageError
from xares_onnx.exporters.core import Spec
from xares_onnx.exporters.kaldi import KaldiFbank
from xares_onnx.exporters.pretrained import Checkpoint, LastHiddenState

__all__ = ["SpectrogramTransformer", "build", "kept_patches"]

MODEL_TYPE = "audio-spectrogram-transformer"
SAMPLE_RATE = 16_000
PREFIX = 2  # class and distillation token


def kept_patches(tokens: Tensor, lie: Tokens, times: int) -> Tensor:
    """Leading tokens, and of the patches after them, all times of the first band first, `times` of each band."""
    patches = tokens[:, lie.prefix :].reshape(tokens.shape[0], lie.bands, -1, tokens.shape[2])[:, :, :times]
    return torch.cat([tokens[:, : lie.prefix], patches.flatten(1, 2)], dim=1)


class FixedFbank(nn.Module):
    """float32 [batch, any] -> normalised filter banks [batch, frames, bands]; zeros follow, normalised alike."""

    def __init__(self, fbank: KaldiFbank, frames: int, mean: float, deviation: float) -> None:
        super().__init__()
        self.fbank, self.frames, self.mean, self.deviation = fbank, frames, mean, deviation

    def forward(self, audio: Tensor) -> Tensor:
        # A fixed padding and a cut, because a trace would freeze a padding by a difference of lengths.
        padded: Tensor = functional.pad(self.fbank(audio), (0, 0, 0, self.frames))[:, : self.frames]
        return (padded - self.mean) / self.deviation


class SpectrogramTransformer(nn.Module):
    """float32 [batch, samples] in [-1, 1] -> tokens [batch, prefix + bands * times, dim] of the last hidden state."""

    def __init__(self, front_end: FixedFbank, model: nn.Module, tokens: Tokens, hop: int, receptive: int) -> None:
        super().__init__()
        self.front_end = front_end
        self.body = LastHiddenState(model)
        self.tokens, self.hop, self.receptive = tokens, hop, receptive

    def forward(self, audio: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.front_end(audio))
        return kept_patches(hidden, self.tokens, (audio.shape[1] - self.receptive) // self.hop + 1)


def build(family: str, checkpoint: str | None) -> tuple[nn.Module, Spec]:
    """The encoder of a checkpoint, and what it declares.

    Raises:
        UsageError: The checkpoint is missing, incomplete, or has a front end of other dimensions.
    """
    local = Checkpoint.find(MODEL_TYPE, checkpoint)
    settings = local.preprocessor()
    config = local.config()
    # A checkpoint may omit them: these are the preprocessor's own defaults.
    bands, frames = settings.get("num_mel_bins", 128), settings.get("max_length", 1024)
    for name, value in (
        ("sampling_rate", SAMPLE_RATE),
        ("num_mel_bins", config.get("num_mel_bins", 128)),
        ("max_length", config.get("max_length", 1024)),
    ):
        if settings.get(name, value) != value:
            raise UsageError(
                f"{local.folder}/preprocessor_config.json has {name}={settings[name]}; only {value} is supported"
            )
    model = local.load()
    normalize = settings.get("do_normalize", True)
    mean, deviation = (settings.get("mean", -4.2677393), 2 * settings.get("std", 4.5689974)) if normalize else (0.0, 1.0)
    fbank = KaldiFbank(SAMPLE_RATE, mels=bands, window="hann")
    patch, stride = model.config.patch_size, model.config.time_stride
    tokens = Tokens(prefix=PREFIX, bands=(bands - patch) // model.config.frequency_stride + 1)
    window = fbank.frontend.window_samples
    hop = stride * fbank.frontend.hop_samples
    receptive = window + (patch - 1) * fbank.frontend.hop_samples
    longest = window + frames * fbank.frontend.hop_samples - 1
    spec = Spec(
        model_type=family,
        sample_rate=SAMPLE_RATE,
        hop_samples=hop,
        receptive_field_samples=receptive,
        first_frame_center_samples=receptive / 2,
        min_samples=receptive,
        license=local.license,
        source=local.source,
        comment="AST, last hidden state; filter banks inside, followed by zeros up to its window",
        max_samples=longest,
        chunk_samples=longest // SAMPLE_RATE * SAMPLE_RATE or None,
        tokens=tokens,
    )
    return SpectrogramTransformer(FixedFbank(fbank, frames, mean, deviation), model, tokens, hop, receptive), spec
