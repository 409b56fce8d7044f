"""A model file as a torch module: its arithmetic, and a run of X-ARES itself with it.

X-ARES is installed with what it needs into a folder of its own (`make test`), which only its process sees.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from corpus import CLASSES, tones, write_encoder
from shard_makers import RATE, noise, write_shard

from xares_onnx import load_encoder, torch_module
from xares_onnx.encoder.torch_module import OnnxEncoder
from xares_onnx.errors import UsageError

X_ARES = Path(sys.prefix, "x-ares")
LENGTHS = (4_001, 8_000, 6_399)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def module(model: Path) -> OnnxEncoder:
    return torch_module(model, device="cpu", threads=1)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Clips of several lengths, zero-padded, and their mask."""
    clips = [torch.from_numpy(noise(samples / RATE, seed=samples)[:samples]) for samples in LENGTHS]
    audio = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    return audio, (torch.arange(audio.shape[1]) < torch.tensor(LENGTHS)[:, None]).long()


def test_it_has_what_the_benchmarks_read(module: OnnxEncoder) -> None:
    assert isinstance(module, torch.nn.Module)
    assert type(module).__name__.endswith("Encoder")  # X-ARES asks for it
    assert (module.sampling_rate, module.output_dim, module.hop_size_in_ms) == (RATE, 12, 10.0)
    assert next(module.parameters()).device.type == "cpu"
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_one_argument_gives_frames_and_two_a_pair(module: OnnxEncoder) -> None:
    audio, _ = padded()
    frames = module(audio)
    assert (frames.dtype, len(frames), frames.shape[2]) == (torch.float32, 3, 12)
    assert torch.equal(module(audio[0]), frames[:1])
    pair, mask = module(audio, None)
    assert mask is None
    assert torch.equal(pair, frames)


def test_a_masked_clip_is_embedded_as_if_it_were_alone(module: OnnxEncoder, model: Path) -> None:
    audio, mask = padded()
    frames, kept = module(audio, mask)
    with load_encoder(model, device="cpu", threads=1) as encoder:
        for row, length in enumerate(LENGTHS):
            (alone,) = encoder.embed([audio[row, :length].numpy()], RATE)
            count = len(alone.frames)
            assert kept[row].tolist() == [1] * count + [0] * (kept.shape[1] - count)
            assert np.array_equal(frames[row, :count], alone.frames)
            assert not frames[row, count:].any()


@pytest.mark.parametrize(
    ("audio", "mask", "sentence"),
    [
        (torch.zeros(2, 1, 800), None, r"audio must be \(clips, samples\), not \(2, 1, 800\)"),
        (torch.zeros(2, 800), torch.ones(2, 799), "the mask must have the shape of the audio"),
        (torch.zeros(1, 800), torch.tensor([[0] * 400 + [1] * 400]), "0 for the padding after them"),
        (torch.zeros(1, 800), torch.zeros(1, 800), "a waveform must have the shape"),
    ],
)
def test_what_it_refuses(module: OnnxEncoder, audio: torch.Tensor, mask: torch.Tensor | None, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        module(audio, mask)


TORCHAUDIO = """
import soundfile, soxr, torch
def load(path):
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T.copy()), rate
class functional:
    @staticmethod
    def resample(audio, rate, target):
        return audio if rate == target else torch.from_numpy(soxr.resample(audio.numpy().T, rate, target).T)
"""
ENCODER = """
from functools import partial
import xares_onnx
BankEncoder = partial(xares_onnx.torch_module, "model.onnx", device="cpu", threads=1)
"""
TASK = """
from xares.task import TaskConfig
LABELS = {labels!r}
def tones_config(encoder):
    return TaskConfig(
        name="tones", formal_name="Tones", encoder=encoder, private=True, eval_weight=1, output_dim=len(LABELS),
        label_processor=lambda found: LABELS[found["label"]], epochs=10, learning_rate=0.03, num_encoder_workers=0,
    )
"""


@pytest.mark.skipif(not X_ARES.is_dir(), reason="needs X-ARES in a folder of its own; make test installs it")
def test_x_ares_itself_scores_a_model_file(tmp_path: Path, model: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(model.read_bytes())
    labels = {name: number for number, name in enumerate(CLASSES)}
    for name, text in {
        "torchaudio/__init__.py": TORCHAUDIO,
        "bank.py": ENCODER,
        "tones_of_four_classes.py": TASK.format(labels=labels),
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    home = tmp_path / "env" / "tones"
    test_clips = tones(24, 2, noise=0.1, prefix="test")
    write_shard(home / "train-0.tar", tones(48, 0, noise=0.1, prefix="train"))
    write_shard(home / "valid-0.tar", tones(16, 1, noise=0.1, prefix="valid"))
    write_shard(home / "test-0.tar", test_clips)
    (home / ".audio_tar_ready").touch()
    done = subprocess.run(
        [sys.executable, "-m", "xares.run", "bank.py", "tones_of_four_classes.py", "--max-jobs", "0", "--from-stage", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(X_ARES), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    row = re.search(r"Tones +(0\.\d+|1\.0+) +(0\.\d+|1\.0+)", done.stdout)
    assert row, done.stdout[-2000:]
    assert min(map(float, row.groups())) > 0.5  # of the head and the kNN; chance is 0.25
    (shard,) = home.glob("embeddings/OnnxEncoder/wds-encoded-test*.tar")
    stored = {key: np.load(io.BytesIO(data["npy"])) for key, data in members(shard).items()}
    with load_encoder(model, device="cpu", threads=1) as encoder:
        clips = [soundfile.read(io.BytesIO(data), dtype="float32")[0] for data, _ in test_clips.values()]
        embedded = encoder.embed(clips, RATE)
    assert len(stored) == len(test_clips)
    for key, clip in zip(test_clips, embedded, strict=True):
        (frames,) = (value for name, value in stored.items() if name.startswith(key))
        assert np.array_equal(frames, clip.frames)


def members(shard: Path) -> dict[str, dict[str, bytes]]:
    """The files of each clip of a shard, by their endings."""
    clips: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, ending = member.name.rpartition(".")
            file = tar.extractfile(member)
            assert file
            clips.setdefault(key, {})[ending] = file.read()
    return clips
