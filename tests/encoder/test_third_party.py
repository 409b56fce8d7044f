"""Files that others ship: every ONNX model in two wheels ends in a score or in one sentence that says why not.

The wheels are installed without their dependencies (`make test`); only their files are used, nothing of them is imported.
"""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from corpus import write_task, write_tones
from onnx_models import noise
from typer.testing import CliRunner

from xares_onnx import cli
from xares_onnx.encoder.encoder import load_encoder

pytestmark = pytest.mark.usefixtures("shared_process")

RATE = 22_050  # of basic-pitch


def model_of(package: str, inside: str) -> Path:
    """A model file of an installed package; skips the test where it is not installed."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"needs: pip install --no-deps {package.replace('_', '-')}")
    path = Path(found.submodule_search_locations[0], inside)
    assert path.is_file()
    return path


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of an evaluation on a small task of tones."""
    monkeypatch.chdir(tmp_path)
    task = write_task(tmp_path, "tones")
    write_tones(tmp_path / "data", "tones", train=8, valid=4, test=4)
    places = ["--data", str(tmp_path / "data"), "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out.json")]
    return ["--tasks", str(task), *places, "--method", "knn", "--device", "cpu", "--threads", "1", "--json"]


def sentence(code: int, out: str, err: str) -> str:
    """The one line of a model that cannot be used."""
    assert (code, out) == (3, "")
    *notes, said = err.splitlines()
    assert all(note.startswith("note: ") for note in notes)
    assert said.startswith("xares-onnx: ")
    return said.removeprefix("xares-onnx: ")


# ---------------------------------------------------------------- silero-vad: a voice detector fed piece by piece


