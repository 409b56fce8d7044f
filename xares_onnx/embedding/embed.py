"""The embedding stage: from shards to the store.

The unit of work is one picklable call, `embed_shard(spec)`, for a shard or a piece of a large one, which a worker process of
any machine runs. Decoding and resampling run ahead of the model in threads of their own.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import numpy.typing as npt

from ..data import audio
from ..data.audio import CropSettings
from ..data.shards import Drop, Sample, ShardIndex, ShardReader, index_shard, label_text, open_shard
from ..encoder import processor
from ..encoder.chunking import Chunk, frame_centers
from ..encoder.contract.contract import Contract
from ..encoder.resolve import open_session
from ..encoder.runner import ChunkRunner, Job
from ..encoder.session import Session
from ..encoder.spec import ModelSpec
from ..encoder.worker import Beat, Tell
from ..errors import ClipError, DataError, escaped
from ..files import Stamp, stamp
from ..progress import Doing, Progress
from . import pieces
from .pieces import Piece
from .store import STORE_VERSION, Clip, EmbeddedShard, FrameSpool, Header, Store, store_key

if TYPE_CHECKING:  # the worker imports this module, and starts in half the time without these
    from ..data.selection import ShardPlan
    from ..encoder.encoder import Encoder

NOT_FINITE = "the model gives NaN or infinity for it"
_PROGRESS_SECONDS = 0.1
_DECODING_SECONDS = 900  # longest wait for one clip: a long recording is no hanging model
_DISK_SECONDS = 900.0  # longest wait for a slow disk
_SECONDS_AHEAD = 900.0  # most decoded audio that waits for the model
_GROUP_SECONDS = 10.0  # audio that a thread decodes before it hands over
_GROUP_CLIPS = 16


class EmbedSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that `embed_shard` needs to embed one shard, or one piece of it."""

    model: ModelSpec
    task: str
    shard: Path
    shard_digest: str
    shard_stamp: Stamp
    crops: CropSettings
    frames: bool
    selected: frozenset[str] | None
    store: Path
    piece_bytes: int = pieces.PIECE_BYTES
    """Audio in a piece, if the shard has several."""
    piece: Piece | None = None
    """The piece to embed; None for the whole shard."""

    def name(self, tap: int = 0) -> str:
        """The name in the store of what is embedded by tap number `tap`: the shard's, or that of its piece."""
        return self.key(tap) if self.piece is None else self.piece.name(self.key(tap))

    def key(self, tap: int = 0) -> str:
        """The shard's name in the store, by tap number `tap`: a digest of everything that shapes the numbers."""
        info = self.model.info
        contract = msgspec.structs.replace(info.taps[tap].contract, sources={}, license=None, source=None)
        # ONNX Runtime cannot fuse exposed tensors away, which may change the last digits.
        exposed = {} if info.exposure is None else {"exposed": info.exposure}
        # Another processor may multiply 8-bit numbers differently. A float model keeps its old name.
        products = {"pair_sums": processor.pair_sums()} if info.scan.integers else {}
        # A window of chunks that share calls ends with its piece. A shard that is one piece by its size keeps its old name.
        pieced = info.batching.items > 1 and self.shard_stamp[1] > self.piece_bytes
        return store_key(
            {
                **exposed,
                **products,
                **({"pieces": self.piece_bytes} if pieced else {}),
                "model": info.scan.sha256,
                "contract": contract,
                # The batch rule does not affect chunks that share no call; they keep the old name, with 1.
                "batch": 1 if info.batching.items == 1 else info.batching,
                "provider": info.provider,
                "onnxruntime": info.onnxruntime,
                "resampler": audio.resampler_version(),
                "decoder": audio.decoder_version(),
                "crops": self.crops,
                "frames": self.frames,
                "shard": self.shard_digest,
                "selected": None if self.selected is None else sorted(self.selected),
            }
        )


# The crops of a clip, its seconds before cropping, and its json.
_DecodedClip = tuple[list[audio.Waveform], float, str]


