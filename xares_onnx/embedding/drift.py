"""How far apart two models' embeddings of the same clips are.

The cosine tells whether a clip's vectors point the same way, as those of a quantised copy should. Linear CKA (Kornblith et
al. 2019, https://arxiv.org/abs/1905.00414) compares which clips are similar to each model, whatever the dimensions: it is 1
if one model's vectors are those of the other but for rotation and scale.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import numpy as np
import numpy.typing as npt

from .store import EmbeddedShard

Array = npt.NDArray[np.float64]


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """The drift over all clips of a task that both models have embedded; cosines are null if dimensions differ."""

    task: str
    clips: int
    cosine_mean: float | None
    cosine_p05: float | None
    """The cosine that one clip in twenty falls below."""
    cosine_min: float | None
    cka: float | None
    """Null if one model gives every clip the same vector."""


def find_drift(task: str, shards: Iterable[tuple[EmbeddedShard, EmbeddedShard]]) -> Drift:
    """The drift from both models' embeddings of the same shards, which are read one after another."""
    cosines: list[Array] = []
    moments: _Moments | None = None
    clips = 0
    for a, b in shards:
        x, y = _paired(a, b)
        if not len(x):
            continue
        clips += len(x)
        if x.shape[1] == y.shape[1]:
            cosines.append(_cosine(x, y))
        moments = moments or _Moments(x.mean(axis=0), y.mean(axis=0))
        moments.add(x, y)
    values = np.concatenate(cosines) if cosines else None
    return Drift(
        task=task,
        clips=clips,
        cosine_mean=None if values is None else float(values.mean()),
        cosine_p05=None if values is None else float(np.quantile(values, 0.05)),
        cosine_min=None if values is None else float(values.min()),
        cka=moments.cka() if moments else None,
    )


def _paired(a: EmbeddedShard, b: EmbeddedShard) -> tuple[Array, Array]:
    """A vector per clip, the mean over its crops, of the clips that both have: (clips, dim of A), (clips, dim of B)."""
    rows = {clip.key: row for row, clip in enumerate(b.clips)}
    common = [(i, rows[clip.key]) for i, clip in enumerate(a.clips) if clip.key in rows]
    rows_a, rows_b = (np.array([pair[side] for pair in common], np.int64) for side in (0, 1))
    return _clip_vectors(a)[rows_a], _clip_vectors(b)[rows_b]


def _clip_vectors(shard: EmbeddedShard) -> Array:
    sums = np.zeros((len(shard.clips), shard.pooled.shape[1]))
    np.add.at(sums, shard.clip_of_crop, shard.pooled)
    return sums / np.bincount(shard.clip_of_crop, minlength=len(shard.clips))[:, None]


def _cosine(x: Array, y: Array) -> Array:
    """Cosines (clips,); two vectors of zeros have 1."""
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines: Array = np.where(norms > 0, (x * y).sum(axis=1) / norms, (x == y[:, : x.shape[1]]).all(axis=1))
    return cosines.clip(-1, 1)


class _Moments:
    """The sums that linear CKA needs, about a first guess of the means, so that large means do not cancel out."""

    def __init__(self, about_x: Array, about_y: Array) -> None:
        self._about = about_x, about_y
        dims = len(about_x), len(about_y)
        self._n = 0
        self._x, self._y = np.zeros(dims[0]), np.zeros(dims[1])
        self._xx, self._yy, self._xy = np.zeros((dims[0],) * 2), np.zeros((dims[1],) * 2), np.zeros(dims)

    def add(self, x: Array, y: Array) -> None:
        x, y = x - self._about[0], y - self._about[1]
        self._n += len(x)
        self._x, self._y = self._x + x.sum(axis=0), self._y + y.sum(axis=0)
        self._xx, self._yy, self._xy = self._xx + x.T @ x, self._yy + y.T @ y, self._xy + x.T @ y

    def cka(self) -> float | None:
        xx = self._xx - np.outer(self._x, self._x) / self._n
        yy = self._yy - np.outer(self._y, self._y) / self._n
        xy = self._xy - np.outer(self._x, self._y) / self._n
        scale = np.linalg.norm(xx) * np.linalg.norm(yy)
        return float(min(1.0, (xy**2).sum() / scale)) if scale > 0 else None
