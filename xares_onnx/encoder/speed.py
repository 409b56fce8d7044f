"""How fast a model is, on chunks of noise in its worker. Two models take turns, so that both meet the same load."""

from __future__ import annotations

import math
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from ..progress import Observer, Progress
from .encoder import Encoder
from .resolve import open_session
from .spec import ModelSpec
from .worker import Beat, Tell

_ROUNDS = 9
_TURN_SECONDS = 0.4  # of one model in one round; at least one chunk per thread
_LONGEST_SECONDS = 60.0  # of all rounds; at least three


class Burst(msgspec.Struct, frozen=True):
    """One call of a model on some chunks."""

    seconds: float
    audio_seconds: float
    peak_bytes: int | None
    """The peak memory of the process so far, if the system reports it."""

    @property
    def rtf(self) -> float:
        """Real-time factor: seconds of work per second of audio."""
        return self.seconds / self.audio_seconds


class SideBySide(msgspec.Struct, frozen=True, kw_only=True):
    """The speed of two models that took turns."""

    rtf_a: float
    rtf_b: float
    ratio: float
    """Median over rounds of A's seconds over B's: above 1 if B is faster."""
    low: float
    """`low` and `high` are the 95 % interval of the ratio."""
    high: float
    rounds: int
    peak_bytes_a: int | None
    peak_bytes_b: int | None


def measure_rtf(encoder: Encoder, observer: Observer) -> float:
    """The real-time factor of an encoder: seconds of work per second of audio, from two chunks per thread."""
    _burst(encoder, 1, observer)  # loads the model
    return _burst(encoder, 2 * encoder.spec.threads, observer).rtf


def measure_together(a: Encoder, b: Encoder, observer: Observer) -> SideBySide:
    """Compare the speed of two encoders in rounds in which each works for a moment, in alternating order.

    Each runs in its own process.
    """
    chunks = []
    for encoder in (a, b):
        _burst(encoder, encoder.spec.threads, observer)  # loads the model, and warms it
        trial = _burst(encoder, encoder.spec.threads, observer)
        chunks.append(encoder.spec.threads * max(1, round(_TURN_SECONDS / trial.seconds)))
    pairs: list[tuple[Burst, Burst]] = []
    started = time.perf_counter()
    while len(pairs) < _ROUNDS and (len(pairs) < 3 or time.perf_counter() - started < _LONGEST_SECONDS):
        observer(Progress("measure", "speed", len(pairs), _ROUNDS))
        if len(pairs) % 2:
            second = _burst(b, chunks[1], observer)
            first = _burst(a, chunks[0], observer)
        else:
            first = _burst(a, chunks[0], observer)
            second = _burst(b, chunks[1], observer)
        pairs.append((first, second))
    observer(Progress("measure", "speed", _ROUNDS, _ROUNDS))
    ratios = sorted(first.rtf / second.rtf for first, second in pairs)
    from scipy import stats  # half a second, which most runs do not need

    cut = max(0, int(stats.binom.ppf(0.025, len(ratios), 0.5)) - 1)  # the order statistics that bound the median
    return SideBySide(
        rtf_a=statistics.median(first.rtf for first, _ in pairs),
        rtf_b=statistics.median(second.rtf for _, second in pairs),
        ratio=statistics.median(ratios),
        low=ratios[cut],
        high=ratios[-1 - cut],
        rounds=len(pairs),
        peak_bytes_a=pairs[-1][0].peak_bytes,
        peak_bytes_b=pairs[-1][1].peak_bytes,
    )


def _burst(encoder: Encoder, chunks: int, observer: Observer) -> Burst:
    return encoder.call(run_chunks, encoder.spec, chunks, returns=Burst, observer=observer)


def run_chunks(spec: ModelSpec, chunks: int, *, tell: Tell) -> Burst:
    """Run chunks of noise on all threads. Runs in the worker."""
    session = open_session(spec, tell)
    contract = spec.info.contract
    noise = np.random.default_rng(0).standard_normal((1, contract.chunk_samples)).astype(np.float32) * np.float32(0.1)
    calls = [len(group) for group in spec.info.batching.groups([contract.chunk_samples] * chunks)]
    started = time.perf_counter()
    with ThreadPoolExecutor(spec.callers) as pool:
        for _ in pool.map(lambda items: session.run(np.repeat(noise, items, axis=0), contract), calls):
            tell(Beat())
    seconds = time.perf_counter() - started
    return Burst(seconds, chunks * contract.chunk_samples / contract.sample_rate, _peak_bytes())


def _peak_bytes() -> int | None:
    """The peak resident memory of this process, if the system reports it. `getrusage` would count the parent's too."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    lines = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    kilobytes = lines.get("VmHWM", "").split()
    return int(kilobytes[0]) * 1024 if kilobytes else None


def factor(ratio: float) -> str:
    """A ratio to two digits: 1.5x, 0.27x."""
    digits = max(0, 1 - math.floor(math.log10(ratio))) if ratio > 0 and math.isfinite(ratio) else 0
    return f"{ratio:.{digits}f}x"
