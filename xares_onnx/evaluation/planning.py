"""Estimates of what an evaluation will read and write, and how long it will take."""

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
from ..embedding.pieces import most_pieces
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

_SAMPLED_CLIPS = 24  # per shard
_BYTES_PER_CLIP = 250  # key and json beside the vectors
_HEAD_FLOPS_PER_SECOND = 2e10  # of one core
_PASSES_TO_CONVERGE = 120  # over the rows of a fold, for every strength and the last fit
_FRAME_BYTES = 2  # per value of a stored frame
_WEIGHTS = {  # about how many weights each row passes through, for heads whose task has no classes
    "linear": 768,  # one number from a vector
    "ctc": 30 * 768,  # 30 characters
    "retrieval": 5 * 4 * 1024**2,  # five captions, each through two towers of two layers of 1024 x 1024
    "llm": 500_000_000,  # a language model
}
_DISK_SECONDS = 900.0  # longest silence while a slow disk is read
_MIX = 1.0  # the mix's heads, as a factor on those of all taps: 0.9 to 1.2 were measured (docs/protocols.md)
_PIPELINE_OVERHEAD = 1.1  # decoding and storing, as a factor on the model's time


@dataclass(frozen=True)
class PlanRow:
    """One task. `disk_bytes` and the seconds are estimates of the work that remains.

    `disk_bytes` includes the file that means of all layers go through on their way to the mix.
    """

    task: str
    clips: int
    clips_to_embed: int
    hours: float
    disk_bytes: float
    embed_seconds: float
    train_seconds: float


@dataclass(frozen=True)
class Plan:
    """The rows of the tasks; `rtf` is the seconds of embedding per second of audio."""

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
    mix: bool,
    observer: Observer,
) -> Plan:
    """Count clips, sample their durations, and time the model on two chunks per thread.

    Args:
        encoder: The encoder to time.
        data: Data of each task, with the crops that its protocol takes.
        store: The store that may hold some embeddings already.
        seeds: Trainings of each head.
        mix: Whether the mix of all taps is scored too.
        observer: Receives notes and progress.

    Raises:
        ModelError: The model fails.
        DataError: A shard cannot be read.
    """
    rtf = measure_rtf(encoder, observer)
    return Plan([_row(encoder, task_data, crops, store, rtf, protocol, seeds, mix) for task_data, crops in data], rtf)


def _row(
    encoder: Encoder,
    data: TaskData,
    crops: CropSettings,
    store: Store,
    rtf: float,
    protocol: Protocol,
    seeds: int,
    mix: bool,
) -> PlanRow:
    task = data.task
    clips, clips_to_embed, seconds, seconds_to_embed = 0, 0, 0.0, 0.0
    frames = kind_of(task).needs_frames
    for path, spec in shard_specs(encoder, task.name, list(data.plans.values()), crops, store, frames=frames).items():
        count, length = _clips_and_seconds(encoder, path, spec)
        clips, seconds = clips + count, seconds + length
        if not _is_stored(spec, store):
            left = count - _clips_in_pieces(spec, store)
            clips_to_embed, seconds_to_embed = clips_to_embed + left, seconds_to_embed + length * left / max(1, count)
    crop_seconds = crops.seconds or (seconds / clips if clips else 1.0)
    taps, classes = encoder.info.taps, len(task.target.class_names or ())
    rows = seconds * _frame_rate(encoder.contract) if frames else seconds / crop_seconds
    weights = encoder.contract.dim * classes if classes else _WEIGHTS[task.head.kind]
    converges = protocol.corrected and task.head.kind == "linear"
    passes = _PASSES_TO_CONVERGE if converges else task.head.epochs * seeds
    flops = 6.0 * rows * passes * _folds(data) * weights * len(taps)  # per weight 2 forward, 4 backward
    mixes = mix and kind_of(task).mixes and len(taps) > 1
    spooled = 4 * rows * sum(tap.contract.dim for tap in taps) if mixes and not frames else 0.0
    pooled_bytes_per_second = sum(4 * tap.contract.dim for tap in taps) / crop_seconds
    return PlanRow(
        task=task.name,
        clips=clips,
        clips_to_embed=clips_to_embed,
        hours=seconds / 3600,
        disk_bytes=seconds_to_embed * (pooled_bytes_per_second + _frame_bytes_per_second(encoder) * frames)
        + clips_to_embed * _BYTES_PER_CLIP * len(taps)
        + spooled,
        embed_seconds=seconds_to_embed * rtf * _PIPELINE_OVERHEAD,
        train_seconds=flops * (1 + _MIX * mixes) / _HEAD_FLOPS_PER_SECOND,
    )


