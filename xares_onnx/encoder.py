"""The encoder: a model file, its contract, and the process it runs in.

with load_encoder("model.onnx") as encoder:
    for embedding in encoder.embed([waveform, ...], rate=44_100):
        embedding.frames  # (frames, dim)
        embedding.times   # (frames,) seconds
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from . import audio
from .batching import Batching
from .chunking import Chunk, cut, frame_centers, frames_inside, plan_chunks
from .contract import (
    Contract,
    Declarations,
    declared_by_preprocessor,
    declared_in_metadata,
    declared_in_sidecar,
    declared_on_command_line,
    merge,
    remarks,
)
from .errors import ClipError, ContractError, DataMissingError, ModelError, ModelLimitError, UsageError, nearest
from .events import Doing, Note, Observer, ignore
from .files import Stamp, stamp, write_aside
from .layers import ALL_LAYERS, Exposure
from .limits import LIFTED, limits, measuring_seconds, memory_bytes, silence_seconds
from .model_file import PREPROCESSOR_CONFIG, ModelScan, find_model, scan_model
from .session import CPU, Session, cuda_may_work
from .worker import Array, Beat, Tell, Worker, limit_memory

T = TypeVar("T")
GPU_BATCH = 32  # most chunks in one call
_CALL_SECONDS = 160  # most audio in one call of several chunks
_WINDOW_SECONDS = 900  # of chunks, among which those of equal length are looked for
_WINDOW_BYTES = 1 << 28  # most embedding values of a window, so that many taps are held no longer than one
_GPU_CALLERS = 2  # one prepares a call while the device is busy with the other's; each has handles and workspace of its own
_CUDA_SECONDS = 90.0  # longest first load: CUDA's and cuDNN's libraries are gigabytes, which may come from a cold disk
_CACHE_VERSION = 4


class Tap(msgspec.Struct, frozen=True):
    """An output whose embeddings are scored, by the name that results call it."""

    name: str
    contract: Contract


class EncoderInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A model as it was found: content, contract, provider. Enough to name its embeddings without loading it."""

    path: str
    scan: ModelScan
    contract: Contract
    provider: str
    onnxruntime: str
    notes: tuple[str, ...] = ()
    more_taps: tuple[Tap, ...] = ()
    """Outputs that are scored beside the contract's, in the same pass."""
    exposure: Exposure | None = None
    """Inner tensors that were made outputs for them."""
    batch_difference: float | None = None
    """Largest difference of a chunk alone from the same chunk in a full call, as a share of the largest embedding value;
    None where a chunk is always alone."""

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Every output that is scored, the contract's first."""
        return (Tap(self.contract.output, self.contract), *self.more_taps)

    @property
    def batching(self) -> Batching:
        """Which chunks share a call. On the CPU none do: that is as fast, and no clip then meets another."""
        if self.provider == CPU or self.contract.batch_coupled or not self.contract.dynamic_batch:
            return Batching()
        rate = self.contract.sample_rate
        framed = [tap.contract for tap in self.taps if tap.contract.hop_samples]
        bytes_a_sample = sum(4 * contract.dim / (contract.hop_samples or 1) for contract in framed)
        window = min(_WINDOW_SECONDS * rate, int(_WINDOW_BYTES / bytes_a_sample) if bytes_a_sample else sys.maxsize)
        return Batching(GPU_BATCH, _CALL_SECONDS * rate, window)


class ModelSpec(msgspec.Struct, frozen=True):
    """What a worker needs to have the encoder at hand; picklable."""

    info: EncoderInfo
    device: str
    threads: int
    stamp: Stamp | None = None  # of the model file as it was measured
    trust: bool = False  # lifts limits on size, memory and time (`limits`)

    @property
    def callers(self) -> int:
        """Threads that call the model at once; clips are decoded on `threads`."""
        return self.threads if self.info.provider == CPU else min(self.threads, _GPU_CALLERS)


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
        results = self.call(_embed_waveforms, self.spec, signals, rate, number, returns=list[tuple[Array, Array]])
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
                    _resolve,
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


