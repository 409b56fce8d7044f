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
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from . import audio
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
from .errors import ClipError, ContractError, DataMissingError, ModelError, ModelLimitError, UsageError
from .events import Doing, Note, Observer, ignore
from .files import Stamp, stamp, write_aside
from .limits import LIFTED, limits, measuring_seconds, memory_bytes, silence_seconds
from .model_file import PREPROCESSOR_CONFIG, ModelScan, find_model, scan_model
from .session import CPU, Session, cuda_may_work
from .worker import Array, Beat, Tell, Worker, limit_memory

T = TypeVar("T")
GPU_BATCH = 16
_CACHE_VERSION = 2


class EncoderInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A model as it was found: content, contract, provider. Enough to name its embeddings without loading it."""

    path: str
    scan: ModelScan
    contract: Contract
    provider: str
    onnxruntime: str
    notes: tuple[str, ...] = ()

    @property
    def batch(self) -> int:
        """Most equal-length chunks in one call. On the CPU one: as fast, and no clip then meets another."""
        coupled = self.contract.batch_coupled or not self.contract.dynamic_batch
        return 1 if self.provider == CPU or coupled else GPU_BATCH


class ModelSpec(msgspec.Struct, frozen=True):
    """What a worker needs to have the encoder at hand; picklable."""

    info: EncoderInfo
    device: str
    threads: int
    stamp: Stamp | None = None  # of the model file as it was measured
    trust: bool = False  # lifts limits on size, memory and time (`limits`)


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

    def embed(self, waveforms: Iterable[npt.ArrayLike], rate: int) -> list[Embedding]:
        """Embed mono waveforms (samples,) in [-1, 1] at `rate` Hz; each is resampled, chunked and put together again.

        Raises `UsageError` for an array that is not a finite mono waveform, `ModelError` where the model fails.
        """
        if not audio.MIN_RATE <= rate <= audio.MAX_RATE:
            raise UsageError(f"rate={rate} must be a sampling rate from {audio.MIN_RATE} to {audio.MAX_RATE} Hz")
        signals = [_checked_waveform(waveform) for waveform in waveforms]
        results = self.call(_embed_waveforms, self.spec, signals, rate, returns=list[tuple[Array, Array]])
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
    cache: Path | None = None,
    trust: bool = False,
    observer: Observer = ignore,
) -> Encoder:
    """Find, scan and measure a model; nothing of it runs in this process.

    `contract` holds KEY=VALUE declarations, `threads` defaults to the number of cores, `cache` is a folder where what was
    measured is kept. `trust` lifts the limits on size, memory and time that a giant may need lifted. Raises `ModelError`
    where the model cannot be used.
    """
    model = find_model(Path(path)).absolute()  # the worker may start after a change of folder
    declared = merge(declared_on_command_line(contract), declared_in_sidecar(model.with_suffix(".toml")))
    beside = declared_by_preprocessor(model.parent / PREPROCESSOR_CONFIG)
    threads = usable_cores() if threads is None else threads
    if threads < 1:
        raise UsageError(f"threads={threads} must be 1 or more")
    as_measured = stamp(model)
    worker = Worker()
    remembered = _Remembered(cache, model, device, declared, beside, trust) if cache else None
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
                    trust,
                    returns=EncoderInfo,
                    silence_limit=silence_seconds(model.stat().st_size, trust),
                    observer=observer,
                )
            if remembered:
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


@contextmanager
def _advised(trust: bool) -> Iterator[None]:
    """Whoever meets a limit is told how it can be lifted."""
    try:
        yield
    except ModelLimitError as error:
        if trust:
            raise
        raise ModelLimitError(f"{error}; if you trust the model, --trust lifts the limit") from error


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
    model: str, device: str, declared: Declarations, beside: Declarations, trust: bool = False, *, tell: Tell
) -> EncoderInfo:
    from .measure import measure_contract

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
    tell(Doing("loading the model", patience))
    session = _session(model, device)
    if any(stamp(file) != then for file, then in stamps.items()):
        raise ModelError(f"{path} was replaced while it was read; run again")
    tell(Doing("measuring the model", patience))
    declared = merge(declared, declared_in_metadata(scan.metadata), beside)
    beat = _Budget(measuring_seconds(scan.bytes, trust), tell).beat
    contract = measure_contract(session, declared, beat, max_dim=limits(trust).dim)
    return EncoderInfo(
        path=model,
        scan=scan,
        contract=contract,
        provider=session.provider,
        onnxruntime=_runtime_version(),
        notes=(*([session.note] if session.note else []), *remarks(contract)),
    )


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
def _session(model: str, device: str) -> Session:
    """The worker's one session, loaded at its first use."""
    return Session(Path(model), device)


