"""Choosing tasks, finding their folders and shards, and the digests kept of them."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
from shard_makers import task_toml

from xares_onnx import catalog
from xares_onnx.catalog import (
    SUITES,
    Digests,
    cache_folder,
    data_folder,
    find_parts,
    in_group,
    missing_data,
    named_tasks,
    on_disk,
    part_globs,
    shipped_tasks,
    suite_tasks,
)
from xares_onnx.errors import DataMissingError, UnknownTaskError, UsageError
from xares_onnx.events import ignore
from xares_onnx.task import Task, load_task

# X-ARES 0.1.3's clip tasks of one label. Name, domain, Zenodo record, weight, seconds of a crop, json key, classes and the
# start of the SHA-256 of their names joined by line ends, epochs, batch, kNN, shards: of train, valid and test, or of folds.
FACTS = """
asvspoof2015           speech       14718430  2000  -   binary_spoof           2     81a50ba0  5   64  knn  asvspoof_train asvspoof_valid asvspoof_eval
cremad                 speech       14646870  1116  -   label                  6     2fee0139  10  32  knn  wds-audio-train wds-audio-valid wds-audio-test
esc50                  environment  14614287  400   -   label                  50    -         10  32  knn  1-5 wds-audio-fold-{}-*.tar
finger_snap            environment  private   5000  -   tag                    2     c25c7af7  20  32  knn  finger_snap_train finger_snap_test finger_snap_test
fluentspeechcommands   speech       14722453  2000  -   transcription          248   e3711d0f  10  32  knn  fluentspeechcommands_train fluentspeechcommands_valid fluentspeechcommands_test
freemusicarchive       music        14725056  800   10  genre                  8     0f71892a  3   32  knn  fma_small_train fma_small_valid fma_small_test
fsdkaggle2018          environment  14725117  1600  -   sound                  41    330f2599  3   64  -    fsd18_train fsd18_test fsd18_test
gtzan_genre            music        14722472  100   -   genre                  10    91c7460c  10  32  knn  0-9 gtzan_fold_{}_0000000.tar
inside_outside_car     environment  private   5000  -   position               2     9d27d540  20  32  knn  inside_outside_car_train inside_outside_car_test inside_outside_car_test
key_scratching         environment  private   5000  -   tag                    2     c25c7af7  20  32  knn  key_scratching_train key_scratching_test key_scratching_test
libricount             speech       14722478  1144  -   num_speakers           11    -         10  64  knn  0-4 libricount_fold0{}.tar
librispeechmalefemale  speech       14716252  2620  5   gender                 2     4f9c6c3d  10  32  knn  train-clean-100 dev-clean test-clean
liveenv                environment  private   5000  -   soundevent             28    8cb7124f  50  32  -    liveenv_train liveenv_test liveenv_test
nsynthinstument        music        14725174  2000  -   instrument_family_str  11    ca4ee8cb  10  32  knn  nsynth_train nsynth_valid nsynth_test
ravdess                speech       14722524  360   -   emotion                8     7a5327f6  10  32  knn  0-3 ravdess_fold_{}_0000000.tar
speechcommandsv1       speech       14722647  2000  -   labels                 30    97e728c1  10  64  knn  wds-audio-train wds-audio-valid wds-audio-test
subway_broadcast       environment  private   5000  -   broadcasting           2     -         20  32  knn  subway_broadcast subway_broadcast subway_broadcast
urbansound8k           environment  14722683  873   -   soundevent             10    5b3825eb  10  32  knn  1-10 urbansound_fold{}_0000000.tar
vocalimitations        environment  14862060  1867  -   imitation              302   fc0897c3  20  32  knn  0-2 vocal_imitations_fold0{}_0000000.tar
vocalsound             speech       14722710  2000  -   label                  6     3edebcc6  10  32  knn  train valid test
voxceleb1              speech       14811963  2000  6   speakerid              1251  946d4561  10  32  knn  voxceleb1_train voxceleb1_valid voxceleb1_test
voxlingua33            speech       14812245  1609  10  labels                 33    c1faed21  10  64  knn  train_subset dev dev
"""  # noqa: E501

# Its README's scores of dasheng, wav2vec2, whisper and data2vec: of the linear head, then of kNN.
PUBLISHED = """
asvspoof2015           .964 .924 .966 .937   .869 .858 .843 .942
cremad                 .767 .541 .572 .523   .380 .221 .372 .351
esc50                  .857 .510 .528 .229   .618 .081 .191 .040
finger_snap            .870 .872 .861 .808   .848 .787 .401 .461
fluentspeechcommands   .946 .468 .776 .978   .260 .017 .032 .630
freemusicarchive       .643 .469 .581 .334   .592 .251 .406 .106
fsdkaggle2018          .534 .241 .241 .153
gtzan_genre            .851 .630 .622 .448   .758 .303 .350 .108
inside_outside_car     .972 .928 .866 .869   .798 .575 .730 .588
key_scratching         .999 .983 .985 .909   .955 .923 .691 .550
libricount             .681 .583 .549 .492   .311 .235 .246 .176
librispeechmalefemale  .986 .948 .973 .752   .791 .606 .617 .724
liveenv                .986 .955 .887 .759
nsynthinstument        .688 .443 .532 .336   .499 .251 .205 .179
ravdess                .749 .442 .459 .467   .408 .169 .296 .313
speechcommandsv1       .969 .714 .933 .927   .903 .208 .096 .852
subway_broadcast       .972 .930 .942 .869   .949 .533 .884 .530
urbansound8k           .833 .659 .687 .426   .662 .339 .215 .156
vocalimitations        .253 .147 .180 .128   .107 .010 .016 .018
vocalsound             .910 .768 .860 .803   .382 .269 .405 .308
voxceleb1              .780 .340 .388 .105   .262 .003 .010 .033
voxlingua33            .814 .553 .873 .620   .376 .034 .360 .058
"""
ENCODERS = ("dasheng", "wav2vec2", "whisper", "data2vec")

facts = [row.split(None, 11) for row in FACTS.strip().splitlines()]
scores = [row.split() for row in PUBLISHED.strip().splitlines()]


# ---------------------------------------------------------------- choosing tasks


def names(tasks: list[Task]) -> list[str]:
    return [task.name for task in tasks]


def test_tasks_are_named_or_matched_each_once_in_the_order_given() -> None:
    assert names(named_tasks(["gtzan_genre", "esc50"])) == ["gtzan_genre", "esc50"]
    assert names(named_tasks(["vox*", "esc50", "voxlingua33", "vox*"])) == ["voxceleb1", "voxlingua33", "esc50"]
    assert set(names(named_tasks(["*"]))) == set(shipped_tasks())
    assert named_tasks([]) == []


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("esc-50", "; did you mean 'esc50'"),
        ("voxceleb", "; did you mean 'voxceleb1'"),
        ("ESC50", ""),
        ("qqqqqqqq", ""),
        ("zz*", ""),
    ],
)
def test_an_unknown_name_gets_the_nearest_ones(name: str, nearest: str) -> None:
    with pytest.raises(UnknownTaskError) as caught:
        named_tasks(["gtzan_genre", name])
    assert str(caught.value).startswith(f"there is no task {name!r}{nearest}")
    assert "`xares-onnx tasks` lists them" in str(caught.value)
    assert caught.value.exit_code == 2


def test_two_files_cannot_share_a_name(tmp_path: Path) -> None:
    for number, (name, classes) in enumerate([("esc50", 'classes = ["a", "b"]'), ("mine", 'classes = ["a", "b"]')]):
        (tmp_path / f"{number}.toml").write_text(task_toml(name, classes=classes))
    (tmp_path / "2.toml").write_text(task_toml("mine"))
    with pytest.raises(UsageError, match=r"0\.toml uses the name 'esc50' of another task"):
        named_tasks([str(tmp_path / "0.toml")])
    with pytest.raises(UsageError, match=r"2\.toml uses the name 'mine' of another task"):
        named_tasks([str(tmp_path / "1.toml"), str(tmp_path / "2.toml")])
    assert names(named_tasks([str(tmp_path / "1.toml")] * 2)) == ["mine"]


def test_suites() -> None:
    suites = {suite: set(names(suite_tasks(suite))) for suite in SUITES}
    private = {row[0] for row in facts if row[2] == "private"}
    assert (
        suites["private"]
        == private
        == {"finger_snap", "inside_outside_car", "key_scratching", "liveenv", "subway_broadcast"}
    )
    assert suites["public"] == {row[0] for row in facts} - private
    assert suites["all"] == suites["public"] | private
    for domain in ("speech", "environment", "music"):
        assert suites[domain] == {row[0] for row in facts if row[1] == domain}
    assert suites["synthetic"] == set(shipped_tasks()) - suites["all"]
    assert [len(suites[name]) for name in ("all", "public", "private", "synthetic")] == [22, 17, 5, 6]
    with pytest.raises(UsageError, match="there is no suite 'musik'; choose from all, public"):
        suite_tasks("musik")


def test_a_users_task_is_in_the_averages_of_its_domain() -> None:
    task = load_task(Path("mine.toml"), task_toml())
    assert [group for group in SUITES if in_group(task, group)] == ["all", "public", "speech"]


def test_tasks_come_by_domain_public_ones_first() -> None:
    order = [(task.domain, task.private) for task in shipped_tasks().values()]
    domains = ["speech", "environment", "music", "synthetic"]
    assert order == sorted(order, key=lambda entry: (domains.index(entry[0]), entry[1]))


# ---------------------------------------------------------------- folders


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with no environment variables set and a data folder of the user elsewhere."""
    monkeypatch.chdir(tmp_path)
    for variable in (catalog.DATA_VARIABLE, catalog.CACHE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(catalog.platformdirs, "user_data_dir", lambda *_, **__: str(tmp_path / "user"))
    monkeypatch.setattr(catalog.platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "usercache"))
    return tmp_path


