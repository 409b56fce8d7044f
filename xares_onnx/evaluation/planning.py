"""What an evaluation will read, write and take, before it is run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data import audio
from ..data.audio import CropSettings
from ..data.selection import TaskData
from ..data.shards import index_shard, read_extent
from ..embedding.embed import EmbedSpec, shard_specs
from ..embedding.store import Store
from ..encoder.contract.contract import Contract
from ..encoder.encoder import Encoder
from ..encoder.speed import measure_rtf
from ..encoder.worker import Tell
from ..errors import ClipError, DiskFullError
from ..progress import Doing, Note, Observer
from ..scoring.folds import CROSS_VALIDATION_FOLDS
from ..scoring.kinds import kind_of
from ..scoring.protocol import Protocol

_SAMPLED_CLIPS = 24  # a shard
_BYTES_A_CLIP = 250  # key and json beside the vectors
_HEAD_FLOPS_A_SECOND = 2e10  # of one core
_PASSES_TO_CONVERGE = 120  # over the rows of a fold, for every strength and the last fit
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
    protocol: Protocol,
    seeds: int,
    observer: Observer,
) -> Plan:
    """Count clips, sample their durations, and time the model on two chunks a thread."""
    rtf = measure_rtf(encoder, observer)
    return Plan([_row(encoder, task_data, crops, store, rtf, protocol, seeds) for task_data, crops in data], rtf)


def _row(
    encoder: Encoder,
    data: TaskData,
    crops: CropSettings,
    store: Store,
    rtf: float,
    protocol: Protocol,
    seeds: int,
) -> PlanRow:
    task = data.task
    clips, to_embed, seconds, seconds_to_embed = 0, 0, 0.0, 0.0
    frames = kind_of(task).needs_frames
    for path, spec in shard_specs(encoder, task.name, list(data.plans.values()), crops, store, frames=frames).items():
        count, length = _clips_and_seconds(encoder, path, spec)
        clips, seconds = clips + count, seconds + length
        if not _is_stored(spec, store):
            to_embed, seconds_to_embed = to_embed + count, seconds_to_embed + length
    crop = crops.seconds or (seconds / clips if clips else 1.0)
    dim = encoder.contract.dim
    digests = data.shard_digests()
    overlapping = not task.data.folds and digests["train"] & digests["test"]
    folds = len(data.parts) if task.data.folds else CROSS_VALIDATION_FOLDS if overlapping else 1
    rows = seconds * _frame_rate(encoder.contract) if frames else seconds / crop
    weights = dim * len(task.target.class_names) if task.target.class_names else _WEIGHTS[task.head.kind]
    taps = encoder.info.taps
    converges = protocol.corrected and task.head.kind == "linear"
    passes = _PASSES_TO_CONVERGE if converges else task.head.epochs * seeds
    flops = 6.0 * rows * passes * folds * weights * len(taps)
    vectors = sum(4 * tap.contract.dim for tap in taps) / crop
    return PlanRow(
        task=task.name,
        clips=clips,
        clips_to_embed=to_embed,
        hours=seconds / 3600,
        disk_bytes=seconds_to_embed * (vectors + _frame_bytes_a_second(encoder) * frames)
        + to_embed * _BYTES_A_CLIP * len(taps),
        embed_seconds=seconds_to_embed * rtf * _PIPELINE_OVERHEAD,
        train_seconds=flops / _HEAD_FLOPS_A_SECOND,
    )


def check_disk(encoder: Encoder, data: TaskData, specs: Mapping[Path, EmbedSpec], store: Store, observer: Observer) -> None:
    """Say what the frames of all taps will take in the store. Raises `DiskFullError` where there is not so much room."""
    missing = {path: spec for path, spec in specs.items() if not _is_stored(spec, store)}
    need = sum(_clips_and_seconds(encoder, path, spec)[1] for path, spec in missing.items()) * _frame_bytes_a_second(encoder)
    if not need:
        return
    store.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store.root).free
    takes = f"frames of {len(encoder.info.taps)} taps take about {need / 1e9:.2f} GB"
    if need > free:
        raise DiskFullError(
            f"{data.task.name}: {takes}, and {store.root} has {free / 1e9:.2f} GB free; free some, name another --cache, or "
            "fewer --taps"
        )
    observer(Note(f"{data.task.name}: {takes} in the store, which has {free / 1e9:.1f} GB free"))


def _is_stored(spec: EmbedSpec, store: Store) -> bool:
    return all(spec.key(tap) in store for tap in range(len(spec.model.info.taps)))


def _clips_and_seconds(encoder: Encoder, path: Path, spec: EmbedSpec) -> tuple[int, float]:
    """How many clips of a shard are wanted, and about how long they are together."""
    count = len(index_shard(path).samples) if spec.selected is None else len(spec.selected)
    return count, encoder.call(mean_seconds, path, returns=float) * count


def _frame_rate(contract: Contract) -> float:
    return contract.sample_rate / contract.hop_samples if contract.hop_samples else 0.0


def _frame_bytes_a_second(encoder: Encoder) -> float:
    """Of all taps together."""
    contracts = [tap.contract for tap in encoder.info.taps]
    return sum((_FRAME_BYTES * contract.dim + 8) * _frame_rate(contract) for contract in contracts)


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
