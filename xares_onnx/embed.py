"""The embed stage: shards to workers to store.

The unit of work is one picklable call, `embed_shard(spec)`: a local worker process runs it today, other machines may run it
later. Decoding and resampling run ahead of the model in their own threads.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from . import audio
from .chunking import frame_centers
from .encoder import ChunkRunner, Encoder, Job, ModelSpec, open_session
from .errors import ClipError, DataError, printable
from .events import Doing, Observer, Progress
from .files import Stamp, stamp
from .session import Session
from .shards import Drop, Sample, index_shard, read_extent, read_label
from .store import STORE_VERSION, Clip, EmbeddedShard, FrameSpool, Header, Store, store_key
from .worker import Beat, Tell

NOT_FINITE = "the model gives NaN or infinity for it"
_PROGRESS_SECONDS = 0.1
_LONG_SECONDS = 900.0
_DECODING_SECONDS = 300  # longest wait for one clip; a long recording is not a model that hangs
_DISK_SECONDS = 900.0  # nor is a slow disk
_SECONDS_AHEAD = 900.0  # of audio that may wait, decoded, for the model


class CropSettings(msgspec.Struct, frozen=True):
    """How clips become what the model sees; differs between protocols."""

    seconds: float | None
    rule: audio.CropRule = "keep-tails"
    pad_short_clips: bool = True
    keep_padding: bool = False


class EmbedSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One shard's embedding: everything that `embed_shard` needs, and nothing that it could look up itself."""

    model: ModelSpec
    task: str
    shard: Path
    shard_digest: str
    shard_stamp: Stamp
    crops: CropSettings
    frames: bool
    selected: frozenset[str] | None
    store: Path

    def key(self) -> str:
        """Name of the result in the store: a digest of everything that shapes the numbers."""
        info = self.model.info
        contract = msgspec.structs.replace(info.contract, sources={}, license=None, source=None)
        return store_key(
            {
                "model": info.scan.sha256,
                "contract": contract,
                "batch": info.batch,
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


# The crops of a clip, its seconds before cropping, its json.
_DecodedClip = tuple[list[audio.Waveform], float, str]


class ShardReport(msgspec.Struct, frozen=True):
    """What one call of `embed_shard` did. `seconds` is wall time, `audio_seconds` what was embedded."""

    key: str
    clips: int
    audio_seconds: float
    seconds: float


class ShardPlan(msgspec.Struct, frozen=True):
    """One shard of a task: its content digest, and the keys to embed (None: all)."""

    path: Path
    digest: str
    stamp: Stamp
    selected: frozenset[str] | None


def shard_specs(
    encoder: Encoder, task: str, plans: Sequence[ShardPlan], crops: CropSettings, store: Store, *, frames: bool
) -> dict[Path, EmbedSpec]:
    """The unit of work of every shard; with `frames` every frame is kept, else only the mean of each crop."""
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
        )
        for plan in plans
    }


def embed_shards(
    encoder: Encoder, specs: Mapping[Path, EmbedSpec], store: Store, observer: Observer
) -> tuple[dict[Path, EmbeddedShard], list[ShardReport]]:
    """Every shard's embeddings, from the store where it has them; and reports of those that had to be made."""
    shards: dict[Path, EmbeddedShard] = {}
    missing: dict[Path, int] = {}
    for path, spec in specs.items():
        if (embedded := store.read(spec.key())) is not None:
            shards[path] = embedded
            store.touch(spec.key())
        else:
            missing[path] = len(index_shard(path).samples) if spec.selected is None else len(spec.selected)
    reports: list[ShardReport] = []
    done = sum(shard.header.expected for shard in shards.values())
    total = done + sum(missing.values())
    task = next(iter(specs.values())).task
    for path, clips in missing.items():
        observer(Progress("embed", task, done, total))
        key = specs[path].key()
        embedded = store.read(key)  # a shard of the same content, or another process, may have made it meanwhile
        if embedded is None:
            watch = _offset(observer, task, done, total)
            reports.append(encoder.call(embed_shard, specs[path], returns=ShardReport, observer=watch))
            embedded = store.read(key)
        if embedded is None:
            raise RuntimeError(f"the store lost {key} right after it was written")
        shards[path] = embedded
        done += clips
    observer(Progress("embed", task, total, total))
    return {path: shards[path] for path in specs}, reports


def _offset(observer: Observer, task: str, before: int, total: int) -> Observer:
    def observe(event: Any) -> None:
        observer(Progress("embed", task, before + event.done, total) if isinstance(event, Progress) else event)

    return observe


# ---------------------------------------------------------------- what runs in the worker


