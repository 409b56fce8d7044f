"""The generic family: modules of a user's own file, from waveform to frames."""

from __future__ import annotations

import textwrap
from itertools import count
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from corpus import score_of_sound
from numpy.lib.stride_tricks import sliding_window_view

from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.errors import ModelError, UsageError
from xares_onnx.exporters import export

pytestmark = pytest.mark.usefixtures("shared_process")

SOURCE = """
    import torch
    from torch import nn


    class Encoder(nn.Module):
        def __init__(self, hop=200, window=512, rate=8_000):
            super().__init__()
            torch.manual_seed(0)
            self.front_end = nn.Conv1d(1, 16, window, stride=hop, bias=False)
            self.mix = nn.Linear(16, 8)
            self.sample_rate = rate

        def forward(self, audio):
            return self.mix(self.front_end(audio[:, None]).abs().transpose(1, 2))


    class Channels(Encoder):
        def forward(self, audio):
            return super().forward(audio)[..., 0]


    class Uneven(Encoder):
        def forward(self, audio):
            return super().forward(audio)[:, :: 2 + audio.shape[1] % 3]


    class Coupled(Encoder):
        def forward(self, audio):
            return super().forward(audio / audio.abs().max())


    class Frozen(Encoder):
        def forward(self, audio):
            return super().forward(audio) * float(audio[0, 0])


    class Choosy(Encoder):
        min_samples, max_samples, chunk_samples = 4_000, 20_000, 16_000
        first_frame_center_samples, license, source = 99.5, "MIT", "a laboratory"

        def forward(self, audio):
            if not 4_000 <= audio.shape[1] <= 20_000:
                raise ValueError(f"{audio.shape[1]} samples")
            return super().forward(audio)


    class Made:
        build = Choosy


    def silent_rate():
        encoder = Encoder()
        del encoder.sample_rate
        return encoder


    def failing():
        raise RuntimeError("no weights here\\nat all")


    def half_a_sample():
        encoder = Encoder()
        encoder.min_samples = 400.5
        return encoder


    def nothing():
        return None
"""
_numbers = count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder, a new one for each test: an import is remembered."""
    name = f"somebodys_encoder_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.chdir(tmp_path)
    return name


def test_a_module_of_ones_own_is_measured_and_exported(module: str, tmp_path: Path) -> None:
    path = export("torch", f"{module}:Encoder", tmp_path / "own.onnx").path
    model = onnx.load(path)
    weights = {weight.name: onnx.numpy_helper.to_array(weight) for weight in model.graph.initializer}
    filters = weights["front_end.weight"][:, 0]
    (matrix,) = (value for value in weights.values() if value.shape == (16, 8))
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, 8_123).astype(np.float32)
    expected = np.abs(sliding_window_view(audio, 512)[::200] @ filters.T) @ matrix + weights["mix.bias"]
    with load_encoder(path, device="cpu", threads=1) as encoder:
        contract = encoder.info.contract
        (embedding,) = encoder.embed([audio], rate=8_000)
    np.testing.assert_allclose(embedding.frames, expected, atol=1e-5)
    assert (contract.hop_samples, contract.receptive_field_samples, contract.dim) == (200, 512, 8)
    assert (contract.sample_rate, contract.min_samples, contract.first_frame_center_samples) == (8_000, 512, 256)
    assert (contract.license, contract.source) == ("not stated", f"{module}:Encoder")


def test_what_a_module_says_of_itself_is_declared(module: str, tmp_path: Path) -> None:
    path = export("torch", f"{module}:Made.build", tmp_path / "own.onnx").path
    with load_encoder(path, device="cpu", threads=1) as encoder:
        contract = encoder.info.contract
    assert (contract.min_samples, contract.max_samples, contract.chunk_samples) == (4_000, 20_000, 16_000)
    assert (contract.first_frame_center_samples, contract.license, contract.source) == (99.5, "MIT", "a laboratory")


def test_a_front_end_stays_as_it_is(module: str, tmp_path: Path) -> None:
    whole = export("torch", f"{module}:Encoder", tmp_path / "whole.onnx").path
    half = export("torch", f"{module}:Encoder", tmp_path / "half.onnx", dtype="fp16").path
    kinds = {weight.name: weight.data_type for weight in onnx.load(half).graph.initializer}
    assert kinds["front_end.weight"] == onnx.TensorProto.FLOAT
    assert kinds["mix.bias"] == onnx.TensorProto.FLOAT16
    audio = {"audio": np.random.default_rng(0).uniform(-0.5, 0.5, (2, 8_123)).astype(np.float32)}
    one, other = (
        onnxruntime.InferenceSession(p, providers=["CPUExecutionProvider"]).run(None, audio) for p in (whole, half)
    )
    assert 0 < np.abs(one[0] - other[0]).max() < 2e-3


def test_a_module_of_ones_own_ends_in_a_score(module: str, tmp_path: Path) -> None:
    path = export("torch", f"{module}:Encoder", tmp_path / "own.onnx").path
    assert score_of_sound(path, tmp_path) > 0.4


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Channels", r"gives \(1, \d+\) for one clip; it must give \[batch, frames, dim\]"),
        ("Uneven", "do not grow evenly with its input"),
        ("Coupled", "differs from the torch module by .* and batch 2"),
        ("Frozen", "differs from the torch module"),
    ],
)
def test_a_module_that_does_not_hold_is_refused(factory: str, message: str, module: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        export("torch", f"{module}:{factory}", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("silent_rate", r"must declare its sampling rate in Hz: set module\.sample_rate"),
        ("half_a_sample", r"has min_samples=400\.5, which must be a number of samples"),
        ("failing", "gives no module: RuntimeError: no weights here$"),
        ("nothing", r"returns NoneType, which must be a torch\.nn\.Module"),
        ("missing", "gives no module: AttributeError"),
    ],
)
def test_a_factory_without_a_module_is_wrong_usage(factory: str, message: str, module: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        export("torch", f"{module}:{factory}", tmp_path / "out.onnx")


@pytest.mark.parametrize("named", [None, "somewhere", "somewhere:", ":build"])
def test_a_factory_needs_its_module(named: str | None, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torch needs module:factory, such as"):
        export("torch", named, tmp_path / "out.onnx")


def test_a_module_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ModuleNotFoundError: No module named 'not_there_at_all'"):
        export("torch", "not_there_at_all:build", tmp_path / "out.onnx")
