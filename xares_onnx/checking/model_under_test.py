"""A model on the bench: loaded once, and asked each thing once. Lives in the worker process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

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
from .signals import Signal, make_signals

Frames = npt.NDArray[np.float32]

PROBE_SECONDS = 2.0


class Subject(msgspec.Struct, frozen=True):
    """A model to check, as it was resolved; `contradicted` holds what is said against each wrong declaration. Picklable."""

    spec: ModelSpec
    facts: ModelFacts
    contradicted: dict[str, str] = {}


class Bench:
    """The model with its contract, and what it gave for every signal so far.

    A probe is `samples` long: two seconds in whole hops, or what the model takes.
    """

    def __init__(self, subject: Subject, session: Session) -> None:
        self.subject = subject
        self.session = session
        self.contract = subject.spec.info.contract
        self.samples = self._probe_samples()
        self.signals = make_signals(self.samples, self.contract.sample_rate)
        self.tell: Tell = lambda event: None
        self._known: dict[str, Frames | ModelError] = {}

    @property
    def facts(self) -> ModelFacts:
        return self.subject.facts

    def normalized(self, waveform: Signal, held: int | None = None) -> Signal:
        """A waveform as its clip is normalised, by what of it is no padding."""
        if self.contract.normalize != "zscore":
            return waveform
        own = len(waveform) if held is None else held
        return np.concatenate([zscore(waveform[:own]), waveform[own:]])

    def run(self, batch: npt.NDArray[np.float32], held: Sequence[int] | None = None) -> Frames:
        """(items, frames, dim) for normalised waveforms (items, samples), always asked anew. Raises `ModelError`."""
        output = self.session.run(batch, self.contract, held)
        self.tell(Beat())
        if output.shape[0] != len(batch) or output.shape[2] != self.contract.dim or not output.shape[1]:
            raise ContractError(
                f"the model gives shape {list(output.shape)} for {len(batch)} x {batch.shape[1]} samples; "
                f"[{len(batch)}, frames, {self.contract.dim}] was measured before"
            )
        return output

    def embed(self, waveform: Signal, held: int | None = None, *, normalized: bool = False) -> Frames:
        """(frames, dim) for a waveform (samples,), asked once. Raises `ModelError`."""
        if not normalized:
            waveform = self.normalized(waveform, held)
        frames: Frames = self.embed_batch(waveform[None], None if held is None else [held])[0]
        return frames

    def embed_batch(self, batch: npt.NDArray[np.float32], held: Sequence[int] | None = None) -> Frames:
        """(items, frames, dim) for normalised waveforms (items, samples), asked once. Raises `ModelError`."""
        digest = hashlib.sha256(batch.tobytes() + f"{batch.shape}{held}".encode()).hexdigest()
        if digest not in self._known:
            try:
                self._known[digest] = self.run(batch, held)
            except ModelLimitError:
                raise
            except ModelError as error:
                self._known[digest] = error
        known = self._known[digest]
        if isinstance(known, ModelError):
            raise known
        return known

    def ask(self, *batches: npt.NDArray[np.float32]) -> None:
        """Normalised batches (items, samples), from as many threads as may call the model; `embed` then has them at hand."""

        def asked(batch: npt.NDArray[np.float32]) -> None:
            try:
                self.embed_batch(batch)
            except ModelLimitError:
                raise
            except ModelError:
                pass  # whoever embeds it meets the error again

        with ThreadPoolExecutor(self.subject.spec.callers) as pool:
            list(pool.map(asked, batches))

    def embed_all(self, waveforms: Iterable[Signal]) -> list[Frames | ModelError]:
        """Each waveform's frames (frames, dim), or why there are none."""
        prepared = [self.normalized(waveform) for waveform in waveforms]
        self.ask(*(waveform[None] for waveform in prepared))
        found: list[Frames | ModelError] = []
        for waveform in prepared:
            try:
                found.append(self.embed(waveform, normalized=True))
            except ModelLimitError:
                raise
            except ModelError as error:
                found.append(error)
        return found

    def finite(self) -> dict[str, Frames]:
        """Frames of every signal for which the model gives finite ones."""
        found = zip(self.signals, self.embed_all(self.signals.values()), strict=True)
        return {name: frames for name, frames in found if not isinstance(frames, ModelError) and np.isfinite(frames).all()}

    def _probe_samples(self) -> int:
        contract = self.contract
        if contract.fixed_window:
            return contract.chunk_samples
        samples = min(max(round(PROBE_SECONDS * contract.sample_rate), contract.min_samples), contract.chunk_samples)
        hop = int(contract.hop_samples or 1)
        whole = samples // hop * hop
        return whole if whole >= contract.min_samples else samples


def difference(found: npt.NDArray[np.floating], expected: npt.NDArray[np.floating]) -> float:
    """The largest difference, as a share of the largest expected value; infinite where one has NaN or another shape."""
    if found.shape != expected.shape:
        return float("inf")
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    with np.errstate(invalid="ignore", over="ignore"):
        share = float(np.abs(found.astype(np.float64) - expected).max(initial=0.0)) / scale
    return share if np.isfinite(share) else float("inf")


def cosines(found: npt.NDArray[np.floating], expected: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Cosine of each row with its counterpart, (rows,): 1 where both are zero, 0 where one is."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    both_zero = ~a.any(axis=-1) & ~b.any(axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        found_cosines = np.where(norms > 0, (a * b).sum(axis=-1) / np.where(norms > 0, norms, 1.0), both_zero.astype(float))
    return np.asarray(np.clip(np.nan_to_num(found_cosines, nan=0.0), -1.0, 1.0))


_held: Bench | None = None


def bench_of(subject: Subject, tell: Tell) -> Bench:
    """The worker's one bench, made at its first use."""
    global _held
    session = open_session(subject.spec, tell)
    if _held is None or _held.subject != subject or _held.session is not session:
        _held = Bench(subject, session)
    _held.tell = tell
    return _held
