"""How a run of the whole suite scales, by the program's own scheduler under a virtual clock.

    python bench/scale.py                                  # the table, from the measured costs below
    python bench/scale.py --measure MODEL.onnx --data DIR  # measure costs by real runs, and check predictions

Jobs and their order are those of a real run; only time is simulated. What the simulation assumes:

* Clips and hours are those that the data sets' own papers or pages state (SUITE); the four private tasks of X-ARES have no
  data and are left out. Shards are four per split, as X-ARES's own tools make them (`num_shards=4` of their
  make_audio_tar). They hold 16-bit PCM at 16 kHz, and are cut into pieces as the program cuts them.
* A worker is one encoder on one core, or one process on a GPU with four cores. Embedding takes a number of seconds per hour
  of audio, and per shard or piece. A worker reads the headers of a shard with the first piece that it takes of it, and a
  join moves JOIN_BYTES per second; both were measured on a local disk. Heads take the program's own estimate for `--plan`,
  which is calibrated on one core. A head on several threads follows Amdahl's law with the share that two cores showed
  (97 s against 52, docs/speed.md).
* Workers and heads share their cores: if more threads are ready than cores, all slow down alike.
* Processes start together, and once more after each loss. A lost node takes its jobs with it, and comes back.
"""

from __future__ import annotations

import argparse
import heapq
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from xares_onnx.data.catalog import shipped_tasks
from xares_onnx.data.targets import EventsTarget, TranscriptTarget
from xares_onnx.data.task import Task
from xares_onnx.embedding.embed import ShardReport
from xares_onnx.embedding.pieces import PIECE_BYTES, most_pieces
from xares_onnx.encoder.encoder import Encoder, load_encoder
from xares_onnx.encoder.worker import Worker
from xares_onnx.engine.engine import Done, Report
from xares_onnx.engine.jobs import AnyJob, EmbedJob
from xares_onnx.engine.local import LocalEngine
from xares_onnx.engine.scheduler import Scheduler, Slots
from xares_onnx.evaluation.evaluation import evaluate

# Clips and hours of train, valid and test together, and the share of them in train.
SUITE: dict[str, tuple[int, float, float]] = {
    "asvspoof2015": (263_151, 241.0, 0.06),  # Wu et al. 2015: 16,375 + 53,372 + 193,404 utterances; 3.3 s each, assumed
    "clotho": (5_929, 37.0, 0.65),  # Drossos et al. 2020 (v2): 3,839 + 1,045 + 1,045 clips of 15 to 30 s
    "cremad": (7_442, 5.3, 0.70),  # Cao et al. 2014
    "desed": (11_153, 31.0, 0.90),  # Serizel et al. 2020: 10,000 synthetic clips and the public evaluation's, 10 s each
    "esc50": (2_000, 2.8, 0.80),  # Piczak 2015
    "fluentspeechcommands": (30_043, 19.0, 0.77),  # Lugosch et al. 2019
    "freemusicarchive": (8_000, 66.7, 0.80),  # Defferrard et al. 2017, small: clips of 30 s
    "fsd50k": (51_197, 108.3, 0.74),  # Fonseca et al. 2022
    "fsdkaggle2018": (11_073, 20.0, 0.85),  # Fonseca et al. 2018
    "gtzan_genre": (1_000, 8.3, 0.90),  # Tzanetakis and Cook 2002
    "libricount": (5_720, 7.9, 0.80),  # Stoeter et al. 2018
    "librispeech": (33_862, 111.4, 0.90),  # Panayotov et al. 2015: train-clean-100, dev-clean, test-clean
    "librispeechmalefemale": (33_862, 111.4, 0.90),
    "maestro": (468, 73.0, 0.80),  # Hawthorne et al. 2019: 1,276 and 199 h, of which X-ARES tests 65 of 177; train alike
    "nsynthinstument": (305_979, 340.0, 0.945),  # Engel et al. 2017: notes of 4 s
    "ravdess": (1_440, 1.5, 0.75),  # Livingstone and Russo 2018
    "speechcommandsv1": (64_727, 18.0, 0.79),  # Warden 2018
    "speechocean762": (5_000, 6.0, 0.50),  # Zhang et al. 2021
    "urbansound8k": (8_732, 8.8, 0.90),  # Salamon et al. 2014
    "vocalimitations": (5_601, 8.4, 0.67),  # Kim et al. 2018
    "vocalsound": (21_024, 24.0, 0.74),  # Gong et al. 2022
    "voxceleb1": (153_516, 352.0, 0.90),  # Nagrani et al. 2017
    "voxlingua33": (13_000, 36.0, 0.88),  # Valk and Alumae 2021: 1,609 clips of dev; those of train are assumed
}
SHARDS_PER_SPLIT = 4
FRAME_RATE, DIM = 25.0, 768  # of a base-size encoder
HEAD_FLOPS_PER_SECOND = 2e10  # as planning
PASSES = 120
WEIGHTS = {"linear": 768, "ctc": 30 * 768, "retrieval": 5 * 4 * 1024**2, "llm": 500_000_000}
AUDIO_BYTES_PER_HOUR = 16_000 * 2 * 3600
CORES_PER_GPU_WORKER = 4
PARALLEL = 0.93  # of a head's work
INDEX_SECONDS = 27e-6  # per clip, to read a shard's headers
JOIN_BYTES = 150e6  # per second, of a shard's embeddings