class ShardReport(msgspec.Struct, frozen=True):
    """The report of one call of `embed_shard` or `join_shard`: `seconds` of wall time for `audio_seconds` of audio."""

    key: str
    clips: int
    audio_seconds: float
    seconds: float


def shard_specs(
    encoder: Encoder, task: str, plans: Sequence[ShardPlan], crops: CropSettings, store: Store, *, frames: bool
) -> dict[Path, EmbedSpec]:
    """The unit of work of every shard. With `frames` all frames are kept, else only the mean of each crop."""
    return {
        plan.path: EmbedSpec(
            model=encoder.spec,
            task=task,
            shard=plan.path,
            shard_digest=plan.digest,
            shard_stamp=plan.stamp,
            crops=crops,
            frames=frames,
            selected=plan.selected,
            store=store.root,
            piece_bytes=pieces.PIECE_BYTES,
        )
        for plan in plans
    }


def used_samples(index: ShardIndex, selected: frozenset[str] | None) -> list[Sample]:
    """The samples of a shard that are embedded, in the order of the tar."""
    return [sample for sample in index.samples if selected is None or sample.key in selected]


# ---------------------------------------------------------------- what runs in the worker


def embed_shard(spec: EmbedSpec, *, tell: Tell) -> ShardReport:
    """Embed one shard, or the piece of it that the spec names, and write each tap to the store.

    A clip that cannot be used is a named drop; its neighbours go on. What a shard's headers show is no piece's: `join_shard`
    adds it.
    """
    started = time.perf_counter()
    session = open_session(spec.model, tell)
    tell(Doing("reading the shard", _DISK_SECONDS))
    index = indexed(spec.shard, spec.shard_stamp)
    tell(Doing("running the model"))
    samples, drops, damage = used_samples(index, spec.selected), used_drops(index, spec.selected), index.damage
    if spec.piece is not None:
        samples, drops, damage = samples[spec.piece.first : spec.piece.stop], [], None
    store, info = Store(spec.store), spec.model.info
    with ExitStack() as spools:
        gathered = []
        for number, tap in enumerate(info.taps):
            framed = spec.frames and not tap.contract.clip_only
            spool = spools.enter_context(store.spool(spec.name(number), tap.contract.dim)) if framed else None
            gathered.append(_Gathered(tap.contract, spool))
        decoded = _Decoded(spec, samples, info.contract.sample_rate, lambda: tell(Beat()))
        _run(spec, session, decoded, gathered, len(samples), tell)
        check_shard(spec)
        drops += decoded.drops
        for number, of_tap in enumerate(gathered):
            tell(Doing("storing the embeddings", _DISK_SECONDS))
            every = [*drops, *of_tap.drops]
            header = header_of(spec, of_tap.clips, len(every), damage)
            store.write(spec.name(number), of_tap.shard(header, every), of_tap.spool)
    return ShardReport(spec.name(), len(gathered[0].clips), gathered[0].audio_seconds, time.perf_counter() - started)


@functools.lru_cache(maxsize=1)
def indexed(shard: Path, _: Stamp) -> ShardIndex:
    """The index of a shard: an encoder takes one piece of it after another, and reads its headers once."""
    return index_shard(shard)


def used_drops(index: ShardIndex, selected: frozenset[str] | None) -> list[Drop]:
    """What a shard's headers show to be lost of the clips that are used."""
    return [drop for drop in index.drops if selected is None or drop.key in selected]


def check_shard(spec: EmbedSpec) -> None:
    """Raise `DataError` if the shard changed: its content must be that of the digest, which names the embeddings."""
    if stamp(spec.shard) != spec.shard_stamp:
        raise DataError(f"shard {spec.shard} changed while it was read; run again")


def header_of(spec: EmbedSpec, clips: Sequence[Clip], drops: int, damage: str | None) -> Header:
    """The header of what is stored for a spec, with the number of its drops."""
    return Header(
        store_version=STORE_VERSION,
        model=Path(spec.model.info.path).name,
        model_sha256=spec.model.info.scan.sha256,
        task=spec.task,
        shard=escaped(spec.shard.name),
        expected=len(clips) + drops,
        damage=damage,
        audio_seconds=float(sum(clip.seconds for clip in clips)),
    )


