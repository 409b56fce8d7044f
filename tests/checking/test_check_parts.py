"""What a check is made of: differences, ranks, signals, where nodes run; and properties that need another device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_models as models
import pytest
from check_models import declared, sound, unlike
from onnx_models import save
from scipy import stats

from xares_onnx.checking import providers
from xares_onnx.checking.facts import read_facts
from xares_onnx.checking.model_under_test import Bench, Subject, cosines, difference
from xares_onnx.checking.registry import PROPERTIES
from xares_onnx.checking.signals import make_signals
from xares_onnx.checking.values import effective_rank
from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.encoder.session import CPU, Session

DOCS = Path(__file__).parents[2] / "docs/check.md"


def bench_for(path: Path, provider: str = CPU) -> Bench:
    with load_encoder(path, device="cpu", threads=1) as encoder:
        spec = encoder.spec
    facts = read_facts(str(path), spec.info.scan, tell=lambda event: None)
    spec = msgspec.structs.replace(spec, info=msgspec.structs.replace(spec.info, provider=provider))
    return Bench(Subject(spec, facts, str(path.parent)), Session(path, "cpu"))


# ---------------------------------------------------------------- arithmetic


def test_a_difference_is_a_share_of_the_largest_value() -> None:
    expected = np.array([[1.0, -4.0], [2.0, 0.5]])
    assert difference(expected, expected) == 0
    assert difference(expected + np.array([[0, 0.4], [0, 0]]), expected) == pytest.approx(0.1)
    assert difference(np.array([[np.nan]]), np.array([[1.0]])) == np.inf
    assert difference(np.array([[1.0]]), np.array([[np.nan]])) == np.inf
    assert difference(np.ones((2, 1)), np.ones((3, 1))) == np.inf
    assert difference(np.ones((1, 1)), np.zeros((1, 1))) == 1


def test_cosines_of_rows() -> None:
    found = cosines(
        np.array([[1.0, 0], [1, 1], [0, 0], [0, 0], [-3, 0], [np.inf, 1]]),
        np.array([[2.0, 0], [1, 0], [0, 0], [1, 0], [1, 0], [1, 0]]),
    )
    assert found == pytest.approx([1, 2**-0.5, 1, 0, -1, 0])


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((200, 6)) * [5, 4, 3, 2, 1, 0.5] + 7
    values = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)
    assert effective_rank(rows) == pytest.approx(np.exp(stats.entropy(values)))
    assert effective_rank(rows.T[:4]) == pytest.approx(effective_rank(np.pad(rows.T[:4], ((0, 0), (0, 9)))))
    line = np.outer(random.standard_normal(50), np.arange(1, 9)) + 3
    assert effective_rank(line) == pytest.approx(1, abs=1e-3)
    assert effective_rank(np.ones((9, 3))) == 0
    assert effective_rank(np.full((9, 3), 3e38, np.float32) * np.array([[1], [-1], [1]] * 3, np.float32)) >= 1


@pytest.mark.parametrize(("samples", "rate"), [(32_000, 16_000), (1, 16_000), (2, 8_000), (44_100, 44_100)])
def test_signals_are_seeded_finite_and_within_full_scale(samples: int, rate: int) -> None:
    made, again = make_signals(samples, rate), make_signals(samples, rate)
    for name, signal in made.items():
        assert (signal.shape, signal.dtype) == ((samples,), np.float32)
        assert np.isfinite(signal).all()
        assert np.abs(signal).max() <= 1
        assert np.array_equal(signal, again[name])
    assert not made["silence"].any()
    if samples > 1000:
        assert np.abs(made["full-scale square wave"]).min() == 1
        assert np.count_nonzero(made["impulse"]) == 1
        assert np.abs(made["full-scale noise"]).max() > 0.99


# ---------------------------------------------------------------- facts


def test_facts_count_the_nodes_of_inner_graphs(tmp_path: Path) -> None:
    path = save(declared(models.endless_loop()), tmp_path / "model.onnx")
    with load_encoder(save(sound(), tmp_path / "sound.onnx"), device="cpu") as encoder:
        scan = encoder.info.scan
    facts = read_facts(str(path), scan, tell=lambda event: None)
    assert facts.operators["Loop"] == 1
    assert facts.operators["Identity"] >= 2  # of its body
    assert (facts.ir_version, facts.opsets["ai.onnx"], facts.precision) == (8, 17, "fp32")


# ---------------------------------------------------------------- other providers


def test_placement_is_told_by_onnx_runtime(tmp_path: Path) -> None:
    path = save(sound(), tmp_path / "model.onnx")
    placed = Session(path, "cpu", record_placement=True).placement
    assert placed is None or {provider for provider, _ in placed} == {CPU}
    assert Session(path, "cpu").placement is None


@pytest.mark.parametrize(
    ("placed", "status", "says"),
    [
        ([("X", "Conv"), ("X", "Abs")], "pass", "all 2 nodes run on X"),
        (
            [("X", "Conv"), (CPU, "Shape"), (CPU, "Shape"), (CPU, "If")],
            "warn",
            "1 of 4 nodes fell to the CPU: 1 If",
        ),
        ([("X", "Conv"), (CPU, "Shape"), (CPU, "Gather")], "pass", "1 of 3 nodes run on X, and the rest compute shapes"),
        (None, "skip", "does not report where nodes are placed"),
    ],
)
def test_nodes_that_fell_to_the_cpu_are_named(
    placed: Any, status: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_for(save(sound(), tmp_path / "model.onnx"), provider="X")

    class Placed:
        placement = placed

        def __init__(self, path: Path, device: str, *, record_placement: bool) -> None:
            assert record_placement

    monkeypatch.setattr(providers, "Session", Placed)
    outcome = providers.check_placement(bench, None)
    assert outcome.status == status
    assert says in outcome.says
    if status == "warn":
        assert providers.check_placement(bench, 3).status == "pass"


def test_two_devices_are_compared(tmp_path: Path) -> None:
    """A session of another model stands for another device."""
    bench = bench_for(save(sound(), tmp_path / "model.onnx"))
    other = Session(save(unlike(), tmp_path / "other.onnx"), "cpu")
    assert providers.check_devices(bench, None, bench.session).status == "pass"
    outcome = providers.check_devices(bench, None, other)
    assert outcome.status == "fail"
    assert "differ by" in outcome.says
    assert providers.check_devices(bench, 10, other).status == "pass"
    assert providers.check_devices(bench, None).status == "skip"


# ---------------------------------------------------------------- the page


def test_the_page_lists_every_property_in_order() -> None:
    rows = [line.split("|")[1].strip(" `") for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    assert rows == list(PROPERTIES)
    assert f"{len(PROPERTIES)} properties in all" in (DOCS.parents[1] / "README.md").read_text()
