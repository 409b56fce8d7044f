"""Embedding shards: a clip's vector is of that clip alone, losses are named, and what is stored is not embedded again."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import tarfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soxr
from bank_model import BANDS, HOP, WINDOW, frames_of, write_model
from embedding_runs import embed_shards, grant
from shard_makers import (
    RATE,
    Samples,
    clip_members,
    encoded,
    member,
    noise,
    sine,
    small_disk,
    task_toml,
    write_shard,
    write_tar,
)

from xares_onnx.data import audio
from xares_onnx.data.audio import CropSettings
from xares_onnx.data.catalog import Digests
from xares_onnx.data.selection import ShardPlan, prepare
from xares_onnx.data.shards import Drop, file_digest, index_shard
from xares_onnx.data.task import load_task
from xares_onnx.embedding import embed
from xares_onnx.embedding.embed import NOT_FINITE, ShardReport, _Decoded, shard_specs
from xares_onnx.embedding.store import EmbeddedShard, Store
from xares_onnx.encoder.encoder import Encoder, load_encoder
from xares_onnx.errors import DataError, DiskFullError, MachineError
from xares_onnx.evaluation.planning import make_plan
from xares_onnx.files import stamp
from xares_onnx.progress import Observer, Progress, ignore
from xares_onnx.scoring.protocol import Protocol

CHUNK = 10 * RATE
WHOLE = CropSettings(None)
AS_XARES = CropSettings(None, "whole-crops", pad_short_clips=False, keep_padding=True)


# ---------------------------------------------------------------- pooling by hand


def pooled_by_hand(samples: Samples, *, as_xares: bool = False) -> npt.NDArray[np.float64]:
    """Chunks of 10 s; a last piece under 1 s is padded to 1 s; frames centred half a hop past the end are left out.

    X-ARES keeps them, and leaves a short clip as it is.
    """
    kept = []
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        if len(chunk) < RATE and not (as_xares and not start):
            chunk = np.pad(chunk, (0, RATE - len(chunk)))
        frames = frames_of(chunk)
        inside = start + WINDOW / 2 + HOP * np.arange(len(frames)) - HOP / 2 < len(samples)
        if not as_xares:
            inside[0] |= start == 0
            frames = frames[inside]
        kept.append(frames)
    mean: npt.NDArray[np.float64] = np.concatenate(kept).mean(axis=0)
    return mean


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "bank.onnx")


@pytest.fixture(scope="module")
def encoder(model: Path) -> Iterator[Encoder]:
    with load_encoder(model, device="cpu", threads=2) as encoder:
        yield encoder


def plan_of(path: Path, selected: Iterable[str] | None = None) -> ShardPlan:
    return ShardPlan(path, file_digest(path), stamp(path), None if selected is None else frozenset(selected))


def embedded(
    encoder: Encoder, store: Path, *plans: ShardPlan | Path, crops: CropSettings = WHOLE, observer: Observer = ignore
) -> tuple[list[EmbeddedShard], list[ShardReport]]:
    made = [plan_of(plan) if isinstance(plan, Path) else plan for plan in plans]
    specs = shard_specs(encoder, "mine", made, crops, Store(store), frames=False)
    shards, reports = embed_shards(encoder, specs, Store(store), observer)
    assert list(shards) == [plan.path for plan in made]
    for shard in shards.values():
        assert shard.header.expected == len(shard.clips) + len(shard.drops)
    return list(shards.values()), reports


def vectors(shard: EmbeddedShard) -> dict[str, npt.NDArray[np.float32]]:
    """Key -> (crops, dim)."""
    return {clip.key: shard.pooled[shard.clip_of_crop == i] for i, clip in enumerate(shard.clips)}


def assert_same(found: dict[str, npt.NDArray[np.float32]], expected: dict[str, npt.NDArray[np.float32]]) -> None:
    """Bit by bit."""
    assert list(found) == list(expected)
    for key, vector in expected.items():
        assert found[key].tobytes() == vector.tobytes(), key


# ---------------------------------------------------------------- what a vector is

LENGTHS = (0.001, 0.02, 0.3, 0.99, 1, 1.003, 1.5, 9.99, 10, 10.001, 10.4, 11, 23.7, 30)


def clips_of(lengths: Iterable[float]) -> dict[str, Samples]:
    return {f"{seconds} s": noise(seconds, seed=int(seconds * 1_000)).astype(np.float32) for seconds in lengths}


def shard_of(path: Path, clips: dict[str, Samples]) -> Path:
    return write_shard(path, {key: (encoded(samples, subtype="FLOAT"), {"label": key}) for key, samples in clips.items()})


def test_a_vector_is_the_mean_of_the_frames_of_its_clip(encoder: Encoder, tmp_path: Path) -> None:
    clips = clips_of(LENGTHS)
    ((shard,), (report,)) = embedded(encoder, tmp_path / "store", shard_of(tmp_path / "a.tar", clips))
    found = vectors(shard)
    assert list(found) == list(clips)
    assert shard.drops == []
    assert shard.pooled.dtype == np.float32
    frames = encoder.embed(list(clips.values()), RATE)
    for (key, samples), embedding in zip(clips.items(), frames, strict=True):
        assert found[key].shape == (1, BANDS + 1)
        np.testing.assert_array_equal(found[key][0], embedding.frames.mean(axis=0, dtype=np.float64).astype(np.float32))
        np.testing.assert_allclose(found[key][0], pooled_by_hand(samples), rtol=1e-5, atol=1e-6, err_msg=key)
    assert [clip.seconds for clip in shard.clips] == pytest.approx(LENGTHS, abs=1e-4)
    assert [json.loads(clip.label) for clip in shard.clips] == [{"label": key} for key in clips]
    assert report.clips == len(clips)
    assert report.audio_seconds == pytest.approx(sum(LENGTHS), abs=1e-2) == shard.header.audio_seconds


def test_under_xares_padding_is_kept_and_a_short_clip_is_not_padded(encoder: Encoder, tmp_path: Path) -> None:
    clips = clips_of(length for length in LENGTHS if length >= WINDOW / RATE)
    ((shard,), _) = embedded(encoder, tmp_path / "store", shard_of(tmp_path / "a.tar", clips), crops=AS_XARES)
    for key, samples in clips.items():
        by_hand = pooled_by_hand(samples, as_xares=True)
        np.testing.assert_allclose(vectors(shard)[key][0], by_hand, rtol=1e-5, atol=1e-6, err_msg=key)
    assert np.abs(vectors(shard)["0.3 s"][0] - pooled_by_hand(clips["0.3 s"])).max() > 1e-3  # this test sees the difference


@pytest.mark.parametrize(
    ("rule", "crops_of"),
    [
        ("keep-tails", {"7 s": [(0, 5), (5, 7)], "5.5 s": [(0, 5)], "2 s": [(0, 2)], "15 s": [(0, 5), (5, 10), (10, 15)]}),
        ("whole-crops", {"7 s": [(0, 5)], "5.5 s": [(0, 5)], "2 s": [(0, 5)], "15 s": [(0, 5), (5, 10), (10, 15)]}),
    ],
)
def test_every_crop_has_a_vector_of_its_own(
    rule: audio.CropRule, crops_of: dict[str, list[tuple[int, int]]], encoder: Encoder, tmp_path: Path
) -> None:
    clips = clips_of([7, 5.5, 2, 15])
    shard_path = shard_of(tmp_path / "a.tar", clips)
    ((shard,), _) = embedded(encoder, tmp_path / "store", shard_path, crops=CropSettings(5.0, rule))
    for key, samples in clips.items():
        padded = np.pad(samples, (0, 5 * RATE)) if rule == "whole-crops" else samples
        by_hand = [pooled_by_hand(padded[start * RATE : stop * RATE]) for start, stop in crops_of[key]]
        np.testing.assert_allclose(vectors(shard)[key], by_hand, rtol=1e-5, atol=1e-6, err_msg=key)
    assert [clip.seconds for clip in shard.clips] == [7, 5.5, 2, 15]  # before cropping


@pytest.mark.parametrize(("rate", "channels", "container"), [(8_000, 1, "WAV"), (44_100, 2, "FLAC"), (96_000, 6, "WAV")])
def test_clips_are_mixed_down_and_resampled_first(
    rate: int, channels: int, container: str, encoder: Encoder, tmp_path: Path
) -> None:
    signals = np.stack([sine(200 * (i + 1), 1.3, rate) for i in range(channels)], axis=1)
    path = write_shard(tmp_path / "a.tar", {"a": (encoded(signals, rate, container, "PCM_24"), 0)})
    ((shard,), _) = embedded(encoder, tmp_path / "store", path)
    at_16_khz = soxr.resample(signals.mean(axis=1), rate, RATE, quality="HQ")
    np.testing.assert_allclose(shard.pooled[0], pooled_by_hand(at_16_khz), rtol=1e-4, atol=1e-5)


def test_vectors_of_chunks_are_weighted_by_their_length(tmp_path: Path) -> None:
    """An encoder without frames gives one vector a chunk; the padding of a short one does not count."""
    clips = clips_of([0.5, 10, 12, 20.25])
    with load_encoder(write_model(tmp_path / "clip.onnx", clip_only=True), device="cpu", threads=2) as encoder:
        ((shard,), _) = embedded(encoder, tmp_path / "store", shard_of(tmp_path / "a.tar", clips))
    for key, samples in clips.items():
        chunks = [samples[start : start + CHUNK] for start in range(0, len(samples), CHUNK)]
        means = [frames_of(np.pad(chunk, (0, max(0, RATE - len(chunk))))).mean(axis=0) for chunk in chunks]
        by_hand = np.average(means, axis=0, weights=[len(chunk) for chunk in chunks])
        np.testing.assert_allclose(vectors(shard)[key][0], by_hand, rtol=1e-5, atol=1e-6, err_msg=key)


# ---------------------------------------------------------------- alone among neighbours

NEIGHBOURS = clips_of([0.5, 2, 1, 12, 3.3, 1])


def test_a_vector_does_not_depend_on_order_or_company(encoder: Encoder, tmp_path: Path) -> None:
    plain = shard_of(tmp_path / "plain.tar", NEIGHBOURS)
    backwards = shard_of(tmp_path / "backwards.tar", dict(reversed(NEIGHBOURS.items())))
    company = {"loud": sine(100, 3, amplitude=1.0), **NEIGHBOURS, "silent": np.zeros(RATE), "same": NEIGHBOURS["12 s"]}
    crowded = shard_of(tmp_path / "crowded.tar", company)
    alone = [shard_of(tmp_path / f"{i}.tar", {key: samples}) for i, (key, samples) in enumerate(NEIGHBOURS.items())]
    (first, *others), _ = embedded(encoder, tmp_path / "store", plain, backwards, crowded, *alone)
    expected = vectors(first)
    assert len({vector.tobytes() for vector in expected.values()}) == len(expected)
    assert_same(dict(reversed(vectors(others[0]).items())), expected)
    among = vectors(others[1])
    assert_same({key: among[key] for key in expected}, expected)
    assert among["same"].tobytes() == expected["12 s"].tobytes()
    assert_same({key: vector for shard in others[2:] for key, vector in vectors(shard).items()}, expected)


def test_threads_and_processes_change_no_bit(model: Path, tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a.tar", NEIGHBOURS)
    files = []
    for number, threads in enumerate((1, 2, 5)):
        with load_encoder(model, device="cpu", threads=threads) as encoder:
            embedded(encoder, tmp_path / f"{number}", path)
        files.append({file.name: file.read_bytes() for file in (tmp_path / f"{number}").glob("*/*")})
    assert len(files[0]) == 2
    assert files[0] == files[1] == files[2]


def _odd_wav(value: float) -> bytes:
    samples = noise(1)
    samples[700] = value
    return encoded(samples, subtype="FLOAT")


WAV = encoded(noise(1))
BROKEN: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "garbage": (clip_members("broken", np.random.default_rng(0).bytes(5_000), 0), "audio cannot be decoded"),
    "no bytes": (clip_members("broken", b"", 0), "audio cannot be decoded"),
    "no samples": (clip_members("broken", encoded(np.empty(0)), 0), "audio holds no samples"),
    "NaN": (clip_members("broken", _odd_wav(np.nan), 0), "NaN or infinite"),
    "infinity": (clip_members("broken", _odd_wav(-np.inf), 0), "NaN or infinite"),
    "a model's NaN": (clip_members("broken", encoded(np.full(RATE, -0.99)), 0), NOT_FINITE),
    "a model's NaN at the end": (clip_members("broken", encoded(np.r_[noise(11), np.full(RATE, -0.99)]), 0), NOT_FINITE),
    "a broken json": ([member("broken.wav", WAV), member("broken.json", b'{"label": ')], "its json cannot be read"),
    "a nested json": ([member("broken.wav", WAV), member("broken.json", b"[" * 100_000)], "its json cannot be read"),
    "a pickled json": ([member("broken.wav", WAV), member("broken.json", pickle.dumps(0))], "its json cannot be read"),
    "no json": ([member("broken.wav", WAV)], "no json beside its audio"),
    "no audio": ([member("broken.json", b"{}")], "no audio beside its json"),
    "a pickle for audio": ([member("broken.pyd", pickle.dumps(WAV)), member("broken.json", b"{}")], "no audio beside"),
    "a link": ([member("broken.wav", type=tarfile.SYMTYPE, linkname="1 s.wav"), member("broken.json", b"{}")], "a link"),
}


@pytest.mark.parametrize("crops", [WHOLE, CropSettings(5.0)], ids=["whole", "crops"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_clip_is_a_named_drop_and_changes_no_bit_of_its_neighbours(
    kind: str, crops: CropSettings, encoder: Encoder, tmp_path: Path
) -> None:
    members, reason = BROKEN[kind]
    whole = [clip_members(key, encoded(samples, subtype="FLOAT"), key) for key, samples in NEIGHBOURS.items()]
    healthy = [part for parts in whole for part in parts]
    without = write_tar(tmp_path / "without.tar", healthy)
    with_it = write_tar(tmp_path / "with.tar", [*healthy[:4], *members, *healthy[4:]])
    (first, second), _ = embedded(encoder, tmp_path / "store", without, with_it, crops=crops)
    assert_same(vectors(second), vectors(first))
    assert not first.drops
    (drop,) = second.drops
    assert drop.key == "broken"
    assert reason in drop.reason
    assert second.header.expected == len(NEIGHBOURS) + 1
    assert second.header.audio_seconds == first.header.audio_seconds
    assert second.header.damage is None


def test_a_shard_of_broken_clips_is_stored_as_that(encoder: Encoder, tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", {f"{i}": (b"broken", 0) for i in range(30)})
    ((shard,), _) = embedded(encoder, tmp_path / "store", path)
    assert shard.pooled.shape == (0, BANDS + 1)
    assert sorted(drop.key for drop in shard.drops) == sorted(map(str, range(30)))
    (_, reports) = embedded(encoder, tmp_path / "store", path)
    assert reports == []


def test_a_cut_shard_gives_its_whole_clips_and_says_that_it_is_cut(encoder: Encoder, tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a.tar", NEIGHBOURS)
    ((whole,), _) = embedded(encoder, tmp_path / "store", path)
    cut_at = index_shard(path).samples[3].audio
    os.truncate(path, cut_at.offset + cut_at.size // 2)
    ((cut,), _) = embedded(encoder, tmp_path / "store", path)
    assert_same(vectors(cut), {key: vectors(whole)[key] for key in list(NEIGHBOURS)[:3]})
    assert cut.drops == [Drop(list(NEIGHBOURS)[3], "the shard ends inside it")]
    assert "the shard ends inside member" in str(cut.header.damage)


def test_only_chosen_clips_are_embedded(encoder: Encoder, tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a.tar", NEIGHBOURS)
    ((whole,), _) = embedded(encoder, tmp_path / "store", path)
    for chosen in (["2 s", "12 s"], []):
        ((some,), reports) = embedded(encoder, tmp_path / "store", plan_of(path, chosen))
        assert_same(vectors(some), {key: vectors(whole)[key] for key in chosen})
        assert [report.clips for report in reports] == [len(chosen)]


def test_a_shard_that_changes_while_it_is_read_is_an_error(encoder: Encoder, tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a.tar", NEIGHBOURS)
    plan = plan_of(path)
    os.utime(path, ns=(0, 0))
    with pytest.raises(DataError, match=r"a\.tar changed while it was read; run again"):
        embedded(encoder, tmp_path / "store", plan)
    assert not list((tmp_path / "store").glob("*/*"))


@pytest.mark.parametrize(
    ("seconds_ahead", "group_seconds", "most"), [(900.0, 1.0, 5), (900.0, 3.0, 15), (1.0, 1.0, 2), (1.0, 3.0, 3)]
)
def test_decoding_runs_only_a_few_clips_ahead(
    encoder: Encoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds_ahead: float,
    group_seconds: float,
    most: int,
) -> None:
    """Else a shard of long clips would lie in memory as a whole; clips that are long wait one at a time."""
    monkeypatch.setattr(embed, "_SECONDS_AHEAD", seconds_ahead)
    monkeypatch.setattr(embed, "_GROUP_SECONDS", group_seconds)
    path = shard_of(tmp_path / "a.tar", {f"{i}": np.zeros(RATE) for i in range(60)})
    (spec,) = shard_specs(encoder, "mine", [plan_of(path)], WHOLE, Store(tmp_path), frames=False).values()
    decoded, lock, load = [0], threading.Lock(), audio.load

    def counting(*arguments: Any) -> tuple[audio.Waveform, float]:
        with lock:
            decoded[0] += 1
        return load(*arguments)

    monkeypatch.setattr(audio, "load", counting)
    ahead = []
    for taken, _ in enumerate(_Decoded(spec, index_shard(path).samples, RATE), start=1):
        time.sleep(0.002)
        ahead.append(decoded[0] - taken)
    assert len(ahead) == 60
    assert encoder.spec.threads == 2
    assert 1 <= max(ahead[5:]) <= most


def decoding(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Any, beat: Any = lambda: None
) -> tuple[list[str], list[Drop]]:
    """Keys that are decoded, and drops, of a shard of six clips of 1 s read with another decoder."""
    path = shard_of(tmp_path / "a.tar", {f"{i}": np.full(RATE, i / 10) for i in range(6)})
    (spec,) = shard_specs(encoder, "mine", [plan_of(path)], WHOLE, Store(tmp_path), frames=False).values()
    monkeypatch.setattr(audio, "load", load)
    decoded = _Decoded(spec, index_shard(path).samples, RATE, beat)
    return [job.tag[0].key for job in decoded], decoded.drops


def test_a_clip_that_takes_all_memory_is_a_named_drop(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = audio.load

    def greedy(*arguments: Any) -> tuple[audio.Waveform, float]:
        samples, seconds = load(*arguments)
        if samples[0] == np.float32(0.3):
            raise MemoryError
        return samples, seconds

    read, drops = decoding(encoder, tmp_path, monkeypatch, greedy)
    assert read == ["0", "1", "2", "4", "5"]
    assert drops == [Drop("3", "it needs more memory than there is")]


@pytest.mark.parametrize(("long_seconds", "together"), [(0.5, 1), (900.0, 2)])
def test_long_recordings_are_decoded_one_at_a_time(
    long_seconds: float, together: int, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audio, "LONG_SECONDS", long_seconds)
    monkeypatch.setattr(embed, "_GROUP_SECONDS", 1.0)
    resample, changed, at_once = audio.resample, threading.Condition(), [0, 0]

    def watched(*arguments: Any) -> audio.Waveform:
        with changed:
            at_once[0] += 1
            at_once[1] = max(at_once)
            changed.notify_all()
            changed.wait_for(lambda: at_once[1] >= together, timeout=100)
        time.sleep(0.05)
        with changed:
            at_once[0] -= 1
        return resample(*arguments)

    monkeypatch.setattr(audio, "resample", watched)
    assert len(decoding(encoder, tmp_path, monkeypatch, audio.load)[0]) == 6
    assert at_once[1] == together


def test_long_clips_after_short_ones_are_decoded_one_by_one(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group is as large as the clips before let expect; if it is longer, the rest of it waits."""
    lengths = [1, 1, 1, 1, 1, 1, 1, 30, 30, 30, 1, 1, 1]
    path = shard_of(tmp_path / "a.tar", {f"{i:02}": np.zeros(n * RATE) for i, n in enumerate(lengths)})
    (spec,) = shard_specs(encoder, "mine", [plan_of(path)], WHOLE, Store(tmp_path), frames=False).values()
    groups, decode = [], _Decoded._decode_group

    def watched(self: _Decoded, group: Any) -> Any:
        groups.append(outcomes := decode(self, group))
        return outcomes

    monkeypatch.setattr(_Decoded, "_decode_group", watched)
    decoded = _Decoded(spec, index_shard(path).samples, RATE)
    assert [job.tag[0].key for job in decoded] == [f"{i:02}" for i in range(len(lengths))]
    assert all(sum(clip[1] for clip in group[:-1]) < 10 for group in groups)
    assert max(len(group) for group in groups) > 1