def head_weight(data: TaskData, taps: int) -> float:
    """What a task's heads cost, in any unit: known from the sizes of its files, for the order in which tasks are taken."""
    task = data.task
    audio_bytes = sum(plan.stamp[1] for plan in data.plans.values())
    weights = len(task.target.class_names or ()) or _WEIGHTS[task.head.kind]
    return float(audio_bytes * weights * _folds(data) * taps)


def _folds(data: TaskData) -> int:
    """Folds that the protocol trains: the task's own, or those of cross-validation if train and test share shards."""
    if data.task.data.folds:
        return len(data.parts)
    digests = data.shard_digests()
    return CROSS_VALIDATION_FOLDS if digests["train"] & digests["test"] else 1


def check_disk(encoder: Encoder, data: TaskData, specs: Mapping[Path, EmbedSpec], store: Store, observer: Observer) -> None:
    """Note how much room the frames of all taps need in the store. Raises `DiskFullError` if there is less."""
    missing = {path: spec for path, spec in specs.items() if not _is_stored(spec, store)}
    seconds = {path: _clips_and_seconds(encoder, path, spec)[1] for path, spec in missing.items()}
    # Frames lie there twice while a shard's pieces are joined.
    joined = [seconds[path] for path, spec in missing.items() if most_pieces(spec.shard_stamp[1], spec.piece_bytes) > 1]
    need = (sum(seconds.values()) + max(joined, default=0.0)) * _frame_bytes_per_second(encoder)
    if not need:
        return
    store.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store.root).free
    demand = f"frames of {len(encoder.info.taps)} taps take about {need / 1e9:.2f} GB"
    if need > free:
        raise DiskFullError(
            f"{data.task.name}: {demand}, and {store.root} has {free / 1e9:.2f} GB free; free some, name another --cache, "
            "or fewer --taps"
        )
    observer(Note(f"{data.task.name}: {demand} in the store, which has {free / 1e9:.1f} GB free"))


def _is_stored(spec: EmbedSpec, store: Store) -> bool:
    return all(spec.key(tap) in store for tap in range(len(spec.model.info.taps)))


def _clips_in_pieces(spec: EmbedSpec, store: Store) -> int:
    """The clips of a shard whose pieces are stored, and not joined yet."""
    if most_pieces(spec.shard_stamp[1], spec.piece_bytes) == 1:
        return 0
    headers = [store.header(piece) for piece in store.pieces(spec.key())]
    return sum(header.expected for header in headers if header is not None)


def _clips_and_seconds(encoder: Encoder, path: Path, spec: EmbedSpec) -> tuple[int, float]:
    """The number of selected clips of a shard, and their estimated total seconds."""
    count = len(index_shard(path).samples) if spec.selected is None else len(spec.selected)
    return count, encoder.call(mean_seconds, path, returns=float) * count


def _frame_rate(contract: Contract) -> float:
    return contract.sample_rate / contract.hop_samples if contract.hop_samples else 0.0


def _frame_bytes_per_second(encoder: Encoder) -> float:
    """Stored bytes per second of audio, all taps together."""
    contracts = [tap.contract for tap in encoder.info.taps]
    return sum((_FRAME_BYTES * contract.dim + 8) * _frame_rate(contract) for contract in contracts)


def mean_seconds(path: Path, *, tell: Tell) -> float:
    """Mean duration, from the headers of clips at equal steps through the shard. Runs in the worker."""
    tell(Doing("reading the shard", _DISK_SECONDS))
    index = index_shard(path)
    step = max(1, len(index.samples) // _SAMPLED_CLIPS)
    durations = []
    for sample in index.samples[::step]:
        try:
            durations.append(audio.duration(read_extent(path, sample.audio)))
        except ClipError:
            continue
    return float(np.mean(durations)) if durations else 0.0
