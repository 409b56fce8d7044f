"""Kaldi's filter banks as two convolutions: what AST, BEATs, wav2vec 2.0 BERT and their kin take, from the waveform.

Source: Povey et al., The Kaldi Speech Recognition Toolkit (2011), as in `compute-fbank-feats` without dither.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from xares_onnx.encoder.contract.frontend import Frontend, make_frontend
from xares_onnx.encoder.features import mel_filters

__all__ = ["KaldiFbank"]

_POWERS = {"hann": 1.0, "povey": 0.85}  # of a Hann window


class KaldiFbank(nn.Module):
    """float32 [batch, samples] in [-1, 1] -> natural logarithms of mel power, [batch, frames, bands].

    Removing the mean of a window, pre-emphasis, the window's shape and the DFT are linear, so they are one kernel, computed
    in double precision. `scale` 32768 takes samples as Kaldi does, in steps of 16 bits. Other settings are keys of the
    contract's `frontend.`, see docs/vendors.md.
    """

    kernels: Tensor
    filters: Tensor

    def __init__(self, sample_rate: int, *, scale: float = 1.0, **settings: Any) -> None:
        super().__init__()
        self.frontend = make_frontend({"preset": "kaldi", **settings}, sample_rate)
        self.register_buffer("kernels", torch.from_numpy(scale * _kernels(self.frontend)[:, None]).float())
        # Twice side by side, so that the sum over bins also adds the squares of cosine and sine.
        filters = np.tile(mel_filters(self.frontend).T, 2)[:, :, None]
        self.register_buffer("filters", torch.from_numpy(filters).float())

    def forward(self, audio: Tensor) -> Tensor:
        spectrum = functional.conv1d(audio[:, None], self.kernels, stride=self.frontend.hop_samples)
        power = functional.conv1d(spectrum.square(), self.filters).transpose(1, 2)
        return power.clamp_min(self.frontend.log_floor).log()


def _kernels(frontend: Frontend) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(2 * bins, window_samples): cosines, then sines."""
    samples, fft = frontend.window_samples, frontend.fft_samples
    emphasis = np.eye(samples) - frontend.preemphasis * np.eye(samples, k=-1)
    emphasis[0, 0] -= frontend.preemphasis  # the sample before the first is the first again
    centred = np.eye(samples) - 1 / samples
    phase = 2 * np.pi / fft * np.outer(np.arange(fft // 2 + 1), np.arange(samples))
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(samples) / (samples - 1))
    shaped = hann[:, None] ** _POWERS[frontend.window] * (emphasis @ centred)
    return np.concatenate([np.cos(phase), np.sin(phase)]) @ shaped
