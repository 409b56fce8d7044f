"""`check`: sound encoders pass every property, and each property is lacked by a model that lacks nothing else."""

from __future__ import annotations

from pathlib import Path

import check_models
import numpy as np
import onnx_models as models
import pytest
from check_models import MUTANTS, SOUND, declared, in_8_bits, never_ends_on_dc, sound, unlike
from onnx_models import save

import xares_onnx
from xares_onnx.checking import CheckReport, check
from xares_onnx.checking.registry import PROPERTIES
from xares_onnx.encoder import limits
from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.errors import MachineError, UsageError

FIGURES = ("size", "latency", "real-time-factor", "memory")
# What a model of one length, of no batch, or without frames cannot be asked.
LENGTHS = {"min-length", "max-length", "padding", "chunking", "dynamic-time", "frame-law"}
EIGHT_BITS = {"int8-saturation", "int8-scales", "arithmetic"}
ALWAYS_SKIPPED = {"parity", "devices", "placement"} | EIGHT_BITS


def checked(model: object, folder: Path, **options: object) -> CheckReport:
    path = save(model, folder / f"model-{len(list(folder.iterdir()))}.onnx")  # type: ignore[arg-type]
    return check(path, device="cpu", threads=2, **options)  # type: ignore[arg-type]


def found(report: CheckReport, name: str) -> str:
    (finding,) = [finding for finding in report.findings if finding.property == name]
    return finding.says


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_encoder_passes_all(name: str, tmp_path: Path, shared_process: None) -> None:
    report = checked(SOUND[name](), tmp_path)
    assert [finding.property for finding in report.findings] == list(PROPERTIES)
    assert report.named("fail") == report.named("warn") == []
    assert (report.exit_code, report.unusable) == (0, None)
    expected = {
        "fixed window": LENGTHS,
        "one vector a clip": {"frame-law", "hop"},
        "fixed batch of one": {"dynamic-batch", "batch-invariance"},
        "no batch axis": {"dynamic-batch", "batch-invariance"},
    }
    measured = EIGHT_BITS if name.startswith("bytes") else {"arithmetic"} if name.startswith("half") else set()
    assert set(report.named("skip")) == expected.get(name, set()) | (ALWAYS_SKIPPED - measured)
    assert report.model is not None
    assert report.model.precision == ("fp16" if name.startswith("half") else "fp32")


@pytest.mark.parametrize("name", ["convolution", "normalised clips", "lengths", "no batch axis"])
def test_frames_of_a_local_model_are_the_same_in_chunks_and_before_zeros(
    name: str, tmp_path: Path, shared_process: None
) -> None:
    measured = {finding.property: finding.measured for finding in checked(SOUND[name](), tmp_path).findings}
    assert measured["chunking"] == pytest.approx(1, abs=2e-6)
    assert measured["padding"] == pytest.approx(1, abs=2e-6)
    gain = measured["gain"]
    assert isinstance(gain, float)
    assert (gain == pytest.approx(1, abs=1e-4)) == (name == "normalised clips")


@pytest.mark.parametrize(("dtype", "quantize"), [("fp32", None), ("fp16", None), ("fp32", "int8-dynamic")])
def test_an_exported_transformer_passes_all(dtype: str, quantize: str | None, tmp_path: Path, shared_process: None) -> None:
    from random_checkpoints import save_speech

    from xares_onnx.exporters import export

    checkpoint = save_speech("wav2vec2", tmp_path / "checkpoint")
    path = tmp_path / "model.onnx"
    export("wav2vec2", str(checkpoint), path, dtype=dtype, quantize=quantize)
    report = check(path, device="cpu", threads=2)
    assert report.named("fail") == []
    assert report.named("warn") == (["batch-invariance"] if quantize else [])
    assert report.model is not None
    assert report.model.precision == (quantize or dtype)


def test_log_mel_passes_all(tmp_path: Path, shared_process: None) -> None:
    from xares_onnx.exporters import export

    export("logmel", None, tmp_path / "logmel.onnx")
    report = check(tmp_path / "logmel.onnx", device="cpu", threads=2)
    assert (report.named("fail"), report.named("warn"), set(report.named("skip"))) == ([], [], ALWAYS_SKIPPED)


