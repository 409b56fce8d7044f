"""BEATs and OpenBEATs: Chen et al., BEATs: Audio Pre-Training with Acoustic Tokenizers (2023); Bharadwaj et al., OpenBEATs:
A Fully Open-Source General-Purpose Audio Encoder (2025).

A transformer on 16 x 16 patches of Kaldi's filter banks, with relative positions that each head gates. Tokens are the last
layer's, all bands of the first time first. The checkpoint is a folder with model.safetensors, and with the published file's
`cfg` as config.json, its `model_type` beats.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from xares_onnx.encoder.contract.tokens import Tokens
from xares_onnx.errors import UsageError
from xares_onnx.exporters.core import Spec
from xares_onnx.exporters.kaldi import KaldiFbank
from xares_onnx.exporters.pretrained import Checkpoint

__all__ = ["BeatsBody", "BeatsEncoder", "build"]

SAMPLE_RATE = 16_000
BANDS = 128
# Of the settings of a checkpoint, what its `cfg` may leave out.
DEFAULTS: dict[str, Any] = {
    "input_patch_size": 16,
    "embed_dim": 512,
    "conv_bias": False,
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "deep_norm": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "relative_position_embedding": False,
    "num_buckets": 320,
    "max_distance": 1280,
    "gru_rel_pos": False,
    "fbank_mean": 15.41663,
    "fbank_std": 6.55582,
}
NEEDED = {"activation_fn": "gelu", "relative_position_embedding": True, "gru_rel_pos": True}
# What a checkpoint holds besides: the head of a fine-tuned model, and what only padding needs.
IGNORED = ("predictor", "patch_embedding_pad.", "raw2fbank_pad.")


def _bucket(distances: Tensor, buckets: int, longest: int) -> Tensor:
    """The bucket of each distance: half of them for each direction, half of these for one distance each, the rest on a
    logarithmic scale.
    """
    half = buckets // 2
    exact = half // 2
    sizes = distances.abs()
    far = (sizes.clamp_min(exact).float() / exact).log() / math.log(longest / exact) * (half - exact)
    near = torch.where(sizes < exact, sizes, (exact + far.long()).clamp_max(half - 1))
    return near + (distances > 0).long() * half


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.grep_linear = nn.Linear(dim // heads, 8)
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Hidden states [batch, tokens, dim] and biases [heads, tokens, tokens]."""
        query, key, value = (
            linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        gates = self.grep_linear(query).unflatten(3, (2, 4)).sum(-1).sigmoid()
        gate = gates[..., :1] * (gates[..., 1:] * self.grep_a - 1) + 2
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1) + gate * bias
        mixed: Tensor = self.out_proj((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
        return mixed


class _Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        dim, inner = config["encoder_embed_dim"], config["encoder_ffn_embed_dim"]
        self.self_attn = _Attention(dim, config["encoder_attention_heads"])
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)
        self.norm_first = config["layer_norm_first"]
        self.weight = (2 * config["encoder_layers"]) ** 0.25 if config["deep_norm"] else 1.0

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.self_attn(self.self_attn_layer_norm(x), bias)
            ahead: Tensor = x + self.fc2(functional.gelu(self.fc1(self.final_layer_norm(x))))
            return ahead
        x = self.self_attn_layer_norm(self.weight * x + self.self_attn(x, bias))
        hidden: Tensor = self.final_layer_norm(self.weight * x + self.fc2(functional.gelu(self.fc1(x))))
        return hidden


class _Layers(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        dim, taps = config["encoder_embed_dim"], config["conv_pos"]
        self.pos_conv = nn.Conv1d(dim, dim, taps, padding=taps // 2, groups=config["conv_pos_groups"])
        self.layer_norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config["encoder_layers"]))
        self.relative_attention_bias = nn.Embedding(config["num_buckets"], config["encoder_attention_heads"])
        self.norm_first = config["layer_norm_first"]
        self.buckets, self.longest = config["num_buckets"], config["max_distance"]

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] to the same."""
        places = self.pos_conv(x.transpose(1, 2))[..., : x.shape[1]]  # an even kernel gives one too many
        x = x + functional.gelu(places).transpose(1, 2)
        x = x if self.norm_first else self.layer_norm(x)
        bias = self._bias(x)
        for layer in self.layers:
            x = layer(x, bias)
        hidden: Tensor = self.layer_norm(x) if self.norm_first else x
        return hidden

    def _bias(self, x: Tensor) -> Tensor:
        """[heads, tokens, tokens], before gating."""
        places = torch.arange(x.shape[1], device=x.device)
        buckets = _bucket(places[None] - places[:, None], self.buckets, self.longest)
        bias: Tensor = self.relative_attention_bias(buckets).permute(2, 0, 1)
        return bias


class BeatsBody(nn.Module):
    """Filter banks [batch, frames, 128] -> tokens [batch, times * bands, dim]; names are the checkpoint's."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        patch, narrow, dim = config["input_patch_size"], config["embed_dim"], config["encoder_embed_dim"]
        self.patch_embedding = nn.Conv2d(1, narrow, patch, patch, bias=config["conv_bias"])
        self.layer_norm = nn.LayerNorm(narrow)
        self.post_extract_proj = nn.Linear(narrow, dim) if narrow != dim else nn.Identity()
        self.encoder = _Layers(config)

    def forward(self, banks: Tensor) -> Tensor:
        patches = self.patch_embedding(banks[:, None]).flatten(2).transpose(1, 2)
        tokens: Tensor = self.encoder(self.post_extract_proj(self.layer_norm(patches)))
        return tokens


