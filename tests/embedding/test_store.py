"""The store: what is read is what was written, whole, or it is not there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from shard_makers import small_disk

from xares_onnx import files
from xares_onnx.data import audio
from xares_onnx.data.audio import CropSettings
from xares_onnx.data.shards import Drop
from xares_onnx.embedding import embed, store
from xares_onnx.embedding.embed import EmbedSpec
from xares_onnx.embedding.store import STORE_VERSION, Clip, EmbeddedShard, Header, Store, prune, store_key
from xares_onnx.encoder import spec as encoder_spec
from xares_onnx.encoder.contract.constants import Constant
from xares_onnx.encoder.contract.contract import Contract
from xares_onnx.encoder.contract.frontend import make_frontend
from xares_onnx.encoder.contract.tokens import Tokens
from xares_onnx.encoder.exposure import Exposure
from xares_onnx.encoder.model_file import ModelScan
from xares_onnx.encoder.session import CUDA
from xares_onnx.encoder.spec import EncoderInfo, ModelSpec, Tap
from xares_onnx.errors import DiskFullError, MachineError

KEY = "ab" + "0" * 38
HOUR, DAY = 3_600, 86_400

# Text that has broken one file format or another.
ODD = ("plain", "", "two\nlines", "\r\n", "\u2028\x85\x1c", '"}\\', "日本語", "\x00\x7f", '{"clip": 1}')


def shard(clips: int = 5, seed: int = 0, **header: Any) -> EmbeddedShard:
    """One crop for the first clip, two for the second, and so on."""
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(clips), np.arange(clips) + 1)
    drops = [Drop(f"drop {text}", f"reason {text}") for text in ODD]
    facts = {
        "store_version": STORE_VERSION,
        "model": "model.onnx",
        "model_sha256": "abcdef" * 10,
        "task": "mine",
        "shard": "a.tar",
        "expected": clips + len(drops),
        "damage": None,
        "audio_seconds": 1.5,
    }
    return EmbeddedShard(
        Header(**{**facts, **header}),
        rng.standard_normal((len(owners), 7)).astype(np.float32),
        owners.astype(np.int64),
        [Clip(f"clip {i} {text}", 0.1 * i, json.dumps({"label": text})) for i, text in zip(range(clips), ODD, strict=False)],
        drops,
    )


def assert_equal(found: EmbeddedShard | None, written: EmbeddedShard) -> None:
    assert found is not None
    assert (found.header, found.clips, found.drops) == (written.header, written.clips, written.drops)
    for ours, theirs in ((found.pooled, written.pooled), (found.clip_of_crop, written.clip_of_crop)):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def parts(root: Path) -> tuple[Path, Path]:
    """Tensors and rows of the only shard."""
    (tensors,), (rows,) = root.glob("*/*.safetensors"), root.glob("*/*.jsonl")
    return tensors, rows


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("clips", [0, 1, 5])
def test_what_is_written_is_read(clips: int, tmp_path: Path) -> None:
    written = shard(clips, damage="cut")
    ours = Store(tmp_path / "deep" / "store")
    assert KEY not in ours
    assert ours.read(KEY) is None
    ours.write(KEY, written)
    assert KEY in ours
    assert_equal(ours.read(KEY), written)
    assert_equal(Store(tmp_path / "deep" / "store").read(KEY), written)
    assert ours.read("cd" + KEY[2:]) is None


def test_writing_again_replaces(tmp_path: Path) -> None:
    ours = Store(tmp_path)
    ours.write(KEY, shard(3))
    ours.write(KEY, shard(2, seed=1))
    assert_equal(ours.read(KEY), shard(2, seed=1))
    assert len(list(tmp_path.glob("*/*"))) == 2


def test_a_listing_names_every_shard(tmp_path: Path) -> None:
    ours = Store(tmp_path)
    for number in range(3):
        ours.write(f"{number:040}", shard(number, shard=f"{number}.tar"))
    entries = list(ours.entries())
    assert [(key, header.shard) for key, header, *_ in entries] == [(f"{n:040}", f"{n}.tar") for n in range(3)]
    assert sum(size for _, _, size, _ in entries) == sum(path.stat().st_size for path in tmp_path.glob("*/*"))


# ---------------------------------------------------------------- damage


def test_a_shard_cut_anywhere_is_not_there(tmp_path: Path) -> None:
    ours, written = Store(tmp_path), shard()
    ours.write(KEY, written)
    for path in parts(tmp_path):
        whole = path.read_bytes()
        for cut in range(0, len(whole) - 1, 7):  # the last byte of the rows is a line's end
            path.write_bytes(whole[:cut])
            assert ours.read(KEY) is None, (path.suffix, cut)
        path.write_bytes(whole)
    assert_equal(ours.read(KEY), written)


def _line(number: int, change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        lines[number] = change(lines[number])
        return b"".join(lines)

    return changed


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: np.random.default_rng(0).bytes(len(data)), id="random"),
        pytest.param(lambda data: bytes(len(data)), id="zeros"),
        pytest.param(_line(2, lambda line: b""), id="a clip less"),
        pytest.param(_line(2, lambda line: line + line), id="a clip more"),
        pytest.param(_line(-1, lambda line: b""), id="a drop less"),
        pytest.param(_line(1, lambda line: b"5\n"), id="a number"),
        pytest.param(_line(1, lambda line: b"[1]\n"), id="a list"),
        pytest.param(_line(1, lambda line: b"{}\n"), id="nothing"),
        pytest.param(_line(1, lambda line: b'{"clip": {"key": 5}}\n'), id="another clip"),
        pytest.param(_line(1, lambda line: b"\xff" + line), id="not UTF-8"),
        pytest.param(_line(0, lambda line: b"{}\n"), id="another header"),
        pytest.param(lambda data: data.replace(b'"store_version":2', b'"store_version":1'), id="an older version"),
    ],
)
def test_damaged_rows_are_not_there_until_written_again(change: Callable[[bytes], bytes], tmp_path: Path) -> None:
    ours, written = Store(tmp_path), shard()
    ours.write(KEY, written)
    _, rows = parts(tmp_path)
    right = rows.read_bytes()
    assert change(right) != right
    rows.write_bytes(change(right))
    assert ours.read(KEY) is None
    ours.write(KEY, written)
    assert_equal(ours.read(KEY), written)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(shard(4), id="fewer crops"),
        pytest.param(replace(shard(), clip_of_crop=np.zeros(15, np.int64)), id="crops of one clip"),
        pytest.param(replace(shard(), clip_of_crop=shard().clip_of_crop + 1), id="a clip that there is not"),
        pytest.param(replace(shard(), pooled=shard().pooled[:-1]), id="a crop less"),
    ],
)
def test_tensors_that_do_not_fit_their_rows_are_not_there(other: EmbeddedShard, tmp_path: Path) -> None:
    ours = Store(tmp_path)
    ours.write(KEY, shard())
    _, rows = parts(tmp_path)
    right = rows.read_bytes()
    ours.write(KEY, other)
    rows.write_bytes(right)
    assert ours.read(KEY) is None


def test_one_part_alone_is_not_there(tmp_path: Path) -> None:
    ours = Store(tmp_path)
    for lost in (0, 1):
        ours.write(KEY, shard())
        parts(tmp_path)[lost].unlink()
        assert KEY not in ours
        assert ours.read(KEY) is None
        assert list(ours.entries()) == []


# ---------------------------------------------------------------- the name


def spec() -> EmbedSpec:
    contract = Contract(
        input="audio",
        input_layout="BT",
        lengths_input=None,
        output="embeddings",
        output_layout="BTD",
        dim=64,
        sample_rate=16_000,
        hop_samples=160,
        receptive_field_samples=400,
        first_frame_center_samples=200.0,
        min_samples=400,
        max_samples=None,
        chunk_samples=160_000,
        amplitude="unit",
        normalize="none",
        dynamic_batch=True,
        batch_coupled=False,
    )
    scan = ModelScan(sha256="a", bytes=1, parameters=1, external=(), metadata={}, producer="p", opset=17)
    info = EncoderInfo(path="m.onnx", scan=scan, contract=contract, provider="CPUExecutionProvider", onnxruntime="1.2.3")
    return EmbedSpec(
        model=ModelSpec(info, "auto", 2),
        task="mine",
        shard=Path("a.tar"),
        shard_digest="b",
        shard_stamp=("a.tar", 1, 2, 3, 4),
        crops=CropSettings(5.0),
        frames=False,
        selected=frozenset({"x", "y"}),
        store=Path("store"),
    )


# A path into the spec, and another value there. Together they name every field: a new one must be put on one side.
SHAPING: dict[str, Any] = {
    "model.info.scan.sha256": "c",
    "model.info.scan.integers": True,
    "model.info.provider": CUDA,
    "model.info.exposure": Exposure(("x",)),
    "model.info.onnxruntime": "1.2.4",
    "model.info.contract.input": "x",
    "model.info.contract.input_layout": "B1T",
    "model.info.contract.lengths_input": "lengths",
    "model.info.contract.output": "y",
    "model.info.contract.output_layout": "BDT",
    "model.info.contract.dim": 65,
    "model.info.contract.sample_rate": 8_000,
    "model.info.contract.hop_samples": 320,
    "model.info.contract.receptive_field_samples": 401,
    "model.info.contract.first_frame_center_samples": 200.5,
    "model.info.contract.min_samples": 401,
    "model.info.contract.max_samples": 160_000,
    "model.info.contract.chunk_samples": 80_000,
    "model.info.contract.amplitude": "int16",
    "model.info.contract.normalize": "zscore",
    "model.info.contract.dynamic_batch": False,
    "model.info.contract.batch_coupled": True,
    "model.info.contract.mask_input": "mask",
    "model.info.contract.fixed_batch": 4,
    "model.info.contract.window_frames": 100,
    "model.info.contract.frontend": make_frontend({"preset": "whisper"}, 16_000),
    "model.info.contract.constants": {"is_longer": Constant("tensor(bool)", (None, 1), (1, 1), (True,))},
    "model.info.contract.tokens": Tokens(2, 12),
    "crops.seconds": None,
    "crops.rule": "whole-crops",
    "crops.pad_short_clips": False,
    "frames": True,
    "crops.keep_padding": True,
    "shard_digest": "c",
    "selected": frozenset({"x"}),
}
NOT_SHAPING: dict[str, Any] = {
    "model.info.path": "elsewhere/n.onnx",
    "model.info.notes": ("said",),
    "model.info.batch_difference": 1e-6,
    "model.info.more_taps": (Tap("x", spec().model.info.contract),),
    "model.info.scan.bytes": 2,
    "model.info.scan.parameters": 2,
    "model.info.scan.external": ("w",),
    "model.info.scan.metadata": {"a": "b"},
    "model.info.scan.producer": "q",
    "model.info.scan.opset": 18,
    "model.info.contract.license": "MIT",
    "model.info.contract.source": "a paper",
    "model.info.contract.sources": {"dim": "measured"},
    "model.device": "cpu",
    "model.threads": 7,
    "model.stamp": ("m.onnx", 1, 2, 3, 4),
    "model.trust": True,
    "task": "yours",
    "shard": Path("elsewhere/b.tar"),
    "shard_stamp": ("b.tar", 5, 6, 7, 8),
    "store": Path("elsewhere"),
}


def changed(record: Any, path: str, value: Any) -> Any:
    name, _, rest = path.partition(".")
    assert getattr(record, name) != value
    return msgspec.structs.replace(record, **{name: changed(getattr(record, name), rest, value) if rest else value})


def leaves(record: Any, where: str = "") -> Iterator[str]:
    for name in record.__struct_fields__:
        value = getattr(record, name)
        yield from leaves(value, f"{where}{name}.") if isinstance(value, msgspec.Struct) else [where + name]


def test_every_field_is_known_to_shape_the_numbers_or_not() -> None:
    assert sorted(leaves(spec())) == sorted([*SHAPING, *NOT_SHAPING])


@pytest.mark.parametrize("path", SHAPING)
def test_what_shapes_the_numbers_changes_the_name(path: str) -> None:
    assert changed(spec(), path, SHAPING[path]).key() != spec().key()


@pytest.mark.parametrize("path", NOT_SHAPING)
def test_nothing_else_changes_the_name(path: str) -> None:
    assert changed(spec(), path, NOT_SHAPING[path]).key() == spec().key()


def test_how_the_processor_adds_bytes_names_quantised_models_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float model's name is the digest that it was before there was such a thing."""
    quantised = changed(spec(), "model.info.scan.integers", True)
    names = {}
    for sums in ("exact", "saturating", "unknown"):
        monkeypatch.setattr(embed.processor, "pair_sums", lambda sums=sums: sums)
        names[sums] = (spec().key(), quantised.key())
    assert len({name for name, _ in names.values()}) == 1
    assert len({name for _, name in names.values()}) == 3
    monkeypatch.setattr(embed.audio, "resampler_version", lambda: "soxr 1")
    monkeypatch.setattr(embed.audio, "decoder_version", lambda: "libsndfile 1")
    monkeypatch.setattr(store, "STORE_VERSION", 1)
    assert spec().key() == "2994eb07ae6472b015456a49d092a174b2c592e1"


