"""The encoder: a model file, its contract, and the process it runs in.

with load_encoder("model.onnx") as encoder:
    for embedding in encoder.embed([waveform, ...], rate=44_100):
        embedding.frames  # (frames, dim)
        embedding.times   # (frames,) seconds
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from ..data import audio
from ..errors import DataMissingError, ModelLimitError, UsageError, nearest
from ..files import Stamp, stamp, write_aside
from ..progress import Note, Observer, ignore
from .contract.contract import Contract
from .contract.declarations import (
    Declarations,
    declared_by_preprocessor,
    declared_in_sidecar,
    declared_on_command_line,
    merge,
)
from .exposure import ALL_LAYERS
from .limits import LIFTED, silence_seconds
from .model_file import PREPROCESSOR_CONFIG, find_model
from .resolve import resolve
from .runner import embed_waveforms
from .session import CPU, cuda_may_work
from .spec import EncoderInfo, ModelSpec
from .worker import Array, Worker

T = TypeVar("T")
_CACHE_VERSION = 6


@dataclass(frozen=True)
class Embedding:
    """`frames` (frames, dim) float32 and the `times` (frames,) of their centres in seconds; no times if clip-only."""

    frames: npt.NDArray[np.float32]
    times: npt.NDArray[np.float64]


class Encoder:
    """An encoder ready for work. Its process starts at the first call that needs it."""

    def __init__(self, spec: ModelSpec, worker: Worker) -> None:
        self.spec = spec
        self.worker = worker

    @property
    def info(self) -> EncoderInfo:
        return self.spec.info

    @property
    def contract(self) -> Contract:
        return self.spec.info.contract

    def embed(self, waveforms: Iterable[npt.ArrayLike], rate: int, tap: str | None = None) -> list[Embedding]:
        """Embed mono waveforms (samples,) in [-1, 1] at `rate` Hz; each is resampled, chunked and put together again.

        `tap` names one of those that were loaded; the first, if it is not given. Raises `UsageError` for another name or an
        array that is not a finite mono waveform, `ModelError` where the model fails.
        """
        taps = {found.name: number for number, found in enumerate(self.info.taps)}
        if tap is not None and tap not in taps:
            raise UsageError(f"there is no tap {tap!r}{nearest(tap, taps)}; `taps` of load_encoder names them")
        if not audio.MIN_RATE <= rate <= audio.MAX_RATE:
            raise UsageError(f"rate={rate} must be a sampling rate from {audio.MIN_RATE} to {audio.MAX_RATE} Hz")
        signals = [_checked_waveform(waveform) for waveform in waveforms]
        number = 0 if tap is None else taps[tap]
        results = self.call(embed_waveforms, self.spec, signals, rate, number, returns=list[tuple[Array, Array]])
        return [Embedding(frames.numpy(), times.numpy()) for frames, times in results]

    def call(self, function: Callable[..., T], *arguments: Any, returns: type[T], observer: Observer = ignore) -> T:
        """`function(*arguments, tell=…)` in the encoder's process, within the time that a model of its size may take."""
        limit = silence_seconds(self.info.scan.bytes, self.spec.trust)
        with _advised(self.spec.trust):
            return self.worker.call(function, *arguments, returns=returns, silence_limit=limit, observer=observer)

    def close(self) -> None:
        self.worker.close()

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_encoder(
    path: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    contract: Sequence[str] = (),
    taps: Sequence[str] = (),
    without: Collection[str] = (),
    cache: Path | None = None,
    trust: bool = False,
    observer: Observer = ignore,
) -> Encoder:
    """Find, scan and measure a model; nothing of it runs in this process.

    `contract` holds KEY=VALUE declarations, whatever declares a key of `without` is not heard, `threads` defaults to the
    number of cores, `cache` is a folder where what was measured is kept. `taps` names outputs or inner tensors, of which the
    first stands in for the model's output, or is `all-layers` alone: the output and every layer. `trust` lifts the limits on
    size, memory and time that a giant may need lifted. Raises `ModelError` where the model cannot be used.
    """
    model = find_model(Path(path)).absolute()  # the worker may start after a change of folder
    declared = merge(declared_on_command_line(contract), declared_in_sidecar(model.with_suffix(".toml")))
    taps = _checked_taps(taps, declared)
    beside = declared_by_preprocessor(model.parent / PREPROCESSOR_CONFIG)
    threads = usable_cores() if threads is None else threads
    if threads < 1:
        raise UsageError(f"threads={threads} must be 1 or more")
    as_measured = stamp(model)
    worker = Worker()
    unheard = sorted(without)
    remembered = _Remembered(cache, model, device, declared, beside, taps, trust) if cache and not unheard else None
    info = remembered.load() if remembered else None
    if trust:
        observer(Note(LIFTED))
    if info is None:
        try:
            with _advised(trust):
                info = worker.call(
                    resolve,
                    str(model),
                    device,
                    declared,
                    beside,
                    taps,
                    unheard,
                    trust,
                    returns=EncoderInfo,
                    silence_limit=silence_seconds(model.stat().st_size, trust),
                    observer=observer,
                )
            if device == "auto" and info.provider == CPU and cuda_may_work():
                worker.close()  # what CUDA has mapped there would count against the limit on memory
            elif remembered:  # not that CUDA did not start: the next run may find it mended
                remembered.save(info)
        except BaseException:
            worker.close()
            raise
    for note in info.notes:
        observer(Note(note))
    return Encoder(ModelSpec(info, device, threads, as_measured, trust), worker)


