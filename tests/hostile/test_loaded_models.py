"""What was scanned is what is loaded: one format, the same files, and arithmetic that no order and no hole deceives."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import onnx_models as models
import onnxruntime
import pytest
from bounds import bounded, refused
from onnx import helper

from xares_onnx import load_encoder
from xares_onnx.encoder import limits
from xares_onnx.errors import ModelError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks")
CPU = ("--device", "cpu")


def annotated(model: Path, **bounds: float) -> tuple[int, str]:
    """The least that scans, loads and measures a model."""
    outcome = bounded("annotate", model, "--contract", "license=MIT", "-o", model.parent / "out.onnx", **bounds)  # type: ignore[arg-type]
    return outcome.code, outcome.err


# ---------------------------------------------------------------- the format


def test_a_name_does_not_choose_the_format(tmp_path: Path) -> None:
    """ONNX Runtime reads a file whose name ends in .ort in its own format, of which the guard sees nothing."""
    model = models.save(models.encoder(), tmp_path / "model.ort")
    with load_encoder(model, device="cpu") as encoder:
        assert encoder.contract.dim == models.DIM


def test_first_bytes_do_not_choose_the_format(tmp_path: Path) -> None:
    """With `ORTM` at byte 4, a model in memory is taken for ONNX Runtime's own format: here the name of a producer."""
    model = models.encoder()
    model.producer_name = "ORTM"
    assert model.SerializeToString()[4:8] == b"ORTM"
    models.save(model, tmp_path / "model.onnx")
    with load_encoder(tmp_path / "model.onnx", taps=["frames_first"], device="cpu") as encoder:
        assert [tap.name for tap in encoder.info.taps] == ["frames_first"]


@pytest.mark.parametrize("name", ["model.ort", "model.onnx"])
def test_a_model_in_another_format_is_refused(name: str, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / name)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(models.encoder().SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert (tmp_path / name).read_bytes()[4:8] == b"ORTM"
    code, err = annotated(tmp_path / name)
    assert code == 3
    assert "ONNX" in err
    assert err.count("\n") == 1


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("cached", [False, True])
def test_weights_that_are_swapped_after_they_were_measured(cached: bool, tmp_path: Path) -> None:
    model = models.save_external(tmp_path / "from")
    cache = tmp_path / "cache" if cached else None
    weights = tmp_path / "from/weights.bin"
    if cached:
        load_encoder(model, device="cpu", cache=cache).close()
    with load_encoder(model, device="cpu", cache=cache) as encoder:
        signal = [models.noise(16_000)]
        if not cached:
            encoder.embed(signal, 16_000)
        (tmp_path / "other").write_bytes((2 * models.WEIGHTS).tobytes())
        os.utime(tmp_path / "other", ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns))
        os.replace(tmp_path / "other", weights)
        with pytest.raises(ModelError, match=r"'weights\.bin', weights of .* was replaced while it was in use; run again"):
            encoder.embed(signal, 16_000)


def test_weights_that_are_swapped_before_a_rerun_are_measured_again(tmp_path: Path) -> None:
    model = models.save_external(tmp_path / "from")
    with load_encoder(model, device="cpu", cache=tmp_path / "cache") as encoder:
        before = encoder.info.scan.sha256
    (tmp_path / "from/weights.bin").write_bytes((2 * models.WEIGHTS).tobytes())
    with load_encoder(model, device="cpu", cache=tmp_path / "cache") as encoder:
        assert encoder.info.scan.sha256 != before


# ---------------------------------------------------------------- arithmetic


def leaf_first(depth: int) -> onnx.ModelProto:
    """Functions that call one another, the innermost defined first."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("nested", 1)]
    calls = [helper.make_node("Neg", ["x"], ["y"])]
    calls += [helper.make_node(f"f{level}", ["x"], ["y"], domain="nested") for level in range(depth - 1)]
    model = models.encoder(extra=[helper.make_node(f"f{depth - 1}", ["frames_first"], ["embeddings"], domain="nested")])
    model.functions.extend(
        helper.make_function("nested", f"f{level}", ["x"], ["y"], [call], opsets) for level, call in enumerate(calls)
    )
    model.opset_import.append(opsets[1])
    return model


@pytest.mark.parametrize("depth", [101, 500, 5_000])
def test_functions_that_are_deep_leaf_first(depth: int, tmp_path: Path) -> None:
    models.save(leaf_first(depth), tmp_path / "model.onnx")
    arguments = ("annotate", tmp_path / "model.onnx", "--contract", "license=MIT", "-o", tmp_path / "out.onnx")
    refused(bounded(*arguments), 3, "nests graphs and functions deeper than 100")


def test_functions_that_are_deep_enough(tmp_path: Path) -> None:
    models.save(leaf_first(100), tmp_path / "model.onnx")
    assert annotated(tmp_path / "model.onnx")[0] == 0


def with_hole(model: onnx.ModelProto, path: Path, size: int) -> Path:
    """The model, with a tensor that nothing reads in a file without a byte on the disk."""
    tensor = onnx.TensorProto(name="hole", data_type=onnx.TensorProto.UINT8, dims=[size])
    models.make_external(tensor, "hole.bin")
    model.graph.initializer.append(tensor)
    with (path.parent / "hole.bin").open("wb") as file:
        file.truncate(size)
    if (path.parent / "hole.bin").stat().st_blocks * 512 >= size:
        pytest.skip("this file system knows no holes")
    return models.save(model, path)


def test_a_hole_lifts_no_limit_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SILENCE_SECONDS", 4.0)
    model = with_hole(models.endless_loop(), tmp_path / "model.onnx", 150 << 20)  # 8.8 s more, if it counted
    code, err = annotated(model)
    assert code == 3
    assert "gave no sign of life for 4 s" in err


def test_a_hole_lifts_no_limit_of_memory(tmp_path: Path) -> None:
    model = with_hole(models.encoder(), tmp_path / "model.onnx", 150 << 20)
    with load_encoder(model, device="cpu") as encoder:
        scan = encoder.info.scan
        assert scan.bytes > 150 << 20
        assert scan.solid_bytes < 1 << 20
