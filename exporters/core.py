"""From a torch module to an ONNX file that follows the encoder contract.

A file is kept only if batch and time are dynamic, frames follow the declared law, and embeddings agree with the module's.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from xares_onnx.encoder.contract.frame_law import FrameLaw
from xares_onnx.encoder.contract.tokens import PREFIX as TOKENS
from xares_onnx.encoder.contract.tokens import Tokens
from xares_onnx.encoder.processor import PairSums, pair_sums
from xares_onnx.errors import ModelError, UsageError
from xares_onnx.exporters.precision import LOUDNESS_STEP, TOLERANCE, Precision, halve, quantize
from xares_onnx.files import check_target, disk_error
from xares_onnx.version import __version__

__all__ = ["ExportReport", "Spec", "check_dynamic", "check_parity", "export_encoder", "probe_lengths"]

INPUT, OUTPUT = "audio", "embeddings"
PROBE_BATCHES = (1, 2, 3)
EXTERNAL_BYTES = 2_000_000_000  # weights of this size and more go into a file beside it: a protobuf ends at 2 GiB


@dataclass(frozen=True)
class Spec:
    """What a family declares about its encoder, in samples at `sample_rate`.

    The receptive field is the constant of its `law`, after any padding: 0 for a centred STFT. With `tokens`, the encoder
    gives the tokens of a patch grid, and the law is that of the frames they make.
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
    max_samples: int | None = None
    chunk_samples: int | None = None
    tokens: Tokens | None = None

    @property
    def law(self) -> FrameLaw:
        """The law of its frames."""
        return FrameLaw(self.hop_samples, self.receptive_field_samples)

    def steps(self, samples: int) -> int:
        """The length of its output: frames, or tokens."""
        frames = self.law.frames(samples)
        return self.tokens.prefix + self.tokens.bands * frames if self.tokens else frames

    def metadata(self, dim: int, precision: Precision) -> dict[str, str]:
        """The file's `metadata_props`: the contract's `xares.*` keys, and the plain ones of sherpa-onnx."""
        plain = ("model_type", "sample_rate", "comment")
        declared = {
            name if name in plain else f"xares.{name}": value for name, value in vars(self).items() if name != "tokens"
        }
        if self.tokens:
            declared |= {f"xares.{TOKENS}prefix": self.tokens.prefix, f"xares.{TOKENS}grid": self.tokens.grid}
            declared |= {f"xares.{TOKENS}bands": self.tokens.join}
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
            "xares.precision": precision,
            "output_dim": str(dim),
            "normalize_samples": "1",  # sherpa-onnx's word for samples in [-1, 1]
            "version": "1",
        }


@dataclass(frozen=True)
class ExportReport:
    """A file that was written, and how closely it agrees with the torch module."""

    path: Path
    parameters: int
    max_abs_error: float
    """The largest difference over all lengths, in samples, and batch sizes."""
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    pair_sums: PairSums | None = None
    """How this processor adds products of bytes; None if the file has none."""


def export_encoder(
    encoder: nn.Module, spec: Spec, output: Path, *, precision: Precision = "fp32", external_bytes: int = EXTERNAL_BYTES
) -> ExportReport:
    """Export a torch module and check the file. After an error, `output` is as it was.

    Args:
        encoder: float32 [batch, samples] in [-1, 1] -> [batch, frames, dim], or tokens for frames.
        spec: What the file declares about it.
        output: The file to write, in a folder that exists.
        precision: Of weights and arithmetic.
        external_bytes: Weights of this size and more are written to `<output>.data`.

    Raises:
        ModelError: Dimensions, frame law or embeddings are not as they should be.
        UsageError: `output` cannot be a file, or the encoder has nothing to make smaller.
        MachineError: The disk is full, or fails.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise UsageError(f"{output} cannot be written: name a file in a folder that exists")
    check_target(output)
    check_target(_weights_beside(output))
    encoder = encoder.eval().cpu()
    try:
        # Beside the output, so that the final renames stay on one file system and are atomic.
        with (
            tempfile.TemporaryDirectory(prefix=f".{output.name}.", suffix=".part", dir=output.parent) as folder,
            _steady_torch(),
            torch.no_grad(),
        ):
            unchecked = Path(folder, output.name)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                _save(_trace(encoder, spec, precision, Path(scratch)), unchecked, external_bytes)
            check_dynamic(unchecked)
            max_abs_error = check_parity(encoder, unchecked, spec, precision)
            weights = _weights_beside(unchecked)
            if weights.exists():  # first, because a file without its weights is worse than weights without a file
                weights.chmod(unchecked.stat().st_mode)  # onnx makes it readable to its owner alone
                os.replace(weights, _weights_beside(output))
            os.replace(unchecked, output)
    except OSError as error:
        raise disk_error(error, output) from error
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    sums = pair_sums() if precision == "int8-dynamic" else None
    return ExportReport(output, parameters, max_abs_error, probe_lengths(spec), PROBE_BATCHES, sums)


def check_dynamic(path: Path) -> None:
    """Raise `ModelError` if the file fixes batch or time, which torch's exporter may do without a warning."""
    graph = onnx.load(path, load_external_data=False).graph
    for value in (graph.input[0], graph.output[0]):
        if not all(size.dim_param for size in value.type.tensor_type.shape.dim[:2]):
            raise ModelError(f"the exported file fixes the batch or the time of {value.name!r}")


