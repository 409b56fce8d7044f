"""Exported encoders against references that share no code with them: NumPy's FFT, a plain `torch.nn.LSTM`."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from corpus import score_of_sound
from numpy.typing import NDArray
from torch import Tensor, nn

from xares_onnx import exporters
from xares_onnx.encoder.contract.declarations import declared_in_metadata
from xares_onnx.errors import ModelError, UsageError
from xares_onnx.exporters import core, export, logmel, speech

Array = NDArray[np.floating[Any]]

PLAIN_SPEC = core.Spec(
    model_type="plain",
    sample_rate=16_000,
    hop_samples=160,
    receptive_field_samples=400,
    first_frame_center_samples=200,
    min_samples=400,
    license="none",
    source="test",
    comment="test",
)


# ---------------------------------------------------------------- references


def mel_reference(audio: Array, bands: int, *, centred: bool) -> Array:
    """Mel power (frames, bands) of one clip in double precision, by FFT and Slaney's formulas written out."""
    if centred:
        audio = np.pad(audio, 200)
    frames = np.stack([audio[start : start + 400] for start in range(0, len(audio) - 399, 160)]).astype(np.float64)
    power = np.abs(np.fft.rfft(frames * np.hanning(401)[:-1])) ** 2
    top = 15 + 27 * np.log(8) / np.log(6.4)  # 8000 Hz in mel
    edges = [mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27) for mel in np.linspace(0, top, bands + 2)]
    bins = np.fft.rfftfreq(400, 1 / 16_000)
    columns = [
        power @ np.interp(bins, edges[band : band + 3], [0, 2 / (edges[band + 2] - edges[band]), 0]) for band in range(bands)
    ]
    return np.stack(columns, axis=1)


def partial_reference(audio: Array, weights: Path) -> Array:
    """Resemblyzer's own arithmetic: the embedding (256,) of the first 160 frames of `audio`."""
    state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
    lstm, linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)
    lstm.load_state_dict({name[5:]: value for name, value in state.items() if name.startswith("lstm.")})
    linear.load_state_dict({name[7:]: value for name, value in state.items() if name.startswith("linear.")})
    mels = mel_reference(audio, 40, centred=True)[None, :160].astype(np.float32)
    with torch.no_grad():
        _, (hidden, _) = lstm(torch.from_numpy(mels))
        raw = torch.relu(linear(hidden[-1]))
        embedding: Array = (raw / torch.norm(raw, dim=1, keepdim=True))[0].numpy()
    return embedding


def chirp(seconds: float, *, loudness: float = 0.3) -> Array:
    """A rising tone and its third harmonic in a little noise, float32 (samples,)."""
    time = np.arange(round(seconds * 16_000)) / 16_000
    phase = 2 * np.pi * (150 + 200 * time) * time
    noise = np.random.default_rng(7).standard_normal(len(time))
    return (loudness * (np.sin(phase) + 0.3 * np.sin(3 * phase) + 0.05 * noise)).astype(np.float32)


def run(path: Path, *clips: Array) -> Array:
    """Embeddings (clips, frames, dim) of clips of one length."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (embeddings,) = session.run(["embeddings"], {"audio": np.stack(clips).astype(np.float32)})
    return np.asarray(embeddings)


# ---------------------------------------------------------------- fixtures


def save_checkpoint(path: Path, **changes: Tensor) -> Path:
    """A checkpoint in Resemblyzer's format with weights of our own, so that no test waits for the wheel."""
    torch.manual_seed(3)
    lstm, linear = nn.LSTM(40, 256, 3), nn.Linear(256, 256)
    state = {f"lstm.{name}": value for name, value in lstm.state_dict().items()}
    state |= {f"linear.{name}": value for name, value in linear.state_dict().items()}
    state |= {"similarity_weight": torch.ones(1), "similarity_bias": torch.ones(1)} | changes
    torch.save({"step": 1, "model_state": state}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("weights") / "speaker.pt")


@pytest.fixture(scope="module")
def logmel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("logmel", None, tmp_path_factory.mktemp("exported") / "logmel.onnx").path


