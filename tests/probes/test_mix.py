"""The learned mix of layers: what it finds, and that nothing but the embeddings decides it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from xares_onnx.data.sound_events import Events
from xares_onnx.errors import ScoreUndefinedError
from xares_onnx.models.logistic import Multinomial, path
from xares_onnx.models.mixing import TOLERANCE, Layers, Mixture, solve_jointly
from xares_onnx.models.standardised import MatrixRows, pool_of
from xares_onnx.probes import convex
from xares_onnx.probes.convex import ConvexResult, FoldRows, fit_fold
from xares_onnx.probes.convex_frames import Clips, fit_frames
from xares_onnx.probes.mix import mixed

Singles = npt.NDArray[np.float32]
DIM = 8


def bits(rows: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 4, rows)


def halves(labels: npt.NDArray[np.int64], seed: int, noise: float = 0.6) -> list[Singles]:
    """Three layers: the first knows one bit of each label, the second noise, the third the other bit, elsewhere."""
    rng = np.random.default_rng(seed)
    layers = [np.full((len(labels), DIM), 0.5), rng.standard_normal((len(labels), DIM)), np.full((len(labels), DIM), -2.0)]
    for layer, columns, bit in ((layers[0], slice(0, 4), labels % 2), (layers[2], slice(4, 8), labels // 2)):
        layer[:, columns] = (2 * bit - 1)[:, None] + noise * rng.standard_normal((len(labels), 4))
    return [layer.astype(np.float32) for layer in layers]


def side_by_side(layers: list[Singles]) -> Singles:
    return np.concatenate(layers, axis=1)


def rows_of(count: int) -> FoldRows:
    train, valid, test = np.split(np.arange(count), [count // 2, 3 * count // 4])
    return FoldRows(train, valid, test, held_out=valid)


def fit(layers: list[Singles], labels: npt.NDArray[Any], objective: Any = None, threads: int = 1) -> ConvexResult:
    names = [f"layer.{number}" for number in range(len(layers))]
    objective = mixed(objective or convex.Classes(labels, 4), names)
    rows = rows_of(len(labels))
    return fit_fold(side_by_side(layers), objective, np.arange(len(labels)), rows, threads=threads)


def fit_one(layer: Singles, labels: npt.NDArray[Any], objective: Any = None) -> ConvexResult:
    objective = objective or convex.Classes(labels, 4)
    return fit_fold(layer, objective, np.arange(len(labels)), rows_of(len(labels)))


def accuracy(result: ConvexResult, labels: npt.NDArray[np.int64]) -> float:
    return float((result.predictions == labels[result.examples]).mean())


def shares(result: ConvexResult) -> npt.NDArray[np.float64]:
    assert result.shares is not None
    return np.array(list(result.shares.values()))


# ---------------------------------------------------------------- what it finds


def test_two_layers_with_half_of_the_information_each_are_mixed() -> None:
    labels = bits(400, 1)
    layers = halves(labels, 2)
    result = fit(layers, labels)
    alone = [accuracy(fit_one(layer, labels), labels) for layer in layers]
    assert max(alone) < 0.65
    assert accuracy(result, labels) > 0.95
    first, noise, third = shares(result)
    assert first + noise + third == pytest.approx(1)
    assert noise < 0.1
    assert min(first, third) > 0.3
    assert result.convergence.converged
    assert result.convergence.relative_gradient_norm <= TOLERANCE


def test_copies_of_a_layer_are_that_layer() -> None:
    """Equal weights are the optimum, and the head is the one on the layer alone."""
    labels = bits(400, 3)
    layer = (halves(labels, 4)[0] + np.random.default_rng(5).standard_normal((400, DIM))).astype(np.float32)
    mix, alone = fit([layer] * 3, labels), fit_one(layer, labels)
    assert shares(mix) == pytest.approx([1 / 3] * 3, abs=1e-4)
    assert np.array_equal(mix.predictions, alone.predictions)
    assert [tried.selection for tried in mix.tried] == pytest.approx([tried.selection for tried in alone.tried], abs=0.02)
    assert mix.chosen == alone.chosen


def test_numbers_are_mixed_too_and_copies_give_the_ridge_of_the_layer() -> None:
    labels = bits(400, 6)
    layers = halves(labels, 7)
    numbers = 100 + 30 * (labels % 2) + 20 * (labels // 2).astype(np.float64)
    objective = convex.Numbers(numbers, None)
    result = fit(layers, labels, objective)
    errors = [
        float(((r.predictions - numbers[r.examples]) ** 2).mean()) for r in (result, fit_one(layers[0], labels, objective))
    ]
    assert errors[0] < 0.5 * errors[1]
    assert shares(result)[1] < 0.1
    copies, alone = fit([layers[0]] * 2, labels, objective), fit_one(layers[0], labels, objective)
    assert copies.predictions == pytest.approx(alone.predictions, abs=0.1)


def test_tags_are_mixed_too() -> None:
    labels = bits(400, 8)
    layers = halves(labels, 9)
    tags = np.stack([labels % 2 == 1, labels // 2 == 1, np.zeros(400, bool)], axis=1)
    objective = convex.Tags(tags, 2.0)
    result = fit(layers, labels, objective)
    assert result.tried[result.chosen].selection > 0.95
    assert result.predictions[:, 2].max() == 0  # no row has the tag, so nothing teaches it
    assert shares(result)[1] < 0.1


def test_frames_of_events_are_mixed_too() -> None:
    rng = np.random.default_rng(10)
    frames, events = [], []
    for clip in range(32):
        active = (rng.integers(0, 2), rng.integers(0, 2))
        labels = np.full(20, active[0] + 2 * active[1])
        frames.append(side_by_side(halves(labels, 100 + clip)).astype(np.float16))
        present = np.flatnonzero(active)
        events.append(Events(np.zeros(len(present)), np.ones(len(present)), present.astype(np.int64)))
    times = [np.arange(20) / 20 + 0.025] * 32
    options: dict[str, Any] = {"segment_seconds": 0.25, "average": "micro"}
    rows = rows_of(32)

    def f1(columns: slice, layers: tuple[str, ...]) -> tuple[float, Any]:
        clips = Clips([clip[:, columns] for clip in frames], times, [1.0] * 32, events, 2)
        result = fit_frames(clips, rows, 1.0, layers=layers, **options)
        hits, false, missed = result.predictions.sum(axis=(0, 1))
        return 2 * hits / (2 * hits + false + missed), result

    score, result = f1(slice(None), ("a", "b", "c"))
    assert score > 0.95
    assert max(f1(slice(start, start + DIM), ())[0] for start in (0, DIM, 2 * DIM)) < 0.9
    assert shares(result)[1] < 0.15
    assert list(result.tuning.mix) == ["a", "b", "c"]
    assert result.tuning.thresholds is not None


# ---------------------------------------------------------------- nothing else decides


def test_the_scale_and_offset_of_a_layer_change_nothing() -> None:
    labels = bits(400, 11)
    layers = halves(labels, 12)
    loud = [layers[0], layers[1] * 100 + 3, layers[2]]
    plain, scaled = fit(layers, labels), fit([layer.astype(np.float32) for layer in loud], labels)
    assert shares(scaled) == pytest.approx(shares(plain), abs=2e-3)
    assert np.array_equal(plain.predictions, scaled.predictions)


def test_the_same_bytes_twice_and_with_two_threads() -> None:
    labels = bits(9000, 13)  # several blocks of rows
    layers = halves(labels, 14, noise=2.0)
    results = [fit(layers, labels, threads=threads) for threads in (1, 1, 2)]
    for other in results[1:]:
        assert other.shares == results[0].shares
        assert other.predictions.tobytes() == results[0].predictions.tobytes()
        assert other.tried == results[0].tried


def test_rows_that_are_read_anew_in_every_pass_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from xares_onnx.models import mixing

    labels = bits(300, 15)
    layers = halves(labels, 16)
    kept = fit(layers, labels)
    monkeypatch.setattr(mixing, "_VALUES_KEPT", 0)
    monkeypatch.setattr(mixing, "_ROTATED_KEPT", 0)
    anew = fit(layers, labels)
    assert shares(anew) == pytest.approx(shares(kept), abs=2e-3)
    assert np.array_equal(anew.predictions, kept.predictions)


def test_an_independent_solver_finds_nothing_better_nearby() -> None:
    labels = bits(120, 17)
    layers, strength = halves(labels, 18, noise=1.5), 0.01
    rows = MatrixRows(side_by_side(layers), np.arange(120), labels)
    with pool_of(1) as pool:
        mixture = Mixture(Layers(rows, 3, pool), np.full(3, 1 / 3))
        loss = Multinomial(np.bincount(labels))
        (start,) = path(mixture, loss, [strength], 1e-4)
        solution = solve_jointly(mixture, loss, strength, start.theta, 1e-4)
    assert solution.converged
    deviations = np.stack([layer.std(axis=0) for layer in layers]).astype(np.float64)
    z = np.stack(
        [(layer - layer.mean(axis=0)) / np.where(s > 1e-5, s, np.inf) for layer, s in zip(layers, deviations, strict=True)]
    )

    def objective(x: npt.NDArray[np.float64]) -> float:
        weight, bias, shares = x[: 4 * DIM].reshape(DIM, 4), x[4 * DIM : -3], softmax(x[-3:])
        rows = np.tensordot(shares, z, 1)
        logits = rows / rows.std(axis=0) @ weight + bias
        return float(-log_softmax(logits, axis=1)[np.arange(120), labels].mean() + strength / 2 * (weight**2).sum())

    def variables(theta: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        weight = mixture.weight(theta) * np.tensordot(weights, z, 1).std(axis=0)[:, None]
        return np.concatenate([weight.ravel(), theta[-1], np.log(weights)])

    ours = variables(solution.theta, solution.weights)
    reference = minimize(objective, ours, method="BFGS", options={"gtol": 1e-5})
    assert objective(variables(start.theta, mixture.weights)) > objective(ours) + 0.01
    assert objective(ours) == pytest.approx(reference.fun, abs=1e-5)
    assert solution.weights == pytest.approx(softmax(reference.x[-3:]), abs=0.01)


# ---------------------------------------------------------------- edges


def test_an_embedding_that_is_not_finite_has_no_mix() -> None:
    labels = bits(100, 19)
    layers = halves(labels, 20)
    layers[1][7, 2] = np.nan
    with pytest.raises(ScoreUndefinedError):
        fit(layers, labels)


def test_layers_that_tell_nothing_apart_give_the_most_frequent_class() -> None:
    labels = np.array([0] * 60 + [1] * 40)[np.random.default_rng(21).permutation(100)]
    result = fit([np.ones((100, DIM), np.float32)] * 2, labels)
    assert set(result.predictions.tolist()) == {0}
    assert shares(result).tolist() == [0.5, 0.5]