def _resolve(
    model: str,
    device: str,
    declared: Declarations,
    beside: Declarations,
    taps: Sequence[str] = (),
    unheard: Sequence[str] = (),
    trust: bool = False,
    *,
    tell: Tell,
) -> EncoderInfo:
    from .taps import measure_taps

    path = Path(model)
    tell(Doing("reading the model's file"))
    on_cpu = device == "cpu" or (device == "auto" and not cuda_may_work())
    size = path.stat().st_size
    if on_cpu:
        device = "cpu"  # the name under which `open_session` finds the session again
        limit_memory(memory_bytes(size, trust))
    before = stamp(path)
    scan = scan_model(path, lambda: tell(Beat()), trust=trust)
    stamps = {path: before, **{file: stamp(file) for file in (path.parent / name for name in scan.external)}}
    if on_cpu:
        limit_memory(memory_bytes(scan.bytes, trust))
    patience = silence_seconds(scan.bytes, trust) - silence_seconds(size, trust)  # for weights beside the file
    patience += 0.0 if on_cpu else _CUDA_SECONDS
    tell(Doing("loading the model", patience))
    session = _session(model, device, None)
    if any(stamp(file) != then for file, then in stamps.items()):
        raise ModelError(f"{path} was replaced while it was read; run again")
    tell(Doing("measuring the model", patience))
    heard = merge(declared, declared_in_metadata(scan.metadata), beside)
    heard = {key: declaration for key, declaration in heard.items() if key not in unheard}
    budget = measuring_seconds(scan.bytes, trust) * (2 if taps else 1) + (0.0 if on_cpu else _CUDA_SECONDS)
    beat = _Budget(budget, tell).beat
    open_exposing = functools.partial(_session, model, device)
    found = measure_taps(path, open_exposing, heard, taps, beat, max_dim=limits(trust).dim)
    info = EncoderInfo(
        path=model,
        scan=scan,
        contract=found.contract,
        provider=session.provider,
        onnxruntime=_runtime_version(),
        notes=(*([session.note] if session.note else []), *remarks(found.contract), *found.notes),
        more_taps=tuple(Tap(name, contract) for name, contract in found.more.items()),
        exposure=found.exposure,
    )
    return _with_batch_difference(info, lambda: open_exposing(found.exposure), beat)


def _with_batch_difference(info: EncoderInfo, open_measured: Callable[[], Session], beat: Callable[[], None]) -> EncoderInfo:
    """`info` with what sharing a call changes in an embedding, if calls are shared: measured on a full call of noise."""
    contract = info.contract
    items = len(info.batching.groups([contract.chunk_samples] * info.batching.items)[0])
    if items == 1:
        return info
    session = open_measured()
    noise = np.random.default_rng(2).standard_normal((items, contract.chunk_samples)).astype(np.float32) * np.float32(0.1)
    together = session.run(noise, contract)
    beat()
    worst = 0.0
    for number in (0, items - 1):
        alone = session.run(noise[number : number + 1], contract)[0]
        beat()
        worst = max(worst, float(np.abs(together[number] - alone).max()) / (float(np.abs(alone).max()) or 1.0))
    note = (
        f"up to {items} chunks of equal length share a call; an embedding then differs from that of a chunk alone by up to "
        f"{worst:.1e} of the largest value"
    )
    return msgspec.structs.replace(info, batch_difference=worst, notes=(*info.notes, note))


class _Budget:
    """Processor time for measuring: no call is long, yet all of them together may be."""

    def __init__(self, seconds: float, tell: Tell) -> None:
        self._seconds, self._tell = seconds, tell
        self._end = time.process_time() + seconds

    def beat(self) -> None:
        if time.process_time() > self._end:
            raise ModelLimitError(f"the model was still being measured after {self._seconds:.0f} s of processor time")
        self._tell(Beat())


@functools.lru_cache(maxsize=1)
def _session(model: str, device: str, exposure: Exposure | None) -> Session:
    """The worker's one session, loaded at its first use."""
    return Session(Path(model), device, exposure)