@pytest.mark.parametrize(
    ("file", "state", "after"),
    [
        ("silero_vad.onnx", "state", "stateN"),
        ("silero_vad_half.onnx", "state", "stateN"),  # in half precision
        ("silero_vad_op18_ifless.onnx", "state", "stateN"),
        ("silero_vad_16k_sequence.onnx", "h", "hn"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--contract", "input=input"]])
def test_a_stateful_model_is_refused_by_the_name_of_its_state(
    file: str, state: str, after: str, flags: list[str], scored: list[str]
) -> None:
    path = model_of("silero_vad", f"data/{file}")
    said = sentence(*run("evaluate", str(path), *scored, *flags))
    assert said.startswith(f"the model keeps a state: input '{state}' takes output '{after}' of the previous call")


def test_a_stateful_model_is_not_annotated(tmp_path: Path) -> None:
    path = model_of("silero_vad", "data/silero_vad.onnx")
    said = sentence(*run("annotate", str(path), "--contract", "sample_rate=16000", "-o", str(tmp_path / "out.onnx")))
    assert said.startswith("the model keeps a state: input 'state'")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- basic-pitch: three outputs over a window of 43,844 samples

PITCH = ("basic_pitch", "saved_models/icassp_2022/nmp.onnx")
WINDOW_INPUT, OUTPUTS = "serving_default_input_2:0", [f"StatefulPartitionedCall:{number}" for number in range(3)]


def score_or_sentence(path: Path, scored: list[str], *flags: str) -> dict[str, object] | None:
    """The contract of a model that was scored; None for one that was refused by naming an input or an output."""
    code, out, err = run("evaluate", str(path), *scored, *flags)
    if code:
        said = sentence(code, out, err)
        assert any(repr(name) in said for name in (WINDOW_INPUT, *OUTPUTS)), said
        return None
    result = json.loads(out)
    assert result["tasks"][0]["score"] >= 0
    contract: dict[str, object] = result["encoder"]["contract"]
    return contract


@pytest.mark.parametrize("output", [None, *OUTPUTS])
def test_a_model_of_a_fixed_window_ends_in_a_score_or_a_sentence(output: str | None, scored: list[str]) -> None:
    path = model_of(*PITCH)
    flags = ["--contract", f"sample_rate={RATE}", *(["--contract", f"output={output}"] if output else [])]
    contract = score_or_sentence(path, scored, *flags)
    assert contract is None or output is None or contract["output"] == {"value": output, "source": "--contract"}


def test_an_annotated_model_of_a_fixed_window_needs_no_flags(tmp_path: Path, scored: list[str]) -> None:
    path, copy = model_of(*PITCH), tmp_path / "pitch.onnx"
    flags = ["--contract", f"sample_rate={RATE}", "--contract", f"output={OUTPUTS[0]}"]
    code, out, err = run("annotate", str(path), *flags, "-o", str(copy))
    if code:  # such a window is no part of the contract
        assert repr(WINDOW_INPUT) in sentence(code, out, err)
        assert not copy.exists()
        return
    contract = score_or_sentence(copy, scored)
    assert contract is not None
    assert contract["sample_rate"] == {"value": RATE, "source": "metadata"}
    assert contract["output"] == {"value": OUTPUTS[0], "source": "metadata"}


# ---------------------------------------------------------------- resemblyzer: an LSTM on mel powers, as librosa makes them


def test_a_published_encoder_that_takes_features(tmp_path: Path) -> None:
    """Its weights behind features made here are the export with the front end inside."""
    import torch

    from xares_onnx.exporters import resemblyzer

    model_of("resemblyzer", "pretrained.pt")
    encoder = resemblyzer.build("resemblyzer", None)[0].eval()

    class FromMel(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.linear = encoder.lstm, encoder.linear

        def forward(self, mel: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(self.linear(self.lstm(mel)[0]).relu(), dim=-1)

    axes = {"mel": {0: "batch", 1: "frames"}, "embeddings": {0: "batch", 1: "frames"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": ["mel"], "output_names": ["embeddings"], "dynamic_axes": axes}
        torch.onnx.export(
            FromMel(), (torch.rand(2, 50, 40),), str(tmp_path / "mel.onnx"), opset_version=17, dynamo=False, **names
        )
    sizes = ["fft_samples=400", "hop_samples=160", "log=none", "log_range=0"]
    said = ["frontend.preset=librosa", *(f"frontend.{size}" for size in sizes)]
    clips = [noise(samples, samples) for samples in (401, 5_001, 20_001, 33_333)]
    with load_encoder(tmp_path / "mel.onnx", device="cpu", contract=said) as loaded:
        assert loaded.contract.sources["frontend.mels"] == "graph"
        found = loaded.embed(clips, 16_000)
    with torch.no_grad():
        for clip, embedding in zip(clips, found, strict=True):
            padded = np.pad(clip, (0, max(0, 16_000 - len(clip))))
            expected = encoder(torch.from_numpy(padded)[None])[0].numpy()
            np.testing.assert_allclose(embedding.frames, expected[: len(embedding.frames)], rtol=0, atol=1e-5)
            np.testing.assert_allclose(embedding.times, 0.01 * np.arange(len(embedding.frames)), rtol=0, atol=1e-9)


# ---------------------------------------------------------------- `check` of both


def test_a_check_names_the_state_and_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run("check", str(model_of("silero_vad", "data/silero_vad.onnx")), "--device", "cpu", "--format", "json")
    assert (code, faults(out)) == (3, ["inputs"])
    assert "the model keeps a state: input 'state'" in err
    said = ["--contract", f"sample_rate={RATE}", "--contract", f"output={OUTPUTS[0]}"]
    arguments = ["check", str(model_of(*PITCH)), "--device", "cpu", "--format", "json", *said]
    code, out, _ = run(*arguments)
    assert (code, faults(out)) == (1, ["dynamic-time"])
    code, out, _ = run(*arguments, "--contract", "chunk_samples=43844")
    assert (code, faults(out)) == (0, [])


def faults(report: str) -> list[str]:
    return [finding["property"] for finding in json.loads(report)["findings"] if finding["status"] == "fail"]