@pytest.fixture(scope="module")
def speaker_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("resemblyzer", str(checkpoint), tmp_path_factory.mktemp("exported") / "resemblyzer.onnx").path


@pytest.fixture(params=["logmel", "resemblyzer"])
def encoder_file(request: pytest.FixtureRequest, logmel_file: Path, speaker_file: Path) -> Path:
    """One exported file of each family; its stem is the family's name."""
    return logmel_file if request.param == "logmel" else speaker_file


# ---------------------------------------------------------------- every family


def test_every_module_of_the_folder_builds_a_family() -> None:
    modules = {path.stem for path in Path(exporters.__file__).parent.glob("*.py")}
    assert modules - {"__init__", "core", "kaldi", "precision", "pretrained"} == set(exporters.FAMILIES.values())
    assert {family for family, module in exporters.FAMILIES.items() if module == "speech"} == set(speech.FAMILIES)


def test_batch_and_time_are_symbolic_and_dim_is_not(encoder_file: Path) -> None:
    graph = onnx.load(encoder_file).graph
    (audio,), (embeddings,) = graph.input, graph.output
    assert (audio.name, embeddings.name) == ("audio", "embeddings")
    assert [size.dim_param for size in audio.type.tensor_type.shape.dim] == ["batch", "samples"]
    batch, frames, dim = embeddings.type.tensor_type.shape.dim
    assert (batch.dim_param, frames.dim_param) == ("batch", "frames")
    assert dim.dim_value == run(encoder_file, chirp(0.5)).shape[-1]


def test_metadata_says_what_the_encoder_does(encoder_file: Path) -> None:
    metadata = {entry.key: entry.value for entry in onnx.load(encoder_file).metadata_props}
    expected = {
        "logmel": {"receptive_field_samples": 400, "first_frame_center_samples": 200.0, "min_samples": 400},
        "resemblyzer": {"receptive_field_samples": 0, "first_frame_center_samples": 0.0, "min_samples": 1},
    }[encoder_file.stem]
    declared = {key: declaration.value for key, declaration in declared_in_metadata(metadata).items()}
    source = declared.pop("source")
    assert source
    assert metadata["comment"]
    assert declared == expected | {
        "input_kind": "waveform",
        "input": "audio",
        "input_layout": "BT",
        "output": "embeddings",
        "output_layout": "BTD",
        "output_dim": {"logmel": 64, "resemblyzer": 256}[encoder_file.stem],
        "sample_rate": 16_000,
        "hop_samples": 160,
        "amplitude": "unit",
        "normalize": "none",
        "license": "Apache-2.0",
    }
    assert metadata["model_type"] == encoder_file.stem
    # sherpa-onnx's keys stand without a prefix; its `normalize_samples` means samples in [-1, 1].
    assert (metadata["sample_rate"], metadata["normalize_samples"]) == ("16000", "1")
    assert metadata["xares.exporter"].startswith("xares-onnx ")
    assert "xares.chunk_samples" not in metadata


@pytest.mark.parametrize("extra", [0, 1, 159, 160, 161, 4_000, 4_001])
def test_frames_follow_the_declared_law(encoder_file: Path, extra: int) -> None:
    metadata = {entry.key: entry.value for entry in onnx.load(encoder_file).metadata_props}
    samples = int(metadata["xares.min_samples"]) + extra
    receptive, hop = int(metadata["xares.receptive_field_samples"]), int(metadata["xares.hop_samples"])
    embeddings = run(encoder_file, np.full(samples, 0.1))
    assert embeddings.shape[1] == (samples - receptive) // hop + 1
    assert np.isfinite(embeddings).all()


def test_a_clip_does_not_hear_its_neighbours(encoder_file: Path) -> None:
    clip, loud = chirp(1.0, loudness=0.001), chirp(1.0, loudness=0.9)[::-1]
    beside = run(encoder_file, loud, clip, loud)[1]
    np.testing.assert_allclose(beside, run(encoder_file, clip)[0], rtol=1e-5, atol=1e-5)


