"""CUDA's libraries are found in wheels, and what is missing is said with what to do; on machines that have no GPU."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import onnx_models as models
import onnxruntime
import pytest
from onnx_models import save

from xares_onnx.encoder import cuda, resolve
from xares_onnx.encoder import encoder as encoder_module
from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.encoder.session import CPU, CUDA, Session, _explained, cuda_may_work
from xares_onnx.errors import MachineError, ModelError, ModelLimitError

without_cuda = pytest.mark.skipif(cuda_may_work(), reason="there is a CUDA driver here")


class Runtime:
    """ONNX Runtime as it loads libraries: it finds those that lie in a folder it is given, and tells of the others."""

    cuda_version = "13.0"

    def __init__(self, *wanted: str) -> None:
        self.lacking = list(wanted)
        self.folders: list[str | None] = []

    def preload_dlls(self, directory: str | None = None) -> None:
        self.folders.append(directory)
        if directory is not None:
            self.lacking = [name for name in self.lacking if not Path(directory, name).exists()]
        for name in self.lacking:
            print(f"Failed to load {name}: {name}: cannot open shared object file: No such file or directory")
            print(f"Failed to load /somewhere/else/{name}: {name}: wrong ELF class")


def wheels(site: Path, **libraries: str) -> Path:
    for folder, name in libraries.items():
        (site / "nvidia" / folder / "lib").mkdir(parents=True)
        (site / "nvidia" / folder / "lib" / name).touch()
    return site


def test_libraries_are_found_in_the_wheels_of_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime looks beside itself alone, and it may be installed elsewhere than PyTorch."""
    monkeypatch.setattr(cuda, "_loads", lambda name: True)
    site = wheels(tmp_path / "site", cudnn="libcudnn.so.9", cu13="libcublas.so.13")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "none"), str(site)])
    runtime = Runtime("libcublas.so.13", "libcurand.so.10", "libcudnn.so.9")
    assert cuda.load_libraries(runtime) == ("libcurand.so.10",)
    assert [str(site / "nvidia/cu13/lib"), str(site / "nvidia/cudnn/lib"), None] == runtime.folders[-3:]
    assert cuda.load_libraries(runtime) == ("libcurand.so.10",)
    assert runtime.folders.count(None) == 1  # once a process
    assert capsys.readouterr().out == ""
    assert cuda.why_no_cuda(runtime, driver=True) == (
        "libcurand.so.10 cannot be loaded; run: pip install 'onnxruntime-gpu[cuda,cudnn]', or install PyTorch for CUDA 13.0"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="its name is another one there")
def test_cudnn_is_missed_although_onnxruntime_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_loads", lambda name: False)
    assert cuda.load_libraries(Runtime()) == ("libcudnn.so.9",)


def test_an_onnxruntime_that_preloads_nothing() -> None:
    assert cuda.load_libraries(SimpleNamespace) == ()
    why = cuda.why_no_cuda(SimpleNamespace, driver=True)
    assert why.endswith("new enough for CUDA of the version that ONNX Runtime was built for")


def test_this_onnxruntime_can_be_asked() -> None:
    """By the real function: every name that it gives is a library that indeed cannot be loaded."""
    for name in cuda.load_libraries(onnxruntime):
        with pytest.raises(OSError):
            ctypes.CDLL(name)


@without_cuda
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="this ONNX Runtime has no CUDA")
def test_cuda_that_is_asked_for_but_not_there_is_an_error(tmp_path: Path) -> None:
    path = save(models.encoder(), tmp_path / "m.onnx")
    with pytest.raises(MachineError, match=r"CUDA does not start: this machine has no NVIDIA driver .*--device cpu"):
        load_encoder(path, device="cuda")


@without_cuda
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="this ONNX Runtime has no CUDA")
def test_auto_says_why_it_ran_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a driver is there, and the libraries are not."""
    monkeypatch.setattr("xares_onnx.encoder.session.cuda_may_work", lambda: True)
    session = Session(save(models.encoder(), tmp_path / "m.onnx"), "auto")
    assert session.provider == CPU
    assert session.note is not None
    assert "could not be used, so the model ran on the CPU: CUDA does not start: " in session.note
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in session.note


@pytest.mark.parametrize(
    ("text", "loading", "kind", "said"),
    [
        ("CUDA failure 2: out of memory ; GPU=0", False, MachineError, "GPU's memory is full; run fewer workers"),
        ("Available memory of 5 is smaller than requested bytes of 9", False, MachineError, "GPU's memory is full"),
        (
            "bla: CUDA failure 100: no CUDA-capable device is detected",
            True,
            MachineError,
            "CUDA failed: CUDA failure 100: no",
        ),
        ("CUDNN failure 3000: CUDNN_STATUS_BAD_PARAM", False, ModelError, "it: CUDNN failure 3000"),
        ("Non-zero status code returned while running Add node", False, ModelError, "it: Non-zero"),
    ],
)
def test_what_cuda_says(text: str, loading: bool, kind: type, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xares_onnx.encoder.session.load_libraries", lambda runtime: ())
    error = _explained(RuntimeError(text), "it", CUDA, loading=loading)
    assert type(error) is kind
    assert said in str(error)
    assert type(_explained(RuntimeError("Failed to allocate memory"), "it", CPU)) is ModelLimitError


def test_a_kernel_that_fails_for_want_of_cudnn_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xares_onnx.encoder.session.load_libraries", lambda runtime: ("libcudnn.so.9",))
    error = _explained(RuntimeError("CUDNN failure 1: CUDNN_STATUS_NOT_INITIALIZED"), "it", CUDA)
    assert isinstance(error, MachineError)


@without_cuda
def test_a_fallback_to_the_cpu_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else libraries that were installed meanwhile would never be tried; nor is the process that tried CUDA reused."""
    path = save(models.encoder(), tmp_path / "m.onnx")
    monkeypatch.setattr(encoder_module, "cuda_may_work", lambda: True)
    with load_encoder(path, cache=tmp_path / "cache") as loaded:
        assert loaded.info.provider == CPU
        assert loaded.worker._process is None
        assert not list((tmp_path / "cache").glob("models/*"))
    monkeypatch.undo()
    with load_encoder(path, cache=tmp_path / "cache") as loaded:
        assert loaded.worker._process is not None
        assert list((tmp_path / "cache").glob("models/*"))


def test_what_sharing_a_call_changes_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU nothing is shared and nothing measured; as if it were another provider, a full call is."""
    path = save(models.encoder(), tmp_path / "m.onnx")
    with load_encoder(path, device="cpu") as loaded:
        info = loaded.info
    assert info.batch_difference is None
    session: Any = Session(path, "cpu")
    beats: list[int] = []
    measured = resolve._with_batch_difference(info, lambda: session, lambda: beats.append(1))
    assert measured is info
    assert beats == []
    elsewhere = msgspec.structs.replace(info, provider="NoneSuchExecutionProvider")
    measured = resolve._with_batch_difference(elsewhere, lambda: session, lambda: beats.append(1))
    assert measured.batch_difference is not None
    assert measured.batch_difference < 1e-5
    assert len(beats) == 3
    assert f"by up to {measured.batch_difference:.1e} of the largest value" in measured.notes[-1]
    assert "up to 16 chunks of equal length share a call" in measured.notes[-1]
