"""What the program itself costs while it embeds: processor time, store included, against the least that the job needs.

    python bench/host.py free DATA [--tasks NAME,NAME] [--rounds N]      an encoder that costs nothing, on real shards
    python bench/host.py model MODEL.onnx [--clips N] [--rounds N]       a real one, on 16 kHz wav and 44.1 kHz stereo flac

`free` compares with a plain loop that decodes each clip of the same shards, mixes it down and resamples it. `model` compares
with bare ONNX Runtime on decoded audio, and with that plus the plain loop. Both sides run in a fresh process each, in turn.
The figure is processor time of the process and its worker without their start, and the least of the rounds counts: a busy
machine disturbs it less than wall time.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

RATE = 16_000
HOP, DIM = 320, 64  # of the encoder that costs nothing


def free_model(path: Path) -> Path:
    """An encoder of one convolution over single samples: 64 values every 20 ms."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.linspace(-1, 1, DIM, dtype=np.float32).reshape(DIM, 1, 1)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["audio", "weights"], ["embeddings"], kernel_shape=[1], strides=[HOP])],
        "free",
        [helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["batch", 1, "samples"])],
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", DIM, "frames"])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.metadata_props.add(key="sample_rate", value=str(RATE))
    onnx.save(model, path)
    return path


def shards_of(data: Path, tasks: Sequence[str]) -> dict[str, list[Path]]:
    return {task: sorted((data / task).glob("*.tar")) for task in tasks}


def waveforms(shard: Path) -> Iterator[np.ndarray[Any, Any]]:
    """Every clip of a shard at 16 kHz, by tarfile, libsndfile and soxr alone."""
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            if member.name.endswith(".json"):
                continue
            content = tar.extractfile(member)
            assert content is not None
            samples, rate = soundfile.read(io.BytesIO(content.read()), dtype="float32")
            mono = samples if samples.ndim == 1 else sum(samples.T) / np.float32(samples.shape[1])
            yield mono if rate == RATE else soxr.resample(mono, rate, RATE, quality="HQ")


class Clock:
    """Processor seconds of this process, and of its workers when they have ended; and wall seconds."""

    def __init__(self) -> None:
        self._started = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()

    def read(self, worker: float = 0.0) -> dict[str, float]:
        cpu, wall = (now - then for now, then in zip(self._now(), self._started, strict=True))
        return {"cpu": cpu + worker, "wall": wall}