def usable_cores() -> int:
    try:
        return max(1, len(os.sched_getaffinity(0)))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def onnxruntime_distributions() -> dict[str, str]:
    """Installed onnxruntime distributions and their versions. Two at once overwrite each other's files."""
    found = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _checked_taps(taps: Sequence[str], declared: Declarations) -> tuple[str, ...]:
    if ALL_LAYERS in taps and len(taps) > 1:
        raise UsageError(f"--taps {ALL_LAYERS} stands alone: the model's output is among them")
    if twice := [name for name in taps if taps.count(name) > 1]:
        raise UsageError(f"--taps names {twice[0]!r} twice")
    by = declared.get("output")
    if by and taps and taps[0] not in (ALL_LAYERS, by.value):
        raise UsageError(f"{by.source} declares output={by.value}, so --taps must begin with it, not with {taps[0]!r}")
    return tuple(taps)


@contextmanager
def _advised(trust: bool) -> Iterator[None]:
    """Whoever meets a limit is told how it can be lifted."""
    try:
        yield
    except ModelLimitError as error:
        if trust:
            raise
        said = f"{error}; if you trust the model, --trust lifts the limit"
        raise ModelLimitError(said, about=error.about) from error


def _checked_waveform(waveform: npt.ArrayLike) -> npt.NDArray[np.float32]:
    signal = np.asarray(waveform)
    if signal.dtype.kind != "f":
        raise UsageError(f"a waveform must hold floats in [-1, 1], not {signal.dtype}; divide 16-bit samples by 32768")
    if signal.ndim != 1 or not len(signal):
        raise UsageError(f"a waveform must have the shape (samples,), not {signal.shape}; mix channels down first")
    with np.errstate(over="ignore"):
        signal = signal.astype(np.float32, copy=False)
    if not np.isfinite(signal).all():
        raise UsageError("a waveform must hold no NaN and no infinity")
    return signal


# ---------------------------------------------------------------- what runs in the worker


# ---------------------------------------------------------------- what was measured before


class _Remembered:
    """What was measured of a model, kept by everything that could change it, so that a rerun loads no model."""

    def __init__(
        self,
        cache: Path,
        model: Path,
        device: str,
        declared: Declarations,
        beside: Declarations,
        taps: tuple[str, ...],
        trust: bool,
    ) -> None:
        self._model = model
        named = {
            "version": _CACHE_VERSION,
            "model": stamp(model),
            "device": device,
            "cuda": cuda_may_work(),
            "onnxruntime": onnxruntime_distributions(),
            "declared": declared,
            "beside": beside,
            "taps": taps,
            "trust": trust,
        }
        digest = hashlib.sha256(msgspec.json.encode(named, order="deterministic")).hexdigest()
        self._file = cache / "models" / f"{digest[:32]}.json"

    def load(self) -> EncoderInfo | None:
        try:
            info, stamps = msgspec.json.decode(self._file.read_bytes(), type=tuple[EncoderInfo, dict[str, Stamp]])
            if all(stamp(self._model.parent / name) == then for name, then in stamps.items()):
                return msgspec.structs.replace(info, path=str(self._model))  # it may have been reached by another path
        except (OSError, DataMissingError, msgspec.MsgspecError):
            pass
        return None

    def save(self, info: EncoderInfo) -> None:
        stamps = {name: stamp(self._model.parent / name) for name in info.scan.external}
        write_aside(self._file, msgspec.json.encode((info, stamps)))