def test_each_tap_has_a_name_of_its_own() -> None:
    layer = Tap("layer", changed(spec().model.info.contract, "output", "inside"))
    tapped = changed(spec(), "model.info.more_taps", (layer,))
    assert tapped.key(0) == spec().key()
    assert tapped.key(1) == changed(spec(), "model.info.contract.output", "inside").key()


def test_all_clips_by_name_are_not_all_clips() -> None:
    """A shard's choice is by key; None also keeps those that cannot be read."""
    assert changed(spec(), "selected", None).key() != spec().key()
    assert changed(spec(), "selected", frozenset()).key() != changed(spec(), "selected", None).key()


def test_providers_and_batches_change_the_name_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cuda = changed(spec(), "model.info.provider", CUDA)
    on_another = changed(spec(), "model.info.provider", "ROCMExecutionProvider")
    assert on_cuda.model.info.batching == on_another.model.info.batching != spec().model.info.batching
    assert on_cuda.key() != on_another.key()
    on_the_cpu = spec().key()
    for constant in ("GPU_BATCH", "_CALL_SECONDS", "_WINDOW_SECONDS"):
        before = on_cuda.key()
        with monkeypatch.context() as patched:
            patched.setattr(encoder_spec, constant, 8)
            assert on_cuda.key() != before
            assert spec().key() == on_the_cpu


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (audio.soxr, "__version__", "0"),
        (audio.soundfile, "__libsndfile_version__", "0"),
        (store, "STORE_VERSION", STORE_VERSION + 1),
        (embed.audio, "resampler_version", lambda: "soxr VHQ"),
    ],
)
def test_a_version_changes_the_name(module: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = spec().key()
    monkeypatch.setattr(module, name, value)
    assert spec().key() != before


def test_the_name_is_the_same_in_every_process() -> None:
    """Sets and dicts have an order of their own in each."""
    many = changed(spec(), "selected", frozenset(map(str, range(50))))
    again = changed(spec(), "selected", frozenset(map(str, reversed(range(50)))))
    assert many.key() == again.key()
    assert store_key({"b": [1], "a": None}) == store_key({"a": None, "b": [1]}) == "2de15135fb6c982efaaf60f4e5f9c861c51db0f2"


# ---------------------------------------------------------------- writers that are killed


def _killed_writer(root: Path, renames: int) -> None:
    """A process that writes a shard and is killed when it is about to rename for the (renames + 1)-th time."""
    script = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_store import KEY, Store, shard
rename, left = os.replace, [{renames}]
def replace(*paths):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    rename(*paths)
os.replace = replace
Store(Path({str(root)!r})).write(KEY, shard())
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -signal.SIGKILL


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("renames", [0, 1])
def test_what_a_killed_writer_leaves_is_not_read_and_goes_once_it_is_old(renames: int, tmp_path: Path) -> None:
    _killed_writer(tmp_path, renames)
    ours = Store(tmp_path)
    left = list(tmp_path.glob("*/*"))
    assert len(left) == renames + 1
    assert KEY not in ours
    assert ours.read(KEY) is None
    assert list(ours.entries()) == []
    assert ours.remove_leftovers() == 0  # their writer may be at work
    assert list(tmp_path.glob("*/*")) == left
    ours.write(KEY, shard())
    assert_equal(ours.read(KEY), shard())
    long_ago = time.time() - 2 * HOUR
    for path in tmp_path.glob("*/*"):
        os.utime(path, (long_ago, long_ago))
    assert ours.remove_leftovers() > 0
    assert sorted(tmp_path.glob("*/*")) == sorted(parts(tmp_path))
    assert_equal(ours.read(KEY), shard())


def test_old_orphans_are_leftovers(tmp_path: Path) -> None:
    ours = Store(tmp_path)
    ours.write(KEY, shard())
    tensors, rows = parts(tmp_path)
    tensors.unlink()
    os.utime(rows, (0, 0))
    size = rows.stat().st_size
    assert ours.remove_leftovers() == size
    assert not rows.exists()


def test_a_leftover_that_vanishes_meanwhile_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ab").mkdir()
    gone = tmp_path / "ab" / f"{KEY}.jsonl.0123.part"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [gone] if pattern == "*/*" else [])
    assert Store(tmp_path).remove_leftovers() == 0


