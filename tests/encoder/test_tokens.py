"""Tokens of spectrogram transformers: grids of patches become the frames of the canonical model, at the canonical times."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models as models
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_models import DIM, HOP, RECEPTIVE, save
from patch_grids import as_tokens, declared

from xares_onnx import load_encoder
from xares_onnx.encoder.contract.contract import Contract
from xares_onnx.encoder.contract.declarations import declared_beside
from xares_onnx.encoder.contract.tokens import Tokens, parsed_grid
from xares_onnx.encoder.encoder import Encoder
from xares_onnx.errors import ContractError, UsageError

pytestmark = pytest.mark.usefixtures("shared_process")
RATE = 16_000
CONFIG = {
    "model_type": "audio-spectrogram-transformer",
    "num_mel_bins": 128,
    "patch_size": 16,
    "frequency_stride": 10,
    "time_stride": 10,
    "max_length": 1024,
}
CLIPS = [models.noise(samples, seed) for seed, samples in enumerate([401, 5_001, *range(15_999, 100_000, 5_322)])]


def load(model: Any, folder: Path, *contract: str, **options: Any) -> Encoder:
    return load_encoder(save(model, folder / "model.onnx"), device="cpu", contract=list(contract), **options)


# ---------------------------------------------------------------- grids that make the canonical model's frames


@pytest.mark.parametrize("first", ["frequency", "time"])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("samples", ["samples", 16_000])
def test_the_mean_over_bands_is_the_canonical_frame(first: Any, prefix: int, samples: int | str, tmp_path: Path) -> None:
    form = {"bands": 3, "first": first, "prefix": prefix}
    size = {"samples": samples} | ({"frames": 98} if samples == 16_000 else {})
    (tmp_path / "plain").mkdir()
    plain = load(models.encoder(**size), tmp_path / "plain")
    grid = load(as_tokens(models.encoder(**size), **form), tmp_path, *declared(**form))
    assert (grid.contract.dim, grid.contract.hop_samples, grid.contract.receptive_field_samples) == (DIM, HOP, RECEPTIVE)
    assert grid.contract.sources["hop_samples"] == "measured"
    assert grid.contract.described()["tokens.grid"]["source"] == "--contract"
    for a, b in zip(grid.embed(CLIPS, RATE), plain.embed(CLIPS, RATE), strict=True):
        assert np.array_equal(a.times, b.times)
        np.testing.assert_allclose(a.frames, b.frames, rtol=0, atol=1e-6)


def test_joined_bands_lie_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = load(models.encoder(), tmp_path / "plain")
    for first in ("frequency", "time"):
        form: dict[str, Any] = {"bands": 3, "first": first, "prefix": 1}
        grid = load(as_tokens(models.encoder(), **form), tmp_path, *declared(**form), "tokens.bands=concat")
        assert grid.contract.dim == 3 * DIM
        for a, b in zip(grid.embed(CLIPS[:4], RATE), plain.embed(CLIPS[:4], RATE), strict=True):
            joined = np.concatenate([0.5 * b.frames, b.frames, 1.5 * b.frames], axis=1)
            np.testing.assert_allclose(a.frames, joined, rtol=0, atol=1e-6)


def test_leading_tokens_may_be_the_vector_of_a_clip(tmp_path: Path) -> None:
    model = as_tokens(models.encoder(samples=16_000, frames=98), prefix=2)
    encoder = load(model, tmp_path, *declared(), "tokens.use=prefix")
    assert encoder.contract.clip_only
    clip = models.noise(16_000, 3)
    (embedding,) = encoder.embed([clip], RATE)
    np.testing.assert_allclose(embedding.frames, 1.5 * models.embed(clip).mean(axis=0, keepdims=True), atol=1e-6)


def test_every_layer_of_a_grid_is_scored_as_frames(tmp_path: Path) -> None:
    model = as_tokens(models.encoder())
    encoder = load(model, tmp_path, *declared(), taps=["embeddings", "tokens"])
    assert [tap.contract.hop_samples for tap in encoder.info.taps] == [HOP, HOP]


# ---------------------------------------------------------------- what is refused, and with which words


@pytest.mark.parametrize(
    ("contract", "error", "sentence"),
    [
        (
            ["tokens.grid=5xT", "tokens.prefix=2"],
            ContractError,
            "not 2 and a grid of 5 bands; correct --contract tokens.prefix",
        ),
        (["tokens.grid=12"], UsageError, "tokens.grid='12' must be 12xT for 12 bands at every time"),
        (["tokens.grid=0xT"], UsageError, "must be 12xT"),
        (["tokens.prefix=-1"], UsageError, "must be from 0 to 1024"),
        (["tokens.bands=max"], UsageError, "must be one of concat, mean"),
        (["tokens.use=prefix"], ContractError, "but no leading tokens; declare tokens.prefix=N"),
        (["tokens.rows=3"], UsageError, r"no contract key 'tokens\.rows'"),
    ],
)
def test_what_does_not_fit_is_refused(contract: list[str], error: type[Exception], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=sentence):
        load(as_tokens(models.encoder(samples=16_000, frames=98)), tmp_path, *contract)


# ---------------------------------------------------------------- AST: every token sees everything


@pytest.fixture(scope="module")
def ast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An AST of random weights, with the features' configuration beside it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("ast")
    torch.manual_seed(0)
    config = transformers.ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_length=256, num_mel_bins=64
    )
    model = transformers.ASTModel(config).eval()

    class Tokeniser(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, features: Any) -> Any:
            return self.model(features).last_hidden_state

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Tokeniser(),
            (torch.zeros(2, 256, 64),),
            folder / "model.onnx",
            input_names=["input_values"],
            output_names=["last_hidden_state"],
            dynamic_axes={"input_values": {0: "batch"}, "last_hidden_state": {0: "batch"}},
            dynamo=False,
        )
    transformers.ASTFeatureExtractor(num_mel_bins=64, max_length=256).save_pretrained(folder)
    return folder


def test_ast_is_refused_with_the_options_that_declare_its_grid(ast: Path) -> None:
    # 64 bins in patches of 16 every 10: 5 bands; 256 frames: 25 times; a class and a distillation token
    with pytest.raises(ContractError, match=r"5 bands at every time after 2 leading tokens; if they are, set ") as refused:
        load_encoder(ast / "model.onnx", device="cpu")
    assert "set --contract tokens.prefix=2 --contract tokens.grid=5xT, and if each is a frame" in str(refused.value)


def test_the_times_of_ast_are_measured(ast: Path) -> None:
    encoder = load_encoder(ast / "model.onnx", device="cpu", contract=["tokens.prefix=2", "tokens.grid=5xT"])
    contract: Contract = encoder.contract
    assert (contract.window_frames, contract.dim) == (25, 32)
    assert contract.hop_samples == 1_600  # ten frames of features
    # a patch's middle: 7.5 frames after the middle of the first frame, 12.5 ms
    assert contract.first_frame_center_samples == pytest.approx(200 + 7.5 * 160, abs=100)
    assert contract.sources["hop_samples"] == "measured (where a change in the window shows)"


def test_its_own_config_declares_the_grid(ast: Path, tmp_path: Path) -> None:
    for file in ast.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_mel_bins": 64, "max_length": 256}))
    contract = load_encoder(tmp_path, device="cpu").contract
    assert (contract.window_frames, contract.hop_samples) == (25, 1_600)
    assert contract.described()["tokens.grid"] == {"value": "5xT", "source": "config.json"}
    declared = load_encoder(tmp_path, device="cpu", contract=["tokens.use=prefix"]).contract
    assert declared.clip_only


@pytest.mark.parametrize(
    ("change", "grid"),
    [
        ({}, "12xT"),
        ({"num_mel_bins": 64, "patch_size": 8, "frequency_stride": 8}, "8xT"),
        ({"model_type": "wav2vec2"}, None),
        ({"num_mel_bins": "x"}, None),
        ({"num_mel_bins": True}, None),
        ({"frequency_stride": 0}, None),
        ({"patch_size": 10**30}, None),
        ({"patch_size": None}, None),
    ],
)
def test_what_a_config_declares(change: dict[str, Any], grid: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    declared = declared_beside(tmp_path)
    assert {key: declaration.value for key, declaration in declared.items()} == (
        {"tokens.prefix": 2, "tokens.grid": grid} if grid else {}
    )


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00", "[" * 100_000])
def test_a_config_of_another_program_declares_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert declared_beside(tmp_path) == {}


# ---------------------------------------------------------------- the arithmetic


@given(st.integers(0, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(1, 2))
def test_a_grid_is_read_in_both_orders(prefix: int, bands: int, times: int, dim: int, items: int) -> None:
    rng = np.random.default_rng(0)
    grid = rng.standard_normal((items, bands, times, dim)).astype(np.float32)
    lead = rng.standard_normal((items, prefix, dim)).astype(np.float32)
    by_frequency = np.concatenate([lead, grid.reshape(items, -1, dim)], axis=1)
    by_time = np.concatenate([lead, grid.transpose(0, 2, 1, 3).reshape(items, -1, dim)], axis=1)
    for tokens, first in ((by_frequency, "frequency"), (by_time, "time")):
        mean = Tokens(prefix, bands, first, "mean").frames(tokens, "x")  # type: ignore[arg-type]
        np.testing.assert_allclose(mean, grid.mean(axis=1), atol=1e-6)
        joined = Tokens(prefix, bands, first, "concat").frames(tokens, "x")  # type: ignore[arg-type]
        for item, time, band in itertools.product(range(items), range(times), range(bands)):
            assert np.array_equal(joined[item, time, band * dim : (band + 1) * dim], grid[item, band, time])


@given(st.integers(1, 9_999), st.sampled_from(["frequency", "time"]))
def test_a_grid_is_declared_as_it_is_described(bands: int, first: Any) -> None:
    assert parsed_grid(Tokens(0, bands, first).grid) == (bands, first)