def test_silence_is_finite_and_the_same_in_every_clip(encoder_file: Path) -> None:
    embeddings = run(encoder_file, np.zeros(8_000), np.zeros(8_000))
    assert np.isfinite(embeddings).all()
    np.testing.assert_array_equal(embeddings[0], embeddings[1])


def test_the_same_encoder_gives_the_same_bytes(encoder_file: Path, checkpoint: Path, tmp_path: Path) -> None:
    weights = str(checkpoint) if encoder_file.stem == "resemblyzer" else None
    again = export(encoder_file.stem, weights, tmp_path / "another-name.onnx").path
    assert again.read_bytes() == encoder_file.read_bytes()


def test_export_is_quiet_and_leaves_one_file(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = export("resemblyzer", str(checkpoint), tmp_path / "speaker.onnx")
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [tmp_path / "speaker.onnx"] == [report.path]
    assert report.parameters == 1_423_616
    assert 0 <= report.max_abs_error < 1e-5
    assert len(set(report.lengths)) == 4
    assert len(report.batches) == 3


def test_export_leaves_torch_its_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        export("logmel", None, tmp_path / "logmel.onnx")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- log-mel


def test_logmel_is_the_logarithm_of_mel_power(logmel_file: Path) -> None:
    audio = chirp(1.3)
    expected = np.log(np.maximum(mel_reference(audio, 64, centred=False), 1e-10))
    np.testing.assert_allclose(run(logmel_file, audio)[0], expected, atol=1e-3)


def test_logmel_hears_nothing_below_16_bits(logmel_file: Path) -> None:
    assert run(logmel_file, np.zeros(1_000)) == pytest.approx(np.log(1e-10))
    one_step = np.where(np.random.default_rng(0).random(16_000) < 0.5, 0, 1 / 32_768)
    assert run(logmel_file, one_step).mean() > np.log(1e-10) + 1


def test_a_click_is_loudest_in_the_frame_whose_declared_centre_it_is(logmel_file: Path) -> None:
    click = np.zeros(16_000)
    click[200 + 7 * 160] = 1.0
    energies = run(logmel_file, click)[0].sum(axis=1)
    assert energies.argmax() == 7
    assert energies[6] == pytest.approx(energies[8], rel=1e-3)  # the window is symmetric about its centre


def test_logmel_refuses_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"logmel has no weights; leave out .*'w\.pt'"):
        export("logmel", "w.pt", tmp_path / "logmel.onnx")


# ---------------------------------------------------------------- resemblyzer


def test_speaker_front_end_is_centred_mel_power() -> None:
    audio = chirp(1.01)
    expected = mel_reference(audio, 40, centred=True)
    found = logmel.MelPower(40, centred=True)(torch.from_numpy(audio)[None])[0].numpy()
    assert found.shape == (101 + 1, 40)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * expected.max())


def test_frame_159_is_the_embedding_of_a_partial(checkpoint: Path, speaker_file: Path) -> None:
    audio = chirp(2.5)
    embeddings = run(speaker_file, audio)[0]
    np.testing.assert_allclose(embeddings[159], partial_reference(audio, checkpoint), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)


@pytest.mark.skipif(find_spec("resemblyzer") is None, reason="needs: pip install --no-deps resemblyzer")
def test_without_a_checkpoint_the_weights_are_those_of_the_wheel(tmp_path: Path) -> None:
    path = export("resemblyzer", None, tmp_path / "speaker.onnx").path
    assert score_of_sound(path, tmp_path) > 0.4
    package = find_spec("resemblyzer")
    assert package is not None
    assert package.submodule_search_locations
    weights = Path(package.submodule_search_locations[0], "pretrained.pt")
    audio = chirp(2.0)
    np.testing.assert_allclose(run(path, audio)[0, 159], partial_reference(audio, weights), atol=1e-5)
    assert "resemblyzer" not in sys.modules


