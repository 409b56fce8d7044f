"""Folders as Optimum writes them: `preprocessor_config.json` beside a model says how its features are made."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models as models
import pytest
import torch
import transformers
from feature_models import feature_model
from numpy.typing import NDArray
from onnx_models import noise, save
from random_checkpoints import Plain, edit_json, save_whisper
from torch import Tensor, nn
from typer.testing import CliRunner

from xares_onnx import cli
from xares_onnx.encoder.contract.declarations import declared_by_preprocessor
from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.errors import ContractError, ModelError
from xares_onnx.exporters import export

RATE = 16_000
pytestmark = pytest.mark.usefixtures("shared_process")


def swelling(samples: int, seed: int = 0) -> NDArray[np.float32]:
    loudness = 10.0 ** (-5 * np.linspace(1, 0, samples))
    return (loudness * noise(samples, seed)).astype(np.float32)


CLIPS = [
    swelling(samples, seed)
    for seed, samples in enumerate([1, 7, 401, 5_001, 16_001, *range(17_111, 47_000, 2_222), 48_000, 80_001])
]


class Outputs(nn.Module):
    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(features)
        return tuple(getattr(outputs, name) for name in self.names)


def export_features(
    model: nn.Module,
    example: Tensor,
    path: Path,
    axes: dict[int, str],
    name: str = "input_features",
    outputs: Sequence[str] = ("last_hidden_state",),
) -> Path:
    """As Optimum exports an encoder: inputs and outputs by the names that `transformers` gives them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Outputs(model.eval(), outputs),
            (example,),
            str(path),
            input_names=[name],
            output_names=list(outputs),
            dynamic_axes={name: axes, **{output: {0: "batch_size"} for output in outputs}},
            opset_version=17,
            dynamo=False,
        )
    return path


# ---------------------------------------------------------------- Whisper, end to end

SECONDS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("checkpoints") / "small-whisper", seconds=SECONDS)


