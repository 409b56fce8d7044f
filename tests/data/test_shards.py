"""Shards, healthy and hostile: what is whole is read, every loss is named and counted, and nothing is ever unpickled.

The clips here are bytes that nobody decodes; the reader never looks into them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import random
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from shard_makers import clip_members, member, write_tar

from xares_onnx.data import shards
from xares_onnx.data.shards import (
    MAX_LABEL_BYTES,
    ShardIndex,
    file_digest,
    index_shard,
    parse_label,
    read_extent,
    read_label,
)
from xares_onnx.data.targets import ClassTarget
from xares_onnx.errors import ClipError, DataError, DataMissingError, LabelError

Member = tuple[tarfile.TarInfo, bytes]
BLOCK = tarfile.BLOCKSIZE
CLIPS = {f"clip{i}": (f"audio of {i} ".encode() * (20 * i + 1), {"label": "abc"[i % 3], "n": i}) for i in range(6)}

same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)


def header_read_by(reader: Any, block: bytes) -> Any:
    """What decides where a member lies and what it is, or the error."""
    try:
        header = reader.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return type(error), str(error)
    return header.name, header.size, header.type


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", ["ordner/ü.flac", f"{'p' * 99}/{'n' * 90}.json"])
def test_a_header_is_read_as_tarfile_reads_it_whichever_byte_is_damaged(name: str, form: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uname = 123_456, 0o640, 1_700_000_000, "someone"
    block = info.tobuf(form, "utf-8", "surrogateescape")[-BLOCK:]
    assert header_read_by(shards._Header, block) == header_read_by(tarfile.TarInfo, block)
    for at in range(BLOCK):
        for value in {0, 0x20, 0x37, 0xFF, block[at] ^ 1}:
            damaged = bytearray(block)
            damaged[at] = value
            for checksum in (block[148:156], b"%06o\0 " % tarfile.calc_chksums(damaged)[0]):  # type: ignore[attr-defined]
                damaged[148:156] = damaged[148:156] if 148 <= at < 156 else checksum
                content = bytes(damaged)
                assert header_read_by(shards._Header, content) == header_read_by(tarfile.TarInfo, content), (at, value)


def healthy() -> list[Member]:
    return [part for key, (audio, label) in CLIPS.items() for part in clip_members(key, audio, label)]


def contents(path: Path, index: ShardIndex | None = None) -> dict[str, tuple[bytes, Any]]:
    """What our reader gives for every sample."""
    index = index or index_shard(path)
    assert len({sample.key for sample in index.samples}) == len(index.samples)
    return {
        sample.key: (read_extent(path, sample.audio), json.loads(read_label(path, sample.label))) for sample in index.samples
    }


def drops(index: ShardIndex) -> list[tuple[str, str]]:
    assert index.expected == len(index.samples) + len(index.drops)
    return [(drop.key, drop.reason) for drop in index.drops]


# ---------------------------------------------------------------- healthy shards


def by_webdataset(path: Path) -> dict[str, tuple[bytes, Any]]:
    """What webdataset's own reader gives for every sample that has audio and a json."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from webdataset.tariterators import group_by_keys, tar_file_iterator

        with path.open("rb") as file:
            members = [{**found, "__url__": str(path)} for found in tar_file_iterator(file)]
            samples = list(group_by_keys(members))
    audio = [next((sample[kind] for kind in ("wav", "flac", "mp3") if kind in sample), None) for sample in samples]
    return {
        sample["__key__"]: (data, json.loads(sample["json"]))
        for sample, data in zip(samples, audio, strict=True)
        if data is not None and "json" in sample
    }


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_healthy_shard_reads_as_webdataset_reads_it(format: int, tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        [
            member("__notes__", b"webdataset's own"),
            member("__notes__/a.wav", b"webdataset's own"),
            *healthy(),
            member("folder", type=tarfile.DIRTYPE),
            *clip_members("folder/deep/clip", b"x" * BLOCK, {}),
            *clip_members("./dotted", b"", [{"onset": 1}]),
            *clip_members("Loud", b"1", {"label": "ä"}, extension="FLAC"),
            *reversed(clip_members("json first", b"2", 5, extension="mp3")),
            *clip_members("__init__clip", b"3", {}),
            member("clip with text.txt", b"not ours"),
            *clip_members("clip with text", b"4", None),
            member("._hidden.wav", b"what a Mac leaves"),
            member("._hidden.json", b"{}"),
            member(".wav", b"no name"),
            member(".json", b"{}"),
            member("no extension", b"x"),
            *clip_members("é" * 40 if format == tarfile.USTAR_FORMAT else "é" * 140, b"5", {}),
        ],
        format=format,
    )
    expected = by_webdataset(shard)
    assert len(expected) == len(CLIPS) + 7
    index = index_shard(shard)
    assert contents(shard, index) == expected
    assert drops(index) == []
    assert index.damage is None