@dataclass(frozen=True)
class Costs:
    """Seconds of one worker, measured by `--measure`."""

    per_hour: float  # of audio
    per_shard: float
    start: float  # of a process, until it works


@dataclass(frozen=True)
class Work:
    """A job, as the scheduler knows one, that takes `seconds` on one core of its own."""

    key: str
    group: str
    slot: Literal["encoder", "head"]
    weight: float
    seconds: float
    threads: int = 1
    memory: int = 0
    needs: tuple[str, ...] = ()
    shard: str = ""
    index_seconds: float = 0.0  # more, of a worker's first piece of the shard
    bytes_read: float = 0.0
    bytes_written: float = 0.0


# ---------------------------------------------------------------- the suite's jobs


def jobs_of(
    tasks: Iterable[Task], costs: Costs, piece_bytes: int | None, head_threads: int, head_speed: float
) -> Iterator[Work]:
    """The jobs of every task, with shards in pieces of so many bytes, or whole.

    Heads run on so many threads, each so much as fast as a core of the estimate.
    """
    for task in tasks:
        clips, hours, train = SUITE[task.name]
        splits = {"train": train, "valid": (1 - train) / 2, "test": (1 - train) / 2}
        folds = len(task.data.folds.numbers) if task.data.folds else 0
        parts = {f"fold{i}": 1 / folds for i in range(folds)} or splits
        frames = isinstance(task.target, EventsTarget | TranscriptTarget)
        store_bytes = hours * 3600 * FRAME_RATE * DIM * 2 if frames else clips * DIM * 4
        keys = []
        for part, share in parts.items():
            count = 1 if folds else SHARDS_PER_SPLIT
            of_shard = share / count
            for number in range(count):
                keys.append(f"{task.name}/{part}/{number}")
                shard = _Shard(task.name, keys[-1], hours * of_shard, clips * of_shard, store_bytes * of_shard)
                yield from shard.jobs(costs, piece_bytes)
        seconds = head_seconds(task, clips, hours) / head_speed
        yield Work(
            f"{task.name}/head",
            task.name,
            "head",
            weight=seconds,
            seconds=seconds * (1 - PARALLEL + PARALLEL / head_threads),
            threads=head_threads,
            memory=int(store_bytes),
            needs=tuple(keys),
            bytes_read=store_bytes,
        )


@dataclass(frozen=True)
class _Shard:
    task: str
    name: str
    hours: float
    clips: float
    store_bytes: float

    def jobs(self, costs: Costs, piece_bytes: int | None) -> Iterator[Work]:
        size = int(self.hours * AUDIO_BYTES_PER_HOUR)
        pieces = most_pieces(size, piece_bytes) if piece_bytes else 1
        names = [f"{self.name}.{number}" for number in range(pieces)] if pieces > 1 else [self.name]
        for name in names:
            yield Work(
                name,
                self.task,
                "encoder",
                weight=self.hours / pieces,
                seconds=costs.per_shard + costs.per_hour * self.hours / pieces,
                shard=self.name,
                index_seconds=self.clips * INDEX_SECONDS,
                bytes_read=size / pieces,
                bytes_written=self.store_bytes / pieces,
            )
        if pieces > 1:
            yield Work(
                self.name,
                self.task,
                "encoder",
                weight=self.hours,
                seconds=self.store_bytes / JOIN_BYTES,
                needs=tuple(names),
                bytes_read=self.store_bytes,
                bytes_written=self.store_bytes,
            )


