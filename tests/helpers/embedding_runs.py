"""Shards embedded one after another, without an engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from xares_onnx.embedding.embed import EmbedSpec, ShardReport, embed_shard
from xares_onnx.embedding.store import EmbeddedShard, Store
from xares_onnx.encoder.encoder import Encoder
from xares_onnx.progress import Observer


def grant(encoder: Encoder, reads: Iterable[Path], store: Path | None = None) -> None:
    """Let the process of an encoder that was opened for waveforms read shards, and write to a store."""
    if store is not None and not store.exists():
        store.mkdir(parents=True)
    walls = replace(encoder.worker.walls, reads=tuple(map(str, reads)), writes=() if store is None else (str(store),))
    if encoder.worker.walls != walls:
        encoder.worker.close()
        encoder.worker.walls = walls


def embed_shards(
    encoder: Encoder, specs: Mapping[Path, EmbedSpec], store: Store, observer: Observer
) -> tuple[dict[Path, EmbeddedShard], list[ShardReport]]:
    """The embeddings of every shard by the first tap, and the reports of those that the store lacked."""
    grant(encoder, specs, store.root)
    shards, reports = {}, []
    for path, spec in specs.items():
        keys = [spec.key(tap) for tap in range(len(encoder.info.taps))]
        if any(store.read(key) is None for key in keys):
            reports.append(encoder.call(embed_shard, spec, returns=ShardReport, observer=observer))
        embedded = store.read(keys[0])
        assert embedded is not None
        shards[path] = embedded
    return shards, reports
