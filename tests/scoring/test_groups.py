"""Groups, such as speakers, are never split: what names them, who is held out and tested, and what a result keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from corpus import CLASSES, tones, write_encoder
from hypothesis import given
from hypothesis import strategies as st
from pack_makers import write_kind, write_table, write_tones
from shard_makers import task_toml, write_shard

from xares_onnx.data.catalog import Digests, part_globs, shipped_tasks
from xares_onnx.data.selection import prepare
from xares_onnx.data.shards import index_shard, parse_label, read_label
from xares_onnx.data.task import Data, Task, load_task
from xares_onnx.embedding.store import STORE_VERSION, Clip, EmbeddedShard, Header
from xares_onnx.errors import DataError, TaskFileError
from xares_onnx.evaluation.differences import Side, verified
from xares_onnx.evaluation.evaluation import Evaluation, evaluate
from xares_onnx.evaluation.record import read_predictions
from xares_onnx.metrics.bootstrap import point
from xares_onnx.packing import pack
from xares_onnx.packing.shard_writer import key_of
from xares_onnx.progress import ignore
from xares_onnx.scoring.dataset import Dataset, assemble
from xares_onnx.scoring.folds import Fold, cross_validation, hold_out, make_folds
from xares_onnx.scoring.protocol import Protocol

pytestmark = pytest.mark.usefixtures("shared_process")

CORRECTED, XARES = Protocol("corrected"), Protocol("xares")
SPLITS = load_task(Path("mine.toml"), task_toml())
FOLDED = load_task(Path("mine.toml"), task_toml(splits='folds = { pattern = "f{fold}.tar", numbers = [1, 2, 3] }'))

Indices = npt.NDArray[np.int64]


def group_of(group: str, key: str = "", label: Mapping[str, Any] | None = None) -> str | None:
    return Data(splits={"train": "a", "test": "b"}, group=group).group_of(key, label or {})


# ---------------------------------------------------------------- what names a group


@pytest.mark.parametrize(
    ("template", "key", "group"),
    [
        ("{group}_*_*", "f0003_0_cough", "f0003"),
        ("{group}_*_*", "f0003_0", None),
        ("{group}_*_*", "f0003_0_cough_2", None),  # of exactly three parts
        ("{group}_*_*", "_0_cough", None),  # a wildcard is never empty
        ("*-{group}-*-*", "1-100032-A-0", "100032"),
        ("{group}__U__*", "-4gV_Gp-Fmc__U__S0---0053_000", "-4gV_Gp-Fmc"),
        ("{group}__U__*", "abc___U__S0", "abc_"),
        ("*/{group}/*", "id10003/na8-QEFmj44/00003", "na8-QEFmj44"),
        ("*/{group}/*", "wav/dev/id10003/na8-QEFmj44/00003", "na8-QEFmj44"),  # the last parts of the path
        ("*/{group}/*", "na8-QEFmj44/00003", None),
        ("{group}-*", "folder-1/a-b", "a"),
        ("take.{group}", "take.7", "7"),
        ("take.{group}", "takes7", None),
        ("{group}", "a/b", "b"),
    ],
)
def test_a_template_names_a_group(template: str, key: str, group: str | None) -> None:
    assert group_of(template, key) == group


@pytest.mark.parametrize(
    ("value", "group"),
    [
        *[("ann", "ann"), (12, "12"), ("a\nb", r"a\nb"), ("\ud800", r"\ud800")],
        *[(value, None) for value in ("", None, True, 1.5, ["a"], "x" * 201, 10**300)],
    ],
)
def test_a_key_of_the_json_names_a_group(value: Any, group: str | None) -> None:
    assert group_of("speaker", "key", {"speaker": value}) == group
    assert group_of("speaker", "key", {"other": value}) is None


@pytest.mark.parametrize(
    "group",
    ["", "x" * 201, "a\nb", "*_{group}_{group}", "a_*", "{fold}_*", "{group}_{x}", "*{group}", "{group}**", "}{group}"],
)
def test_a_group_that_names_nothing_is_refused(group: str) -> None:
    with pytest.raises(TaskFileError, match="`group`"):
        load_task(Path("mine.toml"), task_toml(crop_seconds=f"group = {json.dumps(group)}"))
    with pytest.raises(TaskFileError, match=r"unknown key \[data\] groups; did you mean 'group'"):
        load_task(Path("mine.toml"), task_toml(crop_seconds='groups = "x"'))


def test_no_template_takes_long_for_any_key() -> None:
    """What makes a regular expression go back without end: many wildcards, and keys that fit nearly everywhere."""
    for text in ("a", "-", "ab", "aa"):
        template = text.join(["*"] * (180 // (len(text) + 1))) + text + "{group}"
        for letters in ("a", "-", "ab", "xa", "aab"):
            assert group_of(template, (letters * 1000)[:1000] + "!") is None


@given(st.lists(st.text("ab_-/*{}", min_size=1, max_size=3), max_size=5), st.text("ab_-/", max_size=12))
def test_any_template_names_a_part_of_the_key_or_nothing(parts: list[str], key: str) -> None:
    template = "{group}".join(parts) or "{group}"
    try:
        found = group_of(template, key)
    except ValueError:
        return
    assert found is None or (found in key and "/" not in found)


SAMPLES = {
    "cremad": ("1001_DFA_ANG_XX", {}, "1001"),
    "esc50": ("1-100032-A-0", {}, "100032"),
    "fluentspeechcommands": ("x", {"speakerId": "2BqVo8kVB2Skwgyb"}, "2BqVo8kVB2Skwgyb"),
    "librispeech": ("103-1240-0000", {"speaker": 103}, "103"),
    "librispeechmalefemale": ("103-1240-0000", {"speaker": 103}, "103"),
    "nsynthinstument": ("bass_synthetic_033-022-050", {}, "bass_synthetic_033"),
    "ravdess": ("03-01-06-01-02-01-12", {}, "12"),
    "speechcommandsv1": ("00176480_nohash_0", {}, "00176480"),
    "urbansound8k": ("100032-3-0-0", {}, "100032"),
    "vocalsound": ("f0003_0_cough", {}, "f0003"),
    "voxceleb1": ("id10003/na8-QEFmj44/00003", {"speakerid": "id10003"}, "na8-QEFmj44"),
    "voxlingua33": ("-4gVHbGpmFc__U__S0---0053_000-0062_360", {}, "-4gVHbGpmFc"),
}


def test_shipped_tasks_name_groups_by_their_data_sets_file_names() -> None:
    tasks = shipped_tasks()
    assert {name for name, task in tasks.items() if task.data.group} == set(SAMPLES)
    for name, (key, label, group) in SAMPLES.items():
        assert tasks[name].data.group_of(key, label) == group
        shard = next(iter(part_globs(tasks[name]).values())).replace("*", "-000000").removesuffix(".tar")
        assert tasks[name].data.group_of(f"{shard}_00012", {}) is None  # keys that count clips tell nothing


def test_the_digest_of_a_task_without_groups_is_what_it_was() -> None:
    """Results of before there were groups compare."""
    assert load_task(Path("mine.toml"), task_toml()).digest() == GOLDEN_DIGEST
    grouped = load_task(Path("mine.toml"), task_toml(crop_seconds='group = "speaker"'))
    assert grouped.digest() != GOLDEN_DIGEST
    assert msgspec.structs.replace(SPLITS, disabled=True).digest() == GOLDEN_DIGEST


# ---------------------------------------------------------------- who is held out and tested


@st.composite
def speakers(draw: st.DrawFn, fewest: int = 10) -> tuple[list[str], list[str], Indices]:
    """Keys, groups and strata of clips: `fewest` groups or more, of one to six clips."""
    count = draw(st.integers(fewest, 40))
    largest = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, largest), min_size=count, max_size=count))
    groups = [f"s{number}" for number, size in enumerate(sizes) for _ in range(size)]
    classes = draw(st.integers(1, 4))
    strata = np.array(draw(st.lists(st.integers(0, classes - 1), min_size=len(groups), max_size=len(groups))), np.int64)
    order = draw(st.permutations(range(len(groups))))
    return [f"k{number}" for number in range(len(groups))], [groups[i] for i in order], strata[order]


def groups_in(clips: Indices, groups: Sequence[str]) -> set[str]:
    return {groups[clip] for clip in clips.tolist()}


@given(speakers())
def test_whole_groups_are_held_out(clips: tuple[list[str], list[str], Indices]) -> None:
    keys, groups, strata = clips
    everything = np.arange(len(keys))
    train, valid = hold_out(everything, keys, strata, groups)
    assert np.sort(np.concatenate([train, valid])).tolist() == everything.tolist()
    again = hold_out(everything[::-1], [f"other {key}" for key in keys], strata + 5, groups)
    if groups_in(train, groups) & groups_in(valid, groups):  # only where the groups leave too little to hold out
        several = [len({group for group, s in zip(groups, strata, strict=True) if s == stratum}) for stratum in set(strata)]
        assert min(several) == 1
        return
    assert [part.tolist() for part in again] == [train.tolist(), valid.tolist()]  # by the groups' names alone
    largest = max(map(groups.count, groups))
    assert len(keys) / 20 <= len(valid) <= max(1.5 * len(keys) / 10, len(keys) / 10 + largest)
    assert set(strata[valid].tolist()) <= set(strata[train].tolist())  # every stratum that selects is trained


@given(speakers(fewest=5))
def test_folds_of_whole_groups(clips: tuple[list[str], list[str], Indices]) -> None:
    keys, groups, strata = clips
    everything = np.arange(len(keys))
    folds = cross_validation(everything, keys, strata, groups)
    assert len(folds) == 5
    assert np.sort(np.concatenate([fold.test for fold in folds])).tolist() == everything.tolist()
    for fold in folds:
        assert np.sort(np.concatenate([fold.train, fold.valid, fold.test])).tolist() == everything.tolist()
    split = any(groups_in(fold.test, groups) & groups_in(np.union1d(fold.train, fold.valid), groups) for fold in folds)
    if split:  # only where most strata lie in one group each
        alone = [len({g for g, s in zip(groups, strata, strict=True) if s == stratum}) == 1 for stratum in set(strata)]
        assert any(alone)
        return
    largest = max(map(groups.count, groups))
    assert all(abs(len(fold.test) - len(keys) / 5) <= 2 * largest for fold in folds)
    backwards = cross_validation(everything[::-1], [f"other {key}" for key in keys], strata, groups)
    assert [fold.test.tolist() for fold in folds] == [fold.test.tolist() for fold in backwards]


def spoken(people: int, each: int, classes: int) -> tuple[list[str], list[str], Indices]:
    """Every person says each class equally often."""
    groups = [f"p{number // each}" for number in range(people * each)]
    return [f"k{number}" for number in range(len(groups))], groups, np.arange(len(groups)) % classes


def test_held_out_groups_keep_the_strata_in_proportion() -> None:
    """Half of the people say mostly a, half mostly b."""
    groups = [f"p{number // 10}" for number in range(400)]
    strata = np.array([int((number % 10 == 0) != (number // 10 % 2)) for number in range(400)], np.int64)
    keys = [f"k{number}" for number in range(400)]
    _, valid = hold_out(np.arange(400), keys, strata, groups)
    assert len(valid) == 40
    assert np.bincount(strata[valid]).tolist() == [20, 20]
    for fold in cross_validation(np.arange(400), keys, strata, groups):
        assert np.bincount(strata[fold.test]).tolist() == [40, 40]


def test_which_groups_are_held_out_is_drawn_and_is_not_the_order_of_names() -> None:
    keys, groups, strata = spoken(40, 10, 5)
    _, valid = hold_out(np.arange(400), keys, strata, groups)
    assert groups_in(valid, groups) not in ({"p0", "p1", "p2", "p3"}, {"p0", "p1", "p10", "p11"})
    tests = [groups_in(fold.test, groups) for fold in cross_validation(np.arange(400), keys, strata, groups)]
    assert groups_in(valid, groups) not in tests


@pytest.mark.parametrize(("people", "held"), [(2, 1), (3, 1), (4, 1), (7, 1), (18, 2)])
def test_few_groups_are_held_out_as_near_to_one_in_ten_as_they_allow(people: int, held: int) -> None:
    keys, groups, strata = spoken(people, 12, 3)
    train, valid = hold_out(np.arange(len(keys)), keys, strata, groups)
    assert len(groups_in(valid, groups)) == held
    assert not groups_in(valid, groups) & groups_in(train, groups)


def test_a_group_that_is_too_large_stays_in_training() -> None:
    keys = [f"k{number}" for number in range(400)]
    groups = ["most"] * 320 + [f"p{number // 4}" for number in range(80)]
    train, valid = hold_out(np.arange(400), keys, np.zeros(400, np.int64), groups)
    assert len(valid) == 40
    assert "most" in groups_in(train, groups)


def test_a_stratum_of_one_group_stays_in_training() -> None:
    keys, groups, strata = spoken(20, 6, 3)
    strata[:6] = 7  # only p0 says it
    train, valid = hold_out(np.arange(120), keys, strata, groups)
    assert "p0" in groups_in(train, groups)
    assert 6 <= len(valid) <= 18
    assert not groups_in(valid, groups) & groups_in(train, groups)


def test_the_last_group_of_a_stratum_stays_in_training() -> None:
    """Both groups that have it are small enough, and together a tenth of the clips."""
    keys = [f"k{number}" for number in range(100)]
    groups = ["most"] * 90 + ["a"] * 5 + ["b"] * 5
    strata = np.array([0] * 90 + [1] * 10)
    train, valid = hold_out(np.arange(100), keys, strata, groups)
    assert len(valid) == 5
    assert set(strata[train]) == {0, 1}
    assert len(groups_in(valid, groups)) == 1


def test_groups_that_must_stay_take_no_place_among_those_held_out() -> None:
    """Ten speakers say what only they say, so a tenth of all clips is held out from the ten others."""
    groups = [f"p{number // 6}" for number in range(120)]
    strata = np.array([number % 2 if number < 60 else 2 + number // 6 for number in range(120)])
    train, valid = hold_out(np.arange(120), [f"k{number}" for number in range(120)], strata, groups)
    assert len(valid) == 12
    assert valid.max() < 60
    assert not groups_in(valid, groups) & groups_in(train, groups)


GOLDEN_VALID = [0, 5, 7, 11, 15, 19]
GOLDEN_FOLDS = [
    ([8, 15, 20, 25, 27, 28, 33, 34, 47, 49, 50, 57], [0, 13, 18, 35, 44]),
    ([0, 22, 30, 31, 35, 36, 40, 42, 43, 53, 56, 59], [4, 11, 18, 44, 57]),
    ([1, 3, 7, 9, 10, 11, 12, 32, 37, 38, 44, 45], [18, 20, 40, 50, 54]),
    ([2, 4, 6, 13, 16, 17, 24, 26, 29, 48, 54, 58], [0, 18, 25, 35, 44]),
    ([5, 14, 18, 19, 21, 23, 39, 41, 46, 51, 52, 55], [20, 25, 36, 38, 57]),
]
GOLDEN_DIGEST = "6a91d20b222e7100f931d76a1f2b80385732422298db7afc31556138f596242e"


def test_without_groups_the_clips_are_those_of_before_there_were_groups() -> None:
    """The lists were made by the code of before."""
    keys, strata = [f"a.tar/{number}" for number in range(60)], np.arange(60) * 7 % 3
    assert hold_out(np.arange(60), keys, strata)[1].tolist() == GOLDEN_VALID
    folds = cross_validation(np.arange(60), keys, strata)
    assert [(fold.test.tolist(), fold.valid.tolist()) for fold in folds] == GOLDEN_FOLDS


# ---------------------------------------------------------------- what is said


def folds_of(
    clips: Mapping[str, Indices], shards: Mapping[str, str], groups: Sequence[str], task: Task = SPLITS, **options: Any
) -> tuple[list[Fold], list[str]]:
    keys = [f"k{number}" for number in range(len(groups))]
    arguments: dict[str, Any] = {"protocol": CORRECTED, "strata": np.arange(len(groups)) % 3, **options}
    shards_of_part = {part: frozenset(names) for part, names in shards.items()}
    return make_folds(arguments["protocol"], task, clips, shards_of_part, keys, arguments["strata"], groups)


def test_groups_that_an_official_split_splits_are_said_and_it_stays() -> None:
    groups = [f"p{number // 6}" for number in range(120)]
    clips = {"train": np.arange(100), "valid": np.arange(60), "test": np.arange(100, 120)}
    (fold,), notes = folds_of(clips, {"train": "a", "valid": "v", "test": "b"}, groups)
    assert (fold.train.tolist(), fold.test.tolist()) == (clips["train"].tolist(), clips["test"].tolist())
    assert notes == ["1 of 20 groups, such as 'p16', are both in train and in test: scores may be too high"]
    assert folds_of(clips, {"train": "a", "valid": "v", "test": "b"}, groups, protocol=XARES)[1] == notes
    (_,), notes = folds_of({**clips, "test": np.arange(102, 120)}, {"train": "a", "valid": "v", "test": "b"}, groups)
    assert notes == []


def test_groups_that_official_folds_split_are_said_and_none_is_split_for_selection() -> None:
    groups = [f"p{number // 6}" for number in range(270)]
    clips = {"1": np.arange(88), "2": np.arange(88, 180), "3": np.arange(180, 270)}
    folds, notes = folds_of(clips, {"1": "a", "2": "b", "3": "c"}, groups, FOLDED)
    assert notes == ["1 of 45 groups, such as 'p14', are in several folds: scores may be too high"]
    for fold in folds:
        assert fold.test.tolist() == clips[fold.name].tolist()
        assert not groups_in(fold.train, groups) & groups_in(fold.valid, groups)
        assert abs(len(fold.valid) - 18) <= 6


def test_clips_are_held_out_one_by_one_where_the_group_is_the_class() -> None:
    """Who speaks is what is learnt, so a speaker held out whole could neither be trained nor select."""
    classes = np.arange(120) % 12
    speaker = [f"p{number}" for number in classes]
    clips = {"train": np.arange(90), "test": np.arange(90, 120)}
    (fold,), notes = folds_of(clips, {"train": "a", "test": "b"}, speaker, strata=classes)
    assert notes[1:] == [
        "12 of 12 groups, such as 'p0', are both in train and in test: scores may be too high",
        "its groups cannot be held out whole, so clips are, one by one",
    ]
    assert len(fold.valid) == 9
    videos = [f"{name}, video {number // 36}" for number, name in enumerate(speaker)]
    (fold,), notes = folds_of(clips, {"train": "a", "test": "b"}, videos, strata=classes)
    assert not any("one by one" in note for note in notes)
    assert not groups_in(fold.train, videos) & groups_in(fold.valid, videos)
    assert set(classes[fold.train]) == set(range(12))


def test_cross_validation_by_groups_or_if_it_cannot_be_by_clips() -> None:
    everything = {"train": np.arange(120), "test": np.arange(120)}
    people = [f"p{number // 6}" for number in range(120)]
    folds, notes = folds_of(everything, {"train": "a", "test": "a"}, people)
    assert notes == ["train and test share clips, so 120 clips are cross-validated in 5 folds"]
    for fold in folds:
        assert sum(len(groups_in(part, people)) for part in (fold.train, fold.valid, fold.test)) == 20
        assert len(fold.test) == 24
    three = [f"p{number // 40}" for number in range(120)]
    folds, notes = folds_of(everything, {"train": "a", "test": "a"}, three)
    assert notes[0] == "train and test share clips, so 120 clips are cross-validated in 3 folds"
    assert all(len(groups_in(fold.test, three)) == 1 for fold in folds)
    for groups, strata in ((["one"] * 120, np.arange(120) % 3), ([f"p{n % 12}" for n in range(120)], np.arange(120) % 12)):
        folds, notes = folds_of(everything, {"train": "a", "test": "a"}, groups, strata=strata)
        assert [len(fold.test) for fold in folds] == [24] * 5
        assert notes[1:] == [
            "folds of whole groups cannot be both trained and tested on, so clips are divided one by one",
            "its groups cannot be held out whole, so clips are, one by one",
        ]


# ---------------------------------------------------------------- from shards to a result


def assembled(folder: Path, group: str, clips: Mapping[str, Any]) -> Dataset:
    """Clips of one shard, in training."""
    task = load_task(Path("mine.toml"), task_toml(crop_seconds=f'group = "{group}"'))
    for part in ("train", "valid", "test"):
        write_shard(folder / "mine" / f"{part}.tar", {"x": (b"x", {"label": "a"})})
    data = prepare(task, folder, Digests(folder / "cache"), None, ignore)
    count = len(clips)
    header = Header(
        store_version=STORE_VERSION,
        model="m",
        model_sha256="",
        task="mine",
        shard="train.tar",
        expected=count,
        damage=None,
        audio_seconds=1.0,
    )
    stored = [Clip(key, 2.0, json.dumps(label)) for key, label in clips.items()]
    shard = EmbeddedShard(header, np.zeros((count, 2), np.float32), np.arange(count), stored, [])
    return assemble(data, {folder / "mine" / "train.tar": shard})


def test_a_data_set_knows_the_group_of_each_clip(tmp_path: Path) -> None:
    clips = {f"k{number}": {"label": "a", "speaker": f"s{number % 4}"} for number in range(20)}
    clips["k7"] = {"label": "b"}
    dataset = assembled(tmp_path, "speaker", clips)
    assert dataset.groups is not None
    assert dataset.groups[:8] == ["s0", "s1", "s2", "s3", "s0", "s1", "s2", "train.tar/k7"]  # one that is not told: its own
    assert dataset.group_of_clip is not None
    assert dataset.group_of_clip.dtype == np.int64
    assert dataset.group_of_clip.tolist()[:9] == [0, 1, 2, 3, 0, 1, 2, 4, 0]
    assert dataset.group_note is None


@pytest.mark.parametrize(("told", "used"), [(20, True), (18, True), (17, False), (0, False)])
def test_groups_are_used_where_nine_in_ten_clips_tell_theirs(told: int, used: bool, tmp_path: Path) -> None:
    keys = [f"s{number % 4}_{number}" if number < told else f"{number}" for number in range(20)]
    dataset = assembled(tmp_path, "{group}_*", {key: {"label": "a"} for key in keys})
    assert (dataset.groups is not None) == (dataset.group_of_clip is not None) == used
    so = "which names their group, so clips are taken one by one"
    said = f"only {told} of 20 clips have a key of the form '{{group}}_*', {so}"
    assert dataset.group_note == (None if used else said)
    by_json = assembled(tmp_path, "who", {key: {"label": "a"} for key in keys})
    assert by_json.group_note == f"only 0 of 20 clips have 'who' in their json, {so}"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """48 clips of twelve players in training, some of whom are in the test too."""
    folder = tmp_path_factory.mktemp("grouped")
    sounds = tones(72, 3, noise=2)
    clips = {f"p{number // 4}_{number}": value for number, value in enumerate(sounds.values())}
    keys = list(clips)
    write_shard(folder / "data/mine/train.tar", {key: clips[key] for key in keys[:50]})
    write_shard(folder / "data/mine/test.tar", {key: clips[key] for key in keys[50:]})
    splits, classes = 'splits = { train = "train.tar", test = "test.tar" }', f"classes = {json.dumps(CLASSES)}"
    label = 'key = "label"'
    (folder / "mine.toml").write_text(
        task_toml(splits=splits, crop_seconds='group = "{group}_*"', classes=classes, key=label)
    )
    return evaluate(
        write_encoder(folder / "bank.onnx"),
        [str(folder / "mine.toml")],
        data=folder / "data",
        cache=folder / "cache",
        output=folder / "result.json",
        seeds=2,
    )


def test_a_result_keeps_the_groups_and_is_scored_again_without_them(done: Evaluation) -> None:
    assert done.path is not None
    side = Side.read(done.path)
    for record in side.scored().values():
        assert record.notes == [
            "there is no validation split of its own, so 4 of 50 training clips are held out for selection",
            "1 of 18 groups, such as 'p12', are both in train and in test: scores may be too high",
        ]
        arrays = read_predictions(done.path, record)
        assert arrays["group"].dtype.kind == "U"
        of_key = dict(zip(arrays["key"], arrays["group"], strict=True))
        assert len(of_key) == 22
        assert all(key.split("/")[-1].startswith(f"{group}_") for key, group in of_key.items())
        assert float(point(verified(side, record)[1]).mean()) == record.score


def test_predictions_whose_groups_are_no_texts_are_refused(done: Evaluation, tmp_path: Path) -> None:
    assert done.path is not None
    record = done.result.tasks[0]
    file = tmp_path / str(record.predictions)
    file.parent.mkdir()
    np.savez(
        file,
        **{
            **read_predictions(done.path, record),
            "group": np.zeros(len(done.predictions["mine", "linear"]["key"]), np.int64),
        },
    )
    with pytest.raises(DataError, match="group must be a text"):
        read_predictions(tmp_path / done.path.name, record)


# ---------------------------------------------------------------- packed


def labels_of(folder: Path) -> dict[str, Any]:
    """The json of every clip in a folder's shards, by key."""
    return {
        sample.key: json.loads(read_label(path, sample.label))
        for path in folder.glob("*.tar")
        for sample in index_shard(path).samples
    }