@pytest.mark.parametrize("name", MUTANTS)
def test_each_property_is_lacked_by_a_model_that_lacks_nothing_else(name: str, tmp_path: Path, shared_process: None) -> None:
    of, status, make = MUTANTS[name]
    report = checked(make(), tmp_path)
    assert {other: report.named(other) for other in ("fail", "warn")} == {"fail": [], "warn": [], status: [of]}
    (finding,) = [finding for finding in report.findings if finding.property == of]
    assert finding.remedy
    assert len(finding.says) < 700
    assert report.exit_code == (3 if of in ("loads", "inputs") else int(status == "fail"))
    assert (report.unusable is not None) == (report.exit_code == 3)


def test_every_property_that_is_measured_has_such_a_model() -> None:
    beside = {"parity", "devices", "placement", *FIGURES}  # below, and in test_check_parts
    assert {of for of, *_ in MUTANTS.values()} | beside == set(PROPERTIES)


# ---------------------------------------------------------------- what a broken export says


def test_a_misdeclared_hop_says_both_figures(tmp_path: Path, shared_process: None) -> None:
    report = checked(declared(models.encoder(), xares__hop_samples="320"), tmp_path)
    assert "metadata declares hop_samples=320, but 160 was measured; correct the declaration" in found(report, "hop")
    assert report.contract is not None
    assert report.contract["hop_samples"] == {"value": 160, "source": "measured"}
    assert set(report.named("skip")) == ALWAYS_SKIPPED  # everything else was measured all the same


def test_two_wrong_declarations_are_both_named(tmp_path: Path, shared_process: None) -> None:
    report = checked(declared(models.encoder(), xares__hop_samples="320", output_dim="5"), tmp_path)
    assert report.named("fail") == ["declarations", "hop"]


def test_a_wrong_declaration_of_a_broken_model_is_named_beside_it(tmp_path: Path, shared_process: None) -> None:
    report = checked(declared(models.stops_growing(500), output_dim="5"), tmp_path)
    assert report.named("fail") == ["declarations", "max-length"]


def test_a_frozen_time_axis_is_no_fault_where_it_is_declared(tmp_path: Path, shared_process: None) -> None:
    report = checked(models.encoder(samples=16_000, frames=98), tmp_path, contract=["chunk_samples=16000"])
    assert "dynamic-time" in report.named("skip")


def test_a_collapsed_layer_in_8_bits(tmp_path: Path, shared_process: None) -> None:
    """Quantised as it comes, a batch has one scale: that is no fault, but said."""
    report = checked(in_8_bits(collapsed=False), tmp_path)
    assert (report.named("fail"), report.named("warn")) == ([], ["batch-invariance"])
    assert "dynamic quantisation uses one scale per batch" in found(report, "batch-invariance")
    assert report.model is not None
    assert report.model.precision == "int8-dynamic"
    report = checked(in_8_bits(collapsed=True), tmp_path)
    assert report.named("fail") == ["rank"]
    assert report.exit_code == 1


def test_a_collapsed_layer_in_8_bits_is_far_from_the_original(tmp_path: Path, shared_process: None) -> None:
    original = save(in_8_bits(collapsed=False), tmp_path / "original.onnx")
    assert checked(in_8_bits(collapsed=False), tmp_path, reference=original).named("fail") == []
    assert checked(in_8_bits(collapsed=True), tmp_path, reference=original).named("fail") == ["rank", "parity"]


def test_products_that_saturate_without_vnni_are_named(tmp_path: Path, shared_process: None) -> None:
    report = checked(check_models.quantised_on_one_scale(85), tmp_path)
    (finding,) = [finding for finding in report.findings if finding.property == "int8-saturation"]
    assert (finding.status, finding.measured, finding.unit, report.exit_code) == ("warn", 1, "of 1 products", 0)
    assert "MatMulInteger 'the layer' up to 32,895, 12 % of its pairs of weights" in finding.says
    assert "reduce_range=True" in finding.remedy
    assert found(checked(check_models.quantised_on_one_scale(84), tmp_path), "int8-saturation").endswith("32,640 of 32,767")
    settings = {"int8-saturation": {"severity": "error", "tolerance": 1}}
    report = checked(check_models.quantised_on_one_scale(85), tmp_path, settings=settings)
    assert (report.named("fail"), report.exit_code) == ([], 0)
    report = checked(check_models.quantised_on_one_scale(85), tmp_path, settings={"int8-saturation": "error"})
    assert (report.named("fail"), report.exit_code) == (["int8-saturation"], 1)


def test_the_frozen_length_is_named(tmp_path: Path, shared_process: None) -> None:
    assert "frozen at 16000 samples" in found(checked(check_models.frozen_time(), tmp_path), "dynamic-time")
    report = checked(declared(models.frozen_inside(16_000)), tmp_path)
    assert "takes 16000 samples but not 48001" in found(report, "dynamic-time")


