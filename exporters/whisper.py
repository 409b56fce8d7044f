"""Whisper's encoder: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision (2022).

Whisper always embeds 30 s: shorter audio is followed by silence, which gives frames like any audio. The file pads
inside and keeps the frames that belong to the audio. The log-mel front end is inside too, its floor set by the loudest
band of each clip.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from xares_onnx.errors import UsageError
from xares_onnx.exporters.core import Spec
from xares_onnx.exporters.logmel import HOP_SAMPLES, SAMPLE_RATE, WINDOW_SAMPLES, MelPower
from xares_onnx.exporters.pretrained import Checkpoint, LastHiddenState

__all__ = ["WhisperEncoder", "WhisperLogMel", "build"]

ENCODER_HOP = 2 * HOP_SAMPLES  # the second convolution takes every other frame


class WhisperLogMel(nn.Module):
    """float32 [batch, any] -> Whisper's features [batch, bands, frames] of audio followed by silence up to `samples`.

    Bands are Slaney's and the STFT is centred, its ends mirrored. Powers are floored at 1e-10 and at 80 dB below the
    clip's loudest.
    """

    def __init__(self, bands: int, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.power = MelPower(bands, centred=False)

    def forward(self, audio: Tensor) -> Tensor:
        # A fixed padding and a cut, because a trace would freeze a padding by a difference of lengths.
        audio = functional.pad(audio, (0, self.samples))[:, : self.samples]
        mirrored = functional.pad(audio, (WINDOW_SAMPLES // 2, WINDOW_SAMPLES // 2), mode="reflect")
        power: Tensor = self.power(mirrored)[:, :-1]  # the frame centred on the very end is left out
        decades = power.transpose(1, 2).clamp_min(1e-10).log10()
        return (torch.maximum(decades, decades.amax(dim=(1, 2), keepdim=True) - 8.0) + 4.0) / 4.0


class WhisperEncoder(nn.Module):
    """float32 [batch, samples] in [-1, 1] -> the last hidden state [batch, ceil(samples / 320), dim]."""

    def __init__(self, encoder: nn.Module, bands: int, samples: int) -> None:
        super().__init__()
        self.front_end = WhisperLogMel(bands, samples)
        self.body = LastHiddenState(encoder)

    def forward(self, audio: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.front_end(audio))
        return hidden[:, : (audio.shape[1] + ENCODER_HOP - 1) // ENCODER_HOP]


def build(family: str, checkpoint: str | None) -> tuple[nn.Module, Spec]:
    """The encoder of a checkpoint, and what it declares.

    Raises:
        UsageError: The checkpoint is missing, incomplete, or has a front end of other dimensions.
    """
    local = Checkpoint.find(family, checkpoint)
    settings = local.preprocessor()
    # A checkpoint may omit them: these are the preprocessor's own defaults.
    fixed = {"sampling_rate": SAMPLE_RATE, "hop_length": HOP_SAMPLES, "n_fft": WINDOW_SAMPLES, "dither": 0.0}
    for name, value in (fixed | {"do_normalize": False}).items():
        if settings.get(name, value) != value:
            raise UsageError(
                f"{local.folder}/preprocessor_config.json has {name}={settings[name]}; only {value} is supported"
            )
    encoder = local.load("encoder.").encoder
    bands, samples = encoder.config.num_mel_bins, encoder.config.max_source_positions * ENCODER_HOP
    if (feature_size := settings.get("feature_size", 80)) != bands:
        raise UsageError(
            f"{local.folder} has a preprocessor of {feature_size} bands and an encoder of {bands}; use files that were "
            "published together"
        )
    spec = Spec(
        model_type=family,
        sample_rate=SAMPLE_RATE,
        hop_samples=ENCODER_HOP,
        receptive_field_samples=1,  # ceil(samples / hop) frames
        first_frame_center_samples=0,
        min_samples=1,
        license=local.license,
        source=local.source,
        comment=f"Whisper encoder, last hidden state; log-mel and silence up to {samples / SAMPLE_RATE:g} s inside",
        max_samples=samples,
        chunk_samples=samples,
    )
    return WhisperEncoder(encoder, bands, samples), spec