def embed_shard(spec: EmbedSpec, *, tell: Tell) -> ShardReport:
    """Embed one shard and write it to the store. A clip that cannot be used is a named drop; its neighbours go on."""
    started = time.perf_counter()
    session = open_session(spec.model, tell)
    tell(Doing("reading the shard", _DISK_SECONDS))
    index = index_shard(spec.shard)
    tell(Doing("running the model"))
    samples = [sample for sample in index.samples if spec.selected is None or sample.key in spec.selected]
    drops = [drop for drop in index.drops if spec.selected is None or drop.key in spec.selected]
    store, key, info = Store(spec.store), spec.key(), spec.model.info
    with store.spool(key, info.contract.dim) if spec.frames else nullcontext() as spool:
        decoded = _Decoded(spec, samples, info.contract.sample_rate, lambda: tell(Beat()))
        clips, pooled, clip_of_crop = _run(spec, session, decoded, spool, len(samples), tell)
        if stamp(spec.shard) != spec.shard_stamp:  # the digest names the result, so the content must be what was digested
            raise DataError(f"shard {spec.shard} changed while it was read; run again")
        drops += decoded.drops
        audio_seconds = float(sum(clip.seconds for clip in clips))
        header = Header(
            store_version=STORE_VERSION,
            model=Path(info.path).name,
            model_sha256=info.scan.sha256,
            task=spec.task,
            shard=printable(spec.shard.name),
            expected=len(clips) + len(drops),
            damage=index.damage,
            audio_seconds=audio_seconds,
        )
        matrix = np.stack(pooled) if pooled else np.empty((0, info.contract.dim), np.float32)
        shard = EmbeddedShard(header, matrix, np.array(clip_of_crop, np.int64), clips, sorted(drops, key=_drop_order))
        tell(Doing("storing the embeddings", _DISK_SECONDS))
        store.write(key, shard, spool)
    return ShardReport(key, len(clips), audio_seconds, time.perf_counter() - started)


def _run(
    spec: EmbedSpec, session: Session, decoded: _Decoded, spool: FrameSpool | None, expected: int, tell: Tell
) -> tuple[list[Clip], list[npt.NDArray[np.float32]], list[int]]:
    """Every clip through the model: the clips that have embeddings, a pooled row each crop, and each row's clip."""
    clips: list[Clip] = []
    pooled: list[npt.NDArray[np.float32]] = []
    clip_of_crop: list[int] = []
    contract = spec.model.info.contract
    runner = ChunkRunner(
        session, spec.model, pad_short_clips=spec.crops.pad_short_clips, keep_padding=spec.crops.keep_padding
    )
    rows: list[npt.NDArray[np.float32]] = []
    pool = _Pool(clip_only=contract.clip_only)
    last_told = 0.0
    for job, chunk, frames, is_last in runner.run(decoded):
        pool.add(frames, chunk.stop - chunk.start)
        if spool is not None:
            spool.add(frames, frame_centers(chunk, len(frames), contract) / contract.sample_rate)
        if not is_last:
            tell(Beat())
            continue
        rows.append(pool.take())
        if spool is not None:
            spool.end_crop()
        sample, seconds, label, is_last_crop = job.tag
        if is_last_crop:
            if all(np.isfinite(row).all() for row in rows):
                clip_of_crop += [len(clips)] * len(rows)
                pooled += rows
                clips.append(Clip(sample.key, seconds, label))
            else:
                decoded.drops.append(Drop(sample.key, NOT_FINITE))
                if spool is not None:
                    spool.drop_from(len(pooled))
            rows = []
        now = time.perf_counter()
        if now - last_told > _PROGRESS_SECONDS:
            last_told = now
            tell(Progress("embed", spec.task, len(clips) + len(decoded.drops), expected))
    return clips, pooled, clip_of_crop


class _Pool:
    """Mean over the frames of one crop, summed in float64; a clip-only encoder's chunk vectors by their length."""

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
    """Iterates over the crops of a shard's samples as jobs, decoded a few clips ahead of whoever asks."""

    def __init__(
        self, spec: EmbedSpec, samples: Sequence[Sample], rate: int, beat: Callable[[], None] = lambda: None
    ) -> None:
        self._spec = spec
        self._beat = beat
        self._one_at_a_time = threading.Lock()  # long recordings, which take a gigabyte while they are decoded
        self._samples = samples
        self._rate = rate
        self._longest = 0.0  # seconds, of the clips so far
        self.drops: list[Drop] = []

    def __iter__(self) -> Iterator[Job]:
        waiting: deque[tuple[Sample, Future[_DecodedClip]]] = deque()
        with ThreadPoolExecutor(self._spec.model.threads) as pool:
            for sample in self._samples:
                waiting.append((sample, pool.submit(self._decode, sample)))
                # Long recordings are decoded fewer at a time: what waits is bounded in seconds, too.
                ahead = min(2 * self._spec.model.threads, int(_SECONDS_AHEAD / max(self._longest, 1.0)))
                while len(waiting) > ahead:
                    yield from self._jobs(*waiting.popleft())
            while waiting:
                yield from self._jobs(*waiting.popleft())

    def _decode(self, sample: Sample) -> _DecodedClip:
        label = read_label(self._spec.shard, sample.label)
        try:
            data = read_extent(self._spec.shard, sample.audio)
            with self._one_at_a_time if audio.duration(data) > _LONG_SECONDS else nullcontext():
                samples, rate = audio.decode(data)
                waveform = audio.resample(samples, rate, self._rate)
        except MemoryError as error:
            raise ClipError("it needs more memory than there is") from error
        crops = audio.crop(waveform, self._rate, self._spec.crops.seconds, self._spec.crops.rule)
        return crops, len(samples) / rate, label

    def _jobs(self, sample: Sample, future: Future[_DecodedClip]) -> Iterator[Job]:
        for _ in range(_DECODING_SECONDS):
            if wait([future], timeout=1.0).done:
                break
            self._beat()
        try:
            crops, seconds, label = future.result()
        except ClipError as error:
            self.drops.append(Drop(sample.key, str(error)))
            return
        self._longest = max(self._longest, seconds)
        for i, waveform in enumerate(crops):
            yield Job((sample, seconds, label, i == len(crops) - 1), waveform)


def _drop_order(drop: Drop) -> tuple[str, str]:
    return drop.key, drop.reason
