"""Splits that are made: whole, stratified, grouped, and another for another seed."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_makers import short, write_files, write_table

from xares_onnx.data.shards import index_shard
from xares_onnx.packing import pack
from xares_onnx.packing.splits import SPLITS, TEST, TRAIN, VALID, draw, make_splits, make_units, pool_small


def draws_of(names: list[str], seed: int = 0) -> Any:
    return np.frombuffer(b"".join(draw(name, seed) for name in names), ">u8").astype(np.uint64).reshape(-1, 2)


def split(strata: list[int], units: list[int] | None = None, seed: int = 0) -> Any:
    own = np.array(units if units is not None else range(len(strata)), np.int64)
    return make_splits(draws_of([f"{i}.wav" for i in range(len(strata))], seed), np.array(strata, np.int64), own)


def dense(values: list[int]) -> list[int]:
    return np.unique(values, return_inverse=True)[1].tolist()


strata_lists = st.lists(st.integers(0, 5), min_size=1, max_size=150).map(dense)


@given(strata=strata_lists)
def test_every_stratum_is_divided_in_proportion(strata: list[int]) -> None:
    chosen = split(strata)
    for stratum in set(strata):
        of = chosen[np.array(strata) == stratum]
        train, valid, test = (int((of == number).sum()) for number in (TRAIN, VALID, TEST))
        assert train + valid + test == len(of)
        assert abs(test - len(of) / 10) <= 1
        assert abs(valid - len(of) / 10) <= 1
        if len(of) >= 3:
            assert min(train, valid, test) >= 1
        assert train > 0
        assert (test > 0) == (len(of) > 1)


@given(st.data())
def test_units_are_never_divided_and_no_stratum_is_tested_untrained(data: st.DataObject) -> None:
    strata = data.draw(strata_lists)
    units = dense(data.draw(st.lists(st.integers(0, 12), min_size=len(strata), max_size=len(strata))))
    chosen = split(strata, units)
    of_unit = defaultdict(set)
    for unit, part in zip(units, chosen.tolist(), strict=True):
        of_unit[unit].add(part)
    assert all(len(parts) == 1 for parts in of_unit.values())
    trained, tested = (set(np.array(strata)[chosen == number].tolist()) for number in (TRAIN, TEST))
    assert tested <= trained
    pooled = pool_small(np.array(strata), np.array(units)).tolist()
    assert dense(pooled) == pooled
    of_pool = {stratum: {u for u, s in zip(units, pooled, strict=True) if s == stratum} for stratum in pooled}
    assert sum(len(of) < 3 for of in of_pool.values()) <= 1


@given(sizes=st.lists(st.integers(1, 30), min_size=3, max_size=40), seed=st.integers(0, 3))
def test_units_of_one_stratum_fill_the_splits_as_well_as_they_can(sizes: list[int], seed: int) -> None:
    units = [unit for unit, size in enumerate(sizes) for _ in range(size)]
    chosen = split([0] * len(units), units, seed)
    for number in (VALID, TEST):
        assert 0 < (chosen == number).sum() <= len(units) / 10 + 1 + max(sizes)
    assert (chosen == TRAIN).sum() > 0


def test_three_units_are_one_for_each_split() -> None:
    for seed in range(5):
        assert sorted(split([0] * 12, [0] * 4 + [1] * 4 + [2] * 4, seed)[::4].tolist()) == [TRAIN, VALID, TEST]


def test_speakers_who_say_every_word_keep_the_shares() -> None:
    rng = np.random.default_rng(0)
    speakers = np.repeat(np.arange(40), 50)
    words = rng.integers(0, 10, len(speakers)).tolist()
    chosen = split(words, speakers.tolist())
    shares = np.bincount(chosen, minlength=3) / len(chosen)
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.051)
    assert all(set(chosen[np.array(words) == word].tolist()) == {0, 1, 2} for word in range(10))


def test_a_seed_gives_other_splits_and_every_clip_its_turn() -> None:
    strata = [i % 3 for i in range(60)]
    several = np.stack([split(strata, seed=seed) for seed in range(60)])
    assert len(np.unique(several, axis=0)) == 60
    shares = (several == TEST).mean(axis=0)  # of 60 seeds, each clip is tested in about one of ten
    assert shares.max() < 0.35
    assert (shares > 0).mean() > 0.95


def test_units_hang_together_through_groups_and_contents() -> None:
    groups = np.array([0, 0, -1, -1, 1, -1], np.int64)
    contents = np.array([10, 11, 11, 12, 12, 13], np.int64)
    units = make_units(groups, contents)
    assert [sorted(np.flatnonzero(units == unit).tolist()) for unit in dict.fromkeys(units.tolist())] == [
        [0, 1, 2],
        [3, 4],
        [5],
    ]


# ---------------------------------------------------------------- from a table


def split_of(folder: Path) -> dict[str, str]:
    return {sample.key: path.name.partition("-")[0] for path in folder.glob("*.tar") for sample in index_shard(path).samples}


def test_groups_and_copies_stay_together(tmp_path: Path) -> None:
    """Forty speakers; of two, who are one person under two names, a recording each is the same."""
    names = [f"{i:03}" for i in range(240)]
    files = {f"{name}.wav": short(7 if name in ("005", "071") else 1000 + i) for i, name in enumerate(names)}
    write_files(tmp_path / "audio", files)
    rows = [{"path": f"{n}.wav", "label": "ab"[i % 2], "speaker": f"s{i % 40}"} for i, n in enumerate(names)]
    for seed in range(4):
        done = pack(
            tmp_path / "audio", write_table(tmp_path / "l.csv", rows), tmp_path / f"out{seed}", group="speaker", seed=seed
        )
        found = split_of(tmp_path / f"out{seed}/mine")
        assert len(found) == 240
        of_speaker = defaultdict(set)
        for row, name in zip(rows, names, strict=True):
            of_speaker["s5" if row["speaker"] == "s31" else row["speaker"]].add(found[name])
        assert all(len(parts) == 1 for parts in of_speaker.values())
        assert set(found.values()) == set(SPLITS)
    assert "1 of the recordings occur more than once, kept in one split, such as 005.wav and 071.wav" in done.notes


def test_without_groups_classes_are_in_proportion_and_rows_in_any_order(tmp_path: Path) -> None:
    labels = ["often"] * 80 + ["seldom"] * 10 + ["rare"] * 3 + ["pair"] * 2 + ["once"]
    write_files(tmp_path / "audio", {f"{i:02}.wav": short(i) for i in range(len(labels))})
    rows = [{"path": f"{i:02}.wav", "label": label} for i, label in enumerate(labels)]
    done = pack(tmp_path / "audio", write_table(tmp_path / "l.csv", rows), tmp_path / "out")
    assert done.classes == {
        "often": {"train": 64, "valid": 8, "test": 8},
        "seldom": {"train": 8, "valid": 1, "test": 1},
        "rare": {"train": 1, "valid": 1, "test": 1},
        "pair": {"train": 1, "valid": 0, "test": 1},
        "once": {"train": 1, "valid": 0, "test": 0},
    }
    assert done.task.weight == 11
    assert "3 of 5 classes have fewer than 2 training clips or no test clip: once, pair, rare" in done.notes
    random.Random(1).shuffle(rows)
    pack(tmp_path / "audio", write_table(tmp_path / "l.csv", rows), tmp_path / "again")
    assert split_of(tmp_path / "out/mine") == split_of(tmp_path / "again/mine")


@pytest.mark.parametrize("kind", ["tags", "events"])
def test_clips_of_several_classes_are_divided_by_their_rarest(kind: str, tmp_path: Path) -> None:
    write_files(tmp_path / "audio", {f"{i:02}.wav": short(i) for i in range(90)})
    names = [["all", "rare"] if i < 10 else ["all", "some"] if i < 30 else ["all"] for i in range(90)]
    rows = [
        {"path": f"{i:02}.wav", "labels": given}
        if kind == "tags"
        else {"path": f"{i:02}.wav", "events": [{"start": 0, "end": 0.01, "label": name} for name in given]}
        for i, given in enumerate(names)
    ]
    done = pack(tmp_path / "audio", write_table(tmp_path / "l.jsonl", rows), None)
    assert done.classes["rare"] == {"train": 8, "valid": 1, "test": 1}
    assert done.classes["some"] == {"train": 16, "valid": 2, "test": 2}
    assert done.classes["all"] == {"train": 72, "valid": 9, "test": 9}
