"""Whisper's encoder: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision (2022).

Whisper hears 30 s, always: shorter audio is followed by silence, of which it makes frames like any other. The file
pads inside and keeps the frames that belong to the audio. The log-mel front end is inside too, its floor set by the
loudest band of each clip.
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
    """float32 [batch, any] -> Whisper's features [batch, bands, frames] of `samples`, after silence up to there.

    Bands are Slaney's and the STFT is centred, its ends mirrored. Powers are floored at 1e-10 and at 80 dB below the
    clip's loudest.
    """

    def __init__(self, bands: int, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.power = MelPower(bands, centred=False)

    def forward(self, audio: Tensor) -> Tensor:
        # A fixed padding and a cut: traced, padding by a difference of lengths would be frozen.
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
    """Raises `UsageError` where the checkpoint is missing, incomplete, or has a front end of other dimensions."""
    found = Checkpoint.find(family, checkpoint)
    settings = found.preprocessor()
    # A checkpoint may leave them unsaid: these are the defaults of the preprocessor itself.
    fixed = {"sampling_rate": SAMPLE_RATE, "hop_length": HOP_SAMPLES, "n_fft": WINDOW_SAMPLES, "dither": 0.0}
    for name, value in (fixed | {"do_normalize": False}).items():
        if settings.get(name, value) != value:
            raise UsageError(
                f"{found.folder}/preprocessor_config.json has {name}={settings[name]}; only {value} is supported"
            )
    encoder = found.load("encoder.").encoder
    bands, samples = encoder.config.num_mel_bins, encoder.config.max_source_positions * ENCODER_HOP
    if (heard := settings.get("feature_size", 80)) != bands:
        raise UsageError(
            f"{found.folder} has a preprocessor of {heard} bands and an encoder of {bands}; use what was published together"
        )
    spec = Spec(
        model_type=family,
        sample_rate=SAMPLE_RATE,
        hop_samples=ENCODER_HOP,
        receptive_field_samples=1,  # ceil(samples / hop) frames
        first_frame_center_samples=0,
        min_samples=1,
        license=found.license,
        source=found.source,
        comment=f"Whisper encoder, last hidden state; log-mel and silence up to {samples / SAMPLE_RATE:g} s inside",
        max_samples=samples,
        chunk_samples=samples,
    )
    return WhisperEncoder(encoder, bands, samples), spec
