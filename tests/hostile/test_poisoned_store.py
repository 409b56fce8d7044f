"""A cache in which somebody has changed what is stored: it is made anew, said once, and never waited for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bounds import Outcome
from cli_world import run
from corpus import write_encoder, write_task, write_tones
from safetensors.numpy import load_file, save_file

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="needs pipes"),
    pytest.mark.usefixtures("shared_process"),
    pytest.mark.timeout(100),  # for a pipe that is waited for
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_encoder(folder / "bank.onnx")
    write_task(folder, "good")
    write_tones(folder / "data", "good", train=8, valid=4, test=4)
    assert scored(folder, folder / "cache").code == 0
    return folder


def scored(folder: Path, cache: Path) -> Outcome:
    where = ("--tasks", folder / "good.toml", "--data", folder / "data", "--cache", cache)
    arguments = ("evaluate", folder / "bank.onnx", *where, "--method", "knn", "--output", cache / "r.json")
    return Outcome(*run(*map(str, arguments)))


def score(cache: Path) -> object:
    return json.loads((cache / "r.json").read_text())["tasks"][0]["score"]


def pipes(ending: str) -> Callable[[Path], None]:
    def make(cache: Path) -> None:
        for path in list(cache.rglob(ending)):
            path.unlink()
            os.mkfifo(path)

    return make


def not_finite(cache: Path) -> None:
    for path in cache.rglob("*.safetensors"):
        arrays = load_file(path)
        save_file({**arrays, "pooled": np.full_like(arrays["pooled"], np.nan)}, path)


def nested(cache: Path) -> None:
    for path in cache.rglob("*.jsonl"):
        first, *_ = path.read_bytes().splitlines()
        path.write_bytes(first + b"\n" + b'{"clip":' + b"[" * 100_000 + b"\n")


def nested_header(cache: Path) -> None:
    for path in cache.rglob("*.jsonl"):
        path.write_bytes(b'{"store_version":' + b"[" * 100_000 + b"\n")


def contract(field: str, value: object) -> Callable[[Path], None]:
    def change(cache: Path) -> None:
        (path,) = (cache / "models").glob("*.json")
        info = json.loads(path.read_bytes())
        info["contract"][field] = value
        path.write_text(json.dumps(info))

    return change


@pytest.mark.parametrize(
    ("poison", "says"),
    [
        (pipes("*.jsonl"), None),
        (pipes("*.safetensors"), "were damaged or gone, and are made anew"),
        (not_finite, "were damaged or gone, and are made anew"),
        (nested, "were damaged or gone, and are made anew"),
        (nested_header, None),
        (pipes("*.json"), None),
        (contract("hop_samples", 1e-300), None),
        (contract("chunk_samples", 0), None),
        (contract("sample_rate", -5), None),
    ],
    ids=["rows are pipes", "tensors are pipes", "NaN", "nested rows", "nested header", "pipes", "hop", "chunk", "rate"],
)
def test_what_is_poisoned_is_made_anew(
    poison: Callable[[Path], None], says: str | None, world: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(world / "cache", cache)
    (cache / "r.json").unlink()
    poison(cache)
    outcome = scored(world, cache)
    assert outcome.code == 0, outcome.err
    assert score(cache) == score(world / "cache")
    assert says is None or outcome.err.count(says) == 1
