"""Log-mel energies: the baseline without weights, and the mel front end that other families share.

A 25 ms Hann window every 10 ms over audio at 16 kHz, 64 bands from 0 to 8 kHz. The bands are Slaney's: the lowest are 46 Hz
apart, more than the DFT's 40 Hz; at HTK's 27 Hz, neighbours would share one bin.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from xares_onnx.encoder.contract.frontend import make_frontend
from xares_onnx.encoder.features import mel_filters
from xares_onnx.errors import UsageError
from xares_onnx.exporters.core import Spec

__all__ = ["LogMel", "MelPower", "build", "slaney_filters"]

SAMPLE_RATE = 16_000
WINDOW_SAMPLES = 400  # 25 ms
HOP_SAMPLES = 160  # 10 ms
BANDS = 64

# Rounding to 16 bits alone puts 3e-10 into every band: 2**-30 / 12 a sample, x 150, the sum of the window's
# squares, / 40, as filters have unit area in Hz and bins are 40 Hz wide. Sound is above this floor.
FLOOR = 1e-10


def slaney_filters(bands: int) -> NDArray[np.float64]:
    """Slaney's triangles from 0 Hz to Nyquist, each of unit area in Hz; (bands, WINDOW_SAMPLES // 2 + 1)."""
    settings = {"preset": "whisper", "fft_samples": WINDOW_SAMPLES, "mels": bands, "low_hz": 0.0, "high_hz": 0.0}
    return mel_filters(make_frontend(settings, SAMPLE_RATE)).T


class MelPower(nn.Module):
    """Mel power spectrogram, float32 [batch, samples] -> [batch, frames, bands].

    The DFT is a strided convolution with windowed cosines and sines, computed in double precision; it is several times
    faster than ONNX's STFT operator. `centred` pads half a window of zeros at both ends, as librosa does: frame i is
    then centred on sample i * hop, else on i * hop + window / 2. `filters`, (bands, window_samples // 2 + 1), replace
    Slaney's, which are for WINDOW_SAMPLES.
    """

    dft: Tensor
    filters: Tensor

    def __init__(
        self,
        bands: int,
        *,
        centred: bool,
        window_samples: int = WINDOW_SAMPLES,
        hop_samples: int = HOP_SAMPLES,
        filters: NDArray[np.float64] | None = None,
    ) -> None:
        super().__init__()
        self.padding = window_samples // 2 if centred else 0
        self.hop_samples = hop_samples
        time = np.arange(window_samples)
        phase = 2 * np.pi / window_samples * np.outer(np.arange(window_samples // 2 + 1), time)
        window = 0.5 - 0.5 * np.cos(2 * np.pi / window_samples * time)  # periodic Hann
        kernels = np.concatenate([window * np.cos(phase), window * np.sin(phase)])
        filters = slaney_filters(bands) if filters is None else filters
        self.register_buffer("dft", torch.from_numpy(kernels[:, None]).float())
        # Twice side by side, so that the sum over bins also adds the squares of cosine and sine.
        self.register_buffer("filters", torch.from_numpy(np.tile(filters, 2)[:, :, None]).float())

    def forward(self, audio: Tensor) -> Tensor:
        spectrum = functional.conv1d(audio[:, None], self.dft, stride=self.hop_samples, padding=self.padding)
        return functional.conv1d(spectrum.square(), self.filters).transpose(1, 2)


class LogMel(nn.Module):
    """Natural logarithm of mel power, float32 [batch, samples] -> [batch, frames, 64]; without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.mel = MelPower(BANDS, centred=False)

    def forward(self, audio: Tensor) -> Tensor:
        power: Tensor = self.mel(audio)
        return power.clamp_min(FLOOR).log()


def build(family: str, checkpoint: str | None) -> tuple[nn.Module, Spec]:
    """The baseline, and what it declares. Raises `UsageError` for any checkpoint."""
    if checkpoint is not None:
        raise UsageError(f"{family} has no weights; leave out the checkpoint {checkpoint!r}")
    spec = Spec(
        model_type=family,
        sample_rate=SAMPLE_RATE,
        hop_samples=HOP_SAMPLES,
        receptive_field_samples=WINDOW_SAMPLES,
        first_frame_center_samples=WINDOW_SAMPLES / 2,
        min_samples=WINDOW_SAMPLES,
        license="Apache-2.0",
        source="xares_onnx.exporters.logmel",
        comment=f"log-mel baseline without weights: {BANDS} Slaney bands, 25 ms Hann window, 10 ms hop",
    )
    return LogMel(), spec
