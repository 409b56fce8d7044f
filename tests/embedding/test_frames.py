"""Frames in the store: what was embedded, frame by frame with its time, mapped and not loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bank_model import BANDS, HOP, WINDOW, frames_of, write_model
from embedding_runs import embed_shards
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from safetensors.numpy import load_file
from shard_makers import RATE, encoded, noise, small_disk, write_shard

from xares_onnx.data.audio import CropSettings
from xares_onnx.data.selection import ShardPlan
from xares_onnx.data.shards import file_digest
from xares_onnx.embedding.embed import EmbedSpec, shard_specs
from xares_onnx.embedding.store import STORE_VERSION, Clip, EmbeddedShard, Frames, Header, Store
from xares_onnx.encoder.encoder import Encoder, load_encoder
from xares_onnx.errors import DiskFullError
from xares_onnx.files import stamp
from xares_onnx.progress import ignore

KEY = "ab" + "0" * 38
Floats = NDArray[np.float32]


def write(folder: Path, crops: list[Floats], *, dropped: int | None = None) -> EmbeddedShard:
    """Crops of one clip each, whose frames lie 10 ms apart; clip number `dropped` is given up after its frames came."""
    ours, kept = Store(folder), [crop for number, crop in enumerate(crops) if number != dropped]
    with ours.spool(KEY, crops[0].shape[1]) as spool:
        for number, crop in enumerate(crops):
            for start in range(0, len(crop), 7):  # as chunks come
                part = crop[start : start + 7]
                spool.add(part, 0.01 * np.arange(start, start + len(part)))
            spool.end_crop()
            if number == dropped:
                spool.drop_from(number)
        pooled = np.stack([crop.mean(axis=0) for crop in kept])
        header = Header(
            store_version=STORE_VERSION,
            model="m.onnx",
            model_sha256="0",
            task="t",
            shard="s.tar",
            expected=len(kept),
            damage=None,
            audio_seconds=1.0,
        )
        clips = [Clip(str(number), 1.0, "{}") for number in range(len(kept))]
        shard = EmbeddedShard(header, pooled, np.arange(len(kept)), clips, [])
        ours.write(KEY, shard, spool)
    found = ours.read(KEY)
    assert found is not None
    assert [path.suffix for path in sorted(folder.glob("*/*"))] == [".jsonl", ".safetensors"]  # and no leftovers
    return found


def crops_of(found: Frames) -> list[Floats]:
    return [found.values[a:b] for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)]


def random_crops(scale: float = 1.0, offset: float = 0.0, seed: int = 0) -> list[Floats]:
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal((n, 5)) + offset).astype(np.float32) for n in (12, 1, 30, 8)]


# ---------------------------------------------------------------- the file


def test_frames_come_back_in_half_precision_with_their_times(tmp_path: Path) -> None:
    crops = random_crops()
    found = write(tmp_path, crops).frames
    assert found is not None
    assert found.values.dtype == np.float16
    for crop, expected in zip(crops_of(found), crops, strict=True):
        np.testing.assert_array_equal(crop, expected.astype(np.float16))
    np.testing.assert_allclose(found.times, 0.01 * np.concatenate([np.arange(len(crop)) for crop in crops]))


@pytest.mark.parametrize(
    "crops",
    [
        pytest.param(random_crops(scale=1e5), id="float16 overflows"),
        pytest.param(random_crops(scale=1e-7), id="float16 has no such small numbers"),
        pytest.param(random_crops(scale=0.01, offset=50), id="all the information is in the last digits"),
        pytest.param([*random_crops()[:3], random_crops(scale=1e5)[3]], id="the last crop overflows"),
        pytest.param([random_crops(scale=1e5)[0], *random_crops()[1:]], id="the first crop overflows"),
    ],
)
def test_frames_that_half_precision_would_spoil_are_kept_in_single(crops: list[Floats], tmp_path: Path) -> None:
    found = write(tmp_path, crops).frames
    assert found is not None
    assert found.values.dtype == np.float32
    usual = random_crops()
    for number, (crop, expected) in enumerate(zip(crops_of(found), crops, strict=True)):
        # A clip that half precision serves is rounded to it all the same: it must not depend on its neighbours.
        serves = np.array_equal(expected, usual[number])
        np.testing.assert_array_equal(crop, expected.astype(np.float16) if serves else expected)


@given(values=arrays.arrays(np.float32, (20, 4), elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_any_finite_frames_survive(values: Floats, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = write(tmp_path_factory.mktemp("any"), [values]).frames
    assert found is not None
    error = np.abs(found.values.astype(np.float64) - values)
    spread = values.astype(np.float64).std(axis=1)
    spoilt = error.max(axis=1) > 0.011 * spread + 1e-6 * np.abs(values).max(axis=1)
    assert spoilt.mean() <= 0.35  # of a chunk of seven frames or fewer, one may be blurred


@pytest.mark.parametrize("dropped", [0, 2, 3])
@pytest.mark.parametrize("scale", [1.0, 1e5])
def test_frames_of_a_clip_that_was_given_up_are_not_there(dropped: int, scale: float, tmp_path: Path) -> None:
    crops = random_crops(scale)
    found = write(tmp_path, crops, dropped=dropped).frames
    assert found is not None
    kept = [crop for number, crop in enumerate(crops) if number != dropped]
    for crop, expected in zip(crops_of(found), kept, strict=True):
        np.testing.assert_allclose(crop, expected, rtol=1e-3)
    assert len(found.times) == len(found.values) == sum(map(len, kept))


def test_anybody_can_read_the_file(tmp_path: Path) -> None:
    """It is a plain safetensors file."""
    shard = write(tmp_path, random_crops())
    (path,) = tmp_path.glob("*/*.safetensors")
    loaded = load_file(path)
    assert shard.frames is not None
    np.testing.assert_array_equal(loaded["frames"], shard.frames.values)
    np.testing.assert_array_equal(loaded["times"], shard.frames.times)
    np.testing.assert_array_equal(loaded["offsets"], shard.frames.offsets)
    np.testing.assert_array_equal(loaded["pooled"], shard.pooled)


def test_frames_are_mapped_and_not_loaded(tmp_path: Path) -> None:
    found = write(tmp_path, random_crops()).frames
    assert found is not None
    bases: list[Any] = [found.values]
    while getattr(bases[-1], "base", None) is not None:
        bases.append(bases[-1].base)
    assert any(isinstance(base, np.memmap) for base in bases)
    assert not found.values.flags.writeable


def test_a_file_cut_anywhere_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, random_crops())
    (path,) = tmp_path.glob("*/*.safetensors")
    whole = path.read_bytes()
    for cut in [*range(0, 4200, 97), *range(4200, len(whole), 31), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        assert Store(tmp_path).read(KEY) is None, cut


def test_a_spool_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with Store(tmp_path).spool(KEY, 4) as spool:
            spool.add(np.ones((3, 4), np.float32), np.arange(3.0))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.glob("*/*")) == []


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with Store(tmp_path / "disk" / "store").spool(KEY, 64) as spool:
            for start in range(1000):
                spool.add(np.random.default_rng(start).standard_normal((8, 64)).astype(np.float32), np.arange(8.0))

    with small_disk(tmp_path / "disk", 64):
        with pytest.raises(DiskFullError):
            fill()
        assert list((tmp_path / "disk" / "store").glob("*/*")) == []


# ---------------------------------------------------------------- the embed stage


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encoder]:
    with load_encoder(write_model(tmp_path_factory.mktemp("model") / "bank.onnx"), device="cpu", threads=2) as encoder:
        yield encoder


def embedded(encoder: Encoder, folder: Path, clips: dict[str, Any], crops: CropSettings | None = None) -> EmbeddedShard:
    path = write_shard(folder / "a.tar", {key: (encoded(samples, subtype="FLOAT"), {}) for key, samples in clips.items()})
    plan = ShardPlan(path, file_digest(path), stamp(path), None)
    store = Store(folder / "store")
    specs: dict[Path, EmbedSpec] = shard_specs(encoder, "t", [plan], crops or CropSettings(None), store, frames=True)
    shards, _ = embed_shards(encoder, specs, store, ignore)
    return shards[path]


def by_hand(samples: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Chunks of 10 s, each with frames of its own; a last piece under 1 s is padded to 1 s and its padding left out."""
    frames, times = [], []
    for start in range(0, len(samples), 10 * RATE):
        piece = samples[start : start + 10 * RATE]
        padded = np.pad(piece, (0, max(0, RATE - len(piece))))
        found = frames_of(padded)
        centres = start + WINDOW / 2 + HOP * np.arange(len(found))
        inside = np.flatnonzero(centres - HOP / 2 < len(samples))
        frames.append(found[inside])
        times.append(centres[inside] / RATE)
    return np.concatenate(frames), np.concatenate(times)


