"""The encoder: a model file, its contract, and the process it runs in.

with load_encoder("model.onnx") as encoder:
    for embedding in encoder.embed([waveform, ...], rate=44_100):
        embedding.frames  # (frames, dim)
        embedding.times   # (frames,) seconds
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from ..data import audio
from ..errors import ModelError, ModelLimitError, UsageError, nearest, quoted
from ..files import make_private, solid_bytes, stamp, write_aside
from ..foreign import ForeignFileError, decode_json, read_small
from ..progress import Note, Observer, ignore
from ..threads import usable_cores
from .contract.contract import Contract
from .contract.declarations import (
    Declarations,
    declared_beside,
    declared_in_sidecar,
    declared_on_command_line,
    merge,
)
from .devices import chosen_devices
from .exposure import ALL_LAYERS
from .limits import LIFTED, silence_seconds
from .model_file import check_unchanged, find_model
from .resolve import resolve
from .runner import embed_waveforms
from .session import CPU, cuda_may_work
from .spec import EncoderInfo, ModelOptions, ModelSpec
from .walls import Walls
from .worker import Array, Worker

T = TypeVar("T")
_REMEMBERED_BYTES = 256_000_000  # a model may have metadata of 16 MB
_CACHE_VERSION = 7


class Reach(NamedTuple):
    """Files and folders that a model's process reads, and folders that it writes to, beside the model's own."""

    reads: Sequence[Path] = ()
    writes: Sequence[Path] = ()


@dataclass(frozen=True)
class Embedding:
    """`frames` (frames, dim) float32, and `times` (frames,), their centres in seconds.

    A clip-only encoder gives one frame and no times.
    """

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
        """Embed waveforms; each is resampled, cut into chunks, and its frames joined again.

        Args:
            waveforms: Mono waveforms (samples,) of floats in [-1, 1].
            rate: Their sampling rate in Hz.
            tap: Name of a loaded tap; the first by default.

        Returns:
            One embedding per waveform, in the same order.

        Raises:
            UsageError: The tap is unknown, the rate out of range, or an array is not a finite mono waveform.
            ModelError: The model fails.
        """
        taps = {loaded.name: number for number, loaded in enumerate(self.info.taps)}
        if tap is not None and tap not in taps:
            raise UsageError(f"there is no tap {quoted(tap)}{nearest(tap, taps)}; `taps` of load_encoder names them")
        if not audio.MIN_RATE <= rate <= audio.MAX_RATE:
            raise UsageError(f"rate={rate} must be a sampling rate from {audio.MIN_RATE} to {audio.MAX_RATE} Hz")
        signals = [_checked_waveform(waveform) for waveform in waveforms]
        number = 0 if tap is None else taps[tap]
        results = self.call(embed_waveforms, self.spec, signals, rate, number, returns=list[tuple[Array, Array]])
        return [Embedding(frames.numpy(), times.numpy()) for frames, times in results]

    def call(self, function: Callable[..., T], *arguments: Any, returns: type[T], observer: Observer = ignore) -> T:
        """`function(*arguments, tell=…)` in the encoder's process, with the time limit for a model of its size."""
        limit = silence_seconds(self.info.scan.solid_bytes, self.spec.trust)
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
    """Find, scan and measure a model. The model runs in a process of its own, never in this one.

    Args:
        path: An `.onnx` file, or a folder that holds one.
        device: `auto`, `cpu`, `cuda`, `cuda:N`, or the name of an ONNX Runtime provider.
        threads: Number of threads; the number of usable cores by default.
        contract: Declarations, as "KEY=VALUE".
        taps: Names of outputs or inner tensors, the first in place of the model's output; or `all-layers` alone, for the
            output and every layer.
        without: Keys whose declarations are ignored.
        cache: Folder that keeps measurements of models; without it every load measures again.
        trust: Whether to lift the limits on the model's size, memory and time.
        observer: Receives notes and progress.

    Returns:
        The encoder, a context manager that ends its process on exit.

    Raises:
        UsageError: An argument is invalid.
        ModelError: The model cannot be used.
        MachineError: This machine cannot run the model.

    Example:
        >>> with load_encoder("model.onnx") as encoder:
        ...     embedding, = encoder.embed([waveform], rate=16_000)
        >>> embedding.frames.shape  # (frames, dim)
    """
    options = ModelOptions(device=device, threads=threads, contract=tuple(contract), taps=tuple(taps), trust=trust)
    return open_encoder(path, options, without=without, cache=cache, observer=observer)


