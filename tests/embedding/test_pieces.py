"""Shards in pieces: where they are cut, and that joined pieces are the bytes of a shard that was embedded at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from bank_model import write_model
from embedding_runs import grant
from hypothesis import given
from hypothesis import strategies as st
from shard_makers import RATE, clip_members, encoded, member, noise, write_shard, write_tar

from xares_onnx.data.audio import CropSettings
from xares_onnx.data.selection import ShardPlan
from xares_onnx.data.shards import file_digest, index_shard
from xares_onnx.embedding import joining
from xares_onnx.embedding.embed import EmbedSpec, ShardReport, embed_shard, shard_specs
from xares_onnx.embedding.joining import join_shard
from xares_onnx.embedding.pieces import Piece, cut, most_pieces
from xares_onnx.embedding.store import Store, prune
from xares_onnx.encoder.encoder import Encoder, load_encoder
from xares_onnx.errors import DataError, MachineError
from xares_onnx.files import stamp
from xares_onnx.progress import Event, Progress, ignore

# ---------------------------------------------------------------- the cut


@given(st.lists(st.integers(0, 500), max_size=60), st.integers(1, 400))
def test_pieces_hold_every_clip_once_in_order_and_about_as_many_bytes(sizes: list[int], piece_bytes: int) -> None:
    pieces = cut(sizes, piece_bytes)
    assert [number for piece in pieces for number in range(piece.first, piece.stop)] == list(range(len(sizes)))
    assert all(piece.first < piece.stop for piece in pieces) or pieces == [Piece(0, 0)]
    assert all(a.stop == b.first for a, b in pairwise(pieces))
    assert 1 <= len(pieces) <= most_pieces(sum(sizes), piece_bytes)
    assert all(sum(sizes[piece.first : piece.stop]) <= piece_bytes + max(sizes) for piece in pieces[: len(sizes)])
    assert len(pieces) == 1 or sum(sizes) > piece_bytes


def test_a_cut_by_hand() -> None:
    assert cut([10] * 6, 20) == [Piece(0, 2), Piece(2, 4), Piece(4, 6)]
    assert cut([10] * 6, 60) == cut([10] * 6, 99) == [Piece(0, 6)]
    assert cut([10] * 6, 59) == [Piece(0, 3), Piece(3, 6)]
    assert cut([50, 1, 1, 50], 20) == [Piece(0, 1), Piece(1, 2), Piece(2, 4)]  # by where a clip begins
    assert cut([], 20) == [Piece(0, 0)]


# ---------------------------------------------------------------- the join


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encoder]:
    with load_encoder(write_model(tmp_path_factory.mktemp("model") / "bank.onnx"), device="cpu", threads=2) as encoder:
        yield encoder


def shard_with_losses(path: Path) -> Path:
    """Nine clips, and the end cut off.

    Of one the model makes NaN, float16 cannot hold the frames of another, one is no audio, and the last has no json.
    """
    members = []
    for number in range(9):
        samples = 0.3 * noise(0.5 + 0.3 * (number % 4), seed=number).astype(np.float32)
        if number == 2:
            samples[:] = -0.95  # the model gives NaN
        if number == 4:
            samples = np.abs(samples) * np.float32(1e6)  # float16 would overflow
        data = b"no audio" if number == 7 else encoded(samples, subtype="FLOAT")
        members += clip_members(f"{number}", data, {"label": number})
    members.append(member("lost.wav", encoded(noise(0.5))))
    write_tar(path, members)
    path.write_bytes(path.read_bytes()[:-1024].rstrip(b"\0") + b"\0" * 100)  # cut off inside the last member's padding
    return path


def spec_of(encoder: Encoder, path: Path, store: Path, *, frames: bool, selected: frozenset[str] | None = None) -> EmbedSpec:
    plan = ShardPlan(path, file_digest(path), stamp(path), selected)
    return shard_specs(encoder, "t", [plan], CropSettings(0.6, "whole-crops"), Store(store), frames=frames)[path]


def pieces_of(spec: EmbedSpec, piece_bytes: int = 60_000) -> tuple[Piece, ...]:
    samples = [s for s in index_shard(spec.shard).samples if spec.selected is None or s.key in spec.selected]
    return tuple(cut([sample.audio.size for sample in samples], piece_bytes))


def call(encoder: Encoder, function: Callable[..., ShardReport], *arguments: Any, observer: Any = ignore) -> ShardReport:
    spec = arguments[0]
    grant(encoder, [spec.shard], Path(spec.store))
    return encoder.call(function, *arguments, returns=ShardReport, observer=observer)


def embed_pieces(encoder: Encoder, spec: EmbedSpec, pieces: tuple[Piece, ...]) -> None:
    for piece in pieces:
        call(encoder, embed_shard, msgspec.structs.replace(spec, piece=piece))


def files_of(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.rglob("*") if path.suffix in (".safetensors", ".jsonl", ".part")}


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize("selected", [None, frozenset("0234578")])
def test_joined_pieces_are_the_bytes_of_a_shard_embedded_at_once(
    frames: bool, selected: frozenset[str] | None, encoder: Encoder, tmp_path: Path
) -> None:
    path = shard_with_losses(tmp_path / "a.tar")
    whole, spec = (spec_of(encoder, path, tmp_path / name, frames=frames, selected=selected) for name in ("whole", "pieces"))
    call(encoder, embed_shard, whole)
    at_once = Store(tmp_path / "whole").read(whole.key())
    assert at_once is not None
    assert {drop.key for drop in at_once.drops} == ({"2", "7", "lost"} if selected is None else {"2", "7"})
    assert at_once.header.damage
    assert at_once.frames is None or at_once.frames.values.dtype == np.float32
    pieces = pieces_of(spec)
    assert len(pieces) > 3
    for piece in reversed(pieces):  # in any order
        report = call(encoder, embed_shard, msgspec.structs.replace(spec, piece=piece))
        assert report.key == piece.name(spec.key())
    assert Store(tmp_path / "pieces").pieces(spec.key()) == sorted(piece.name(spec.key()) for piece in pieces)
    report = call(encoder, join_shard, spec, pieces, False)
    assert (report.key, report.clips, report.audio_seconds) == (spec.key(), 0, 0.0)
    assert files_of(tmp_path / "pieces") == files_of(tmp_path / "whole")


def test_frames_of_float16_stay_float16(encoder: Encoder, tmp_path: Path) -> None:
    clips = {f"{n}": (encoded(0.3 * noise(0.5, seed=n)), {}) for n in range(6)}
    path = write_shard(tmp_path / "a.tar", clips)
    whole, spec = (spec_of(encoder, path, tmp_path / name, frames=True) for name in ("whole", "pieces"))
    call(encoder, embed_shard, whole)
    embed_pieces(encoder, spec, pieces_of(spec, 40_000))
    call(encoder, join_shard, spec, pieces_of(spec, 40_000), True)
    shard = Store(tmp_path / "pieces").read(spec.key())
    assert shard is not None
    assert shard.frames is not None
    assert shard.frames.values.dtype == np.float16
    assert files_of(tmp_path / "pieces") == files_of(tmp_path / "whole")


class Joinable:
    """A shard of nine clips with frames, its pieces, and the bytes that they must become."""

    def __init__(self, encoder: Encoder, folder: Path) -> None:
        path = shard_with_losses(folder / "a.tar")
        self.root = folder / "pieces"
        self.store = Store(self.root)
        whole, self.spec = (spec_of(encoder, path, folder / name, frames=True) for name in ("whole", "pieces"))
        self.pieces = pieces_of(self.spec)
        call(encoder, embed_shard, whole)
        self.expected = files_of(folder / "whole")
        embed_pieces(encoder, self.spec, self.pieces)

    def file(self, number: int, suffix: str = "safetensors") -> Path:
        name = self.pieces[number].name(self.spec.key())
        return self.root / name[:2] / f"{name}.{suffix}"

    def join(self, *, complete: bool, tell: Callable[..., None] = lambda event: None) -> ShardReport:
        return join_shard(self.spec, self.pieces, complete, tell=tell)


@pytest.fixture
def joinable(encoder: Encoder, tmp_path: Path) -> Joinable:
    return Joinable(encoder, tmp_path)


def test_pieces_that_others_still_embed_are_waited_for(joinable: Joinable) -> None:
    joinable.file(1).unlink()
    before = files_of(joinable.root)
    joinable.join(complete=False)
    assert files_of(joinable.root) == before


@pytest.mark.parametrize("fault", ["missing", "cut off", "without rows"])
def test_pieces_that_are_lacking_are_embedded_again(fault: str, joinable: Joinable, encoder: Encoder) -> None:
    one = joinable.file(0, "jsonl" if fault == "without rows" else "safetensors")
    if fault == "cut off":
        one.write_bytes(one.read_bytes()[:-50])
    else:
        one.unlink()
    events: list[Event] = []
    report = call(encoder, join_shard, joinable.spec, joinable.pieces, True, observer=events.append)
    assert report.clips == joinable.pieces[0].stop
    assert not any(isinstance(event, Progress) for event in events)  # its job has counted these clips
    assert files_of(joinable.root) == joinable.expected


def test_a_join_after_another_changes_nothing(joinable: Joinable) -> None:
    joinable.join(complete=True)
    assert files_of(joinable.root) == joinable.expected
    for complete in (True, False):
        assert joinable.join(complete=complete).clips == 0
        assert files_of(joinable.root) == joinable.expected


def test_two_joins_at_once_write_the_same(joinable: Joinable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have seen all pieces; one ends, and removes them, while the other reads."""
    copied = Store.copy_frames
    others: list[int] = []

    def overtaken(store: Store, *arguments: Any) -> None:
        if not others:
            others.append(1)
            joinable.join(complete=False)
            assert files_of(joinable.root).keys() >= joinable.expected.keys()
        copied(store, *arguments)

    monkeypatch.setattr(Store, "copy_frames", overtaken)
    joinable.join(complete=True)
    assert others
    assert files_of(joinable.root) == joinable.expected