def test_every_frame_of_every_chunk_has_its_time(encoder: Encoder, tmp_path: Path) -> None:
    clips = {f"{seconds}": 0.3 * noise(seconds, seed=int(seconds)) for seconds in (0.3, 1.0, 4.2, 10.4, 25.0)}
    shard = embedded(encoder, tmp_path, clips)
    assert shard.frames is not None
    for number, clip in enumerate(shard.clips):
        rows = slice(shard.frames.offsets[number], shard.frames.offsets[number + 1])
        frames, times = by_hand(clips[clip.key])
        np.testing.assert_allclose(shard.frames.times[rows], times, atol=1e-9)
        np.testing.assert_allclose(shard.frames.values[rows], frames, rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(shard.pooled[number], frames.mean(axis=0), rtol=1e-5, atol=1e-6)
    assert shard.frames.values.shape[1] == BANDS + 1


def test_under_xares_frames_of_the_padding_stay(encoder: Encoder, tmp_path: Path) -> None:
    as_xares = CropSettings(None, "whole-crops", pad_short_clips=False, keep_padding=True)
    shard = embedded(encoder, tmp_path, {"a": 0.3 * noise(10.4)}, as_xares)
    assert shard.frames is not None
    assert len(shard.frames.values) == len(frames_of(np.zeros(10 * RATE))) + len(frames_of(np.zeros(RATE)))


def test_a_clip_without_finite_frames_takes_none_of_its_neighbours_along(encoder: Encoder, tmp_path: Path) -> None:
    good = {"a": 0.3 * noise(1.5, seed=1), "c": 0.3 * noise(12, seed=2)}
    sick = 0.3 * noise(11, seed=3)
    sick[-RATE:] = -0.95  # in its second chunk
    (tmp_path / "alone").mkdir()
    alone = embedded(encoder, tmp_path / "alone", good)
    beside = embedded(encoder, tmp_path, {"a": good["a"], "b": sick, "c": good["c"]})
    assert [drop.key for drop in beside.drops] == ["b"]
    assert alone.frames is not None
    assert beside.frames is not None
    np.testing.assert_array_equal(alone.frames.values.astype(np.float16), beside.frames.values.astype(np.float16))
    np.testing.assert_array_equal(alone.frames.times, beside.frames.times)
    np.testing.assert_array_equal(alone.frames.offsets, beside.frames.offsets)


def test_frames_are_stored_apart_from_means(encoder: Encoder, tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", {"a": (encoded(noise(1.0)), {})})
    plan, store = ShardPlan(path, file_digest(path), stamp(path), None), Store(tmp_path / "store")
    for frames in (False, True):
        specs = shard_specs(encoder, "t", [plan], CropSettings(None), store, frames=frames)
        shards, reports = embed_shards(encoder, specs, store, ignore)
        assert len(reports) == 1
        assert (shards[path].frames is not None) is frames