def test_an_embedding_that_is_cut_off_entirely_is_zero_not_nan(tmp_path: Path) -> None:
    zeros, negative = torch.zeros(256, 256), torch.full((256,), -1.0)
    weights = save_checkpoint(tmp_path / "w.pt", **{"linear.weight": zeros, "linear.bias": negative})
    path = export("resemblyzer", str(weights), tmp_path / "speaker.onnx").path
    np.testing.assert_array_equal(run(path, chirp(0.5)), 0)


def test_recurrent_layers_are_not_halved(checkpoint: Path, tmp_path: Path) -> None:
    """ONNX Runtime's process ends where it loads such a file."""
    with pytest.raises(UsageError, match="no recurrent layers in half precision; export it without --dtype fp16"):
        export("resemblyzer", str(checkpoint), tmp_path / "speaker.onnx", dtype="fp16")
    assert not list(tmp_path.iterdir())


def test_missing_weights_name_the_command_that_brings_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resemblyzer", None)
    with pytest.raises(UsageError, match="pip install --no-deps resemblyzer"):
        export("resemblyzer", None, tmp_path / "speaker.onnx")


def test_a_missing_checkpoint_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no checkpoint .*nowhere\.pt"):
        export("resemblyzer", str(tmp_path / "nowhere.pt"), tmp_path / "out.onnx")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"\x80\x02."])
def test_a_file_that_is_no_checkpoint_is_a_usage_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"w\.pt is not a Resemblyzer checkpoint"):
        export("resemblyzer", str(path), tmp_path / "out.onnx")


@pytest.mark.parametrize(
    "saved",
    [{}, [1], {"model_state": 1}, {"model_state": {}}, {"model_state": {"linear.bias": 1}}, Path()],
    ids=repr,
)
def test_a_checkpoint_of_something_else_is_a_usage_error(saved: object, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=r"w\.pt is not a Resemblyzer checkpoint"):
        export("resemblyzer", str(tmp_path / "w.pt"), tmp_path / "out.onnx")