def open_session(spec: ModelSpec, tell: Tell) -> Session:
    """The session of a spec, in the worker; the provider must be the one that was measured."""
    if spec.info.provider == CPU:
        limit_memory(memory_bytes(spec.info.scan.bytes, spec.trust, spec.threads))
    if spec.stamp is not None and stamp(Path(spec.info.path)) != spec.stamp:
        raise ModelError(f"{spec.info.path} was replaced while it was in use; run again")
    tell(Doing("loading the model", 0.0 if spec.info.provider == CPU else _CUDA_SECONDS))
    # A spec measured on the CPU must not meet a GPU that came since.
    device = "cpu" if spec.device == "auto" and spec.info.provider == CPU else spec.device
    session = _session(spec.info.path, device, spec.info.exposure)
    if session.provider != spec.info.provider:
        why = session.note or "run again"
        raise ContractError(f"the model was measured on {spec.info.provider}, but now runs on {session.provider}; {why}")
    tell(Doing("running the model"))
    return session


@dataclass
class Job:
    """One waveform (samples,) at the encoder's rate on its way through the model, with what it is for."""

    tag: Any
    waveform: npt.NDArray[np.float32]


class _Piece(NamedTuple):
    """A chunk of a job, and whether it is the job's last."""

    job: Job
    chunk: Chunk
    is_last: bool


_Frames = npt.NDArray[np.float32]


class ChunkRunner:
    """Runs waveforms through a session, chunk by chunk, from several threads, and gives results in order.

    Which chunks share a call is the encoder's `batching`, if none is given. Every call gives the outputs of `taps`, the
    contract's alone if they are not given.
    """

    def __init__(
        self,
        session: Session,
        spec: ModelSpec,
        taps: Sequence[Contract] | None = None,
        *,
        pad_short_clips: bool = True,
        keep_padding: bool = False,
        batching: Batching | None = None,
        callers: int | None = None,
    ) -> None:
        self._session = session
        self._contract = spec.info.contract
        self._taps = [self._contract] if taps is None else list(taps)
        self._batching = batching or spec.info.batching
        self._callers = callers or spec.callers
        self._pad_short_clips = pad_short_clips
        self._keep_padding = keep_padding

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Chunk, list[_Frames], bool]]:
        """(job, chunk, kept frames (frames, dim) of each tap, whether it is its last chunk), in the order of the jobs."""
        # Another window is collected while one runs; where a window is one chunk, every thread has the next at hand.
        ahead = 1 if self._batching.window_samples else 2 * self._callers
        waiting: deque[list[tuple[_Piece, Future[list[list[_Frames]]], int]]] = deque()
        with ThreadPoolExecutor(self._callers) as pool:
            try:
                for window in self._windows(jobs):
                    waiting.append(self._submit(pool, window))
                    if len(waiting) > ahead:
                        yield from self._results(waiting.popleft())
                while waiting:
                    yield from self._results(waiting.popleft())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _windows(self, jobs: Iterable[Job]) -> Iterator[list[_Piece]]:
        """Consecutive chunks, as many as the batching's window holds: one at a time where it holds none."""
        window: list[_Piece] = []
        samples = 0
        for job in jobs:
            if self._contract.normalize == "zscore":
                job = Job(job.tag, zscore(job.waveform))
            chunks = plan_chunks(len(job.waveform), self._contract, pad_short_clips=self._pad_short_clips)
            for chunk in chunks:
                window.append(_Piece(job, chunk, chunk is chunks[-1]))
                samples += chunk.length
                if samples >= self._batching.window_samples:
                    yield window
                    window, samples = [], 0
        if window:
            yield window

    def _submit(
        self, pool: ThreadPoolExecutor, window: list[_Piece]
    ) -> list[tuple[_Piece, Future[list[list[_Frames]]], int]]:
        """Each chunk with the call that it is in, and its number there."""
        calls: dict[int, tuple[Future[list[list[_Frames]]], int]] = {}
        for group in self._batching.groups([piece.chunk.length for piece in window]):
            future = pool.submit(self._run_group, [window[number] for number in group])
            calls.update((number, (future, place)) for place, number in enumerate(group))
        return [(piece, *calls[number]) for number, piece in enumerate(window)]

    def _run_group(self, group: list[_Piece]) -> list[list[_Frames]]:
        batch = np.stack([cut(job.waveform, chunk) for job, chunk, _ in group])
        held = [chunk.stop - chunk.start for _, chunk, _ in group]
        kept: list[list[_Frames]] = [[] for _ in group]
        for contract, output in zip(self._taps, self._session.run_taps(batch, self._taps, held), strict=True):
            self._check(contract, output, len(group), batch.shape[1])
            for parts, frames, (job, chunk, _) in zip(kept, output, group, strict=True):
                inside = frames_inside(chunk, len(frames), len(job.waveform), contract)
                parts.append(frames if self._keep_padding else frames[:inside])
        return kept

    @staticmethod
    def _check(contract: Contract, output: npt.NDArray[np.float32], items: int, samples: int) -> None:
        if output.shape[0] != items or output.shape[2] != contract.dim or not output.shape[1]:
            raise ContractError(
                f"the model gives shape {list(output.shape)} for {items} x {samples} samples; "
                f"[{items}, frames, {contract.dim}] was measured before"
            )
        # The law was measured from a second on; without padding (X-ARES) a shorter clip may be outside it.
        foretold = contract.frames_of(samples)
        if output.shape[1] != foretold and samples >= contract.sample_rate:
            raise ContractError(
                f"the model gives {output.shape[1]} frames for {samples} samples where {foretold} were foretold by "
                "what was measured, so its frames have no time"
            )

    @staticmethod
    def _results(
        window: list[tuple[_Piece, Future[list[list[_Frames]]], int]],
    ) -> Iterator[tuple[Job, Chunk, list[_Frames], bool]]:
        for (job, chunk, is_last), future, place in window:
            yield job, chunk, future.result()[place], is_last


