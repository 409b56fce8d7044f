"""Cosine and linear CKA of embeddings: against the plain formulas on whole matrices, and their invariances."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from xares_onnx.embedding.drift import find_drift
from xares_onnx.embedding.store import STORE_VERSION, Clip, EmbeddedShard, Header

Matrix = NDArray[np.float64]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def shard(vectors: Matrix, keys: list[str] | None = None, clip_of_crop: list[int] | None = None) -> EmbeddedShard:
    owners = np.arange(len(vectors)) if clip_of_crop is None else np.array(clip_of_crop)
    keys = keys or [f"{i:03}" for i in range(int(owners.max()) + 1)]
    header = Header(
        store_version=STORE_VERSION,
        model="m",
        model_sha256="",
        task="t",
        shard="s",
        expected=len(keys),
        damage=None,
        audio_seconds=1.0,
    )
    return EmbeddedShard(header, vectors.astype(np.float32), owners, [Clip(key, 1.0, "{}") for key in keys], [])


def plain_cka(x: Matrix, y: Matrix) -> float:
    """Kornblith et al., equation 4 with linear kernels, from centred Gram matrices."""
    centred = np.eye(len(x)) - 1 / len(x)
    k, m = centred @ x @ x.T @ centred, centred @ y @ y.T @ centred
    return float((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def test_figures_are_the_plain_formulas_over_all_shards() -> None:
    x, y = rng(1).normal(3, 1, (50, 6)), rng(2).normal(size=(50, 6))
    y[:, :3] += x[:, :3]
    parts = [slice(0, 10), slice(10, 37), slice(37, 50)]
    found = find_drift("t", [(shard(x[part]), shard(y[part])) for part in parts])
    cosines = (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert found.clips == 50
    assert found.cosine_mean == pytest.approx(cosines.mean(), abs=1e-6)
    assert found.cosine_p05 == pytest.approx(np.quantile(cosines, 0.05), abs=1e-6)
    assert found.cosine_min == pytest.approx(cosines.min(), abs=1e-6)
    assert found.cka == pytest.approx(plain_cka(x, y), abs=1e-6)


def test_clips_are_paired_by_key_and_crops_are_averaged() -> None:
    x = rng(1).normal(size=(4, 5))
    crops = np.concatenate([x[:1] + 1, x[:1] - 1, x[1:]])
    a = shard(crops, ["a", "b", "c", "d"], [0, 0, 1, 2, 3])
    b = shard(x[[3, 0, 2]], ["d", "a", "c"])
    found = find_drift("t", [(a, b)])
    assert found.clips == 3
    assert found.cosine_min == pytest.approx(1)
    assert found.cka == pytest.approx(1)


def test_cka_knows_neither_rotation_nor_scale_nor_dimensions() -> None:
    x = rng(1).normal(100, 1, (80, 6))  # a large mean does not cancel out
    rotation = np.linalg.qr(rng(2).normal(size=(6, 6)))[0]
    found = find_drift("t", [(shard(x), shard(3 * x @ rotation))])
    assert found.cka == pytest.approx(1, abs=1e-4)
    assert found.cosine_mean is not None
    assert found.cosine_mean < 0.99
    wider = find_drift("t", [(shard(x), shard(np.concatenate([x, x], axis=1)))])
    assert (wider.cosine_mean, wider.cka) == (None, pytest.approx(1, abs=1e-4))


def test_vectors_that_do_not_vary() -> None:
    zeros, ones = np.zeros((5, 3)), np.ones((5, 3))
    assert find_drift("t", [(shard(zeros), shard(zeros))]).cosine_min == 1
    assert find_drift("t", [(shard(zeros), shard(ones))]).cosine_mean == 0
    assert find_drift("t", [(shard(ones), shard(ones))]).cka is None
    assert find_drift("t", []).clips == 0
    assert find_drift("t", [(shard(ones, list("abcde")), shard(ones, list("fghij")))]).cka is None
