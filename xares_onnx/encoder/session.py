"""One ONNX Runtime session, fed and read through the contract's layouts. Runs in the worker process.

On the CPU a session has one intra-op thread and is called from several threads: that took 0.86-0.88x the time of one caller
with as many threads. On CUDA, `HEURISTIC` keeps cuDNN from tuning again at every new shape, and the arena grows by the
requested size instead of doubling, so that several processes can share a GPU. The arena has no limit of its own, since only
the processes on a GPU know how they share it.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ContractError, MachineError, ModelError, ModelLimitError, UsageError, concerning, quoted
from .adapter import Adapter
from .contract.contract import Contract
from .cuda import load_libraries, why_no_cuda
from .exposure import Exposure, exposing, numbered

if TYPE_CHECKING:
    import onnxruntime

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_NO_MEMORY = ("bad_alloc", "Failed to allocate memory", "out of memory", "Available memory of")
_CUDA_FAILURE = re.compile(r"CUDA failure|CUDA error|CUDNN failure|CUDNN_STATUS|CUBLAS failure|libcu\w*\.so|no CUDA-capable")
CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",
    "use_tf32": "0",  # TF32 rounds a convolution to 10 bits, which would harm a DFT in the front end
    "arena_extend_strategy": "kSameAsRequested",
}


@dataclass(frozen=True)
class Profiling:
    """Where ONNX Runtime writes its profile, and what is profiled.

    With `shapes` weights stay as they are in the file, so that the profile tells their shapes; times are then not those of
    other sessions. Without, each node is named by its number in the file.
    """

    prefix: Path
    shapes: bool


class Session:
    """A loaded model on one provider, with the inner tensors of `exposure` as further outputs.

    `front` is a graph that makes its features. `run` may be called from several threads at once.
    """

    def __init__(
        self,
        path: Path,
        device: str = "auto",
        exposure: Exposure | None = None,
        *,
        front: Path | None = None,
        record_placement: bool = False,
        profiling: Profiling | None = None,
    ) -> None:
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)  # failures come back as exceptions; nothing prints on stderr
        self._path = path
        self._exposure = exposure
        self._record_placement = record_placement
        self._profiling = profiling
        self.note: str | None = None
        if device == "auto":
            usable = CUDA in onnxruntime.get_available_providers() and cuda_may_work()
            provider = CUDA if usable else CPU
            try:
                self._session = self._open(onnxruntime, provider, {})
            except MachineError as error:
                self._session = self._open(onnxruntime, CPU, {})
                self.note = f"a CUDA device is present but could not be used, so the model ran on the CPU: {error}"
        else:
            self._session = self._open(onnxruntime, *provider_of(device))
        self.provider: str = self._session.get_providers()[0]
        self.front: Session | None = Session(front, device) if front else None
        self.types: dict[str, str] = {node.name: node.type for node in self._session.get_inputs()}
        self._run_options = onnxruntime.RunOptions()
        if self.provider == CPU:  # keeps resident memory flat over chunks of many lengths
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def _open(self, runtime: Any, provider: str, options: dict[str, str]) -> onnxruntime.InferenceSession:
        if provider not in runtime.get_available_providers():
            raise MachineError(f"this ONNX Runtime has no {provider}; it has {', '.join(runtime.get_available_providers())}")
        session_options = runtime.SessionOptions()
        session_options.intra_op_num_threads = 1
        session_options.inter_op_num_threads = 1
        session_options.log_severity_level = 4
        # Whatever the file's name or first bytes say: the guard has read it as ONNX, and nothing else may be loaded.
        session_options.add_session_config_entry("session.load_model_format", "ONNX")
        if self._record_placement:
            session_options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if provider == CUDA:
            load_libraries(runtime)
            options = {**CUDA_OPTIONS, **options}
        content: str | bytes = str(self._path)
        if self._profiling is not None:
            session_options.enable_profiling = True
            session_options.profile_file_prefix = str(self._profiling.prefix)
            if self._profiling.shapes:
                session_options.add_session_config_entry("session.disable_prepacking", "1")
        if self._exposure is not None or (self._profiling is not None and not self._profiling.shapes):
            content = self._changed()
            folder = str(self._path.absolute().parent)
            session_options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        try:
            session: onnxruntime.InferenceSession = runtime.InferenceSession(
                content,
                session_options,
                providers=[(provider, options), CPU] if provider != CPU else [CPU],
                enable_fallback=0,  # it would print the failure and continue on the CPU
            )
        except Exception as error:  # onnxruntime's exceptions share no base but Exception
            raise _explained(error, f"{self._path} cannot be loaded", provider, loading=True) from error
        session.disable_fallback()
        if session.get_providers()[0] != provider:  # onnxruntime only warns
            if provider == CUDA:
                raise MachineError(f"CUDA does not start: {why_no_cuda(runtime, driver=cuda_may_work())}")
            raise MachineError(f"ONNX Runtime could not start {provider} on this machine; check its driver and libraries")
        return session

    def _changed(self) -> bytes:
        import onnx

        try:
            model = onnx.load_model(self._path, format="protobuf", load_external_data=False)
        except OSError as error:
            raise ModelError(f"model {self._path} cannot be read ({error.strerror})") from error
        return exposing(model, self._exposure) if self._exposure is not None else numbered(model)

    def end_profiling(self) -> Path:
        """The file of the profile, which ends here."""
        return Path(self._session.end_profiling())

    @property
    def inputs(self) -> list[onnxruntime.NodeArg]:
        return list(self._session.get_inputs())

    @property
    def outputs(self) -> list[onnxruntime.NodeArg]:
        return list(self._session.get_outputs())

    @property
    def placement(self) -> list[tuple[str, str]] | None:
        """(provider, operator) of every node; None if it was not recorded, or if this ONNX Runtime does not report it."""
        assignment = getattr(self._session, "get_provider_graph_assignment_info", None)
        if assignment is None or not self._record_placement:
            return None
        return [(str(part.ep_name), str(node.op_type)) for part in assignment() for node in part.get_nodes()]

    def adapter(self, contract: Contract) -> Adapter:
        """What feeds and reads this model by a contract."""
        return Adapter(contract, self.types, self.front)

    def run_raw(self, outputs: list[str], feeds: dict[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """The named outputs, as the model gives them."""
        try:
            results: list[npt.NDArray[Any]] = self._session.run(outputs, feeds, self._run_options)
        except Exception as error:
            with concerning("run"):
                raise _explained(error, f"{self._path.name} failed on an input", self.provider) from error
        for name, result in zip(outputs, results, strict=True):
            if not isinstance(result, np.ndarray):
                raise ContractError(
                    f"output {quoted(name)} is not a tensor; name another by --contract output=NAME", about="output"
                )
        return results

    def run(
        self, batch: npt.NDArray[np.float32], contract: Contract, held: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """Waveforms (batch, samples) in [-1, 1] to embeddings (batch, frames, dim); a clip-only encoder gives one frame.

        The first `held` samples of each waveform are not padding; all by default.
        """
        return self.run_taps(batch, [contract], held)[0]

    def run_taps(
        self, batch: npt.NDArray[np.float32], taps: Sequence[Contract], held: Sequence[int] | None = None
    ) -> list[npt.NDArray[np.float32]]:
        """`run` for several outputs in one pass, by contracts that differ only in the output."""
        adapters = [self.adapter(contract) for contract in taps]
        results = adapters[0].results(self.run_raw, [contract.output for contract in taps], batch, held)
        return [adapter.frames(result, len(batch)) for adapter, result in zip(adapters, results, strict=True)]


def provider_of(device: str) -> tuple[str, dict[str, str]]:
    """ONNX Runtime's provider and options for `cpu`, `cuda`, `cuda:1` or a provider's own name."""
    name, _, number = device.partition(":")
    if name == "cpu" and not number:
        return CPU, {}
    if name == "cuda" and (not number or number.isdecimal()):
        return CUDA, {"device_id": number or "0"}
    if device.endswith("ExecutionProvider"):
        return device, {}
    raise UsageError(f"--device {quoted(device)} must be auto, cpu, cuda, cuda:N or the name of an ONNX Runtime provider")


def cuda_may_work() -> bool:
    """Whether this machine has a CUDA driver: onnxruntime-gpu lists CUDA even on machines without a GPU."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def _explained(error: Exception, what: str, provider: str, *, loading: bool = False) -> ModelError | MachineError:
    text = " ".join(str(error).split())
    if isinstance(error, ModelError | MachineError):
        return error
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
        if provider == CUDA:
            return MachineError(
                f"{what}: the GPU's memory is full; run fewer workers on it, or declare a shorter chunk by --contract "
                "chunk_samples=N"
            )
        return ModelLimitError(f"{what}: it needs more memory than it may use")
    if provider == CUDA and (sign := _CUDA_FAILURE.search(text)) and (loading or load_libraries(sys.modules["onnxruntime"])):
        # The device's or its libraries' fault. If all libraries are there, a failing run may be the model's: an input that
        # is too short for a kernel.
        why = why_no_cuda(sys.modules["onnxruntime"], driver=cuda_may_work())
        return MachineError(f"CUDA failed: {text[sign.start() : sign.start() + 200]}; {why}")
    return ModelError(f"{what}: {text[:300]}")
