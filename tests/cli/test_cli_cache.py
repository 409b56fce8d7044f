"""The commands `cache` and `export`."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from cli_world import World, run, table
from corpus import write_encoder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def surroundings(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("XARES_ONNX_DATA", "XARES_ONNX_CACHE"):
        monkeypatch.setenv(name, world.environment[name])


@pytest.fixture
def cache(world: World, tmp_path: Path) -> Path:
    """A copy of a cache that holds two tasks by one model and one of them by another."""
    source = world.folder / "two models"
    if not source.exists():
        second = write_encoder(world.folder / "second.onnx", declare=False)
        for model, tasks in ((world.model, f"{world.good},{world.other}"), (str(second), world.good)):
            arguments = ["evaluate", model, "--tasks", tasks, "--method", "knn", "--quiet", "--cache", str(source)]
            assert run(*arguments, "--output", str(tmp_path / "r.json")) == (0, "", "")
    return Path(shutil.copytree(source, tmp_path / "cache"))


def stored(cache: Path) -> list[tuple[str, str, str]]:
    """(model, task, shards) as `cache list` shows them."""
    code, out, err = run("cache", "list", "--cache", str(cache))
    assert (code, err) == (0, "")
    assert f" in {cache / 'store'}" in out
    return [(row[0], row[2], row[3]) for row in table(out)]


ALL = [("bank.onnx", "good", "4"), ("bank.onnx", "other", "4"), ("second.onnx", "good", "4")]


def test_prune_without_a_choice_removes_only_leftovers(cache: Path) -> None:
    assert stored(cache) == ALL
    shard = next((cache / "store").rglob("*.safetensors"))
    leftover = shard.with_name(f"{shard.name}.0123abcd.part")
    young = shard.with_name(f"{shard.name}.4567abcd.part")
    leftover.write_bytes(b"x" * 2_000_000)
    young.write_bytes(b"x")
    os.utime(leftover, (0, 0))
    assert run("cache", "prune", "--cache", str(cache)) == (0, "removed 0 stored shards, freed 2.0 MB\n", "")
    assert not leftover.exists()
    assert young.exists()  # may belong to a run that goes on
    assert stored(cache) == ALL


def test_prune_by_model(cache: Path) -> None:
    assert run("cache", "prune", "--model", "second.onnx", "--cache", str(cache))[1].startswith("removed 4 stored shards")
    assert stored(cache) == ALL[:2]


def test_prune_by_age(cache: Path) -> None:
    for path in (cache / "store").rglob("*.safetensors"):
        header = json.loads(path.with_suffix(".jsonl").read_text().splitlines()[0])
        if header["task"] == "other":
            os.utime(path, (time.time() - 3 * 86_400,) * 2)
    assert run("cache", "prune", "--older-than", "4", "--cache", str(cache))[1].startswith("removed 0 ")
    narrowed = ["cache", "prune", "--older-than", "2", "--model", "second.onnx", "--cache", str(cache)]
    assert run(*narrowed)[1].startswith("removed 0 ")  # both must fit
    assert run("cache", "prune", "--older-than", "2", "--cache", str(cache))[1].startswith("removed 4 ")
    assert stored(cache) == [ALL[0], ALL[2]]


def test_prune_everything(cache: Path) -> None:
    assert run("cache", "prune", "--all", "--cache", str(cache))[1].startswith("removed 12 stored shards, freed 0.")
    assert stored(cache) == []
    assert not [path for path in (cache / "store").rglob("*") if path.is_file() and path.name != "CACHEDIR.TAG"]


def test_export_takes_a_factory_and_a_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["import torch", "def build():", "    module = torch.nn.Sequential(torch.nn.Unflatten(1, (1, -1)),"]
    lines += [
        "        torch.nn.Conv1d(1, 4, 400, 160), torch.nn.Flatten(2))",
        "    module.sample_rate = 16_000",
        "    return module",
    ]
    (tmp_path / "channels_first.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    code, out, err = run("export", "torch", "channels_first:build")
    assert (code, out) == (3, "")
    assert "do not grow evenly" in err
    code, out, err = run("export", "logmel", "--quantize", "int8-dynamic")
    assert (code, out) == (2, "")
    assert "no linear layers to quantise" in err
    assert run("export", "logmel", "--dtype", "half")[0] == 2
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".onnx"] == []


def test_an_8_bit_export_names_the_arithmetic_it_was_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["import torch", "class Build(torch.nn.Module):", "    sample_rate = 16_000", "    def __init__(self):"]
    lines += [
        "        super().__init__()",
        "        torch.manual_seed(1)",
        "        self.convolution, self.linear = torch.nn.Conv1d(1, 8, 400, 160), torch.nn.Linear(8, 4)",
        "    def forward(self, audio):",
        "        return self.linear(self.convolution(audio[:, None]).transpose(1, 2))",
    ]
    (tmp_path / "small.py").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    words = {"exact": "adds 8-bit products in 32 bits", "saturating": "in 16 bits (no VNNI)", "unknown": "does not tell"}
    for sums, phrase in words.items():
        monkeypatch.setattr("xares_onnx.exporters.core.pair_sums", lambda sums=sums: sums)
        code, out, err = run("export", "torch", "small:Build", "-o", "small.onnx", "--quantize", "int8-dynamic")
        assert (code, err) == (0, "")
        assert "batch sizes, measured on a processor that" in out
        assert phrase in out
    assert "measured on" not in run("export", "torch", "small:Build", "-o", "float.onnx")[1]


def test_export_then_evaluate(world: World, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    code, out, err = run("export", "logmel", "-o", str(tmp_path / "logmel.onnx"))
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'logmel.onnx'}: 0.")
    assert " M parameters, at most " in out
    assert (tmp_path / "logmel.onnx").exists()
    assert run("evaluate", str(tmp_path / "logmel.onnx"), "--tasks", world.good, "--method", "knn", "--quiet") == (0, "", "")
    assert [path.name.split("-")[0] for path in (tmp_path / "results").glob("*.json")] == ["logmel"]
