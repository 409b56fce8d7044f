"""Dasheng, as a random checkpoint, against torch's own STFT and transformer, run one clip at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import write_task, write_tones
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xares_onnx.encoder import load_encoder
from xares_onnx.errors import ModelError, UsageError
from xares_onnx.evaluation import evaluate
from xares_onnx.exporters import core, dasheng, export

pytestmark = pytest.mark.usefixtures("shared_process")

DIM, HEADS, DEPTH, POSITIONS = 32, 2, 2, 75


def save(folder: Path) -> Path:
    torch.manual_seed(3)
    shapes = {"init_bn.1.weight": (64,), "init_bn.1.bias": (64,), "init_bn.1.running_mean": (64,), "norm.weight": (DIM,)}
    shapes |= {"patch_embed.proj.weight": (DIM, 1, 64, 4), "patch_embed.proj.bias": (DIM,), "norm.bias": (DIM,)}
    shapes |= {"time_pos_embed": (1, DIM, 1, POSITIONS), "freq_pos_embed": (1, DIM, 1, 1)}
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        shapes |= {f"{block}.{norm}.{part}": (DIM,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        for name, rows, columns in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 2, 1), ("mlp.fc2", 1, 2)):
            shapes |= {f"{block}.{name}.weight": (rows * DIM, columns * DIM), f"{block}.{name}.bias": (rows * DIM,)}
    state = {name: torch.randn(shape) * 1.2 * np.prod(shape[1:] or (4,)) ** -0.5 for name, shape in shapes.items()}
    state |= {name: 1 + 0.3 * value for name, value in state.items() if "norm" in name and name.endswith("weight")}
    state["init_bn.1.running_mean"] -= 20
    state["init_bn.1.running_var"] = 100 + 50 * torch.rand(64)
    state["init_bn.1.num_batches_tracked"] = torch.tensor(7)
    folder.mkdir()
    save_file({f"encoder.{name}": value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "dasheng", "name": "dasheng-base", "num_heads": HEADS}))
    return folder


class Reference(nn.Module):
    """float32 [1, samples] -> [1, frames, dim] by `torch.stft`, `nn.TransformerEncoder` and HTK's formula written out."""

    def __init__(self, folder: Path, top_db: float = 120) -> None:
        super().__init__()
        self.top_db = top_db
        stored = load_file(folder / "model.safetensors")
        self.state = {name.removeprefix("encoder."): value for name, value in stored.items()}
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, DEPTH, nn.LayerNorm(DIM, eps=1e-6), enable_nested_tensor=False)
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
        mean, variance = state["init_bn.1.running_mean"], state["init_bn.1.running_var"]
        scaled = (decibels - mean[:, None]) / (variance[:, None] + 1e-5).sqrt()
        scaled = scaled * state["init_bn.1.weight"][:, None] + state["init_bn.1.bias"][:, None]
        patches = scaled[:, : scaled.shape[1] // 4 * 4].float().unflatten(1, (-1, 4))  # bands, patches, frames
        weight = state["patch_embed.proj.weight"][:, 0]
        embedded = torch.einsum("bpf,dbf->pd", patches, weight) + state["patch_embed.proj.bias"]
        embedded = embedded + state["time_pos_embed"][0, :, 0, : len(embedded)].T + state["freq_pos_embed"][0, :, 0, 0]
        hidden: Tensor = self.blocks(embedded[None])
        return hidden


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoints") / "small-dasheng")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("dasheng", str(checkpoint), tmp_path_factory.mktemp("exported") / "dasheng.onnx").path


def test_the_file_is_stft_and_transformer(checkpoint: Path, exported: Path) -> None:
    spec = dasheng.build(str(checkpoint))[1]
    with torch.no_grad():
        reference = Reference(checkpoint)
        assert core.check_parity(reference, exported, spec) < 1e-4
        with pytest.raises(ModelError, match="differs from the torch module"):
            core.check_parity(Reference(checkpoint, top_db=20), exported, spec)
        one, other = (reference(0.1 * torch.randn(1, 9_001)) for _ in range(2))
        assert (one - other).abs().max() > 100 * core.TOLERANCE["fp32"] * one.abs().max()


def test_the_contract(checkpoint: Path, exported: Path) -> None:
    audio = (0.1 * np.random.default_rng(0).standard_normal(40_001)).astype(np.float32)
    with load_encoder(exported, device="cpu", threads=1) as encoder:
        contract = encoder.info.contract
        (embedding,) = encoder.embed([audio], rate=16_000)
    assert (contract.hop_samples, contract.receptive_field_samples, contract.dim) == (640, 480, DIM)
    assert (contract.min_samples, contract.max_samples, contract.chunk_samples) == (480, 480 + 640 * 75 - 1, 48_000)
    assert (contract.first_frame_center_samples, contract.batch_coupled) == (240, False)
    with torch.no_grad():
        expected = Reference(checkpoint)(torch.from_numpy(audio)[None])[0].numpy()
    np.testing.assert_allclose(embedding.frames, expected, atol=1e-4)


def test_a_floor_over_the_batch_is_caught(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = dasheng.DashengLogMel.forward

    def coupled(self: dasheng.DashengLogMel, audio: Tensor) -> Tensor:
        decibels = apart(self, audio)
        return torch.maximum(decibels, decibels.max() - 20)

    monkeypatch.setattr(dasheng.DashengLogMel, "forward", coupled)
    with pytest.raises(ModelError, match=r"differs from the torch module by .* and batch 2"):
        export("dasheng", str(checkpoint), tmp_path / "out.onnx")


@pytest.mark.parametrize("options", [{}, {"dtype": "fp16"}, {"quantize": "int8-dynamic"}], ids=str)
def test_dasheng_ends_in_a_score(options: dict[str, str], checkpoint: Path, tmp_path: Path) -> None:
    path = export("dasheng", str(checkpoint), tmp_path / "dasheng.onnx", **options).path
    write_tones(tmp_path / "data", noise=0.1)
    task = write_task(tmp_path, "tones")
    done = evaluate(path, [str(task)], data=tmp_path / "data", cache=tmp_path / "cache", methods=["knn"], device="cpu")
    (result,) = done.result.tasks
    assert result.score is not None
    assert result.score > 0.4  # chance is 0.25


@pytest.mark.parametrize("lost", ["encoder.norm.bias", "encoder.patch_embed.proj.weight", "encoder.blocks.1.norm2.bias"])
def test_a_checkpoint_that_is_not_whole_is_refused(lost: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "spoilt")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if name != lost}, folder / "model.safetensors")
    with pytest.raises(UsageError, match="is not a Dasheng encoder in safetensors"):
        export("dasheng", str(folder), tmp_path / "out.onnx")
