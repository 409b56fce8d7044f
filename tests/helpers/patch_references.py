"""Random checkpoints of BEATs and EAT, and both written out plainly, one head and one distance at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

BEATS = {
    "embed_dim": 24,
    "encoder_layers": 2,
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_attention_heads": 4,
    "conv_pos": 16,
    "conv_pos_groups": 4,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "deep_norm": True,
    "layer_norm_first": False,
    "num_buckets": 40,
    "max_distance": 100,
}
EAT = {"embed_dim": 32, "num_heads": 2, "depth": 2, "mlp_ratio": 2.0, "img_size": [160, 128], "patch_size": 16, "stride": 16}


def filter_banks(audio: Tensor, shape: str, scale: float) -> Tensor:
    """Kaldi's, float32 [1, samples] -> [frames, 128]."""
    filters = mel_filter_bank(257, 128, 20, 8000, 16_000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True)
    banks = spectrogram(
        scale * audio[0].double().numpy(),
        window_function(400, shape, periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=1.192092955078125e-07,
        remove_dc_offset=True,
    )
    return torch.from_numpy(banks.T.copy()).float()


def save_beats(folder: Path, **changes: Any) -> Path:
    config = BEATS | changes
    narrow, dim, inner = config["embed_dim"], config["encoder_embed_dim"], config["encoder_ffn_embed_dim"]
    heads, taps = config["encoder_attention_heads"], config["conv_pos"]
    shapes = {"patch_embedding.weight": (narrow, 1, 16, 16), "post_extract_proj.weight": (dim, narrow)}
    shapes |= {"post_extract_proj.bias": (dim,), "layer_norm.weight": (narrow,), "layer_norm.bias": (narrow,)}
    shapes |= {"encoder.layer_norm.weight": (dim,), "encoder.layer_norm.bias": (dim,), "encoder.pos_conv.0.bias": (dim,)}
    shapes |= {"encoder.pos_conv.0.weight_v": (dim, dim // config["conv_pos_groups"], taps)}
    shapes |= {"encoder.pos_conv.0.weight_g": (1, 1, taps), "predictor.weight": (5, dim), "predictor.bias": (5,)}
    for number in range(config["encoder_layers"]):
        layer = f"encoder.layers.{number}"
        linears = [(f"self_attn.{name}_proj", dim, dim) for name in "qkv"] + [("self_attn.out_proj", dim, dim)]
        for name, rows, columns in [
            *linears,
            ("self_attn.grep_linear", 8, dim // heads),
            ("fc1", inner, dim),
            ("fc2", dim, inner),
        ]:
            shapes |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shapes |= {f"{layer}.{name}.weight": (dim,), f"{layer}.{name}.bias": (dim,)}
        shapes[f"{layer}.self_attn.grep_a"] = (1, heads, 1, 1)
    state = _random(shapes)
    table = torch.randn(config["num_buckets"], heads)
    for number in range(config["encoder_layers"]):  # one table, which every layer names
        state[f"encoder.layers.{number}.self_attn.relative_attention_bias.weight"] = table.clone()
    return _write(folder, state, {"model_type": "beats", **config})


def save_eat(folder: Path, **changes: Any) -> Path:
    config = EAT | changes
    dim = config["embed_dim"]
    inner = int(dim * config["mlp_ratio"])
    shapes = {"local_encoder.proj.weight": (dim, 1, 16, 16), "local_encoder.proj.bias": (dim,), "extra_tokens": (1, 1, dim)}
    positions = config["img_size"][0] // 16 * 8 + 16  # more than the window has
    shapes |= {"fixed_positional_encoder.positions": (1, positions, dim), "fc_norm.weight": (dim,)}
    shapes |= {"pre_norm.weight": (dim,), "pre_norm.bias": (dim,)}
    for number in range(config["depth"]):
        linears = (("attn.qkv", 3 * dim, dim), ("attn.proj", dim, dim), ("mlp.fc1", inner, dim), ("mlp.fc2", dim, inner))
        for name, rows, columns in linears:
            shapes |= {f"blocks.{number}.{name}.weight": (rows, columns), f"blocks.{number}.{name}.bias": (rows,)}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{number}.{name}.weight": (dim,), f"blocks.{number}.{name}.bias": (dim,)}
    state = {f"model.{name}": value for name, value in _random(shapes).items()}
    return _write(folder, state, {"model_type": "eat", **config})


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Weights and biases of one size, so that every part matters."""
    torch.manual_seed(3)
    state = {name: torch.randn(shape) * 1.2 * np.prod(shape[1:] or (4,)) ** -0.5 for name, shape in shapes.items()}
    return state | {name: 1 + 0.3 * value for name, value in state.items() if "norm" in name and name.endswith("weight")}


def _write(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class EatReference(nn.Module):
    """float32 [1, samples] -> [1, 1 + times * 8, dim] by `nn.TransformerEncoder`; `mean` is of the filter banks."""

    def __init__(self, folder: Path, mean: float = -4.268) -> None:
        super().__init__()
        self.mean, config = mean, json.loads((folder / "config.json").read_text())
        stored = load_file(folder / "model.safetensors")
        self.state = {name.removeprefix("model."): value for name, value in stored.items()}
        self.frames, dim = config["img_size"][0], config["embed_dim"]
        layer = nn.TransformerEncoderLayer(
            dim, config["num_heads"], int(dim * config["mlp_ratio"]), 0.0, "gelu", 1e-6, batch_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, config["depth"], enable_nested_tensor=False)
        renamed = {}
        for name, value in self.state.items():
            if name.startswith("blocks."):
                name = name.replace("blocks", "layers").replace("attn.qkv.", "self_attn.in_proj_")
                renamed[name.replace("attn.proj", "self_attn.out_proj").replace("mlp.fc", "linear")] = value
        self.blocks.load_state_dict(renamed)
        self.eval()

    def forward(self, audio: Tensor) -> Tensor:
        state, banks = self.state, filter_banks(audio, "hann", 1.0)
        padded = torch.zeros(self.frames, 128)
        padded[: len(banks)] = banks[: self.frames]
        scaled = (padded - self.mean) / (2 * 4.569)
        patches = scaled.reshape(-1, 16, 8, 16).transpose(1, 2).reshape(-1, 256)  # times and bands, frames and bins
        embedded = patches @ state["local_encoder.proj.weight"].flatten(1).T + state["local_encoder.proj.bias"]
        embedded = embedded + state["fixed_positional_encoder.positions"][0, : len(embedded)]
        tokens = torch.cat([state["extra_tokens"][0], embedded])
        tokens = functional.layer_norm(tokens, tokens.shape[1:], state["pre_norm.weight"], state["pre_norm.bias"], 1e-6)
        times = (audio.shape[1] - 2800) // 2560 + 1
        hidden: Tensor = self.blocks(tokens[None])[:, : 1 + 8 * times]
        return hidden


class BeatsReference(nn.Module):
    """float32 [1, samples] -> [1, times * 8, dim]; `gated` False is what an exporter would do that forgot the gates."""

    def __init__(self, folder: Path, *, gated: bool = True) -> None:
        super().__init__()
        self.state, self.gated = load_file(folder / "model.safetensors"), gated
        self.config = json.loads((folder / "config.json").read_text())
        self.buckets: dict[int, Tensor] = {}

    def forward(self, audio: Tensor) -> Tensor:
        state, config = self.state, self.config
        banks = (filter_banks(audio, "povey", 2.0**15) - 15.41663) / (2 * 6.55582)
        banks = banks[: len(banks) // 16 * 16]
        patches = banks.reshape(-1, 16, 8, 16).transpose(1, 2).reshape(-1, 256)
        x = self._norm(patches @ state["patch_embedding.weight"].flatten(1).T, "layer_norm")
        x = self._linear(x, "post_extract_proj")
        directions, norms = state["encoder.pos_conv.0.weight_v"], state["encoder.pos_conv.0.weight_g"]
        weight = torch.stack([norms[0, 0, i] * tap / tap.norm() for i, tap in enumerate(directions.unbind(2))], dim=2)
        padded = functional.pad(x.T[None], (config["conv_pos"] // 2, config["conv_pos"] // 2 - 1))
        places = functional.conv1d(padded, weight, state["encoder.pos_conv.0.bias"], groups=config["conv_pos_groups"])
        x = x + functional.gelu(places[0].T)
        x = x if config["layer_norm_first"] else self._norm(x, "encoder.layer_norm")
        alpha = (2 * config["encoder_layers"]) ** 0.25 if config["deep_norm"] else 1.0
        for number in range(config["encoder_layers"]):
            layer = f"encoder.layers.{number}"
            if config["layer_norm_first"]:
                x = x + self._attention(self._norm(x, f"{layer}.self_attn_layer_norm"), layer)
                x = x + self._ahead(self._norm(x, f"{layer}.final_layer_norm"), layer)
            else:
                x = self._norm(alpha * x + self._attention(x, layer), f"{layer}.self_attn_layer_norm")
                x = self._norm(alpha * x + self._ahead(x, layer), f"{layer}.final_layer_norm")
        return (self._norm(x, "encoder.layer_norm") if config["layer_norm_first"] else x)[None]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, x.shape[1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def _ahead(self, x: Tensor, layer: str) -> Tensor:
        return self._linear(functional.gelu(self._linear(x, f"{layer}.fc1")), f"{layer}.fc2")

    def _attention(self, x: Tensor, layer: str) -> Tensor:
        heads, count = self.config["encoder_attention_heads"], len(x)
        query, key, value = (self._linear(x, f"{layer}.self_attn.{name}_proj").chunk(heads, dim=1) for name in "qkv")
        table = self.state[f"{layer}.self_attn.relative_attention_bias.weight"]
        if count not in self.buckets:
            self.buckets[count] = torch.tensor([[self._bucket(j - i) for j in range(count)] for i in range(count)])
        mixed = []
        for head in range(heads):
            halves = self._linear(query[head], f"{layer}.self_attn.grep_linear").reshape(count, 2, 4).sum(-1).sigmoid()
            gate = halves[:, :1] * (halves[:, 1:] * self.state[f"{layer}.self_attn.grep_a"][0, head, 0, 0] - 1) + 2
            bias = (gate if self.gated else 1.0) * table[self.buckets[count], head]
            scores = query[head] @ key[head].T / math.sqrt(x.shape[1] / heads) + bias
            mixed.append(scores.softmax(-1) @ value[head])
        return self._linear(torch.cat(mixed, dim=1), f"{layer}.self_attn.out_proj")

    def _bucket(self, distance: int) -> int:
        half = self.config["num_buckets"] // 2
        exact, size = half // 2, abs(distance)
        if size >= exact:
            share = math.log(size / exact) / math.log(self.config["max_distance"] / exact)
            size = min(exact + int(share * (half - exact)), half - 1)
        return size + (half if distance > 0 else 0)