def test_many_joins_at_once_write_the_same(joinable: Joinable) -> None:
    errors: list[BaseException] = []

    def join() -> None:
        try:
            joinable.join(complete=False)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=join) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert files_of(joinable.root) == joinable.expected


def test_pieces_that_vanish_again_and_again_end_the_join(joinable: Joinable, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*arguments: Any) -> None:
        raise joining.PieceGoneError

    monkeypatch.setattr(Store, "copy_frames", gone)
    with pytest.raises(MachineError, match=r"the pieces of a\.tar vanish from .*; run again"):
        joinable.join(complete=True)


def test_a_shard_that_changed_is_not_joined(joinable: Joinable) -> None:
    os.utime(joinable.spec.shard, (0, 0))
    with pytest.raises(DataError, match="changed while it was read"):
        joinable.join(complete=True)


def test_pruning_removes_pieces_that_are_joined_and_pieces_as_shards(joinable: Joinable) -> None:
    kept = files_of(joinable.root)
    assert prune(joinable.store) == (0, 0)
    for name in kept:
        os.utime(joinable.root / name[:2] / name, (0, 0))
    assert prune(joinable.store) == (0, 0)  # an unfinished shard's pieces are worth keeping
    assert files_of(joinable.root) == kept
    joinable.join(complete=True)
    for name, data in kept.items():  # the process was killed before it could remove them
        (joinable.root / name[:2] / name).write_bytes(data)
    assert prune(joinable.store) == (0, 0)  # another run may be at them
    for name in kept:
        os.utime(joinable.root / name[:2] / name, (0, 0))
    assert prune(joinable.store) == (0, sum(map(len, kept.values())))
    assert files_of(joinable.root) == joinable.expected
    for name, data in kept.items():
        (joinable.root / name[:2] / name).write_bytes(data)
    removed, _ = prune(joinable.store, model="bank.onnx")
    assert (removed, files_of(joinable.root)) == (1, {})


def test_a_clip_longer_than_a_piece_is_one(encoder: Encoder, tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", {"a": (encoded(noise(1.0)), {}), "b": (encoded(noise(6.0)), {})})
    spec = spec_of(encoder, path, tmp_path / "store", frames=False)
    pieces = pieces_of(spec, RATE)
    embed_pieces(encoder, spec, pieces)
    call(encoder, join_shard, spec, pieces, False)
    shard = Store(tmp_path / "store").read(spec.key())
    assert shard is not None
    assert [clip.key for clip in shard.clips] == ["a", "b"]
