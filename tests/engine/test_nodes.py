"""Who may take part in a cluster's work, and how nodes are divided, without a cluster."""

from __future__ import annotations

import queue
import shutil
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_world import EngineWorld

from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.encoder.spec import EncoderInfo
from xares_onnx.engine import cluster, opening
from xares_onnx.engine import ray as ray_engine
from xares_onnx.engine.engine import Report, Resized, Told
from xares_onnx.engine.nodes import expectation, look, objection
from xares_onnx.engine.scheduler import Slots
from xares_onnx.engine.seats import Node, Seats, Shares
from xares_onnx.errors import UsageError
from xares_onnx.progress import Note


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EngineWorld:
    return EngineWorld(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def info(world: EngineWorld) -> EncoderInfo:
    with load_encoder(world.model, device="cpu") as encoder:
        return encoder.info


def test_a_node_that_is_like_the_driver_takes_part(world: EngineWorld, info: EncoderInfo, tmp_path: Path) -> None:
    with expectation(tmp_path, [world.data / "first", world.model], info) as expected:
        assert objection(expected, look(expected, "node")) is None
    assert not list((tmp_path / "nodes").iterdir())


def test_what_a_node_does_not_see(world: EngineWorld, info: EncoderInfo, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(world.data / "first", data)
    with expectation(tmp_path / "cache", [data, tmp_path / "none"], info) as expected:
        elsewhere = msgspec.structs.replace(expected, room=str(tmp_path / "other" / "nodes" / "x"))
        assert str(objection(expected, look(elsewhere, "node"))).startswith(
            f"does not see {tmp_path / 'cache'}; put --cache"
        )
        seen = look(expected, "node")
        (Path(expected.room) / "node").unlink()
        assert str(objection(expected, seen)).startswith("cannot write to")
        (data / "train0.tar").touch()
        assert str(objection(expected, look(expected, "node"))).startswith("sees other files, or other times")
        shutil.rmtree(data)
        assert str(objection(expected, look(expected, "node"))).startswith(f"does not see {data}; put it on")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"libsndfile": "1.0.20"}, "has libsndfile 1.0.20 in place of "),
        ({"8-bit products": "saturating"}, "has 8-bit products saturating in place of none"),
        ({"onnxruntime": "0", "onnxruntime-gpu": "0"}, "has onnxruntime"),
    ],
)
def test_what_a_node_has_otherwise(
    change: dict[str, str], words: str, world: EngineWorld, info: EncoderInfo, tmp_path: Path
) -> None:
    with expectation(tmp_path, [world.model], info) as expected:
        seen = look(expected, "node")
        other = msgspec.structs.replace(seen, versions=seen.versions | change)
        assert str(objection(expected, other)).startswith(words)
        without = msgspec.structs.replace(seen, providers=["OtherExecutionProvider"])
        assert str(objection(expected, without)).startswith("has an onnxruntime without CPUExecutionProvider")


@pytest.mark.parametrize(
    ("engine", "words"),
    [("rya", "must be local, ray"), ("ray:", "must be local, ray"), ("ray:ray://host:1", "sees no shared folder")],
)
def test_an_engine_that_there_is_not(engine: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        opening.check_engine(engine)


def test_ray_that_is_not_installed_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'xares-onnx\[ray\]'"):
        opening.check_engine("ray")
    opening.check_engine("local")


def test_nodes_that_come_and_go_change_the_slots(
    world: EngineWorld, info: EncoderInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = {name: node(name, cpus=1) for name in ("stays", "goes")}

    def examined(new: dict[str, Node], _: object) -> tuple[list[Node], dict[str, str]]:
        refusals = {"differs": "has libsndfile 1.0.20"} if "differs" in new else {}
        return [found for name, found in new.items() if name not in refusals], refusals

    monkeypatch.setattr(ray_engine, "present_nodes", lambda: dict(present))
    monkeypatch.setattr(ray_engine, "examined", examined)
    monkeypatch.setattr(ray_engine, "_WATCH_SECONDS", 0.01)
    reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
    job: Any = "job"
    with load_encoder(world.model, device="cpu") as encoder, expectation(tmp_path, [], info) as expected:
        engine = ray_engine.RayEngine(encoder, Shares(8, None, 0), expected)
        assert (engine.slots.encoders, engine.slots.heads) == (2, 2)
        watch = threading.Thread(target=engine._watch, args=(job, reports.put))
        watch.start()
        del present["goes"]
        assert reports.get(timeout=10) == Told(job, Note("node goes is gone; its unfinished jobs run elsewhere"))
        assert reports.get(timeout=10) == Resized(Slots(encoders=1, heads=1, heads_beside=1, memory=0.0))
        present["differs"] = node("differs", cpus=8)
        told = Told(job, Note("node differs is new and gets no work: it has libsndfile 1.0.20"))
        assert reports.get(timeout=10) == told
        present["new"] = node("new", cpus=16)
        assert reports.get(timeout=10) == Resized(Slots(encoders=3, heads=3, heads_beside=3, memory=0.0))
        engine._closing.set()
        watch.join()
    assert reports.empty()
    incidents = [
        "node goes is gone; its unfinished jobs run elsewhere",
        "node differs is new and gets no work: it has libsndfile 1.0.20",
    ]
    assert engine.described() == {"engine": "ray", "workers": 2, "incidents": incidents}


def node(name: str, cpus: int = 0, gpus: int = 0) -> Node:
    return Node(name, name, cpus, gpus, 0.0)


@pytest.mark.parametrize(
    ("shares", "present", "encoders", "heads", "threads"),
    [
        (Shares(8, None, 0), node("big", cpus=64), 8, 8, 8),
        (Shares(8, None, 0), node("small", cpus=2), 1, 1, 2),
        (Shares(8, None, 0), node("none", cpus=0, gpus=1), 0, 0, None),
        (Shares(8, None, 4), node("gpus", cpus=32, gpus=2), 8, 2, 4),
        (Shares(8, None, 4), node("cpu beside gpus", cpus=32), 0, 0, None),
    ],
)
def test_how_a_node_is_divided(shares: Shares, present: Node, encoders: int, heads: int, threads: int | None) -> None:
    seats = shares.of(present)
    assert [sum(seat.slot == slot for seat in seats) for slot in ("encoder", "head")] == [encoders, heads]
    assert {seat.threads for seat in seats} == ({threads} if threads else set())
    assert sum(seat.cpus for seat in seats) <= present.cpus
    assert sum(seat.gpus for seat in seats) <= present.gpus + 1e-9


def test_encoders_are_spread_over_nodes_up_to_their_number_and_replaced_by_spare_ones() -> None:
    shares, seats = Shares(1, 3, 0), Seats(3)
    for name in ("a", "b"):
        seats.add(shares.of(node(name, cpus=4)))
    assert seats.count("encoder") == 3
    taken = [seats.take("encoder") for _ in range(4)]
    assert taken[3] is None
    seats.drop(lambda seat: seat.node == "a")
    assert seats.count("encoder") == 3
    assert {seat.node for seat in seats.all} == {"b"}
    for seat in taken[:3]:
        assert seat is not None
        seats_of = seat.node
        before = len(seats.idle)
        seats.give(seat)
        assert len(seats.idle) - before == (seats_of == "b")