class NormalizedFbank(nn.Module):
    """float32 [batch, samples] -> filter banks [batch, frames, 128], normalised by the checkpoint's mean and deviation."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.fbank = KaldiFbank(SAMPLE_RATE, scale=2.0**15, mels=BANDS)
        self.mean, self.deviation = mean, deviation

    def forward(self, audio: Tensor) -> Tensor:
        banks: Tensor = (self.fbank(audio) - self.mean) / self.deviation
        return banks


class BeatsEncoder(nn.Module):
    """float32 [batch, samples] in [-1, 1] -> tokens [batch, times * bands, dim]."""

    def __init__(self, body: BeatsBody) -> None:
        super().__init__()
        self.front_end = NormalizedFbank(body.config["fbank_mean"], 2 * body.config["fbank_std"])
        self.body = body

    def forward(self, audio: Tensor) -> Tensor:
        tokens: Tensor = self.body(self.front_end(audio))
        return tokens


def build(family: str, checkpoint: str | None) -> tuple[nn.Module, Spec]:
    """The encoder of a checkpoint, and what it declares.

    Raises:
        UsageError: The checkpoint is missing, incomplete or of another architecture.
    """
    local = Checkpoint.find(family, checkpoint)
    encoder = BeatsEncoder(_body(local))
    frontend, patch = encoder.front_end.fbank.frontend, encoder.body.config["input_patch_size"]
    receptive = frontend.window_samples + (patch - 1) * frontend.hop_samples
    spec = Spec(
        model_type=family,
        sample_rate=SAMPLE_RATE,
        hop_samples=patch * frontend.hop_samples,
        receptive_field_samples=receptive,
        first_frame_center_samples=receptive / 2,
        min_samples=receptive,
        license=local.license,
        source=local.source,
        comment="BEATs, last layer; filter banks inside",
        tokens=Tokens(bands=BANDS // patch, first="time"),
    )
    return encoder, spec


def _body(checkpoint: Checkpoint) -> BeatsBody:
    config = DEFAULTS | {name: value for name, value in checkpoint.config().items() if name in DEFAULTS}
    for name, value in NEEDED.items():
        if config[name] != value:
            raise UsageError(f"{checkpoint.folder}/config.json has {name}={config[name]}; only {value} is supported")
    try:
        state = load_file(checkpoint.folder / "model.safetensors")
        nested = any(name.startswith("encoder.patch_embedding.") for name in state)
        own = {name.removeprefix("encoder.") if nested else name: value for name, value in state.items()}
        body = BeatsBody(config)
        body.load_state_dict(_renamed(own))
    except (OSError, LookupError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{checkpoint.folder} is not a BEATs encoder in safetensors: {detail}") from error
    return body.float().eval()


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the body, from a checkpoint's: its layers share one table of relative positions, and the weights of the
    convolution are directions with a norm per tap.
    """
    learned = {}
    for name, value in state.items():
        if name.startswith(IGNORED) or name.startswith("encoder.pos_conv."):
            continue
        if name.endswith(".self_attn.relative_attention_bias.weight"):
            name = "encoder.relative_attention_bias.weight"
        learned[name] = value
    directions, norms = state["encoder.pos_conv.0.weight_v"], state["encoder.pos_conv.0.weight_g"]
    learned["encoder.pos_conv.weight"] = norms * directions / directions.norm(dim=(0, 1), keepdim=True)
    learned["encoder.pos_conv.bias"] = state["encoder.pos_conv.0.bias"]
    return learned