def head_seconds(task: Task, clips: int, hours: float) -> float:
    """One core's, as `--plan` estimates it."""
    frames = isinstance(task.target, EventsTarget | TranscriptTarget)
    rows = hours * 3600 * FRAME_RATE if frames else clips
    classes = len(task.target.class_names or ())
    weights = DIM * classes if classes else WEIGHTS[task.head.kind]
    passes = PASSES if task.head.kind == "linear" else task.head.epochs * 3
    folds = len(task.data.folds.numbers) if task.data.folds else 1
    return 6.0 * rows * passes * folds * weights / HEAD_FLOPS_PER_SECOND


# ---------------------------------------------------------------- the virtual clock


@dataclass
class Outcome:
    """What a simulated run took, in seconds and bytes. `last` is the job that ended last."""

    makespan: float
    longest_chain: float
    last: str
    bytes_read: float
    bytes_written: float
    losses: int


@dataclass
class _Running:
    piece: Work
    worker: int
    left: float


def simulate(
    pieces: Sequence[Work],
    workers: int,
    costs: Costs,
    *,
    cores: float | None = None,
    encoders_on_cores: bool = True,
    heads: int | None = None,
    heads_beside: int | None = None,
    warm: int = 0,
    loss_hours: float = math.inf,
    seed: int = 0,
) -> Outcome:
    """Run jobs through the scheduler.

    Args:
        pieces: The jobs.
        workers: Encoders; each is a node of its own that may be lost.
        costs: Of starting a worker.
        cores: Cores in all; as many as workers by default.
        encoders_on_cores: Whether an encoder occupies a core while it works; one on a GPU does not.
        heads, heads_beside: Heads at once; one per worker by default.
        warm: Workers that have started before.
        loss_hours: Mean time between two losses of one node, exponentially distributed.
        seed: Of the losses.
    """
    chance = random.Random(seed)
    slots = Slots(encoders=workers, heads=heads or workers, heads_beside=heads_beside or heads or workers)
    scheduler: Scheduler[Work] = Scheduler(slots, losses=1_000_000)
    scheduler.add(pieces)
    scheduler.close()
    capacity = cores or workers
    started = [number < warm for number in range(workers)]
    indexed = [""] * workers
    free = list(range(workers))[::-1]
    running: dict[str, _Running] = {}
    losses: list[tuple[float, int]] = []
    if loss_hours < math.inf:
        losses = [(chance.expovariate(1 / (loss_hours * 3600)), worker) for worker in range(workers)]
    heapq.heapify(losses)
    clock, read, written, lost, last = 0.0, 0.0, 0.0, 0, ""
    while not scheduler.finished:
        for piece in scheduler.start():
            worker = chance.randrange(workers) if piece.slot == "head" else free.pop()
            start = 0.0 if piece.slot == "head" or started[worker] else costs.start
            if piece.slot == "encoder":
                started[worker] = True
                start += piece.index_seconds * (indexed[worker] != piece.shard)
                indexed[worker] = piece.shard
            running[piece.key] = _Running(piece, worker, piece.seconds + start)
            read += piece.bytes_read
        threads = sum(job.piece.threads for job in running.values() if encoders_on_cores or job.piece.slot == "head")
        slowdown = max(1.0, threads / capacity)

        def rate(job: _Running, slowdown: float = slowdown) -> float:
            return 1 / slowdown if encoders_on_cores or job.piece.slot == "head" else 1.0

        step, key = min((job.left / rate(job), key) for key, job in running.items())
        if losses and losses[0][0] < clock + step:
            moment, worker = heapq.heappop(losses)
            heapq.heappush(losses, (moment + chance.expovariate(1 / (loss_hours * 3600)), worker))
            step, key = max(0.0, moment - clock), ""
            gone = [k for k, job in running.items() if job.worker == worker]
        else:
            gone = []
        clock += step
        for job in running.values():
            job.left -= step * rate(job)
        for k in gone:
            job = running.pop(k)
            scheduler.lost(k)
            lost += 1
            started[worker], indexed[worker] = False, ""
            if job.piece.slot == "encoder":
                free.append(worker)
        if key:
            job = running.pop(key)
            scheduler.done(key)
            last = key
            written += job.piece.bytes_written
            if job.piece.slot == "encoder":
                free.append(job.worker)
    chains: dict[str, float] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.slot == "head", bool(piece.needs))):  # what is needed comes first
        chains[piece.key] = piece.seconds + max((chains[need] for need in piece.needs), default=costs.start)
    chain = max(chains.values())
    return Outcome(clock, chain, last, read, written, lost)