def test_data_are_where_they_are_said_to_be_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert data_folder(None) == place / "user"
    (place / "env").mkdir()
    assert data_folder(None) == Path("env")
    (place / "named").mkdir()
    monkeypatch.setenv("XARES_ONNX_DATA", "named")
    assert data_folder(None) == Path("named")
    (place / "given").mkdir()
    assert data_folder(place / "given") == place / "given"
    monkeypatch.setenv("XARES_ONNX_DATA", "")
    assert data_folder(None) == Path("env")


def test_a_named_folder_must_be_there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "env").mkdir()
    with pytest.raises(DataMissingError, match="data folder none does not exist; --data names") as caught:
        data_folder(Path("none"))
    assert caught.value.exit_code == 4
    monkeypatch.setenv("XARES_ONNX_DATA", "none")
    with pytest.raises(DataMissingError, match="data folder none does not exist"):
        data_folder(None)


def test_the_cache_is_where_it_is_said_to_be_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder(None) == place / "usercache"
    monkeypatch.setenv("XARES_ONNX_CACHE", "named")
    assert cache_folder(None) == Path("named")
    assert cache_folder(Path("given")) == Path("given")


# ---------------------------------------------------------------- what is on disk


def fill(folder: Path, *paths: str, size: int = 10_000_000) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with (folder / path).open("wb") as file:
            file.truncate(size)


