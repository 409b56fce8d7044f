"""Targets of tags, events, captions, transcripts and numbers: what they make of a clip's json, and of their own TOML."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xares_onnx.data.shards import parse_label
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
from xares_onnx.data.text import normalise
from xares_onnx.errors import LabelError

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
def test_unusable_tags_raise_with_their_reason(label: dict[str, Any], message: str) -> None:
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
        ({}, "its json is not a list of events"),
        ({"events": None}, "its json is not a list of events"),
        ({"events": {"0": event()}}, "its json is not a list of events"),
        ({"label": "Speech", "onset": 0, "offset": 1}, "its json is not a list of events"),
        ({"events": ["Speech"]}, "event 'Speech' is not an object"),
        ({"events": [event(), [1, 2]]}, "event [1, 2] is not an object"),
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
def test_unusable_events_raise_with_their_reason(label: dict[str, Any], message: str) -> None:
    with pytest.raises(LabelError) as caught:
        EVENTS.encode(label)
    assert str(caught.value) == message


@pytest.mark.parametrize(("onset", "offset"), [(0, HUGE), (-HUGE, 0), (HUGE, HUGE)])
def test_a_time_too_large_for_a_float_raises_with_its_reason(onset: int, offset: int) -> None:
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
def test_unusable_captions_raise_with_their_reason(keys: tuple[str, ...] | None, label: dict[str, Any]) -> None:
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
def test_an_unusable_transcript_raises_with_its_reason(label: dict[str, Any], message: str) -> None:
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
def test_half_a_surrogate_pair_raises_with_its_reason(code: int) -> None:
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
def test_an_unusable_number_raises_with_its_reason(value: Any) -> None:
    with pytest.raises(LabelError, match=r"^label score=.* is not a number from -1 to 10\.25$") as caught:
        NumberTarget("score", -1, 10.25).encode({"score": value})
    assert len(str(caught.value)) < 120


def test_a_missing_number_raises_with_its_reason() -> None:
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
def test_any_json_is_encoded_or_raises_a_label_error(label: Any) -> None:
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
def test_a_deep_json_raises_with_its_reason(target: Target) -> None:
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
