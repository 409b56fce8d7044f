"""How an error lies in a tensor, in words."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from xares_onnx.diagnosis.figures import cka
from xares_onnx.diagnosis.patterns import pattern_of

X = np.random.default_rng(0).standard_normal((3, 40, 8)).astype(np.float32)


def changed(where: tuple[slice | int, ...], by: float = 1.0) -> NDArray[np.float32]:
    y = X.copy()
    y[where] += by
    return y


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (2 * X, "a constant factor of 2"),
        (-X, "a constant factor of -1"),
        (changed((slice(None), slice(-3, None))), "wrong only in the last 3 of 40 frames"),
        (changed((slice(1, None),)), "wrong only in the last 2 of 3 batch items"),
        (changed((0, slice(5, 9))), "wrong only in the first 1 of 3 batch items and 5 to 8 of 40 frames"),
        (changed((slice(None), slice(None), 3)), "wrong only in number 3 of 8 channels"),
        (X[:, :-2], "2 frames missing (38 instead of 40)"),
        (X[:2], "1 items of the batch missing (2 instead of 3)"),
        (X.transpose(0, 2, 1), "axes swapped: [3, 8, 40] instead of [3, 40, 8]"),
        (X[..., [1, 0, 2, 3, 4, 5, 6, 7]], "channels in another order: the first 2 of 8"),
        (np.where(np.arange(40)[:, None] > 36, np.nan, X), "not finite only in the last 3 of 40 frames"),
        (X + np.random.default_rng(1).standard_normal(X.shape), ""),
    ],
)
def test_the_pattern_of_an_error(value: NDArray[np.float32], pattern: str) -> None:
    assert pattern_of(X, value, time=1) == pattern


def test_cka_is_1_for_a_rotation_and_low_for_other_vectors() -> None:
    rng = np.random.default_rng(0)
    x = [rng.standard_normal(4).astype(np.float32) for _ in range(200)]
    turned = np.linalg.qr(rng.standard_normal((4, 4)))[0].astype(np.float32)
    assert cka(x, [3 * vector @ turned for vector in x]) == pytest.approx(1, abs=1e-5)
    other = cka(x, [rng.standard_normal(4).astype(np.float32) for _ in x])
    assert other is not None
    assert other < 0.1
    assert cka(x[:2], x[:2]) is None
