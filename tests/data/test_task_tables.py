"""Task files of every kind: tables to targets, and what does not fit together."""

from __future__ import annotations

from pathlib import Path

import pytest

from xares_onnx.data.targets import (
    CaptionsTarget,
    ClassTarget,
    EventsTarget,
    IntegerTarget,
    NumberTarget,
    TagsTarget,
    Target,
    TranscriptTarget,
)
from xares_onnx.data.task import HEADS, Task, load_task
from xares_onnx.errors import TaskFileError, UsageError

HEADER = """
name = "mine"
title = "Mine"
domain = "environment"
"""
SPLITS = 'splits = { train = "train*.tar", test = "test*.tar" }'
TARGET_TOML = {
    "class": 'key = "label"\nclasses = ["a", "b"]',
    "integer": 'key = "label"\nclasses = 4',
    "tags": 'key = "labels"\nclasses = ["a", "b", "c"]',
    "events": 'start = "onset"\nend = "offset"\nlabel = "label"\nclasses = ["a", "b"]',
    "captions": "",
    "transcript": 'key = "text"',
    "number": 'key = "score"\nlow = 0\nhigh = 10',
}
HEAD_TOML = {"captions": 'kind = "retrieval"', "transcript": 'kind = "ctc"'}
SCORE_TOML = {
    "tags": 'metric = "mean_average_precision"',
    "events": 'metric = "segment_f1_macro"\nsegment_seconds = 1.0',
    "captions": 'metric = "recall_at_1"',
    "transcript": 'metric = "one_minus_wer"',
    "number": 'metric = "mse"',
}
NEW = ("tags", "events", "captions", "transcript", "number")


def toml(kind: str, *, top: str = "", data: str = "", target: str | None = None, head: str = "", score: str = "") -> str:
    """A valid task of a kind; `target` replaces the fields of its target, the others are added, or replace a line."""

    def table(lines: str, more: str) -> str:
        keys = {line.partition("=")[0].strip() for line in more.splitlines()}
        kept = [line for line in lines.splitlines() if line.partition("=")[0].strip() not in keys]
        return "\n".join([*kept, more])

    fields = TARGET_TOML[kind] if target is None else target
    return "\n".join(
        [
            HEADER,
            top,
            f"[data]\n{SPLITS}\n{data}",
            f'[target]\nkind = "{kind}"\n{fields}',
            f"[head]\n{table(HEAD_TOML.get(kind, ''), head)}",
            f"[score]\n{table(SCORE_TOML.get(kind, ''), score)}",
        ]
    )


def parsed(text: str) -> Task:
    return load_task(Path("mine.toml"), text)


@pytest.mark.parametrize(
    ("kind", "target", "expected"),
    [
        ("class", None, ClassTarget("label", ("a", "b"))),
        ("integer", None, IntegerTarget("label", 4)),
        ("tags", None, TagsTarget("labels", ("a", "b", "c"), ";")),
        ("tags", 'key = "labels"\nseparator = "|"\nclasses = ["a;b"]', TagsTarget("labels", ("a;b",), "|")),
        ("events", None, EventsTarget("onset", "offset", "label", ("a", "b"), ",")),
        (
            "events",
            'start = "s"\nend = "e"\nlabel = "l"\nclasses = ["a,b"]\nseparator = ";"',
            EventsTarget("s", "e", "l", ("a,b",), ";"),
        ),
        ("captions", None, CaptionsTarget(None)),
        ("captions", 'keys = ["one", "two"]', CaptionsTarget(("one", "two"))),
        ("transcript", None, TranscriptTarget("text")),
        ("number", None, NumberTarget("score", 0, 10)),
        ("number", 'key = "x"\nlow = -1.5\nhigh = 1e3', NumberTarget("x", -1.5, 1000)),
    ],
)
def test_a_target_is_its_table(kind: str, target: str | None, expected: Target) -> None:
    task = parsed(toml(kind, target=target))
    assert task.target == expected
    assert type(task.target) is type(expected)
    assert task.kind == kind