keys = st.text("ab/_- é", min_size=1, max_size=8).filter(lambda key: not key.endswith("/"))


@same_folder
@given(clips=st.dictionaries(keys, st.binary(), max_size=8))
def test_any_keys_read_as_webdataset_reads_them(clips: dict[str, bytes], tmp_path: Path) -> None:
    parts = [part for key, data in clips.items() for part in clip_members(key, data, len(data))]
    shard = write_tar(tmp_path / "a.tar", parts)
    index = index_shard(shard)
    assert contents(shard, index) == by_webdataset(shard)
    assert index.damage is None
    assert not index.drops


def test_samples_come_in_the_order_of_the_shard(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [part for key in "dacb" for part in clip_members(key, b"", 0)])
    assert [sample.key for sample in index_shard(shard).samples] == list("dacb")


def test_members_of_a_clip_may_lie_apart(tmp_path: Path) -> None:
    audio, labels = healthy()[::2], healthy()[1::2]
    assert contents(write_tar(tmp_path / "a.tar", [*audio, *labels])) == CLIPS


def test_a_key_ends_at_the_last_dot(tmp_path: Path) -> None:
    parts = [part for i in range(3) for part in clip_members(f"genres.old/blues.{i:05}", b"%d" % i, i)]
    shard = write_tar(tmp_path / "a.tar", parts)
    assert contents(shard) == {f"genres.old/blues.{i:05}": (b"%d" % i, i) for i in range(3)}


def test_an_empty_tar_is_intact_and_has_no_samples(tmp_path: Path) -> None:
    assert index_shard(write_tar(tmp_path / "a.tar", [])) == ShardIndex()


# ---------------------------------------------------------------- cut and damaged


def _cuts(size: int) -> Iterator[int]:
    yield from range(0, size, 128)
    yield from (1, 511, 513, size - 1)


def test_wherever_a_shard_is_cut_its_whole_clips_are_read_and_the_rest_is_named(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "whole.tar", healthy(), format=tarfile.USTAR_FORMAT)
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        places = [(info.name.partition(".")[0], info.offset, info.offset_data, info.offset_data + info.size) for info in tar]
        end = tar.offset
    cut_shard = tmp_path / "cut.tar"
    for cut in _cuts(len(data)):
        cut_shard.write_bytes(data[:cut])
        index = index_shard(cut_shard)
        seen = {key for key, _, start, _ in places if start <= cut}
        cut_off = {key for key, _, _, stop in places if stop > cut}
        assert contents(cut_shard, index) == {key: CLIPS[key] for key in CLIPS if key in seen - cut_off}, cut
        assert {key for key, _ in drops(index)} == seen & cut_off, cut
        assert (index.damage is None) == (cut >= end + BLOCK), cut


def _damage(path: Path, name: str, damaged: Callable[[bytes], bytes]) -> int:
    """Damages the header of the member `name`; returns its place."""
    with tarfile.open(path) as tar:
        offset = tar.getmember(name).offset
    data = bytearray(path.read_bytes())
    data[offset : offset + BLOCK] = damaged(bytes(data[offset : offset + BLOCK]))
    path.write_bytes(data)
    return offset


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(lambda header: bytes(BLOCK), id="zeroed"),
        pytest.param(lambda header: bytes([header[0] ^ 1]) + header[1:], id="one bit"),
        pytest.param(lambda header: b"\xff" * BLOCK, id="all ones"),
        pytest.param(lambda header: header[: BLOCK // 2] + bytes(BLOCK // 2), id="its second half"),
    ],
)
@pytest.mark.parametrize("name", ["clip3.wav", "clip3.json"])
def test_a_damaged_header_is_reported_and_clips_before_it_are_kept(
    name: str, damaged: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    shard = write_tar(tmp_path / "a.tar", healthy(), format=tarfile.USTAR_FORMAT)
    offset = _damage(shard, name, damaged)
    index = index_shard(shard)
    assert contents(shard, index) == {key: CLIPS[key] for key in list(CLIPS)[:3]}
    assert drops(index) == ([("clip3", "no json beside its audio")] if name == "clip3.json" else [])
    assert index.damage == f"the tar is damaged at byte {offset}"


def test_clips_behind_an_end_mark_are_reported_as_damage(tmp_path: Path) -> None:
    first, second = (write_tar(tmp_path / name, clip_members(name, b"x", 1)) for name in ("a", "b"))
    both = tmp_path / "both.tar"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    index = index_shard(both)
    assert list(contents(both, index)) == ["a"]
    assert "damaged at byte" in str(index.damage)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "empty", id="empty file"),
        pytest.param(b"<html>404</html>", "not a plain tar", id="web page"),
        pytest.param(random.Random(0).randbytes(4_096), "not a plain tar", id="random bytes"),
        pytest.param(gzip.compress(bytes(10_240)), "not a plain tar", id="gz"),
    ],
)
def test_a_file_that_is_not_a_tar_is_damage(data: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    index = index_shard(path)
    assert index.expected == 0
    assert reason in str(index.damage)


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"none\.tar"):
        index_shard(tmp_path / "none.tar")
    with pytest.raises(DataError, match="cannot be read"):
        index_shard(tmp_path)


