"""wav2vec 2.0 BERT: Barrault et al., Seamless: Multilingual Expressive and Streaming Speech Translation (2023).

A conformer on Kaldi's filter banks, two frames side by side; each band of a clip has mean 0 and variance 1. The file has all
of that inside and gives the last hidden state.
"""

from __future__ import annotations

from torch import Tensor, nn

from xares_onnx.errors import UsageError
from xares_onnx.exporters.core import Spec
from xares_onnx.exporters.kaldi import KaldiFbank
from xares_onnx.exporters.pretrained import Checkpoint, LastHiddenState

__all__ = ["StackedFbank", "Wav2Vec2Bert", "build"]

SAMPLE_RATE = 16_000
BANDS, STACKED = 80, 2


class StackedFbank(nn.Module):
    """float32 [batch, samples] -> [batch, frames // 2, 2 * bands], normalised for each clip and band."""

    def __init__(self) -> None:
        super().__init__()
        self.fbank = KaldiFbank(SAMPLE_RATE, scale=2.0**15, mels=BANDS)

    def forward(self, audio: Tensor) -> Tensor:
        bands: Tensor = self.fbank(audio)
        centred = bands - bands.mean(dim=1, keepdim=True)
        variance = centred.square().sum(dim=1, keepdim=True) / (bands.shape[1] - 1)
        normalized = centred / (variance + 1e-7).sqrt()  # as the preprocessor has it
        pairs: Tensor = normalized[:, : bands.shape[1] // STACKED * STACKED].reshape(audio.shape[0], -1, STACKED * BANDS)
        return pairs


class Wav2Vec2Bert(nn.Module):
    """float32 [batch, samples] in [-1, 1] -> the last hidden state [batch, frames, dim], one every 20 ms."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.front_end = StackedFbank()
        self.body = LastHiddenState(model)

    def forward(self, audio: Tensor) -> Tensor:
        hidden: Tensor = self.body(self.front_end(audio))
        return hidden


def build(family: str, checkpoint: str | None) -> tuple[nn.Module, Spec]:
    """The encoder of a checkpoint, and what it declares.

    Raises:
        UsageError: The checkpoint is missing, incomplete, has another front end, or an adapter.
    """
    local = Checkpoint.find(family, checkpoint)
    settings = local.preprocessor()
    for name, value in {"sampling_rate": SAMPLE_RATE, "num_mel_bins": BANDS, "stride": STACKED}.items():
        if settings.get(name, value) != value:
            raise UsageError(
                f"{local.folder}/preprocessor_config.json has {name}={settings[name]}; only {value} is supported"
            )
    model = local.load()
    if model.config.add_adapter:
        raise UsageError(f"{local.folder} has an adapter after its encoder, which is not supported; use the plain encoder")
    frontend = KaldiFbank(SAMPLE_RATE, mels=BANDS).frontend
    hop, receptive = STACKED * frontend.hop_samples, frontend.window_samples + frontend.hop_samples
    spec = Spec(
        model_type=family,
        sample_rate=SAMPLE_RATE,
        hop_samples=hop,
        receptive_field_samples=receptive,
        first_frame_center_samples=receptive / 2,
        min_samples=receptive,
        license=local.license,
        source=local.source,
        comment="wav2vec 2.0 BERT, last hidden state; filter banks inside, each clip and band normalised by itself",
    )
    return Wav2Vec2Bert(model), spec
