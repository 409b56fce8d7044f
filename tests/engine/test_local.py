"""Evaluations by several processes of this machine, some of which are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from engine_world import CLIPS, EngineWorld, left

from xares_onnx.data.task import Task
from xares_onnx.encoder import devices
from xares_onnx.encoder.encoder import Encoder, load_encoder
from xares_onnx.encoder.spec import ModelOptions
from xares_onnx.encoder.worker import Worker
from xares_onnx.engine import local
from xares_onnx.engine.jobs import AnyJob, EmbedJob, HeadJob
from xares_onnx.engine.scheduler import LOSSES
from xares_onnx.errors import DataError, ModelError, UsageError
from xares_onnx.evaluation import run as runs
from xares_onnx.progress import Event, Note, Progress


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EngineWorld:
    return EngineWorld(tmp_path_factory.mktemp("world"), slow=True)


@pytest.fixture(scope="module")
def expected(world: EngineWorld) -> dict[str, Any]:
    """What one encoder leaves."""
    world.run(world.folder / "one", workers=1)
    return left(world.folder / "one")


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_leaves_the_same_bytes(
    workers: int, world: EngineWorld, expected: dict[str, Any], tmp_path: Path
) -> None:
    told: list[Event] = []
    done = world.run(tmp_path, workers=workers, observer=told.append)
    assert left(tmp_path) == expected
    assert done.result.environment["machine"]["workers"] == workers
    assert done.result.environment["machine"]["engine"] == "local"
    for task in ("first", "second"):
        embedding = [e for e in told if isinstance(e, Progress) and (e.stage, e.task) == ("embed", task)]
        assert len({event.total for event in embedding}) == 1
        counts = [event.done for event in embedding]
        assert counts[0] <= CLIPS  # the shard in common may be there by then, or on its way
        assert counts[-1] == embedding[0].total
        assert max(counts) <= embedding[0].total
    assert not list((tmp_path / "cache").glob("scratch/*"))


def killing(victims: Callable[[], list[psutil.Process]]) -> tuple[Callable[[Event], None], list[str]]:
    """An observer that kills encoders in the middle of a shard, until it hears of it; and the notes that it hears.

    What is killed between two shards, as on a busy machine, has lost nothing and is not spoken of.
    """
    notes: list[str] = []

    def observer(event: Event) -> None:
        if isinstance(event, Note) and "goes on with it" in event.text:
            notes.append(event.text)
        elif isinstance(event, Progress) and event.stage == "embed" and event.done < event.total and not notes:
            for process in victims():
                process.kill()

    return observer, notes


def die(*arguments: Any, tell: Callable[[Any], None]) -> None:
    """In a process of models or heads: its end, in the middle of a job."""
    os.kill(os.getpid(), signal.SIGKILL)


class KilledJobs:
    """Has the first jobs of a kind kill the process that runs them; and the notes that a run hears."""

    def __init__(self, kind: type[AnyJob], times: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[str] = []
        self._left = times
        if kind is EmbedJob:
            call = EmbedJob.call
            monkeypatch.setattr(EmbedJob, "call", lambda job, *where: (die, ()) if self._next() else call(job, *where))
        else:
            train = local.LocalEngine._train
            monkeypatch.setattr(
                local.LocalEngine,
                "_train",
                lambda engine, job, hear: train(
                    engine, msgspec.structs.replace(job, function=die) if self._next() else job, hear
                ),
            )

    def _next(self) -> bool:
        self._left -= 1
        return self._left >= 0

    def observer(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)


def other_children(worker: Worker) -> list[psutil.Process]:
    kept = worker._process.pid if worker._process else None
    return [child for child in psutil.Process().children() if child.pid != kept]


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_encoders_cost_time_alone(
    workers: int, world: EngineWorld, expected: dict[str, Any], tmp_path: Path, head_process: Worker
) -> None:
    observer, notes = killing(lambda: other_children(head_process))
    done = world.run(tmp_path, workers=workers, observer=observer)
    assert left(tmp_path) == expected
    assert workers > 1 or any("died (SIGKILL)" in note and "a new process goes on with it" in note for note in notes)
    assert not any("SIGKILL" in note for note in done.result.notes)


def test_a_killed_process_of_heads_costs_time_alone(
    world: EngineWorld, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = KilledJobs(HeadJob, 1, monkeypatch)
    world.run(tmp_path, observer=killed.observer)
    assert left(tmp_path) == expected
    assert [note for note in killed.notes if "the process that trains heads died (SIGKILL)" in note]


def test_an_encoder_that_is_killed_again_and_again_ends_the_run(
    world: EngineWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = KilledJobs(EmbedJob, 1000, monkeypatch)
    done = world.run(tmp_path, observer=killed.observer)
    assert len([note for note in killed.notes if "goes on with it" in note]) == LOSSES
    (error,) = done.errors
    assert isinstance(error, ModelError)
    assert [record.status for record in done.result.tasks] == ["failed", "failed", "skipped", "skipped"]
    assert (done.result.tasks[2].reason or "").startswith(
        "not run, because the run ended at first: the model's process died"
    )


def test_embeddings_that_are_damaged_or_vanish_between_two_jobs_are_made_again(
    world: EngineWorld, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run(tmp_path)
    old, young = (tmp_path / "cache" / "scratch" / name for name in ("old", "young"))  # of killed runs
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    store = sorted((tmp_path / "cache" / "store").glob("*/*.safetensors"))
    store[0].write_bytes(store[0].read_bytes()[:50])  # its header, which planning reads, is whole
    planned = runs.Run._jobs

    def vanishing(*arguments: Any) -> Any:
        jobs = planned(*arguments)
        store[1].unlink(missing_ok=True)
        return jobs

    monkeypatch.setattr(runs.Run, "_jobs", vanishing)
    world.run(tmp_path)
    assert young.exists()
    assert not old.exists()
    assert left(tmp_path) == expected


def test_a_data_error_ends_its_task_and_no_other(
    world: EngineWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = runs.Run._jobs

    def changing(run: runs.Run, task: Task, *arguments: Any) -> Any:
        jobs = planned(run, task, *arguments)
        if task.name == "first":
            (world.data / "first" / "test0.tar").touch()  # it changes while it is in use
        return jobs

    monkeypatch.setattr(runs.Run, "_jobs", changing)
    done = world.run(tmp_path)
    assert [record.status for record in done.result.tasks] == ["failed", "failed", "ok", "ok"]
    assert [type(error) for error in done.errors] == [DataError]
    assert "changed while it was read" in (done.result.tasks[0].reason or "")


def test_no_workers_are_refused(world: EngineWorld, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="workers=0 must be 1 or more"):
        world.run(tmp_path, workers=0, threads=1)


def test_nothing_is_left_running_when_an_observer_raises(world: EngineWorld, tmp_path: Path, head_process: Worker) -> None:
    before = other_children(head_process)

    def observer(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "embed" and event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.run(tmp_path, workers=3, observer=observer)
    assert other_children(head_process) == before


def test_heads_run_in_no_process_of_the_callers(world: EngineWorld, tmp_path: Path) -> None:
    """An evaluation whose embeddings are stored imports neither torch nor a model's runtime into its own process."""
    world.run(tmp_path)
    code = (
        "import sys; from pathlib import Path; from xares_onnx.evaluation.evaluation import evaluate\n"
        f"done = evaluate({str(world.model)!r}, {[str(task) for task in world.tasks]!r}, data=Path({str(world.data)!r}), "
        f"cache=Path({str(tmp_path / 'cache')!r}), seeds=1, device='cpu')\n"
        "print([record.status for record in done.result.tasks])\n"
        "print([name for name in ('torch', 'onnxruntime', 'sklearn') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [str(["ok"] * 4), "[]"]


@pytest.mark.parametrize(
    ("provider", "gigabytes", "most"),
    [("CPUExecutionProvider", 99, 1), ("CUDAExecutionProvider", 80, 4), ("CUDAExecutionProvider", 8, 2)],
)
def test_the_number_of_encoders_per_device(
    provider: str, gigabytes: int, most: int, world: EngineWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "cuda_count", lambda: 2)
    monkeypatch.setattr(local, "cuda_bytes", lambda number: gigabytes << 30)
    with load_encoder(world.model, device="cpu", threads=12) as loaded:
        info = msgspec.structs.replace(loaded.info, provider=provider)
        encoder = Encoder(msgspec.structs.replace(loaded.spec, info=info), loaded.worker)
        with local.open_engine(encoder, ModelOptions(device="cuda:all")) as engine:
            placed = [encoder.spec.device for encoder in engine._encoders[::-1]]
            assert placed == ["cuda:0", "cuda:1"] * most
            assert {encoder.spec.threads for encoder in engine._encoders} == {12 // (2 * most)}
        with local.open_engine(encoder, ModelOptions(device="cuda:1", workers=3)) as engine:
            assert [encoder.spec.device for encoder in engine._encoders] == ["cuda:1"] * 3
