"""Who trains, selects and is tested, under both protocols; which clips are chosen; and how much may be lost."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shard_makers import clip_members, member, task_toml, write_shard, write_tar

from xares_onnx.data.audio import CropSettings
from xares_onnx.data.catalog import Digests
from xares_onnx.data.selection import TaskData, prepare
from xares_onnx.data.shards import Clips, Drop
from xares_onnx.data.task import Task, load_task
from xares_onnx.embedding.store import STORE_VERSION, Clip, EmbeddedShard, Header
from xares_onnx.errors import DataError, DataMissingError
from xares_onnx.progress import ignore
from xares_onnx.scoring.dataset import Dataset, assemble, check_drops
from xares_onnx.scoring.folds import Fold, cross_validation, hold_out, make_folds
from xares_onnx.scoring.protocol import Protocol

CORRECTED, XARES = Protocol("corrected"), Protocol("xares")
SPLITS = load_task(Path("mine.toml"), task_toml())
FOLDED = load_task(Path("mine.toml"), task_toml(splits='folds = { pattern = "f{fold}.tar", numbers = [1, 2, 3] }'))

Indices = npt.NDArray[np.int64]


def keys_of(count: int) -> list[str]:
    return [f"a.tar/{number}" for number in range(count)]


def parts(**sizes: int) -> dict[str, Indices]:
    """Consecutive clips for every part."""
    ends = np.cumsum(list(sizes.values()))
    return {name: np.arange(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


def folds(
    protocol: Protocol, clips: Mapping[str, Indices], shards: Mapping[str, str], task: Task = SPLITS
) -> tuple[list[Fold], list[str]]:
    """Folds over clips of three classes; `shards` holds a letter for every shard of a part."""
    count = max(int(part.max()) for part in clips.values()) + 1
    classes = np.arange(count) * 7 % 3
    return make_folds(
        protocol, task, clips, {name: frozenset(found) for name, found in shards.items()}, keys_of(count), classes
    )


def same(found: Indices, expected: Sequence[int] | Indices) -> bool:
    return found.tolist() == list(expected)


# ---------------------------------------------------------------- official splits


def test_a_validation_split_of_its_own_selects() -> None:
    clips = parts(train=60, valid=20, test=30)
    (fold,), notes = folds(CORRECTED, clips, {"train": "ab", "valid": "c", "test": "d"})
    assert same(fold.train, clips["train"])
    assert same(fold.valid, clips["valid"])
    assert same(fold.test, clips["test"])
    assert not len(fold.held_out)
    assert notes == []


@pytest.mark.parametrize(
    ("shards", "why"),
    [
        ({"train": "ab", "test": "d"}, "there is no validation split of its own"),
        ({"train": "ab", "valid": "d", "test": "d"}, "valid and test share clips"),
        ({"train": "ab", "valid": "cd", "test": "de"}, "valid and test share clips"),
        ({"train": "ab", "valid": "b", "test": "d"}, "there is no validation split of its own"),
    ],
)
def test_otherwise_training_clips_are_held_out_and_that_is_said(shards: dict[str, str], why: str) -> None:
    clips = parts(train=60, test=30)
    if "valid" in shards:
        clips["valid"] = clips["test"]
    (fold,), notes = folds(CORRECTED, clips, shards)
    assert len(fold.valid) == 6
    assert not set(fold.valid) & (set(fold.train) | set(fold.test))
    assert same(np.union1d(fold.train, fold.valid), clips["train"])
    assert same(fold.test, clips["test"])
    assert same(fold.held_out, fold.valid)  # a kNN searches them too
    assert notes == [f"{why}, so 6 of 60 training clips are held out for selection"]


@pytest.mark.parametrize(
    "shards",
    [{"train": "a", "valid": "a", "test": "a"}, {"train": "a", "test": "a"}, {"train": "ab", "valid": "c", "test": "bd"}],
)
def test_a_test_that_overlaps_training_is_cross_validated_and_that_is_said(shards: dict[str, str]) -> None:
    clips = {name: np.arange(53) for name in shards}
    found, notes = folds(CORRECTED, clips, shards)
    assert notes == ["train and test share clips, so 53 clips are cross-validated in 5 folds"]
    assert [fold.name for fold in found] == list("01234")
    assert same(np.sort(np.concatenate([fold.test for fold in found])), range(53))  # each clip is tested once
    for fold in found:
        assert len(fold.test) in (10, 11)
        assert same(np.sort(np.concatenate([fold.train, fold.valid, fold.test])), range(53))
        assert len(fold.valid) == 4
        assert same(fold.held_out, fold.valid)


def test_clips_that_only_one_of_two_overlapping_splits_has_are_pooled() -> None:
    clips = {"train": np.arange(0, 30), "test": np.arange(20, 50)}
    found, _ = folds(CORRECTED, clips, {"train": "ab", "test": "bc"})
    assert same(np.sort(np.concatenate([fold.test for fold in found])), range(50))


# ---------------------------------------------------------------- folds, and X-ARES


def test_validation_clips_come_out_of_the_training_folds() -> None:
    clips = parts(**{"1": 30, "2": 25, "3": 41})
    found, notes = folds(CORRECTED, clips, dict(zip("123", "abc", strict=True)), FOLDED)
    assert notes == []
    assert [fold.name for fold in found] == ["1", "2", "3"]
    for fold in found:
        assert same(fold.test, clips[fold.name])
        others = np.setdiff1d(np.arange(96), clips[fold.name])
        assert same(np.sort(np.concatenate([fold.train, fold.valid])), others)
        assert abs(len(fold.valid) - len(others) / 10) < 1
        assert same(fold.held_out, fold.valid)


def test_xares_validates_on_the_fold_it_tests() -> None:
    clips = parts(**{"1": 30, "2": 25, "3": 41})
    found, notes = folds(XARES, clips, dict(zip("123", "abc", strict=True)), FOLDED)
    assert notes == []
    for fold in found:
        assert same(fold.test, clips[fold.name])
        assert same(fold.valid, clips[fold.name])
        assert same(np.sort(fold.train), np.setdiff1d(np.arange(96), clips[fold.name]))
        assert not len(fold.held_out)


@pytest.mark.parametrize(
    "shards",
    [
        {"train": "a", "valid": "b", "test": "c"},
        {"train": "a", "valid": "c", "test": "c"},
        {"train": "a", "valid": "a", "test": "a"},
    ],
)
def test_xares_keeps_its_splits_whatever_they_share(shards: dict[str, str]) -> None:
    clips = parts(train=60, valid=20, test=30)
    (fold,), notes = folds(XARES, clips, shards)
    assert [same(getattr(fold, name), clips[name]) for name in ("train", "valid", "test")] == [True] * 3
    assert not len(fold.held_out)
    assert notes == []


def test_xares_selects_on_test_where_there_is_nothing_else() -> None:
    clips = parts(train=60, test=30)
    (fold,), _ = folds(XARES, clips, {"train": "a", "test": "b"})
    assert same(fold.valid, clips["test"])


def test_the_protocols_crop_and_repeat_as_they_should() -> None:
    task = load_task(Path("mine.toml"), task_toml(crop_seconds="crop_seconds = 5"))
    assert CORRECTED.crops(task) == CropSettings(5.0, "keep-tails", pad_short_clips=True, keep_padding=False)
    assert XARES.crops(task) == CropSettings(5.0, "whole-crops", pad_short_clips=False, keep_padding=True)
    assert (CORRECTED.default_seeds, XARES.default_seeds) == (3, 1)


# ---------------------------------------------------------------- one clip in ten

class_lists = st.lists(st.integers(0, 6), min_size=1, max_size=120)


@given(classes=class_lists)
def test_any_held_out_clips_are_stratified_and_leave_every_class_in_training(classes: list[int]) -> None:
    labels, clips = np.array(classes), np.arange(len(classes))
    train, valid = hold_out(clips, keys_of(len(clips)), labels)
    assert same(np.sort(np.concatenate([train, valid])), clips)
    assert set(labels[train]) == set(classes)
    sizes = np.bincount(labels)
    assert not np.isin(labels[valid], np.flatnonzero(sizes == 1)).any()  # a class's only clip teaches
    several = int(sizes[sizes > 1].sum())
    assert abs(len(valid) - several / 10) < 1
    assert bool(len(valid)) == bool(several)
    for count, held in zip(sizes, np.bincount(labels[valid], minlength=len(sizes)), strict=True):
        assert abs(held - count / 10) < 1


@given(classes=class_lists)
def test_any_cross_validation_is_stratified(classes: list[int]) -> None:
    labels = np.array(classes)
    found = cross_validation(np.arange(len(classes)), keys_of(len(classes)), labels)
    assert same(np.sort(np.concatenate([fold.test for fold in found])), range(len(classes)))
    for fold in found:
        assert not set(fold.test) & (set(fold.train) | set(fold.valid))
        assert not set(fold.valid) & set(fold.train)
        assert abs(len(fold.test) - len(classes) / 5) < 1
        for name, count in enumerate(np.bincount(labels)):
            assert abs(int((labels[fold.test] == name).sum()) - count / 5) < 1


@given(classes=class_lists, random=st.randoms(use_true_random=False))
def test_the_choice_is_of_keys_wherever_the_clips_stand(classes: list[int], random: Any) -> None:
    keys, labels = keys_of(len(classes)), np.array(classes)
    order = list(range(len(classes)))
    random.shuffle(order)
    shuffled_keys, shuffled = [keys[i] for i in order], labels[order]
    clips = np.arange(len(classes))
    plain = [hold_out(clips, keys, labels)]
    mixed = [hold_out(clips, shuffled_keys, shuffled)]
    plain += [(fold.train, fold.test) for fold in cross_validation(clips, keys, labels)]
    mixed += [(fold.train, fold.test) for fold in cross_validation(clips, shuffled_keys, shuffled)]
    for these, those in zip(plain, mixed, strict=True):
        for ours, theirs in zip(these, those, strict=True):
            assert {keys[i] for i in ours} == {shuffled_keys[i] for i in theirs}


def test_the_choice_is_by_hash_and_for_ever_the_same() -> None:
    """Another choice here is another score for every task without a validation split: a change of protocol."""
    keys, classes = keys_of(40), np.arange(40) % 2
    _, valid = hold_out(np.arange(40), keys, classes)
    order = sorted(range(40), key=lambda clip: (classes[clip], hashlib.sha256(keys[clip].encode()).hexdigest()))
    assert same(valid, sorted(order[5::10]))
    assert same(valid, [0, 1, 29, 34])
    tests = [fold.test.tolist() for fold in cross_validation(np.arange(10), keys, np.zeros(10, np.int64))]
    assert tests == [[4, 8], [2, 7], [5, 6], [0, 9], [1, 3]]


def test_nothing_can_be_held_out_of_nothing() -> None:
    train, valid = hold_out(np.arange(0), [], np.empty(0, np.int64))
    assert not len(train)
    assert not len(valid)


# ---------------------------------------------------------------- from shards to a data set


def write_data(folder: Path, **shards: Sequence[str]) -> Path:
    """Shards `<name>.tar` (`__` in a name is a folder) of clips of the given labels, under the task's folder."""
    for name, labels in shards.items():
        clips = {f"clip{number}": (b"x", {"label": label}) for number, label in enumerate(labels)}
        write_shard(folder / "mine" / f"{name.replace('__', '/')}.tar", clips)
    return folder


