"""Waveforms through a session, chunk by chunk. Runs in the worker process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..data import audio
from ..errors import ClipError, ContractError, UsageError
from .batching import Batching
from .chunking import Chunk, cut, frame_centers, frames_inside, plan_chunks
from .contract.contract import Contract
from .resolve import open_session
from .session import Session
from .spec import ModelSpec
from .worker import Array, Beat, Tell

_Frames = npt.NDArray[np.float32]


@dataclass
class Job:
    """A waveform (samples,) at the encoder's rate for the model, with the caller's tag."""

    tag: Any
    waveform: npt.NDArray[np.float32]


class _Piece(NamedTuple):
    """A chunk of a job, and whether it is the last."""

    job: Job
    chunk: Chunk
    is_last: bool


class ChunkRunner:
    """Runs waveforms through a session, chunk by chunk, from several threads, and gives results in order.

    `batching` decides which chunks share a call; by default it is the encoder's. Every call gives the outputs of `taps`, by
    default the contract's alone.
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
        """(job, chunk, kept frames (frames, dim) of each tap, whether it is the job's last), in the order of the jobs."""
        # One window runs while the next is collected. If a window is one thread's, each has its next window ready.
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
        """Consecutive chunks: as many as the batching's window holds; if it holds none, about one full chunk of samples."""
        size = self._batching.window_samples or self._contract.chunk_samples
        window: list[_Piece] = []
        samples = 0
        for job in jobs:
            if self._contract.normalize == "zscore":
                job = Job(job.tag, zscore(job.waveform))
            chunks = plan_chunks(len(job.waveform), self._contract, pad_short_clips=self._pad_short_clips)
            for chunk in chunks:
                window.append(_Piece(job, chunk, chunk is chunks[-1]))
                samples += chunk.length
                if samples >= size:
                    yield window
                    window, samples = [], 0
        if window:
            yield window

    def _submit(
        self, pool: ThreadPoolExecutor, window: list[_Piece]
    ) -> list[tuple[_Piece, Future[list[list[_Frames]]], int]]:
        """Each chunk with its future, and its number within it."""
        if not self._batching.window_samples:  # each chunk has its own call, which may take less time than a future
            future = pool.submit(self._run_each, window)
            return [(piece, future, place) for place, piece in enumerate(window)]
        calls: dict[int, tuple[Future[list[list[_Frames]]], int]] = {}
        for group in self._batching.groups([piece.chunk.length for piece in window]):
            future = pool.submit(self._run_group, [window[number] for number in group])
            calls.update((number, (future, place)) for place, number in enumerate(group))
        return [(piece, *calls[number]) for number, piece in enumerate(window)]

    def _run_each(self, window: list[_Piece]) -> list[list[_Frames]]:
        return [self._run_group([piece])[0] for piece in window]

    def _run_group(self, group: list[_Piece]) -> list[list[_Frames]]:
        cuts = [cut(job.waveform, chunk) for job, chunk, _ in group]
        batch = cuts[0][None] if len(cuts) == 1 else np.stack(cuts)
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
        # The law was measured from one second on; without padding (X-ARES) a shorter clip may deviate from it.
        expected = contract.frames_of(samples)
        if output.shape[1] != expected and samples >= contract.sample_rate:
            raise ContractError(
                f"the model gives {output.shape[1]} frames for {samples} samples, but its frame law gives {expected}, so "
                "the times of its frames are unknown; `xares-onnx check` shows where the law fails"
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


def embed_waveforms(
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
