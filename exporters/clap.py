"""CLAP's audio tower: Wu et al., Large-scale Contrastive Language-Audio Pretraining with Feature Fusion and
Keyword-to-Caption Augmentation (2023).

HTSAT, a Swin transformer on a log-mel spectrogram of 10 s at 48 kHz: shorter audio is repeated, as often as it fits whole,
and then followed by silence. The file does that inside and keeps the frames that begin in the audio, two bands for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.onnx.operators import shape_as_tensor

from xares_onnx.encoder.contract.frontend import make_frontend
from xares_onnx.encoder.contract.tokens import Tokens
from xares_onnx.encoder.features import mel_filters
from xares_onnx.errors import UsageError
from xares_onnx.exporters.core import Spec
from xares_onnx.exporters.logmel import MelPower
from xares_onnx.exporters.pretrained import Checkpoint, LastHiddenState

__all__ = ["AudioTower", "RepeatedLogMel", "build"]

# The preprocessor's defaults, and what only one value is supported of.
DEFAULTS = {"feature_size": 64, "sampling_rate": 48_000, "hop_length": 480, "max_length_s": 10, "fft_window_size": 1024}
FIXED = {"padding": "repeatpad", "truncation": "rand_trunc"}


class RepeatedLogMel(nn.Module):
    """float32 [batch, any] -> decibels of mel power [batch, 1, frames, bands], of the audio repeated up to `samples`."""

    counts: Tensor

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        rate, window = settings["sampling_rate"], settings["fft_window_size"]
        sizes = {"fft_samples": window, "window_samples": window, "hop_samples": settings["hop_length"]}
        bounds = {"low_hz": settings.get("frequency_min", 0), "high_hz": settings.get("frequency_max", 14_000)}
        bands = {"mels": settings["feature_size"], "mel_scale": "slaney", "mel_norm": "slaney"}
        frontend = make_frontend({"preset": "librosa", **sizes, **bounds, **bands}, rate)
        filters = mel_filters(frontend).T
        self.power = MelPower(
            len(filters), centred=False, window_samples=window, hop_samples=settings["hop_length"], filters=filters
        )
        self.margin = window // 2
        self.register_buffer("counts", torch.arange(settings["max_length_s"] * rate))

    def forward(self, audio: Tensor) -> Tensor:
        samples = shape_as_tensor(audio)[1]  # a trace would freeze a number
        whole = samples * (self.counts.shape[0] // samples)
        repeated = audio[:, self.counts % samples] * (self.counts < whole)
        power: Tensor = self.power(functional.pad(repeated, (self.margin, self.margin), mode="reflect"))
        return 10 * power.clamp_min(1e-10).log10()[:, None]


class AudioTower(nn.Module):
    """float32 [batch, samples] in [-1, 1] -> patches [batch, bands * times, dim], all times of the lowest band first."""

    def __init__(self, model: nn.Module, settings: dict[str, Any], hop: int) -> None:
        super().__init__()
        self.front_end = RepeatedLogMel(settings)
        self.body = LastHiddenState(model)
        self.hop = hop

    def forward(self, audio: Tensor) -> Tensor:
        grid: Tensor = self.body(self.front_end(audio))  # [batch, dim, bands, times]
        times = (audio.shape[1] + self.hop - 1) // self.hop
        return grid[..., :times].flatten(2).transpose(1, 2)


def build(family: str, checkpoint: str | None) -> tuple[nn.Module, Spec]:
    """The audio tower of a checkpoint, and what it declares.

    Raises:
        UsageError: The checkpoint is missing, incomplete, fuses several views, or has another front end.
    """
    local = Checkpoint.find(family, checkpoint)
    settings = DEFAULTS | local.preprocessor()
    config = local.config().get("audio_config") or {}
    if config.get("enable_fusion"):
        raise UsageError(
            f"{local.folder} fuses four views of a clip, three of them drawn at random, which is not supported; use a "
            "checkpoint without fusion, such as clap-htsat-unfused"
        )
    for name, value in FIXED.items():
        if settings.get(name, value) != value:
            raise UsageError(
                f"{local.folder}/preprocessor_config.json has {name}={settings[name]}; only {value} is supported"
            )
    model = local.load("audio_model.").audio_model
    config = model.config
    if config.num_mel_bins != settings["feature_size"]:
        raise UsageError(
            f"{local.folder} has a preprocessor of {settings['feature_size']} bands and a tower of {config.num_mel_bins}; "
            "use files that were published together"
        )
    samples = settings["max_length_s"] * settings["sampling_rate"]
    # The tower stretches the spectrogram's frames to `stretched` ones, the first and the last on each other.
    frames = samples // settings["hop_length"] + 1
    ratio = config.spec_size // config.num_mel_bins
    stretched, merged = config.spec_size * ratio, config.patch_stride[1] * 2 ** (len(config.depths) - 1)
    step = settings["hop_length"] * (frames - 1) / (stretched - 1)
    hop = round(merged * step)
    spec = Spec(
        model_type=family,
        sample_rate=settings["sampling_rate"],
        hop_samples=hop,
        receptive_field_samples=1,  # ceil(samples / hop) frames
        first_frame_center_samples=round((merged - 1) / 2 * step),
        min_samples=settings["hop_length"],
        license=local.license,
        source=local.source,
        comment=f"CLAP's audio tower, last hidden state; log-mel inside, audio repeated up to {settings['max_length_s']} s",
        max_samples=samples,
        chunk_samples=samples,
        tokens=Tokens(bands=config.spec_size // merged // ratio),
    )
    return AudioTower(model, settings, hop), spec
