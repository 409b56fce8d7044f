"""BEATs and EAT, as random checkpoints, against both written out plainly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from patch_references import BeatsReference, EatReference, save_beats, save_eat
from random_checkpoints import edit_json
from safetensors.torch import load_file, save_file

from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.errors import ModelError, UsageError
from xares_onnx.exporters import beats, core, eat, export

pytestmark = [
    pytest.mark.usefixtures("shared_process"),
    pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values"),
]


@pytest.mark.parametrize("changes", [{}, {"deep_norm": False, "layer_norm_first": True, "conv_pos": 16}], ids=str)
def test_beats_is_itself_written_out(changes: dict[str, bool], tmp_path: Path) -> None:
    folder = save_beats(tmp_path / "beats", **changes)
    path = export("beats", str(folder), tmp_path / "beats.onnx").path
    spec = beats.build("beats", str(folder))[1]
    with torch.no_grad():
        core.check_parity(BeatsReference(folder), path, spec)
        with pytest.raises(ModelError, match="differs from the torch module"):
            core.check_parity(BeatsReference(folder, gated=False), path, replace(spec, min_samples=30_001))
        audio = (0.1 * np.random.default_rng(0).standard_normal(30_001)).astype(np.float32)
        tokens = BeatsReference(folder)(torch.from_numpy(audio)[None])[0].numpy()
    with load_encoder(path, device="cpu", threads=1) as encoder:
        contract = encoder.info.contract
        (embedding,) = encoder.embed([audio], rate=16_000)
    assert (contract.hop_samples, contract.receptive_field_samples, contract.tokens.grid) == (2560, 2800, "Tx8")
    np.testing.assert_allclose(embedding.frames, tokens.reshape(-1, 8, 32).mean(axis=1), atol=1e-4)


def test_eat_is_itself_written_out(tmp_path: Path) -> None:
    folder = save_eat(tmp_path / "eat")
    path = export("eat", str(folder), tmp_path / "eat.onnx").path
    spec = eat.build("eat", str(folder))[1]
    with torch.no_grad():
        core.check_parity(EatReference(folder), path, spec)
        with pytest.raises(ModelError, match="differs from the torch module"):
            core.check_parity(EatReference(folder, mean=0.0), path, spec)
        audio = (0.1 * np.random.default_rng(0).standard_normal(16_001)).astype(np.float32)
        tokens = EatReference(folder)(torch.from_numpy(audio)[None])[0].numpy()
    with load_encoder(path, device="cpu", threads=1) as encoder:
        contract = encoder.info.contract
        (embedding,) = encoder.embed([audio], rate=16_000)
    assert (contract.hop_samples, contract.receptive_field_samples, contract.max_samples) == (
        2560,
        2800,
        400 + 160 * 160 - 1,
    )
    assert (contract.tokens.prefix, contract.tokens.grid) == (1, "Tx8")
    np.testing.assert_allclose(embedding.frames, tokens[1:].reshape(-1, 8, 32).mean(axis=1), atol=1e-4)


def test_what_is_not_of_the_family_is_refused(tmp_path: Path) -> None:
    def refused(family: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            export(family, str(tmp_path / family), tmp_path / "out.onnx")

    save_beats(tmp_path / "beats", gru_rel_pos=False)
    refused("beats", r"has gru_rel_pos=False; only True is supported")
    save_eat(tmp_path / "eat")
    edit_json(tmp_path / "eat/config.json", patch_size=8)
    refused("eat", r"has patch_size=8; only 16 is supported")
    edit_json(tmp_path / "eat/config.json", patch_size=16)
    for family, lost in (("beats", "encoder.layers.1.fc2.bias"), ("eat", "model.blocks.1.norm2.bias")):
        state = load_file(tmp_path / family / "model.safetensors")
        save_file({name: value for name, value in state.items() if name != lost}, tmp_path / family / "model.safetensors")
    edit_json(tmp_path / "beats/config.json", gru_rel_pos=True)
    refused("beats", r"is not a BEATs encoder in safetensors")
    refused("eat", r"is not an EAT encoder in safetensors")
