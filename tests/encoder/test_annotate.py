"""`annotate`: what a copy declares, what of the model stays as it was, and what is refused without leaving a trace."""

from __future__ import annotations

import errno
import json
import os
import shlex
from pathlib import Path

import numpy as np
import onnx
import onnx_models as models
import pytest
from feature_models import feature_model
from hostile_models import gives_vectors_of
from onnx_models import noise, save, save_external
from typer.testing import CliRunner

from xares_onnx import cli
from xares_onnx.encoder.annotate import annotate
from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.errors import ContractError, DiskFullError, ModelError, UsageError

RATE = 16_000
pytestmark = pytest.mark.usefixtures("shared_process")


def written_to(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


def without_metadata(path: Path) -> bytes:
    model = onnx.load(path, load_external_data=False)
    model.ClearField("metadata_props")
    return model.SerializeToString(deterministic=True)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.app, ["annotate", *arguments])
    return done.exit_code, done.stdout, done.stderr


# ---------------------------------------------------------------- what is written


def test_the_copy_declares_what_was_said_and_nothing_else_changes(tmp_path: Path) -> None:
    model = save(models.encoder(), tmp_path / "model.onnx")
    original = model.read_bytes()
    said = ["sample_rate=8000", "output_dim=4", "hop_samples=160", "first_frame_center_samples=200.5", "normalize=zscore"]
    annotate(model, [*said, "license=MIT", "source=a = b, ü"], tmp_path / "out.onnx")
    assert written_to(tmp_path / "out.onnx") == {
        "sample_rate": "8000",
        "output_dim": "4",
        "xares.contract_version": "1",
        "xares.hop_samples": "160",
        "xares.first_frame_center_samples": "200.5",
        "xares.normalize": "zscore",
        "xares.license": "MIT",
        "xares.source": "a = b, ü",
    }
    assert without_metadata(tmp_path / "out.onnx") == without_metadata(model)
    assert model.read_bytes() == original
    assert sorted(files_in(tmp_path)) == ["model.onnx", "out.onnx"]


def test_the_contract_of_the_copy_is_declared_in_its_metadata(tmp_path: Path) -> None:
    model = save(models.two_hidden_states(), tmp_path / "model.onnx")
    with pytest.raises(ContractError, match="name it by --contract output=NAME"):
        load_encoder(model)
    said = {"output": "layer_2", "sample_rate": "8000", "amplitude": "int16", "normalize": "zscore", "chunk_samples": "9000"}
    annotate(model, [f"{key}={value}" for key, value in said.items()], tmp_path / "out.onnx")
    contract = load_encoder(tmp_path / "out.onnx").contract
    assert {key: str(getattr(contract, key)) for key in said} == said
    assert {contract.sources[key] for key in said} == {"metadata"}


def test_a_front_end_is_written_and_read_again(tmp_path: Path) -> None:
    model = save(feature_model("kaldi", "BTF"), tmp_path / "model.onnx")
    said = ["frontend.preset=kaldi", "frontend.padding=symmetric", "frontend.high_hz=-400", "frontend.remove_dc=no"]
    by_flags = load_encoder(model, contract=[*said, "amplitude=int16"])
    embedded = by_flags.embed([noise(RATE)], RATE)[0].frames
    annotate(model, [*said, "amplitude=int16"], tmp_path / "out.onnx")
    assert written_to(tmp_path / "out.onnx") == {
        "xares.contract_version": "1",
        "xares.input_kind": "features",
        "xares.frontend.preset": "kaldi",
        "xares.frontend.padding": "symmetric",
        "xares.frontend.high_hz": "-400.0",
        "xares.frontend.remove_dc": "false",
        "xares.amplitude": "int16",
        "normalize_samples": "0",
    }
    copy = load_encoder(tmp_path / "out.onnx")
    assert copy.contract.frontend == by_flags.contract.frontend
    assert {copy.contract.sources[f"frontend.{key}"] for key in ("preset", "padding", "high_hz", "remove_dc")} == {
        "metadata"
    }
    np.testing.assert_array_equal(copy.embed([noise(RATE)], RATE)[0].frames, embedded)


