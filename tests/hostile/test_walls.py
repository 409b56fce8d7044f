"""The walls around a model's process, from inside: every way out in `escapes` is tried. `make escape` runs this file."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import escapes
import pytest
from check_models import sound
from cli_world import run
from onnx_models import encoder, save

from xares_onnx.encoder import walls, worker
from xares_onnx.encoder.encoder import open_encoder
from xares_onnx.encoder.spec import ModelOptions
from xares_onnx.encoder.walls import WALLS, Walls
from xares_onnx.encoder.worker import Worker
from xares_onnx.progress import Event, ignore

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in walls._CALLS, reason="walls are Linux's, by number"
)

SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "http_proxy", "OPENAI_API_KEY", "SSH_AUTH_SOCK", "ANYTHING")


class Prison(NamedTuple):
    """A process within walls, and the folder of its world: the model's, the data's, the store's and the user's home."""

    worker: Worker
    world: Path

    def attempt(self, name: str, *arguments: Path | int | str, in_thread: bool = False) -> str:
        plain = [argument if isinstance(argument, int) else str(argument) for argument in arguments]
        return self.call(escapes.attempt_in_thread if in_thread else escapes.attempt, name, *plain, returns=str)

    def call(self, function: Any, *arguments: Any, returns: Any) -> Any:
        return self.worker.call(function, *arguments, returns=returns, silence_limit=100.0, observer=ignore)


@pytest.fixture(scope="module")
def prison(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prison]:
    world = tmp_path_factory.mktemp("world")
    for name in ("home/.ssh", "models", "data", "elsewhere", "cache/store"):
        (world / name).mkdir(parents=True)
    for name in (
        "home/.ssh/id",
        "home/notes.txt",
        "models/model.onnx",
        "models/weights.bin",
        "elsewhere/a.tar",
        "elsewhere/b",
    ):
        (world / name).write_text("content")
    (world / "data/a.tar").symlink_to(world / "elsewhere/a.tar")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(world / "home"))
        for name in SECRETS:
            patch.setenv(name, "a-secret")
        reach = Walls(
            model=str(world / "models/model.onnx"),
            reads=(str(world / "data"), str(world / "cache")),
            writes=(str(world / "cache/store"),),
        )
        with Worker(reach) as own:
            imprisoned = Prison(own, world)
            imprisoned.attempt("nothing")
            yield imprisoned


def test_every_wall_stands(prison: Prison) -> None:
    assert prison.worker.standing == ("network", "programs", "writing", "reading")


@pytest.mark.parametrize("in_thread", [False, True], ids=["main thread", "another thread"])
@pytest.mark.parametrize("name", ["udp", "netlink", "io_uring"])
def test_the_network(name: str, in_thread: bool, prison: Prison) -> None:
    assert prison.attempt(name, in_thread=in_thread) == "PermissionError"


def test_a_server_of_this_machine(prison: Prison) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert prison.attempt("tcp", server.getsockname()[1]) == "PermissionError"


def test_a_socket_file(prison: Prison) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(prison.world / "cache/agent"))
        server.listen()
        assert prison.attempt("unix_socket", prison.world / "cache/agent") == "PermissionError"


@pytest.mark.parametrize("in_thread", [False, True], ids=["main thread", "another thread"])
@pytest.mark.parametrize(
    "name",
    [
        "run_program",
        "become_program",
        "spawn",
        "fork",
        "clone_by_hand",
        "fork_by_hand",
        "signal_parent",
        "signal_group",
        "signal_everyone",
        "limit_parent",
        "trace_parent",
        "read_parent_memory",
        "read_parent_environment",
        "take_parent_descriptor",
        "new_namespace",
        "keyring",
    ],
)
def test_programs_and_processes(name: str, in_thread: bool, prison: Prison) -> None:
    assert prison.attempt(name, in_thread=in_thread) == "PermissionError"


@pytest.mark.parametrize("in_thread", [False, True], ids=["main thread", "another thread"])
@pytest.mark.parametrize(
    "place", ["home/.bashrc", "home/.ssh/authorized_keys", "models/plugin.so", "data/b.tar", "cache/x", "x"]
)
@pytest.mark.parametrize("name", ["write", "append", "make_folder", "pipe"])
def test_new_files(name: str, place: str, in_thread: bool, prison: Prison) -> None:
    assert prison.attempt(name, prison.world / place, in_thread=in_thread) == "PermissionError"
    assert not (prison.world / place).exists()


@pytest.mark.parametrize(
    "place", ["home/notes.txt", "models/model.onnx", "models/weights.bin", "elsewhere/a.tar", "data/a.tar"]
)
@pytest.mark.parametrize("name", ["append", "remove", "empty", "mode", "owner", "times", "attribute"])
def test_files_of_others(name: str, place: str, prison: Prison) -> None:
    assert prison.attempt(name, prison.world / place) == "PermissionError"
    assert (prison.world / place).read_text() == "content"


@pytest.mark.parametrize("name", ["rename", "hard_link", "link"])
def test_files_brought_into_the_store(name: str, prison: Prison) -> None:
    assert prison.attempt(name, prison.world / "home/.ssh/id", prison.world / "cache/store/id") != "escaped"
    assert not (prison.world / "cache/store/id").is_symlink()
    assert not (prison.world / "cache/store/id").exists()


@pytest.mark.parametrize("name", ["read", "map_file"])
@pytest.mark.parametrize("place", ["home/.ssh/id", "home/notes.txt", "elsewhere/b"])
def test_private_files(name: str, place: str, prison: Prison) -> None:
    assert prison.attempt(name, prison.world / place) == "PermissionError"


@pytest.mark.parametrize("place", ["home", "elsewhere", "."])
def test_private_folders(place: str, prison: Prison) -> None:
    assert prison.attempt("list_folder", prison.world / place) == "PermissionError"
    assert prison.attempt("read", "/etc/passwd") == "PermissionError"


def test_no_secret_is_in_the_environment(prison: Prison) -> None:
    environment = prison.call(escapes.environment, returns=dict[str, str])
    assert "a-secret" not in str(environment)
    assert environment["HOME"] == str(prison.world / "home")


def test_what_is_printed_and_dumped_is_limited(prison: Prison) -> None:
    most = prison.call(escapes.limits, returns=dict[str, int])
    assert most["RLIMIT_CORE"] == 0
    assert 0 < most["RLIMIT_FSIZE"] < 1 << 40
    with Worker(Walls(reads=(), writes=())) as own:
        assert Prison(own, prison.world).call(escapes.limits, returns=dict[str, int])["RLIMIT_FSIZE"] < 1 << 30


# ---------------------------------------------------------------- what honest work needs


@pytest.mark.parametrize("in_thread", [False, True], ids=["main thread", "another thread"])
@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("nothing", []),
        ("read", ["models/model.onnx"]),
        ("read", ["models/weights.bin"]),
        ("map_file", ["data/a.tar"]),  # a link to a file elsewhere
        ("list_folder", ["data"]),
        ("store", ["cache/store"]),
    ],
)
def test_what_is_granted(name: str, places: list[str], in_thread: bool, prison: Prison) -> None:
    assert prison.attempt(name, *(prison.world / place for place in places), in_thread=in_thread) == "escaped"
    if name == "store":
        (prison.world / "cache/store/ab").rmdir()


def test_a_model_in_the_home_folder_gives_away_the_files_beside_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    for name in ("model.onnx", "model.onnx.data", ".netrc", ".ssh/id"):
        (tmp_path / name).write_text("content")
    with Worker(Walls(model=str(tmp_path / "model.onnx"), reads=(), writes=())) as own:
        inside = Prison(own, tmp_path)
        assert inside.attempt("read", tmp_path / "model.onnx") == "escaped"
        assert inside.attempt("read", tmp_path / "model.onnx.data") == "escaped"
        for name in (".netrc", ".ssh/id"):
            assert inside.attempt("read", tmp_path / name) == "PermissionError"
        assert inside.attempt("write", tmp_path / "planted") == "PermissionError"


def test_a_gpu_needs_more_but_no_network_and_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with Worker(Walls(model="model.onnx", reads=(), writes=(), gpu=True)) as own:
        inside = Prison(own, tmp_path)
        assert inside.attempt("read", "/etc/passwd") == "escaped"  # libraries of the driver may lie anywhere
        assert inside.attempt("write", "/dev/full") == "OSError"  # opened, and full
        for name in ("udp", "run_program", "fork", "read_parent_environment"):
            assert inside.attempt(name) == "PermissionError"
        assert inside.attempt("write", tmp_path / "planted") == "PermissionError"
        assert own.standing == ("network", "programs", "writing")


def test_the_process_of_heads_has_no_network_and_starts_no_program(head_process: Worker, tmp_path: Path) -> None:
    for name in ("udp", "run_program", "fork", "read_parent_memory"):
        assert Prison(head_process, tmp_path).attempt(name) == "PermissionError"


def test_an_encoder_runs_within_its_walls(tmp_path: Path) -> None:
    model = save(encoder(), tmp_path / "model.onnx")
    with open_encoder(model, ModelOptions(device="cpu")) as opened:
        assert opened.worker.standing == tuple(WALLS)
        assert Prison(opened.worker, tmp_path).attempt("write", tmp_path / "planted") == "PermissionError"


def test_check_says_which_walls_stand(tmp_path: Path) -> None:
    code, out, err = run("check", str(save(sound(), tmp_path / "model.onnx")), "--device", "cpu")
    assert code == 0, err
    assert f"walls: {'; '.join(WALLS.values())}" in " ".join(out.split())


# ---------------------------------------------------------------- systems that have fewer


def start_with(patch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let children run `patch` on the module `walls` before they raise theirs."""
    patched = worker._START.replace("; walls = ", f"; import xares_onnx.encoder.walls as module; {patch}; walls = ")
    assert patch in patched
    monkeypatch.setattr(worker, "_START", patched)
    monkeypatch.setattr(Worker, "_said", set())