def check_parity(encoder: nn.Module, path: Path, spec: Spec, precision: Precision = "fp32") -> float:
    """The largest absolute difference between a file and its torch module, over probe lengths and batches.

    The module embeds one clip at a time, the file all together, each clip at another loudness. So a file frozen to the
    traced shape fails, and so does an encoder whose embedding of a clip depends on its neighbours.

    Raises:
        ModelError: The difference exceeds the tolerance, a shape is wrong, or ONNX Runtime cannot run the file.
    """
    name = f"the exported {spec.model_type} file"
    with _as_model_error(f"{name} does not load"):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for samples, batch in itertools.product(probe_lengths(spec), PROBE_BATCHES):
        where = f"at {samples} samples and batch {batch}"
        audio = _probe_audio(batch, samples, LOUDNESS_STEP[precision])
        with _as_model_error(f"{name} or its torch module does not run {where}"):
            expected = torch.cat([encoder(clip[None]) for clip in audio]).detach().numpy()
            (embeddings,) = session.run([OUTPUT], {INPUT: audio.numpy()})
        declared = (batch, spec.steps(samples), expected.shape[-1])
        if not embeddings.shape == expected.shape == declared:
            raise ModelError(f"{name} gives {embeddings.shape} {where}, torch {expected.shape}, its law {declared}")
        errors = np.abs(embeddings - expected).max(axis=(1, 2))
        if not (errors <= TOLERANCE[precision] * np.abs(expected).max(axis=(1, 2))).all():  # NaN fails too
            raise ModelError(f"{name} differs from the torch module by {errors.max():.2g} {where}")
        worst = max(worst, float(errors.max()))
    return worst


def probe_lengths(spec: Spec) -> tuple[int, ...]:
    """The lengths that are checked, in samples: the shortest, the last before one more frame, and two odd ones, one and two
    seconds longer or as far as the encoder allows."""
    shortest, hop, step = spec.min_samples, spec.hop_samples, spec.sample_rate
    if spec.max_samples is not None:
        step = min(step, (spec.max_samples - shortest - hop // 3 - 1) // 2)
    return (shortest, shortest + hop - 1, (shortest + step) | 1, (shortest + 2 * step + hop // 3) | 1)


def _probe_audio(batch: int, samples: int, step: float) -> Tensor:
    """Noise, float32 [batch, samples]; each clip is `step` times louder than the one before, the last at 0.9."""
    noise = np.random.default_rng(samples).uniform(-0.9, 0.9, (batch, samples))
    return torch.from_numpy((noise * step ** np.arange(1 - batch, 1)[:, None]).astype(np.float32))


def _trace(encoder: nn.Module, spec: Spec, precision: Precision, scratch: Path) -> onnx.ModelProto:
    """Graph and metadata, from torch's TorchScript exporter, because the newer one cannot export `nn.LSTM`.

    `scratch` is an empty folder for weights that do not fit into one protobuf.
    """
    if precision == "fp16":
        encoder = halve(deepcopy(encoder))
    example = _probe_audio(2, (spec.min_samples + probe_lengths(spec)[2]) // 2, step=10.0)
    traced = scratch / "traced.onnx"
    with _as_model_error(f"torch cannot export {spec.model_type}"):
        dim = encoder(example).shape[-1]
        torch.onnx.export(
            encoder,
            (example,),
            str(traced),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch", 1: "samples"}, OUTPUT: {0: "batch", 1: "frames"}},
            opset_version=17,  # every ONNX Runtime since 1.12 reads it
            dynamo=False,
        )
        model = onnx.load(traced)
        if precision == "int8-dynamic":
            model = quantize(model, scratch)
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = dim  # shape inference may not reach it
    onnx.helper.set_model_props(model, spec.metadata(dim, precision))
    return model


def _save(model: onnx.ModelProto, path: Path, external_bytes: int) -> None:
    beside = sum(len(weight.raw_data) for weight in model.graph.initializer) >= external_bytes
    onnx.save(model, path, save_as_external_data=beside, location=_weights_beside(path).name)


def _weights_beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


@contextmanager
def _steady_torch() -> Iterator[None]:
    """One thread, because threads that wait for each other at every LSTM step take 30x as long on a busy machine.

    No warnings that the exporter is old, nor of what a trace may freeze, which `check_parity` finds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=torch.jit._trace.TracerWarning)
            warnings.filterwarnings("ignore", module=r"torch\.onnx|torch\.nn\.modules\.rnn")
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    """The first line of any error: neither torch's exporter nor ONNX Runtime has one base class of errors."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{what}: {detail}") from error