def test_decoding_is_a_sign_of_life_for_a_while(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording of hours keeps a worker waiting; so does a decoder that spins, but not for ever."""
    monkeypatch.setattr(embed, "_DECODING_SECONDS", 2)
    monkeypatch.setattr(embed, "_GROUP_SECONDS", 1.0)
    monkeypatch.setattr(_Decoded, "_beat_sometimes", lambda self: None)
    load, beats, waited, decoded = audio.load, [0], threading.Event(), list[float]()

    def hurried(futures: list[Any], timeout: float) -> Any:
        """A second takes 50 ms once the third clip alone is waited for; each other one takes as long as it takes."""
        return wait(futures, timeout / 20 if len(decoded) >= 2 and not waited.is_set() else None)

    monkeypatch.setattr(embed, "wait", hurried)

    def slow(*arguments: Any) -> tuple[audio.Waveform, float]:
        samples, seconds = load(*arguments)
        if samples[0] == np.float32(0.2):
            waited.wait(100)
            time.sleep(0.3)
        decoded.append(float(samples[0]))
        return samples, seconds

    def beat() -> None:
        beats[0] += 1
        if beats[0] == 2:
            waited.set()

    assert len(decoding(encoder, tmp_path, monkeypatch, slow, beat)[0]) == 6
    assert beats[0] == 2


# ---------------------------------------------------------------- what is stored is not embedded again


def test_a_rerun_embeds_nothing_and_a_lost_file_only_its_shard(encoder: Encoder, tmp_path: Path) -> None:
    paths = [shard_of(tmp_path / f"{i}.tar", clips_of([1, 1.5 + i])) for i in range(4)]
    store = tmp_path / "store"
    first, reports = embedded(encoder, store, *paths)
    assert [report.clips for report in reports] == [2] * 4
    files = {file: file.read_bytes() for file in store.glob("*/*")}
    times = {file: file.stat().st_ctime_ns for file in store.glob("*/*.jsonl")}

    again, reports = embedded(encoder, store, *paths)
    assert reports == []
    assert {file: file.stat().st_ctime_ns for file in store.glob("*/*.jsonl")} == times
    for ours, theirs in zip(again, first, strict=True):
        assert_same(vectors(ours), vectors(theirs))

    for lost in sorted(files):
        lost.unlink()
        _, reports = embedded(encoder, store, *paths)
        assert [report.key for report in reports] == [lost.stem]
        assert {file: file.read_bytes() for file in store.glob("*/*")} == files


def test_the_same_content_under_another_name_is_stored_once(encoder: Encoder, tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a.tar", NEIGHBOURS)
    copy = tmp_path / "elsewhere.tar"
    copy.write_bytes(path.read_bytes())
    _, reports = embedded(encoder, tmp_path / "store", path)
    assert len(reports) == 1
    _, reports = embedded(encoder, tmp_path / "store", copy)
    assert reports == []


def test_progress_of_a_shard_grows(encoder: Encoder, tmp_path: Path) -> None:
    path = shard_of(tmp_path / "0.tar", {f"{n}": noise(0.1, n) for n in range(20)})
    seen: list[Any] = []
    embedded(encoder, tmp_path / "store", path, observer=seen.append)
    assert all(isinstance(event, Progress) and event.stage == "embed" and event.task == "mine" for event in seen)
    assert [event.done for event in seen] == sorted(event.done for event in seen)
    assert seen[0].done >= 1
    assert {event.total for event in seen} == {20}


def test_a_full_disk_stops_the_run_and_the_next_one_goes_on(encoder: Encoder, tmp_path: Path) -> None:
    # whose json is stored beside its vector: 60 kB a shard
    wordy = {f"{n}": (encoded(noise(0.1, n)), {"label": "x" * 6_000}) for n in range(10)}
    paths = [write_shard(tmp_path / f"{i}.tar", {**wordy, "own": (encoded(noise(0.1, 50 + i)), 0)}) for i in range(3)]
    expected, _ = embedded(encoder, tmp_path / "store", *paths)
    with small_disk(tmp_path / "small", kilobytes=128):
        with pytest.raises(DiskFullError, match="the disk is full while writing") as caught:
            embedded(encoder, tmp_path / "small", *paths)
        assert caught.value.exit_code == 5
        assert not list((tmp_path / "small").glob("*/*.part"))
        kept = [key for key, *_ in Store(tmp_path / "small").entries()]
        assert 0 < len(kept) < 3
        subprocess.run(["mount", "-o", "remount,size=1m", tmp_path / "small"], check=True)
        found, reports = embedded(encoder, tmp_path / "small", *paths)
        assert len(reports) == 3 - len(kept)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(vectors(ours), vectors(theirs))


def test_a_store_that_cannot_be_written_is_said(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(MachineError, match="cannot be written"):
        embedded(encoder, tmp_path / "store", shard_of(tmp_path / "a.tar", NEIGHBOURS))


# ---------------------------------------------------------------- the plan


def test_a_plan_counts_what_is_there_and_what_is_still_to_do(encoder: Encoder, tmp_path: Path) -> None:
    for part, seconds in (("train", [3] * 20), ("valid", [1.5] * 4), ("test", [2] * 8)):
        clips = {f"{n}": (encoded(noise(length, n)), {"label": "a"}) for n, length in enumerate(seconds)}
        write_shard(tmp_path / "mine" / f"{part}.tar", clips)
    store = Store(tmp_path / "store")

    def planned(toml: str, limit: int | None = None) -> Any:
        data = prepare(load_task(Path("t.toml"), toml), tmp_path, Digests(tmp_path / "cache"), limit, ignore)
        grant(encoder, [tmp_path])
        plan = make_plan(
            encoder, [(data, WHOLE)], store, protocol=Protocol("corrected"), seeds=1, mix=False, observer=ignore
        )
        assert plan.rtf > 0
        return plan.rows[0], plan.total

    row, total = planned(task_toml())
    assert (row.task, row.clips, row.clips_to_embed) == ("mine", 32, 32)
    assert row.hours * 3_600 == pytest.approx(60 + 6 + 16)
    assert row.disk_bytes > 32 * 4 * (BANDS + 1)
    assert row.embed_seconds > 0
    assert (total.clips, total.hours, total.train_seconds) == (32, row.hours, row.train_seconds)
    assert planned(task_toml(), limit=5)[0].clips == 5 + 4 + 5

    shared = task_toml(splits='splits = { train = "*.tar", test = "test.tar" }')
    assert planned(shared)[0].train_seconds == pytest.approx(5 * row.train_seconds)  # five folds of it

    embedded(encoder, tmp_path / "store", tmp_path / "mine" / "train.tar")
    row, _ = planned(task_toml())
    assert (row.clips, row.clips_to_embed) == (32, 12)
    embedded(encoder, tmp_path / "store", *(tmp_path / "mine" / f"{part}.tar" for part in ("valid", "test")))
    row, _ = planned(task_toml())
    assert (row.clips_to_embed, row.disk_bytes, row.embed_seconds) == (0, 0, 0)
