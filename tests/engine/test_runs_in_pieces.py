"""Evaluations of shards in pieces: the bytes that shards embedded at once leave, whoever embeds the pieces and dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine_world import SHARDS, EngineWorld, left

from xares_onnx.data.shards import index_shard
from xares_onnx.embedding import pieces
from xares_onnx.embedding.pieces import shard_of
from xares_onnx.embedding.store import Store
from xares_onnx.encoder.encoder import Encoder
from xares_onnx.engine.jobs import EmbedJob
from xares_onnx.engine.local import LocalEngine
from xares_onnx.evaluation.evaluation import plan
from xares_onnx.evaluation.filling import Part, embed
from xares_onnx.progress import Event, Progress

PIECE_BYTES = 50_000  # of shards with about 150,000 bytes of audio


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EngineWorld:
    return EngineWorld(tmp_path_factory.mktemp("world"), slow=True)


@pytest.fixture(scope="module")
def expected(world: EngineWorld) -> dict[str, Any]:
    """What a run leaves whose shards are small enough."""
    world.run(world.folder / "one", workers=1)
    return left(world.folder / "one")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[EmbedJob]:
    """The jobs on encoders that ran, with shards in pieces."""
    jobs: list[EmbedJob] = []
    start = LocalEngine.start

    def noted(engine: LocalEngine, job: Any, report: Any) -> None:
        if isinstance(job, EmbedJob):
            jobs.append(job)
        start(engine, job, report)

    monkeypatch.setattr(LocalEngine, "start", noted)
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE_BYTES)
    return jobs


@pytest.mark.parametrize("workers", [1, 2])
def test_pieces_leave_the_bytes_of_whole_shards(
    workers: int, world: EngineWorld, expected: dict[str, Any], tmp_path: Path, started: list[EmbedJob]
) -> None:
    told: list[Event] = []
    world.run(tmp_path, workers=workers, observer=told.append)
    assert left(tmp_path) == expected
    joins = [job for job in started if job.joins]
    assert len(joins) == SHARDS
    assert {len(job.joins) for job in joins} == {3, 4}
    assert sum(job.clips for job in started) == sum(len(job.joins) and job.joins[-1].stop for job in joins)
    for task in ("first", "second"):
        embedding = [e for e in told if isinstance(e, Progress) and (e.stage, e.task) == ("embed", task)]
        clips = sum(len(index_shard(path).samples) for path in (world.data / task).glob("*.tar"))
        assert {event.total for event in embedding} == {clips}
        counts = [event.done for event in embedding]
        assert counts == sorted(counts)
        assert counts[-1] == clips


RUN_IN_PIECES = f"""
from pathlib import Path
import sys
from xares_onnx.embedding import pieces
from xares_onnx.evaluation.filling import embed
pieces.PIECE_BYTES = {PIECE_BYTES}
model, data, cache, *tasks = sys.argv[1:]
embed(model, tasks, data=Path(data), cache=Path(cache), device="cpu", threads=1)
"""
# Read by every Python that starts with its folder on the path: the run's, and its worker's, which stores one piece of a
# shard and is then at the second for ever.
ONE_PIECE = """
import time
from xares_onnx.embedding.store import Store

write = Store.write

def write_and_wait(self, *what):
    write(self, *what)
    type(self).write = lambda *what: time.sleep(1000)

Store.write = write_and_wait
"""


def test_a_run_killed_in_the_second_piece_of_a_shard_goes_on_there(
    world: EngineWorld, expected: dict[str, Any], tmp_path: Path, started: list[EmbedJob]
) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(ONE_PIECE)
    arguments = [world.model, world.data, tmp_path / "cache", *world.tasks]
    run = subprocess.Popen(
        [sys.executable, "-c", RUN_IN_PIECES, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "hook"), *(path for path in sys.path if path)])},
    )
    rows = tmp_path / "cache" / "store"
    while not list(rows.glob("*/*.safetensors")) and run.poll() is None:
        time.sleep(0.02)
    family = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(signal.SIGKILL)
    run.wait()
    psutil.wait_procs(family, timeout=30)
    (stored,) = (path.name.removesuffix(".safetensors") for path in rows.glob("*/*.safetensors"))
    assert stored != shard_of(stored)
    counts: list[int] = []

    def observer(event: Event) -> None:
        if isinstance(event, Progress) and (event.stage, event.task) == ("embed", "first"):
            counts.append(event.done)

    header = Store(rows).header(stored)
    assert header is not None
    world.run(tmp_path, observer=observer)
    assert left(tmp_path) == expected
    assert counts[0] == header.expected
    keys = [job.key for job in started]
    assert stored not in keys
    assert len(keys) == len(set(keys))
    joined = next(job for job in started if job.key == shard_of(stored))
    assert {piece.name(joined.key) for piece in joined.joins} - set(keys) == {stored}


def test_parts_share_the_pieces_of_a_shard(
    world: EngineWorld, expected: dict[str, Any], tmp_path: Path, started: list[EmbedJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [str(task) for task in world.tasks]
    owners: dict[str, set[int]] = {}
    weights = []
    for number in (2, 4, 1, 3):
        started.clear()
        embed(world.model, tasks, part=Part(number, 4), data=world.data, cache=tmp_path / "cache", device="cpu", threads=1)
        weights.append(sum(job.weight for job in started if not job.joins))
        for job in started:
            owners.setdefault(shard_of(job.key), set()).add(number)
    assert max(weights) < 1.5 * sum(weights) / 4
    assert any(len(parts) > 1 for parts in owners.values())
    assert max(map(len, owners.values())) <= 3  # a shard that both tasks have may be in two places

    def fails(*arguments: object) -> None:
        raise AssertionError("the model is called again")

    monkeypatch.setattr(Encoder, "call", fails)
    world.run(tmp_path)
    assert left(tmp_path) == expected


def test_what_a_part_leaves_is_not_planned_again(world: EngineWorld, tmp_path: Path, started: list[EmbedJob]) -> None:
    tasks = [str(world.tasks[0])]
    arguments: dict[str, Any] = {"data": world.data, "cache": tmp_path / "cache", "device": "cpu", "threads": 1}
    before = plan(world.model, tasks, **arguments).total
    embed(world.model, tasks, part=Part(1, 5), **arguments)
    clips = sum(job.clips for job in started)
    after = plan(world.model, tasks, **arguments).total
    assert clips > 0
    assert before.clips_to_embed - after.clips_to_embed == clips
    assert after.embed_seconds > 0
    assert 0 < after.disk_bytes < before.disk_bytes


def test_a_few_chosen_clips_are_one_piece(world: EngineWorld, tmp_path: Path, started: list[EmbedJob]) -> None:
    world.run(tmp_path, limit=2)
    assert started
    assert not any(job.joins or job.spec.piece for job in started)


def test_a_joined_shard_that_is_damaged_is_embedded_again(
    world: EngineWorld, expected: dict[str, Any], tmp_path: Path, started: list[EmbedJob]
) -> None:
    world.run(tmp_path)
    started.clear()
    store = sorted((tmp_path / "cache" / "store").glob("*/*.safetensors"))
    store[0].write_bytes(store[0].read_bytes()[:50])  # its header, which planning reads, is whole
    counts: list[int] = []

    def observer(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "embed":
            counts.append(event.total - event.done)

    world.run(tmp_path, observer=observer)
    assert left(tmp_path) == expected
    assert {shard_of(job.key) for job in started} == {store[0].stem}
    assert len(started) > 3
    assert min(counts) == 0