# ---------------------------------------------------------------- measured runs


class Timed:
    """Seconds of every job of real runs, by slot and key, from the engine's own reports."""

    def __init__(self) -> None:
        self.spans: dict[str, tuple[AnyJob, float, float, float]] = {}  # job, begin, end, hours of audio
        original = LocalEngine.start

        def start(engine: LocalEngine, job: AnyJob, report: Callable[[Report], None]) -> None:
            begin = time.perf_counter()

            def timed(item: Report) -> None:
                if isinstance(item, Done):
                    hours = item.report.audio_seconds / 3600 if isinstance(item.report, ShardReport) else 0.0
                    self.spans[job.key] = (job, begin, time.perf_counter(), hours)
                report(item)

            original(engine, job, timed)

        LocalEngine.start = start  # type: ignore[method-assign]

    def run(self, model: Path, tasks: Sequence[str], data: Path | None, workers: int) -> tuple[float, list[Work], Costs]:
        """Makespan of a run into an empty store, its jobs with their seconds, and costs fitted to them."""
        self.spans.clear()
        with tempfile.TemporaryDirectory() as cache:
            evaluate(model, tasks, data=data, cache=Path(cache), device="cpu", threads=workers, workers=workers, trust=True)
        begin = min(span[1] for span in self.spans.values())
        makespan = max(span[2] for span in self.spans.values()) - begin
        pieces = [
            Work(job.key, job.group, job.slot, job.weight, end - start, memory=job.memory, needs=job.needs)
            for job, start, end, _ in self.spans.values()
        ]
        points = [(hours, end - start) for job, start, end, hours in self.spans.values() if isinstance(job, EmbedJob)]
        per_hour, per_shard = np.polyfit(*zip(*points, strict=True), 1)
        return makespan, pieces, Costs(float(per_hour), max(0.0, float(per_shard)), start_seconds(model))


def start_seconds(model: Path) -> float:
    """From nothing until a further process has the model and has run it, without that run."""
    waveform = np.random.default_rng(0).standard_normal(16_000) * 0.1
    with load_encoder(model, device="cpu", threads=1, trust=True) as first, Worker() as worker:
        further = Encoder(first.spec, worker)
        moments = [time.perf_counter()]
        for _ in range(2):
            further.embed([waveform], 16_000)
            moments.append(time.perf_counter())
    return max(0.0, moments[1] - moments[0] - (moments[2] - moments[1]))


def check(model: Path, tasks: Sequence[str], data: Path | None, rounds: int) -> None:
    """Predict runs of 1 and 2 workers from the jobs of an earlier run of one, and compare."""
    timed = Timed()
    timed.run(model, tasks, data, 1)  # the page cache is warm from here on
    for number in range(rounds):
        _, pieces, costs = timed.run(model, tasks, data, 1)
        print(f"{costs.per_hour:.1f} s per hour of audio, {costs.per_shard:.2f} s per shard, {costs.start:.1f} s to start")
        for workers in (2, 1):
            before, begin = _processor_seconds(), time.perf_counter()
            actual, _, _ = timed.run(model, tasks, data, workers)
            share = (_processor_seconds() - before) / (time.perf_counter() - begin)
            predicted = simulate(pieces, workers, costs, cores=2, heads=1, warm=1).makespan  # one has measured the model
            print(
                f"round {number + 1}, {workers} workers: measured {actual:7.1f} s on {share:.2f} cores, "
                f"predicted {predicted:7.1f} s ({predicted / actual - 1:+.1%})",
                flush=True,
            )