@pytest.mark.parametrize(
    ("kind", "key", "meant"),
    [
        ("tags", "separater", "separator"),
        ("tags", "class", "classes"),
        ("tags", "keys", "key"),
        ("events", "starts", "start"),
        ("events", "ends", "end"),
        ("events", "labels", "label"),
        ("events", "onset", None),
        ("captions", "key", "keys"),
        ("transcript", "keys", "key"),
        ("number", "height", "high"),
        ("number", "lo", "low"),
        ("number", "classes", None),  # keys of other kinds are unknown
        ("captions", "classes", None),
        ("transcript", "separator", None),
        ("class", "separator", None),
        ("integer", "low", None),
    ],
)
def test_an_unknown_key_of_a_target_is_named_with_the_nearest(kind: str, key: str, meant: str | None) -> None:
    with pytest.raises(TaskFileError) as caught:
        parsed(toml(kind, target=f"{TARGET_TOML[kind]}\n{key} = 3"))
    message = str(caught.value)
    assert message.startswith(f"task file mine.toml: unknown key [target] {key}")
    if meant is None:
        assert key not in message.split(key, 1)[1]
    else:
        assert message.startswith(f"task file mine.toml: unknown key [target] {key}; did you mean '{meant}'")


@pytest.mark.parametrize("kind", NEW)
@pytest.mark.parametrize(
    ("table", "key", "meant"),
    [
        ("head", "positive_wieght", "positive_weight"),
        ("head", "batchsize", "batch_size"),
        ("score", "segment_second", "segment_seconds"),
        ("data", "crop_second", "crop_seconds"),
    ],
)
def test_an_unknown_key_elsewhere_is_named_with_the_nearest(kind: str, table: str, key: str, meant: str) -> None:
    with pytest.raises(TaskFileError, match=rf"unknown key \[{table}\] {key}; did you mean '{meant}'"):
        parsed(toml(kind, **{table: f"{key} = 1"}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, line.partition(" =")[0]) for kind in TARGET_TOML for line in TARGET_TOML[kind].splitlines()]
)
def test_every_field_without_a_default_is_needed(kind: str, field: str) -> None:
    rest = "\n".join(line for line in TARGET_TOML[kind].splitlines() if line.partition(" =")[0] != field)
    with pytest.raises(TaskFileError, match=rf"missing required field `{field}` \(at `target`\)"):
        parsed(toml(kind, target=rest))


CLASSED = {
    "tags": 'key = "labels"\nclasses = {}',
    "events": 'start = "onset"\nend = "offset"\nlabel = "label"\nclasses = {}',
}
NEVER = "can never be read: it is empty, contains the separator, or begins or ends with white space"


@pytest.mark.parametrize("kind", CLASSED)
@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("[]", "`classes` needs at least one name, each once"),
        ('["a", "b", "a"]', "`classes` needs at least one name, each once"),
        ('["a", ""]', f"class '' {NEVER}"),
        ('["a", " b"]', f"class ' b' {NEVER}"),
        ('["a", "b\\t"]', rf"class 'b\\t' {NEVER}"),
        ('["a", "b|c"]\nseparator = "|"', rf"class 'b\|c' {NEVER}"),
        ('["a", "b - c"]\nseparator = " - "', f"class 'b - c' {NEVER}"),
        ('["a"]\nseparator = ""', "`separator` must not be empty"),
        ('["a", 3]', r"Expected `str`, got `int` \(at `target\.classes\[1\]`\)"),
        ('"a"', r"Expected `array`, got `str` \(at `target\.classes`\)"),
        ('["a"]\nseparator = 3', r"Expected `str`, got `int` \(at `target\.separator`\)"),
    ],
)
def test_classes_that_can_never_be_read_are_refused(kind: str, classes: str, message: str) -> None:
    with pytest.raises(TaskFileError, match=message):
        parsed(toml(kind, target=CLASSED[kind].format(classes)))


@pytest.mark.parametrize(("kind", "separator"), [("tags", ";"), ("events", ",")])
def test_a_class_with_the_separator_that_holds_unless_another_is_given(kind: str, separator: str) -> None:
    name = f"a{separator}b"
    with pytest.raises(TaskFileError, match=NEVER):
        parsed(toml(kind, target=CLASSED[kind].format(f'["{name}"]')))
    other = {",": ";", ";": ","}[separator]
    assert parsed(toml(kind, target=CLASSED[kind].format(f'["a{other}b"]'))).target.class_names == (f"a{other}b",)
    assert parsed(toml(kind, target=CLASSED[kind].format(f'["{name}"]\nseparator = "|"'))).target.class_names == (name,)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ("low = 1\nhigh = 1", "`low` must lie below `high`"),
        ("low = 2\nhigh = 1", "`low` must lie below `high`"),
        ("low = nan\nhigh = 1", "`low` must lie below `high`"),
        ("low = 0\nhigh = nan", "`low` must lie below `high`"),
        ("low = 0\nhigh = inf", "`low` must lie below `high`"),
        ("low = -inf\nhigh = 0", "`low` must lie below `high`"),
        ("low = -inf\nhigh = inf", "`low` must lie below `high`"),
        ("low = -1.7e308\nhigh = 1.7e308", "`low` must lie below `high`"),  # whose distance is no number
        (f"low = 0\nhigh = {10**400}", "a number of more than 200 characters"),
        ('low = "0"\nhigh = 1', r"Expected `float`, got `str` \(at `target\.low`\)"),
        ("low = true\nhigh = 2", r"Expected `float`, got `bool` \(at `target\.low`\)"),
    ],
)
def test_bounds_of_a_number_are_two_numbers(bounds: str, message: str) -> None:
    with pytest.raises(TaskFileError, match=message):
        parsed(toml("number", target=f'key = "score"\n{bounds}'))