def test_parts_are_found_by_their_patterns(tmp_path: Path) -> None:
    task = shipped_tasks()["freemusicarchive"]
    assert find_parts(task, tmp_path) is None
    files = [f"freemusicarchive/fma_small_{name}.tar" for name in ("train01", "train00", "valid0", "test0")]
    fill(
        tmp_path,
        *files,
        "freemusicarchive/other.tar",
        "freemusicarchive/fma_small_train00.tar.part",
        "elsewhere/fma_small_train9.tar",
    )
    (tmp_path / "freemusicarchive" / "fma_small_train_folder.tar").mkdir()
    parts = find_parts(task, tmp_path)
    assert parts is not None
    assert {part: [path.name for path in paths] for part, paths in parts.items()} == {
        "train": ["fma_small_train00.tar", "fma_small_train01.tar"],
        "valid": ["fma_small_valid0.tar"],
        "test": ["fma_small_test0.tar"],
    }
    assert on_disk(task, tmp_path) == "4 shards, 0.04 GB"


def test_a_task_that_lacks_a_part_is_not_there(tmp_path: Path) -> None:
    task = shipped_tasks()["esc50"]
    assert on_disk(task, tmp_path) == "no"
    fill(tmp_path, *(f"esc50/wds-audio-fold-{fold}-0.tar" for fold in (1, 2, 4)))
    assert find_parts(task, tmp_path) is None
    assert on_disk(task, tmp_path) == "3 shards, 0.03 GB, lacks 3, 5"
    assert "holds no wds-audio-fold-3-*.tar" in missing_data(task, tmp_path)