def _processor_seconds() -> float:
    """Of this process and of those that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


# ---------------------------------------------------------------- the table

# A wav2vec2-base on one core: 1.4 s per chunk of 10 s (docs/speed.md). A dasheng-base in one of four processes on an H200:
# 2,708 hours of speech per hour by all four (docs/speed.md).
CPU = Costs(per_hour=500.0, per_shard=0.3, start=6.0)
GPU = Costs(per_hour=5.3, per_shard=0.3, start=10.0)
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def table(
    title: str,
    costs: Costs,
    *,
    on_cores: bool,
    piece_bytes: int | None = None,
    head_threads: int = 1,
    head_speed: float = 1.0,
    loss_hours: float = math.inf,
) -> None:
    """Print a row per number of workers. Efficiency is that of the cores, or of the GPU's processes."""
    tasks = [shipped_tasks()[name] for name in SUITE]
    works = list(jobs_of(tasks, costs, piece_bytes, head_threads, head_speed))
    whole = jobs_of(tasks, costs, None, 1, head_speed)  # neither joins nor second threads count as work
    work = sum(job.seconds for job in whole if on_cores or job.slot == "encoder")
    embedding = [job for job in works if job.shard]
    print(f"\n{title}: {len(embedding)} pieces, {work / 3600:.1f} h of {'a core' if on_cores else 'a process'} in all")
    print("| workers | hours | efficiency | longest chain, hours | ends with | lost jobs | read, GB | written, GB |")
    print("|---|---|---|---|---|---|---|---|")
    for workers in WORKERS:
        run = simulate(
            works,
            workers,
            costs,
            cores=workers if on_cores else CORES_PER_GPU_WORKER * workers,
            encoders_on_cores=on_cores,
            loss_hours=loss_hours,
        )
        efficiency = work / workers / run.makespan
        hours = f"{run.makespan / 3600:.2f} | {efficiency:.2f} | {run.longest_chain / 3600:.2f}"
        traffic = f"{run.bytes_read / 1e9:.0f} | {run.bytes_written / 1e9:.0f}"
        print(f"| {workers} | {hours} | {run.last} | {run.losses} | {traffic} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, metavar="MODEL", help="measure costs, and check predictions")
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--tasks", default="synthetic_timbre,synthetic_vowel,synthetic_pitch,synthetic_colour")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--piece-mib", type=float, default=PIECE_BYTES / 2**20, help="of audio in a piece")
    parser.add_argument("--head-threads", type=int, default=8, help="where heads have more than one")
    parser.add_argument("--gpu-heads", type=float, default=100.0, help="speed of heads on the GPU, in cores: an assumption")
    parser.add_argument("--loss-hours", type=float, default=4.0, help="mean time between two losses of a node")
    options = parser.parse_args()
    if options.measure:
        check(options.measure, options.tasks.split(","), options.data, options.rounds)
        return
    pieces: dict[str, Any] = {"piece_bytes": int(options.piece_mib * 2**20)}
    threaded = pieces | {"head_threads": options.head_threads}
    lossy = {"loss_hours": options.loss_hours}
    threads, losses = f"heads on {options.head_threads} threads", f"a loss per node and {options.loss_hours:g} h"
    fast, heads = pieces | {"head_speed": options.gpu_heads}, f"heads {options.gpu_heads:g} times as fast"
    table("CPU, whole shards", CPU, on_cores=True)
    table("CPU, in pieces", CPU, on_cores=True, **pieces)
    table(f"CPU, in pieces, {threads}", CPU, on_cores=True, **threaded)
    table(f"CPU, in pieces, {threads}, {losses}", CPU, on_cores=True, **threaded, **lossy)
    table(f"GPU, whole shards, {heads}", GPU, on_cores=False, head_speed=options.gpu_heads)
    table(f"GPU, in pieces, {threads}", GPU, on_cores=False, **threaded)
    table(f"GPU, in pieces, {heads}", GPU, on_cores=False, **fast)
    table(f"GPU, in pieces, {heads}, {losses}", GPU, on_cores=False, **fast, **lossy)


if __name__ == "__main__":
    main()
