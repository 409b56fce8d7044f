"""Chaos: real runs, of one or two encoders, that lose their processes, their parent or their disk at random moments, each
followed by one left alone.

Engines take turns: one process, two, and a Ray cluster of this machine, of which an actor or what it runs is killed.

Usage: PYTHONPATH=tests/helpers python tests/chaos.py [--rounds 20] [--seed 0]; takes minutes. Every second run ends as an
undisturbed one ends: the same result but for times, the same predictions and the same store, byte by byte.

The disk is a small tmpfs of its own, filled up, where this user may mount one; else every file is cut off by RLIMIT_FSIZE.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from bank_model import write_model
from cli_world import START

TASKS = "synthetic_timbre,synthetic_events"  # one of vectors with its kNN, one of frames
LIMIT = 60
KINDS = ("worker", "parent SIGKILL", "parent SIGTERM", "parent SIGINT", "disk")
ENDS = {  # exit codes that a disturbed run may end with; 0 where it was hit between two pieces of work
    "worker": {0, 3, 5},  # 0 once jobs run, which are done again; else while the model is measured
    "parent SIGKILL": {-signal.SIGKILL},
    "parent SIGTERM": {143, -signal.SIGTERM},  # before the program took the signal over, Python dies of it
    "parent SIGINT": {130, -signal.SIGINT},
    "disk": {0, 5},
}
ENGINES = [("--workers", "1"), ("--workers", "2"), ("--engine", "ray")]
DISK_MEGABYTES = 256
PATIENCE_SECONDS = 300
ENDING_SECONDS = 120  # for a killed run's processes; the agents of a Ray node take up to a minute to notice


def start(model: Path, room: Path, engine: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    arguments = f"evaluate {model} --tasks {TASKS} --limit {LIMIT} --seeds 1 --threads 2 --device cpu --quiet".split()
    arguments += engine
    return subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-c",
            START,
            *arguments,
            "--cache",
            room / "cache",
            "--output",
            room / "out" / "r.json",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def left(room: Path) -> dict[str, Any]:
    """What a finished run leaves, without what may differ between two."""
    result = json.loads((room / "out" / "r.json").read_bytes())
    del result["created"], result["environment"]
    for task in result["tasks"]:
        del task["seconds"], task["rtf"]
    files = [*room.glob("out/**/*.npz"), *room.glob("cache/store/**/*.safetensors"), *room.glob("cache/store/**/*.jsonl")]
    return {"result": result, **{str(file.relative_to(room)): file.read_bytes() for file in sorted(files)}}


class Disk:
    """A place for one round that can be filled up, and emptied again."""

    def __init__(self, room: Path) -> None:
        self.room = room
        room.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", str(room)]
        self.mounted = subprocess.run(mount, capture_output=True).returncode == 0

    def fill(self, processes: list[psutil.Process]) -> None:
        if not self.mounted:
            for process in processes:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))
            return
        with (self.room / "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(1 << 16))
            except OSError:
                return

    def empty(self) -> None:
        (self.room / "filler").unlink(missing_ok=True)

    def remove(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.room)], check=True)
        shutil.rmtree(self.room)


def workers_of(parent: psutil.Process) -> list[psutil.Process]:
    """Processes that run models and heads, and Ray's actors; not those of a Ray cluster itself, whose loss ends a run."""
    workers = []
    for process in parent.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if command.startswith("ray::_Runner") or "xares_onnx.encoder.worker" in command:
                workers.append(process)
    return workers


def disturb(kind: str, process: subprocess.Popen[bytes], disk: Disk) -> bool:
    """Whether there was something to hit."""
    if process.poll() is not None:
        return False
    parent = psutil.Process(process.pid)
    workers = workers_of(parent)
    match kind.split():
        case ["worker"]:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not workers and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
                workers = workers_of(parent) if parent.is_running() else []
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):  # it went with its actor
                    worker.kill()
            return bool(workers)
        case ["parent", "SIGINT"]:  # as a terminal does: it reaches the worker too
            os.killpg(process.pid, signal.SIGINT)
        case ["parent", name]:
            process.send_signal(signal.Signals[name])
        case _:
            disk.fill([parent, *workers])
    return True


def disturbed_run(kind: str, moment: float, model: Path, disk: Disk, engine: tuple[str, ...]) -> tuple[int, str] | None:
    """Exit code and last words of a run that is hit at this moment, in seconds; None where it had ended by then."""
    with start(model, disk.room, engine) as process:
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            pass
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        hit = disturb(kind, process, disk)
        _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
        alive = psutil.wait_procs(children, timeout=ENDING_SECONDS)[1]
        assert not alive, f"a worker lives on after {kind}"
        lines = stderr.decode(errors="replace").strip().splitlines()
        assert not any("Traceback" in line for line in lines) or kind == "parent SIGINT", stderr.decode()
        if kind.startswith("parent") and process.returncode == 0:  # it ended in the moment of the signal
            return None
        return (process.returncode, lines[-1] if lines else "") if hit else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = write_model(root / "slow.onnx", slow=True)
        started = time.monotonic()
        room = root / "undisturbed"
        with start(model, room) as process:
            _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 0, stderr.decode()
        seconds, expected = time.monotonic() - started, left(room)
        print(f"undisturbed: {seconds:.1f} s, {len(expected) - 1} files of predictions and embeddings", flush=True)
        done, late = 0, 0
        while done < options.rounds:
            kind, moment = KINDS[done % len(KINDS)], chance.uniform(0.02, 1.0) * seconds
            disk = Disk(root / "round")
            try:
                engine = ENGINES[done // len(KINDS) % len(ENGINES)]
                ended = disturbed_run(kind, moment, model, disk, engine)
                if ended is None:
                    late += 1
                    continue
                code, words = ended
                assert code in ENDS[kind], (kind, code, words)
                disk.empty()
                stored = len(list(disk.room.glob("cache/store/**/*.safetensors")))
                with start(model, disk.room) as process:
                    _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
                assert process.returncode == 0, stderr.decode()
                found = left(disk.room)
                differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
                assert not differing, differing
            finally:
                disk.remove()
            done += 1
            where = "" if kind != "disk" else " (tmpfs)" if disk.mounted else " (RLIMIT_FSIZE)"
            print(
                f"{done:3} {kind + where:16} at {moment:5.1f} s: exit {code:4}, {stored} shards stored; {words[:90]}",
                flush=True,
            )
        print(
            f"{done} disturbed runs ({late} more had ended before they were hit): every rerun ended as the undisturbed one"
        )


if __name__ == "__main__":
    main()
