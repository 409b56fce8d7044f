"""Streams, folders and limits as a shell, a container or a build server may set them: each has its code and its sentence."""

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
from check_models import sound
from corpus import write_encoder, write_task, write_tones
from made_results import record, result
from onnx_models import save

from xares_onnx.evaluation.record import write_result

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a shell")
ROOT = Path(__file__).parents[2]
SECONDS = 100.0


def start(*arguments: object, before: str = "", after: str = "", **options: Any) -> subprocess.Popen[str]:
    """The program in a shell, with shell code before it and redirections after it."""
    words = " ".join(f"'{word}'" for word in (sys.executable, "-m", "xares_onnx", *arguments))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(["bash", "-c", f"{before} exec {words} {after}"], env=environment, text=True, **pipes)


def run(*arguments: object, **options: Any) -> tuple[int, str, str]:
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=SECONDS)
    assert "Traceback" not in err
    return process.returncode, out, err


def sentence(err: str) -> str:
    (line,) = err.splitlines()
    return line


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("result") / "r.json"
    write_result(path, result([record("a", 0.5)]), {})
    return path


# ---------------------------------------------------------------- streams


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["tasks"], ["report", "RESULT"]])
def test_a_reader_that_goes_away_is_no_error(arguments: list[str], stored: Path) -> None:
    words = [str(stored) if word == "RESULT" else word for word in arguments]
    reading, writing = os.pipe()
    os.close(reading)
    process = start(*words, stdout=writing)
    os.close(writing)
    _, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (0, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, stored: Path) -> None:
    code, out, err = run("report", stored, after=closed)
    assert (code, err) == (0, "")
    assert (">&-" in closed.replace("2>&-", "")) == (not out)


def test_a_file_that_is_written_has_no_stream_in_it(tmp_path: Path, stored: Path) -> None:
    """With stdout closed, the first file that is opened would have its number."""
    code, _, err = run("report", stored, "-o", tmp_path / "r.md", after=">&-")
    assert (code, err) == (0, "")
    assert "wrote" not in (tmp_path / "r.md").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux's")
def test_a_full_device() -> None:
    for arguments in (["--help"], ["tasks"]):
        code, _, err = run(*arguments, after="> /dev/full")
        assert (code, sentence(err)) == (
            5,
            "xares-onnx: the disk of this machine does not suffice: [Errno 28] No space left on device",
        )
    assert run("check", "nothing.onnx", after="2> /dev/full")[0] == 3  # what is said cannot be read, the code can


# ---------------------------------------------------------------- folders and limits


def test_a_working_folder_that_was_removed(tmp_path: Path) -> None:
    gone = f"mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir ../gone &&"
    code, _, err = run("check", "model.onnx", before=gone)
    assert (code, sentence(err)) == (2, "xares-onnx: the working folder was removed; change to one that exists")
    assert run("--version", before=gone)[0] == 0


@pytest.mark.parametrize("files", [6, 8])
def test_few_descriptors(files: int, tmp_path: Path) -> None:
    code, _, err = run("check", save(sound(), tmp_path / "model.onnx"), before=f"ulimit -n {files};")
    assert (code, sentence(err)) == (
        5,
        "xares-onnx: too few files may be open at once; raise the limit (`ulimit -n 1024`)",
    )


@pytest.mark.parametrize("megabytes", [280, 300, 380])
def test_little_address_space(megabytes: int, tmp_path: Path) -> None:
    code, _, err = run("check", "model.onnx", before=f"ulimit -v {megabytes << 10};")
    assert (code, f"{megabytes} MB of address space are too few" in sentence(err)) == (5, True)


def test_no_file_may_grow(tmp_path: Path, stored: Path) -> None:
    code, _, err = run("report", stored, "-o", tmp_path / "r.md", before="ulimit -f 0;")
    assert code == 5
    assert "cannot be written" in sentence(err) or "does not suffice" in sentence(err)
    assert not (tmp_path / "r.md").exists()


# ---------------------------------------------------------------- signals


class World:
    def __init__(self, folder: Path) -> None:
        self.model, self.task = write_encoder(folder / "bank.onnx"), write_task(folder, "good")
        write_tones(folder / "data", "good", train=8, valid=4, test=4)
        self.folder = folder

    def command(self, name: str, room: Path) -> list[object]:
        if name == "evaluate":
            where = ["--tasks", self.task, "--data", self.folder / "data", "--cache", room / "cache"]
            return ["evaluate", self.model, *where, "--output", room / "out.json", "--method", "knn", "--threads", 1]
        if name == "annotate":
            return ["annotate", self.model, "--contract", "license=MIT", "-o", room / "out.onnx"]
        return [name, self.model]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def handles(process: subprocess.Popen[str], number: int) -> bool:
    """Whether the program has got as far as to handle a signal; before that, it is the shell or the interpreter."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return process.poll() is not None or ("bash" not in status and bool(int(caught, 16) >> (number - 1) & 1))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks into /proc")
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("evaluate", signal.SIGINT),
        ("evaluate", signal.SIGTERM),
        ("check", signal.SIGTERM),
        ("annotate", signal.SIGTERM),
    ],
)
def test_a_signal_at_any_moment(name: str, number: signal.Signals, world: World, tmp_path: Path) -> None:
    """From the first import to the last moment: its code and a sentence, or the code of a run that was through.

    `make chaos` tries more moments.
    """
    moments = int(os.environ.get("MOMENTS", "3"))
    whole, usual = 0.0, 0
    for moment in range(moments):
        room = tmp_path / str(moment)
        room.mkdir()
        process = start(*world.command(name, room), before=f"trap - {number.name};")
        while not handles(process, signal.SIGTERM):
            time.sleep(0.001)
        if moment == 0:  # undisturbed
            started = time.monotonic()
            process.communicate(timeout=SECONDS)
            whole, usual = time.monotonic() - started, process.returncode
            continue
        time.sleep((moment - 1) / max(1, moments - 2) * whole)
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(number)
        _, err = process.communicate(timeout=SECONDS)
        assert "Traceback" not in err
        assert process.returncode in (128 + number, usual), (moment, process.returncode, err)
        if process.returncode == 128 + number:
            assert err.splitlines()[-1].startswith("xares-onnx: interrupted; "), err
        assert not psutil.wait_procs(children, timeout=10)[1]


def test_signals_are_handled_before_anything_is_imported() -> None:
    code = (
        "import sys, xares_onnx.cli; print(sorted({'typer', 'rich', 'msgspec', 'numpy', 'subprocess'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert out.stdout == "[]\n"