def zscore(waveform: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Zero mean and unit variance over the clip, as Hugging Face's Wav2Vec2FeatureExtractor computes it."""
    centred = waveform - waveform.mean(dtype=np.float64)
    scaled: npt.NDArray[np.float32] = (centred / np.sqrt(waveform.var(dtype=np.float64) + 1e-7)).astype(np.float32)
    return scaled


def _resampled(waveform: npt.NDArray[np.float32], rate: int, target_rate: int) -> npt.NDArray[np.float32]:
    try:
        return audio.resample(waveform, rate, target_rate)
    except ClipError as error:
        raise UsageError(str(error)) from error


def _embed_waveforms(
    spec: ModelSpec, waveforms: list[npt.NDArray[np.float32]], rate: int, tap: int, *, tell: Tell
) -> list[tuple[Array, Array]]:
    session = open_session(spec, tell)
    contract = spec.info.taps[tap].contract
    jobs = (Job(i, _resampled(signal, rate, contract.sample_rate)) for i, signal in enumerate(waveforms))
    frames: list[list[npt.NDArray[np.float32]]] = [[] for _ in waveforms]
    times: list[list[npt.NDArray[np.float64]]] = [[] for _ in waveforms]
    weights: list[list[float]] = [[] for _ in waveforms]
    for job, chunk, (kept,), _ in ChunkRunner(session, spec, [contract]).run(jobs):
        frames[job.tag].append(kept)
        weights[job.tag].append(chunk.stop - chunk.start)
        if not contract.clip_only:
            times[job.tag].append(frame_centers(chunk, len(kept), contract) / contract.sample_rate)
        tell(Beat())
    results = []
    for parts, seconds, weight in zip(frames, times, weights, strict=True):
        whole = np.concatenate(parts)
        if contract.clip_only:
            whole = np.average(whole, axis=0, weights=weight).astype(np.float32)[None]
        results.append((Array.of(whole), Array.of(np.concatenate(seconds) if seconds else np.empty(0))))
    return results


def _runtime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


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