def in_order(drops: Sequence[Drop]) -> list[Drop]:
    """Drops in the order in which they are stored."""
    return sorted(drops, key=lambda drop: (drop.key, drop.reason))


def _run(
    spec: EmbedSpec, session: Session, decoded: _Decoded, gathered: Sequence[_Gathered], expected: int, tell: Tell
) -> None:
    """Run every clip through the model, and gather the frames of each tap."""
    runner = ChunkRunner(
        session,
        spec.model,
        [tap.contract for tap in gathered],
        pad_short_clips=spec.crops.pad_short_clips,
        keep_padding=spec.crops.keep_padding,
    )
    done, last_told = 0, 0.0
    for job, chunk, frames, is_last in runner.run(decoded):
        for tap, of_tap in zip(gathered, frames, strict=True):
            tap.add(of_tap, chunk)
        if not is_last:
            tell(Beat())
            continue
        sample, seconds, label, is_last_crop = job.tag
        for tap in gathered:
            tap.end_crop()
            if is_last_crop:
                tap.end_clip(Clip(sample.key, seconds, label))
        done += is_last_crop
        now = time.perf_counter()
        if now - last_told > _PROGRESS_SECONDS:
            last_told = now
            tell(Progress("embed", spec.task, done + len(decoded.drops), expected))


class _Gathered:
    """The embeddings of one tap so far: a pooled row per crop, frames if they are kept, and the clips."""

    def __init__(self, contract: Contract, spool: FrameSpool | None) -> None:
        self.contract = contract
        self.spool = spool
        self.clips: list[Clip] = []
        self.drops: list[Drop] = []
        self._pool = _Pool(clip_only=contract.clip_only)
        self._pooled: list[npt.NDArray[np.float32]] = []
        self._clip_of_crop: list[int] = []
        self._rows: list[npt.NDArray[np.float32]] = []  # of the clip in progress

    @property
    def audio_seconds(self) -> float:
        return float(sum(clip.seconds for clip in self.clips))

    def add(self, frames: npt.NDArray[np.float32], chunk: Chunk) -> None:
        self._pool.add(frames, chunk.stop - chunk.start)
        if self.spool is not None:
            self.spool.add(frames, frame_centers(chunk, len(frames), self.contract) / self.contract.sample_rate)

    def end_crop(self) -> None:
        self._rows.append(self._pool.take())
        if self.spool is not None:
            self.spool.end_crop()

    def end_clip(self, clip: Clip) -> None:
        if all(np.isfinite(row).all() for row in self._rows):
            self._clip_of_crop += [len(self.clips)] * len(self._rows)
            self._pooled += self._rows
            self.clips.append(clip)
        else:
            self.drops.append(Drop(clip.key, NOT_FINITE))
            if self.spool is not None:
                self.spool.drop_from(len(self._pooled))
        self._rows = []

    def shard(self, header: Header, drops: Sequence[Drop]) -> EmbeddedShard:
        matrix = np.stack(self._pooled) if self._pooled else np.empty((0, self.contract.dim), np.float32)
        return EmbeddedShard(header, matrix, np.array(self._clip_of_crop, np.int64), self.clips, in_order(drops))


class _Pool:
    """The mean over the frames of one crop, summed in float64; chunk vectors of a clip-only encoder weigh by length."""

    def __init__(self, *, clip_only: bool) -> None:
        self._clip_only = clip_only
        self._sum: npt.NDArray[np.float64] | float = 0.0
        self._weight = 0

    def add(self, frames: npt.NDArray[np.float32], samples: int) -> None:
        weight = samples if self._clip_only else 1
        self._sum = self._sum + frames.sum(axis=0, dtype=np.float64) * weight
        self._weight += len(frames) * weight

    def take(self) -> npt.NDArray[np.float32]:
        mean = np.asarray(self._sum / self._weight).astype(np.float32)
        self._sum, self._weight = 0.0, 0
        return mean


