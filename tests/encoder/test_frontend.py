"""What may be declared of a front end, by whom, and what wins."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from feature_models import feature_model
from onnx_models import save

from xares_onnx.encoder.contract.declarations import (
    Declarations,
    declared_by_preprocessor,
    declared_frontend,
    declared_in_metadata,
    declared_in_sidecar,
    declared_on_command_line,
    merge,
    metadata_with,
)
from xares_onnx.encoder.contract.frontend import CHOICES, KEYS, PRESETS, Frontend, make_frontend
from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.errors import ContractError, UsageError

RATE = 16_000


def made(*sources: Declarations, mels: int | None = None) -> Frontend:
    return declared_frontend(merge(*sources), mels)[0]


def flags(*pairs: str) -> Declarations:
    return declared_on_command_line(pairs)


# ---------------------------------------------------------------- where it may be declared


def test_a_front_end_is_the_same_from_everywhere(tmp_path: Path) -> None:
    said = {"preset": "kaldi", "mels": 40, "high_hz": -400.0, "remove_dc": False, "padding": "symmetric", "log_offset": 1e-6}
    pairs = [f"frontend.{key}={value}" for key, value in said.items()]
    expected = made(flags(*pairs, "sample_rate=8000"))
    assert (expected.mels, expected.high_hz, expected.remove_dc, expected.padding) == (40, -400.0, False, "symmetric")
    assert (expected.sample_rate, expected.window_samples, expected.hop_samples, expected.fft_samples) == (
        8000,
        200,
        80,
        256,
    )
    table = "\n".join(f"{key} = {json.dumps(value)}" for key, value in said.items())
    dotted = "\n".join(f"frontend.{key} = {json.dumps(value)}" for key, value in said.items())
    for text in (f"sample_rate = 8000\n[frontend]\n{table}", f"sample_rate = 8000\n{dotted}"):
        (tmp_path / "model.toml").write_text(text)
        assert made(declared_in_sidecar(tmp_path / "model.toml")) == expected
    metadata = metadata_with({}, flags(*pairs, "sample_rate=8000"))
    assert metadata["xares.frontend.remove_dc"] == "false"
    assert metadata["xares.input_kind"] == "features"
    assert made(declared_in_metadata(metadata)) == expected


def test_where_each_field_is_from() -> None:
    _, sources = declared_frontend(flags("frontend.preset=whisper", "frontend.hop_samples=200"), 128)
    assert sources["frontend.preset"] == sources["frontend.hop_samples"] == "--contract"
    assert sources["frontend.mels"] == "graph"
    assert sources["frontend.log_range"] == "preset whisper"
    assert sources.keys() == KEYS.keys()


def test_every_field_has_a_key_and_every_choice_is_taken() -> None:
    assert set(KEYS) == {f"frontend.{name}" for name in Frontend.__struct_fields__ if name != "sample_rate"}
    assert CHOICES["frontend.preset"] == set(PRESETS)
    for key, choices in CHOICES.items():
        for choice in choices - {"none"}:
            preset = [] if key == "frontend.preset" else ["frontend.preset=kaldi"]
            value = getattr(made(flags(*preset, f"{key}={choice}")), key.removeprefix("frontend."))
            assert value == {"true": True, "false": False}.get(choice, choice)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("Yes", True), ("1", True), ("FALSE", False), ("no", False)])
def test_flags(text: str, value: bool) -> None:
    assert made(flags("frontend.preset=kaldi", f"frontend.remove_dc={text}")).remove_dc is value


def test_lengths_follow_each_other() -> None:
    """Kaldi's transform is the next power of two; elsewhere the window is the transform unless it is said."""
    lengths = {
        ("kaldi", "window_samples=513"): (513, 1024),
        ("kaldi", "window_samples=512"): (512, 512),
        ("kaldi", "fft_samples=400"): (400, 400),
        ("whisper", "fft_samples=512"): (512, 512),
        ("whisper", "window_samples=320"): (320, 400),
        ("librosa", "window_samples=400"): (400, 2048),
        ("librosa", "window_samples=4096"): (4096, 4096),
        ("librosa", "hop_samples=160"): (2048, 2048),
    }
    for (preset, said), expected in lengths.items():
        frontend = made(flags(f"frontend.preset={preset}", f"frontend.{said}"))
        assert (frontend.window_samples, frontend.fft_samples) == expected


def test_presets_at_another_rate() -> None:
    assert made(flags("frontend.preset=kaldi", "sample_rate=44100")).window_samples == 1102
    assert made(flags("frontend.preset=whisper", "sample_rate=44100")).window_samples == 400


# ---------------------------------------------------------------- what wins


