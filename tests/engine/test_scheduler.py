"""What starts when: with jobs that are only records, and no process."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xares_onnx.engine.scheduler import LOSSES, Scheduler, Slots


@dataclass(frozen=True)
class Made:
    """A job as a scheduler sees it."""

    key: str
    group: str
    slot: Any
    weight: float = 1.0
    memory: int = 0
    needs: tuple[str, ...] = ()


def task(name: str, shards: int | dict[str, float], head: float = 1.0, memory: int = 0) -> list[Made]:
    """A task's jobs: its shards by weight, and a head that needs them."""
    weights = {f"{name}{i}": 1.0 for i in range(shards)} if isinstance(shards, int) else shards
    embedding = [Made(key, name, "encoder", weight) for key, weight in weights.items()]
    return [*embedding, Made(f"head {name}", name, "head", head, memory, tuple(weights))]


def scheduler_of(*tasks: list[Made], **slots: Any) -> Scheduler[Made]:
    scheduler: Scheduler[Made] = Scheduler(Slots(**slots))
    for jobs in tasks:
        scheduler.add(jobs)
    scheduler.close()
    return scheduler


def started(scheduler: Scheduler[Made]) -> list[str]:
    return [job.key for job in scheduler.start()]


def simulated(scheduler: Scheduler[Made]) -> tuple[float, list[tuple[float, str]]]:
    """The time at which the last job ends, if a job takes its weight; and when each began."""
    now, running, begun = 0.0, list[tuple[float, str]](), list[tuple[float, str]]()
    while not scheduler.finished:
        for job in scheduler.start():
            heapq.heappush(running, (now + job.weight, job.key))
            begun.append((now, job.key))
        now, key = heapq.heappop(running)
        scheduler.done(key)
    return now, begun


def test_one_encoder_takes_tasks_as_they_were_added_and_heads_run_beside_it() -> None:
    scheduler = scheduler_of(task("a", 2), task("b", 2, head=9))
    assert started(scheduler) == ["a0"]
    scheduler.done("a0")
    assert started(scheduler) == ["a1"]
    scheduler.done("a1")
    assert started(scheduler) == ["b0", "head a"]
    scheduler.done("b0")
    assert started(scheduler) == ["b1"]
    for key in ("b1", "head a"):
        scheduler.done(key)
    assert started(scheduler) == ["head b"]
    assert not scheduler.finished
    scheduler.done("head b")
    assert scheduler.finished


def test_several_encoders_take_long_heads_and_long_shards_first_and_finish_what_they_began() -> None:
    scheduler = scheduler_of(task("a", 2), task("b", {"s": 1.0, "l": 3.0, "m": 2.0}, head=9), encoders=2)
    assert started(scheduler) == ["l", "m"]
    scheduler.add(task("c", 1, head=99))
    scheduler.done("m")
    assert started(scheduler) == ["s"]  # of the task that was begun, though c's head takes longer
    scheduler.done("l")
    assert started(scheduler) == ["c0"]


def test_the_longest_heads_first_end_sooner_on_a_cluster() -> None:
    tasks = [task("short", 8, head=1), task("long", 8, head=6)]
    assert simulated(scheduler_of(*tasks, encoders=8, heads_beside=2, heads=2))[0] == 7.0  # 1 + 6, and not 2 + 6


def test_a_shard_of_two_tasks_is_embedded_once() -> None:
    both = scheduler_of(task("a", {"x": 1.0, "shared": 1.0}), task("b", {"shared": 1.0, "y": 1.0}), encoders=9)
    assert sorted(started(both)) == ["shared", "x", "y"]
    both.done("shared")
    both.done("x")
    assert started(both) == ["head a"]
    both.add(task("c", {"shared": 1.0}))  # what is done is not done again
    both.done("head a")
    assert started(both) == ["head c"]


def test_heads_beside_encoders_are_few_and_those_after_them_fit_into_memory() -> None:
    heads = [task(name, 0, head=weight, memory=5) for name, weight in (("a", 1.0), ("b", 3.0), ("c", 2.0))]
    busy = scheduler_of(*heads, task("d", 1, memory=1), heads=3, memory=10)
    assert started(busy) == ["d0", "head b"]
    busy.done("d0")
    assert started(busy) == ["head c"]  # two of 5 bytes fit into 10
    busy.done("head b")
    assert started(busy) == ["head a"]
    greedy = scheduler_of(task("e", 0, memory=99), heads=3, memory=10)
    assert started(greedy) == ["head e"]  # one alone may take more


def test_an_open_schedule_waits_for_more() -> None:
    scheduler: Scheduler[Made] = Scheduler(Slots())
    assert not scheduler.finished
    scheduler.close()
    assert scheduler.finished


def test_a_failed_shard_ends_its_tasks_and_drops_what_only_they_need() -> None:
    scheduler = scheduler_of(task("a", {"x": 3.0, "y": 1.0, "z": 1.0}), task("b", {"z": 1.0}), task("c", 1))
    assert started(scheduler) == ["x"]
    assert scheduler.failed("x") == {"a"}
    assert started(scheduler) == ["z"]  # y is not needed any more
    assert scheduler.failed("z") == {"b"}
    assert simulated(scheduler)[1] == [(0.0, "c0"), (1.0, "head c")]


def pieced(name: str, group: str, count: int) -> list[Made]:
    """A shard in pieces, and the job that joins them."""
    pieces = [Made(f"{name}.{number}", group, "encoder") for number in range(count)]
    return [*pieces, Made(name, group, "encoder", float(count), needs=tuple(piece.key for piece in pieces))]


