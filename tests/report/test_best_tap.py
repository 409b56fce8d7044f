"""The best tap: chosen on the selection clips, and marked if it could not be."""

from __future__ import annotations

import io
from typing import Any

import msgspec
from report_results import record, result, right
from rich.console import Console

from xares_onnx.evaluation.differences import Side
from xares_onnx.evaluation.record import Result, TaskResult
from xares_onnx.probes.tuning import Convergence, Trial, Tuning
from xares_onnx.report.board import make_board
from xares_onnx.report.page.html import html
from xares_onnx.report.taps import best_note, best_tap, print_taps, selection_score

ESC = "esc50"
TAPS = ("embeddings", "layer.0", "layer.1")


def tuned(tap: str | None, right_clips: int, selection: float | None, **options: Any) -> TaskResult:
    """The record of a head with two settings, of which the other selects worse."""
    lower = None if selection is None else selection - 0.1
    tuning = Tuning(
        setting="L2 strength",
        tried=[Trial(setting=1.0, selection=lower, test=0.99), Trial(setting=0.1, selection=selection, test=0.5)],
        chosen=[0.1],
        convergence=Convergence(iterations=1, limit_reached=False),
        train=1.0,
    )
    return record(ESC, right(range(right_clips)), tap=tap, tuning=tuning, **options)


def layers(*records: TaskResult) -> Result:
    return result(records, taps=TAPS)


def printed(of: Result) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_taps(of, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_selection_score_is_of_the_chosen_setting() -> None:
    assert selection_score(tuned(None, 60, 0.7)) == 0.7
    assert selection_score(tuned(None, 60, None)) is None
    assert selection_score(record(ESC, right(range(60)))) is None


def test_the_best_tap_is_the_best_on_the_selection_clips() -> None:
    """The output is best on the test clips, layer.1 on the selection clips: its test score is reported."""
    of = layers(tuned(None, 90, 0.6), tuned("layer.0", 70, 0.7), tuned("layer.1", 80, 0.8))
    best = best_tap(of.tasks)
    assert best is not None
    assert (best.record.tap, best.record.score, best.on_test) == ("layer.1", 0.8, False)
    text = printed(of)
    row = next(line for line in text.splitlines() if line.startswith("| best"))
    assert row.replace("|", "").split() == ["best", "layer.1"]
    assert "the best on the selection clips" in text
    assert "flatters" not in text
    (curve,) = make_board([Side.of_result("a", of)]).curves
    assert (curve.steps[curve.best or 0], curve.best_on_test) == ("layer.1", False)
    assert "the best on the selection clips." in html(make_board([Side.of_result("a", of)]))


def test_of_equal_taps_the_one_nearest_the_input_is_best() -> None:
    of = layers(tuned(None, 90, 0.7), tuned("layer.0", 70, 0.7), tuned("layer.1", 80, 0.7))
    row = next(line for line in printed(of).splitlines() if line.startswith("| best"))
    assert "layer.0" in row
    (curve,) = make_board([Side.of_result("a", of)]).curves
    assert curve.best == 0


def test_without_selection_scores_the_best_is_marked_as_chosen_on_test_clips() -> None:
    some = (tuned(None, 60, None, method="knn"), tuned("layer.0", 90, None, method="knn"))
    text = printed(layers(*some))
    row = next(line for line in text.splitlines() if line.startswith("| best"))
    assert row.replace("|", "").split() == ["best", "layer.0", "(test)"]
    assert "so its score flatters it" in text
    assert "(test)" in html(make_board([Side.of_result("a", layers(*some))]))


def test_one_missing_selection_score_moves_the_choice_to_test_clips() -> None:
    best = best_tap([tuned(None, 60, 0.9), tuned("layer.0", 90, None)])
    assert best is not None
    assert (best.record.tap, best.on_test) == ("layer.0", True)


def test_a_knn_has_a_selection_score_of_its_own() -> None:
    scores = ((None, 90, 0.6), ("layer.0", 70, 0.8))
    of = [record(ESC, right(range(n)), "knn", tap, selection=selection) for tap, n, selection in scores]
    best = best_tap(of)
    assert best is not None
    assert (best.record.tap, best.on_test) == ("layer.0", False)


def test_the_note_covers_both_ways_of_choosing() -> None:
    assert best_note([True, False]).count(";") == 1
    assert best_tap([]) is None


def mixed(weights: dict[str, list[float]], right_clips: int = 95) -> TaskResult:
    of = tuned("mix", right_clips, 0.99)
    assert of.tuning is not None
    return msgspec.structs.replace(of, tuning=msgspec.structs.replace(of.tuning, chosen=[0.1, 0.1], mix=weights))


def test_the_mix_stands_beside_the_best_tap_with_its_weights() -> None:
    """It selects best of all, and is no layer."""
    mix = mixed({"layer.0": [0.7, 0.5], "layer.1": [0.3, 0.5]})
    of = layers(tuned(None, 90, 0.6), tuned("layer.0", 70, 0.7), tuned("layer.1", 80, 0.8), mix)
    best = best_tap(of.tasks)
    assert best is not None
    assert best.record.tap == "layer.1"
    rows = [line.replace("|", "").split() for line in printed(of).splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        ["layer.0", "0.700", "60", "%"],
        ["layer.1", "0.800", "40", "%"],
        ["embeddings", "0.900"],
        ["best", "layer.1"],
        ["mix", "0.950"],
    ]
    assert "mix: the learned weighted sum of the taps" in " ".join(printed(of).split())
    (curve,) = make_board([Side.of_result("a", of)]).curves
    assert curve.weights == (0.6, 0.4, None)
    page = html(make_board([Side.of_result("a", of)]))
    assert "layer.0 60 %; layer.1 40 %" in page
    assert '<code>mix</code></th><td class="n">0.950</td>' in page
    assert "mix: the learned weighted sum of the taps" in page


def test_a_mix_without_a_score_says_why_there_is_none() -> None:
    mix = record(ESC, right(range(60)), tap="mix", status="not_applicable", score=None, reason="no layers")
    of = layers(tuned(None, 90, 0.6), tuned("layer.0", 70, 0.7), mix)
    assert "not applicable" in printed(of)
    page = html(make_board([Side.of_result("a", of)]))
    assert '<code>mix</code></th><td class="n">not applicable</td>' in page
    assert "weights in the mix" not in page


def test_without_a_mix_nothing_speaks_of_one() -> None:
    of = layers(tuned(None, 90, 0.6), tuned("layer.0", 70, 0.7))
    assert "mix" not in printed(of)
    assert "<code>mix</code>" not in html(make_board([Side.of_result("a", of)]))