@pytest.mark.parametrize("kind", ["tags", "events", "captions", "transcript", "number"])
def test_pack_writes_the_group_into_each_clip_and_its_key_into_the_task(kind: str, tmp_path: Path) -> None:
    rows = write_kind(tmp_path / "audio", kind)
    paths = sorted({row.get("path", row.get("filename")) for row in rows})
    player = {path: f"{path.split('/')[0]} {number % 5}" if number else "" for number, path in enumerate(paths)}
    grouped = [{**row, "player": player[row.get("path", row.get("filename"))]} for row in rows]
    splits_apart = [{**row, "player": f"{row['split']} {row['player']}" if row["player"] else ""} for row in grouped]
    table = write_table(tmp_path / "labels.jsonl", splits_apart)
    packed = pack(tmp_path / "audio", table, tmp_path / "out", group="player", allow_drops=True)
    assert packed.task.data.group == "group"
    assert load_task(tmp_path / "out/mine.toml") == packed.task
    plain = pack(tmp_path / "audio", write_table(tmp_path / "plain.jsonl", rows), tmp_path / "plain", allow_drops=True)
    assert plain.task.data.group is None
    with_groups, without = labels_of(tmp_path / "out/mine"), labels_of(tmp_path / "plain/mine")
    assert with_groups.keys() == without.keys()
    wanted = {row.get("path", row.get("filename")): row["player"] for row in splits_apart}
    of_key = {key_of(path): group or path for path, group in wanted.items()}  # without a group: one of its own
    for key, label in with_groups.items():
        assert packed.task.data.group_of(key, label) == of_key[key]
        target = plain.task.target
        assert str(packed.task.encode(label)) == str(target.encode(parse_label(json.dumps(without[key]))))


