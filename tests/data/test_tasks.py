"""Task files and targets: X-ARES's facts, a user's own file, and every way to get one wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_makers import task_toml
from xares_facts import ENCODERS, facts, others, scores

from xares_onnx.data.catalog import find_parts, missing_data, named_tasks, part_globs, shipped_tasks
from xares_onnx.data.targets import ClassTarget, IntegerTarget
from xares_onnx.data.task import HEADS, Task, load_task
from xares_onnx.errors import LabelError, TaskFileError


def parsed(text: str) -> Task:
    return load_task(Path("mine.toml"), text)


# ---------------------------------------------------------------- what is shipped


def test_all_28_tasks_are_shipped_and_one_of_every_kind_of_our_own() -> None:
    theirs = {row[0] for row in facts} | {row[0] for row in others}
    assert len(theirs) == 28
    ours = [task for task in shipped_tasks().values() if task.name not in theirs]
    assert {task.domain for task in ours} == {"synthetic"}
    assert {task.kind for task in ours} == set(HEADS) - {"integer"}


@pytest.mark.parametrize("row", others, ids=lambda row: row[0])
def test_a_task_of_another_kind_states_the_facts_of_xares(row: list[str]) -> None:
    name, domain, record, weight, crop, kind, classes, vocabulary, epochs, batch, head, metric, shards = row
    task = shipped_tasks()[name]
    assert (task.domain, task.data.zenodo, task.kind, task.private) == (domain, record, kind, False)
    assert task.weight == (None if weight == "-" else float(weight))
    assert task.data.crop_seconds == (None if crop == "-" else float(crop))
    assert len(task.target.class_names) == int(classes)
    if vocabulary != "-":
        assert hashlib.sha256("\n".join(task.target.class_names).encode()).hexdigest()[:8] == vocabulary
    assert (task.head.kind, task.head.epochs, task.head.batch_size) == (head, int(epochs), int(batch))
    assert (task.head.learning_rate, task.head.positive_weight) == (1e-3, 10 if name == "maestro" else 1)
    assert (task.score.metric, task.knn) == (metric, False)
    assert task.score.segment_seconds == {"desed": 1.0, "maestro": 0.1}.get(name)
    stems = dict(zip(("train", "valid", "test"), shards.split(), strict=True))
    assert part_globs(task) == {split: f"{stem}*.tar" for split, stem in stems.items()}


@pytest.mark.parametrize("row", facts, ids=lambda row: row[0])
def test_a_shipped_task_states_the_facts_of_xares(row: list[str]) -> None:
    name, domain, record, weight, crop, key, classes, vocabulary, epochs, batch, knn, shards = row
    task = shipped_tasks()[name]
    assert (task.name, task.domain, task.weight) == (name, domain, float(weight))
    assert task.private == (record == "private")
    assert task.data.zenodo == (None if task.private else record)
    assert task.data.crop_seconds == (None if crop == "-" else float(crop))
    assert task.target.key == key
    assert len(task.target.class_names) == int(classes)
    if vocabulary == "-":
        assert task.kind == "integer"
    else:
        assert task.kind == "class"
        assert hashlib.sha256("\n".join(task.target.class_names).encode()).hexdigest()[:8] == vocabulary
    assert (task.head.kind, task.head.epochs, task.head.batch_size, task.head.learning_rate) == (
        "linear",
        int(epochs),
        int(batch),
        1e-3,
    )
    assert (task.score.metric, task.knn) == ("accuracy", knn == "knn")
    first, rest = shards.split(None, 1)
    if "{}" in shards:
        low, high = map(int, first.split("-"))
        assert part_globs(task) == {str(fold): rest.format(fold) for fold in range(low, high + 1)}
    else:
        stems = dict(zip(("train", "valid", "test"), shards.split(), strict=True))
        assert part_globs(task) == {split: f"{stem}*.tar" for split, stem in stems.items()}


@pytest.mark.parametrize("row", scores, ids=lambda row: row[0])
def test_a_shipped_task_states_what_was_published(row: list[str]) -> None:
    published = shipped_tasks()[row[0]].published
    assert published is not None
    linear, knn = [float(score) for score in row[1:5]], [float(score) for score in row[5:]]
    assert published.linear == dict(zip(ENCODERS, linear, strict=True))
    assert published.knn == (dict(zip(ENCODERS, knn, strict=True)) if knn else {})


def test_published_scores_are_those_of_the_same_method_only() -> None:
    """X-ARES transcribes with a language model, which CTC heads do not stand beside."""
    asr, esc50 = shipped_tasks()["librispeech"], shipped_tasks()["esc50"]
    assert asr.published is not None
    assert esc50.published is not None
    assert asr.published_scores("head") == {}
    assert asr.with_head("llm").published_scores("head") == asr.published.linear
    assert esc50.published_scores("head") == esc50.published.linear
    assert esc50.published_scores("knn") == esc50.published.knn
    assert load_task(Path("mine.toml"), task_toml()).published_scores("head") == {}
    for name in ("desed", "maestro"):
        published = shipped_tasks()[name].published
        assert published is not None
        assert "whisper cannot be reproduced" in (published.note or "")


@pytest.mark.parametrize("task", shipped_tasks().values(), ids=lambda task: task.name)
def test_a_shipped_file_is_named_after_its_task_and_works_by_its_path(task: Task) -> None:
    path = Path(__file__).parents[2] / "tasks" / f"{task.name}.toml"
    assert load_task(path) == task
    assert named_tasks([str(path)]) == [task]


# ---------------------------------------------------------------- files


def test_a_users_own_file_works_like_a_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "anything.toml"
    path.write_text(task_toml(), encoding="utf-8")
    (task,) = named_tasks([str(path)])
    assert (task.name, task.kind, task.target.class_names) == ("mine", "class", ("a", "b", "c"))
    assert (task.weight, task.private, task.published, task.knn, task.head.epochs) == (None, False, None, True, 10)
    assert part_globs(task) == {"train": "train*.tar", "valid": "valid*.tar", "test": "test*.tar"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"title": 'titel = "Mine"'}, "unknown key titel; did you mean 'title'"),
        ({"splits": 'split = { train = "a", test = "b" }'}, r"unknown key \[data\] split; did you mean 'splits'"),
        ({"splits": 'splits = { train = "a", tets = "b" }'}, r"unknown key \[data\.splits\] tets; did you mean 'test'"),
        ({"kind": 'kind = "class"\nkeys = "label"'}, r"unknown key \[target\] keys; did you mean 'key'"),
        ({"kind": 'knid = "class"'}, r"unknown key \[target\] knid; did you mean 'kind'"),
        ({"classes": 'classes = ["a", "b"]\n[head]\nepoch = 3'}, r"unknown key \[head\] epoch; did you mean 'epochs'"),
        ({"classes": 'classes = ["a", "b"]\n[score]\nmetrics = 3'}, r"unknown key \[score\] metrics; did you mean 'metric'"),
        (
            {"classes": 'classes = ["a", "b"]\n[published]\nlin = {}'},
            r"unknown key \[published\] lin; did you mean 'linear'",
        ),
        (
            {"splits": 'folds = { pattern = "{fold}", number = [1, 2] }'},
            r"unknown key \[data\.folds\] number; did you mean 'numbers'",
        ),
        ({"title": "qqqq = 1"}, r"unknown key qqqq$"),
        ({"name": ""}, "missing required field `name`"),
        ({"key": ""}, r"missing required field `key` \(at `target`\)"),
        ({"kind": ""}, r"missing required field `kind` \(at `target`\)"),
        ({"splits": ""}, "needs either `splits` or `folds`"),
        ({"splits": 'splits = { train = "a" }'}, "`splits` needs train and test"),
        ({"splits": 'splits = {train="a", test="b"}\nfolds = {pattern="{fold}", numbers=[1, 2]}'}, "needs either"),
        ({"domain": 'domain = "speach"'}, "domain is 'speach', but must be one of 'speech', 'environment'"),
        ({"kind": 'kind = "tag"'}, r"target\.kind is 'tag', but must be one of 'class', 'integer', 'tags', 'events'"),
        (
            {"kind": 'kind = "tags"'},
            r"\[score\] metric 'accuracy' does not fit a target of kind 'tags'; write metric = 'mean",
        ),
        ({"kind": "kind = 3"}, r"Expected `str`, got `int` \(at `target\.kind`\)"),
        ({"kind": 'kind = "integer"'}, r"Expected `int`, got `array` \(at `target\.classes`\)"),
        ({"title": "title = 3"}, r"Expected `str`, got `int` \(at `title`\)"),
        ({"title": "title = 1979-05-27"}, r"Expected `str`, got `date` \(at `title`\)"),
        ({"classes": 'classes = ["a", "b", "a"]'}, r"`classes` needs at least two names, each once \(at `target`\)"),
        ({"classes": 'classes = ["a"]'}, "`classes` needs at least two names"),
        ({"classes": 'classes = ["a", 2]'}, r"Expected `str`, got `int` \(at `target\.classes\[1\]`\)"),
        ({"kind": 'kind = "integer"', "classes": "classes = 1"}, "`classes` must lie between 2 and"),
        ({"kind": 'kind = "integer"', "classes": "classes = 1_000_000_000_000"}, "`classes` must lie between 2 and"),
        ({"name": 'name = "../mine"'}, "`name` may hold letters"),
        ({"name": 'name = ".mine"'}, "`name` may hold letters"),
        ({"name": 'name = ""'}, "`name` may hold letters"),
        ({"name": 'name = "a/b"'}, "`name` may hold letters"),
        ({"title": 'title = "Mine"\nweight = -1'}, "`weight` must not be negative"),
        ({"title": 'title = "Mine"\nweight = nan'}, "`weight` must not be negative"),
        ({"crop_seconds": "crop_seconds = 0"}, "`crop_seconds` must lie between 0.1 and 3600"),
        ({"crop_seconds": "crop_seconds = nan"}, "`crop_seconds` must lie between 0.1 and 3600"),
        ({"classes": 'classes = ["a", "b"]\n[head]\nepochs = 0'}, "`epochs` must lie in"),
        ({"classes": 'classes = ["a", "b"]\n[head]\nlearning_rate = inf'}, "`learning_rate` above 0 and below 10"),
        ({"splits": 'folds = { pattern = "fold.tar", numbers = [1, 2] }'}, r"`pattern` 'fold\.tar' must hold \{fold\}"),
        ({"splits": 'folds = { pattern = "{fold}{0}", numbers = [1, 2] }'}, r"must hold \{fold\}"),
        ({"splits": 'folds = { pattern = "{fold.__class__}", numbers = [1, 2] }'}, r"must hold \{fold\}"),
        ({"splits": 'folds = { pattern = "{fold:99999999}", numbers = [1, 2] }'}, r"must hold \{fold\}"),
        ({"splits": 'folds = { pattern = "{fold}", numbers = [1] }'}, "`numbers` needs at least two folds"),
        ({"splits": 'folds = { pattern = "{fold}", numbers = [1, 1] }'}, "`numbers` needs at least two folds, each once"),
        ({"splits": 'folds = { pattern = "../{fold}", numbers = [1, 2] }'}, "must be a plain pattern inside"),
        ({"title": "title = "}, "is not valid TOML: .*line 2"),
        ({"title": "title = 'a'\ntitle = 'b'"}, "is not valid TOML"),
        ({"title": "x = " + "9" * 5_000}, "has a key or a number of more than 200 characters"),
        ({"title": "x = " + "[" * 50_000}, "it is nested deeper than 32"),
    ],
)
def test_an_error_says_what_is_wrong_with_a_file(changes: dict[str, str], message: str) -> None:
    with pytest.raises(TaskFileError, match=message) as caught:
        parsed(task_toml(**changes))
    assert str(caught.value).startswith("task file mine.toml")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "glob",
    [
        "",
        ".",
        "/etc/*.tar",
        "../other/*.tar",
        "a/../../*.tar",
        "a\\\\b",
        "C:/x",
        "pipe:rm",
        "**.tar",
        "a\\u0000.tar",
        "a\\n",
    ],
)
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_pattern_that_leads_out_or_means_nothing_is_refused(split: str, glob: str) -> None:
    splits = {"train": "a", "valid": "b", "test": "c", split: glob}
    text = ", ".join(f'{name} = "{pattern}"' for name, pattern in splits.items())
    with pytest.raises(TaskFileError, match="must be a plain pattern inside the task's folder"):
        parsed(task_toml(splits=f"splits = {{ {text} }}"))


@pytest.mark.parametrize("glob", ["a.tar", "sub/*.tar", "**/*.tar", "a[0-9]?.tar", "ä b.tar"])
def test_ordinary_patterns_are_accepted(glob: str, tmp_path: Path) -> None:
    task = parsed(task_toml(splits=f'splits = {{ train = "{glob}", test = "{glob}" }}'))
    assert find_parts(task, tmp_path) is None


def test_a_pipe_or_a_huge_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(TaskFileError, match=r"^task file \S+pipe\.toml cannot be read \(it is not a regular file\)$"):
        load_task(tmp_path / "pipe.toml")
    with (tmp_path / "giant.toml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TaskFileError, match=r"^task file \S+giant\.toml cannot be read \(it is larger than 4 MB\)$"):
        load_task(tmp_path / "giant.toml")


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match=r"none\.toml cannot be read \(No such file"):
        load_task(tmp_path / "none.toml")
    with pytest.raises(TaskFileError, match="cannot be read"):
        load_task(tmp_path)
    (tmp_path / "latin.toml").write_bytes('name = "ä"'.encode("latin-1"))
    with pytest.raises(TaskFileError, match="it is not UTF-8 text"):
        load_task(tmp_path / "latin.toml")


def test_the_digest_is_of_what_shapes_a_score() -> None:
    digest = parsed(task_toml()).digest()
    assert parsed(task_toml(title='title = "Another"')).digest() == digest
    assert parsed(task_toml(classes='classes = ["a", "b", "c"]\n[published]\nlinear = { x = 1.0 }')).digest() == digest
    assert parsed(task_toml(classes='classes = ["a", "b", "c"]\n[head]\nepochs = 10')).digest() == digest  # the default
    assert parsed(task_toml(classes='classes = ["a", "b", "c"]\n[head]\nepochs = 11')).digest() != digest
    assert parsed(task_toml(classes='classes = ["c", "b", "a"]')).digest() != digest
    assert parsed(task_toml(key='key = "other"')).digest() != digest
    assert parsed(task_toml(crop_seconds="crop_seconds = 5")).digest() != digest


# ---------------------------------------------------------------- anything at all

VALID: dict[str, Any] = {
    "name": "mine",
    "title": "Mine",
    "domain": "speech",
    "weight": 3,
    "private": False,
    "data": {"splits": {"train": "a*.tar", "valid": "b*.tar", "test": "c*.tar"}, "crop_seconds": 2.5, "zenodo": "123"},
    "target": {"kind": "class", "key": "label", "classes": ["a", "b"]},
    "head": {"kind": "linear", "epochs": 3, "batch_size": 4, "learning_rate": 0.1},
    "score": {"metric": "accuracy", "knn": True},
    "published": {"linear": {"x": 0.5}, "knn": {}, "note": "n"},
}
FOLDED = {**VALID, "data": {"folds": {"pattern": "f{fold:02}.tar", "numbers": [1, 2, 3]}}}

words = st.sampled_from(
    ["kind", "classes", "integer", "class", "folds", "splits", "train", "{fold}", "**", "..", "", "linear"]
)
scalars = st.one_of(words, st.text(max_size=5), st.booleans(), st.integers(), st.integers(-3, 10**6), st.floats())
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def as_toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case dict():
            return "{" + ", ".join(f"{json.dumps(key)} = {as_toml(inner)}" for key, inner in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(as_toml, value)) + "]"
        case float() if not math.isfinite(value):
            return str(value)
        case float():
            return f"{value:.6e}"
        case _:
            return json.dumps(value)


@st.composite
def task_dicts(draw: st.DrawFn) -> dict[str, Any]:
    """A valid task with a few of its values, at any depth, replaced, removed or added to."""
    task = copy.deepcopy(draw(st.sampled_from([VALID, FOLDED])))
    for _ in range(draw(st.integers(0, 3))):
        table = task
        while True:
            key = draw(st.sampled_from(sorted(table)) if table else st.text(max_size=3))
            if not isinstance(table.get(key), dict) or draw(st.booleans()):
                break
            table = table[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                table[key] = draw(values)
            case "remove":
                table.pop(key, None)
            case "add":
                table[draw(words | st.text(max_size=3))] = draw(values)
    return task


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None, max_examples=300)
@given(raw=st.one_of(task_dicts(), st.dictionaries(words, values, max_size=4)))
def test_any_file_is_a_task_or_a_task_file_error(raw: dict[str, Any], tmp_path: Path) -> None:
    text = "\n".join(f"{json.dumps(key)} = {as_toml(value)}" for key, value in raw.items())
    try:
        task = parsed(text)
    except TaskFileError:
        return
    assert len(set(task.target.class_names)) == len(task.target.class_names) >= 2
    assert len(set(part_globs(task))) >= 2
    assert find_parts(task, tmp_path) is None
    assert task.name in missing_data(task, tmp_path)
    assert len(task.digest()) == 64


@settings(deadline=None)
@given(text=st.text())
def test_any_text_is_a_task_or_a_task_file_error(text: str) -> None:
    with pytest.raises(TaskFileError):
        parsed(text)


def test_the_files_that_are_changed_above_are_valid_before() -> None:
    for raw in (VALID, FOLDED):
        assert parsed("\n".join(f"{key} = {as_toml(value)}" for key, value in raw.items())).name == "mine"


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize(("value", "index"), [("dog", 0), ("Cat", 1), ("chien d'été", 2)])
def test_a_class_is_its_index(value: str, index: int) -> None:
    target = ClassTarget("label", ("dog", "Cat", "chien d'été"))
    assert target.encode({"label": value, "other": 5}) == index
    assert target.class_names[index] == value


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"lable": "dog"}, "its json has no 'label'"),
        ({}, "its json has no 'label'"),
        ({"label": "Dog"}, "unknown label label='Dog'"),
        ({"label": "dog "}, "unknown label label='dog '"),
        ({"label": ""}, "unknown label label=''"),
        ({"label": 0}, "label label is 0, not a class name"),
        ({"label": None}, "label label is None, not a class name"),
        ({"label": ["dog"]}, r"label label is \['dog'\], not a class name"),
        ({"label": "x" * 10_000}, r"unknown label label='x{56}\.\.\."),
    ],
)
def test_an_unusable_class_raises_with_its_reason(label: dict[str, Any], message: str) -> None:
    with pytest.raises(LabelError, match=f"^{message}"):
        ClassTarget("label", ("dog", "Cat")).encode(label)


@pytest.mark.parametrize(("value", "index"), [(0, 0), (9, 9), (3.0, 3), ("7", 7), (" 7 ", 7), (-0.0, 0)])
def test_an_integer_is_the_index(value: Any, index: int) -> None:
    assert IntegerTarget("label", 10).encode({"label": value}) == index


def test_of_two_classes_true_is_1() -> None:
    target = shipped_tasks()["subway_broadcast"].target
    values = [True, False, 1, 0, "1"]
    assert [target.encode({"broadcasting": value}) for value in values] == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    "value",
    [
        10,
        -1,
        0.5,
        math.nan,
        math.inf,
        -math.inf,
        True,
        False,
        None,
        "",
        "-1",
        "1.0",
        "10",
        "0x1",
        "²",
        "9" * 50,
        10**4_000,
        [1],
        {},
    ],
)
def test_an_unusable_index_raises_with_its_reason(value: Any) -> None:
    with pytest.raises(LabelError, match=r"^label label=.* is not one of 0\.\.9$") as caught:
        IntegerTarget("label", 10).encode({"label": value})
    assert len(str(caught.value)) < 120
