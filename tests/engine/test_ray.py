"""Evaluations on a Ray cluster of three nodes, which are processes of this machine; nodes, actors and encoders are lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cli_world import ROOT, START
from engine_world import EngineWorld, left

from xares_onnx.embedding import pieces
from xares_onnx.engine import ray as ray_engine
from xares_onnx.engine.cluster import present_nodes
from xares_onnx.errors import MachineError
from xares_onnx.progress import Event, Note, Progress

pytest.importorskip("ray", reason="Ray has no wheel for this platform")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # of Ray's own pipes to the nodes that it starts here


LOST = "died (SIGKILL)", "is gone (Actor"  # in notes on encoders and actors


class RayNodes:
    """A cluster whose nodes can be added and removed."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args=self.options("first"))

    @staticmethod
    def options(name: str) -> dict[str, Any]:
        return {"node_name": name, "num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 << 20}

    @property
    def address(self) -> str:
        return f"ray:{self.cluster.address}"

    def add(self, name: str, **options: Any) -> Any:
        return self.cluster.add_node(**self.options(name), **options)

    def remove(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)

    def runners(self) -> list[psutil.Process]:
        """The actors of every node."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline() and process.cmdline()[0].startswith("ray::_Runner"):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_USAGE_STATS_ENABLED")}
    os.environ |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)]),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    hook = sys.excepthook
    nodes = RayNodes()
    nodes.add("second")
    yield nodes
    nodes.cluster.shutdown()
    sys.excepthook = hook
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EngineWorld:
    return EngineWorld(tmp_path_factory.mktemp("world"), slow=True)


@pytest.fixture(scope="module")
def expected(world: EngineWorld) -> dict[str, Any]:
    """What one encoder of the local engine leaves."""
    world.run(world.folder / "local", trust=True)
    return left(world.folder / "local")


def while_embedding(act: Callable[[], object], *said: str) -> tuple[Callable[[Event], None], list[str]]:
    """An observer that acts in the middle of a shard, until it hears a note with one of some words; and its notes.

    What is lost between two jobs, as on a busy machine, costs nothing and is not spoken of. With no words it acts once.
    """
    notes: list[str] = []
    acted: list[object] = []

    def observer(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)
        heard = any(words in note for note in notes for words in said) if said else acted
        if isinstance(event, Progress) and event.stage == "embed" and 0 < event.done < event.total and not heard:
            acted.append(act())

    return observer, notes


def test_a_lost_node_costs_its_unfinished_shards_alone(
    nodes: RayNodes,
    world: EngineWorld,
    expected: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_engine, "_WATCH_SECONDS", 0.05)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 100_000)  # each shard is two
    third = nodes.add("third")

    def lose() -> None:
        nodes.remove(third)
        deadline = time.monotonic() + 100
        while any(node.name == "third" for node in present_nodes().values()) and time.monotonic() < deadline:
            time.sleep(0.05)

    observer, notes = while_embedding(lose)
    done = world.run(tmp_path, engine=nodes.address, trust=True, observer=observer)
    assert left(tmp_path) == expected
    machine = done.result.environment["machine"]
    assert (machine["engine"], machine["workers"]) == ("ray", 3)
    incidents = [note for note in notes if note.startswith(("node third is gone", "node third cannot start"))]
    assert incidents, notes
    assert set(incidents) <= set(machine["incidents"])
    assert capfd.readouterr().out == ""


def test_killed_encoders_and_actors_cost_time_alone(
    nodes: RayNodes, world: EngineWorld, expected: dict[str, Any], tmp_path: Path
) -> None:
    def kill() -> None:
        for number, actor in enumerate(nodes.runners()):
            for process in [actor] if number else actor.children():
                with contextlib.suppress(psutil.Error):  # it may end meanwhile
                    process.kill()

    observer, notes = while_embedding(kill, *LOST)
    world.run(tmp_path, engine=nodes.address, trust=True, observer=observer)
    assert left(tmp_path) == expected
    assert any(words in note for note in notes for words in LOST), notes
    deadline = time.monotonic() + 30
    while nodes.runners() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not nodes.runners()


def test_a_node_of_other_versions_is_refused(nodes: RayNodes, world: EngineWorld, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import soundfile; soundfile.__libsndfile_version__ = '1.0.20'\n")
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    older = nodes.add("older", env_vars={"PYTHONPATH": path})
    try:
        with pytest.raises(
            MachineError, match=r"node older has libsndfile 1\.0\.20 in place of .*install the same everywhere"
        ):
            world.run(tmp_path, engine=nodes.address, trust=True)
    finally:
        nodes.remove(older)


def test_a_node_that_does_not_see_the_folders_is_refused(nodes: RayNodes, world: EngineWorld, tmp_path: Path) -> None:
    """Its folders are hidden behind an empty one, in a mount namespace of its own."""
    if subprocess.run(["unshare", "--mount", "--map-root-user", "true"], capture_output=True).returncode:
        pytest.skip("this user may not unshare mounts")
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-name=blind", "--num-cpus=1"]
    command = f'mount -t tmpfs none "{hidden}" && exec "$@"'
    blind = subprocess.Popen(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", command, "sh", *start, f"--address={nodes.cluster.address}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while "blind" not in living(nodes) and time.monotonic() < deadline:
            time.sleep(0.2)
        with pytest.raises(MachineError, match=r"node blind does not see .*hidden/cache; put --cache on a folder"):
            world.run(hidden, engine=nodes.address, trust=True)
        shutil.copytree(world.data, hidden / "data")
        with pytest.raises(MachineError, match=r"node blind does not see .*hidden/data/.*first; put it on a folder"):
            world.run(tmp_path / "seen", engine=nodes.address, trust=True, data=hidden / "data")
    finally:
        blind.terminate()
        blind.wait()


def living(nodes: RayNodes) -> list[str]:
    return [node["NodeName"] for node in nodes.cluster.global_state.node_table() if node["Alive"]]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_leaves_no_process(
    number: int, code: int, nodes: RayNodes, world: EngineWorld, tmp_path: Path
) -> None:
    """Ctrl-C in a run that has joined a cluster; SIGTERM to one that has started its own."""
    engine = nodes.address if number == signal.SIGINT else "ray"
    tasks = ",".join(str(task) for task in world.tasks)
    arguments = ["evaluate", str(world.model), "--tasks", tasks, "--data", str(world.data), "--engine", engine]
    arguments += ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "r.json"), "--device", "cpu", "--trust"]
    command = [sys.executable, "-c", START, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    rows = tmp_path / "cache" / "store"
    while not list(rows.glob("*/*.safetensors")) and process.poll() is None:
        time.sleep(0.02)
    family = [*psutil.Process(process.pid).children(recursive=True), *nodes.runners()]
    if number == signal.SIGINT:  # as a terminal does: it reaches every process of the group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == code, err.decode()
    assert err.decode().splitlines()[-1].startswith("xares-onnx: interrupted; finished shards are stored")
    assert b"Traceback" not in err
    assert b"ray" not in out + err.lower().replace(b"xares", b"")
    assert psutil.wait_procs(family, timeout=30)[1] == []