def test_a_group_of_a_packed_task_is_not_split_in_selection(tmp_path: Path) -> None:
    rows = [{**row, "who": f"player {number % 9}"} for number, row in enumerate(write_tones(tmp_path / "audio", 72))]
    for number, row in enumerate(rows):
        row["split"] = "test" if number % 9 > 6 else "train"
    pack(tmp_path / "audio", write_table(tmp_path / "labels.csv", rows), tmp_path / "out", group="who")
    said: list[str] = []
    done = evaluate(
        write_encoder(tmp_path / "bank.onnx"),
        [str(tmp_path / "out/mine.toml")],
        data=tmp_path / "out",
        cache=tmp_path / "cache",
        seeds=1,
        observer=lambda event: said.append(str(event)),
    )
    record = done.result.tasks[0]
    assert record.status == "ok"
    assert record.notes == ["there is no validation split of its own, so 8 of 56 training clips are held out for selection"]
    assert set(done.predictions["mine", "linear"]["group"].tolist()) == {"player 7", "player 8"}


def test_a_group_whose_name_is_too_long_is_refused(tmp_path: Path) -> None:
    rows = [{**row, "who": "x" * 201} for row in write_tones(tmp_path / "audio", 8)]
    table = write_table(tmp_path / "labels.csv", rows)
    with pytest.raises(DataError, match=r"line 2 names a group of 201 characters; a name has at most 200"):
        pack(tmp_path / "audio", table, None, group="who")