def test_a_copy_keeps_the_front_end_that_a_preprocessor_declares(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    model = save(feature_model("whisper", "BFT", sizes={"T": 100}), tmp_path / "from" / "model.onnx")
    config = {"feature_extractor_type": "WhisperFeatureExtractor", "sampling_rate": RATE, "chunk_length": 1}
    (tmp_path / "from" / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(
        UsageError, match=r"would lose the declarations beside the model in preprocessor_config\.json; add "
    ) as caught:
        annotate(model, ["license=MIT"], tmp_path / "out.onnx")
    flags = shlex.split(str(caught.value).split("; add ")[1])[1::2]
    annotate(model, ["license=MIT", *flags], tmp_path / "out.onnx")
    assert load_encoder(tmp_path / "out.onnx").contract.frontend == load_encoder(model).contract.frontend


@pytest.mark.parametrize(("amplitude", "scale"), [("int16", 32768), ("unit", 1)])
def test_the_copy_is_fed_as_it_declares(amplitude: str, scale: int, tmp_path: Path) -> None:
    other = {"xares.amplitude": "int16" if scale == 1 else "unit", "normalize_samples": "0" if scale == 1 else "1"}
    model = save(models.encoder(metadata=other), tmp_path / "model.onnx")
    annotate(model, [f"amplitude={amplitude}"], tmp_path / "out.onnx")
    signal = noise(RATE)
    (found,) = load_encoder(tmp_path / "out.onnx").embed([signal], RATE)
    np.testing.assert_allclose(found.frames, models.embed(signal.astype(np.float64) * scale), rtol=1e-4, atol=1e-5)
    assert written_to(tmp_path / "out.onnx")["normalize_samples"] == ("0" if scale == 32768 else "1")  # sherpa-onnx's key


def test_metadata_is_kept_and_what_is_replaced_is_said(tmp_path: Path) -> None:
    old = {"comment": "theirs", "xares.output_dim": "4", "sample_rate": "16k", "model_type": "bank", "xares.license": "MIT"}
    model = save(models.encoder(metadata=old), tmp_path / "model.onnx")  # a rate that nobody can read
    pairs = ["--contract", "sample_rate=8000", "--contract", "output_dim=4", "--contract", "license=MIT"]
    code, out, err = run(str(model), *pairs, "-o", str(tmp_path / "out.onnx"))
    assert code == 0
    assert out == (
        f"{tmp_path / 'out.onnx'}: sample_rate=8000 (was 16k), xares.contract_version=1, output_dim=4, "
        "xares.output_dim dropped (was 4); unchanged: comment, model_type, xares.license\n"
    )
    assert (
        err
        == "note: assumed, because the model does not declare it: amplitude=unit, normalize=none (--contract changes it)\n"
    )
    kept = {"comment": "theirs", "model_type": "bank", "xares.license": "MIT", "xares.contract_version": "1"}
    assert written_to(tmp_path / "out.onnx") == {**kept, "sample_rate": "8000", "output_dim": "4"}


def test_a_giant_is_annotated_where_it_is_trusted(tmp_path: Path) -> None:
    model = save(gives_vectors_of(40_000), tmp_path / "model.onnx")
    arguments = [str(model), "--contract", "sample_rate=8000", "-o", str(tmp_path / "out.onnx")]
    code, _, err = run(*arguments)
    assert code == 3
    assert "has a dimension of 40000, more than 32768; --trust lifts the limit" in err
    code, _, err = run(*arguments, "--trust")
    assert code == 0
    assert "note: the model is trusted" in err


def test_a_copy_of_a_copy_is_the_same(tmp_path: Path) -> None:
    model = save(models.encoder(), tmp_path / "model.onnx")
    annotate(model, ["sample_rate=8000", "amplitude=int16"], tmp_path / "one.onnx")
    done = annotate(tmp_path / "one.onnx", ["amplitude=int16", "sample_rate=8000"], tmp_path / "two.onnx")
    assert done.written == done.replaced == {}
    assert written_to(tmp_path / "two.onnx") == written_to(tmp_path / "one.onnx")


def test_an_output_that_is_there_is_replaced_and_a_link_is_refused(tmp_path: Path) -> None:
    model = save(models.encoder(), tmp_path / "model.onnx")
    (tmp_path / "out.onnx").write_bytes(b"other")
    (tmp_path / "link.onnx").symlink_to("out.onnx")
    with pytest.raises(UsageError, match="is a link, which is never written to or replaced; name a file, new or old"):
        annotate(model, ["sample_rate=8000"], tmp_path / "link.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == b"other"
    annotate(model, ["sample_rate=8000"], tmp_path / "out.onnx")
    assert load_encoder(tmp_path / "out.onnx").contract.sample_rate == 8000


# ---------------------------------------------------------------- weights in other files


def same_embedding(path: Path) -> None:
    signal = noise(RATE)
    (found,) = load_encoder(path).embed([signal], RATE)
    np.testing.assert_allclose(found.frames, models.embed(signal), atol=1e-5)


def test_weights_files_go_with_the_copy(tmp_path: Path) -> None:
    model = save_external(tmp_path / "from", "deep/weights.bin")
    (tmp_path / "to").mkdir()
    done = annotate(model, ["sample_rate=16000"], tmp_path / "to/out.onnx")
    assert done.copied == ("out.onnx.data",)
    found = files_in(tmp_path / "to")
    assert sorted(found) == ["out.onnx", "out.onnx.data"]
    assert found["out.onnx.data"] == models.WEIGHTS.tobytes()
    moved = onnx.load(tmp_path / "to/out.onnx")  # reads the weights
    moved.ClearField("metadata_props")
    assert moved.SerializeToString() == onnx.load(model).SerializeToString()
    for file in (tmp_path / "from").rglob("*.*"):
        file.unlink()
    same_embedding(tmp_path / "to/out.onnx")
    # Once more, from the copy to beside it: its weights are there already.
    assert annotate(tmp_path / "to/out.onnx", ["license=MIT"], tmp_path / "to/again.onnx").copied == ()
    same_embedding(tmp_path / "to/again.onnx")


def test_equal_weights_that_lie_there_are_used_and_others_are_never_overwritten(tmp_path: Path) -> None:
    model = save_external(tmp_path / "from")
    (tmp_path / "to").mkdir()
    weights = tmp_path / "to/out.onnx.data"
    weights.write_bytes(models.WEIGHTS.tobytes())
    assert annotate(model, ["sample_rate=16000"], tmp_path / "to/out.onnx").copied == ()
    same_embedding(tmp_path / "to/out.onnx")
    (tmp_path / "to/out.onnx").unlink()
    weights.write_bytes(models.WEIGHTS.tobytes()[:-4] + b"else")
    before = files_in(tmp_path / "to")
    with pytest.raises(UsageError, match=r"out\.onnx\.data exists and is not the model's weights file"):
        annotate(model, ["sample_rate=16000"], tmp_path / "to/out.onnx")
    assert files_in(tmp_path / "to") == before


@pytest.mark.parametrize("folder", ["from", "to"])
def test_an_output_named_like_the_weights_is_refused(folder: str, tmp_path: Path) -> None:
    model = save_external(tmp_path / "from")
    (tmp_path / "to").mkdir()
    before = files_in(tmp_path)
    with pytest.raises(UsageError, match=r"the model keeps weights in a file named weights\.bin; choose another name"):
        annotate(model, ["sample_rate=16000"], tmp_path / folder / "weights.bin")
    assert files_in(tmp_path) == before


def test_weights_that_model_files_may_not_use_are_not_copied(tmp_path: Path) -> None:
    model = save_external(tmp_path / "from", target=tmp_path / "elsewhere/weights.bin")
    os.symlink(tmp_path / "elsewhere/weights.bin", tmp_path / "from/weights.bin")
    (tmp_path / "to").mkdir()
    with pytest.raises(ModelError, match="which is a link; put the file itself beside the model"):
        annotate(model, ["sample_rate=16000"], tmp_path / "to/out.onnx")
    assert not files_in(tmp_path / "to")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([], "there is nothing to write; declare something by --contract KEY=VALUE"),
        (["samplerate=8000"], "there is no contract key 'samplerate'; did you mean 'sample_rate'"),
        (["sample_rate"], "--contract 'sample_rate' must be KEY=VALUE"),
        (["sample_rate=0"], "sample_rate=0 must be from 1 to"),
        (["sample_rate=16k"], "sample_rate='16k' is not a whole number"),
        (["first_frame_center_samples=nan"], "first_frame_center_samples='nan' is not a number"),
        (["amplitude=loud"], "amplitude='loud' must be one of int16, unit"),
        (["license=\udcff"], r"license='\udcff' is not UTF-8 text"),
    ],
)
def test_a_declaration_that_cannot_be(pairs: list[str], says: str, tmp_path: Path) -> None:
    model = save(models.encoder(), tmp_path / "model.onnx")
    with pytest.raises(UsageError) as caught:
        annotate(model, pairs, tmp_path / "out.onnx")
    assert says in str(caught.value)
    assert list(files_in(tmp_path)) == ["model.onnx"]


@pytest.mark.parametrize(
    ("metadata", "pair", "says"),
    [
        ({}, "hop_samples=320", "metadata declares hop_samples=320, but 160 was measured; correct the declaration"),
        ({}, "output=logits", "the model has no float output 'logits'; it has 'embeddings'"),
        ({}, "min_samples=399", "declares min_samples=399, but with that many samples out.onnx failed"),
        ({"xares.hop_samples": "2"}, "sample_rate=8000", "metadata declares hop_samples=2, but 160 was measured"),
        ({"xares.hop_samples": "x"}, "sample_rate=8000", "metadata: hop_samples='x' is not a whole number"),
        ({"xares.contract_version": "2"}, "sample_rate=8000", "declares contract version '2', this program reads 1"),
    ],
)
def test_a_copy_that_could_not_be_used_is_not_kept(metadata: dict[str, str], pair: str, says: str, tmp_path: Path) -> None:
    model = save_external(tmp_path / "from")
    proto = onnx.load(model, load_external_data=False)
    onnx.helper.set_model_props(proto, metadata)
    save(proto, model)
    (tmp_path / "to").mkdir()
    (tmp_path / "to/out.onnx").write_bytes(b"what was there")
    with pytest.raises(ContractError) as caught:
        annotate(model, [pair], tmp_path / "to/out.onnx")
    assert says in str(caught.value)
    assert ".part" not in str(caught.value)
    assert files_in(tmp_path / "to") == {"out.onnx": b"what was there"}


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("model.onnx", "is the model itself, which is never changed in place; name another file"),
        ("link.onnx", "is the model itself, which is never changed in place; name another file"),
        ("hard.onnx", "is the model itself, which is never changed in place; name another file"),
        ("folder", "cannot be written: name a file in a folder that exists"),
        ("nowhere/out.onnx", "cannot be written: name a file in a folder that exists"),
        ("x" * 300, r"cannot be written (File name too long)"),
        ("\udcff.onnx", "has a name that is not UTF-8"),
    ],
)
def test_an_output_that_cannot_be(output: str, says: str, tmp_path: Path) -> None:
    model = save(models.encoder(), tmp_path / "model.onnx")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.onnx").symlink_to(model)
    (tmp_path / "hard.onnx").hardlink_to(model)
    before = files_in(tmp_path)
    with pytest.raises(UsageError) as caught:
        annotate(model, ["sample_rate=8000"], tmp_path / output)
    assert says in str(caught.value)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize(("content", "says"), [(b"", "is empty"), (b"no model", "is not an ONNX file")])