def prepared(folder: Path, limit: int | None = None, task: Task = SPLITS) -> TaskData:
    return prepare(task, folder, Digests(folder / "cache"), limit, ignore)


def embedded(labels: Mapping[str, str], drops: Sequence[Drop] = (), damage: str | None = None) -> EmbeddedShard:
    """Two crops a clip: (clip, 0) and (clip, 1)."""
    header = Header(
        store_version=STORE_VERSION,
        model="m",
        model_sha256="",
        task="mine",
        shard="renamed since.tar",
        expected=len(labels) + len(drops),
        damage=damage,
        audio_seconds=2.0 * len(labels),
    )
    owners = np.repeat(np.arange(len(labels)), 2)
    pooled = np.stack([owners, np.arange(len(owners)) % 2], axis=1).astype(np.float32)
    clips = [Clip(key, 2.0, f'{{"label": "{label}"}}') for key, label in labels.items()]
    return EmbeddedShard(header, pooled, owners, clips, list(drops))


def test_clips_of_all_shards_are_put_together(tmp_path: Path) -> None:
    data = prepared(write_data(tmp_path, train0="ab", train1="ba", valid="c", test="a"))
    contents = [embedded({"x": "a", "y": "b"}), embedded({"x": "b"}), embedded({"z": "c"}), embedded({"x": "a"})]
    paths = sorted(data.plans)
    assert [path.name for path in paths] == ["test.tar", "train0.tar", "train1.tar", "valid.tar"]
    dataset = assemble(data, dict(zip(paths, [contents[3], *contents[:3]], strict=True)))
    assert dataset.keys == ["test.tar/x", "train0.tar/x", "train0.tar/y", "train1.tar/x", "valid.tar/z"]
    assert same(np.array(dataset.labels), [0, 0, 1, 1, 2])
    assert {name: part.tolist() for name, part in dataset.parts.items()} == {"train": [1, 2, 3], "valid": [4], "test": [0]}
    assert same(dataset.clip_of_crop, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    assert same(dataset.embeddings[:, 0].astype(np.int64), [0, 0, 0, 0, 1, 1, 0, 0, 0, 0])
    assert same(dataset.crops_of(np.array([1, 4])), [2, 3, 8, 9])
    assert dataset.clips == Clips(expected=5, read=5, dropped=[])
    assert dataset.audio_seconds == 10.0
    assert dataset.damage == []


def test_memory_holds_the_embeddings_once(tmp_path: Path) -> None:
    """Those of the shards are mapped from files, as in the store."""
    names = [f"train{number}" for number in range(8)]
    data = prepared(write_data(tmp_path, **dict.fromkeys(names, "ab"), valid="ab", test="ab"))
    contents, dim, clips = {}, 4096, ["a", "b"] * 20
    for path in sorted(data.plans):
        shard = embedded({f"clip{number}": label for number, label in enumerate(clips)})
        np.full((len(shard.pooled), dim), len(contents), np.float32).tofile(tmp_path / f"{path.name}.rows")
        mapped = np.memmap(tmp_path / f"{path.name}.rows", np.float32, "r", shape=(len(shard.pooled), dim))
        contents[path] = replace(shard, pooled=mapped.view(np.ndarray))
    assemble(data, contents)  # imports
    tracemalloc.start()
    try:
        embeddings = assemble(data, contents).embeddings
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert same(embeddings[:, 0].astype(np.int64), np.repeat(np.arange(len(contents)), len(embeddings) // len(contents)))
    assert peak < 1.2 * embeddings.nbytes


def test_an_unknown_label_is_a_named_drop_and_takes_its_crops_along(tmp_path: Path) -> None:
    data = prepared(write_data(tmp_path, train="ab", valid="a", test="a"))
    test, train, valid = sorted(data.plans)
    broken = [Drop("w", "audio cannot be decoded (x)")]
    dataset = assemble(
        data,
        {
            train: embedded({"x": "q", "y": "b", "z": "a"}, broken, damage="cut"),
            valid: embedded({"x": "a"}),
            test: embedded({"x": '", "label": 5, "": "'}),
        },
    )
    assert dataset.keys == ["train.tar/y", "train.tar/z", "valid.tar/x"]
    assert same(np.array(dataset.labels), [1, 0, 0])
    assert same(dataset.embeddings[:, 0].astype(np.int64), [1, 1, 2, 2, 0, 0])
    assert same(dataset.clip_of_crop, [0, 0, 1, 1, 2, 2])
    assert {name: part.tolist() for name, part in dataset.parts.items()} == {"train": [0, 1], "valid": [2], "test": []}
    assert dataset.clips.dropped == [
        Drop("train.tar/w", "audio cannot be decoded (x)"),
        Drop("train.tar/x", "unknown label label='q'"),
        Drop("test.tar/x", "label label is 5, not a class name"),
    ]
    assert dataset.clips.expected == dataset.clips.read + len(dataset.clips.dropped) == 6
    assert dataset.damage == ["train.tar: cut"]  # by the name it has now


def test_a_task_all_of_whose_clips_are_lost_is_empty(tmp_path: Path) -> None:
    data = prepared(write_data(tmp_path, train="a", valid="a", test="a"))
    dataset = assemble(data, {path: embedded({}, [Drop("x", "lost")]) for path in data.plans})
    assert (dataset.clips.expected, dataset.clips.read, len(dataset.embeddings)) == (3, 0, 0)
    assert all(not len(part) for part in dataset.parts.values())


def test_keys_are_unique_although_shards_of_two_folders_share_a_name(tmp_path: Path) -> None:
    task = load_task(Path("mine.toml"), task_toml(splits='splits = { train = "train/*.tar", test = "test/*.tar" }'))
    data = prepared(write_data(tmp_path, train__0="ab", test__0="ba"), task=task)
    dataset = assemble(data, {path: embedded({"x": "a"}) for path in sorted(data.plans)})
    assert dataset.keys == ["test/0.tar/x", "train/0.tar/x"]


def test_a_shard_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    write_data(tmp_path, train="a", valid="b", test="c")
    odd = tmp_path / "mine" / "train\udce9\n.tar"
    write_shard(odd, {"x": (b"", {"label": "b"})})
    data = prepared(tmp_path, limit=5)
    dataset = assemble(data, {path: embedded({"x": "a"}) for path in data.plans})
    assert "train\\udce9\\n.tar/x" in dataset.keys
    assert all(key.encode() for key in dataset.keys)


def test_a_shard_of_two_parts_is_counted_once(tmp_path: Path) -> None:
    task = load_task(Path("mine.toml"), task_toml(splits='splits = { train = "*.tar", valid = "v*.tar", test = "v*.tar" }'))
    data = prepared(write_data(tmp_path, train="a", v="b"), task=task)
    dataset = assemble(data, {path: embedded({"x": "a"}) for path in sorted(data.plans)})
    assert dataset.clips.expected == 2
    assert {name: part.tolist() for name, part in dataset.parts.items()} == {"train": [0, 1], "valid": [1], "test": [1]}
    shards = data.shard_digests()
    assert shards["valid"] == shards["test"] < shards["train"]


def test_equal_shards_of_two_names_are_known_to_share_their_clips(tmp_path: Path) -> None:
    data = prepared(write_data(tmp_path, train="ab", valid="c", test="ab"))
    assert data.shard_digests()["train"] == data.shard_digests()["test"]


def test_the_data_digest_is_of_contents_and_parts(tmp_path: Path) -> None:
    def digest(folder: str, **shards: str) -> str:
        return prepared(write_data(tmp_path / folder, **shards)).digest()

    first = digest("0", train="ab", valid="c", test="a")
    assert digest("1", train="ab", valid="c", test="a") == first
    assert digest("2", train_renamed="ab", valid="c", test="a") == first
    assert digest("3", train="ab", valid="a", test="c") != first
    assert digest("4", train="ba", valid="c", test="a") != first


def test_missing_shards_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"no data for mine: .*mine holds no valid\*\.tar; put its shards there"):
        prepared(write_data(tmp_path, train="ab", test="a"))


# ---------------------------------------------------------------- --limit


def chosen(data: TaskData, part: str) -> set[str]:
    found = data.selected[part]
    assert found is not None
    return {data.key(path, key) for path, key in found}


def test_a_limit_chooses_so_many_clips_a_part_by_the_hash_of_their_keys(tmp_path: Path) -> None:
    data = prepared(write_data(tmp_path, train0="abc" * 5, train1="abc" * 3, valid="ab", test="abc" * 4), limit=6)
    keys = [f"train{shard}.tar/clip{n}" for shard, count in ((0, 15), (1, 9)) for n in range(count)]
    assert chosen(data, "train") == set(sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())[:6])
    assert chosen(data, "valid") == {"valid.tar/clip0", "valid.tar/clip1"}
    assert len(chosen(data, "test")) == 6
    for path, plan in data.plans.items():  # what is embedded is what was chosen
        wanted = {data.key(path, key) for key in plan.selected or ()}
        assert wanted == {key for part in data.parts for key in chosen(data, part) if key.startswith(path.name)}


def test_a_larger_limit_only_adds_and_order_does_not_matter(tmp_path: Path) -> None:
    folder = write_data(tmp_path, train="abc" * 10, valid="a", test="a")
    choices = [chosen(prepared(folder, limit), "train") for limit in (1, 4, 9, 30, 1_000)]
    assert [len(choice) for choice in choices] == [1, 4, 9, 30, 30]
    assert all(small <= large for small, large in pairwise(choices))
    backwards = {f"clip{number}": (b"y", {"label": "c"}) for number in reversed(range(30))}
    write_shard(folder / "mine" / "train.tar", backwards)
    assert chosen(prepared(folder, 4), "train") == choices[1]


def test_a_limit_counts_clips_and_not_members_that_are_none(tmp_path: Path) -> None:
    folder = write_data(tmp_path, valid="a", test="a")
    good = [part for number in range(5) for part in clip_members(f"good{number}", b"x", {"label": "a"})]
    bad = [member(f"bad{number}.wav", b"no json") for number in range(50)]
    write_tar(folder / "mine" / "train.tar", [*bad, *good])
    assert chosen(prepared(folder, 5), "train") == {f"train.tar/good{number}" for number in range(5)}


def test_a_part_that_shares_a_shard_does_not_lend_its_choice(tmp_path: Path) -> None:
    """A shard of two parts is embedded for both; each part has only its own clips."""
    task = load_task(Path("mine.toml"), task_toml(splits='splits = { train = "*.tar", test = "b.tar" }'))
    data = prepared(write_data(tmp_path, a="a" * 30, b="b" * 30), limit=5, task=task)
    contents = {path: embedded(dict.fromkeys(sorted(plan.selected or ()), "a")) for path, plan in data.plans.items()}
    dataset = assemble(data, contents)
    for part in ("train", "test"):
        assert {dataset.keys[clip] for clip in dataset.parts[part]} == chosen(data, part)
        assert len(dataset.parts[part]) == 5


def test_without_a_limit_all_is_wanted(tmp_path: Path) -> None:
    data = prepared(write_data(tmp_path, train="ab", valid="c", test="a"))
    assert all(plan.selected is None for plan in data.plans.values())


# ---------------------------------------------------------------- how much may be lost


def lossy(lost: int, expected: int, damage: Sequence[str] = ()) -> Dataset:
    drops = [Drop(f"a.tar/{number}", f"reason {number}") for number in range(lost)]
    clips = Clips(expected=expected, read=expected - lost, dropped=drops)
    nothing = np.empty(0, np.int64)
    return Dataset(np.empty((0, 1), np.float32), nothing, [], [], {}, clips, 0.0, list(damage))


def refused(dataset: Dataset) -> bool:
    try:
        check_drops(dataset)
    except DataError:
        return True
    return False


@pytest.mark.parametrize("expected", [1, 2, 10, 300, 1_000, 5_000])
def test_the_most_clips_that_may_be_lost(expected: int) -> None:
    most = max(2, expected // 100)
    assert [refused(lossy(lost, expected)) for lost in (0, most, most + 1)] == [False, False, True]


@pytest.mark.parametrize(("lost", "expected"), [(3, 3), (3, 10), (3, 299), (11, 1_000), (101, 10_000)])
def test_more_than_two_and_more_than_a_hundredth_are_an_error(lost: int, expected: int) -> None:
    with pytest.raises(DataError) as caught:
        check_drops(lossy(lost, expected))
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        f"{lost} of {expected} clips were dropped, the first a.tar/0: reason 0; "
        "repair the data, or accept the loss by --allow-drops"
    )


def test_damage_is_an_error_whatever_was_counted() -> None:
    with pytest.raises(DataError, match=r"nobody can count \(a\.tar: cut\); repair the data, or accept the loss by --allow"):
        check_drops(lossy(0, 1_000, ["a.tar: cut", "b.tar: cut"]))
    assert refused(lossy(0, 1_000, ["cut"]))
    assert not refused(lossy(0, 1_000))
