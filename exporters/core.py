"""From a torch module to an ONNX file that follows the encoder contract, and is known to.

A file is kept only if batch and time are dynamic, frames follow the declared law, and embeddings agree.
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

from xares_onnx.errors import ModelError, UsageError
from xares_onnx.version import __version__

__all__ = ["ExportReport", "Spec", "check_dynamic", "check_parity", "export_encoder", "probe_lengths"]

INPUT, OUTPUT = "audio", "embeddings"
PROBE_BATCHES = (1, 2, 3)
TOLERANCE = 1e-4  # of the largest absolute value in a clip's embedding


@dataclass(frozen=True)
class Spec:
    """What a family declares of its encoder, in samples at `sample_rate`.

    The receptive field is the constant of the law in `frames`, after any padding: 0 for a centred STFT.
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
        """The frame law: floor((samples - receptive field) / hop) + 1."""
        return (samples - self.receptive_field_samples) // self.hop_samples + 1

    def metadata(self, dim: int) -> dict[str, str]:
        """The file's `metadata_props`: the contract's `xares.*` keys, and the plain ones of sherpa-onnx."""
        plain = ("model_type", "sample_rate", "comment")
        declared = {name if name in plain else f"xares.{name}": value for name, value in vars(self).items()}
        return {key: f"{value}" for key, value in declared.items() if value is not None} | {
            "xares.contract_version": "1",
            "xares.input_kind": "waveform",
            "xares.input": INPUT,
            "xares.input_layout": "BT",
            "xares.output": OUTPUT,
            "xares.output_layout": "BTD",
            "xares.amplitude": "unit",
            "xares.normalize": "none",
            "xares.exporter": f"xares-onnx {__version__}",
            "output_dim": str(dim),
            "normalize_samples": "1",  # sherpa-onnx's word for samples in [-1, 1]
            "version": "1",
        }


@dataclass(frozen=True)
class ExportReport:
    """A file that was written, and how closely it agrees with the torch module at which lengths, batches."""

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
    # Beside the output, so that the final rename stays on one file system and is atomic.
    unchecked = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        with _steady_torch(), torch.no_grad():
            onnx.save(_trace(encoder.eval().cpu(), spec), unchecked)
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
        if not all(size.dim_param for size in value.type.tensor_type.shape.dim[:2]):
            raise ModelError(f"the exported file fixes the batch or the time of {value.name!r}")


def check_parity(encoder: nn.Module, path: Path, spec: Spec) -> float:
    """The largest absolute difference between the file and `encoder`, over probe lengths and batches.

    The module hears one clip at a time, the file hears them together, each at its own loudness: a file frozen
    to the traced shape fails, and so does an encoder whose embedding of a clip depends on its neighbours.
    Raises `ModelError` past the tolerance, at a wrong shape, or where ONNX Runtime cannot run the file.
    """
    name = f"the exported {spec.model_type} file"
    with _as_model_error(f"{name} does not load"):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for samples, batch in itertools.product(probe_lengths(spec), PROBE_BATCHES):
        where = f"at {samples} samples and batch {batch}"
        audio = _probe_audio(batch, samples)
        with _as_model_error(f"{name} or its torch module does not run {where}"):
            expected = torch.cat([encoder(clip[None]) for clip in audio]).detach().numpy()
            (found,) = session.run([OUTPUT], {INPUT: audio.numpy()})
        law = (batch, spec.frames(samples), expected.shape[-1])
        if not found.shape == expected.shape == law:
            raise ModelError(f"{name} gives {found.shape} {where}, torch {expected.shape}, its law {law}")
        errors = np.abs(found - expected).max(axis=(1, 2))
        if not (errors <= TOLERANCE * np.abs(expected).max(axis=(1, 2))).all():  # NaN fails too
            raise ModelError(f"{name} differs from the torch module by {errors.max():.2g} {where}")
        worst = max(worst, float(errors.max()))
    return worst


def probe_lengths(spec: Spec) -> tuple[int, ...]:
    """The shortest length, the last before one more frame, two odd ones about one and two seconds longer."""
    shortest, hop, rate = spec.min_samples, spec.hop_samples, spec.sample_rate
    return (shortest, shortest + hop - 1, (shortest + rate) | 1, (shortest + 2 * rate + hop // 3) | 1)


def _probe_audio(batch: int, samples: int) -> Tensor:
    """Noise, float32 [batch, samples]; each clip ten times louder than the one before, the last at 0.9."""
    noise = np.random.default_rng(samples).uniform(-0.9, 0.9, (batch, samples))
    return torch.from_numpy((noise * 10.0 ** np.arange(1 - batch, 1)[:, None]).astype(np.float32))


def _trace(encoder: nn.Module, spec: Spec) -> onnx.ModelProto:
    """Graph and metadata, by torch's TorchScript exporter: the newer one cannot export `nn.LSTM`."""
    example = _probe_audio(2, spec.min_samples + spec.sample_rate // 2)
    buffer = io.BytesIO()
    with _as_model_error(f"torch cannot export {spec.model_type}"):
        dim = encoder(example).shape[-1]
        torch.onnx.export(
            encoder,
            (example,),
            buffer,  # type: ignore[arg-type]  # typed for the newer exporter, which takes paths only
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch", 1: "samples"}, OUTPUT: {0: "batch", 1: "frames"}},
            opset_version=17,  # every ONNX Runtime since 1.12 reads it
            dynamo=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = dim  # shape inference may not reach it
    onnx.helper.set_model_props(model, spec.metadata(dim))
    return model


@contextmanager
def _steady_torch() -> Iterator[None]:
    """One thread: threads that wait for each other at every LSTM step take 30x as long on a busy machine.
    No warnings of the older exporter's age, nor of fixed LSTM shapes, which `check_parity` rules out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", module=r"torch\.onnx|torch\.nn\.modules\.rnn")
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
