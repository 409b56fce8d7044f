"""Parity: a model's embeddings against a reference, which is another model or a NumPy file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..data.audio import MAX_RATE, MIN_RATE
from ..encoder.encoder import Encoder
from ..errors import UsageError
from ..foreign import ForeignFileError, read_arrays
from .findings import Outcome, failed, passed
from .model_under_test import cosines, difference
from .signals import make_signals

# Relative to the largest absolute value in a clip's embedding; the exporters keep the same limits.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.02, "int8-dynamic": 0.2}
_SOUNDS = ("noise", "speech-like", "chirp", "pink noise", "clicks", "full-scale noise")
_SECONDS = 2.0
_MAX_BYTES = 1 << 29


@dataclass(frozen=True)
class Reference:
    """`waveforms` (samples,) at `rate` Hz with the expected `embeddings` (frames, dim), or (1, dim) for one vector per clip.

    `precision` is that of the model that gave the embeddings, `fp32` if unknown.
    """

    name: str
    rate: int
    waveforms: list[npt.NDArray[np.float32]]
    embeddings: list[npt.NDArray[np.float32]]
    precision: str = "fp32"


def sounds(rate: int, least: int, most: int) -> list[npt.NDArray[np.float32]]:
    """Waveforms (samples,) that compare two models, of two seconds or the nearest length from `least` to `most` samples."""
    samples = min(max(round(_SECONDS * rate), least), most)
    signals = make_signals(samples, rate)
    return [signals[name] for name in _SOUNDS]


def reference_of_model(encoder: Encoder, precision: str, waveforms: list[npt.NDArray[np.float32]], rate: int) -> Reference:
    """The embeddings that another model gives for `waveforms` at `rate` Hz."""
    embeddings = [embedding.frames for embedding in encoder.embed(waveforms, rate)]
    return Reference(Path(encoder.info.path).name, rate, waveforms, embeddings, precision)


def read_reference(path: Path) -> Reference:
    """Read a reference from a `.npz` file. Nothing in it is unpickled.

    Args:
        path: A file with `rate` (Hz), `waveform` (samples,) or (clips, samples), and `embeddings` (frames, dim) or
            (clips, frames, dim). Clips of different lengths are numbered: `waveform_0`, `embeddings_0` and so on.

    Raises:
        UsageError: If the file cannot be read, or holds something else.
    """
    try:
        arrays = read_arrays(path, _MAX_BYTES)
    except ForeignFileError as error:
        raise UsageError(f"reference {path} cannot be read ({error}); give a few seconds of a few clips") from error
    if "rate" not in arrays or arrays["rate"].size != 1 or arrays["rate"].dtype.kind not in "iuf":
        raise UsageError(f"reference {path} must hold `rate`, one number in Hz; it has {_listed(arrays)}")
    rate = float(arrays["rate"].reshape(-1)[0])
    if not (MIN_RATE <= rate <= MAX_RATE and rate.is_integer()):
        raise UsageError(f"reference {path}: rate={rate:g} must be a whole sampling rate from {MIN_RATE} to {MAX_RATE} Hz")
    pairs = list(_pairs(path, arrays))
    for number, (waveform, embedding) in enumerate(pairs):
        if waveform.ndim != 1 or not len(waveform) or waveform.dtype.kind != "f" or not np.isfinite(waveform).all():
            raise UsageError(f"reference {path}: waveform {number} must be finite floats (samples,), in [-1, 1]")
        if embedding.ndim != 2 or not embedding.size or embedding.dtype.kind != "f":
            raise UsageError(f"reference {path}: embeddings {number} must be floats (frames, dim), not {embedding.shape}")
    waveforms, embeddings = zip(*pairs, strict=True)
    return Reference(
        path.name, int(rate), [w.astype(np.float32) for w in waveforms], [e.astype(np.float32) for e in embeddings]
    )


def compare(encoder: Encoder, reference: Reference, precision: str, tolerance: float | None) -> Outcome:
    """Compare the encoder's embeddings of the reference's waveforms with those of the reference.

    Args:
        encoder: The model under test.
        reference: Waveforms with the expected embeddings.
        precision: The encoder's precision, a key of `TOLERANCES`.
        tolerance: Largest difference, relative to the largest absolute value of a clip's embedding; None for that of
            the coarser precision of the two.
    """
    contract = encoder.contract
    limit = max(TOLERANCES[precision], TOLERANCES[reference.precision]) if tolerance is None else tolerance
    unit = "of the largest"
    remedy = "look for what the export changed: the front end, a normalisation, precision, dropout, the order of outputs"
    embeddings = [embedding.frames for embedding in encoder.embed(reference.waveforms, reference.rate)]
    errors, absolute_errors, similarities, lines = [], [], [], []
    for number, (own, other, waveform) in enumerate(zip(embeddings, reference.embeddings, reference.waveforms, strict=True)):
        if own.shape[1] != other.shape[1]:
            return failed(
                f"{own.shape[1]} dimensions, but {reference.name} has {other.shape[1]}",
                "compare the same output of the same encoder",
                measured=own.shape[1],
                tolerance=other.shape[1],
                unit="dimensions",
            )
        # An encoder drops frames whose centre lies past the clip's end; a file may still hold them.
        samples = round(len(waveform) * contract.sample_rate / reference.rate)
        if len(other) > len(own) and len(other) == contract.frames_of(samples):
            other = other[: len(own)]
        if len(own) != len(other):
            return failed(
                f"{len(own)} frames for clip {number} of {samples} samples, but {reference.name} has {len(other)}",
                "compare encoders of the same hop and padding; clips of a .npz should be 1 s or longer, and within a chunk",
                measured=len(own),
                tolerance=len(other),
                unit="frames",
            )
        errors.append(difference(own, other))
        absolute_errors.append(float(np.abs(own.astype(np.float64) - other).max()))
        similarities.append(cosines(own, other))
        lines.append(
            f"clip {number}: {len(own)} frames, {errors[-1]:.1e} of the largest value, cosine {similarities[-1].min():.6f}"
        )
    worst, cosine = max(errors), np.concatenate(similarities)
    summary = (
        f"at most {max(absolute_errors):.2g} from {reference.name}, {worst:.1e} of the largest value; cosine per frame "
        f"at least {cosine.min():.6f}, on average {cosine.mean():.6f}"
    )
    figure = {
        "measured": float(f"{worst:.3g}") if np.isfinite(worst) else "not finite",
        "tolerance": limit,
        "unit": unit,
        "details": tuple(lines),
    }
    return passed(summary, **figure) if worst <= limit else failed(summary, remedy, **figure)


def _pairs(
    path: Path, arrays: dict[str, npt.NDArray[np.generic]]
) -> Iterator[tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]]:
    """The waveform (samples,) and embeddings (frames, dim) of each clip."""
    if "waveform" in arrays and "embeddings" in arrays:
        waveform, embeddings = arrays["waveform"], arrays["embeddings"]
        if waveform.ndim == 1:
            yield waveform, embeddings[None] if embeddings.ndim == 1 else embeddings
            return
        if waveform.ndim != 2 or embeddings.ndim not in (2, 3) or not len(waveform) or len(waveform) != len(embeddings):
            raise UsageError(
                f"reference {path}: waveform {waveform.shape} and embeddings {embeddings.shape} must be (samples,) and "
                "(frames, dim), or (clips, samples) and (clips, frames, dim)"
            )
        for clip, embedding in zip(waveform, embeddings, strict=True):
            yield clip, embedding if embedding.ndim == 2 else embedding[None]
        return
    count = 0
    while f"waveform_{count}" in arrays and f"embeddings_{count}" in arrays:
        yield arrays[f"waveform_{count}"], arrays[f"embeddings_{count}"]
        count += 1
    if not count:
        raise UsageError(
            f"reference {path} must hold `waveform` and `embeddings`, or `waveform_0` and `embeddings_0`; it has "
            f"{_listed(arrays)}"
        )


def _listed(arrays: dict[str, npt.NDArray[np.generic]]) -> str:
    return ", ".join(repr(name) for name in arrays) or "nothing"
