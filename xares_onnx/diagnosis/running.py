"""Sessions of parts of models, and the clips that are put through them. Runs in the worker process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..encoder.adapter import Adapter
from ..encoder.contract.contract import Contract
from ..encoder.runner import zscore
from ..errors import ModelError
from .surgery import serialized

if TYPE_CHECKING:
    import onnx

_TYPES = {
    1: "tensor(float)",
    6: "tensor(int32)",
    7: "tensor(int64)",
    9: "tensor(bool)",
    10: "tensor(float16)",
    11: "tensor(double)",
}
SECONDS = 5.0  # of audio per clip at most

Feeds = dict[str, npt.NDArray[Any]]


class RunError(ModelError):
    """A part of a model that does not run; `node` is the name of the node that fails, if ONNX Runtime says which."""

    def __init__(self, message: str, node: str | None) -> None:
        super().__init__(message)
        self.node = node


class PartSession:
    """A session on the CPU for a model that `make` returns.

    The model goes through a file and is forgotten before ONNX Runtime reads that, so that its weights are held once.
    """

    def __init__(self, make: Callable[[], onnx.ModelProto], threads: int) -> None:
        import onnxruntime

        onnxruntime.set_default_logger_severity(4)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.load_model_format", "ONNX")
        with TemporaryDirectory(prefix="xares-onnx-part-") as folder:
            path = Path(folder) / "part.onnx"
            path.write_bytes(serialized(make()))
            try:
                self._session = onnxruntime.InferenceSession(
                    str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
                )
            except Exception as error:  # onnxruntime's exceptions share no base but Exception
                raise RunError(_short(error), None) from error
        self.inputs = {value.name for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]
        self._run_options = onnxruntime.RunOptions()
        self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")

    def run(self, feeds: Feeds) -> Feeds:
        """All outputs by name; of `feeds` what the part does not read is left out."""
        wanted = {name: value for name, value in feeds.items() if name in self.inputs}
        try:
            values = self._session.run(self.outputs, wanted, self._run_options)
        except Exception as error:
            text = str(error)
            node = text.split("Name:'", 1)[1].split("'", 1)[0] if "Name:'" in text else None
            raise RunError(_short(error), node) from error
        return dict(zip(self.outputs, values, strict=True))


def types_of(model: onnx.ModelProto) -> dict[str, str]:
    """The types of a model's inputs, as ONNX Runtime writes them."""
    return {value.name: _TYPES.get(value.type.tensor_type.elem_type, "") for value in model.graph.input}


def feeds_of(waveforms: Sequence[npt.NDArray[np.float32]], contract: Contract, types: dict[str, str]) -> Feeds:
    """The inputs of a model for waveforms (samples,) of one length at its rate."""
    if contract.normalize == "zscore":
        waveforms = [zscore(waveform) for waveform in waveforms]
    return Adapter(contract, types).feeds(np.stack(waveforms))


def clip_samples(a: Contract, b: Contract) -> int:
    """The samples per clip that both models take, about `SECONDS`."""
    most = min(a.chunk_samples, b.chunk_samples)
    least = max(a.min_samples, b.min_samples)
    return max(min(round(SECONDS * a.sample_rate), most), least) if not a.fixed_window and not b.fixed_window else most


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