@pytest.fixture(scope="module")
def optimum(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the encoder, a decoder, and the preprocessor's json."""
    folder = tmp_path_factory.mktemp("optimum")
    encoder = transformers.AutoModel.from_pretrained(checkpoint, attn_implementation="eager").encoder
    export_features(encoder, torch.zeros(1, 80, 100 * SECONDS), folder / "encoder_model.onnx", {0: "batch_size"})
    for name in ("decoder_model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx"):
        save(models.tokens(), folder / name)
    (folder / "preprocessor_config.json").write_bytes((checkpoint / "preprocessor_config.json").read_bytes())
    return folder


def test_whisper_of_optimum_is_the_export_with_its_front_end_inside(checkpoint: Path, optimum: Path, tmp_path: Path) -> None:
    inside = export("whisper", str(checkpoint), tmp_path / "whisper.onnx").path
    with load_encoder(inside, device="cpu") as encoder:
        expected = encoder.embed(CLIPS, RATE)
    told: list[str] = []
    with load_encoder(optimum, device="cpu", observer=lambda event: told.append(str(event))) as encoder:
        contract = encoder.contract
        found = encoder.embed(CLIPS, RATE)
    assert encoder.info.path == str(optimum / "encoder_model.onnx")
    assert (contract.input, contract.input_layout, contract.dim) == ("input_features", "BFT", 32)
    assert (contract.hop_samples, contract.first_frame_center_samples, contract.chunk_samples) == (320, 0, 48_000)
    assert contract.sources["frontend.preset"] == contract.sources["sample_rate"] == "preprocessor_config.json"
    assert any("computed here by the preset whisper: 80 mel bands of 0 to 8000 Hz" in text for text in told)
    assert len(found) >= 20
    for one, other, clip in zip(found, expected, CLIPS, strict=True):
        # The window's frames stay where centre - hop / 2 lies in the clip: up to one more than the other file gives.
        count = len(other.frames)
        assert count <= len(one.frames) <= count + 1 + len(clip) // 48_000
        if len(clip) <= 48_000:
            np.testing.assert_allclose(one.frames[:count], other.frames, rtol=0, atol=1e-4)
            np.testing.assert_allclose(one.times[:count], other.times, rtol=0, atol=1e-9)


def test_whisper_of_optimum_is_the_published_pipeline(checkpoint: Path, optimum: Path) -> None:
    encoder = load_encoder(optimum, device="cpu")
    for clip, embedding in zip(CLIPS[3:8], encoder.embed(CLIPS[3:8], RATE), strict=True):
        with torch.no_grad():
            expected = Plain(checkpoint)(torch.from_numpy(clip)[None])[0].numpy()
        np.testing.assert_allclose(embedding.frames[: len(expected)], expected, rtol=0, atol=1e-4)


def test_the_real_window_of_30_seconds(tmp_path: Path) -> None:
    folder = save_whisper(tmp_path, seconds=30, bands=128)
    encoder = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").encoder
    export_features(encoder, torch.zeros(1, 128, 3000), folder / "model.onnx", {0: "batch_size"})
    clip = swelling(100_001)
    loaded = load_encoder(folder, device="cpu")
    assert loaded.contract.chunk_samples == 480_000
    (found,) = loaded.embed([clip], RATE)
    with torch.no_grad():
        expected = Plain(folder)(torch.from_numpy(clip)[None])[0].numpy()
    np.testing.assert_allclose(found.frames[: len(expected)], expected, rtol=0, atol=1e-4)


def test_axes_that_optimum_once_left_free(checkpoint: Path, tmp_path: Path) -> None:
    """All three are names there: which holds the bands is measured, and the window is the preprocessor's."""
    encoder = transformers.AutoModel.from_pretrained(checkpoint, attn_implementation="eager").encoder
    axes = {0: "batch_size", 1: "feature_size", 2: "encoder_sequence_length"}
    export_features(encoder, torch.zeros(1, 80, 100 * SECONDS), tmp_path / "model.onnx", axes)
    (tmp_path / "preprocessor_config.json").write_bytes((checkpoint / "preprocessor_config.json").read_bytes())
    contract = load_encoder(tmp_path, device="cpu").contract
    assert (contract.input_layout, contract.sources["input_layout"]) == ("BFT", "measured")
    assert (contract.chunk_samples, contract.first_frame_center_samples) == (48_000, 0)


def test_clips_are_normalised_where_the_preprocessor_says_so(checkpoint: Path, optimum: Path, tmp_path: Path) -> None:
    for file in optimum.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "preprocessor_config.json", do_normalize=True)
    encoder = load_encoder(tmp_path, device="cpu")
    assert encoder.contract.normalize == "zscore"
    clip = CLIPS[6]
    extractor = transformers.WhisperFeatureExtractor(chunk_length=SECONDS)
    features = extractor(clip, sampling_rate=RATE, do_normalize=True, return_tensors="pt").input_features
    model = transformers.AutoModel.from_pretrained(checkpoint).encoder
    with torch.no_grad():
        expected = model(features).last_hidden_state[0].numpy()
    (found,) = encoder.embed([clip], RATE)
    np.testing.assert_allclose(found.frames, expected[: len(found.frames)], rtol=0, atol=1e-4)


def test_a_file_with_its_front_end_inside_beside_that_json(checkpoint: Path, tmp_path: Path) -> None:
    """Its metadata say that it takes a waveform; of the json nothing but the rate and the normalisation is left."""
    path = export("whisper", str(checkpoint), tmp_path / "model.onnx").path
    alone = load_encoder(path, device="cpu").contract
    (tmp_path / "preprocessor_config.json").write_bytes((checkpoint / "preprocessor_config.json").read_bytes())
    contract = load_encoder(path, device="cpu").contract
    assert contract == alone
    plain = save(models.encoder(), tmp_path / "plain.onnx")
    with pytest.raises(ContractError, match="if its front end is inside, set --contract input_kind=waveform"):
        load_encoder(plain, device="cpu")
    assert load_encoder(plain, device="cpu", contract=["input_kind=waveform"]).contract.max_samples is None


