"""CUDA for ONNX Runtime: loads its libraries from NVIDIA's wheels, and says why CUDA does not start.

`pip install` of PyTorch with CUDA, or of onnxruntime-gpu[cuda,cudnn], puts the libraries into folders that no loader
searches. ONNX Runtime searches the folders beside itself; this module adds those in every folder of `sys.path`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import re
import sys
from pathlib import Path
from typing import Any

_CUDNN = "libcudnn.so.9"  # optional to ONNX Runtime: a model without convolutions runs without it


@functools.cache
def load_libraries(runtime: Any) -> tuple[str, ...]:
    """Load CUDA's and cuDNN's libraries into this process.

    Args:
        runtime: The module onnxruntime.

    Returns:
        Names of missing libraries; none for ONNX Runtime before 1.21, which loads them itself and does not report.
    """
    preload = getattr(runtime, "preload_dlls", None)
    if preload is None:
        return ()
    with contextlib.redirect_stdout(io.StringIO()):
        for folder in _wheel_folders():
            preload(directory=str(folder))
    output = io.StringIO()
    with contextlib.redirect_stdout(output):  # it reports missing libraries on stdout only
        preload()
    missing = re.findall(r"^Failed to load (?:.*[/\\])?([^\s:/\\]+):", output.getvalue(), re.MULTILINE)
    if sys.platform == "linux" and not _loads(_CUDNN):
        missing.append(_CUDNN)
    return tuple(dict.fromkeys(missing))


def _wheel_folders() -> list[Path]:
    """Folders of libraries in NVIDIA's wheels, such as nvidia/cu13/lib and nvidia/cudnn/lib; cuDNN follows what it needs."""
    return [folder for entry in sys.path for folder in sorted(Path(entry, "nvidia").glob("*/lib")) if folder.is_dir()]


def why_no_cuda(runtime: Any, *, driver: bool) -> str:
    """Why CUDA does not start, and what to do about it.

    Args:
        runtime: The module onnxruntime.
        driver: Whether the machine has NVIDIA's driver.
    """
    if not driver:
        return "this machine has no NVIDIA driver (libcuda.so.1); install it, or run with --device cpu"
    if missing := load_libraries(runtime):
        return (
            f"{', '.join(missing)} cannot be loaded; run: pip install 'onnxruntime-gpu[cuda,cudnn]', or install PyTorch for "
            f"{_cuda_version(runtime)}"
        )
    return f"driver and libraries load; check with nvidia-smi that the driver is new enough for {_cuda_version(runtime)}"


def _cuda_version(runtime: Any) -> str:
    """The CUDA version that this ONNX Runtime was built for, if it reports one."""
    return f"CUDA {getattr(runtime, 'cuda_version', '') or 'of the version that ONNX Runtime was built for'}"


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
