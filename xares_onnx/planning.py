"""What an evaluation will read, write and take, before it is run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import audio
from .dataset import TaskData
from .embed import CropSettings, shard_specs
from .encoder import Encoder, ModelSpec, open_session
from .errors import ClipError
from .events import Doing, Observer
from .folds import CROSS_VALIDATION_FOLDS
from .kinds import kind_of
from .shards import index_shard, read_extent
from .store import Store
from .worker import Beat, Tell

_SAMPLED_CLIPS = 24  # a shard
_BYTES_A_CLIP = 250  # key and json beside the vectors
_HEAD_FLOPS_A_SECOND = 2e10  # of one core
_FRAME_BYTES = 2  # a value of a stored frame
# Products a row where a head has no classes: characters; five captions through two towers of 1024; a model of 0.5 B weights.
_WEIGHTS = {"linear": 768, "ctc": 30 * 768, "retrieval": 5 * 4 << 20, "llm": 500_000_000}
_DISK_SECONDS = 900.0  # a slow disk is not a model that hangs
_PIPELINE_OVERHEAD = 1.1  # decoding and storing beside the model


@dataclass(frozen=True)
class PlanRow:
    """One task; `disk_bytes` and the seconds are of what is still to be done, and estimates."""

    task: str
    clips: int
    clips_to_embed: int
    hours: float
    disk_bytes: float
    embed_seconds: float
    train_seconds: float


@dataclass(frozen=True)
class Plan:
    rows: list[PlanRow]
    rtf: float

    @property
    def total(self) -> PlanRow:
        sums = [sum(getattr(row, name) for row in self.rows) for name in PlanRow.__dataclass_fields__ if name != "task"]
        return PlanRow("total", *sums)


def make_plan(
    encoder: Encoder,
    data: Sequence[tuple[TaskData, CropSettings]],
    store: Store,
    *,
    seeds: int,
    observer: Observer,
) -> Plan:
    """Count clips, sample their durations, and time the model on two chunks a thread."""
    rtf = encoder.call(measure_rtf, encoder.spec, returns=float, observer=observer)
    return Plan([_row(encoder, task_data, crops, store, rtf, seeds) for task_data, crops in data], rtf)


def measure_rtf(spec: ModelSpec, *, tell: Tell) -> float:
    """Seconds a second of audio, all threads at work. Runs in the worker."""
    session = open_session(spec, tell)
    contract = spec.info.contract
    chunk = np.random.default_rng(0).standard_normal((1, contract.chunk_samples)).astype(np.float32) * np.float32(0.1)
    session.run(chunk, contract)
    tell(Beat())
    started = time.perf_counter()
    with ThreadPoolExecutor(spec.threads) as pool:
        for _ in pool.map(lambda _: session.run(chunk, contract), range(2 * spec.threads)):
            tell(Beat())
    seconds = time.perf_counter() - started
    return seconds * contract.sample_rate / (2 * spec.threads * contract.chunk_samples)


def _row(encoder: Encoder, data: TaskData, crops: CropSettings, store: Store, rtf: float, seeds: int) -> PlanRow:
    task = data.task
    clips, to_embed, seconds, seconds_to_embed = 0, 0, 0.0, 0.0
    frames = kind_of(task).needs_frames
    for path, spec in shard_specs(encoder, task.name, list(data.plans.values()), crops, store, frames=frames).items():
        index = index_shard(path)
        count = len(index.samples) if spec.selected is None else len(spec.selected)
        length = encoder.call(mean_seconds, path, returns=float) * count
        clips, seconds = clips + count, seconds + length
        if spec.key() not in store:
            to_embed, seconds_to_embed = to_embed + count, seconds_to_embed + length
    crop = crops.seconds or (seconds / clips if clips else 1.0)
    dim = encoder.contract.dim
    hop = encoder.contract.hop_samples
    frame_rate = encoder.contract.sample_rate / hop if hop else 0.0
    digests = data.shard_digests()
    overlapping = not task.data.folds and digests["train"] & digests["test"]
    folds = len(data.parts) if task.data.folds else CROSS_VALIDATION_FOLDS if overlapping else 1
    rows = seconds * frame_rate if frames else seconds / crop
    weights = dim * len(task.target.class_names) if task.target.class_names else _WEIGHTS[task.head.kind]
    flops = 6.0 * rows * task.head.epochs * folds * seeds * weights
    return PlanRow(
        task=task.name,
        clips=clips,
        clips_to_embed=to_embed,
        hours=seconds / 3600,
        disk_bytes=seconds_to_embed * (4 * dim / crop + (_FRAME_BYTES * dim + 8) * frame_rate * frames)
        + to_embed * _BYTES_A_CLIP,
        embed_seconds=seconds_to_embed * rtf * _PIPELINE_OVERHEAD,
        train_seconds=flops / _HEAD_FLOPS_A_SECOND,
    )


def mean_seconds(path: Path, *, tell: Tell) -> float:
    """Mean duration by the headers of clips taken at equal steps through the shard. Runs in the worker, as all decoding."""
    tell(Doing("reading the shard", _DISK_SECONDS))
    index = index_shard(path)
    step = max(1, len(index.samples) // _SAMPLED_CLIPS)
    found = []
    for sample in index.samples[::step]:
        try:
            found.append(audio.duration(read_extent(path, sample.audio)))
        except ClipError:
            continue
    return float(np.mean(found)) if found else 0.0