def test_the_command_line_scores_such_a_folder(optimum: Path, tmp_path: Path) -> None:
    from corpus import write_task, write_tones

    write_tones(tmp_path / "data", noise=0.1)
    places = ["--data", str(tmp_path / "data"), "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out.json")]
    task = write_task(tmp_path, "tones")
    arguments = ["evaluate", str(optimum), "--tasks", str(task), *places, "--method", "knn", "--device", "cpu", "--json"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    contract = result["encoder"]["contract"]
    assert contract["input_kind"] == {"value": "features", "source": "preprocessor_config.json"}
    assert contract["frontend.hop_samples"] == {"value": 160, "source": "preprocessor_config.json"}
    assert contract["frontend.log_range"] == {"value": 8.0, "source": "preset whisper"}
    assert contract["frontend.drop_last_frame"] == {"value": True, "source": "preset whisper"}
    assert result["tasks"][0]["score"] > 0.5  # chance is 0.25


# ---------------------------------------------------------------- other extractors


def test_an_audio_spectrogram_transformer(tmp_path: Path) -> None:
    """Its tokens are patches, band by band, and no frames: what can be had is a vector a window."""
    config = transformers.ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_length=204
    )
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bands narrower than a bin
        extractor = transformers.ASTFeatureExtractor(max_length=204)
    extractor.save_pretrained(tmp_path)
    outputs = ("last_hidden_state", "pooler_output")
    export_features(model, torch.zeros(1, 204, 128), tmp_path / "model.onnx", {0: "batch_size"}, "input_values", outputs)
    encoder = load_encoder(tmp_path, device="cpu")
    contract = encoder.contract
    assert (contract.input_layout, contract.chunk_samples, contract.normalize) == ("BTF", 400 + 203 * 160, "none")
    assert (contract.output, contract.clip_only) == ("pooler_output", True)
    clips = [swelling(samples, samples) for samples in (5_001, 20_002, 32_880)]
    for clip, embedding in zip(clips, encoder.embed(clips, RATE), strict=True):
        features = extractor(clip, sampling_rate=RATE, return_tensors="pt")["input_values"]
        with torch.no_grad():
            expected = model(features).pooler_output.numpy()
        np.testing.assert_allclose(embedding.frames, expected, rtol=0, atol=1e-5)


def test_seamless(tmp_path: Path) -> None:
    """Kaldi's filter banks of 16-bit samples, a band's mean and variance 0 and 1, two frames joined to one of 160 values."""
    extractor = transformers.SeamlessM4TFeatureExtractor()
    extractor.save_pretrained(tmp_path)
    encoder = load_encoder(save(feature_model("kaldi", "BTF", bands=160), tmp_path / "model.onnx"), device="cpu")
    contract = encoder.contract
    assert (contract.amplitude, contract.hop_samples, contract.input_layout) == ("int16", 640, "BTF")
    matrix, bias = feature_model("kaldi", "BTF", bands=160).graph.initializer
    kernel = torch.from_numpy(np.array(models.numpy_helper.to_array(matrix)))
    shift = torch.from_numpy(np.array(models.numpy_helper.to_array(bias)))
    clips = [swelling(samples, samples) for samples in (16_001, 20_002, 32_880)]
    for clip, embedding in zip(clips, encoder.embed(clips, RATE), strict=True):
        features = extractor(clip, sampling_rate=RATE, pad_to_multiple_of=1, return_tensors="pt")["input_features"]
        expected = torch.conv1d(features.mT.float(), kernel, shift, stride=2).abs()[0].mT.numpy()
        np.testing.assert_allclose(embedding.frames, expected, rtol=0, atol=1e-4)