def test_a_file_that_is_no_model(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    code, out, err = run(str(tmp_path / "model.onnx"), "--contract", "license=MIT", "-o", str(tmp_path / "out.onnx"))
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert says in err
    assert list(files_in(tmp_path)) == ["model.onnx"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_external(tmp_path / "from")
    (tmp_path / "to").mkdir()
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if target.name == "out.onnx":  # the last step: the weights lie there already
            assert (tmp_path / "to/out.onnx.data").exists()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DiskFullError):
        annotate(model, ["sample_rate=8000"], tmp_path / "to/out.onnx")
    assert not files_in(tmp_path / "to")


# ---------------------------------------------------------------- what lies beside a model


def test_what_lies_beside_the_model_is_not_lost_unseen(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    model = save(models.encoder(metadata={"sample_rate": "8000"}), tmp_path / "from/model.onnx")
    (tmp_path / "from/model.toml").write_text("amplitude = 'int16'\nsource = 'a b'\n")
    (tmp_path / "from/preprocessor_config.json").write_text('{"do_normalize": true, "sampling_rate": 44100}')
    flags = "--contract amplitude=int16 --contract normalize=zscore --contract 'source=a b'"
    lost = f"model.toml and preprocessor_config.json; add {flags}"
    with pytest.raises(UsageError, match=f"would lose the declarations beside the model in {lost}$"):
        annotate(model, ["license=MIT"], tmp_path / "to/out.onnx")
    said = ["license=MIT", "amplitude=int16", "source=a b"]
    with pytest.raises(UsageError, match=r"preprocessor_config\.json; add --contract normalize=zscore$"):
        annotate(model, said, tmp_path / "to/out.onnx")
    assert not files_in(tmp_path / "to")
    annotate(model, [*said, "normalize=zscore"], tmp_path / "to/out.onnx")
    contract = load_encoder(tmp_path / "to/out.onnx").contract
    assert (contract.amplitude, contract.normalize, contract.sample_rate) == ("int16", "zscore", 8000)
    annotate(model, said, tmp_path / "from/out.onnx")  # the configuration lies beside this one too
    assert load_encoder(tmp_path / "from/out.onnx").contract.normalize == "zscore"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "out.toml",
            "sample_rate = 44100",
            r"out\.toml beside .*out\.onnx declares sample_rate=44100, which would add to or override",
        ),
        ("out.toml", "chunk_samples = 16000", r"out\.toml beside .* declares chunk_samples=16000"),
        (
            "preprocessor_config.json",
            '{"do_normalize": true}',
            r"preprocessor_config\.json beside .* declares normalize=zscore",
        ),
    ],
)
def test_what_lies_beside_the_output_does_not_join_it_unseen(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    model = save(models.encoder(), tmp_path / "model.onnx")
    (tmp_path / "to" / name).write_text(text)
    with pytest.raises(UsageError, match=says):
        annotate(model, ["sample_rate=8000"], tmp_path / "to/out.onnx")
    assert list(files_in(tmp_path / "to")) == [name]