# ---------------------------------------------------------------- models that stop the process


def test_a_model_that_hangs_on_one_sound_loses_nothing_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_process: None
) -> None:
    load_encoder(save(sound(), tmp_path / "quick.onnx"))  # the process has started, so a silence is the model's
    monkeypatch.setattr(limits, "SILENCE_SECONDS", 3.0)
    report = checked(never_ends_on_dc(), tmp_path)
    assert report.exit_code == 3
    assert report.named("fail") == ["finite"]
    assert report.unusable == found(report, "finite")
    assert "no sign of life for 3 s while running the model" in report.unusable
    assert {"loads", "hop", "frame-law", "determinism"} <= set(report.named("pass"))
    after = list(PROPERTIES)[list(PROPERTIES).index("finite") + 1 :]
    assert report.named("skip") == after
    assert "finite stopped the model's process" in found(report, "rank")


def test_a_model_over_its_memory(tmp_path: Path) -> None:
    report = checked(declared(models.huge_tensor()), tmp_path)
    assert (report.exit_code, report.named("fail")) == (3, ["loads"])
    assert report.unusable is not None
    assert "more memory than it may use" in report.unusable


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_a_file_that_is_no_model(content: bytes | None, tmp_path: Path, shared_process: None) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    report = check(path, device="cpu")
    assert (report.exit_code, report.named("fail")) == (3, ["loads"])
    assert report.model is None
    assert report.contract is None


def test_what_is_wrong_with_the_machine_is_no_finding(tmp_path: Path, shared_process: None) -> None:
    with pytest.raises(MachineError):
        check(save(sound(), tmp_path / "model.onnx"), device="NoSuchExecutionProvider")


# ---------------------------------------------------------------- severities and figures


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_fails_past_the_limit_that_is_set(name: str, tmp_path: Path, shared_process: None) -> None:
    report = checked(sound(), tmp_path, settings={name: {"tolerance": 1e-9}})
    assert report.named("fail") == [name]
    assert "the limit is 1e-09" in found(report, name)
    assert checked(sound(), tmp_path, settings={name: {"tolerance": 1e9}}).named("fail") == []


def test_severities(tmp_path: Path, shared_process: None) -> None:
    hop = declared(models.encoder(), xares__hop_samples="320", xares__license=None)
    assert checked(hop, tmp_path).exit_code == 1
    report = checked(hop, tmp_path, settings={"hop": "warn"})
    assert (report.exit_code, report.named("warn")) == (0, ["metadata", "hop"])
    report = checked(hop, tmp_path, settings={"metadata": "error", "hop": "off"})
    assert (report.exit_code, report.named("fail"), found(report, "hop")) == (1, ["metadata"], "switched off")
    report = checked(sound(), tmp_path, settings={"metadata": "error"})
    assert report.exit_code == 0  # what passes, passes


@pytest.mark.parametrize(
    ("mutant", "tolerance"),
    [
        ("a norm over the batch", 100),
        ("noise inside", 1e-3),
        ("hardly different", 1e-9),
        ("one direction", 0.5),
        ("flips before zeros", -1),
        ("flips after two seconds", -1),
        ("flips when quiet", -1),
        ("opset 6", 6),
    ],
)
def test_a_tolerance_is_the_users(mutant: str, tolerance: float, tmp_path: Path, shared_process: None) -> None:
    name, _, make = MUTANTS[mutant]
    report = checked(make(), tmp_path, settings={name: {"tolerance": tolerance}})
    assert name in report.named("pass")


def test_the_same_report_twice_but_for_times(tmp_path: Path, shared_process: None) -> None:
    first, again = (checked(sound(), tmp_path) for _ in range(2))
    for one, other in zip(first.findings, again.findings, strict=True):
        if one.property not in FIGURES:
            assert (one.status, one.says, one.measured) == (other.status, other.says, other.measured)


def test_the_verb_is_in_the_package(tmp_path: Path, shared_process: None) -> None:
    assert xares_onnx.check is check


# ---------------------------------------------------------------- parity


