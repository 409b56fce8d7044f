"""wav2vec 2.0, HuBERT, WavLM and data2vec, as random checkpoints, against extractor and model run one clip at a time."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from corpus import score_of_sound
from numpy.typing import NDArray
from random_checkpoints import SPEECH, Plain, edit_json, save_speech
from safetensors.torch import load_file, save_file
from torch import Tensor

from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.errors import ModelError, UsageError
from xares_onnx.exporters import core, export, speech
from xares_onnx.exporters.precision import TOLERANCE

pytestmark = pytest.mark.usefixtures("shared_process")

FAMILIES = sorted(SPEECH)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: save_speech(family, folder / family) for family in FAMILIES}


@pytest.fixture
def copied(made: dict[str, Path], tmp_path: Path) -> Path:
    """A HuBERT checkpoint to spoil."""
    return Path(shutil.copytree(made["hubert"], tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def files(made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    return {family: export(family, str(made[family]), folder / f"{family}.onnx").path for family in FAMILIES}


def clip(samples: int, seed: int = 0, *, loudness: float = 0.1) -> NDArray[np.float32]:
    return (loudness * np.random.default_rng(seed).uniform(-1, 1, samples)).astype(np.float32)


def plain(folder: Path, audio: NDArray[np.float32], **changes: Any) -> NDArray[np.float32]:
    """(samples,) -> (frames, dim)"""
    with torch.no_grad():
        embedding: NDArray[np.float32] = Plain(folder, **changes)(torch.from_numpy(audio)[None])[0].numpy()
    return embedding


def spec_of(family: str, folder: Path) -> core.Spec:
    return speech.build(family, str(folder))[1]


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_published_pipeline(family: str, made: dict[str, Path], files: dict[str, Path]) -> None:
    spec = spec_of(family, made[family])
    with torch.no_grad():
        error = core.check_parity(Plain(made[family]), files[family], spec)
        assert error < 1e-4
        with pytest.raises(ModelError, match="differs from the torch module"):
            core.check_parity(Plain(made[family], do_normalize=False), files[family], spec)


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_can_fail_for_random_weights(family: str, made: dict[str, Path]) -> None:
    """What clips have in common is small beside what tells them apart."""
    embeddings = [plain(made[family], clip(9_001, seed)) for seed in range(3)]
    for one, other in combinations(embeddings, 2):
        assert np.abs(one - other).max() > 100 * core.TOLERANCE["fp32"] * np.abs(one).max()


def test_normalisation_over_the_batch_is_caught(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def over_all(_: Any, audio: Tensor) -> Tensor:
        return (audio - audio.mean()) / torch.sqrt((audio - audio.mean()).square().mean() + 1e-7)

    monkeypatch.setattr(speech.ZeroMeanUnitVariance, "forward", over_all)
    with pytest.raises(ModelError, match=r"differs from the torch module by .* and batch 2"):
        export("wav2vec2", str(made["wav2vec2"]), tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_do_normalize_is_obeyed(tmp_path: Path) -> None:
    folder = save_speech("wav2vec2", tmp_path / "raw", do_normalize=False)
    path = export("wav2vec2", str(folder), tmp_path / "raw.onnx").path
    audio = clip(5_003)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"audio": audio[None]})
    np.testing.assert_allclose(found[0], plain(folder, audio), atol=1e-4)
    assert np.abs(found[0] - plain(folder, audio, do_normalize=True)).max() > 0.01


# ---------------------------------------------------------------- the contract, and a score


@pytest.mark.parametrize("family", FAMILIES)
def test_the_contract_is_as_declared_and_embeddings_are_the_published_ones(
    family: str, made: dict[str, Path], files: dict[str, Path]
) -> None:
    audio, rate = clip(25_457), 24_000 if family == "mert" else 16_000
    with load_encoder(files[family], device="cpu", threads=1) as encoder:
        contract = encoder.info.contract
        (embedding,) = encoder.embed([audio], rate=rate)
    assert (contract.hop_samples, contract.receptive_field_samples, contract.dim) == (320, 400, 32)
    assert (contract.sample_rate, contract.min_samples, contract.normalize) == (rate, 400, "none")
    assert (contract.first_frame_center_samples, contract.license) == (200, "mit")
    assert contract.source == family
    assert contract.sources["hop_samples"] == "measured, as declared in metadata"
    assert contract.dynamic_batch
    assert not contract.batch_coupled
    np.testing.assert_allclose(embedding.frames, plain(made[family], audio), atol=1e-4)
    np.testing.assert_allclose(embedding.times, (200 + 320 * np.arange(len(embedding.frames))) / rate)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_ends_in_a_score(family: str, files: dict[str, Path], tmp_path: Path) -> None:
    assert score_of_sound(files[family], tmp_path) > 0.35


def test_silence_is_finite(files: dict[str, Path]) -> None:
    for path in files.values():
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"audio": np.zeros((2, 3_000), np.float32)})
        assert np.isfinite(found).all()


def test_the_same_checkpoint_gives_the_same_bytes(made: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    again = export("wavlm", str(made["wavlm"]), tmp_path / "again.onnx").path
    assert again.read_bytes() == files["wavlm"].read_bytes()


# ---------------------------------------------------------------- smaller files, larger files


@pytest.mark.parametrize("options", [{"dtype": "fp16"}, {"quantize": "int8-dynamic"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_smaller_files(
    family: str, options: dict[str, str], made: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = export(family, str(made[family]), tmp_path / "small.onnx", **options)
    assert capfd.readouterr() == ("", "")
    (precision,) = options.values()
    assert core.TOLERANCE["fp32"] < report.max_abs_error < 4 * TOLERANCE[precision]  # the largest values are about 4
    assert list(tmp_path.iterdir()) == [report.path]
    model = onnx.load(report.path)
    kinds = {weight.data_type for weight in model.graph.initializer if len(weight.dims) > 1}
    assert (onnx.TensorProto.FLOAT16 if precision == "fp16" else onnx.TensorProto.INT8) in kinds
    if precision == "fp16":
        assert onnx.TensorProto.FLOAT not in kinds
    assert {entry.key: entry.value for entry in model.metadata_props}["xares.precision"] == precision
    assert [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)] == [1, 1]
    with load_encoder(report.path, device="cpu", threads=1) as encoder:
        assert encoder.info.contract.batch_coupled == (precision == "int8-dynamic")


def test_large_weights_stand_beside_the_file(made: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    encoder, spec = speech.build("hubert", str(made["hubert"]))
    (tmp_path / "large.onnx.data").write_bytes(b"of an older file")
    report = core.export_encoder(encoder, spec, tmp_path / "large.onnx", external_bytes=1_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    assert report.path.stat().st_size < (tmp_path / "large.onnx.data").stat().st_size
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    moved = shutil.copytree(tmp_path, tmp_path / "moved")
    audio = clip(16_001)[None]
    with load_encoder(moved / "large.onnx", device="cpu", threads=1) as encoder_there:
        (embedding,) = encoder_there.embed([audio[0]], rate=16_000)
        assert encoder_there.info.scan.external == ("large.onnx.data",)
    session = onnxruntime.InferenceSession(files["hubert"], providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(embedding.frames, session.run(None, {"audio": audio})[0][0], atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "int8-dynamic"])
def test_large_and_smaller(precision: Any, made: dict[str, Path], tmp_path: Path) -> None:
    encoder, spec = speech.build("hubert", str(made["hubert"]))
    core.export_encoder(encoder, spec, tmp_path / "large.onnx", precision=precision, external_bytes=1_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    assert next(encoder.parameters()).dtype == torch.float32  # the caller's module is as it was


def test_a_large_file_that_does_not_hold_leaves_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    encoder, spec = speech.build("hubert", str(made["hubert"]))
    with pytest.raises(ModelError, match="its law"):
        core.export_encoder(encoder, replace(spec, hop_samples=160), tmp_path / "large.onnx", external_bytes=1_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("hubert", {"dtype": "fp8"}, "--dtype 'fp8' must be fp32 or fp16"),
        ("hubert", {"quantize": "int4"}, "--quantize 'int4' must be int8-dynamic"),
        ("hubert", {"quantize": "int8-dynamic", "dtype": "fp16"}, "leave out --dtype fp16"),
        ("logmel", {"dtype": "fp16"}, "no weights to keep in half precision; export it without --dtype fp16"),
        ("logmel", {"quantize": "int8-dynamic"}, "no linear layers to quantise; export it without --quantize"),
    ],
)
def test_a_precision_that_cannot_be_is_wrong_usage(
    family: str, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export(family, None, tmp_path / "out.onnx", **options)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- checkpoints


def test_a_model_in_the_local_cache_goes_by_its_name(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    cached = tmp_path / "cache" / "models--somebody--small-hubert"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123abcd")
    shutil.move(copied, cached / "snapshots" / "0123abcd")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    path = export("hubert", "somebody/small-hubert", tmp_path / "out.onnx").path
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert metadata["xares.source"] == "somebody/small-hubert@0123abcd"
    with pytest.raises(UsageError, match="no folder somebody/else and no model of that name in the local cache"):
        export("hubert", "somebody/else", tmp_path / "other.onnx")


def spoil(folder: Path, how: str) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    match how:
        case "no preprocessor":
            (folder / "preprocessor_config.json").unlink()
        case "no do_normalize":
            edit_json(folder / "preprocessor_config.json", do_normalize=None)
        case "no config":
            (folder / "config.json").unlink()
        case "damaged config":
            (folder / "config.json").write_text("{")
        case "config of another shape":
            (folder / "config.json").write_text(json.dumps([1]))
        case "another size":
            edit_json(folder / "config.json", intermediate_size=48)
        case "a layer less":
            save_file({name: value for name, value in tensors.items() if "layers.1.final" not in name}, weights)
        case "damaged weights":
            weights.write_bytes(weights.read_bytes()[:1_000])
        case "pickled weights":
            weights.unlink()
            torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no preprocessor", r"has no preprocessor_config\.json; use the checkpoint as it was published"),
        ("no do_normalize", r"must have do_normalize \(true or false\)"),
        ("no config", "no model of that name|has no config"),
        ("damaged config", r"config\.json cannot be read as json"),
        ("config of another shape", r"config\.json is not a json object"),
        ("another size", "lacks weights of the encoder, or has them in another shape|cannot be loaded"),
        ("a layer less", r"lacks weights of the encoder, .*layers\.1\.final_layer_norm\.bias first of 2"),
        ("damaged weights", "cannot be loaded; it needs safetensors weights"),
        ("pickled weights", "cannot be loaded; it needs safetensors weights"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(how: str, message: str, copied: Path, tmp_path: Path) -> None:
    spoil(copied, how)
    with pytest.raises(UsageError, match=message) as raised:
        export("hubert", str(copied), tmp_path / "out.onnx")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out.onnx").exists()


def test_a_checkpoint_of_another_family_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds a model of type 'hubert', not 'wavlm'; export it as its own family"):
        export("wavlm", str(made["hubert"]), tmp_path / "out.onnx")
    with pytest.raises(UsageError, match="wavlm needs a checkpoint: a local folder, or the name of a model"):
        export("wavlm", None, tmp_path / "out.onnx")


def test_an_adapter_is_refused(copied: Path, tmp_path: Path) -> None:
    folder = save_speech("wav2vec2", tmp_path / "adapted", add_adapter=True)
    edit_json(folder / "config.json", add_adapter=True)
    with pytest.raises(UsageError, match="adapter"):
        export("wav2vec2", str(folder), tmp_path / "out.onnx")


def test_a_card_without_licence_is_said(copied: Path, tmp_path: Path) -> None:
    (copied / "README.md").write_text("# no front matter\nlicense: mit\n")
    assert spec_of("hubert", copied).license == "not stated"
    (copied / "README.md").unlink()
    assert spec_of("hubert", copied).license == "not stated"


def test_without_transformers_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pretrained", "speech", "hubert"):
        monkeypatch.delitem(sys.modules, f"xares_onnx.exporters.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"needs transformers; run: pip install 'xares-onnx\[export\]'"):
        export("hubert", "x", tmp_path / "out.onnx")
