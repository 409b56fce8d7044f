"""From a torch module to an ONNX file that follows the encoder contract, and is known to.

A file is kept only if its batch and time are dynamic, its frames follow the declared law, and its embeddings in
ONNX Runtime agree with the module's.
"""

from __future__ import annotations

import io
import itertools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from xares_onnx import __version__
from xares_onnx.errors import ModelError, UsageError

__all__ = ["ExportReport", "Spec", "check_dynamic", "check_parity", "export_encoder", "probe_lengths"]

INPUT, OUTPUT = "audio", "embeddings"
OPSET = 17  # every ONNX Runtime since 1.12 reads it
PROBE_BATCHES = (1, 2, 3)
TOLERANCE = 1e-4  # of the largest reference value, or of 1 where that is smaller


@dataclass(frozen=True)
class Spec:
    """What a family declares of its encoder. All lengths are in samples at `sample_rate`.

    `n` samples give floor((n - receptive_field_samples) / hop_samples) + 1 frames: an encoder that pads its input
    declares the constant of that law, such as 0 for a centred STFT with n // hop + 1 frames.
    """

    model_type: str
    sample_rate: int
    hop_samples: int
    receptive_field_samples: int
    first_frame_center_samples: float
    min_samples: int
    license: str
    source: str
    comment: str
    chunk_samples: int | None = None

    def frames(self, samples: int) -> int:
        return (samples - self.receptive_field_samples) // self.hop_samples + 1

    def metadata(self, dim: int) -> dict[str, str]:
        """The file's `metadata_props`: the contract's `xares.*` keys and the plain ones that sherpa-onnx reads."""
        properties = {
            "xares.contract_version": "1",
            "xares.input_kind": "waveform",
            "xares.input": INPUT,
            "xares.input_layout": "BT",
            "xares.output": OUTPUT,
            "xares.output_layout": "BTD",
            "xares.hop_samples": str(self.hop_samples),
            "xares.receptive_field_samples": str(self.receptive_field_samples),
            "xares.first_frame_center_samples": f"{self.first_frame_center_samples:g}",
            "xares.min_samples": str(self.min_samples),
            "xares.amplitude": "unit",
            "xares.normalize": "none",
            "xares.license": self.license,
            "xares.source": self.source,
            "xares.exporter": f"xares-onnx {__version__}",
            "sample_rate": str(self.sample_rate),
            "output_dim": str(dim),
            "normalize_samples": "1",  # sherpa-onnx's word for samples in [-1, 1]
            "model_type": self.model_type,
            "version": "1",
            "comment": self.comment,
        }
        if self.chunk_samples is not None:
            properties["xares.chunk_samples"] = str(self.chunk_samples)
        return properties


@dataclass(frozen=True)
class ExportReport:
    """A file that was written, and how closely it agrees with the torch module over which lengths and batches."""

    path: Path
    parameters: int
    max_abs_error: float
    lengths: tuple[int, ...]
    batches: tuple[int, ...]