def test_parity_with_another_model(tmp_path: Path, shared_process: None) -> None:
    other = save(sound(), tmp_path / "other.onnx")
    report = checked(sound(), tmp_path, reference=other)
    assert "parity" in report.named("pass")
    assert "cosine per frame at least 1.000000" in found(report, "parity")
    assert checked(unlike(), tmp_path, reference=other).named("fail") == ["parity"]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: declared(check_models.recurrent(), output_dim="8"), "4 dimensions, but other.onnx has 8"),
        (lambda: declared(models.padding_front_end(200), xares__receptive_field_samples=None), "frames for clip 0"),
    ],
)
def test_parity_with_a_model_of_another_shape(other: object, says: str, tmp_path: Path, shared_process: None) -> None:
    path = save(other(), tmp_path / "other.onnx")  # type: ignore[operator]
    report = checked(sound(), tmp_path, reference=path)
    assert report.named("fail") == ["parity"]
    assert says in found(report, "parity")


def npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def expected(samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    waveform = models.noise(samples, seed)
    return waveform, models.embed(waveform)


def test_parity_with_what_a_file_holds(tmp_path: Path, shared_process: None) -> None:
    (one, frames), (two, others) = expected(32_000), expected(32_000, 1)
    (long, longer) = expected(40_001)
    files = {
        "one": npz(tmp_path / "one.npz", waveform=one, rate=16_000, embeddings=frames),
        "two": npz(tmp_path / "two.npz", waveform=np.stack([one, two]), rate=16_000, embeddings=np.stack([frames, others])),
        "numbered": npz(
            tmp_path / "numbered.npz", waveform_0=one, waveform_1=long, embeddings_0=frames, embeddings_1=longer, rate=16_000
        ),
    }
    for clips, path in zip((1, 2, 2), files.values(), strict=True):
        report = checked(sound(), tmp_path, reference=path)
        assert report.named("fail") == []
        (finding,) = [finding for finding in report.findings if finding.property == "parity"]
        assert len(finding.details) == clips
        assert isinstance(finding.measured, float)
        assert finding.measured < 1e-5
    wrong = npz(tmp_path / "wrong.npz", waveform=np.stack([one, two]), rate=16_000, embeddings=np.stack([frames, frames]))
    assert checked(sound(), tmp_path, reference=wrong).named("fail") == ["parity"]
    nearly = npz(tmp_path / "nearly.npz", waveform=one, rate=16_000, embeddings=frames * 1.01)
    assert checked(sound(), tmp_path, reference=nearly).named("fail") == ["parity"]
    report = checked(sound(), tmp_path, reference=nearly, settings={"parity": {"tolerance": 0.02}})
    assert report.named("fail") == []
    short = npz(tmp_path / "short.npz", waveform=one, rate=16_000, embeddings=frames[:-3])
    assert "198 frames for clip 0 of 32000 samples, but short.npz has 195" in found(
        checked(sound(), tmp_path, reference=short), "parity"
    )


ONES = np.ones(16_000, np.float32)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"waveform": ONES, "embeddings": np.ones((98, 4))}, "must hold `rate`"),
        ({"waveform": ONES, "embeddings": np.ones((98, 4)), "rate": 16_000.5}, "must be a whole sampling rate"),
        ({"waveform": ONES, "embeddings": np.ones((98, 4)), "rate": 8000}, "is at 8000 Hz, but the model takes 16000 Hz"),
        ({"waveform": ONES, "rate": 16_000}, "must hold `waveform` and `embeddings`"),
        ({"waveform": ONES.astype(int), "embeddings": np.ones((98, 4)), "rate": 16_000}, "waveform 0 must be finite floats"),
        ({"waveform": ONES * np.nan, "embeddings": np.ones((98, 4)), "rate": 16_000}, "waveform 0 must be finite floats"),
        ({"waveform": ONES, "embeddings": np.ones((2, 98, 4)), "rate": 16_000}, "embeddings 0 must be floats"),
        ({"waveform": np.ones((2, 9)), "embeddings": np.ones((3, 1, 4)), "rate": 16_000}, "must be (samples,) and"),
        ({"waveform": np.array([{}]), "embeddings": np.ones((98, 4)), "rate": 16_000}, "it is no .npz file of plain arrays"),
    ],
)
def test_a_reference_file_that_is_wrong_usage(
    arrays: dict[str, object], says: str, tmp_path: Path, shared_process: None
) -> None:
    path = npz(tmp_path / "reference.npz", **arrays)
    with pytest.raises(UsageError) as caught:
        checked(sound(), tmp_path, reference=path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 damaged"])
def test_a_reference_that_cannot_be_read(content: bytes | None, tmp_path: Path, shared_process: None) -> None:
    for name in ("reference.npz", "reference.onnx"):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UsageError, match="reference"):
            checked(sound(), tmp_path, reference=path)
