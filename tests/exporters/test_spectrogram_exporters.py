"""AST, CLAP and wav2vec 2.0 BERT, as random checkpoints, against extractor and model run one clip at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import score_of_sound
from random_checkpoints import Plain, edit_json, save_patches
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.errors import ModelError, UsageError
from xares_onnx.exporters import clap, core, export, spectrogram_transformer, wav2vec2_bert
from xares_onnx.exporters.kaldi import KaldiFbank

pytestmark = [
    pytest.mark.usefixtures("shared_process"),
    pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values"),  # AST's own settings
]

FAMILIES = {"ast": spectrogram_transformer, "clap": clap, "wav2vec2-bert": wav2vec2_bert}
# Of the contract: hop, receptive field, first centre, longest clip, and the grid of tokens.
DECLARED: dict[str, tuple[Any, ...]] = {
    "ast": (1600, 2800, 1400, 400 + 300 * 160 - 1, (2, "12xT")),
    "clap": (502, 1, 220, 16_000, (0, "2xT")),
    "wav2vec2-bert": (320, 560, 280, None, None),
}
# What an exporter would do that forgot a part of the preprocessor.
FORGOTTEN: dict[str, dict[str, Any]] = {
    "ast": {"mean": 0.0},
    "clap": {"padding": "pad"},
    "wav2vec2-bert": {},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: save_patches(family, folder / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def files(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    return {family: export(family, str(made[family]), folder / f"{family}.onnx").path for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_published_pipeline(family: str, made: dict[str, Path], files: dict[str, Path]) -> None:
    spec = FAMILIES[family].build(family, str(made[family]))[1]
    with torch.no_grad():
        reference = Plain(made[family])
        assert core.check_parity(reference, files[family], spec) < 3e-4
        if FORGOTTEN[family]:
            with pytest.raises(ModelError, match="differs from the torch module"):
                core.check_parity(Plain(made[family], **FORGOTTEN[family]), files[family], spec)
        one, other = (reference(0.1 * torch.randn(1, 9_001)) for _ in range(2))
        assert (one - other).abs().max() > 100 * core.TOLERANCE["fp32"] * one.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contract_and_frames_of_clips_of_odd_lengths(family: str, made: dict[str, Path], files: dict[str, Path]) -> None:
    hop, receptive, center, longest, grid = DECLARED[family]
    with load_encoder(files[family], device="cpu", threads=1) as encoder:
        contract, plain = encoder.info.contract, Plain(made[family])
        for seconds in (1.013, 1.377, 1.951):
            samples = int(seconds * contract.sample_rate) | 1
            audio = (0.1 * np.random.default_rng(samples).standard_normal(samples)).astype(np.float32)
            (embedding,) = encoder.embed([audio], rate=contract.sample_rate)
            with torch.no_grad():
                tokens = plain(torch.from_numpy(audio)[None])[0].numpy()
            prefix, bands = (grid[0], int(grid[1].removesuffix("xT"))) if grid else (0, 1)
            expected = tokens[prefix:].reshape(bands, -1, tokens.shape[1]).mean(axis=0)
            np.testing.assert_allclose(embedding.frames, expected, atol=3e-4)
            np.testing.assert_allclose(embedding.times[:2], (center + hop * np.arange(2)) / contract.sample_rate, atol=1e-6)
    assert (contract.hop_samples, contract.receptive_field_samples) == (hop, receptive)
    assert (contract.first_frame_center_samples, contract.max_samples or None) == (center, longest)
    assert (contract.tokens.prefix, contract.tokens.grid) == grid if grid else not contract.tokens
    assert not contract.batch_coupled


@pytest.mark.parametrize(
    "family", ["ast", "clap"]
)  # without training, wav2vec 2.0 BERT's normalised bands tell no tones apart
def test_tokens_end_in_a_score(family: str, files: dict[str, Path], tmp_path: Path) -> None:
    assert score_of_sound(files[family], tmp_path) > 0.4


@pytest.mark.parametrize("precision", [{"dtype": "fp16"}, {"quantize": "int8-dynamic"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_smaller_files_are_close_to_the_module(
    family: str, precision: dict[str, str], made: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    report = export(family, str(made[family]), tmp_path / "small.onnx", **precision)
    assert report.max_abs_error > 1e-3  # not the float32 file again
    with load_encoder(report.path, device="cpu", threads=1) as encoder, load_encoder(files[family], device="cpu") as whole:
        assert encoder.info.contract.dim == whole.info.contract.dim == 32


@pytest.mark.parametrize(
    ("family", "file", "changes", "message"),
    [
        ("ast", "preprocessor_config.json", {"max_length": 200}, r"has max_length=200; only 300 is supported"),
        ("ast", "preprocessor_config.json", {"sampling_rate": 8000}, r"has sampling_rate=8000; only 16000"),
        (
            "clap",
            "config.json",
            {"audio_config": {"enable_fusion": True}},
            r"fuses four views of a clip, three of them drawn",
        ),
        ("clap", "preprocessor_config.json", {"truncation": "fusion"}, r"has truncation=fusion; only rand_trunc"),
        ("clap", "preprocessor_config.json", {"feature_size": 32}, r"a preprocessor of 32 bands and a tower of 16"),
        ("wav2vec2-bert", "preprocessor_config.json", {"num_mel_bins": 40}, r"has num_mel_bins=40; only 80"),
        ("wav2vec2-bert", "config.json", {"add_adapter": True}, r"lacks weights of the encoder|adapter after its encoder"),
    ],
)
def test_other_front_ends_are_refused(family: str, file: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save_patches(family, tmp_path / family)
    edit_json(folder / file, **changes)
    with pytest.raises(UsageError, match=message):
        export(family, str(folder), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(("scale", "shape", "bands"), [(1.0, "hann", 128), (2.0**15, "povey", 80)])
def test_filter_banks_are_those_of_transformers(scale: float, shape: str, bands: int) -> None:
    audio = (0.3 * np.random.default_rng(1).standard_normal(16_321) + 0.2).astype(np.float32)
    filters = mel_filter_bank(257, bands, 20, 8000, 16_000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True)
    expected = spectrogram(
        scale * audio.astype(np.float64),
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
    ).T
    found = KaldiFbank(16_000, scale=scale, mels=bands, window=shape)(torch.from_numpy(audio)[None])[0].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)