def export_encoder(encoder: nn.Module, spec: Spec, output: Path) -> ExportReport:
    """Export `encoder`, float32 [batch, samples] in [-1, 1] -> [batch, frames, dim], and check the file.

    Raises `ModelError`, and leaves `output` as it was, unless dimensions, frame law and embeddings all hold;
    `UsageError` where `output` cannot be a file.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise UsageError(f"{output} cannot be written: name a file in a folder that exists")
    encoder = encoder.eval().cpu()
    # Beside the output, so that the final rename stays on one file system and is atomic.
    unchecked = output.with_name(f".{output.name}.{os.getpid()}.unchecked")
    try:
        with _steady_torch():
            onnx.save(_trace(encoder, spec), unchecked)
            check_dynamic(unchecked)
            max_abs_error = check_parity(encoder, unchecked, spec)
        os.replace(unchecked, output)
    finally:
        unchecked.unlink(missing_ok=True)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return ExportReport(output, parameters, max_abs_error, probe_lengths(spec), PROBE_BATCHES)


def check_dynamic(path: Path) -> None:
    """Raise `ModelError` where the file fixes batch or time: an exporter may specialise without a word."""
    graph = onnx.load(path).graph
    for value in (graph.input[0], graph.output[0]):
        for size in value.type.tensor_type.shape.dim[:2]:
            if not size.dim_param:
                raise ModelError(f"the exported file fixes a dimension of {value.name!r} to {size.dim_value}")


def check_parity(encoder: nn.Module, path: Path, spec: Spec) -> float:
    """The largest absolute difference between the file and `encoder`, over probe lengths and batches.

    The module hears one clip at a time, the file hears them together, each at its own loudness: a file frozen to
    the traced shape fails, and so does an encoder whose embedding of a clip depends on its neighbours.
    Raises `ModelError` past the tolerance, at a wrong shape, or where ONNX Runtime cannot run the file.
    """
    name = f"the exported {spec.model_type} file"
    with _as_model_error(f"{name} does not load"):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for samples, batch in itertools.product(probe_lengths(spec), PROBE_BATCHES):
        where = f"at {samples} samples and batch {batch}"
        audio = _probe_audio(batch, samples)
        with torch.no_grad():
            expected = torch.cat([encoder(clip[None]) for clip in audio]).numpy()
        with _as_model_error(f"{name} does not run {where}"):
            (found,) = session.run([OUTPUT], {INPUT: audio.numpy()})
        declared = (batch, spec.frames(samples), expected.shape[-1])
        if not found.shape == expected.shape == declared:
            shapes = f"{found.shape}, the torch module {expected.shape}, the declared frame law {declared}"
            raise ModelError(f"{name} gives shape {shapes} {where}")
        error = float(np.abs(found - expected).max())
        allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
        if not error <= allowed:  # NaN fails too
            raise ModelError(f"{name} is off by {error:.2g} {where}, where {allowed:.2g} is allowed")
        worst = max(worst, error)
    return worst


def probe_lengths(spec: Spec) -> tuple[int, ...]:
    """The shortest length, the last before one more frame, two odd ones about one and two seconds longer."""
    shortest, hop, rate = spec.min_samples, spec.hop_samples, spec.sample_rate
    return (shortest, shortest + hop - 1, (shortest + rate) | 1, (shortest + 2 * rate + hop // 3) | 1)


def _probe_audio(batch: int, samples: int) -> Tensor:
    """Noise, float32 [batch, samples]; each clip ten times louder than the one before, up to near full scale."""
    loudness = 10.0 ** np.arange(1 - batch, 1)[:, None]
    noise = np.random.default_rng(samples).uniform(-0.9, 0.9, (batch, samples))
    return torch.from_numpy((loudness * noise).astype(np.float32))


def _trace(encoder: nn.Module, spec: Spec) -> onnx.ModelProto:
    """Graph and metadata, by torch's TorchScript exporter: the newer one cannot export `nn.LSTM`."""
    example = _probe_audio(2, spec.min_samples + spec.sample_rate // 2)
    buffer = io.BytesIO()
    with _as_model_error(f"torch cannot export {spec.model_type}"), torch.no_grad():
        dim = encoder(example).shape[-1]
        torch.onnx.export(
            encoder,
            (example,),
            buffer,  # type: ignore[arg-type]  # typed for the newer exporter, which takes paths only
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch", 1: "samples"}, OUTPUT: {0: "batch", 1: "frames"}},
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = dim  # shape inference may not reach it
    onnx.helper.set_model_props(model, spec.metadata(dim))
    return model


@contextmanager
def _steady_torch() -> Iterator[None]:
    """One thread, as an LSTM's small steps take 30x as long where two wait for each other on a busy machine; and
    no warnings of the older exporter or of risks that `check_parity` rules out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", "Exporting a model to ONNX with a batch_size", UserWarning)
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    """Neither torch's exporter nor ONNX Runtime has one base class of errors: take the first line of any."""
    try:
        yield
    except Exception as error:
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{what}: {detail}") from error