@pytest.mark.parametrize(("name", "shape"), [("linear.weight", (128, 256)), ("lstm.weight_ih_l3", (1024, 256))])
def test_a_checkpoint_of_another_size_is_a_usage_error(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "w.pt", **{name: torch.zeros(shape)})
    with pytest.raises(UsageError, match=r"w\.pt is not a Resemblyzer checkpoint"):
        export("resemblyzer", str(path), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


# ---------------------------------------------------------------- the core refuses what does not hold


class Plain(nn.Module):
    """400 samples every 160, through a random matrix: float32 [batch, samples] -> [batch, frames, 8]."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frames = nn.Conv1d(1, 8, 400, stride=160)

    def forward(self, audio: Tensor) -> Tensor:
        embeddings: Tensor = self.frames(audio[:, None])
        return embeddings.transpose(1, 2)


class BatchCoupled(Plain):
    def forward(self, audio: Tensor) -> Tensor:
        return super().forward(audio / audio.abs().max())


class FixedBatch(Plain):
    def forward(self, audio: Tensor) -> Tensor:
        return super().forward(audio).reshape(int(audio.shape[0]), -1, 8)


class Undefined(Plain):
    def forward(self, audio: Tensor) -> Tensor:
        return super().forward(audio) * float("nan")


def test_parity_of_a_file_and_its_own_module(tmp_path: Path) -> None:
    encoder = Plain()
    report = core.export_encoder(encoder, PLAIN_SPEC, tmp_path / "plain.onnx")
    assert report.parameters == 8 * 401
    assert core.check_parity(encoder, report.path, PLAIN_SPEC) == report.max_abs_error < 1e-5


def test_parity_fails_for_another_module(tmp_path: Path) -> None:
    path = core.export_encoder(Plain(seed=0), PLAIN_SPEC, tmp_path / "plain.onnx").path
    with pytest.raises(ModelError, match=r"differs from the torch module by .* at 400 samples and batch 1"):
        core.check_parity(Plain(seed=1), path, PLAIN_SPEC)


def test_parity_fails_for_a_small_difference_in_one_quiet_clip(tmp_path: Path) -> None:
    encoder = Plain()
    path = core.export_encoder(encoder, PLAIN_SPEC, tmp_path / "plain.onnx").path
    with torch.no_grad():
        encoder.frames.weight[0] *= 1.01
    with pytest.raises(ModelError, match="differs from the torch module"):
        core.check_parity(encoder, path, PLAIN_SPEC)


def test_parity_names_a_file_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"the exported plain file does not load: .+"):
        core.check_parity(Plain(), tmp_path / "broken.onnx", PLAIN_SPEC)


@pytest.mark.parametrize(
    ("encoder", "declared", "message"),
    [
        (BatchCoupled(), {}, "differs from the torch module by .* at 400 samples and batch 2"),
        (FixedBatch(), {}, "does not run at 400 samples and batch 1: "),
        (Undefined(), {}, "differs from the torch module by nan"),
        (
            Plain(),
            {"hop_samples": 320},
            r"gives \(1, 2, 8\) at 719 samples and batch 1, .* its law \(1, 1, 8\)",
        ),
        (Plain(), {"receptive_field_samples": 240}, "its law"),
        (
            Plain(),
            {"min_samples": 399, "receptive_field_samples": 399},
            "does not run at 399 samples and batch 1: ",
        ),
    ],
)
def test_a_file_that_does_not_hold_is_not_kept(
    encoder: nn.Module, declared: dict[str, int], message: str, tmp_path: Path
) -> None:
    output = tmp_path / "model.onnx"
    output.write_bytes(b"what stood here before")
    spec = core.Spec(**(vars(PLAIN_SPEC) | declared))
    with pytest.raises(ModelError, match=message) as raised:
        core.export_encoder(encoder, spec, output)
    assert "\n" not in str(raised.value)
    assert output.read_bytes() == b"what stood here before"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("fixed", [0, 1])
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_fixed_dimension_is_refused(fixed: int, side: str, tmp_path: Path) -> None:
    path = core.export_encoder(Plain(), PLAIN_SPEC, tmp_path / "plain.onnx").path
    core.check_dynamic(path)
    model = onnx.load(path)
    value = getattr(model.graph, side)[0]
    value.type.tensor_type.shape.dim[fixed].dim_value = 2
    onnx.save(model, path)
    with pytest.raises(ModelError, match=f"fixes the batch or the time of '{value.name}'"):
        core.check_dynamic(path)


def test_an_exporter_that_specialises_without_a_word_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = core._trace

    def specialise(*arguments: Any) -> onnx.ModelProto:
        model = trace(*arguments)
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 49
        return model

    monkeypatch.setattr(core, "_trace", specialise)
    with pytest.raises(ModelError, match="fixes the batch or the time of 'embeddings'"):
        core.export_encoder(Plain(), PLAIN_SPEC, tmp_path / "plain.onnx")
    assert not list(tmp_path.iterdir())


def test_a_declared_chunk_length_is_written(tmp_path: Path) -> None:
    spec = core.Spec(**(vars(PLAIN_SPEC) | {"chunk_samples": 480_000}))
    model = onnx.load(core.export_encoder(Plain(), spec, tmp_path / "plain.onnx").path)
    assert ("xares.chunk_samples", "480000") in {(entry.key, entry.value) for entry in model.metadata_props}


# ---------------------------------------------------------------- the front door


def test_an_unknown_family_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown encoder family 'log-mel'.*did you mean 'logmel'\?.*known: ast, beats, "):
        export("log-mel", None, tmp_path / "out.onnx")


@pytest.mark.parametrize("output", [".", "missing-folder/out.onnx"])
def test_an_output_that_cannot_be_a_file_is_a_usage_error(output: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        export("logmel", None, tmp_path / output)


def test_without_torch_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "xares_onnx.exporters.core")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UsageError, match=r"needs torch; run: pip install 'xares-onnx\[export\]'"):
        export("logmel", None, tmp_path / "out.onnx")


@pytest.mark.parametrize(("module", "loaded"), [("exporters", "set()"), ("exporters.core", "{'torch'}")])
def test_importing_the_package_does_not_load_torch(module: str, loaded: str) -> None:
    code = f"import sys, xares_onnx.{module}; print({{'torch'}} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == loaded