def _header(name: str, size: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = size
    return _with_checksum(header)


def _with_checksum(header: bytes | bytearray) -> bytes:
    header = bytearray(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.timeout(60)
def test_a_header_of_negative_size_ends_the_shard(tmp_path: Path) -> None:
    """Its data would end where the header before it starts, so that tarfile reads the two for ever."""
    whole = b"".join(info.tobuf() + data.ljust(BLOCK, b"\0") for info, data in clip_members("a", b"x", 1))
    back = b"\xff" + (-2 * BLOCK).to_bytes(11, "big", signed=True)
    shard = tmp_path / "a.tar"
    shard.write_bytes(whole + _header("b.wav", b"00000000000\0") + _header("c.wav", back) + bytes(2 * BLOCK))
    index = index_shard(shard)
    assert contents(shard, index) == {"a": (b"x", 1)}
    assert index.damage is not None


def test_a_header_of_absurd_size_is_reported_as_damage(tmp_path: Path) -> None:
    whole = b"".join(info.tobuf() + data.ljust(BLOCK, b"\0") for info, data in clip_members("a", b"x", 1))
    shard = tmp_path / "a.tar"
    shard.write_bytes(whole + _header("b.wav", b"\x80" + b"\xff" * 11) + bytes(2 * BLOCK))
    index = index_shard(shard)
    assert contents(shard, index) == {"a": (b"x", 1)}
    assert drops(index) == [("b", "the shard ends inside it")]
    assert index.damage is not None


SMALL = b"".join(info.tobuf() + data.ljust(BLOCK, b"\0") for key in "abc" for info, data in clip_members(key, b"x", 1))
flips = st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=6)


@same_folder
@given(flips=flips, checked=st.booleans(), length=st.integers(0, len(SMALL) + 2 * BLOCK))
@example(flips=[(156, ord("x"))], checked=True, length=len(SMALL))
@example(flips=[(156, ord("L"))], checked=True, length=len(SMALL))
@example(flips=[(156, ord("S")), (482, 1)], checked=True, length=len(SMALL))
def test_any_damage_is_reported_not_raised(flips: list[tuple[int, int]], checked: bool, length: int, tmp_path: Path) -> None:
    """Any bytes changed, checksums made good or not, cut anywhere: an answer, with extents inside of the file."""
    data = bytearray(SMALL + bytes(2 * BLOCK))
    for place, value in flips:
        data[place] = value
    if checked:
        for start in range(0, len(SMALL), 2 * BLOCK):
            data[start : start + BLOCK] = _with_checksum(data[start : start + BLOCK])
    shard = tmp_path / "a.tar"
    shard.write_bytes(data[:length])
    index = index_shard(shard)
    for sample in index.samples:
        for extent in (sample.audio, sample.label):
            assert 0 <= extent.offset <= extent.offset + extent.size <= length
    for key in [sample.key for sample in index.samples] + [drop.key for drop in index.drops]:
        assert key.isprintable()
        assert key.encode()


# ---------------------------------------------------------------- members that are not what they should be

link = {"type": tarfile.SYMTYPE, "linkname": "clip1.wav"}
LINK = "a link or a special file"


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        pytest.param([member("odd.wav", b"x")], "no json beside its audio", id="no json"),
        pytest.param([member("odd.json", b"{}")], "no audio beside its json", id="no audio"),
        pytest.param([member("odd.wav", **link), member("odd.json", b"{}")], LINK, id="linked audio"),
        pytest.param([member("odd.wav", b"x"), member("odd.json", **link)], LINK, id="linked json"),
        pytest.param([member("odd.wav", **{**link, "linkname": "/etc/passwd"}), member("odd.json", b"{}")], LINK, id="out"),
        pytest.param([member("odd.wav", **{**link, "type": tarfile.LNKTYPE}), member("odd.json", b"{}")], LINK, id="hard"),
        pytest.param([member("odd.wav", type=tarfile.FIFOTYPE), member("odd.json", b"{}")], LINK, id="a pipe"),
        pytest.param([member("odd.wav", type=tarfile.CHRTYPE), member("odd.json", b"{}")], LINK, id="a device"),
        pytest.param([member("odd.wav", b"x"), member("odd.json", b" " * (MAX_LABEL_BYTES + 1))], "larger than", id="large"),
    ],
)
def test_an_odd_clip_is_a_named_drop_between_healthy_neighbours(parts: list[Member], reason: str, tmp_path: Path) -> None:
    everything = healthy()
    shard = write_tar(tmp_path / "a.tar", [*everything[:4], *parts, *everything[4:]])
    index = index_shard(shard)
    assert contents(shard, index) == CLIPS
    ((key, found),) = drops(index)
    assert key == "odd"
    assert reason in found
    assert index.damage is None


