"""The simulation of runs that no machine here can hold: its clock is virtual, so its hours are exact."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "scale.py"


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", BENCH)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["scale"] = module
    spec.loader.exec_module(module)
    return module


def test_two_tasks_by_hand(scale: ModuleType) -> None:
    """Shards of 4, 2 and 2 s, a start of 1 s, and heads of 3 s."""
    costs = scale.Costs(per_hour=1.0, per_shard=0.0, start=1.0)
    pieces = [
        scale.Work("a", "one", "encoder", 4, 4.0),
        scale.Work("b", "one", "encoder", 2, 2.0),
        scale.Work("one", "one", "head", 3, 3.0, needs=("a", "b")),
        scale.Work("c", "two", "encoder", 2, 2.0, bytes_read=5.0),
        scale.Work("two", "two", "head", 3, 3.0, needs=("c",), bytes_written=7.0),
    ]
    one = scale.simulate(pieces, 1, costs, cores=2)
    assert (one.makespan, one.last) == (1 + 4 + 2 + 3 + 3, "two")  # the last shard is embedded beside the first head
    assert (one.bytes_read, one.bytes_written) == (5.0, 7.0)
    alone = scale.simulate(pieces, 1, costs, cores=1)
    assert alone.makespan == pytest.approx(1 + 8 + 6)
    two = scale.simulate(pieces, 2, costs, cores=4)
    assert two.makespan == 1 + 4 + 3  # the second worker embeds b and c meanwhile


def test_losses_cost_time_and_nothing_else(scale: ModuleType) -> None:
    costs = scale.Costs(per_hour=1.0, per_shard=0.0, start=1.0)
    shards = [scale.Work(f"s{i}", "t", "encoder", 1, 10.0) for i in range(20)]
    pieces = [*shards, scale.Work("head", "t", "head", 1, 10.0, needs=tuple(shard.key for shard in shards))]
    lossy = scale.simulate(pieces, 4, costs, loss_hours=50 / 3600, seed=1)
    assert lossy.losses > 0
    assert lossy.last == "head"
    assert lossy.makespan > scale.simulate(pieces, 4, costs).makespan
    assert scale.simulate(pieces, 4, costs, loss_hours=50 / 3600, seed=1) == lossy


def test_a_shard_in_pieces_by_hand(scale: ModuleType) -> None:
    """Two workers share a shard: each reads its headers in 1 s, and one joins four pieces of 2 s in 0.5 s."""
    costs = scale.Costs(per_hour=8.0, per_shard=0.0, start=0.0)
    clips, joined = 1 / scale.INDEX_SECONDS, 0.5 * scale.JOIN_BYTES
    shard = scale._Shard("task", "a", hours=1.0, clips=clips, store_bytes=joined)
    jobs = list(shard.jobs(costs, int(scale.AUDIO_BYTES_PER_HOUR / 4)))
    assert [job.key for job in jobs] == ["a.0", "a.1", "a.2", "a.3", "a"]
    run = scale.simulate(jobs, 2, costs, cores=2)
    assert run.makespan == pytest.approx(1 + 2 + 2 + 0.5)
    assert run.longest_chain == pytest.approx(2 + 0.5)
    assert run.bytes_written == pytest.approx(2 * joined)
    (whole,) = shard.jobs(costs, None)
    assert scale.simulate([whole], 2, costs, cores=2).makespan == pytest.approx(1 + 8)


def test_sixty_four_workers_are_nine_tenths_busy_on_the_suite_as_it_is(scale: ModuleType) -> None:
    tasks = [scale.shipped_tasks()[name] for name in scale.SUITE]
    work = sum(job.seconds for job in scale.jobs_of(tasks, scale.CPU, None, 1, 1.0))
    run = scale.simulate(list(scale.jobs_of(tasks, scale.CPU, scale.PIECE_BYTES, 8, 1.0)), 64, scale.CPU)
    assert work / 64 / run.makespan > 0.9
    whole = scale.simulate(list(scale.jobs_of(tasks, scale.CPU, None, 8, 1.0)), 64, scale.CPU)
    assert work / 64 / whole.makespan < 0.4
