"""Whisper's encoder, as a random checkpoint, against extractor and model run one clip at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from corpus import score_of_sound
from numpy.typing import NDArray
from random_checkpoints import Plain, edit_json, save_whisper
from torch import Tensor

from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.errors import ModelError, UsageError
from xares_onnx.exporters import core, export, whisper

pytestmark = pytest.mark.usefixtures("shared_process")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("checkpoints") / "small-whisper")


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("whisper", str(checkpoint), tmp_path_factory.mktemp("exported") / "whisper.onnx").path


def chirp(samples: int) -> NDArray[np.float32]:
    """A tone that rises out of silence: from the quietest to the loudest that the front end tells apart."""
    time = np.arange(samples) / 16_000
    loudness = 10.0 ** (-6 * np.linspace(1, 0, samples))
    return (0.5 * loudness * np.sin(2 * np.pi * (200 + 400 * time) * time)).astype(np.float32)


def plain(folder: Path, audio: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.no_grad():
        embedding: NDArray[np.float32] = Plain(folder)(torch.from_numpy(audio)[None])[0].numpy()
    return embedding


def run(path: Path, audio: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"audio": audio[None]})
    embedding: NDArray[np.float32] = found[0]
    return embedding


def test_the_file_is_the_published_pipeline(checkpoint: Path, exported: Path) -> None:
    with torch.no_grad():
        assert core.check_parity(Plain(checkpoint), exported, whisper.build("whisper", str(checkpoint))[1]) < 1e-4


def test_the_real_window_and_128_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "PROBE_BATCHES", (1,))  # half a minute in each; what a batch does, a small window shows
    folder = save_whisper(tmp_path / "large", seconds=30, bands=128)
    path = export("whisper", str(folder), tmp_path / "large.onnx").path
    for samples in (30_001, 480_000):
        audio = chirp(samples)
        found = run(path, audio)
        assert found.shape == (-(-samples // 320), 32)
        np.testing.assert_allclose(found, plain(folder, audio), atol=1e-3)


@pytest.mark.parametrize("samples", [1, 320, 321, 15_999, 48_000])
def test_frames_are_those_of_the_audio(samples: int, checkpoint: Path, exported: Path) -> None:
    found = run(exported, chirp(samples))
    assert len(found) == -(-samples // 320)
    np.testing.assert_allclose(found, plain(checkpoint, chirp(samples)), atol=1e-3)


def test_parity_can_fail_for_random_weights(checkpoint: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 9_001)).astype(np.float32)
    one, other = plain(checkpoint, noise[0]), plain(checkpoint, noise[1])
    assert np.abs(one - other).max() > 100 * core.TOLERANCE["fp32"] * np.abs(one).max()


def unfloored(self: whisper.WhisperLogMel, audio: Tensor) -> Tensor:
    audio = torch.nn.functional.pad(audio, (0, self.samples))[:, : self.samples]
    power: Tensor = self.power(torch.nn.functional.pad(audio, (200, 200), mode="reflect"))[:, :-1]
    return (power.transpose(1, 2).clamp_min(1e-10).log10() + 4.0) / 4.0


def unmirrored(self: whisper.WhisperLogMel, audio: Tensor) -> Tensor:
    audio = torch.nn.functional.pad(audio, (200, self.samples + 200))[:, : self.samples + 400]
    decades = self.power(audio)[:, :-1].transpose(1, 2).clamp_min(1e-10).log10()
    floor = decades.amax(dim=(1, 2), keepdim=True) - 8.0
    return (torch.maximum(decades, floor) + 4.0) / 4.0


@pytest.mark.parametrize("wrong", [unfloored, unmirrored])
def test_a_front_end_without_one_of_its_parts_fails(
    wrong: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file then agrees with its own module, and not with the publisher's."""
    monkeypatch.setattr(whisper.WhisperLogMel, "forward", wrong)
    path = export("whisper", str(checkpoint), tmp_path / "wrong.onnx").path
    with torch.no_grad(), pytest.raises(ModelError, match="differs from the torch module"):
        core.check_parity(Plain(checkpoint), path, whisper.build("whisper", str(checkpoint))[1])


def test_a_floor_over_the_batch_is_caught(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def coupled(self: whisper.WhisperLogMel, audio: Tensor) -> Tensor:
        features = unfloored(self, audio)
        return torch.maximum(features, features.max() - 2.0)

    monkeypatch.setattr(whisper.WhisperLogMel, "forward", coupled)
    with pytest.raises(ModelError, match=r"differs from the torch module by .* and batch 2"):
        export("whisper", str(checkpoint), tmp_path / "out.onnx")


def test_without_the_trim_the_law_is_broken(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whisper.WhisperEncoder, "forward", lambda self, audio: self.body(self.front_end(audio)))
    with pytest.raises(ModelError, match=r"gives \(1, 150, 32\) at 1 samples and batch 1, .* its law \(1, 1, 32\)"):
        export("whisper", str(checkpoint), tmp_path / "out.onnx")


def test_the_contract_and_a_recording_longer_than_the_window(checkpoint: Path, exported: Path) -> None:
    audio = chirp(48_000 + 32_001)
    with load_encoder(exported, device="cpu", threads=1) as encoder:
        contract = encoder.info.contract
        (embedding,) = encoder.embed([audio], rate=16_000)
    assert (contract.hop_samples, contract.receptive_field_samples, contract.dim) == (320, 1, 32)
    assert (contract.max_samples, contract.chunk_samples, contract.min_samples) == (48_000, 48_000, 1)
    assert (contract.first_frame_center_samples, contract.sample_rate, contract.batch_coupled) == (0, 16_000, False)
    assert contract.source == "small-whisper"
    both = [plain(checkpoint, audio[:48_000]), plain(checkpoint, audio[48_000:])]
    np.testing.assert_allclose(embedding.frames, np.concatenate(both), atol=1e-3)
    np.testing.assert_allclose(embedding.times, np.arange(len(embedding.frames)) * 0.02)


def test_whisper_ends_in_a_score(exported: Path, tmp_path: Path) -> None:
    assert score_of_sound(exported, tmp_path) > 0.5


@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"quantize": "int8-dynamic"}], ids=str)
def test_smaller_files_keep_the_front_end(options: dict[str, str], checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    path = export("whisper", str(checkpoint), tmp_path / "small.onnx", **options).path
    whole, small = run(exported, chirp(20_001)), run(path, chirp(20_001))
    assert 0 < np.abs(small - whole).max() < (0.05 if "dtype" in options else 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hop_length": 320}, "has hop_length=320; only 160 is supported"),
        ({"dither": 0.1}, "has dither=0.1; only 0.0 is supported"),
        ({"do_normalize": True}, "has do_normalize=True; only False is supported"),
        ({"feature_size": 128}, "a preprocessor of 128 bands and an encoder of 80"),
    ],
)
def test_another_front_end_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save_whisper(tmp_path / "other")
    edit_json(folder / "preprocessor_config.json", **changes)
    with pytest.raises(UsageError, match=message):
        export("whisper", str(folder), tmp_path / "out.onnx")


def test_a_missing_decoder_does_not_matter_and_a_missing_encoder_does(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_whisper(tmp_path / "part")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if name.startswith("encoder.")}, weights)
    export("whisper", str(folder), tmp_path / "out.onnx")
    save_file({name: value for name, value in tensors.items() if "conv2" not in name}, weights)
    with pytest.raises(UsageError, match=r"lacks weights of the encoder, .*encoder\.conv2\.bias first of 2"):
        export("whisper", str(folder), tmp_path / "other.onnx")
