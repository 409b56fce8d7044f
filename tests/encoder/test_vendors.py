"""The vendors' page: its examples are run as they stand there, and what they write needs no flags."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from feature_models import feature_model
from numpy.lib.stride_tricks import sliding_window_view
from onnx import numpy_helper
from onnx_models import noise
from onnx_models import save as save_model
from typer.testing import CliRunner

from xares_onnx import cli
from xares_onnx.encoder.contract.declarations import declared_on_command_line
from xares_onnx.encoder.contract.frontend import KEYS, PRESETS, make_frontend
from xares_onnx.encoder.encoder import load_encoder

PAGE = (Path(__file__).parents[2] / "docs/vendors.md").read_text()
RATE, HOP, RECEPTIVE, DIM = 16_000, 160, 400, 64


def run_example(title: str, folder: Path) -> None:
    """The code block under a heading, in a process of its own."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.split(f"\n## {title}")[1].split("\n## ")[0], flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def run(*arguments: str) -> None:
    done = CliRunner().invoke(cli.app, list(arguments))
    assert done.exit_code == 0, done.stderr


def annotate_as_shown() -> None:
    (command,) = re.findall(r"^    xares-onnx (annotate plain.onnx .*)$", PAGE, flags=re.MULTILINE)
    run(*shlex.split(command))


def test_the_plain_example_and_the_command_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_example("Plain `onnx.helper`", tmp_path)
    annotate_as_shown()
    signal = noise(RATE + 77)
    weights = numpy_helper.to_array(onnx.load("plain.onnx").graph.initializer[0])[:, 0].astype(np.float64)
    expected = np.abs(sliding_window_view(signal.astype(np.float64), RECEPTIVE)[::HOP] @ weights.T)
    for name in ("plain.onnx", "declared.onnx"):
        with load_encoder(name, device="cpu", threads=1) as encoder:
            contract = encoder.contract
            assert (contract.hop_samples, contract.receptive_field_samples, contract.dim) == (HOP, RECEPTIVE, DIM)
            assert (contract.sample_rate, contract.license) == (RATE, "MIT")
            assert contract.sources["sample_rate"] == contract.sources["license"] == "metadata"
            (found,) = encoder.embed([signal], RATE)
            np.testing.assert_allclose(found.frames, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("package", "title", "file"),
    [("tf2onnx", "TensorFlow", "tensorflow.onnx"), ("jax2onnx", "JAX", "jax.onnx")],
)
def test_an_example_of_a_framework(
    package: str, title: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    run_example(title, tmp_path)
    Path(file).rename("plain.onnx")
    annotate_as_shown()
    with load_encoder("declared.onnx", device="cpu", threads=1) as encoder:
        contract = encoder.contract
        assert (contract.hop_samples, contract.receptive_field_samples, contract.dim) == (HOP, RECEPTIVE, DIM)
        assert (contract.input_layout, contract.output_layout, contract.dynamic_batch) == ("BT", "BTD", True)
        assert contract.sources["sample_rate"] == "metadata"


def test_the_keys_of_the_page_can_be_declared() -> None:
    section = PAGE.split("\n## What is to be declared")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    checked = section.split("have them checked:")[1].split("\n\n")[0]
    keys = re.findall(r"`(\w+)`", " ".join([*rows, checked]))
    assert len(keys) > 15
    values = {"amplitude": "int16", "normalize": "zscore", "input_layout": "BT", "output_layout": "BTD"}
    values |= {"chunk_overlap": "window"}
    assert len(declared_on_command_line(f"{key}={values.get(key, 400)}" for key in keys)) == len(keys)


def test_the_table_of_front_ends_is_what_the_presets_are() -> None:
    section = PAGE.split("\n## Features in")[1].split("\nFurther presets")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| `")]
    heads, rows = rows[0], rows[1:]
    keys = [key for row in rows for key in re.findall(r"`(\w+)`", row[0])]
    assert sorted(f"frontend.{key}" for key in keys) == sorted(KEYS.keys() - {"frontend.preset"})
    said = {"25 ms": 400, "10 ms": 160, "the next power of 2": 512, "2^-23": 2.0**-23, "true": True, "false": False}
    for column, head in enumerate(heads[2:], 2):
        frontend = make_frontend({"preset": head.strip("`")}, RATE)
        for row in rows:
            names, values = re.findall(r"`(\w+)`", row[0]), row[column].split(", ")
            for name, text in zip(names, values, strict=True):
                found, value = getattr(frontend, name), said.get(text.strip("`"), text.strip("`"))
                found = "window" if found is msgspec.UNSET else found
                assert found == (type(found)(value) if not isinstance(found, bool) else value), (head, name)


def test_the_further_presets_are_what_the_page_says() -> None:
    section = PAGE.split("\nFurther presets")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| `")]
    assert {row[0].strip("`") for row in rows} == set(PRESETS) - {"whisper", "kaldi", "librosa"}
    for name, base, changes in rows:
        declared = dict(re.findall(r"`(\w+)=(\S+)`", changes))
        declared = {key: KEYS[f"frontend.{key}"](text) for key, text in declared.items()}
        preset = make_frontend({"preset": name.strip("`")}, RATE)
        changed = make_frontend({"preset": base.strip("`"), **declared}, RATE)
        assert msgspec.structs.replace(changed, preset=preset.preset) == preset


@pytest.mark.parametrize("heading", ["A front end that is a graph", "Windows"])
def test_the_keys_of_the_other_tables_can_be_declared(heading: str) -> None:
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    keys = re.findall(r"`((?:frontend|window)\.\w+)`", " ".join(re.findall(r"^\| (.*?) \|", section, flags=re.MULTILINE)))
    assert len(keys) >= 3
    assert declared_on_command_line(f"{key}=2" for key in keys).keys() >= set(keys)


def test_what_the_page_adds_for_each_family_can_be_declared() -> None:
    section = PAGE.split("\n## My encoder is")[1].split("\n## ")[0]
    pairs = re.findall(r"`((?:frontend|window|tokens|constant)\.\S+=\S+|amplitude=\S+|input_layout=\S+)`", section)
    assert len(pairs) > 15
    for pair in pairs:
        assert declared_on_command_line([pair.replace("=N", "=2")])


def test_the_flags_of_the_page_for_features(tmp_path: Path) -> None:
    (command,) = re.findall(r"^    xares-onnx evaluate mel.onnx (.*)$", PAGE, flags=re.MULTILINE)
    save_model(feature_model("kaldi", "BTF"), tmp_path / "mel.onnx")
    with load_encoder(tmp_path / "mel.onnx", device="cpu", contract=shlex.split(command)[1::2]) as encoder:
        frontend = encoder.contract.frontend
        assert frontend is not None
        assert (frontend.preset, frontend.high_hz, encoder.contract.amplitude) == ("kaldi", -400.0, "int16")
