"""A model under test: loaded once, and run once per signal. Lives in the worker process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from ..encoder.resolve import open_session
from ..encoder.runner import zscore
from ..encoder.session import Session
from ..encoder.spec import ModelSpec
from ..encoder.worker import Beat, Tell
from ..errors import ContractError, ModelError, ModelLimitError
from .findings import ModelFacts
from .graph_facts import GraphFacts, read_graph
from .signals import Signal, make_signals

Frames = npt.NDArray[np.float32]

PROBE_SECONDS = 2.0


class Subject(msgspec.Struct, frozen=True):
    """A resolved model to check. `contradicted` gives, by key, the message about each wrong declaration, and `scratch` is a
    folder for files of its process. Picklable.
    """

    spec: ModelSpec
    facts: ModelFacts
    scratch: str
    contradicted: dict[str, str] = {}


class Bench:
    """The model with its contract, and its output for every signal so far.

    Signals are `samples` long: two seconds in whole hops, or as long as the model takes.
    """

    def __init__(self, subject: Subject, session: Session) -> None:
        self.subject = subject
        self.session = session
        self.contract = subject.spec.info.contract
        self.samples = self._probe_samples()
        self.signals = make_signals(self.samples, self.contract.sample_rate)
        self.tell: Tell = lambda event: None
        self._outputs: dict[str, Frames | ModelError] = {}
        self._graph: GraphFacts | None = None

    @property
    def graph(self) -> GraphFacts:
        """What the file says of its arithmetic; it is read once, for several properties."""
        if self._graph is None:
            self._graph = read_graph(Path(self.subject.spec.info.path), self.contract.output, lambda: self.tell(Beat()))
        return self._graph

    @property
    def facts(self) -> ModelFacts:
        return self.subject.facts

    def normalized(self, waveform: Signal, held: int | None = None) -> Signal:
        """A waveform (samples,) after the contract's normalisation, of which the first `held` samples are not padding."""
        if self.contract.normalize != "zscore":
            return waveform
        length = len(waveform) if held is None else held
        return np.concatenate([zscore(waveform[:length]), waveform[length:]])

    def run(self, batch: npt.NDArray[np.float32], held: Sequence[int] | None = None) -> Frames:
        """Run the model: (items, frames, dim) for normalised waveforms (items, samples). Raises `ModelError`."""
        output = self.session.run(batch, self.contract, held)
        self.tell(Beat())
        if output.shape[0] != len(batch) or output.shape[2] != self.contract.dim or not output.shape[1]:
            raise ContractError(
                f"the model gives shape {list(output.shape)} for {len(batch)} x {batch.shape[1]} samples; "
                f"[{len(batch)}, frames, {self.contract.dim}] was measured before"
            )
        return output

    def embed(self, waveform: Signal, held: int | None = None, *, normalized: bool = False) -> Frames:
        """(frames, dim) for a waveform (samples,), run once and then remembered. Raises `ModelError`."""
        if not normalized:
            waveform = self.normalized(waveform, held)
        frames: Frames = self.embed_batch(waveform[None], None if held is None else [held])[0]
        return frames

    def embed_batch(self, batch: npt.NDArray[np.float32], held: Sequence[int] | None = None) -> Frames:
        """(items, frames, dim) for normalised waveforms (items, samples), run once and then remembered.

        Raises `ModelError`; it is remembered too, unless a limit was exceeded.
        """
        digest = hashlib.sha256(batch.tobytes() + f"{batch.shape}{held}".encode()).hexdigest()
        if digest not in self._outputs:
            try:
                self._outputs[digest] = self.run(batch, held)
            except ModelLimitError:
                raise
            except ModelError as error:
                self._outputs[digest] = error
        output = self._outputs[digest]
        if isinstance(output, ModelError):
            raise output
        return output

    def run_ahead(self, *batches: npt.NDArray[np.float32]) -> None:
        """Run normalised batches (items, samples) in parallel, so that `embed` and `embed_batch` find their outputs."""

        def run(batch: npt.NDArray[np.float32]) -> None:
            try:
                self.embed_batch(batch)
            except ModelLimitError:
                raise
            except ModelError:
                pass  # `embed` raises it again

        with ThreadPoolExecutor(self.subject.spec.callers) as pool:
            list(pool.map(run, batches))

    def embed_all(self, waveforms: Iterable[Signal]) -> list[Frames | ModelError]:
        """The frames (frames, dim) of each waveform, or the error that it causes."""
        normalized = [self.normalized(waveform) for waveform in waveforms]
        self.run_ahead(*(waveform[None] for waveform in normalized))
        outputs: list[Frames | ModelError] = []
        for waveform in normalized:
            try:
                outputs.append(self.embed(waveform, normalized=True))
            except ModelLimitError:
                raise
            except ModelError as error:
                outputs.append(error)
        return outputs

    def finite(self) -> dict[str, Frames]:
        """The frames of every signal, by name, if all their values are finite."""
        outputs = zip(self.signals, self.embed_all(self.signals.values()), strict=True)
        return {name: frames for name, frames in outputs if not isinstance(frames, ModelError) and np.isfinite(frames).all()}

    def _probe_samples(self) -> int:
        contract = self.contract
        if contract.fixed_window:
            return contract.chunk_samples
        samples = min(max(round(PROBE_SECONDS * contract.sample_rate), contract.min_samples), contract.chunk_samples)
        hop = int(contract.hop_samples or 1)
        whole = samples // hop * hop
        return whole if whole >= contract.min_samples else samples


def difference(actual: npt.NDArray[np.floating], expected: npt.NDArray[np.floating]) -> float:
    """The largest difference, as a share of the largest expected value; infinite for NaN or another shape."""
    if actual.shape != expected.shape:
        return float("inf")
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        share = float(np.abs(actual.astype(np.float64) - expected).max(initial=0.0)) / scale
    return share if np.isfinite(share) else float("inf")


def cosines(actual: npt.NDArray[np.floating], expected: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Cosine (rows,) of each row with its counterpart: 1 if both are zero, 0 if one is."""
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    both_zero = ~a.any(axis=-1) & ~b.any(axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        values = np.where(norms > 0, (a * b).sum(axis=-1) / np.where(norms > 0, norms, 1.0), both_zero.astype(float))
    return np.asarray(np.clip(np.nan_to_num(values, nan=0.0), -1.0, 1.0))


_bench: Bench | None = None


def bench_of(subject: Subject, tell: Tell) -> Bench:
    """The worker's one bench, created at its first use."""
    global _bench
    session = open_session(subject.spec, tell)
    if _bench is None or _bench.subject != subject or _bench.session is not session:
        _bench = Bench(subject, session)
    _bench.tell = tell
    return _bench