def test_pieces_are_joined_before_further_pieces_are_embedded() -> None:
    scheduler = scheduler_of([*pieced("x", "a", 2), *pieced("y", "a", 2), *task("a", {"x": 1.0, "y": 1.0})[-1:]])
    assert [key for _, key in simulated(scheduler)[1]] == ["x.0", "x.1", "x", "y.0", "y.1", "y", "head a"]


def test_a_failed_piece_ends_the_task_and_the_pieces_that_only_it_needs() -> None:
    head = task("a", {"x": 1.0, "y": 1.0})[-1:]
    scheduler = scheduler_of([*pieced("x", "a", 3), *pieced("y", "a", 2), *head], task("b", {"y": 1.0})[-1:], encoders=2)
    assert started(scheduler) == ["x.0", "x.1"]
    assert scheduler.failed("x.1") == {"a"}
    scheduler.done("x.0")
    assert [key for _, key in simulated(scheduler)[1]] == ["y.0", "y.1", "y", "head b"]
    both = scheduler_of([*pieced("x", "a", 2), *pieced("y", "a", 2), *head])
    assert started(both) == ["x.0"]
    both.failed("x.0")
    assert both.finished
    alone = scheduler_of(pieced("x", "a", 3))  # as in a part of a job array, which has no heads
    assert started(alone) == ["x.0"]
    assert alone.failed("x.0") == {"a"}
    assert alone.finished


def test_a_failed_shard_of_two_tasks_ends_both_and_a_failed_head_its_own() -> None:
    scheduler = scheduler_of(task("a", {"x": 1.0}), task("b", {"x": 1.0}), task("c", 0))
    assert started(scheduler) == ["x", "head c"]
    assert scheduler.failed("x") == {"a", "b"}
    assert scheduler.failed("head c") == {"c"}
    assert scheduler.finished


def test_what_a_lost_worker_had_goes_first_a_limited_number_of_times() -> None:
    scheduler = scheduler_of(task("a", 1), task("b", 1))
    for _ in range(LOSSES):
        assert started(scheduler) == ["a0"]
        assert scheduler.lost("a0")
    assert started(scheduler) == ["a0"]
    assert not scheduler.lost("a0")
    assert scheduler.failed("a0") == {"a"}
    assert started(scheduler) == ["b0"]


def test_a_stop_leaves_the_heads_of_what_is_embedded() -> None:
    scheduler = scheduler_of(task("a", 1), task("b", 1), task("c", 1), heads_beside=0)
    for key in ("a0", "b0"):
        assert started(scheduler) == [key]
        scheduler.done(key)
    assert started(scheduler) == ["c0"]
    assert scheduler.failed("c0") == {"c"}
    scheduler.stop()
    scheduler.add(task("d", 1))
    assert simulated(scheduler)[1] == [(0.0, "head a"), (1.0, "head b")]


def test_what_was_lost_after_it_was_done_is_done_again() -> None:
    scheduler = scheduler_of(task("a", 2))
    for key in ("a0", "a1", "head a"):
        assert started(scheduler) == [key]
        scheduler.done(key)
    scheduler.repeat([Made("a1", "a", "encoder"), Made("head a", "a", "head", needs=("a1",))])
    assert [key for _, key in simulated(scheduler)[1]] == ["a1", "head a"]


def test_slots_may_come_and_go() -> None:
    scheduler = scheduler_of(task("a", 5))
    assert len(started(scheduler)) == 1
    scheduler.resize(Slots(encoders=3))
    assert len(started(scheduler)) == 2
    scheduler.resize(Slots(encoders=1))
    scheduler.done("a0")
    assert started(scheduler) == []


@given(st.data())
def test_every_job_ends_once_whatever_happens(data: Any) -> None:
    """Any tasks that share any shards, any slots, any order of ends, losses included: all is done, and no head too early."""
    chance = random.Random(data.draw(st.integers(0, 10**6)))
    tasks = [
        task(
            name,
            {f"s{chance.randrange(12)}": chance.random() for _ in range(chance.randrange(5))},
            head=chance.random(),
            memory=chance.randrange(9),
        )
        for name in "abcd"
    ]
    slots = Slots(
        chance.randint(1, 5), heads := chance.randint(1, 3), chance.randint(1, heads), chance.choice([8, math.inf])
    )
    scheduler: Scheduler[Made] = Scheduler(slots, losses=3)
    waiting, running, done = list(tasks), list[Made](), list[str]()
    losses: dict[str, int] = {}
    while not scheduler.finished:
        if waiting:
            scheduler.add(waiting.pop(0))
            if not waiting:
                scheduler.close()
        new = scheduler.start()
        assert all(set(job.needs) <= set(done) for job in new)
        running += new
        assert sum(job.slot == "encoder" for job in running) <= slots.encoders
        assert sum(job.slot == "head" for job in running) <= slots.heads
        if running:
            job = running.pop(chance.randrange(len(running)))
            if losses.get(job.key, 0) < 3 and chance.random() < 0.2:
                losses[job.key] = losses.get(job.key, 0) + 1
                assert scheduler.lost(job.key)
            else:
                done.append(job.key)
                scheduler.done(job.key)
    assert sorted(done) == sorted({job.key for jobs in tasks for job in jobs})


@pytest.mark.parametrize("encoders", [1, 2, 7])
def test_no_encoder_idles_while_a_shard_waits(encoders: int) -> None:
    makespan, begun = simulated(scheduler_of(task("a", 10, head=0), task("b", 11, head=0), encoders=encoders))
    assert makespan == math.ceil(21 / encoders)
    assert len(begun) == 23