@pytest.mark.parametrize(
    ("patch", "standing", "says"),
    [
        (
            "module.landlock_version = lambda libc: -1",
            ("network", "programs"),
            "no file is written outside the store, no file is",
        ),
        (
            "module._CREATE_RULESET = 9999",
            ("network", "programs"),
            "no file is written outside the store, no file is read but",
        ),
        ("module._FILTER = 99", ("writing", "reading"), "no network, no other program or process; run"),
        ("module._CALLS = {}", (), "no network, no other program or process, no file is written"),
    ],
    ids=["old kernel", "refused by a container", "without seccomp", "unknown processor"],
)
def test_what_is_missing_is_said_once(
    patch: str, standing: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_with(patch, monkeypatch)
    told: list[Event] = []
    for _ in range(2):
        with Worker(Walls(reads=(), writes=())) as own:
            own.call(escapes.limits, returns=dict[str, int], silence_limit=100.0, observer=told.append)
            assert own.standing == standing
    (note,) = told
    assert says in str(note)


@pytest.mark.parametrize("version", range(1, 8))
def test_older_versions_of_landlock(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_with(f"module.landlock_version = lambda libc: {version}", monkeypatch)
    (tmp_path / "granted").mkdir()
    with Worker(Walls(reads=(), writes=(str(tmp_path / "granted"),))) as own:
        inside = Prison(own, tmp_path)
        assert inside.attempt("store", tmp_path / "granted") == "escaped"
        assert inside.attempt("write", tmp_path / "planted") == "PermissionError"
        assert inside.attempt("read", "/etc/passwd") == "PermissionError"
        assert own.standing == tuple(WALLS)


def test_bytecode_that_only_a_child_uses_is_kept(tmp_path: Path) -> None:
    """Behind its walls a child cannot, and would compile the same modules every time."""
    code = (
        "from xares_onnx.encoder.worker import Worker; import escapes\n"
        "from xares_onnx.progress import ignore\n"
        "with Worker() as own: own.call(escapes.limits, returns=dict[str, int], silence_limit=None, observer=ignore)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    kept = {path.name.partition(".")[0] for path in tmp_path.rglob("*.pyc")}
    assert {"embed", "onnxruntime_inference_collection"} <= kept
