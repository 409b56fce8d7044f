"""Dasheng, as a random checkpoint, against torch's own STFT and transformer, run one clip at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import score_of_sound
from dasheng_reference import SMALL_CED, Reference, save
from safetensors.torch import load_file, save_file
from torch import Tensor

from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.errors import ModelError, UsageError
from xares_onnx.exporters import core, dasheng, export

pytestmark = pytest.mark.usefixtures("shared_process")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoints") / "small-dasheng")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("dasheng", str(checkpoint), tmp_path_factory.mktemp("exported") / "dasheng.onnx").path


def test_the_file_is_stft_and_transformer(checkpoint: Path, exported: Path) -> None:
    spec = dasheng.build("dasheng", str(checkpoint))[1]
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
    assert (contract.hop_samples, contract.receptive_field_samples, contract.dim) == (640, 480, 32)
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
    assert score_of_sound(path, tmp_path) > 0.4


@pytest.mark.parametrize("lost", ["encoder.norm.bias", "encoder.patch_embed.proj.weight", "encoder.blocks.1.norm2.bias"])
def test_a_checkpoint_that_is_not_whole_is_refused(lost: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "spoilt")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if name != lost}, folder / "model.safetensors")
    with pytest.raises(UsageError, match="is not a Dasheng encoder in safetensors"):
        export("dasheng", str(folder), tmp_path / "out.onnx")


def test_ced_is_its_published_grid_of_patches(tmp_path: Path) -> None:
    folder = save(tmp_path / "small-ced", SMALL_CED)
    path = export("ced", str(folder), tmp_path / "ced.onnx").path
    with torch.no_grad():
        reference = Reference(folder)
        assert core.check_parity(reference, path, dasheng.build("ced", str(folder))[1]) < 1e-4
        with pytest.raises(ModelError, match="differs from the torch module"):
            core.check_parity(Reference(folder, top_db=20), path, dasheng.build("ced", str(folder))[1])
        audio = (0.1 * np.random.default_rng(0).standard_normal(30_001)).astype(np.float32)
        tokens = reference(torch.from_numpy(audio)[None])[0].numpy()
    with load_encoder(path, device="cpu", threads=1) as encoder:
        contract = encoder.info.contract
        (embedding,) = encoder.embed([audio], rate=16_000)
    assert (contract.hop_samples, contract.receptive_field_samples, contract.tokens.grid) == (2560, 2400, "4xT")
    assert (contract.max_samples, contract.chunk_samples) == (292 * 160 - 1, 32_000)
    np.testing.assert_allclose(embedding.frames, tokens.reshape(4, -1, 32).mean(axis=0), atol=1e-4)