# ---------------------------------------------------------------- disks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", [0, 1])
def test_a_full_disk_is_said_and_leaves_nothing(
    call: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > call:
            raise OSError(code, os.strerror(code))

    ours = Store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(
            DiskFullError, match=r"the disk is full while writing .*; free some space and run again"
        ) as caught:
            ours.write(KEY, shard())
    assert caught.value.exit_code == 5
    assert KEY not in ours
    assert ours.read(KEY) is None
    assert list(ours.entries()) == []
    assert not list(tmp_path.glob("*/*.part"))
    ours.write(KEY, shard())
    assert_equal(ours.read(KEY), shard())


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Store(tmp_path)
    ours.write(KEY, shard())

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DiskFullError):
        ours.write(KEY, shard(3))
    assert_equal(ours.read(KEY), shard())


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    ours, stored = Store(tmp_path / "small"), list[int]()

    def fill() -> None:
        for number in range(100):
            ours.write(f"{number:040}", shard(8, seed=number))
            stored.append(number)

    with small_disk(ours.root, kilobytes=64):
        with pytest.raises(DiskFullError):
            fill()
        assert stored
        assert not list(ours.root.glob("*/*.part"))
        assert [key for key, *_ in ours.entries()] == [f"{number:040}" for number in stored]
        assert_equal(ours.read(f"{0:040}"), shard(8))
        ours.remove(f"{0:040}")
        ours.write(f"{1:040}", shard(8, seed=1))


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(MachineError, match=r"cannot be written .* choose another place") as caught:
        Store(tmp_path / "store").write(KEY, shard())
    assert not isinstance(caught.value, DiskFullError)
    assert caught.value.exit_code == 5


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path).write(KEY, shard())
    assert not list(tmp_path.glob("*/*"))