def open_session(spec: ModelSpec, tell: Tell) -> Session:
    """The session of a spec, in the worker; the provider must be the one that was measured."""
    if spec.info.provider == CPU:
        limit_memory(memory_bytes(spec.info.scan.bytes, spec.trust, spec.threads))
    if spec.stamp is not None and stamp(Path(spec.info.path)) != spec.stamp:
        raise ModelError(f"{spec.info.path} was replaced while it was in use; run again")
    tell(Doing("loading the model"))
    # A spec measured on the CPU must not meet a GPU that came since.
    session = _session(spec.info.path, "cpu" if spec.device == "auto" and spec.info.provider == CPU else spec.device)
    if session.provider != spec.info.provider:
        raise ContractError(f"the model was measured on {spec.info.provider}, but now runs on {session.provider}; run again")
    tell(Doing("running the model"))
    return session


@dataclass
class Job:
    """One waveform (samples,) at the encoder's rate on its way through the model, with what it is for."""

    tag: Any
    waveform: npt.NDArray[np.float32]


class ChunkRunner:
    """Runs waveforms through a session, chunk by chunk, from several threads, and gives results in order.

    Chunks of equal length that follow each other share a call, up to the batch of the encoder.
    """

    def __init__(
        self, session: Session, spec: ModelSpec, *, pad_short_clips: bool = True, keep_padding: bool = False
    ) -> None:
        self._session = session
        self._contract = spec.info.contract
        self._batch = spec.info.batch
        self._threads = spec.threads
        self._pad_short_clips = pad_short_clips
        self._keep_padding = keep_padding

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Chunk, npt.NDArray[np.float32], bool]]:
        """(job, chunk, kept frames (frames, dim), whether it is the job's last chunk), in the order of the jobs."""
        waiting: deque[tuple[Future[list[npt.NDArray[np.float32]]], list[tuple[Job, Chunk, bool]]]] = deque()
        with ThreadPoolExecutor(self._threads) as pool:
            for group in self._groups(jobs):
                waiting.append((pool.submit(self._run_group, group), group))
                if len(waiting) > 2 * self._threads:
                    yield from self._results(*waiting.popleft())
            while waiting:
                yield from self._results(*waiting.popleft())

    def _groups(self, jobs: Iterable[Job]) -> Iterator[list[tuple[Job, Chunk, bool]]]:
        group: list[tuple[Job, Chunk, bool]] = []
        for job in jobs:
            if self._contract.normalize == "zscore":
                job = Job(job.tag, _zscore(job.waveform))
            chunks = plan_chunks(len(job.waveform), self._contract, pad_short_clips=self._pad_short_clips)
            for chunk in chunks:
                if group and (len(group) == self._batch or group[0][1].length != chunk.length):
                    yield group
                    group = []
                group.append((job, chunk, chunk is chunks[-1]))
        if group:
            yield group

    def _run_group(self, group: list[tuple[Job, Chunk, bool]]) -> list[npt.NDArray[np.float32]]:
        batch = np.stack([cut(job.waveform, chunk) for job, chunk, _ in group])
        held = [chunk.stop - chunk.start for _, chunk, _ in group]
        output = self._session.run(batch, self._contract, held)
        if output.shape[0] != len(group) or output.shape[2] != self._contract.dim or not output.shape[1]:
            raise ContractError(
                f"the model gives shape {list(output.shape)} for {len(group)} x {batch.shape[1]} samples; "
                f"[{len(group)}, frames, {self._contract.dim}] was measured before"
            )
        # The law was measured from a second on; without padding (X-ARES) a shorter clip may be outside it.
        foretold = self._contract.frames_of(batch.shape[1])
        if output.shape[1] != foretold and batch.shape[1] >= self._contract.sample_rate:
            raise ContractError(
                f"the model gives {output.shape[1]} frames for {batch.shape[1]} samples where {foretold} were foretold by "
                "what was measured, so its frames have no time"
            )
        kept = []
        for frames, (job, chunk, _) in zip(output, group, strict=True):
            inside = frames_inside(chunk, len(frames), len(job.waveform), self._contract)
            kept.append(frames if self._keep_padding else frames[:inside])
        return kept

    @staticmethod
    def _results(
        future: Future[list[npt.NDArray[np.float32]]], group: list[tuple[Job, Chunk, bool]]
    ) -> Iterator[tuple[Job, Chunk, npt.NDArray[np.float32], bool]]:
        for frames, (job, chunk, last) in zip(future.result(), group, strict=True):
            yield job, chunk, frames, last


def _zscore(waveform: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
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
    spec: ModelSpec, waveforms: list[npt.NDArray[np.float32]], rate: int, *, tell: Tell
) -> list[tuple[Array, Array]]:
    session = open_session(spec, tell)
    contract = spec.info.contract
    jobs = (Job(i, _resampled(signal, rate, contract.sample_rate)) for i, signal in enumerate(waveforms))
    frames: list[list[npt.NDArray[np.float32]]] = [[] for _ in waveforms]
    times: list[list[npt.NDArray[np.float64]]] = [[] for _ in waveforms]
    weights: list[list[float]] = [[] for _ in waveforms]
    for job, chunk, kept, _ in ChunkRunner(session, spec).run(jobs):
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
        self, cache: Path, model: Path, device: str, declared: Declarations, beside: Declarations, trust: bool
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
