"""Kernels from ONNX Runtime's profile: multiply-adds by hand, times of graphs in graphs, and files that are no profile."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_models as models
import pytest
from check_models import declared, sound
from eight_bits import graph
from layered_model import layered
from onnx import TensorProto, helper
from onnx_models import save

from xares_onnx.checking import check, kernels
from xares_onnx.checking.arithmetic import in_full, multiply_adds, precision_of, shares
from xares_onnx.checking.kernels import Kernel, read_kernels, run_kernels
from xares_onnx.encoder.session import Profiling, Session
from xares_onnx.errors import ModelError

node = helper.make_node


def random(*shape: int, kind: Any = np.float32) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(shape)
    return values.astype(kind) if kind == np.float32 else (40 * values).astype(kind)


def profile(path: Path, feeds: dict[str, np.ndarray], *, shapes: bool = True) -> list[Kernel]:
    session = Session(path, "cpu", profiling=Profiling(path.parent / "profile", shapes))
    session.run_raw([output.name for output in session.outputs], feeds)
    return read_kernels(session.end_profiling())


SCALES = {"s": np.float32(0.02), "z": np.uint8(128), "w": random(24, 16, kind=np.int8), "zw": np.int8(0)}
BETWEEN = [
    node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
    node("DequantizeLinear", ["xq", "s", "z"], ["xf"]),
    node("DequantizeLinear", ["w", "s", "zw"], ["wf"]),
    node("MatMul", ["xf", "wf"], ["p"]),
    node("QuantizeLinear", ["p", "s", "z"], ["pq"]),
    node("DequantizeLinear", ["pq", "s", "z"], ["y"]),
]
# Of each: nodes, constants, the shape of x, the multiply-adds by hand, and in what.
CASES: dict[str, tuple[list[Any], dict[str, Any], tuple[int, ...], int, str]] = {
    "a product": ([node("MatMul", ["x", "w"], ["y"])], {"w": random(24, 16)}, (2, 5, 24), 2 * 5 * 24 * 16, "float32"),
    "a vector": ([node("MatMul", ["x", "w"], ["y"])], {"w": random(24, 16)}, (24,), 24 * 16, "float32"),
    "a product with itself, scaled": (
        [
            node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
            node("MatMul", ["t", "x"], ["p"]),
            node("Mul", ["p", "k"], ["y"]),
        ],
        {"k": np.float32(3)},
        (2, 5, 24),
        2 * 24 * 24 * 5,
        "float32",
    ),
    "Gemm, transposed": (
        [node("Gemm", ["x", "w", "b"], ["y"], transA=1, transB=1)],
        {"w": random(16, 24), "b": random(16)},
        (24, 5),
        5 * 24 * 16,
        "float32",
    ),
    "a grouped convolution": (
        [node("Conv", ["x", "w"], ["y"], group=2, strides=[2])],
        {"w": random(6, 4, 3)},
        (2, 8, 21),
        2 * 10 * 6 * 4 * 3,
        "float32",
    ),
    "a transposed convolution": (
        [node("ConvTranspose", ["x", "w"], ["y"], strides=[2])],
        {"w": random(8, 6, 3)},
        (2, 8, 21),
        2 * 21 * 8 * 6 * 3,
        "float32",
    ),
    "LSTM both ways": (
        [node("LSTM", ["x", "w", "r"], ["y"], hidden_size=8, direction="bidirectional")],
        {"w": random(2, 32, 6), "r": random(2, 32, 8)},
        (9, 2, 6),
        9 * 2 * 2 * 4 * 8 * (6 + 8),
        "float32",
    ),
    "GRU's last step": (
        [node("GRU", ["x", "w", "r"], ["", "y"], hidden_size=8)],
        {"w": random(1, 24, 6), "r": random(1, 24, 8)},
        (9, 2, 6),
        9 * 2 * 3 * 8 * (6 + 8),
        "float32",
    ),
    "a product of bytes, quantised as they come": (
        [
            node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
            node("MatMulInteger", ["xq", "w", "xz"], ["p"]),
            node("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
            node("Mul", ["xs", "s"], ["both"]),
            node("Mul", ["f", "both"], ["y"]),
        ],
        {"w": SCALES["w"], "s": SCALES["s"]},
        (2, 5, 24),
        2 * 5 * 24 * 16,
        "int8",
    ),
    "a product between dequantised": (BETWEEN, SCALES, (2, 5, 24), 2 * 5 * 24 * 16, "int8"),
    "a product of dequantised weights alone": (
        # A scale per row: with one in all, later versions keep the weights packed.
        [node("DequantizeLinear", ["w", "s"], ["wf"], axis=0), node("MatMul", ["x", "wf"], ["y"])],
        {"w": SCALES["w"], "s": np.full(24, 0.02, np.float32)},
        (2, 5, 24),
        2 * 5 * 24 * 16,
        "float32",
    ),
    "weights of 4 bits": (
        [node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=32, N=16, bits=4, block_size=16)],
        {"w": random(16, 2, 8, kind=np.uint8), "s": random(32)},
        (2, 5, 32),
        2 * 5 * 32 * 16,
        "4-bit weights",
    ),
    "an LSTM of bytes": (
        [
            node(
                "DynamicQuantizeLSTM",
                ["x", "w", "r", "", "", "", "", "", "s", "z", "s", "z"],
                ["y"],
                domain="com.microsoft",
                hidden_size=8,
            )
        ],
        {"w": random(1, 6, 32, kind=np.int8), "r": random(1, 8, 32, kind=np.int8), "s": np.ones(1, np.float32) / 99}
        | {"z": np.zeros(1, np.int8)},
        (9, 2, 6),
        9 * 2 * 4 * 8 * (6 + 8),
        "int8",
    ),
    "attention with its projections": (
        [node("Attention", ["x", "w", "b"], ["y"], domain="com.microsoft", num_heads=2)],
        {"w": random(16, 48), "b": random(48)},
        (2, 5, 16),
        2 * 5 * 16 * 48 + 2 * (2 * 5 * 5 * 16),
        "float32",
    ),
    "attention of two heads": (
        [
            node("MultiHeadAttention", ["x", "k", "v"], ["y"], domain="com.microsoft", num_heads=2),
        ],
        {"k": random(2, 7, 16), "v": random(2, 7, 16)},
        (2, 5, 16),
        2 * (2 * 5 * 7 * 16),
        "float32",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_multiply_adds(name: str, tmp_path: Path) -> None:
    nodes, constants, shape, expected, precision = CASES[name]
    found = profile(save(graph(nodes, constants), tmp_path / "m.onnx"), {"x": random(*shape)})
    counted = [(multiply_adds(kernel), precision_of(kernel)) for kernel in found if multiply_adds(kernel)]
    assert sum(count for count, _ in counted) == expected
    assert {kind for _, kind in counted} == {precision}
    assert shares(found) == {precision: 1.0}
    assert in_full(precision) == (precision == "float32")


def test_half_precision_is_computed_as_the_processor_can(tmp_path: Path) -> None:
    weights = random(24, 16).astype(np.float16)
    model = graph([node("MatMul", ["x", "w"], ["y"])], {"w": weights}, kind=TensorProto.FLOAT16)
    found = shares(profile(save(model, tmp_path / "m.onnx"), {"x": random(5, 24).astype(np.float16)}))
    assert set(found) <= {"float16", "float32"}
    assert sum(found.values()) == 1


def test_shares_add_up_over_precisions() -> None:
    def product(kind: str, columns: int) -> Kernel:
        data, out = kernels.Tensor(kind, (10, 3)), kernels.Tensor(kind, (10, columns))
        return Kernel("n", "MatMul", "CPU", 1, (data,), (out,))

    kinds = [product("float32", 6), product("float16", 3), product("float32", 3), Kernel("n", "Relu", "CPU", 1, (), ())]
    assert shares(kinds) == {"float32": 0.75, "float16": 0.25}
    assert shares(kinds[3:]) == {}


# ---------------------------------------------------------------- files that are profiles, and others


def event(name: str, start: int, length: int, **arguments: Any) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": length, "args": arguments}


def test_what_runs_inside_a_kernel_is_not_its_own_time(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    events = [
        event("inner", 10, 30),
        event("innermost", 15, 5),
        event("next", 45, 20),
        event("loop", 5, 90),
        event("z", 95, 1),
    ]
    path.write_text(json.dumps([*events, {"cat": "Session", "name": "session_initialization", "dur": 1, "ts": 1}]))
    own = {kernel.node: kernel.microseconds for kernel in read_kernels(path)}
    assert own == {"loop": 40, "inner": 25, "innermost": 5, "next": 20, "z": 1}


def test_a_loop_is_timed_by_its_body(tmp_path: Path) -> None:
    model = declared(models.endless_loop(above=10.0))
    found = profile(save(model, tmp_path / "m.onnx"), {"audio": random(1, 800)})
    assert "Loop" in {kernel.operator for kernel in found}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[",
        b"{}",
        b'[{"cat": 3}]',
        b"[" * 100_000,
        b'[{"cat": "Node", "args": {"input_type_shape": "x"}}]',
        b'[{"cat": "Node", "dur": 1e400}]',
    ],
)
def test_a_file_that_is_no_profile(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="ONNX Runtime's profile of the model cannot be read"):
        read_kernels(path)


def test_texts_of_a_profile_are_a_strangers(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps([event("n", 0, 1, op_name="x\x1b[31m\u202e" * 1000, provider="::error::")]))
    (kernel,) = read_kernels(path)
    assert len(kernel.operator) < 2000
    assert kernel.operator.isprintable()
    assert not kernel.provider.startswith("::")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_profile_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "profile.json")
    with pytest.raises(ModelError, match="not a regular file"):
        read_kernels(tmp_path / "profile.json")


@pytest.mark.skipif(os.name != "posix", reason="needs limits on files")
def test_a_profile_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    from test_check_parts import bench_for

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    bench = bench_for(save(sound(), tmp_path / "model.onnx"))
    (run,) = run_kernels(bench, 16_000, shapes=True)
    assert run
    sizes = []

    def read(path: Path) -> list[Kernel]:
        sizes.append(path.stat().st_size)
        return read_kernels(path)

    monkeypatch.setattr(kernels, "_MAX_BYTES", 2_000)
    monkeypatch.setattr(kernels, "read_kernels", read)
    with pytest.raises(ModelError, match="cannot be read"):
        run_kernels(bench, 16_000, shapes=True)
    assert sizes == [2_000]
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    assert sorted(os.listdir(tmp_path)) == ["model.onnx"]


# ---------------------------------------------------------------- times by operator and layer


def test_times_by_operator_and_layer(tmp_path: Path, shared_process: None) -> None:
    report = check(layered(tmp_path / "model.onnx", layers=3), device="cpu", threads=1, profile=True)
    found = report.profile
    assert found is not None
    assert (found.provider, found.seconds, found.note) == ("CPUExecutionProvider", 10.0, "")
    assert 2 <= found.runs <= 19
    by_layer = {part.name: part for part in found.layers}
    assert list(by_layer) == ["before the layers", "layer.1", "layer.2", "layer.3", "after the layers"]
    assert by_layer["layer.1"].kernels == by_layer["layer.2"].kernels == by_layer["layer.3"].kernels >= 3
    for parts in (found.operators, found.layers):
        assert sum(part.milliseconds for part in parts) == pytest.approx(found.milliseconds, abs=0.02)
        assert sum(part.share for part in parts) == pytest.approx(1, abs=1e-3)
    times = [part.milliseconds for part in found.operators]
    assert times == sorted(times, reverse=True)
    assert {"Conv", "MatMul"} <= {part.name for part in found.operators}


def test_fused_kernels_belong_to_their_layers(tmp_path: Path, shared_process: None) -> None:
    from random_checkpoints import save_speech

    from xares_onnx.exporters import export

    export("wav2vec2", str(save_speech("wav2vec2", tmp_path / "checkpoint")), tmp_path / "model.onnx")
    unnamed = onnx.load(tmp_path / "model.onnx")
    for item in unnamed.graph.node:
        item.name = ""
    save(unnamed, tmp_path / "model.onnx")
    found = check(tmp_path / "model.onnx", device="cpu", threads=1, profile=True).profile
    assert found is not None
    kernels_of = Counter({part.name: part.kernels for part in found.layers})
    assert kernels_of["layer.1"] == kernels_of["layer.2"] > 15


def test_a_model_without_layers_has_times_by_operator(tmp_path: Path, shared_process: None) -> None:
    path = save(sound(), tmp_path / "model.onnx")
    report = check(path, device="cpu", threads=1, profile=True)
    assert report.profile is not None
    assert report.profile.layers == ()
    assert "no chain of residual layers was found" in report.profile.note
    assert check(path, device="cpu", threads=1).profile is None


def test_a_model_that_cannot_be_used_is_not_profiled(tmp_path: Path, shared_process: None) -> None:
    report = check(save(declared(models.stateful()), tmp_path / "model.onnx"), device="cpu", profile=True)
    assert (report.exit_code, report.profile) == (3, None)


def test_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_process: None) -> None:
    import tempfile

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    check(save(sound(), tmp_path / "model.onnx"), device="cpu", threads=1, profile=True)
    assert os.listdir(tmp_path / "temporary") == []
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "temporary"]


def test_external_weights_are_profiled(tmp_path: Path, shared_process: None) -> None:
    report = check(models.save_external(tmp_path), device="cpu", threads=1, profile=True)
    assert report.profile is not None
    assert report.profile.milliseconds > 0