def worker_seconds(encoder: Any) -> float:
    """Processor seconds of the encoder's process so far."""
    fields = Path(f"/proc/{encoder.worker._process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ours(model: Path, shards: dict[str, list[Path]], folder: Path, threads: int) -> dict[str, float]:
    """The seconds of a warm worker for all shards, from tars to the store."""
    from xares_onnx.data.audio import CropSettings
    from xares_onnx.data.catalog import shipped_tasks
    from xares_onnx.data.selection import ShardPlan
    from xares_onnx.embedding.embed import ShardReport, embed_shard, shard_specs
    from xares_onnx.embedding.store import Store
    from xares_onnx.encoder.encoder import Reach, open_encoder
    from xares_onnx.encoder.spec import ModelOptions
    from xares_onnx.files import stamp
    from xares_onnx.progress import ignore
    from xares_onnx.scoring.kinds import kind_of
    from xares_onnx.scoring.protocol import Protocol

    store, known = Store(folder), shipped_tasks()
    reach = Reach([path for paths in shards.values() for path in paths], [folder])
    with open_encoder(model, ModelOptions(device="cpu", threads=threads), reach=reach) as encoder:
        encoder.embed([np.zeros(RATE)], RATE)
        clips, hours, clock, before = 0, 0.0, Clock(), worker_seconds(encoder)
        for task, paths in shards.items():
            plans = [ShardPlan(path, f"{path}", stamp(path), None) for path in paths]
            crops = Protocol("corrected").crops(known[task]) if task in known else CropSettings(None)
            frames = task in known and kind_of(known[task]).needs_frames
            specs = shard_specs(encoder, task, plans, crops, store, frames=frames)
            reports = [encoder.call(embed_shard, spec, returns=ShardReport, observer=ignore) for spec in specs.values()]
            clips += sum(report.clips for report in reports)
            hours += sum(report.audio_seconds for report in reports) / 3600
        return {**clock.read(worker_seconds(encoder) - before), "clips": clips, "hours": hours}


def decoding(shards: dict[str, list[Path]], threads: int) -> dict[str, float]:
    """The seconds of decoding and resampling alone, of as many threads as clips are decoded on."""
    clock = Clock()

    def decode(shard: Path) -> int:
        return sum(1 for _ in waveforms(shard))

    with ThreadPoolExecutor(threads) as pool:
        clips = sum(pool.map(decode, [path for paths in shards.values() for path in paths]))
    return {**clock.read(), "clips": clips}


def bare(model: Path, shards: dict[str, list[Path]], threads: int) -> dict[str, float]:
    """The seconds of the model's calls alone: one session, `threads` callers, audio decoded before."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batches = [clip[None] for paths in shards.values() for path in paths for clip in waveforms(path)]
    session.run(None, {name: batches[0]})
    clock = Clock()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda batch: session.run(None, {name: batch}), batches):
            pass
    return clock.read()


def one_side(given: argparse.Namespace) -> dict[str, float]:
    shards = {task: [Path(path) for path in paths] for task, paths in json.loads(given.shards).items()}
    if given.side == "ours":
        with tempfile.TemporaryDirectory() as folder:
            return ours(given.model, shards, Path(folder), given.threads)
    return decoding(shards, given.threads) if given.side == "decoding" else bare(given.model, shards, given.threads)


def measure(sides: Sequence[str], model: Path, shards: dict[str, list[Path]], rounds: int, threads: int) -> dict[str, Any]:
    """Each side's seconds in a fresh process, the sides in turn; the least of each figure over the rounds."""
    listed = json.dumps({task: [str(path) for path in paths] for task, paths in shards.items()})
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            command = [sys.executable, __file__, side, str(model), "--shards", listed, "--threads", str(threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            runs[side].append(json.loads(done.stdout))
            print(side, {name: round(value, 2) for name, value in runs[side][-1].items()}, file=sys.stderr)
    return {side: {name: min(run[name] for run in of_side) for name in of_side[0]} for side, of_side in runs.items()}


def free(data: Path, tasks: Sequence[str], rounds: int, threads: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = free_model(Path(folder) / "free.onnx")
        least = measure(["ours", "decoding"], model, shards_of(data, tasks), rounds, threads)
    ours, plain = least["ours"], least["decoding"]
    more = (ours["cpu"] - plain["cpu"]) / ours["clips"] * 1e3
    print(
        f"an encoder that costs nothing, {ours['clips']:.0f} clips, {ours['hours']:.1f} h: "
        f"{ours['cpu'] / plain['cpu']:.2f}x the processor time of decoding and resampling "
        f"({ours['cpu']:.1f} s against {plain['cpu']:.1f} s, {more:.2f} ms per clip on top), "
        f"{ours['hours'] / ours['cpu']:.2f} h of audio per core and second ({ours['wall']:.1f} s of wall time)"
    )


def of_model(model: Path, count: int, rounds: int, threads: int) -> None:
    import clips

    for kind in clips.KINDS:
        with tempfile.TemporaryDirectory() as folder:
            shard = Path(folder) / "clips.tar"
            clips.write_shard(shard, kind, count)
            least = measure(["ours", "bare", "decoding"], model, {"bench": [shard]}, rounds, threads)
        for figure in ("cpu", "wall"):
            ours, bare, plain = (least[side][figure] for side in ("ours", "bare", "decoding"))
            print(
                f"{model.stem}, {kind}, {figure}: {ours / bare:.3f}x of bare ONNX Runtime, {ours / (bare + plain):.3f}x "
                f"of it plus decoding and resampling ({ours:.2f} s against {bare:.2f} + {plain:.2f} s)"
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=["free", "model", "ours", "decoding", "bare"])
    parser.add_argument("model", type=Path, help="a folder of tasks for `free`, else a model")
    parser.add_argument("--tasks")
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shards")
    given = parser.parse_args()
    if given.side == "free":
        tasks = (
            given.tasks.split(",") if given.tasks else sorted(path.name for path in given.model.iterdir() if path.is_dir())
        )
        free(given.model, tasks, given.rounds, given.threads)
    elif given.side == "model":
        of_model(given.model, given.clips, given.rounds, given.threads)
    else:
        print(json.dumps(one_side(given)))


if __name__ == "__main__":
    main()
