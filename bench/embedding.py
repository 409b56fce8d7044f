"""Embedding, store included, against the same model calls on bare ONNX Runtime with two caller threads on decoded audio.

    python bench/embedding.py MODEL.onnx [--clips N] [--rounds N]

Clips are 5 s of tones in noise: 16 kHz wav, and 44.1 kHz stereo flac, which costs more to decode and to resample. Both sides
run in a fresh process each, in turn, and the best of the rounds counts, because the machine may be busy with other things.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile

from xares_onnx.data import audio
from xares_onnx.data.audio import CropSettings
from xares_onnx.data.shards import file_digest, index_shard, read_extent
from xares_onnx.embedding.embed import EmbedSpec, ShardReport, embed_shard
from xares_onnx.encoder.encoder import Encoder, load_encoder
from xares_onnx.files import stamp
from xares_onnx.progress import ignore

KINDS = {"16 kHz mono wav": (16_000, 1, "WAV"), "44.1 kHz stereo flac": (44_100, 2, "FLAC")}
SECONDS = 5.0


def write_shard(path: Path, kind: str, clips: int, seed: int = 0) -> None:
    rate, channels, container = KINDS[kind]
    import webdataset  # with torch, which the measured processes do without

    rng = np.random.default_rng(seed)
    time_axis = np.arange(int(SECONDS * rate)) / rate
    with webdataset.TarWriter(str(path)) as tar:
        for i in range(clips):
            tones = sum(np.sin(2 * np.pi * f * time_axis) for f in rng.uniform(100, 4000, 5)) / 8
            samples = np.stack([tones + 0.003 * rng.standard_normal(len(tones)) for _ in range(channels)], axis=1)
            encoded = io.BytesIO()
            soundfile.write(encoded, samples, rate, format=container, subtype="PCM_16")
            tar.write({"__key__": f"{i:06d}", container.lower(): encoded.getvalue(), "json": {"label": i % 2}})


def embed(encoder: Encoder, shard: Path, store: Path, *, frames: bool = False) -> ShardReport:
    """One shard through the encoder's worker, from tar to store."""
    spec = EmbedSpec(
        model=encoder.spec,
        task="bench",
        shard=shard,
        shard_digest=file_digest(shard),
        shard_stamp=stamp(shard),
        crops=CropSettings(None),
        frames=frames,
        selected=None,
        store=store,
    )
    return encoder.worker.call(embed_shard, spec, returns=ShardReport, silence_limit=60, observer=ignore)


def ours(model: Path, shard: Path, store: Path) -> float:
    """Seconds of one warm worker for a shard."""
    with load_encoder(model, device="cpu", threads=2) as encoder:
        encoder.embed([np.zeros(16_000)], 16_000)
        return embed(encoder, shard, store).seconds


def bare(model: Path, shard: Path) -> float:
    """Seconds of the model calls alone: two threads, one session, audio decoded before."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    batches = []
    for sample in index_shard(shard).samples:
        samples, rate = audio.decode(read_extent(shard, sample.audio))
        batches.append(audio.resample(samples, rate, 16_000)[None])
    session.run(None, {name: batches[0]})
    started = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda batch: session.run(None, {name: batch}), batches):
            pass
    return time.perf_counter() - started


def measured(side: str, model: Path, shard: Path) -> float:
    done = subprocess.run(
        [sys.executable, __file__, str(model), "--side", side, "--shard", str(shard)], check=True, capture_output=True
    )
    return float(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--side", choices=["ours", "bare"])
    parser.add_argument("--shard", type=Path)
    given = parser.parse_args()
    if given.side:
        with tempfile.TemporaryDirectory() as folder:
            side = ours(given.model, given.shard, Path(folder)) if given.side == "ours" else bare(given.model, given.shard)
        print(json.dumps(side))
        return
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            shard = Path(folder) / f"{kind.split()[0]}.tar"
            write_shard(shard, kind, given.clips)
            rounds = [
                (measured("ours", given.model, shard), measured("bare", given.model, shard)) for _ in range(given.rounds)
            ]
            best_ours, best_bare = (min(side) for side in zip(*rounds, strict=True))
            audio_seconds = given.clips * SECONDS
            print(
                f"embedding {given.model.stem}, {kind}: {best_ours / best_bare:.3f}x of bare ONNX Runtime "
                f"({best_ours:.2f} s against {best_bare:.2f} s for {audio_seconds:.0f} s of audio, best of {given.rounds})"
            )


if __name__ == "__main__":
    main()