def test_a_shard_in_two_parts_is_one_on_disk(tmp_path: Path) -> None:
    fill(tmp_path, "subway_broadcast/subway_broadcast0.tar")
    assert on_disk(shipped_tasks()["subway_broadcast"], tmp_path) == "1 shards, 0.01 GB"


def test_a_link_to_nothing_is_no_shard(tmp_path: Path) -> None:
    fill(tmp_path, "subway_broadcast/subway_broadcast0.tar")
    task = shipped_tasks()["subway_broadcast"]
    (tmp_path / "subway_broadcast" / "subway_broadcast1.tar").symlink_to(tmp_path / "gone")
    assert on_disk(task, tmp_path) == "1 shards, 0.01 GB"
    (tmp_path / "subway_broadcast" / "subway_broadcast0.tar").unlink()
    assert on_disk(task, tmp_path) == "no"
    assert find_parts(task, tmp_path) is None
    assert "holds no subway_broadcast*.tar" in missing_data(task, tmp_path)


@pytest.mark.parametrize(
    ("task", "how"),
    [
        ("esc50", "put the tars of Zenodo record 14614287 there, or name another folder by --data"),
        ("finger_snap", "its data were never published; who has them puts the tars there"),
        ("mine", "put its shards there, or name another folder by --data"),
    ],
)
def test_missing_data_are_one_sentence_on_how_to_get_them(task: str, how: str, tmp_path: Path) -> None:
    chosen = shipped_tasks()[task] if task in shipped_tasks() else load_task(Path("mine.toml"), task_toml())
    first = next(iter(part_globs(chosen).values()))
    assert missing_data(chosen, tmp_path) == f"no data for {task}: {tmp_path / task} holds no {first}; {how}"


def test_synthetic_tasks_are_built_in(tmp_path: Path) -> None:
    assert on_disk(shipped_tasks()["synthetic_pitch"], tmp_path) == "built in"


# ---------------------------------------------------------------- digests


def test_a_shard_is_read_once_for_its_digest_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, read = tmp_path / "a.tar", []
    shard.write_bytes(b"1" * 1_000)
    digest = catalog.file_digest
    monkeypatch.setattr(catalog, "file_digest", lambda path: read.append(path) or digest(path))
    sha = hashlib.sha256(b"1" * 1_000).hexdigest()
    assert Digests(tmp_path / "cache").of(shard)[0] == sha
    assert Digests(tmp_path / "cache").of(shard)[0] == sha
    assert len(read) == 1

    before = shard.stat()
    time.sleep(0.01)
    shard.write_bytes(b"2" * 1_000)  # of the same size, and put back to the same time
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Digests(tmp_path / "cache").of(shard)[0] == hashlib.sha256(b"2" * 1_000).hexdigest()
    assert len(read) == 2

    (note,) = (tmp_path / "cache" / "digests").iterdir()
    for damaged in (b"", b"[]", note.read_bytes()[:-5], b'["x", 5]'):
        note.write_bytes(damaged)
        assert Digests(tmp_path / "cache").of(shard)[0] == hashlib.sha256(b"2" * 1_000).hexdigest()


def test_digests_of_parts_name_every_file_once(tmp_path: Path) -> None:
    shards = [tmp_path / name for name in ("a.tar", "b.tar")]
    for shard in shards:
        shard.write_bytes(shard.name.encode())
    seen: list[Any] = []
    found = Digests(tmp_path / "cache").of_parts("mine", {"train": shards, "test": shards[1:]}, seen.append)
    assert {path: digest for path, (digest, _) in found.items()} == {
        path: hashlib.sha256(path.name.encode()).hexdigest() for path in shards
    }
    assert [(event.done, event.total) for event in seen] == [(0, 2), (1, 2), (2, 2)]
    with pytest.raises(DataMissingError, match=r"none\.tar cannot be read"):
        Digests(tmp_path / "cache").of_parts("mine", {"train": [tmp_path / "none.tar"]}, ignore)
