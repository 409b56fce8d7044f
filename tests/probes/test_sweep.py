"""The sweep over learning rates, with learners whose curves are written down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from xares_onnx.errors import ScoreUndefinedError
from xares_onnx.probes import ctc, llm, retrieval
from xares_onnx.probes.sweep import Clock, Sweep, swept
from xares_onnx.probes.training import HeadResult, Rows, Selection

Curve = Sequence[tuple[float, float]]  # selection score and loss of each epoch; the last goes on for ever
RATES = (0.001, 0.01, 0.1)
ROWS = Rows(np.arange(40), np.arange(40, 50), np.arange(50, 70))


@dataclass
class Written:
    """Its weights are the number of the epoch."""

    curve: Curve
    rate: float
    seed: int
    epoch: int = 0
    selection: Selection = field(default_factory=Selection)
    weights: int = 0
    best: int = 0
    scored: list[NDArray[np.int64]] = field(default_factory=list)

    def train(self) -> None:
        self.weights += 1

    def selected(self) -> tuple[float, float]:
        score, loss = self.curve[min(self.epoch, len(self.curve)) - 1]
        if score == -math.inf:
            raise ScoreUndefinedError("not finite")
        return score, loss

    def keep(self) -> None:
        self.best = self.weights

    def save(self) -> None:
        pass

    def finish(self) -> None:
        self.weights = self.best

    def score(self, rows: NDArray[np.int64]) -> float:
        self.scored.append(rows)
        return self.rate + self.weights

    def predict(self) -> tuple[NDArray[np.int64], Any]:
        return ROWS.test, (self.rate, self.seed, self.weights)


@dataclass
class Run:
    results: list[HeadResult]
    learners: list[Written]
    steps: list[int]


def run(
    curves: Sequence[Curve],
    *,
    seeds: Sequence[int] = (0,),
    epochs: int = 20,
    patience: int = 3,
    rows: Rows = ROWS,
    counts_clips: bool = False,
) -> Run:
    plan = Sweep(RATES[: len(curves)], batch_size=4, epochs=epochs, patience=patience, counts_clips=counts_clips)
    learners: list[Written] = []
    steps: list[int] = []

    def make(seed: int, rate: float) -> Written:
        learners.append(Written(curves[RATES.index(rate)], rate, seed))
        return learners[-1]

    return Run(list(swept(make, 0, rows, seeds, plan, Clock(plan, 1, len(seeds), steps.append))), learners, steps)


@pytest.mark.parametrize(
    ("curves", "chosen"),
    [
        ([[(0.3, 1)], [(0.5, 2)], [(0.4, 0)]], 0.01),  # the best score, whatever the loss
        ([[(0.3, 1)], [(0.5, 2)], [(0.5, 1)]], 0.1),  # of equal scores the lower loss
        ([[(0.5, 1)], [(0.5, 2)], [(0.5, 1)]], 0.001),  # of equals the lower rate
        ([[(-2, 1)], [(-1, 9)], [(-3, 1)]], 0.01),  # below 0, too
        ([[(0.1, 9)], [(0.2, 9), (0.9, 9), (0.1, 9)], [(0.8, 9)]], 0.01),  # by its best epoch
    ],
)
def test_the_best_rate_on_selection_is_chosen(curves: Sequence[Curve], chosen: float) -> None:
    done = run(curves)
    (result,) = done.results
    assert result.tuning is not None
    assert result.tuning.chosen == [chosen]
    assert result.predictions[0] == chosen
    assert [trial.setting for trial in result.tuning.tried] == list(RATES)
    assert [trial.selection for trial in result.tuning.tried] == [max(score for score, _ in curve) for curve in curves]
    assert [trial.test for trial in result.tuning.tried] == [learner.rate + learner.best for learner in done.learners]
    assert result.tuning.setting == "learning rate"


def chosen_by(curves: Sequence[Curve], selection_clips: int, **options: Any) -> list[float]:
    rows = Rows(np.arange(40), np.arange(40, 40 + selection_clips), ROWS.test)
    tuning = run(curves, rows=rows, **options).results[0].tuning
    assert tuning is not None
    return tuning.chosen


@pytest.mark.parametrize(
    ("curves", "chosen"),
    [
        ([[(0.3, 0)], [(0.5, 2)], [(0.34, 0)]], 0.01),  # far below
        ([[(0.36, 1)], [(0.5, 2)], [(0.34, 0)]], 0.001),  # within a standard error, 0.16, the lowest loss
        ([[(0.5, 1)], [(0.5, 2)], [(0.45, 1)]], 0.001),  # of equals the lower rate
        ([[(0.99, 1)], [(1, 2)], [(0.98, 0)]], 0.01),  # all are right, which has no error
    ],
)
def test_right_or_wrong_clips_that_cannot_tell_rates_apart_leave_it_to_the_loss(
    curves: Sequence[Curve], chosen: float
) -> None:
    assert chosen_by(curves, 10, counts_clips=True) == [chosen]


def test_many_selection_clips_tell_rates_apart_that_few_cannot() -> None:
    curves: list[Curve] = [[(0.5, 1)], [(0.53, 2)]]
    assert chosen_by(curves, 100, counts_clips=True) == [0.001]
    assert chosen_by(curves, 400, counts_clips=True) == [0.01]
    assert chosen_by(curves, 100) == [0.01]


@pytest.mark.parametrize(("rows", "epochs"), [(1, 90), (4 * 1500, 90), (4 * 1500 + 1, 90), (4 * 3000, 50), (10**7, 1)])
def test_a_large_training_has_fewer_epochs(rows: int, epochs: int) -> None:
    """At most 150,000 batches, and one epoch."""
    assert Sweep(RATES, batch_size=4, epochs=90, patience=3).most_epochs(rows) == epochs


def test_an_epoch_that_the_updates_do_not_allow_is_not_trained_and_is_said() -> None:
    rising = [(0.1 * epoch, 1.0) for epoch in range(1, 9)]
    done = run([rising], rows=Rows(np.arange(4 * 30_000), ROWS.valid, ROWS.test))
    assert done.learners[0].epoch == 5
    assert done.results[0].tuning is not None
    assert done.results[0].tuning.convergence.limit_reached
    assert done.steps[-1] == 20


def test_a_loss_that_still_falls_keeps_a_training_going() -> None:
    """As that of CTC, which at first writes something random, and then nothing, before it writes what is right."""
    random, silent = [(0.2, 9.0), (0.2, 9.0)], [(0.0, loss) for loss in (5.0, 4.0, 3.0, 2.0, 1.9)]
    done = run([[*random, *silent, (0.8, 1.8), (0.8, 1.8)]], patience=3)
    assert (done.results[0].best_epoch, done.learners[0].epoch) == (8, 11)


def test_patience_counts_from_the_best_epoch_and_weights_are_of_it() -> None:
    done = run([[(0.1, 5), (0.3, 5), (0.2, 5), (0.3, 5), (0.25, 5)]], patience=3)
    (result,), (learner,) = done.results, done.learners
    assert (learner.epoch, result.best_epoch, result.valid_score) == (5, 2, 0.3)
    assert result.predictions == (0.001, 0, 2)
    assert result.tuning is not None
    assert (result.tuning.convergence.iterations, result.tuning.convergence.limit_reached) == (2, False)


def test_a_lower_loss_at_the_same_score_is_an_improvement() -> None:
    done = run([[(0.0, 9), (0.0, 8), (0.0, 7), (0.0, 6), (0.5, 5), (0.5, 5)]], patience=2)
    assert (done.results[0].best_epoch, done.learners[0].epoch) == (5, 7)


@pytest.mark.parametrize(("epochs", "limit_reached"), [(7, True), (8, True), (9, False)])
def test_the_maximum_holds_and_is_said(epochs: int, limit_reached: bool) -> None:
    """Best in epoch 6, patience 3: the ninth ends it by itself."""
    rising = [(0.1 * epoch, 1.0) for epoch in range(1, 7)]
    done = run([[(0.1, 1)], rising], epochs=epochs)
    assert done.learners[1].epoch == epochs
    assert done.results[0].tuning is not None
    assert done.results[0].tuning.convergence.iterations == 6
    assert done.results[0].tuning.convergence.limit_reached is limit_reached


def test_a_slow_rates_maximum_is_not_that_of_the_chosen_one() -> None:
    rising = [(0.01 * epoch, 1.0) for epoch in range(1, 40)]
    (result,) = run([rising, [(0.9, 1)]]).results
    assert result.tuning is not None
    assert (result.tuning.chosen, result.tuning.convergence.limit_reached) == ([0.01], False)


@pytest.mark.parametrize("end", [(math.nan, math.nan), (0.9, math.nan), (0.9, math.inf), (-math.inf, 0)])
def test_a_rate_that_runs_away_stops_and_keeps_what_it_had(end: tuple[float, float]) -> None:
    done = run([[(0.1, 1)], [(0.5, 1), (0.6, 1), end], [end]])
    (result,) = done.results
    assert [learner.epoch for learner in done.learners] == [4, 3, 1]
    assert result.tuning is not None
    assert [(trial.selection, trial.test) for trial in result.tuning.tried] == [(0.1, 1.001), (0.6, 2.01), (None, None)]
    assert result.predictions == (0.01, 0, 2)
    assert not result.tuning.convergence.limit_reached
    with pytest.raises(ScoreUndefinedError, match="NaN or infinity"):
        run([[end], [end]])


def test_the_first_seed_chooses_and_the_others_are_trained_at_its_rate() -> None:
    done = run([[(0.3, 1)], [(0.5, 2), (0.6, 2)], [(0.4, 0)]], seeds=[7, 2, 5])
    assert [(learner.rate, learner.seed) for learner in done.learners] == [
        *((rate, 2) for rate in RATES),
        (0.01, 5),
        (0.01, 7),
    ]
    assert [(result.seed, result.predictions, result.best_epoch) for result in done.results] == [
        (seed, (0.01, seed, 2), 2) for seed in (2, 5, 7)
    ]
    assert all(result.tuning is not None and result.tuning.chosen == [0.01] for result in done.results)


def test_without_selection_clips_the_middle_rate_is_trained_to_the_end() -> None:
    none = Rows(ROWS.train, np.empty(0, np.int64), ROWS.test)
    done = run([[(math.nan, math.nan)]] * 3, seeds=[0, 1], epochs=6, rows=none)
    assert [(learner.rate, learner.epoch) for learner in done.learners] == [(0.01, 6)] * 2
    assert [(result.best_epoch, math.isnan(result.valid_score)) for result in done.results] == [(6, True)] * 2
    tuning = done.results[0].tuning
    assert tuning is not None
    assert [(trial.setting, trial.selection, trial.test) for trial in tuning.tried] == [(0.01, None, 6.01)]
    assert not tuning.convergence.limit_reached
    assert done.steps[-1] == 18


def test_the_training_score_is_of_as_many_training_rows_as_selection_has() -> None:
    done = run([[(0.3, 1)]])
    rows = done.learners[0].scored[-1]
    assert len(rows) == len(ROWS.valid)
    assert set(rows) <= set(ROWS.train)
    assert (rows[0], rows[-1]) == (0, 39)


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 9)), min_size=1, max_size=9), max_size=3
    ).filter(bool),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 4),
)
def test_whatever_the_curves_limits_hold_and_steps_rise_to_all(
    curves: list[Curve], seeds: int, epochs: int, patience: int
) -> None:
    done = run(curves, seeds=range(seeds), epochs=epochs, patience=patience)
    for learner in done.learners:
        assert learner.epoch <= epochs
        assert learner.epoch - learner.selection.improved <= patience
        assert learner.selection.epoch <= learner.selection.improved
        assert (learner.selection.score, -learner.selection.loss) == max(
            (learner.curve[min(epoch, len(learner.curve) - 1)][0], -learner.curve[min(epoch, len(learner.curve) - 1)][1])
            for epoch in range(learner.epoch)
        )
    assert done.steps == sorted(set(done.steps))
    assert done.steps[-1] == len(curves) * epochs


@pytest.mark.parametrize("module", [retrieval, ctc, llm])
def test_shipped_sweeps_have_at_least_four_rates_over_two_decades(module: Any) -> None:
    rates = module.SWEEP.rates
    assert len(rates) >= 4
    assert rates[-1] / rates[0] >= 100 * (1 - 1e-9)
    assert list(rates) == sorted(rates)
