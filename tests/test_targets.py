"""Targets of tags, events, captions, transcripts and numbers: what they make of a clip's json, and of their own TOML."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xares_onnx.errors import LabelError, TaskFileError, UsageError
from xares_onnx.shards import parse_label
from xares_onnx.targets import (
    CaptionsTarget,
    ClassTarget,
    EventsTarget,
    IntegerTarget,
    NumberTarget,
    TagsTarget,
    Target,
    TranscriptTarget,
)
from xares_onnx.task import HEADS, Task, load_task
from xares_onnx.text import normalise

DEEP: list[Any] = []
for _ in range(900):
    DEEP = [DEEP]
HUGE = 10**400  # json holds whole numbers of any size, a float does not

# ---------------------------------------------------------------- tags

TAGS = TagsTarget("tags", ("dog", "tram bell", "Rain"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Rain;dog", (0, 2)),
        (["Rain", "dog"], (0, 2)),
        (" tram bell ; dog ", (0, 1)),
        ([" tram bell", "dog "], (0, 1)),
        ("dog;dog;dog", (0,)),
        (["dog", "dog"], (0,)),
        ("dog;;", (0,)),
        (["", " ", "Rain"], (2,)),
        ("", ()),
        (" ; ", ()),
        ([], ()),
    ],
)
def test_tags_are_sorted_indices(value: Any, expected: tuple[int, ...]) -> None:
    assert TAGS.encode({"tags": value, "other": 5}) == expected


def test_tags_have_a_separator_of_their_own() -> None:
    target = TagsTarget("tags", ("a;b", "c"), separator=", ")
    assert target.encode({"tags": "c, a;b"}) == (0, 1)
    assert target.class_names == ("a;b", "c")
    with pytest.raises(LabelError, match="unknown label tags='c,a;b'"):
        target.encode({"tags": "c,a;b"})


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({}, "its json has no 'tags'"),
        ({"tag": "dog"}, "its json has no 'tags'"),
        ({"tags": "dog;cat"}, "unknown label tags='cat'"),
        ({"tags": ["dog", "Dog"]}, "unknown label tags='Dog'"),
        ({"tags": ["dog;Rain"]}, "unknown label tags='dog;Rain'"),  # a list has its names apart already
        ({"tags": "dog,Rain"}, "unknown label tags='dog,Rain'"),
        ({"tags": None}, "label tags is None, neither a text nor a list of class names"),
        ({"tags": 3}, "label tags is 3, neither a text nor a list of class names"),
        ({"tags": ["dog", 3]}, "label tags is ['dog', 3], neither a text nor a list of class names"),
        ({"tags": {"dog": 1}}, "label tags is {'dog': 1}, neither a text nor a list of class names"),
        ({"tags": "x" * 10_000}, f"unknown label tags='{'x' * 56}..."),
    ],
)
def test_no_tags_are_a_reason(label: dict[str, Any], message: str) -> None:
    with pytest.raises(LabelError) as caught:
        TAGS.encode(label)
    assert str(caught.value) == message


@given(chosen=st.sets(st.integers(0, 2)), random=st.randoms(use_true_random=False))
def test_any_tags_come_back_from_a_text_and_from_a_list(chosen: set[int], random: Any) -> None:
    names = [TAGS.classes[index] for index in chosen]
    random.shuffle(names)
    expected = tuple(sorted(chosen))
    assert TAGS.encode({"tags": names}) == TAGS.encode({"tags": ";".join(names)}) == expected


# ---------------------------------------------------------------- events

EVENTS = EventsTarget("onset", "offset", "label", ("Speech", "Dog bark", "7"))


def event(label: Any = "Speech", onset: Any = 0.5, offset: Any = 2, **more: Any) -> dict[str, Any]:
    return {"onset": onset, "offset": offset, "label": label, **more}


def test_events_are_times_and_classes() -> None:
    found = EVENTS.encode(
        {"events": [event("Dog bark", 3, 4.5), event("Speech", 0.25, 3.0, other=1), event("Dog bark", 1, 1)]}
    )
    assert found.onsets.tolist() == [3, 0.25, 1]
    assert found.offsets.tolist() == [4.5, 3, 1]
    assert found.classes.tolist() == [1, 0, 1]
    assert found.outside == 0
    assert [values.dtype for values in (found.onsets, found.offsets, found.classes)] == [np.float64, np.float64, np.int64]


def test_no_events_are_events_too() -> None:
    found = EVENTS.encode({"events": []})
    assert (found.onsets.shape, found.offsets.shape, found.classes.shape, found.outside) == ((0,), (0,), (0,), 0)


@pytest.mark.parametrize(
    ("label", "classes", "outside"),
    [
        ("Speech,Dog bark", [0, 1], 0),
        (" Speech , 7 ,", [0, 2], 0),
        ("Speech,Siren,Horn", [0], 2),
        ("speech", [], 1),
        ("", [], 0),
        (7, [2], 0),
        (7.0, [2], 0),
        ("07", [], 1),
        (7.5, [], 1),
        (None, [], 1),
        (True, [], 1),
        (HUGE, [], 1),
        (1e300, [], 1),
    ],
)
def test_an_event_may_have_several_labels_and_others_are_counted(label: Any, classes: list[int], outside: int) -> None:
    found = EVENTS.encode({"events": [event(label, 1, 2)]})
    assert found.classes.tolist() == classes
    assert found.onsets.tolist() == [1] * len(classes)
    assert found.offsets.tolist() == [2] * len(classes)
    assert found.outside == outside


def test_events_outside_are_added_up() -> None:
    found = EVENTS.encode({"events": [event("a,b"), event("Speech"), event("c")]})
    assert (found.classes.tolist(), found.outside) == ([0], 3)


def test_events_have_keys_and_a_separator_of_their_own() -> None:
    target = EventsTarget("from", "to", "what", ("a,b", "c"), separator="|")
    found = target.encode({"events": [{"from": 1, "to": 2, "what": "c|a,b"}]})
    assert found.classes.tolist() == [1, 0]
    assert target.class_names == ("a,b", "c")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({}, "its json is no list of events"),
        ({"events": None}, "its json is no list of events"),
        ({"events": {"0": event()}}, "its json is no list of events"),
        ({"label": "Speech", "onset": 0, "offset": 1}, "its json is no list of events"),
        ({"events": ["Speech"]}, "event 'Speech' is no object"),
        ({"events": [event(), [1, 2]]}, "event [1, 2] is no object"),
        ({"events": [{"onset": 0, "offset": 1}]}, "its json has no 'label'"),
        ({"events": [{"onset": 0, "label": "Speech"}]}, "its json has no 'offset'"),
        ({"events": [{"offset": 0, "label": "Speech"}]}, "its json has no 'onset'"),
        ({"events": [event(onset=None)]}, "event 'Speech' has no times: onset=None, offset=2"),
        ({"events": [event(onset="0.5")]}, "event 'Speech' has no times: onset='0.5', offset=2"),
        ({"events": [event(onset=False)]}, "event 'Speech' has no times: onset=False, offset=2"),
        ({"events": [event(offset=True)]}, "event 'Speech' has no times: onset=0.5, offset=True"),
        ({"events": [event(onset=3)]}, "event 'Speech' has no times: onset=3, offset=2"),
        ({"events": [event(offset=math.nan)]}, "event 'Speech' has no times: onset=0.5, offset=nan"),
        ({"events": [event(offset=math.inf)]}, "event 'Speech' has no times: onset=0.5, offset=inf"),
        ({"events": [event(onset=-math.inf)]}, "event 'Speech' has no times: onset=-inf, offset=2"),
        ({"events": [event("Siren", 2, 1)]}, "event 'Siren' has no times: onset=2, offset=1"),
    ],
)
def test_no_events_are_a_reason(label: dict[str, Any], message: str) -> None:
    with pytest.raises(LabelError) as caught:
        EVENTS.encode(label)
    assert str(caught.value) == message


@pytest.mark.parametrize(("onset", "offset"), [(0, HUGE), (-HUGE, 0), (HUGE, HUGE)])
def test_a_time_that_no_float_holds_is_a_reason(onset: int, offset: int) -> None:
    with pytest.raises(LabelError, match="event 'Speech' has no times: ") as caught:
        EVENTS.encode({"events": [event("Speech", onset, offset)]})
    assert len(str(caught.value)) < 200


def test_a_list_of_events_is_a_json_of_its_own() -> None:
    assert EVENTS.encode(parse_label(json.dumps([event("7")]))).classes.tolist() == [2]


# ---------------------------------------------------------------- captions


def test_captions_are_the_texts_in_the_json() -> None:
    label = {"one": "A dog barks.", "file": 3, "two": "  ", "three": "Rain ", "four": ["no"], "five": None}
    assert CaptionsTarget().encode(label) == ("A dog barks.", "Rain ")
    assert CaptionsTarget(("three", "none", "file", "one")).encode(label) == ("Rain ", "A dog barks.")
    assert CaptionsTarget().class_names == ()


@pytest.mark.parametrize(
    ("keys", "label"),
    [
        (None, {}),
        (None, {"one": ""}),
        (None, {"one": " \n", "two": 3}),
        (("two",), {"one": "A dog barks."}),
        (("one",), {"one": ["A dog barks."]}),
        ((), {"one": "A dog barks."}),
    ],
)
def test_no_caption_is_a_reason(keys: tuple[str, ...] | None, label: dict[str, Any]) -> None:
    with pytest.raises(LabelError) as caught:
        CaptionsTarget(keys).encode(label)
    assert str(caught.value) == "its json holds no caption"


# ---------------------------------------------------------------- transcripts


@pytest.mark.parametrize("text", ["HELLO, world", " a ", "7", "½", "Привет", "नमस्ते", "\u202eabc"])
def test_a_transcript_is_taken_as_it_is_written(text: str) -> None:
    assert TranscriptTarget("text").encode({"text": text, "other": 1}) == text
    assert TranscriptTarget("text").class_names == ()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"trans": "hello"}, "its json has no 'text'"),
        ({"text": None}, "transcript text is None, not a text"),
        ({"text": 7}, "transcript text is 7, not a text"),
        ({"text": ["hello"]}, "transcript text is ['hello'], not a text"),
        ({"text": ""}, "its transcript text is empty"),
        ({"text": " ... '\u2019 - "}, "its transcript text is empty"),
        ({"text": "\u02bc"}, "its transcript text is empty"),  # letters to Unicode, which are read as an apostrophe
        ({"text": "\uff9e \u037a"}, "its transcript text is empty"),  # and as marks on nothing
    ],
)
def test_no_transcript_is_a_reason(label: dict[str, Any], message: str) -> None:
    with pytest.raises(LabelError) as caught:
        TranscriptTarget("text").encode(label)
    assert str(caught.value) == message


@given(text=st.text(max_size=6) | st.text("'\u2019\u02bc\uff9e.\u0301a \u200d", max_size=4))
def test_any_transcript_that_is_taken_has_a_word(text: str) -> None:
    """Its error rate is defined, normalised or in lower case."""
    try:
        taken = TranscriptTarget("text").encode({"text": text})
    except LabelError:
        assert not normalise(text)
        return
    assert taken == text
    assert normalise(taken).split()
    assert taken.lower().split()


@pytest.mark.parametrize("code", [0xD800, 0xDCFF, 0xDFFF])
def test_half_a_character_is_a_reason(code: int) -> None:
    """Json can escape one half of a surrogate pair; tokenizers and files take no such text."""
    for target, name in ((CaptionsTarget(), "caption"), (TranscriptTarget("text"), "transcript")):
        with pytest.raises(LabelError, match=rf"^its {name} 'a \\ud[8-f].. b' holds half a character$") as caught:
            target.encode(parse_label(json.dumps({"text": f"a {chr(code)} b"})))
        str(caught.value).encode()
        whole = target.encode(parse_label(json.dumps({"text": "a \U0001f415 b"})))
        assert whole in ("a \U0001f415 b", ("a \U0001f415 b",))


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("value", [-1, -1.0, 0, 0.25, 2.5, 10, 10.0, -0.0])
def test_a_number_is_a_float_of_the_range(value: float) -> None:
    found = NumberTarget("score", -1, 10).encode({"score": value, "other": "x"})
    assert (found, type(found)) == (value, float)


@pytest.mark.parametrize("value", [-1.01, 10.5, math.nan, math.inf, -math.inf, True, "3", None, [3], {}, HUGE, -HUGE])
def test_no_number_is_a_reason(value: Any) -> None:
    with pytest.raises(LabelError, match=r"^label score=.* is no number from -1 to 10\.25$") as caught:
        NumberTarget("score", -1, 10.25).encode({"score": value})
    assert len(str(caught.value)) < 120


def test_a_number_that_is_not_there_is_a_reason() -> None:
    with pytest.raises(LabelError, match="its json has no 'score'"):
        NumberTarget("score", 0, 1).encode({"Score": 1})
    assert NumberTarget("score", 0, 1).class_names == ()


# ---------------------------------------------------------------- any json at all

TARGETS: list[Target] = [
    ClassTarget("label", ("a", "b")),
    IntegerTarget("label", 5),
    TagsTarget("label", ("a", "b")),
    EventsTarget("start", "end", "label", ("a", "b")),
    CaptionsTarget(),
    CaptionsTarget(("label", "start")),
    TranscriptTarget("label"),
    NumberTarget("label", -3, 3),
]
words = st.sampled_from(["label", "start", "end", "events", "a", "b", "a;b", "a,b", "1", "\u02bc", "\ud800"])
scalars = st.one_of(
    words, st.text(max_size=4), st.none(), st.booleans(), st.integers(), st.integers(-2, 3), st.floats(), st.just(HUGE)
)
jsons = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=4), max_leaves=8
)
events = st.fixed_dictionaries({}, optional={"start": scalars, "end": scalars, "label": jsons})
labels = st.dictionaries(words, jsons, max_size=4) | st.fixed_dictionaries({"label": jsons}) | st.lists(events, max_size=3)


@settings(max_examples=300)
@given(label=labels)
def test_any_json_is_a_target_or_a_reason(label: Any) -> None:
    parsed, reasons = parse_label(json.dumps(label)), []
    for target in TARGETS:
        try:
            found: Any = target.encode(parsed)
        except LabelError as error:
            reasons.append(str(error))
            continue
        match target:
            case ClassTarget() | IntegerTarget():
                assert 0 <= found < len(target.class_names)
            case TagsTarget():
                assert list(found) == sorted(set(found))
                assert set(found) <= {0, 1}
            case EventsTarget():
                assert len(found.onsets) == len(found.offsets) == len(found.classes)
                assert (found.onsets <= found.offsets).all()
                assert np.isfinite(found.onsets).all()
                assert np.isfinite(found.offsets).all()
                assert set(found.classes.tolist()) <= {0, 1}
            case CaptionsTarget():
                assert all(caption.strip() for caption in found)
            case TranscriptTarget():
                assert found == parsed["label"]
            case NumberTarget():
                assert -3 <= found <= 3
    assert all(len(reason.encode()) < 250 for reason in reasons)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: type(target).__name__)
def test_a_deep_json_is_a_reason(target: Target) -> None:
    """As deep as json is read: showing all of it would need more stack than there is."""

    def at(depth: int) -> None:
        if depth:
            return at(depth - 1)
        for label in ({"label": DEEP}, {"events": DEEP}, {"events": [{"start": 0, "end": DEEP, "label": DEEP}]}):
            with pytest.raises(LabelError) as caught:
                target.encode(label)
            assert len(str(caught.value)) < 250
        return None

    at(150)


def test_a_deep_label_of_an_event_is_counted() -> None:
    def at(depth: int) -> Any:
        return at(depth - 1) if depth else EVENTS.encode({"events": [event(DEEP)]})

    assert at(150).outside == 1


# ---------------------------------------------------------------- TOML

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
NEVER = "can never be read: it is empty, holds the separator, or begins or ends in white space"


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
        (f"low = 0\nhigh = {HUGE}", r"Number out of range \(at `target\.high`\)"),
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
def test_a_head_fits_its_kind_or_what_fits_is_said(kind: str, head: str) -> None:
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
def test_a_metric_fits_its_kind_or_what_fits_is_said(kind: str, metric: str) -> None:
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


def test_a_head_or_metric_that_there_is_not() -> None:
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
            with pytest.raises(TaskFileError, match="`positive_weight` lies above 0 and at most at 1000000"):
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
def test_a_number_is_averaged_with_nothing(kind: str) -> None:
    assert parsed(toml(kind)).weight is None
    text = toml(kind, top="weight = 100")
    if kind != "number":
        assert parsed(text).weight == 100
        return
    for weight in (100, 0):
        with pytest.raises(TaskFileError, match="the error of a number is averaged with no other score; leave out `weight`"):
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