# ---------------------------------------------------------------- what fits a kind

ALL_HEADS = ("linear", "retrieval", "ctc", "llm")
FITTING_HEADS = {"captions": ("retrieval",), "transcript": ("ctc", "llm")}
ALL_METRICS = (
    "accuracy",
    "mean_average_precision",
    "segment_f1_macro",
    "segment_f1_micro",
    "recall_at_1",
    "one_minus_wer",
    "mse",
)
FITTING_METRICS = {
    "class": ("accuracy",),
    "integer": ("accuracy",),
    "tags": ("mean_average_precision",),
    "events": ("segment_f1_macro", "segment_f1_micro"),
    "captions": ("recall_at_1",),
    "transcript": ("one_minus_wer",),
    "number": ("mse",),
}


@pytest.mark.parametrize("kind", TARGET_TOML)
@pytest.mark.parametrize("head", ALL_HEADS)
def test_a_head_that_does_not_fit_names_those_that_do(kind: str, head: str) -> None:
    fitting = FITTING_HEADS.get(kind, ("linear",))
    choices = " or ".join(f"'{name}'" for name in fitting)
    text = toml(kind, head=f'kind = "{head}"')
    if head in fitting:
        assert parsed(text).head.kind == head
        assert parsed(toml(kind)).with_head(head).head.kind == head  # type: ignore[arg-type]
        return
    with pytest.raises(TaskFileError) as caught:
        parsed(text)
    expected = f"[head] kind '{head}' does not fit a target of kind '{kind}'; write kind = {choices}"
    assert str(caught.value) == f"task file mine.toml: {expected}"
    with pytest.raises(
        UsageError, match=f"^head '{head}' does not fit mine, a task of kind '{kind}': {' or '.join(fitting)}$"
    ):
        parsed(toml(kind)).with_head(head)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", TARGET_TOML)
@pytest.mark.parametrize("metric", ALL_METRICS)
def test_a_metric_that_does_not_fit_names_those_that_do(kind: str, metric: str) -> None:
    text = toml(kind, score=f'metric = "{metric}"')
    if metric in FITTING_METRICS[kind]:
        task = parsed(text)
        assert task.score.metric == metric
        assert task.score.higher_is_better is (metric != "mse")
        return
    choices = " or ".join(f"'{name}'" for name in FITTING_METRICS[kind])
    with pytest.raises(TaskFileError) as caught:
        parsed(text)
    expected = f"[score] metric '{metric}' does not fit a target of kind '{kind}'; write metric = {choices}"
    assert str(caught.value) == f"task file mine.toml: {expected}"


@pytest.mark.parametrize("kind", NEW)
def test_a_kind_says_which_metric_it_needs(kind: str) -> None:
    """Left out, the metric is accuracy and the head linear."""
    text = toml(kind).replace(SCORE_TOML[kind].splitlines()[0], "")
    with pytest.raises(TaskFileError, match=f"metric 'accuracy' does not fit a target of kind '{kind}'"):
        parsed(text)


def test_an_unknown_head_or_metric_is_refused() -> None:
    with pytest.raises(TaskFileError, match=r"head\.kind is 'lstm', but must be one of 'linear', 'retrieval', 'ctc', 'llm'"):
        parsed(toml("tags", head='kind = "lstm"'))
    with pytest.raises(
        TaskFileError, match=r"score\.metric is 'f1', but must be one of 'accuracy', 'mean_average_precision'"
    ):
        parsed(toml("tags", score='metric = "f1"'))


@pytest.mark.parametrize("kind", [kind for kind in TARGET_TOML if kind != "events"])
def test_only_events_have_segments(kind: str) -> None:
    with pytest.raises(TaskFileError) as caught:
        parsed(toml(kind, score="segment_seconds = 1.0"))
    expected = f"[score] of a target of kind '{kind}' has no use for `segment_seconds`"
    assert str(caught.value) == f"task file mine.toml: {expected}"


