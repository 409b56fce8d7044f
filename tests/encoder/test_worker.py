"""The process for a stranger's model: it can be killed, it ends with its parent, and what it says is checked."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_models as models
import psutil
import pytest
import worker_calls as calls

from xares_onnx import errors, load_encoder
from xares_onnx.encoder import limits, worker
from xares_onnx.encoder.worker import Array, Worker
from xares_onnx.errors import MachineError, ModelError, ModelLimitError, UsageError, XaresError
from xares_onnx.progress import Event, Note, Progress, ignore

ROOT = Path(__file__).parents[2]
PATIENCE = 100.0  # seconds: far longer than anything here takes, on a busy machine too


@pytest.fixture(scope="module")
def warm() -> Iterator[Worker]:
    """One worker for the tests that leave it alive."""
    with Worker() as shared:
        yield shared


@pytest.fixture
def fresh() -> Iterator[Worker]:
    with Worker() as own:
        yield own


def call(
    worker: Worker, function: Any, *arguments: Any, returns: Any = int, limit: float = PATIENCE, observer: Any = ignore
) -> Any:
    return worker.call(function, *arguments, returns=returns, silence_limit=limit, observer=observer)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


# ---------------------------------------------------------------- calls and answers


def test_calls_run_one_after_another_in_one_process(warm: Worker) -> None:
    assert call(warm, calls.add, 1, 2) == 3
    assert call(warm, calls.pid) == call(warm, calls.pid) != os.getpid()


def test_calls_from_many_threads_get_their_own_answers(warm: Worker) -> None:
    told: list[list[Event]] = [[] for _ in range(20)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: call(warm, calls.speak, 4 * i, 0.001, observer=told[i].append), range(20)))
    assert answers == [4 * i for i in range(20)]
    assert [len(heard) for heard in told] == [2 * i for i in range(20)]


@pytest.mark.parametrize(
    ("kind", "shape"), [("<f4", (3, 5)), ("<f2", (0, 4)), ("<f8", (2, 3, 4)), ("<i8", ()), (">f4", (7,))]
)
def test_arrays_come_back_bit_by_bit(warm: Worker, kind: str, shape: tuple[int, ...]) -> None:
    result = call(warm, calls.array, kind, shape, returns=Array).numpy()
    expected = np.arange(np.prod(shape)).reshape(shape).astype(kind).T
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(result, expected)
    result[...] = 0  # it is the caller's own


def test_a_large_answer(warm: Worker) -> None:
    result = call(warm, calls.array, "<f4", (5_000_000,), returns=Array).numpy()
    assert result[-1] == 4_999_999


def test_observer_hears_notes_and_progress(warm: Worker) -> None:
    told: list[Event] = []
    assert call(warm, calls.speak, 4, 0.0, observer=told.append) == 4
    assert told == [Note("still here"), Progress("embed", "task", 1, 2)]


def test_what_is_printed_does_not_reach_the_channel(warm: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(warm, calls.print_everywhere, returns=str) == "heard"
    assert call(warm, calls.add, 1, 1) == 2
    assert capfd.readouterr() == ("", "")


def test_what_is_printed_is_shown_for_debugging(
    fresh: Worker, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XARES_ONNX_DEBUG", "1")
    assert call(fresh, calls.print_everywhere, returns=str) == "heard"
    fresh.close()
    out, err = capfd.readouterr()
    assert out == ""
    assert {"from Python", "to stderr", "from the system", "from C"} >= set(err.split("\n")) - {""} >= {"from the system"}


@pytest.mark.parametrize("name", ["ContractError", "UsageError", "DataMissingError", "DiskFullError", "ModelLimitError"])
def test_errors_come_back_as_their_class(warm: Worker, name: str) -> None:
    with pytest.raises(XaresError, match=r"^it is so$") as caught:
        call(warm, calls.fail, name, "it is so")
    assert type(caught.value) is getattr(errors, name)
    assert call(warm, calls.add, 1, 1) == 2


def test_what_an_error_is_about_comes_back_with_it(warm: Worker) -> None:
    with pytest.raises(errors.ContradictionError, match="it is so") as caught:
        call(warm, calls.fail_about, "hop_samples")
    assert caught.value.about == "hop_samples"


@pytest.mark.parametrize("name", ["ValueError", "KeyError", "ClipError", "SystemExit"])
def test_any_other_error_is_our_fault_and_shows_where(warm: Worker, name: str) -> None:
    with pytest.raises(XaresError, match=f"(?s)Traceback.*worker_calls.*{name}.*nonsense") as caught:
        call(warm, calls.fail, name, "nonsense")
    assert type(caught.value) is XaresError
    assert caught.value.exit_code == 70
    assert call(warm, calls.add, 1, 1) == 2


@pytest.mark.parametrize("name", ["difflib", "nearest", "Iterable", "ClipError", "__name__", "SystemExit", ""])
def test_a_child_can_raise_nothing_but_our_errors(name: str) -> None:
    assert type(worker._error(worker._Failed(name, "text"))) is XaresError


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(("function", "doing"), [(calls.sleep_for_ever, "sleeping"), (calls.spin_for_ever, "spinning")])
def test_a_silent_call_is_killed_within_its_limit(fresh: Worker, function: Any, doing: str) -> None:
    pid = call(fresh, calls.pid)
    with pytest.raises(ModelLimitError, match=f"no sign of life for 1 s while {doing} and was stopped") as caught:
        call(fresh, function, limit=1.0)
    assert caught.value.exit_code == 3
    assert gone(pid)
    assert call(fresh, calls.add, 1, 2) == 3
    assert call(fresh, calls.pid) != pid


def test_any_message_is_a_sign_of_life(warm: Worker) -> None:
    assert call(warm, calls.speak, 12, 0.25, limit=2.5) == 12


def test_patience_that_was_asked_for_ends_with_what_it_was_for(fresh: Worker) -> None:
    call(fresh, calls.pid)  # it takes a while to start
    assert call(fresh, calls.wait_patiently, 3.0, 0.0, limit=1.5) == 1
    with pytest.raises(ModelLimitError, match=r"no sign of life for 1\.5 s while running"):
        call(fresh, calls.wait_patiently, 0.0, 20.0, limit=1.5)


def test_a_crash_leaves_no_core_file(fresh: Worker) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard == 0:
        pytest.skip("no process here may leave one")
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    try:
        assert call(fresh, calls.core_limit) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


@pytest.mark.parametrize(
    ("model", "doing"),
    [(models.endless_loop, "measuring the model"), (lambda: models.nested_functions(15), "loading the model")],
)
def test_models_that_never_end_are_stopped(
    model: Any, doing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared_process: None
) -> None:
    path = models.save(model(), tmp_path / "model.onnx")
    with load_encoder(models.save(models.encoder(), tmp_path / "quick.onnx")) as quick:
        pid = call(quick.worker, calls.pid)  # it has started, so a silence is the model's
    monkeypatch.setattr(limits, "SILENCE_SECONDS", 2.0)
    with pytest.raises(ModelLimitError, match=f"no sign of life for 2 s while {doing} and was stopped; if you trust"):
        load_encoder(path)
    assert gone(pid)


def test_a_model_that_hangs_on_one_clip_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, loud = np.zeros(16_000), np.full(16_000, 2.0)
    with load_encoder(models.save(models.endless_loop(above=1.5), tmp_path / "model.onnx")) as encoder:
        expected = encoder.embed([quiet], 16_000)[0].frames
        monkeypatch.setattr(limits, "SILENCE_SECONDS", 1.0)
        with pytest.raises(ModelLimitError, match=r"no sign of life for 1 s while running the model and was stopped"):
            encoder.embed([quiet, loud], 16_000)
        monkeypatch.undo()
        np.testing.assert_array_equal(encoder.embed([quiet], 16_000)[0].frames, expected)


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("exit", ModelError, "the model's process died (exit code 7) while working"),
        ("SIGSEGV", ModelError, "the model's process died (SIGSEGV) while working"),
        ("SIGTERM", ModelError, "the model's process died (SIGTERM) while working"),
        ("SIGKILL", ModelLimitError, "the model's process died (SIGKILL) while working; it may need more memory"),
        ("SIGABRT", ModelLimitError, "the model's process died (SIGABRT) while working; it may need more memory"),
        ("bad_alloc", ModelLimitError, "the model's process died (exit code 1) while working; it may need more memory"),
    ],
)
def test_a_crash_is_reported(fresh: Worker, how: str, error: type[Exception], says: str) -> None:
    with pytest.raises(ModelError, match=re.escape(says)) as caught:
        call(fresh, calls.end, how)
    assert type(caught.value) is error
    assert call(fresh, calls.add, 1, 2) == 3


def test_memory_is_limited_and_the_process_survives(fresh: Worker) -> None:
    given = 1 << 30
    with pytest.raises(ModelLimitError, match="ran out of the memory it may use"):
        call(fresh, calls.ask_for_memory, 2 << 30, 3 << 30)
    assert call(fresh, calls.ask_for_memory, 6 << 30, given) == given  # a later call may be given more
    with pytest.raises(ModelLimitError):
        call(fresh, calls.ask_for_memory, 1 << 30, given)


def test_a_child_that_answers_nonsense(fresh: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_DEATH_SECONDS", 0.3)
    pid = call(fresh, calls.pid)
    with pytest.raises(ModelError, match="sent a malformed reply while talking and was stopped"):
        call(fresh, calls.write_nonsense)
    assert gone(pid)
    assert call(fresh, calls.add, 1, 2) == 3


def test_a_child_that_cannot_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no module named anything' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with Worker() as own, pytest.raises(MachineError, match="a worker process could not start: no module named anything"):
        call(own, calls.add, 1, 2)


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize("error", [KeyboardInterrupt, UsageError, BrokenPipeError, ZeroDivisionError])
def test_an_interrupted_call_leaves_nothing_for_the_next(fresh: Worker, error: type[BaseException]) -> None:
    def interrupt(_: Event) -> None:
        raise error

    pid = call(fresh, calls.pid)
    with pytest.raises(error):
        call(fresh, calls.note_then_wait, returns=str, observer=interrupt)
    assert gone(pid)
    assert call(fresh, calls.add, 1, 2) == 3


def test_ctrl_c_is_left_to_the_parent(fresh: Worker) -> None:
    pid = call(fresh, calls.pid)
    os.kill(pid, signal.SIGINT)
    assert call(fresh, calls.pid) == pid


def test_a_child_that_died_between_two_calls_is_replaced(fresh: Worker) -> None:
    pid = call(fresh, calls.pid)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: fresh._process is None or fresh._process.poll() is not None)
    assert call(fresh, calls.pid) != pid


def test_a_call_that_cannot_be_sent_harms_nothing(warm: Worker) -> None:
    pid = call(warm, calls.pid)
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        call(warm, calls.add, threading.Lock(), 1)
    assert call(warm, calls.pid) == pid


def test_close_kills_and_frees_everything(fresh: Worker) -> None:
    descriptors = psutil.Process().num_fds()
    for _ in range(2):
        pid = call(fresh, calls.pid)
        assert psutil.Process().num_fds() > descriptors
        fresh.close()
        assert gone(pid)
        assert psutil.Process().num_fds() == descriptors
    fresh.close()


def test_a_forgotten_worker_is_closed() -> None:
    forgotten = Worker()
    pid = call(forgotten, calls.pid)
    del forgotten
    assert gone(pid)


PARENT = """
import functools, sys, time
from worker_calls import *
from xares_onnx import load_encoder
from xares_onnx.encoder.worker import Worker

