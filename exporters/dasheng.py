"""Dasheng and CED: Dinkel et al., Scaling up masked audio encoder learning for general audio classification (2024), and
CED: Consistent ensemble distillation for audio tagging (2023).

A vision transformer on log-mel patches: of Dasheng 64 bands and four frames, 40 ms, of CED 16 bands and 16 frames, whose
four bands are tokens of their own. Positions are learnt for about 10 s; the evaluator cuts longer audio.
The published front end floors a whole batch at 120 dB below its loudest band; here each
clip has its own floor. The checkpoint is a folder with config.json and model.safetensors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from xares_onnx.encoder.contract.tokens import Tokens
from xares_onnx.errors import UsageError
from xares_onnx.exporters.core import Spec
from xares_onnx.exporters.logmel import HOP_SAMPLES, SAMPLE_RATE, MelPower
from xares_onnx.exporters.pretrained import Checkpoint

__all__ = ["Attention", "DashengEncoder", "build", "htk_filters"]

BANDS = 64
WINDOW_SAMPLES = 512


class Family(NamedTuple):
    """The title, the bands and frames of a patch, how the checkpoint names its first normalisation, and heads by model."""

    title: str
    patch: tuple[int, int]
    normalization: str
    heads: dict[str, int]


FAMILIES = {
    "ced": Family("CED", (16, 16), "init_bn.", {"ced-tiny": 3, "ced-mini": 4, "ced-small": 6, "ced-base": 12}),
    "dasheng": Family("Dasheng", (BANDS, 4), "init_bn.1.", {"dasheng-base": 12, "dasheng-0.6B": 16, "dasheng-1.2B": 24}),
}


def htk_filters() -> NDArray[np.float64]:
    """HTK's triangles of height 1 from 0 Hz to Nyquist, (bands, window / 2 + 1)."""
    top = 2595 * np.log10(1 + SAMPLE_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    low, centre, high = (edges[i : i + BANDS, None] for i in range(3))
    bins = np.linspace(0, SAMPLE_RATE / 2, WINDOW_SAMPLES // 2 + 1)
    filters: NDArray[np.float64] = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clip(min=0.0)
    return filters


class DashengLogMel(nn.Module):
    """float32 [batch, samples] -> mel power in dB, at most 120 below the clip's loudest, [batch, 1, bands, frames]."""

    def __init__(self) -> None:
        super().__init__()
        self.power = MelPower(BANDS, centred=False, window_samples=WINDOW_SAMPLES, filters=htk_filters())

    def forward(self, audio: Tensor) -> Tensor:
        mirrored = functional.pad(audio, (WINDOW_SAMPLES // 2, WINDOW_SAMPLES // 2), mode="reflect")
        power: Tensor = self.power(mirrored)
        decibels = 10 * power.transpose(1, 2).clamp_min(1e-10).log10()
        return torch.maximum(decibels, decibels.amax(dim=(1, 2), keepdim=True) - 120)[:, None]


class Attention(nn.Module):
    """Self-attention on [batch, tokens, dim], with one matrix for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1)
        mixed: Tensor = self.proj((weights @ value).transpose(1, 2).flatten(2))
        return mixed


class _Block(nn.Module):
    def __init__(self, dim: int, inner: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, inner), "fc2": nn.Linear(inner, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        hidden: Tensor = x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))
        return hidden


class DashengBody(nn.Module):
    """Decibels [batch, 1, bands, frames] -> patches [batch, bands * times, dim], all times of the lowest band first; names
    are Dasheng's.
    """

    def __init__(self, dim: int, inner: int, depth: int, heads: int, patch: tuple[int, int], positions: int) -> None:
        super().__init__()
        self.init_bn = nn.ModuleList([nn.Identity(), nn.BatchNorm2d(BANDS)])
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, dim, patch, patch)})
        self.time_pos_embed = nn.Parameter(torch.zeros(1, dim, 1, positions))
        self.freq_pos_embed = nn.Parameter(torch.zeros(1, dim, BANDS // patch[0], 1))
        self.blocks = nn.Sequential(*(_Block(dim, inner, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, decibels: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](self.init_bn[1](decibels.transpose(1, 2)).transpose(1, 2))
        patches = patches + self.time_pos_embed[..., : patches.shape[-1]] + self.freq_pos_embed
        embeddings: Tensor = self.norm(self.blocks(patches.flatten(2).transpose(1, 2)))
        return embeddings


class DashengEncoder(nn.Module):
    """float32 [batch, samples] in [-1, 1] -> embeddings [batch, frames, dim], or patches for frames."""

    def __init__(self, body: DashengBody) -> None:
        super().__init__()
        self.front_end = DashengLogMel()
        self.body = body

    def forward(self, audio: Tensor) -> Tensor:
        embeddings: Tensor = self.body(self.front_end(audio))
        return embeddings


def build(family: str, checkpoint: str | None) -> tuple[nn.Module, Spec]:
    """The encoder of a checkpoint, and what it declares.

    Raises:
        UsageError: The checkpoint is missing, incomplete or of another architecture.
    """
    local = Checkpoint.find(family, checkpoint)
    body = _body(local, FAMILIES[family])
    positions, (patch_bands, patch_frames) = body.time_pos_embed.shape[-1], FAMILIES[family].patch
    hop, bands = patch_frames * HOP_SAMPLES, BANDS // patch_bands
    shortest = hop - HOP_SAMPLES  # a centred STFT has samples // hop + 1 frames
    longest = shortest + positions * hop - 1
    if "target_length" in local.config():  # longer audio would be split
        longest = min(longest, int(local.config()["target_length"]) * HOP_SAMPLES - 1)
    spec = Spec(
        model_type=family,
        sample_rate=SAMPLE_RATE,
        hop_samples=hop,
        receptive_field_samples=shortest,
        first_frame_center_samples=shortest / 2,
        min_samples=shortest,
        license=local.license,
        source=local.source,
        comment=f"{FAMILIES[family].title}, last layer; log-mel inside, floored for each clip by itself",
        max_samples=longest,
        chunk_samples=min(positions * hop, longest) // SAMPLE_RATE * SAMPLE_RATE or None,
        tokens=Tokens(bands=bands) if bands > 1 else None,
    )
    return DashengEncoder(body), spec


def _body(checkpoint: Checkpoint, family: Family) -> DashengBody:
    config = checkpoint.config()
    heads = config.get("num_heads", family.heads.get(str(config.get("name", "dasheng-base"))))
    if not isinstance(heads, int):
        raise UsageError(
            f"{checkpoint.folder}/config.json must have num_heads, or one of the names {', '.join(family.heads)}"
        )
    try:
        state = load_file(checkpoint.folder / "model.safetensors")
        learned = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
        # Published checkpoints may hold the front end's window and filters among their weights.
        learned = {name: value for name, value in learned.items() if not name.startswith("front_end.")}
        learned = {
            name.replace(family.normalization, "init_bn.1.") if name.startswith("init_bn.") else name: value
            for name, value in learned.items()
        }
        dim, _, bands, patch_frames = learned["patch_embed.proj.weight"].shape
        if (bands, patch_frames) != family.patch:
            raise ValueError(f"patches of {bands} bands and {patch_frames} frames")
        inner = learned["blocks.0.mlp.fc1.weight"].shape[0]
        depth = len({name.split(".")[1] for name in learned if name.startswith("blocks.")})
        body = DashengBody(dim, inner, depth, heads, family.patch, learned["time_pos_embed"].shape[-1])
        body.load_state_dict(learned)
    except (OSError, LookupError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{checkpoint.folder} is not a {family.title} encoder in safetensors: {detail}") from error
    return body.float().eval()