@pytest.mark.parametrize("apart", [False, True])
def test_a_second_clip_of_the_same_key_is_a_named_drop(apart: bool, tmp_path: Path) -> None:
    twin = clip_members("clip2", b"another", {"label": "b"})
    parts = [*healthy(), *twin, *twin] if apart else [*healthy()[:6], *twin, *twin, *healthy()[6:]]
    shard = write_tar(tmp_path / "a.tar", parts)
    index = index_shard(shard)
    assert contents(shard, index) == CLIPS  # the first is kept, with its own json
    assert drops(index) == [("clip2", "a second clip with the same key")] * 2


def test_two_formats_of_one_clip_are_two_clips_of_one_key(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [member("a.wav", b"1"), member("a.flac", b"2"), member("a.json", b"3")])
    index = index_shard(shard)
    assert contents(shard, index) == {"a": (b"1", 3)}
    assert drops(index) == [("a", "a second clip with the same key")]


@pytest.mark.parametrize("name", ["../../escaped", "/absolute", "a/../../b", "C:\\windows"])
def test_a_name_that_leads_out_is_a_key_and_no_path(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "deeper"
    shard = write_tar(folder / "a.tar", clip_members(name, b"x", 1))
    before = sorted(tmp_path.rglob("*"))
    assert contents(shard) == {name: (b"x", 1)}
    assert sorted(tmp_path.rglob("*")) == before


class Trap:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    kinds = ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "ten", "cbor", "mp")
    parts = [
        *(member(f"clip{i}.{kind}", trap) for i, kind in enumerate(kinds)),
        *healthy(),
        *clip_members("trap", trap, 1),
        member("trapped json.wav", trap),
        member("trapped json.json", trap),
    ]
    shard = write_tar(tmp_path / "a.tar", parts)
    index = index_shard(shard)
    found = {sample.key: sample for sample in index.samples}
    assert list(found) == [*CLIPS, "trap", "trapped json"]  # other members are passed over
    assert read_extent(shard, found["trap"].audio) == trap
    with pytest.raises(ClipError, match="json cannot be read"):
        read_label(shard, found["trapped json"].label)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)  # the trap would have worked
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (b"caf\xe9", "caf\\udce9"),
        (b"\xff\xfe", "\\udcff\\udcfe"),
        (b"two\nlines", "two\\nlines"),
        (b"\x1b[2Jgone", "\\x1b[2Jgone"),
        ("ü\u202ertl".encode(), "ü\\u202ertl"),
        ("日本語 ä".encode(), "日本語 ä"),
    ],
)
def test_a_key_can_go_into_any_json_and_terminal(name: bytes, key: str, tmp_path: Path) -> None:
    odd = clip_members(name.decode("utf-8", "surrogateescape"), b"x", 1)
    shard = write_tar(tmp_path / "a.tar", [*odd, *healthy()], format=tarfile.GNU_FORMAT)
    assert contents(shard) == {key: (b"x", 1), **CLIPS}


# ---------------------------------------------------------------- labels


