"""Random checkpoints of Dasheng and CED, and both written out with PyTorch's own STFT and transformer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Sizes(NamedTuple):
    dim: int = 32
    inner: int = 64
    heads: int = 2
    depth: int = 2
    positions: int = 75
    patch: tuple[int, int] = (64, 4)  # bands and frames; CED's is (16, 16)


SMALL = Sizes()
BASE = Sizes(dim=768, inner=3072, heads=12, depth=12, positions=252)
SMALL_CED = Sizes(positions=18, patch=(16, 16))
BASE_CED = BASE._replace(positions=63, patch=(16, 16))


def save(folder: Path, sizes: Sizes = SMALL) -> Path:
    """A checkpoint with random weights of one size, so that every part matters."""
    torch.manual_seed(3)
    dim, inner = sizes.dim, sizes.inner
    shapes = {"init_bn.1.weight": (64,), "init_bn.1.bias": (64,), "init_bn.1.running_mean": (64,), "norm.weight": (dim,)}
    shapes |= {"patch_embed.proj.weight": (dim, 1, *sizes.patch), "patch_embed.proj.bias": (dim,), "norm.bias": (dim,)}
    shapes |= {"time_pos_embed": (1, dim, 1, sizes.positions), "freq_pos_embed": (1, dim, 64 // sizes.patch[0], 1)}
    for block in (f"blocks.{i}" for i in range(sizes.depth)):
        shapes |= {f"{block}.{norm}.{part}": (dim,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        for name, rows, columns in (
            ("attn.qkv", 3 * dim, dim),
            ("attn.proj", dim, dim),
            ("mlp.fc1", inner, dim),
            ("mlp.fc2", dim, inner),
        ):
            shapes |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
    state = {name: torch.randn(shape) * 1.2 * np.prod(shape[1:] or (4,)) ** -0.5 for name, shape in shapes.items()}
    state |= {name: 1 + 0.3 * value for name, value in state.items() if "norm" in name and name.endswith("weight")}
    state["init_bn.1.running_mean"] -= 20
    state["init_bn.1.running_var"] = 100 + 50 * torch.rand(64)
    state["init_bn.1.num_batches_tracked"] = torch.tensor(7)
    family = "dasheng" if sizes.patch[0] == 64 else "ced"
    if family == "ced":
        state = {name.replace("init_bn.1.", "init_bn."): value for name, value in state.items()}
    folder.mkdir()
    save_file({f"encoder.{name}": value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    config = {"model_type": family, "name": f"{family}-base", "num_heads": sizes.heads}
    if family == "ced":
        config["target_length"] = sizes.positions * sizes.patch[1] + 4  # 1012 frames at 63 positions
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Reference(nn.Module):
    """float32 [1, samples] -> [1, bands * frames, dim] by `torch.stft`, `nn.TransformerEncoder` and HTK's formula."""

    def __init__(self, folder: Path, top_db: float = 120) -> None:
        super().__init__()
        self.top_db = top_db
        stored = load_file(folder / "model.safetensors")
        self.state = {
            name.removeprefix("encoder.").replace("init_bn.1.", "init_bn."): value for name, value in stored.items()
        }
        inner, dim = self.state["blocks.0.mlp.fc1.weight"].shape
        depth = sum(name.endswith("mlp.fc1.weight") for name in self.state)
        heads = json.loads((folder / "config.json").read_text())["num_heads"]
        layer = nn.TransformerEncoderLayer(dim, heads, inner, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim, eps=1e-6), enable_nested_tensor=False)
        renamed = {f"norm.{part}": self.state[f"norm.{part}"] for part in ("weight", "bias")}
        for name, value in self.state.items():
            if name.startswith("blocks."):
                name = name.replace("blocks", "layers").replace("attn.qkv.", "self_attn.in_proj_")
                name = name.replace("attn.proj", "self_attn.out_proj").replace("mlp.fc", "linear")
                renamed[name] = value
        self.blocks.load_state_dict(renamed)
        self.eval()

    def forward(self, audio: Tensor) -> Tensor:
        state = self.state
        spectrum = torch.stft(audio.double(), 512, 160, window=torch.hann_window(512).double(), return_complex=True)
        mels = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 66)
        edges = 700 * (10 ** (mels / 2595) - 1)
        bins = np.linspace(0, 8000, 257)
        filters = np.stack([np.interp(bins, edges[band : band + 3], [0, 1, 0]) for band in range(64)])
        decibels = 10 * (torch.from_numpy(filters) @ spectrum.abs().square()).clamp_min(1e-10).log10()
        decibels = decibels.clamp_min(decibels.max().item() - self.top_db)[0]
        mean, variance = state["init_bn.running_mean"], state["init_bn.running_var"]
        scaled = (decibels - mean[:, None]) / (variance[:, None] + 1e-5).sqrt()
        scaled = scaled * state["init_bn.weight"][:, None] + state["init_bn.bias"][:, None]
        weight = state["patch_embed.proj.weight"][:, 0]
        bands, frames = weight.shape[1:]
        whole = scaled[:, : scaled.shape[1] // frames * frames].float()
        patches = whole.unflatten(1, (-1, frames)).unflatten(0, (-1, bands))  # rows of patches, bands, columns, frames
        embedded = torch.einsum("rbpf,dbf->rpd", patches, weight) + state["patch_embed.proj.bias"]
        embedded = embedded + state["time_pos_embed"][0, :, 0, : embedded.shape[1]].T
        embedded = embedded + state["freq_pos_embed"][0, :, :, 0].T[:, None]
        hidden: Tensor = self.blocks(embedded.flatten(0, 1)[None])
        return hidden