def ready(event):
    print("ready", flush=True)

call = functools.partial(Worker().call, returns=int, silence_limit=1000, observer=ready)
match sys.argv[1]:
    case "idle": call(say_and_return)
    case "asleep": call(sleep_for_ever)
    case "busy": call(spin_for_ever)
    case "in a model": ready(None), load_encoder("endless.onnx")
time.sleep(1000)
"""


@pytest.mark.parametrize("state", ["idle", "asleep", "busy", "in a model"])
def test_the_child_ends_when_its_parent_is_killed(state: str, tmp_path: Path) -> None:
    models.save(models.endless_loop(), tmp_path / "endless.onnx")
    children: list[psutil.Process] = []
    with run_python("-c", PARENT, state, cwd=tmp_path) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"ready\n"
            wait_until(lambda: children.extend(psutil.Process(parent.pid).children()) or children)
            if state == "in a model":  # starting and loading take less
                wait_until(lambda: children[0].cpu_times().user > 1.5)
            assert not gone(children[0].pid)
        finally:
            parent.kill()
    try:
        wait_until(lambda: gone(children[0].pid))
    finally:
        for child in children:
            if child.is_running():
                child.kill()


# ---------------------------------------------------------------- in other people's programs


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests/encoder")))}


def run_python(*arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("closing", ["", "encoder.close()", "del encoder"])
def test_a_script_without_a_main_guard(closing: str, tmp_path: Path) -> None:
    models.save(models.encoder(), tmp_path / "model.onnx")
    (tmp_path / "script.py").write_text(
        f"""
