"""`embed --part I/N`: shares of the shards, and what `evaluate` makes of a store that they filled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from engine_world import SHARDS, EngineWorld, left
from hypothesis import given, settings
from hypothesis import strategies as st

from xares_onnx.cli import app
from xares_onnx.encoder.encoder import Encoder
from xares_onnx.errors import UsageError
from xares_onnx.evaluation.filling import Part, embed, shares

weights = st.dictionaries(st.text(max_size=4), st.floats(0, 1e12), max_size=40)


@settings(max_examples=50)
@given(weights, st.integers(1, 12))
def test_every_shard_is_in_one_part_and_parts_are_about_equal(weights: dict[str, float], parts: int) -> None:
    divided = shares(weights, parts)
    assert len(divided) == parts
    assert sorted(name for part in divided for name in part) == sorted(weights)
    sums = [sum(weights[name] for name in part) for part in divided]
    # Graham's bound of the longest first, against the larger of the mean and the heaviest shard
    assert max(sums) <= sum(weights.values()) / parts + max(weights.values(), default=0) + 1e-3


@settings(max_examples=30)
@given(weights, st.integers(1, 12), st.randoms(use_true_random=False))
def test_parts_do_not_depend_on_the_order_of_a_folder(weights: dict[str, float], parts: int, chance: object) -> None:
    names = list(weights)
    chance.shuffle(names)  # type: ignore[attr-defined]
    assert shares({name: weights[name] for name in names}, parts) == shares(weights, parts)


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "1/0", "a/b", "1/3/5", "-1/3", "1/9999999", "1.0/3"])
def test_a_part_is_written_as_i_of_n(text: str) -> None:
    with pytest.raises(UsageError, match=r"must read I/N, such as 1/4"):
        Part.parse(text)


def test_three_parts_fill_the_store_and_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = EngineWorld(tmp_path)
    world.run(tmp_path / "whole")
    tasks = [str(task) for task in world.tasks]
    filled = [
        embed(world.model, tasks, part=Part(i, 3), data=world.data, cache=tmp_path / "parts/cache", device="cpu", threads=1)
        for i in (2, 1, 3)
    ]
    assert sum(part.shards for part in filled) == filled[0].all_shards == SHARDS + 1  # one is in both tasks
    assert sum(part.embedded for part in filled) in (SHARDS, SHARDS + 1)
    assert max(part.shards for part in filled) <= 4

    def fails(*arguments: object) -> None:
        raise AssertionError("the model is called again")

    again = embed(world.model, tasks, data=world.data, cache=tmp_path / "parts/cache", device="cpu", threads=1)
    assert (again.shards, again.embedded, again.errors) == (SHARDS + 1, 0, [])
    monkeypatch.setattr(Encoder, "call", fails)
    world.run(tmp_path / "parts")
    whole, parts = left(tmp_path / "whole"), left(tmp_path / "parts")
    assert parts == whole


def test_the_command_embeds_and_says_how_much(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = EngineWorld(tmp_path)
    monkeypatch.chdir(tmp_path)
    (world.data / "second" / "test0.tar").write_bytes(b"no tar at all" * 100)
    arguments = ["embed", "bank.onnx", "--tasks", "first.toml,second.toml", "--data", "data", "--cache", "cache"]
    app([*arguments, "--device", "cpu", "--part", "1/1"], standalone_mode=False)
    captured = capfd.readouterr()
    assert captured.out.startswith(f"part 1/1: {SHARDS + 1} of {SHARDS + 1} shards, ")
    assert "first: embedding done" in captured.err
    assert os.listdir(tmp_path / "cache") != []