def open_encoder(
    path: str | Path,
    options: ModelOptions,
    *,
    without: Collection[str] = (),
    cache: Path | None = None,
    reach: Reach = Reach(),  # noqa: B008 - it is a tuple
    observer: Observer = ignore,
) -> Encoder:
    """`load_encoder` with its options in one record, and what else than the model its process may reach."""
    device, trust = chosen_devices(options.device)[0], options.trust  # several devices are alike: the first is measured
    model = find_model(Path(path)).absolute()  # the worker may start after a change of folder
    declared = merge(declared_on_command_line(options.contract), declared_in_sidecar(model.with_suffix(".toml")))
    _check_taps(options.taps, declared)
    beside = declared_beside(model.parent)
    threads = usable_cores() if options.threads is None else options.threads
    if threads < 1:
        raise UsageError(f"threads={threads} must be 1 or more")
    if options.workers is not None and options.workers < 1:
        raise UsageError(f"workers={options.workers} must be 1 or more")
    on_gpu = device not in ("cpu", CPU) and (device != "auto" or cuda_may_work())
    own = device == "auto" or device.startswith("cuda") or not on_gpu  # other providers keep files where they like
    walls = Walls(
        model=str(model),
        reads=tuple(str(path.absolute()) for path in reach.reads),
        writes=tuple(str(path.absolute()) for path in reach.writes) if own else None,
        gpu=on_gpu,
    )
    worker = Worker(walls)
    ignored = sorted(without)
    remembered = _Remembered(cache, model, device, options, declared, beside) if cache and not ignored else None
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
                    options.taps,
                    ignored,
                    trust,
                    returns=EncoderInfo,
                    silence_limit=silence_seconds(solid_bytes(model.stat()), trust),
                    observer=observer,
                )
            if device == "auto" and info.provider == CPU and cuda_may_work():
                worker.close()  # CUDA's mappings there would count against the limit on memory
                worker.walls = replace(walls, gpu=False)
            elif remembered:  # a CUDA that did not start is not remembered: it may be repaired before the next run
                remembered.save(info)
        except BaseException:
            worker.close()
            raise
    for note in info.notes:
        observer(Note(note))
    return Encoder(ModelSpec(info, device, threads, trust), worker)


def onnxruntime_distributions() -> dict[str, str]:
    """Installed onnxruntime distributions and their versions. Two at once overwrite each other's files."""
    versions = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _check_taps(taps: Sequence[str], declared: Declarations) -> None:
    if ALL_LAYERS in taps and len(taps) > 1:
        raise UsageError(f"--taps {ALL_LAYERS} stands alone: the model's output is among them")
    if twice := [name for name in taps if taps.count(name) > 1]:
        raise UsageError(f"--taps names {quoted(twice[0])} twice")
    output = declared.get("output")
    if output and taps and taps[0] not in (ALL_LAYERS, output.value):
        raise UsageError(
            f"{output.source} declares output={output.value}, so --taps must begin with it, not with {quoted(taps[0])}"
        )


@contextmanager
def _advised(trust: bool) -> Iterator[None]:
    """Add to the error of an exceeded limit how to lift the limit."""
    try:
        yield
    except ModelLimitError as error:
        if trust:
            raise
        message = f"{error}; if you trust the model, --trust lifts the limit"
        raise ModelLimitError(message, about=error.about) from error


def _checked_waveform(waveform: npt.ArrayLike) -> npt.NDArray[np.float32]:
    signal = np.asarray(waveform)
    if signal.dtype.kind != "f":
        raise UsageError(f"a waveform must hold floats in [-1, 1], not {signal.dtype}; divide 16-bit samples by 32768")
    if signal.ndim != 1 or not len(signal):
        raise UsageError(f"a waveform must have the shape (samples,), not {signal.shape}; mix channels down first")
    with np.errstate(over="ignore"):
        signal = signal.astype(np.float32, copy=False)
    if not np.isfinite(signal).all():
        raise UsageError("a waveform must hold finite numbers; it has a NaN or an infinity")
    return signal


# ---------------------------------------------------------------- earlier measurements


class _Remembered:
    """A model's measurements on disk, named by everything that could change them, so that a rerun loads no model."""

    def __init__(
        self,
        cache: Path,
        model: Path,
        device: str,
        options: ModelOptions,
        declared: Declarations,
        beside: Declarations,
    ) -> None:
        self._model = model
        causes = {
            "version": _CACHE_VERSION,
            "model": stamp(model),
            "device": device,
            "cuda": cuda_may_work(),
            "onnxruntime": onnxruntime_distributions(),
            "declared": declared,
            "beside": beside,
            "taps": options.taps,
            "trust": options.trust,
        }
        digest = hashlib.sha256(msgspec.json.encode(causes, order="deterministic")).hexdigest()
        self._file = cache / "models" / f"{digest[:32]}.json"

    def load(self) -> EncoderInfo | None:
        try:
            info = decode_json(read_small(self._file, _REMEMBERED_BYTES), EncoderInfo)
            check_unchanged(self._model, info.scan.stamps)
        except (ForeignFileError, ModelError):
            return None
        if not all(tap.contract.is_plausible for tap in info.taps):
            return None
        if info.scan.solid_bytes > sum(size for _, size, *_ in info.scan.stamps.values()):
            return None
        return msgspec.structs.replace(info, path=str(self._model))  # another path may lead to the same file

    def save(self, info: EncoderInfo) -> None:
        make_private(self._file.parent)
        write_aside(self._file, msgspec.json.encode(info), anew=True)