# ---------------------------------------------------------------- two processes


def test_two_processes_may_write_the_same_shard(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from test_store import KEY, Store, shard
for _ in range(40):
    Store(Path({str(tmp_path)!r})).write(KEY, shard())
"""
    writers = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    ours, reads = Store(tmp_path), 0
    try:
        while any(writer.poll() is None for writer in writers):
            found = ours.read(KEY)
            assert found is not None or not reads  # once whole, always whole
            if found is not None:
                assert_equal(found, shard())
                reads += 1
    finally:
        codes = [writer.wait() for writer in writers]
    assert codes == [0, 0]
    assert reads
    assert len(list(tmp_path.glob("*/*"))) == 2


# ---------------------------------------------------------------- pruning

STORED = {"old": ("a.onnx", "aaa111", 40), "new": ("a.onnx", "aaa111", 2), "other": ("b.onnx", "bbb222", 40)}


@pytest.fixture
def filled(tmp_path: Path) -> Store:
    ours = Store(tmp_path)
    for name, (model, sha256, days) in STORED.items():
        ours.write(name, shard(2, model=model, model_sha256=sha256))
        used = time.time() - days * DAY
        os.utime(tmp_path / name[:2] / f"{name}.safetensors", (used, used))
    return ours


@pytest.mark.parametrize(
    ("chosen", "removed"),
    [
        ({}, set()),
        ({"older_than_days": 30}, {"old", "other"}),
        ({"older_than_days": 1}, {"old", "new", "other"}),
        ({"older_than_days": 50}, set()),
        ({"model": "a.onnx"}, {"old", "new"}),
        ({"model": "bbb"}, {"other"}),
        ({"model": "a"}, {"old", "new"}),
        ({"model": "c.onnx"}, set()),
        ({"model": "a.onnx", "older_than_days": 30}, {"old"}),
        ({"everything": True}, {"old", "new", "other"}),
    ],
)
def test_pruning_removes_what_is_chosen(chosen: dict[str, Any], removed: set[str], filled: Store) -> None:
    sizes = {key: size for key, _, size, _ in filled.entries()}
    assert prune(filled, **chosen) == (len(removed), sum(sizes[name] for name in removed))
    assert {name for name in STORED if filled.read(name) is not None} == set(STORED) - removed
    assert len(list(filled.root.glob("*/*"))) == 2 * len(set(STORED) - removed)


def test_use_postpones_pruning(filled: Store) -> None:
    filled.touch("old")
    filled.touch("none")
    prune(filled, older_than_days=30)
    assert {key for key, *_ in filled.entries()} == {"old", "new"}