from xares_onnx import load_encoder
print("started")
encoder = load_encoder("model.onnx")
print(encoder.embed([[0.0] * 16_000], 16_000)[0].frames.shape)
{closing}
"""
    )
    with run_python("script.py", cwd=tmp_path) as process:
        out, err = process.communicate(timeout=200)
    assert (out.decode().splitlines(), err.decode(), process.returncode) == (["started", "(98, 4)"], "", 0)


def test_modules_lying_in_the_working_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("msgspec", "numpy", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    with Worker() as own:
        assert call(own, calls.add, 1, 2) == 3


HEAVY = {"torch", "onnxruntime", "sklearn"}


def imports_of(*arguments: str) -> set[str]:
    """Top-level packages that a Python command imports."""
    command = [sys.executable, "-X", "importtime", *arguments]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=True)
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}


@pytest.mark.parametrize(
    "arguments", [("-c", "import xares_onnx"), ("-m", "xares_onnx", "--help"), ("-m", "xares_onnx", "--version")]
)
def test_nothing_heavy_is_imported(arguments: tuple[str, ...]) -> None:
    imported = imports_of(*arguments)
    assert "xares_onnx" in imported
    assert not HEAVY & imported


def test_the_test_for_heavy_imports_works() -> None:
    assert imports_of("-c", "import onnxruntime, sklearn") & HEAVY == {"onnxruntime", "sklearn"}


def test_nothing_heavy_is_imported_by_a_remembered_encoder(tmp_path: Path) -> None:
    """A rerun that finds everything in the store must not wait for ONNX Runtime."""
    path = models.save(models.encoder(), tmp_path / "model.onnx")
    options = f"{str(path)!r}, cache=Path({str(tmp_path / 'cache')!r})"
    load_encoder(path, cache=tmp_path / "cache").close()
    script = f"from pathlib import Path; from xares_onnx import load_encoder; load_encoder({options})"
    assert not HEAVY & imports_of("-c", script)


def test_the_model_runs_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the protobuf of a stranger is parsed in this process."""
    path = models.save(models.encoder(), tmp_path / "model.onnx")
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    with load_encoder(path) as encoder:
        assert encoder.embed([np.zeros(16_000)], 16_000)[0].frames.shape == (98, 4)
        assert {"onnx", "onnxruntime"} <= set(call(encoder.worker, calls.imported, returns=list[str]))