def test_single_keys_win_and_the_rest_stays() -> None:
    below = declared_in_metadata(
        {"xares.frontend.preset": "kaldi", "xares.frontend.mels": "40", "xares.frontend.power": "1"}
    )
    frontend = made(flags("frontend.mels=64"), below)
    assert (frontend.preset, frontend.mels, frontend.power) == ("kaldi", 64, 1.0)


def test_another_preset_drops_the_keys_of_the_one_below() -> None:
    below = declared_in_metadata({"xares.frontend.preset": "kaldi", "xares.frontend.mels": "40"})
    assert made(flags("frontend.preset=whisper"), below) == make_frontend({"preset": "whisper"}, RATE)
    assert made(flags("frontend.preset=kaldi"), below).mels == 40


def test_another_kind_of_input_drops_what_the_one_below_says_of_features(tmp_path: Path) -> None:
    config = {"feature_extractor_type": "SeamlessM4TFeatureExtractor", "sampling_rate": 8_000}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    below = declared_by_preprocessor(tmp_path / "preprocessor_config.json")
    assert below["amplitude"].value == "int16"
    merged = merge(flags("input_kind=waveform"), below)
    assert {key: by.value for key, by in merged.items()} == {"input_kind": "waveform", "sample_rate": 8_000}


def test_a_key_of_a_front_end_says_that_features_go_in() -> None:
    declared = flags("frontend.mels=80")
    assert declared["input_kind"].value == "features"
    assert declared["input_kind"].source == "--contract"


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        ("frontend.mel=80", "there is no contract key 'frontend.mel'; did you mean 'frontend.mels'"),
        ("frontend.hop_length=80", "there is no contract key 'frontend.hop_length'; did you mean 'frontend.hop_samples'"),
        ("frontend.sample_rate=80", "there is no contract key 'frontend.sample_rate'"),
        ("frontend.preset=Whisper", "frontend.preset='Whisper' must be one of ced, kaldi, librosa, musicnn, nemo, "),
        ("frontend.log=ln", "frontend.log='ln' must be one of decibel, log10, natural, none"),
        ("frontend.remove_dc=maybe", "frontend.remove_dc='maybe' must be one of false, true"),
        ("frontend.mels=0", "frontend.mels=0 must be from 1 to 1024"),
        ("frontend.mels=80.5", "frontend.mels='80.5' is not a whole number"),
        ("frontend.fft_samples=1000000", "frontend.fft_samples=1000000 must be from 1 to 65536"),
        ("frontend.std=0", "frontend.std=0.0 must be from 1e-06 to 1e+06"),
        ("frontend.mean=nan", "frontend.mean='nan' is not a number"),
        ("frontend.stack_frames=17", "frontend.stack_frames=17 must be from 1 to 16"),
    ],
)
def test_wrong_declarations(pair: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        declared_on_command_line([pair])
    key, _, value = pair.partition("=")
    with pytest.raises(ContractError, match=re.escape(f"metadata: {says}")):
        declared_in_metadata({f"xares.{key}": value})


def test_a_waveform_has_no_front_end() -> None:
    says = "declares both input_kind=waveform and frontend.mels, which only features have; drop one"
    with pytest.raises(UsageError, match=f"--contract {says}"):
        flags("input_kind=waveform", "frontend.mels=80")
    with pytest.raises(ContractError, match=f"metadata {says}"):
        declared_in_metadata({"xares.input_kind": "waveform", "xares.frontend.mels": "80"})


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"low_hz": 9000.0}, "low_hz=9000 is not below the highest band's 8000 Hz"),
        ({"low_hz": 8000.0, "high_hz": 9000.0}, "low_hz=8000 is not below half the sampling rate, 8000 Hz"),
        ({"high_hz": -8000.0}, "low_hz=20 is not below the highest band's 0 Hz"),
        ({"log_floor": 0.0}, "the logarithm of silence needs a log_floor or log_offset above 0"),
        ({"log": "none", "log_range": 8.0}, "log_range and log_reference need a logarithm"),
    ],
)
def test_parts_that_do_not_fit(said: dict[str, Any], says: str) -> None:
    with pytest.raises(
        ContractError, match=re.escape(f"the declared front end is impossible: {says}; correct its frontend.* keys")
    ):
        make_frontend({"preset": "kaldi", **said}, RATE)


def test_a_sidecar_beside_a_model_is_enough(tmp_path: Path, shared_process: None) -> None:
    save(feature_model("kaldi", "BTF"), tmp_path / "model.onnx")
    (tmp_path / "model.toml").write_text('[frontend]\npreset = "kaldi"\nremove_dc = false\n')
    first, again = (load_encoder(tmp_path, device="cpu", cache=tmp_path / "cache").contract for _ in range(2))
    assert first.sources["frontend.remove_dc"] == first.sources["input_kind"] == "model.toml"
    assert again == first  # remembered, front end and all
    assert msgspec.json.decode(msgspec.json.encode(first), type=type(first)) == first