class _Decoded:
    """The crops of a shard's samples as jobs, decoded a few clips ahead of the consumer."""

    def __init__(
        self, spec: EmbedSpec, samples: Sequence[Sample], rate: int, beat: Callable[[], None] = lambda: None
    ) -> None:
        self._spec = spec
        self._beat = beat
        self._one_at_a_time = threading.Lock()  # long recordings take a gigabyte while they are decoded
        self._samples = samples
        self._rate = rate
        self._longest = 0.0  # seconds, of the clips so far
        self._last_beat = time.perf_counter()
        self.drops: list[Drop] = []

    def __iter__(self) -> Iterator[Job]:
        waiting: deque[tuple[Sequence[Sample], Future[list[_DecodedClip | ClipError]]]] = deque()
        taken = 0
        with ThreadPoolExecutor(self._spec.model.threads) as pool:
            while taken < len(self._samples) or waiting:
                # Of long recordings fewer are decoded at a time: the waiting seconds are bounded, too.
                ahead = min(2 * self._spec.model.threads, int(_SECONDS_AHEAD / max(self._longest, _GROUP_SECONDS)))
                while taken < len(self._samples) and len(waiting) <= ahead:
                    group = self._samples[taken : taken + self._clips_of_group()]
                    waiting.append((group, pool.submit(self._decode_group, group)))
                    taken += len(group)
                group, future = waiting.popleft()
                outcomes = self._result(future)
                if rest := group[len(outcomes) :]:
                    waiting.appendleft((rest, pool.submit(self._decode_group, rest)))
                for sample, outcome in zip(group, outcomes, strict=False):
                    yield from self._jobs(sample, outcome)

    def _clips_of_group(self) -> int:
        """How many clips a thread is given at once: short ones share the cost of handing over."""
        return max(1, min(_GROUP_CLIPS, int(_GROUP_SECONDS / self._longest))) if self._longest else 1

    def _decode_group(self, group: Sequence[Sample]) -> list[_DecodedClip | ClipError]:
        """The first clips of a group, at least one, until they are long enough together."""
        outcomes: list[_DecodedClip | ClipError] = []
        seconds, started = 0.0, time.thread_time()
        with open_shard(self._spec.shard) as shard:
            for sample in group:
                try:
                    clip = self._decode(shard, sample)
                    seconds += clip[1]
                    outcomes.append(clip)
                except ClipError as error:
                    outcomes.append(error)
                if seconds >= _GROUP_SECONDS or time.thread_time() - started > _GROUP_SECONDS:
                    break
        return outcomes

    def _decode(self, shard: ShardReader, sample: Sample) -> _DecodedClip:
        label = label_text(shard.read(sample.label))
        try:
            waveform, seconds = audio.load(shard.read(sample.audio), self._rate, self._one_at_a_time)
        except MemoryError as error:
            raise ClipError("it needs more memory than there is") from error
        return audio.crop(waveform, self._rate, self._spec.crops.seconds, self._spec.crops.rule), seconds, label

    def _beat_sometimes(self) -> None:
        """Send a sign of life: many clips may be collected before the first one has a result."""
        if (now := time.perf_counter()) - self._last_beat > 1.0:
            self._last_beat = now
            self._beat()

    def _result(self, future: Future[list[_DecodedClip | ClipError]]) -> list[_DecodedClip | ClipError]:
        for _ in range(_DECODING_SECONDS):
            if future.done() or wait([future], timeout=1.0).done:
                break
            self._last_beat = time.perf_counter()
            self._beat()
        self._beat_sometimes()
        return future.result()

    def _jobs(self, sample: Sample, outcome: _DecodedClip | ClipError) -> Iterator[Job]:
        if isinstance(outcome, ClipError):
            self.drops.append(Drop(sample.key, str(outcome)))
            return
        crops, seconds, label = outcome
        self._longest = max(self._longest, seconds)
        for i, waveform in enumerate(crops):
            yield Job((sample, seconds, label, i == len(crops) - 1), waveform)