def _label(data: bytes, tmp_path: Path) -> str:
    shard = write_tar(tmp_path / "a.tar", [member("a.wav", b"x"), member("a.json", data)])
    (sample,) = index_shard(shard).samples
    return read_label(shard, sample.label)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"label": "a"}', {"label": "a"}),
        (b'\xef\xbb\xbf{"label": 1}', {"label": 1}),
        ('{"label": "ä"}'.encode("utf-16"), {"label": "ä"}),
        (b'{"label": 1, "label": 2}', {"label": 2}),
        (b'[{"onset": 1.5}]', {"events": [{"onset": 1.5}]}),
        (b"[]", {"events": []}),
        ('{"label": "\u2028\x85"}'.encode(), {"label": "\u2028\x85"}),
    ],
)
def test_json_is_read(data: bytes, value: Any, tmp_path: Path) -> None:
    text = _label(data, tmp_path)
    assert text.isascii()
    assert "\n" not in text
    assert parse_label(text) == value


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut"),
        pytest.param(b"{'label': 'a'}", id="python"),
        pytest.param(b"\xff\xfe\xfa", id="bytes"),
        pytest.param(b'{"label": "\xff"}', id="not UTF-8"),
        pytest.param(b'{"label": ' + b"9" * 5_000 + b"}", id="5,000 digits"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="nested lists"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="nested objects"),
    ],
)
def test_unreadable_json_raises_with_its_reason(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ClipError, match="its json cannot be read") as caught:
        _label(data, tmp_path)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"null", id="null"),
        pytest.param(b"5", id="number"),
        pytest.param(b'"a"', id="string"),
        pytest.param(b"NaN", id="NaN"),
        pytest.param(b"{}", id="no key"),
        pytest.param(b'{"label": NaN}', id="NaN label"),
        pytest.param(b'{"label": -Infinity}', id="infinite label"),
        pytest.param(b'{"label": 1e999}', id="overflowing label"),
        pytest.param(b'{"label": ' + b"9" * 4_000 + b"}", id="4,000 digits"),
        pytest.param(b'{"label": "\\ud800"}', id="lone surrogate"),
        pytest.param(b'{"label": "' + b"x" * 100_000 + b'"}', id="long"),
        pytest.param(b'{"label": ["a"]}', id="list label"),
        pytest.param(b'{"label": {"a": "a"}}', id="object label"),
    ],
)
def test_json_that_is_no_label_raises_with_its_reason(data: bytes, tmp_path: Path) -> None:
    text = _label(data, tmp_path)
    with pytest.raises(LabelError) as caught:
        ClassTarget("label", ("a", "b")).encode(parse_label(text))
    assert str(caught.value).encode()
    assert len(str(caught.value)) < 200


def test_json_nested_too_deeply_raises_with_its_reason() -> None:
    """A worker reads it near the bottom of its stack, so that it may pass there; whoever parses it again stands higher."""
    with pytest.raises(LabelError, match="nested too deeply"):
        parse_label("[" * 100_000 + "]" * 100_000)


# ---------------------------------------------------------------- bytes


def test_an_extent_is_read_exactly(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", clip_members("a", b"x" * 1_000_000, 1))
    (sample,) = index_shard(shard).samples
    assert read_extent(shard, sample.audio) == b"x" * 1_000_000
    with shard.open("r+b") as file:
        file.truncate(sample.audio.offset + 999_999)
    with pytest.raises(ClipError, match="the shard ends inside this clip"):
        read_extent(shard, sample.audio)
    shard.unlink()
    with pytest.raises(DataError, match=r"a\.tar cannot be read"):
        read_extent(shard, sample.audio)


def test_the_digest_is_sha256_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a"
    data = os.urandom(3_000_000)
    path.write_bytes(data)
    assert file_digest(path) == hashlib.sha256(data).hexdigest()
    with pytest.raises(DataMissingError, match="not there any more"):
        file_digest(tmp_path / "gone")
    with pytest.raises(DataError, match="cannot be read"):
        file_digest(tmp_path)


def test_members_are_streamed_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tarfile keeps every header it has seen: 1 kB each, for millions of clips."""
    kept: list[int] = []
    original = tarfile.TarFile.next
    monkeypatch.setattr(tarfile.TarFile, "next", lambda self: (kept.append(len(self.members)), original(self))[1])
    index_shard(write_tar(tmp_path / "a.tar", healthy()))
    assert len(kept) > 2 * len(CLIPS)
    assert max(kept) <= 1
