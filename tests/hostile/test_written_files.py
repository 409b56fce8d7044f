"""What is written, replaced and removed: only regular files, under names of our own, and never through a link."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_models as models
import pytest
from bounds import bounded, refused
from corpus import write_encoder, write_task, write_tones
from made_results import classes, saved

from xares_onnx import load_encoder
from xares_onnx.embedding.store import Store

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks, and needs links and pipes")
KEY = "ab" + "0" * 38


# ---------------------------------------------------------------- annotate


@pytest.mark.parametrize("location", [".ssh/authorized_keys", "conftest.py", "deep/er/.bashrc", "out.onnx.data"])
def test_annotate_writes_weights_under_a_name_of_its_own(location: str, tmp_path: Path) -> None:
    model = models.save_external(tmp_path / "from", location)
    (tmp_path / "home").mkdir()
    assert bounded("annotate", model, "--contract", "sample_rate=16000", "-o", tmp_path / "home/out.onnx").code == 0
    assert sorted(os.listdir(tmp_path / "home")) == ["out.onnx", "out.onnx.data"]
    signal = models.noise(16_000)
    with load_encoder(tmp_path / "home/out.onnx") as encoder:
        np.testing.assert_allclose(encoder.embed([signal], 16_000)[0].frames, models.embed(signal), atol=1e-5)


def test_annotate_joins_several_files_of_weights(tmp_path: Path) -> None:
    model, weights = models.with_external_weights(models.encoder(), "b.bin")
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "bias")
    (tmp_path / "from").mkdir()
    (tmp_path / "from/b.bin").write_bytes(weights)
    (tmp_path / "from/a.bin").write_bytes(b"\1" * 8 + bias.raw_data)
    models.make_external(bias, "a.bin")
    bias.external_data.add(key="offset", value="8")
    models.save(model, tmp_path / "from/model.onnx")
    (tmp_path / "to").mkdir()
    arguments = ("annotate", tmp_path / "from/model.onnx", "--contract", "sample_rate=16000", "-o", tmp_path / "to/out.onnx")
    for again in (False, True):  # the second finds its weights there
        assert bounded(*arguments).code == 0, again
        assert sorted(os.listdir(tmp_path / "to")) == ["out.onnx", "out.onnx.data"]
    signal = models.noise(16_000)
    with load_encoder(tmp_path / "to/out.onnx") as encoder:
        np.testing.assert_allclose(encoder.embed([signal], 16_000)[0].frames, models.embed(signal), atol=1e-5)


# ---------------------------------------------------------------- --output


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link(path: Path) -> None:
    (path.parent / "precious").write_text("precious")
    path.symlink_to("precious")


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 7))  # one like /dev/full; root may make it
    except PermissionError:
        pytest.skip("only root makes devices")


OUTPUTS = pytest.mark.parametrize(
    ("make", "says"),
    [(pipe, "is a pipe"), (link, "is a link"), (dangling, "is a link"), (device, "is a device")],
)


def unchanged(path: Path, make: Callable[[Path], None]) -> bool:
    kind = {pipe: stat.S_ISFIFO, link: stat.S_ISLNK, dangling: stat.S_ISLNK, device: stat.S_ISCHR}[make]
    return kind(path.lstat().st_mode)


@OUTPUTS
def test_a_report(make: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    result = saved(tmp_path / "r.json", {"esc50": classes({"test": np.ones((1, 8), bool)})})
    make(tmp_path / "out.md")
    refused(bounded("report", result, "-o", tmp_path / "out.md", seconds=20), 2, f"out.md {says}, which is never written")
    assert unchanged(tmp_path / "out.md", make)


@OUTPUTS
def test_a_copy_of_a_model(make: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    model = models.save(models.encoder(), tmp_path / "model.onnx")
    make(tmp_path / "out.onnx")
    outcome = bounded("annotate", model, "--contract", "license=MIT", "-o", tmp_path / "out.onnx", seconds=20)
    refused(outcome, 2, f"out.onnx {says}, which is never written")
    assert unchanged(tmp_path / "out.onnx", make)


@OUTPUTS
def test_weights_of_a_copy(make: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    model = models.save_external(tmp_path / "from")
    (tmp_path / "to").mkdir()
    make(tmp_path / "to/out.onnx.data")
    outcome = bounded("annotate", model, "--contract", "license=MIT", "-o", tmp_path / "to/out.onnx", seconds=40)
    refused(outcome, 2, f"out.onnx.data {says}, which is never written")
    assert unchanged(tmp_path / "to/out.onnx.data", make)
    assert not (tmp_path / "to/out.onnx").exists()


@pytest.mark.parametrize(("make", "says"), [(pipe, "is a pipe"), (link, "is a link")])
def test_an_evaluation(make: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    model, task = write_encoder(tmp_path / "bank.onnx"), write_task(tmp_path, "good")
    write_tones(tmp_path / "data", "good", train=8, valid=4, test=4)
    make(tmp_path / "out.json")
    arguments = ("evaluate", model, "--tasks", task, "--data", tmp_path / "data", "--cache", tmp_path / "cache", "--quiet")
    refused(bounded(*arguments, "--output", tmp_path / "out.json"), 2, f"out.json {says}, which is never written")
    assert unchanged(tmp_path / "out.json", make)
    assert not list((tmp_path / "cache/store").rglob("*.*"))  # refused before hours of work


# ---------------------------------------------------------------- the cache


def marked(root: Path) -> Store:
    store = Store(root)
    with store.spool(KEY, 1):
        pass
    return store


def aged(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("precious")
    os.utime(path, (0, 0))
    return path


def pruned(cache: Path) -> tuple[int, str]:
    outcome = bounded("cache", "prune", "--all", "--cache", cache, seconds=20)
    return outcome.code, outcome.err


def test_prune_does_not_follow_a_planted_link(tmp_path: Path) -> None:
    precious = [aged(tmp_path / "home/ab" / name) for name in ("notes.txt", f"{KEY}.jsonl", f"{KEY}.safetensors.part")]
    store = marked(tmp_path / "cache/store")
    (store.root / "ab").rmdir()
    (store.root / "ab").symlink_to(tmp_path / "home/ab")
    assert pruned(tmp_path / "cache") == (0, "")
    assert all(path.exists() for path in precious)
    (store.root / "ab").unlink()
    (store.root / "ab").mkdir()
    (store.root / "ab" / f"{KEY}.jsonl").symlink_to(precious[0])
    os.utime(store.root / "ab" / f"{KEY}.jsonl", (0, 0), follow_symlinks=False)
    assert pruned(tmp_path / "cache") == (0, "")
    assert precious[0].read_text() == "precious"


def test_prune_removes_nothing_from_a_folder_that_is_no_store(tmp_path: Path) -> None:
    precious = [aged(tmp_path / "project/store/src" / "main.c"), aged(tmp_path / "project/store/ab" / f"{KEY}.jsonl")]
    code, err = pruned(tmp_path / "project")
    assert code == 2
    assert "store is not marked as a store of embeddings, so nothing is removed from it" in err
    assert all(path.exists() for path in precious)


def test_prune_removes_nothing_through_a_store_that_is_a_link_to_a_folder(tmp_path: Path) -> None:
    precious = aged(tmp_path / "home/ab" / f"{KEY}.jsonl")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/store").symlink_to(tmp_path / "home")
    assert pruned(tmp_path / "cache")[0] == 2
    assert precious.exists()


@pytest.mark.parametrize(
    "name",
    [
        "ab/notes.txt",
        "ab/x.jsonl",
        "ab/x.safetensors",
        f"ab/{KEY}.txt",
        f"cd/{KEY}.jsonl",
        "src/main.c",
        f"ab/{KEY}.jsonl.ab.part",
    ],
)
def test_prune_removes_only_names_of_its_own(name: str, tmp_path: Path) -> None:
    store = marked(tmp_path / "cache/store")
    precious, leftover = aged(store.root / name), aged(store.root / "ab" / f"{KEY}.jsonl.01234567.part")
    assert pruned(tmp_path / "cache") == (0, "")
    assert precious.exists()
    assert not leftover.exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_prune_leaves_files_of_other_users(tmp_path: Path) -> None:
    store = marked(tmp_path / "cache/store")
    others = aged(store.root / "ab" / f"{KEY}.jsonl")
    os.chown(others, 12_345, 12_345)
    assert pruned(tmp_path / "cache") == (0, "")
    assert others.exists()


def test_folders_of_the_cache_are_for_their_user_alone(tmp_path: Path) -> None:
    store = marked(tmp_path / "a/cache/store")
    for folder in (store.root / "ab", store.root, store.root.parent, store.root.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_pipes_in_a_store_are_not_waited_for(tmp_path: Path) -> None:
    store = marked(tmp_path / "cache/store")
    for ending in ("jsonl", "safetensors"):
        os.mkfifo(store.root / "ab" / f"{KEY}.{ending}")
    assert bounded("cache", "list", "--cache", tmp_path / "cache", seconds=20).code == 0
    assert pruned(tmp_path / "cache") == (0, "")
    assert store.read(KEY) is None
