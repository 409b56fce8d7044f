"""Real runs that are stopped by signals, and what the next run makes of what they left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from bank_model import write_model
from cli_world import START
from shard_makers import (
    RATE,
    encoded,
    noise,
    sine,
    task_toml,
    write_shard,
)

from xares_onnx.evaluation.evaluation import evaluate

SHARDS = {"train": 4, "valid": 2, "test": 2}
# Read by every Python that starts with its folder on the path: the run's, and its worker's, which writes the shards.
ONE_SHARD_EACH = """
import time
from xares_onnx.embedding.store import Store

write = Store.write

def write_and_wait(self, *what):
    write(self, *what)
    time.sleep(1000)

Store.write = write_and_wait
"""


def write_task(root: Path) -> Path:
    """A folder with a model, a task of three pitches, its data in many shards, and what lets a run store but one."""
    write_model(root / "bank.onnx")
    (root / "hook").mkdir()
    (root / "hook" / "sitecustomize.py").write_text(ONE_SHARD_EACH)
    (root / "mine.toml").write_text(task_toml())
    hum = noise(2)
    for number, part in enumerate(part for part, count in SHARDS.items() for _ in range(count)):
        clips = {}
        for n in range(12):
            start = (n * 37 + number * 101) % RATE
            samples = hum[start : start + RATE] / 2 + sine(300 + 60 * (n % 3), 1, amplitude=0.2)
            clips[f"{n:02}"] = (encoded(samples), {"label": "abc"[n % 3]})
        write_shard(root / "data" / "mine" / f"{part}{number:02}.tar", clips)
    return root


def comparable(path: Path) -> tuple[str, dict[str, bytes]]:
    """A result without what may differ between two runs, and its predictions."""
    result = json.loads(path.read_text())
    for field in ("created", "environment"):
        del result[field]
    for task in result["tasks"]:
        del task["seconds"], task["rtf"]
    predictions = {file.name: file.read_bytes() for file in sorted(path.parent.rglob("*.npz"))}
    assert len(predictions) == len(result["tasks"]) == 2
    return json.dumps(result), predictions


def stored(cache: Path) -> dict[str, int]:
    """Finished shards, and when their rows were written."""
    shards = (cache / "store").glob("*/*.safetensors")
    return {shard.stem: shard.with_suffix(".jsonl").stat().st_ctime_ns for shard in shards}


def stopped_run(root: Path, cache: Path, number: signal.Signals, workers: int = 1) -> tuple[int, str]:
    """Exit code and stderr of a run that gets the signal once a worker has stored a shard; no worker stores a second."""
    before = len(stored(cache))
    arguments = f"evaluate bank.onnx --tasks mine.toml --data data --output stopped.json --seeds 1 --cache {cache}".split()
    arguments += ["--workers", str(workers), "--threads", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "hook"), *(path for path in sys.path if path)])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            deadline = time.monotonic() + 250
            while len(stored(cache)) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            processes = psutil.Process(process.pid).children(recursive=True)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does: Ctrl-C reaches the worker too
            else:
                process.send_signal(number)
            _, stderr = process.communicate(timeout=100)
        finally:
            process.kill()
        assert processes
        assert not psutil.wait_procs(processes, timeout=100)[1], "a worker lives on"
    assert before < len(stored(cache)) <= before + workers
    assert not (root / "stopped.json").exists()
    return process.returncode, stderr


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_run_stopped_three_times_goes_on_each_time_and_ends_as_if_it_never_was(tmp_path: Path) -> None:
    root = write_task(tmp_path)
    cache = root / "cache"
    said = "xares-onnx: interrupted; finished shards are stored, so the same command goes on from there"

    code, stderr = stopped_run(root, cache, signal.SIGINT)
    assert (code, stderr.strip().splitlines()[-1]) == (130, said)
    after_interrupt = stored(cache)

    code, stderr = stopped_run(root, cache, signal.SIGTERM, workers=2)
    assert (code, stderr.strip().splitlines()[-1]) == (143, said)
    after_terminate = stored(cache)
    assert after_terminate.items() > after_interrupt.items()  # not written again

    code, _ = stopped_run(root, cache, signal.SIGKILL)
    assert code == -signal.SIGKILL
    after_kill = stored(cache)
    assert after_kill.items() > after_terminate.items()

    results = {}
    for name, where in (("resumed", cache), ("undisturbed", root / "other cache")):
        output = root / name / "result.json"
        done = evaluate(
            root / "bank.onnx",
            [str(root / "mine.toml")],
            data=root / "data",
            cache=where,
            output=output,
            seeds=1,
            threads=2,
            device="cpu",
        )
        assert [task.status for task in done.result.tasks] == ["ok", "ok"]
        results[name] = comparable(output)
    assert stored(cache).items() > after_kill.items()
    assert len(stored(cache)) == sum(SHARDS.values())
    assert results["resumed"] == results["undisturbed"]
    ours, theirs = (
        {file.name: file.read_bytes() for file in where.glob("store/*/*") if file.suffix != ".part"}
        for where in (cache, root / "other cache")
    )
    assert ours == theirs
