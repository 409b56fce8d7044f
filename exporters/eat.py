"""EAT and SSLAM: Chen et al., EAT: Self-Supervised Pre-Training with Efficient Audio Transformer (2024); Alex et al.,
SSLAM: Enhancing Self-Supervised Models with Audio Mixtures for Polyphonic Soundscapes (2025).

A transformer on 16 x 16 patches of Kaldi's filter banks, about 10 s of them: shorter audio is followed by features of zero.
The file pads inside, keeps the patches that lie in the audio whole, and gives them after the class token, all bands of the
first time first. The checkpoint is a folder with config.json and model.safetensors.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from xares_onnx.encoder.contract.tokens import Tokens
from xares_onnx.errors import UsageError
from xares_onnx.exporters.core import Spec
from xares_onnx.exporters.dasheng import Attention
from xares_onnx.exporters.kaldi import KaldiFbank
from xares_onnx.exporters.pretrained import Checkpoint
from xares_onnx.exporters.spectrogram_transformer import FixedFbank

__all__ = ["EatBody", "EatEncoder", "build"]

SAMPLE_RATE = 16_000
BANDS, PATCH, FRAMES = 128, 16, 1024
MEAN, DEVIATION = -4.268, 2 * 4.569  # of AudioSet, as the model cards have them
IGNORED = ("head.", "fc_norm.")  # of fine-tuned models


class _Block(nn.Module):
    def __init__(self, dim: int, inner: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, inner), "fc2": nn.Linear(inner, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        hidden: Tensor = self.norm2(x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](x))))
        return hidden


class EatBody(nn.Module):
    """Filter banks [batch, frames, 128] -> tokens [batch, 1 + times * bands, dim]; names are the checkpoint's."""

    def __init__(self, dim: int, inner: int, depth: int, heads: int, positions: int) -> None:
        super().__init__()
        self.local_encoder = nn.ModuleDict({"proj": nn.Conv2d(1, dim, PATCH, PATCH)})
        self.extra_tokens = nn.Parameter(torch.zeros(1, 1, dim))
        self.fixed_positional_encoder = nn.ParameterDict({"positions": torch.zeros(1, positions, dim)})
        self.pre_norm = nn.LayerNorm(dim, eps=1e-6)
        self.blocks = nn.Sequential(*(_Block(dim, inner, heads) for _ in range(depth)))

    def forward(self, banks: Tensor) -> Tensor:
        patches = self.local_encoder["proj"](banks[:, None]).flatten(2).transpose(1, 2)
        patches = patches + self.fixed_positional_encoder["positions"][:, : patches.shape[1]]
        leading = self.extra_tokens.expand(banks.shape[0], -1, -1)
        tokens: Tensor = self.blocks(self.pre_norm(torch.cat([leading, patches], dim=1)))
        return tokens


class EatEncoder(nn.Module):
    """float32 [batch, samples] in [-1, 1] -> tokens [batch, 1 + times * bands, dim]."""

    def __init__(self, body: EatBody, frames: int, tokens: Tokens, hop: int, receptive: int) -> None:
        super().__init__()
        self.front_end = FixedFbank(KaldiFbank(SAMPLE_RATE, mels=BANDS, window="hann"), frames, MEAN, DEVIATION)
        self.body = body
        self.tokens, self.hop, self.receptive = tokens, hop, receptive

    def forward(self, audio: Tensor) -> Tensor:
        times = (audio.shape[1] - self.receptive) // self.hop + 1
        tokens: Tensor = self.body(self.front_end(audio))[:, : self.tokens.prefix + self.tokens.bands * times]
        return tokens


def build(family: str, checkpoint: str | None) -> tuple[nn.Module, Spec]:
    """The encoder of a checkpoint, and what it declares.

    Raises:
        UsageError: The checkpoint is missing, incomplete or of another architecture.
    """
    local = Checkpoint.find(family, checkpoint)
    config = local.config()
    for name, value in {"patch_size": PATCH, "stride": PATCH, "mel_bins": BANDS, "layer_norm_first": False}.items():
        if config.get(name, value) != value:
            raise UsageError(f"{local.folder}/config.json has {name}={config[name]}; only {value} is supported")
    body = _body(local, config)
    tokens = Tokens(prefix=1, bands=BANDS // PATCH, first="time")
    size = config.get("img_size")
    positions = body.fixed_positional_encoder["positions"].shape[1] // tokens.bands
    frames = min(size[0] if isinstance(size, list) else FRAMES, positions * PATCH)
    window, step = 400, 160
    hop, receptive = PATCH * step, window + (PATCH - 1) * step
    longest = window + frames * step - 1
    spec = Spec(
        model_type=family,
        sample_rate=SAMPLE_RATE,
        hop_samples=hop,
        receptive_field_samples=receptive,
        first_frame_center_samples=receptive / 2,
        min_samples=receptive,
        license=local.license,
        source=local.source,
        comment="EAT, last layer; filter banks inside, followed by zeros up to its window",
        max_samples=longest,
        chunk_samples=longest // SAMPLE_RATE * SAMPLE_RATE or None,
        tokens=tokens,
    )
    return EatEncoder(body, frames, tokens, hop, receptive), spec


def _body(checkpoint: Checkpoint, config: dict[str, Any]) -> EatBody:
    try:
        state = load_file(checkpoint.folder / "model.safetensors")
        own = {name.removeprefix("model."): value for name, value in state.items()}
        learned = {name: value for name, value in own.items() if not name.startswith(IGNORED)}
        inner, dim = learned["blocks.0.mlp.fc1.weight"].shape
        depth = len({name.split(".")[1] for name in learned if name.startswith("blocks.")})
        positions = learned["fixed_positional_encoder.positions"].shape[1]
        body = EatBody(dim, inner, depth, int(config["num_heads"]), positions)
        body.load_state_dict(learned)
    except (OSError, LookupError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{checkpoint.folder} is not an EAT encoder in safetensors: {detail}") from error
    return body.float().eval()