def test_clap(tmp_path: Path) -> None:
    extractor = transformers.ClapFeatureExtractor(truncation="rand_trunc", max_length_s=2)
    extractor.save_pretrained(tmp_path)
    model = feature_model("librosa", "B1TF", bands=64, sizes={"T": 201})
    encoder = load_encoder(save(model, tmp_path / "model.onnx"), device="cpu")
    assert (encoder.contract.sample_rate, encoder.contract.chunk_samples) == (48_000, 96_000)
    matrix, bias = (torch.from_numpy(np.array(models.numpy_helper.to_array(one))) for one in model.graph.initializer)
    for samples in (30_001, 48_000, 96_000):
        clip = swelling(samples)
        (found,) = encoder.embed([clip], 48_000)
        features = extractor(clip, sampling_rate=48_000, return_tensors="pt")["input_features"][:, 0]
        expected = torch.conv1d(features.mT.float(), matrix, bias, stride=2).abs()[0].mT.numpy()
        np.testing.assert_allclose(found.frames, expected[: len(found.frames)], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"feature_extractor_type": "ParakeetFeatureExtractor"}, "(ParakeetFeatureExtractor, which is not known here)"),
        ({"feature_extractor_type": "ClapFeatureExtractor"}, "(ClapFeatureExtractor with truncation=fusion, which takes"),
        (
            {"feature_extractor_type": "WhisperFeatureExtractor", "dither": 0.1},
            "(WhisperFeatureExtractor with dither, which is random)",
        ),
        (
            {"feature_extractor_type": "WhisperFeatureExtractor", "padding_value": 1.0},
            "(WhisperFeatureExtractor with a padding_value other than 0)",
        ),
        (
            {"feature_extractor_type": "ASTFeatureExtractor", "sampling_rate": 44_100},
            "(ASTFeatureExtractor at 44100 Hz, where its two implementations differ)",
        ),
        (
            {"feature_extractor_type": "ASTFeatureExtractor", "max_length": "long"},
            "(ASTFeatureExtractor, whose settings cannot be read: max_length='long' is no number, or too large)",
        ),
        ({"feature_extractor_type": ["a"]}, "(['a'], which is not known here)"),
    ],
)
def test_extractors_that_are_not_computed(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": RATE, **config}))
    save(feature_model("kaldi", "BTF"), tmp_path / "model.onnx")
    with pytest.raises(ModelError) as caught:
        load_encoder(tmp_path, device="cpu")
    assert f"preprocessor_config.json {says}" in str(caught.value)
    assert "says that input 'features' takes features, but not how to make them; declare --contract frontend.preset" in str(
        caught.value
    )
    said = ["frontend.preset=kaldi"]
    assert load_encoder(tmp_path, device="cpu", contract=said).contract.sources["sample_rate"] == "preprocessor_config.json"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 0}, "frontend.mels=0 must be from 1 to 1024"),
        (
            {"feature_extractor_type": "WhisperFeatureExtractor", "hop_length": 1e9},
            "frontend.hop_samples='1000000000.0' is not",
        ),
        (
            {"feature_extractor_type": "WhisperFeatureExtractor", "n_fft": 10**9},
            "frontend.fft_samples=1000000000 must be from",
        ),
    ],
)
def test_settings_that_cannot_be(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ContractError) as caught:
        declared_by_preprocessor(path)
    assert says in str(caught.value)


# ---------------------------------------------------------------- which file of a folder


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["encoder_model.onnx", "decoder_model.onnx", "decoder_model_merged.onnx"], "encoder_model.onnx"),
        (["encoder.onnx", "decoder.onnx", "joiner.onnx"], "encoder.onnx"),
        (["encoder_model.onnx", "model.onnx"], "model.onnx"),
        (["decoder_model.onnx"], "decoder_model.onnx"),
        (["encoder_model.onnx", "encoder_model_quantized.onnx", "decoder_model.onnx"], None),
        (["encoder_model.onnx", "other.onnx"], None),
        (["text_model.onnx", "decoder_model.onnx"], None),
    ],
)
def test_the_encoder_of_a_folder(names: list[str], chosen: str | None, tmp_path: Path) -> None:
    for name in names:
        save(models.encoder(), tmp_path / name)
    if chosen is None:
        with pytest.raises(ModelError, match=rf"holds {len(names)} .onnx files and no model.onnx; name one of them"):
            load_encoder(tmp_path, device="cpu")
    else:
        assert load_encoder(tmp_path, device="cpu").info.path == str(tmp_path / chosen)
