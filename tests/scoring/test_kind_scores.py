"""Outcomes of events, captions and transcripts to scores, by both protocols: small numbers that can be counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from xares_onnx.data.shards import Clips
from xares_onnx.data.sound_events import Events
from xares_onnx.data.targets import CaptionsTarget, EventsTarget, TranscriptTarget
from xares_onnx.data.task import Data, Head, Score, Task
from xares_onnx.probes import frames as frame_probe
from xares_onnx.scoring.dataset import Dataset
from xares_onnx.scoring.folds import Fold
from xares_onnx.scoring.kinds import Kind, Outcome, Tools, kind_of
from xares_onnx.scoring.protocol import Protocol
from xares_onnx.scoring.scoring import Scored, score

DATA = Data(splits={"train": "train.tar", "test": "test.tar"})
NONE = np.empty(0, np.int64)


def task_of(kind: str, metric: str = "segment_f1_macro") -> Task:
    target: Any = {
        "events": EventsTarget("a", "b", "c", ("x", "y", "z")),
        "captions": CaptionsTarget(),
        "transcript": TranscriptTarget("t"),
    }[kind]
    scores = {"captions": Score("recall_at_1"), "transcript": Score("one_minus_wer")}
    heads = {"captions": Head("retrieval"), "transcript": Head("ctc")}
    scored = scores.get(kind, Score(metric, segment_seconds=0.5))  # type: ignore[arg-type]
    return Task(name=kind, title=kind, domain="music", data=DATA, target=target, head=heads.get(kind, Head()), score=scored)


def problem(task: Task, labels: list[Any], protocol: str = "corrected", tools: Tools | None = None, **fields: Any) -> Kind:
    """A kind whose every clip is tested, in one fold."""
    clips = len(labels)
    dataset = Dataset(
        embeddings=np.zeros((clips, 2), np.float32),
        clip_of_crop=np.arange(clips),
        labels=labels,
        keys=[f"test.tar/{number}" for number in range(clips)],
        parts={},
        clips=Clips(expected=clips, read=clips, dropped=[]),
        audio_seconds=1.0,
        damage=[],
        **fields,
    )
    folds = [Fold("test", np.arange(clips), NONE, np.arange(clips), NONE)]
    return kind_of(task)(task, Protocol(protocol), dataset, folds, tools or Tools())  # type: ignore[arg-type]


def scored(kind: Kind, *predictions: Any) -> Scored:
    examples = np.arange(len(kind.dataset.labels))
    return score(kind, "head", [Outcome(0, seed, examples, found) for seed, found in enumerate(predictions)])


# ---------------------------------------------------------------- transcripts


def test_a_transcript_is_scored_by_its_words() -> None:
    kind = problem(task_of("transcript"), ["One two three four.", "FIVE"])
    found = scored(kind, ["one two tree four", "five"], ["one", "five six seven"])
    assert found.per_seed == pytest.approx([1 - 1 / 5, 1 - (3 + 2) / 5])
    assert found.metrics["word_error_rate"] == pytest.approx((1 / 5 + 5 / 5) / 2)
    assert found.metrics["character_error_rate"] == pytest.approx((1 / 22 + (len(" two three four") + 10) / 22) / 2)
    assert found.predictions["word_errors"].tolist() == [[1, 4], [0, 1], [3, 4], [2, 1]]
    assert found.predictions["target"].tolist() == ["one two three four", "five"] * 2


def test_more_errors_than_words_are_no_score_below_0() -> None:
    found = scored(problem(task_of("transcript"), ["one"]), ["a b c"])
    assert (found.score, found.metrics["word_error_rate"]) == (0, 3)


def test_x_ares_compares_in_lower_case_only() -> None:
    labels, said = ["It's one, TWO"], ["it's one two"]
    assert scored(problem(task_of("transcript"), labels), said).score == 1
    assert scored(problem(task_of("transcript"), labels, "xares"), said).score == pytest.approx(2 / 3)


# ---------------------------------------------------------------- captions


def test_recalls_of_captions_are_counted_both_ways() -> None:
    """Two clips of 5 and 3 captions; columns as `probes.retrieval.recalls` gives them."""
    kind = problem(task_of("captions"), [("a",) * 5, ("b",) * 3])
    found = scored(kind, np.array([[2, 5, 1, 3, 1, 5, 1], [0, 3, 0, 1, 0, 2, 1]]))
    assert found.score == pytest.approx((2 / 8 + 1 / 2) / 2)
    assert found.metrics == {
        "text_to_audio_recall_at_1": pytest.approx(2 / 8),
        "audio_to_text_recall_at_1": pytest.approx(1 / 2),
        "recall_at_5": pytest.approx((4 / 8 + 1 / 2) / 2),
        "recall_at_10": pytest.approx((7 / 8 + 2 / 2) / 2),
    }
    assert found.predictions["recall"].tolist() == [[2, 5, 1], [0, 3, 0]]
    # A resample holds the first clip 0, 1 or 2 times, with its captions.
    values = {(2 / 5 + 1) / 2, found.score, 0.0}
    replicates = found.score + (found.estimate.replicates - found.score) * np.sqrt(1 / 2)
    assert {round(value, 9) for value in replicates.tolist()} == {round(value, 9) for value in values}


def test_one_clip_among_itself_is_no_score() -> None:
    assert problem(task_of("captions"), [("a",)]).why_undefined() == (
        "one test clip in fold test ranks first whatever the encoder"
    )
    assert problem(task_of("captions"), [("a",), ("b",)]).why_undefined() is None


# ---------------------------------------------------------------- events

EVENT = Events(np.array([0.0]), np.array([1.0]), np.array([0]))
# Two clips; of each class right, claimed though absent, missed. The third class occurs nowhere, but is claimed once.
COUNTS = np.array([[[3, 1, 0], [0, 0, 2], [0, 1, 0]], [[1, 0, 1], [1, 0, 1], [0, 0, 0]]])
F1 = (2 * 4 / (2 * 4 + 1 + 1), 2 * 1 / (2 * 1 + 3), 0.0)


@pytest.mark.parametrize(
    ("metric", "protocol", "expected"),
    [
        ("segment_f1_macro", "corrected", (F1[0] + F1[1]) / 2),
        ("segment_f1_macro", "xares", sum(F1) / 3),
        ("segment_f1_micro", "corrected", 2 * 5 / (2 * 5 + 2 + 4)),
        ("segment_f1_micro", "xares", 2 * 5 / (2 * 5 + 2 + 4)),
    ],
)
def test_segments_are_averaged_as_the_task_says(metric: str, protocol: str, expected: float) -> None:
    found = scored(problem(task_of("events", metric), [EVENT, EVENT], protocol), COUNTS)
    assert found.score == pytest.approx(expected)
    other = "segment_f1_micro" if metric == "segment_f1_macro" else "segment_f1_macro"
    assert set(found.metrics) == {other, "segment_precision", "segment_recall"}
    assert found.metrics["segment_precision"] == pytest.approx(5 / 7)
    assert found.metrics["segment_recall"] == pytest.approx(5 / 9)
    assert found.predictions["segments"].tolist() == COUNTS.tolist()


def test_x_ares_counts_in_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def watched(*arguments: Any, **options: Any) -> list[Any]:
        given.update(options)
        return []

    monkeypatch.setattr(frame_probe, "train_frames", watched)
    kind = problem(task_of("events", "segment_f1_micro"), [EVENT, EVENT], "xares", Tools(hop_seconds=0.04))
    kind.train(1, print)
    assert (given["hop_seconds"], given["segment_seconds"], given["average"]) == (0.04, 0.5, "micro")
