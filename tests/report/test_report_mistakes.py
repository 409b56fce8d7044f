"""A clip's own score by every metric, the words for the worst clips, and predictions of another kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_results import predictions, record, result, right
from sklearn.metrics import label_ranking_average_precision_score

from xares_onnx.data.catalog import shipped_tasks
from xares_onnx.errors import DataError
from xares_onnx.evaluation.differences import Side
from xares_onnx.report.board import make_board
from xares_onnx.report.page.mistakes import MAX_CLASSES, Mistakes, class_names, find_mistakes, own_scores, ranking_precision
from xares_onnx.scoring.scoring import Predictions


def mistakes(task: str, *several: Predictions, method: str = "linear") -> Mistakes:
    sides = []
    for number, arrays in enumerate(several):
        scored = result([record(task, arrays, method)], f"m{number}")
        sides.append(Side(f"m{number}.json", scored, lambda _, arrays=arrays: arrays))
    board = make_board(sides)
    return find_mistakes(board, board.rows[0])


def columns(n: int, **arrays: Any) -> Predictions:
    about = {"key": np.array([f"clip{i}" for i in range(n)]), "fold": np.array(["test"] * n), "seed": np.zeros(n, int)}
    return {**about, **{name: np.asarray(array) for name, array in arrays.items()}}


def test_ranking_precision_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    present = rng.random((50, 12)) < 0.25
    scores = np.round(rng.random((50, 12)), 1)  # with ties
    precisions = ranking_precision(present, scores)
    for i in range(50):
        expected = label_ranking_average_precision_score(present[i : i + 1], scores[i : i + 1])
        assert precisions[i] == pytest.approx(expected), i


@pytest.mark.parametrize(
    ("metric", "arrays", "scores"),
    [
        ("accuracy", {"target": [1, 2], "prediction": [1, 0]}, [1, 0]),
        ("mse", {"target": [1.0, 2.0], "prediction": [1.5, 2.0]}, [0.25, 0]),
        ("one_minus_wer", {"word_errors": [[1, 4], [6, 4]]}, [0.75, -0.5]),
        ("recall_at_1", {"recall": [[3, 5, 1], [0, 5, 0]]}, [0.8, 0]),
        ("segment_f1_macro", {"segments": [[[2, 1, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]]}, [2 / 3, 1]),
    ],
)
def test_own_scores(metric: str, arrays: dict[str, Any], scores: list[float]) -> None:
    assert own_scores(metric, columns(2, **arrays)).tolist() == pytest.approx(scores)


def test_the_worst_are_worst_for_all_models() -> None:
    worst = mistakes("esc50", right([0, 1, 2], of=5), right([0, 3, 4], of=5))
    assert [clip.key for clip in worst.clips] == [f"test-0.tar/clip00{i}" for i in (1, 2, 3, 4)]
    assert worst.models == (0, 1)
    assert [sorted(clip.scores) for clip in worst.clips] == [[0, 1]] * 4
    only = mistakes("esc50", right([0, 1, 2], of=5), right([0, 2, 3], of=4))  # the last clip is not of both
    assert [clip.key[-1] for clip in only.clips] == ["1", "3"]


def test_the_largest_error_is_worst() -> None:
    (worst, *others) = mistakes("speechocean762", predictions([1.0, 2.0, 3.0], [[1.0, 9.0, 4.0]])).clips
    assert (worst.key[-1], worst.truth, worst.answers, worst.scores) == ("1", "2", ("9",), (49.0,))
    assert len(others) == 1  # the third is perfect


def test_truth_and_answers_of_a_clip_are_put_into_words() -> None:
    names = shipped_tasks()["fsd50k"].target.class_names
    present = np.zeros((2, 200), bool)
    present[0, [3, 7]] = present[1, 5] = True
    scores = np.zeros((2, 200), np.float32)
    scores[0, [3, 9]] = scores[1, 5] = 1
    (clip,) = mistakes("fsd50k", columns(2, target=present, prediction=scores)).clips
    assert (clip.truth, clip.answers) == (f"{names[3]}, {names[7]}", (f"{names[3]}, {names[9]}",))
    spoken = columns(2, target=["one two", "x"], prediction=["one\x1b", "x"], word_errors=[[1, 2], [0, 1]])
    (clip,) = mistakes("librispeech", spoken, method="ctc").clips
    assert (clip.truth, clip.answers) == ("one two", ("one\\x1b",))
    captions = columns(3, recall=[[3, 5, 0], [5, 5, 1], [5, 5, 1]])
    (clip,) = mistakes("clotho", captions, method="retrieval").clips
    assert (clip.truth, clip.answers) == ("5 captions", ("3 of them find the clip; it ranks another clip's caption first",))
    segments = np.zeros((2, 10, 3), np.int32)
    segments[0, 2], segments[1, 2] = (1, 2, 3), (4, 0, 0)
    (clip,) = mistakes("desed", columns(2, segments=segments)).clips
    assert clip.truth == shipped_tasks()["desed"].target.class_names[2]
    assert clip.answers == ("segments: 1 right, 2 claimed though absent, 3 missed",)


def test_only_unchanged_shipped_tasks_have_class_names() -> None:
    shipped = record("voxlingua33", right([0]))
    assert class_names(shipped) == shipped_tasks()["voxlingua33"].target.class_names
    assert class_names(record("voxlingua33", right([0]), definition_digest="0" * 64)) is None


def test_with_many_classes_there_are_pairs_without_a_matrix() -> None:
    n = MAX_CLASSES + 1
    wide = predictions(np.arange(n), [np.arange(n)[::-1]])
    (confusion,) = mistakes("esc50", wide).confusions
    assert confusion.matrix is None
    assert len(confusion.pairs) == 5
    (small,) = mistakes("esc50", predictions([0, 0, 4], [[0, 4, 4]])).confusions
    assert small.matrix is not None
    assert small.matrix.tolist() == [[0.5, 0.5], [0, 1]]


def test_models_share_the_axes_of_their_confusions() -> None:
    shared = mistakes("esc50", predictions([0, 1], [[0, 1]]), predictions([0, 1], [[7, 7]]))
    assert [confusion.classes for confusion in shared.confusions] == [("0", "1", "7")] * 2


def test_predictions_of_another_kind_are_a_data_error() -> None:
    """Texts can be equal too, so that they have a score."""
    texts = columns(3, target=["a", "b", "c"], prediction=["a", "b", "x"])
    with pytest.raises(DataError, match="the predictions of esc50 do not fit the metric accuracy"):
        mistakes("esc50", texts)


def test_missing_predictions_are_noted(tmp_path: Path) -> None:
    board = make_board([Side.of_result("a.json", result([record("esc50", right([0]))]))])
    without = find_mistakes(board, board.rows[0])
    assert (without.models, without.clips, without.note) == ((), (), "a.json comes without predictions of esc50")
