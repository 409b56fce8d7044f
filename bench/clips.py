"""Shards of clips of 5 s, tones in noise, for the other benchmarks; and one shard through an encoder's worker."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile

from xares_onnx.data.audio import CropSettings
from xares_onnx.data.shards import file_digest
from xares_onnx.embedding.embed import EmbedSpec, ShardReport, embed_shard
from xares_onnx.encoder.encoder import Encoder
from xares_onnx.encoder.walls import Walls
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
    if encoder.worker.walls != Walls():  # it was opened for waveforms alone
        encoder.worker.close()
        encoder.worker.walls = Walls()
    return encoder.worker.call(embed_shard, spec, returns=ShardReport, silence_limit=60, observer=ignore)