@pytest.mark.parametrize("metric", ["segment_f1_macro", "segment_f1_micro"])
def test_events_have_segments(metric: str) -> None:
    assert parsed(toml("events", score=f'metric = "{metric}"\nsegment_seconds = 0.1')).score.segment_seconds == 0.1
    text = toml("events", score=f'metric = "{metric}"').replace("segment_seconds = 1.0", "")
    with pytest.raises(TaskFileError, match=r"\[score\] of a target of kind 'events' needs `segment_seconds`"):
        parsed(text)


@pytest.mark.parametrize("seconds", ["0", "-1.0", "nan", "inf", "3601"])
def test_segments_have_a_sensible_length(seconds: str) -> None:
    with pytest.raises(TaskFileError, match=r"`segment_seconds` must lie between 0\.001 and 3600"):
        parsed(toml("events", score=f"segment_seconds = {seconds}"))


@pytest.mark.parametrize("kind", TARGET_TOML)
def test_a_knn_is_for_classes(kind: str) -> None:
    classifies = kind in ("class", "integer")
    assert parsed(toml(kind)).knn is classifies
    assert parsed(toml(kind, score="knn = false")).knn is False
    if classifies:
        assert parsed(toml(kind, score="knn = true")).knn
        return
    with pytest.raises(TaskFileError) as caught:
        parsed(toml(kind, score="knn = true"))
    expected = f"[score] knn is for classes, not for a target of kind '{kind}'"
    assert str(caught.value) == f"task file mine.toml: {expected}"


@pytest.mark.parametrize("kind", TARGET_TOML)
def test_a_weight_of_positives_is_for_tags_and_events(kind: str) -> None:
    if kind in ("tags", "events"):
        assert parsed(toml(kind)).head.positive_weight == 1
        assert parsed(toml(kind, head="positive_weight = 10")).head.positive_weight == 10
        for weight in ("0", "-1", "nan", "inf", "1e7"):
            with pytest.raises(TaskFileError, match="`positive_weight` must lie above 0 and not above 1000000"):
                parsed(toml(kind, head=f"positive_weight = {weight}"))
        return
    assert parsed(toml(kind, head="positive_weight = 1")).head.positive_weight == 1
    with pytest.raises(TaskFileError) as caught:
        parsed(toml(kind, head="positive_weight = 10"))
    expected = f"[head] positive_weight is for tags and events, not for a target of kind '{kind}'"
    assert str(caught.value) == f"task file mine.toml: {expected}"


@pytest.mark.parametrize("kind", TARGET_TOML)
def test_a_crop_cuts_no_events_and_no_transcript(kind: str) -> None:
    text = toml(kind, data="crop_seconds = 5")
    if kind not in ("events", "transcript"):
        assert parsed(text).data.crop_seconds == 5
        return
    with pytest.raises(TaskFileError) as caught:
        parsed(text)
    expected = f"[data] crop_seconds would cut through the {kind} of a clip; leave it out"
    assert str(caught.value) == f"task file mine.toml: {expected}"


@pytest.mark.parametrize("kind", TARGET_TOML)
def test_a_number_has_no_weight(kind: str) -> None:
    assert parsed(toml(kind)).weight is None
    text = toml(kind, top="weight = 100")
    if kind != "number":
        assert parsed(text).weight == 100
        return
    for weight in (100, 0):
        with pytest.raises(
            TaskFileError, match="the error of a number cannot be averaged with other scores; leave out `weight`"
        ):
            parsed(toml(kind, top=f"weight = {weight}"))


def test_the_table_of_heads_is_of_every_kind() -> None:
    assert set(TARGET_TOML) == set(HEADS)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("tags", {"target": 'key = "labels"\nclasses = ["a", "b", "c"]\nseparator = ","'}),
        ("tags", {"head": "positive_weight = 2"}),
        ("events", {"score": "segment_seconds = 0.5"}),
        ("events", {"score": 'metric = "segment_f1_micro"'}),
        ("captions", {"target": 'keys = ["a"]'}),
        ("transcript", {"head": 'kind = "llm"'}),
        ("number", {"target": 'key = "score"\nlow = 0\nhigh = 11'}),
    ],
)
def test_what_shapes_a_score_shapes_the_digest(kind: str, changes: dict[str, str]) -> None:
    assert parsed(toml(kind)).digest() == parsed(toml(kind)).digest()
    assert parsed(toml(kind, **changes)).digest() != parsed(toml(kind)).digest()  # type: ignore[arg-type]
