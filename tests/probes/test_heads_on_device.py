"""Heads and kNN on a torch device, which is the CPU here: the same code as on a GPU, against numpy's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import write_encoder, write_task, write_tones
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from xares_onnx.errors import MachineError, UsageError
from xares_onnx.evaluation import evaluation
from xares_onnx.evaluation.evaluation import _heads_device, evaluate
from xares_onnx.models import device, standardised
from xares_onnx.models.device import torch_device
from xares_onnx.models.logistic import Loss, Multinomial, OneVersusRest
from xares_onnx.probes import convex, convex_frames, knn
from xares_onnx.probes.convex import Classes, ConvexResult, FoldRows, Objective, Tags, fit_fold
from xares_onnx.probes.knn import knn_cosine
from xares_onnx.probes.training import one_thread


@pytest.fixture(autouse=True)
def _every_pass_pays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(device, "_WORTH", 0)
    monkeypatch.setattr(knn, "_WORTH_A_DEVICE", 0)
    monkeypatch.setattr(standardised, "ROWS_AT_ONCE", 50)
    with threadpool_limits(1), one_thread():
        yield


def problem(train: int = 120, dim: int = 24) -> tuple[NDArray[np.float32], dict[str, Objective], FoldRows]:
    rng = np.random.default_rng(0)
    count = train + 210
    classes, tags = rng.integers(0, 4, count), rng.random((count, 3)) < [0.4, 0.2, 0.1]
    x = (
        rng.standard_normal((4, dim))[classes] * 0.6
        + tags @ rng.standard_normal((3, dim))
        + rng.standard_normal((count, dim))
    )
    fitting, selecting, testing = np.split(np.arange(count), [train, train + 60])
    return (
        x.astype(np.float32),
        {"classes": Classes(classes, 5), "tags": Tags(tags, 3.0)},
        FoldRows(fitting, selecting, testing, held_out=selecting),
    )


def fitted(name: str, where: str | None, train: int = 120, dim: int = 24) -> ConvexResult:
    x, objectives, rows = problem(train, dim)
    return fit_fold(x, objectives[name], np.arange(len(x)), rows, device=where)


@pytest.mark.parametrize("room", [1 << 30, 9000, 0])  # for every block, for some, for none
@pytest.mark.parametrize(("train", "dim"), [(120, 24), (30, 80)])
@pytest.mark.parametrize("name", ["classes", "tags"])
def test_a_device_finds_the_head_that_numpy_finds(
    monkeypatch: pytest.MonkeyPatch, name: str, train: int, dim: int, room: int
) -> None:
    monkeypatch.setattr(device, "_ON_THE_CPU", room)
    passes: list[int] = []
    moments = device.DeviceRows.moments

    def counted(rows: device.DeviceRows, *given: Any) -> Any:
        passes.append(1)
        return moments(rows, *given)

    monkeypatch.setattr(device.DeviceRows, "moments", counted)
    found, expected = fitted(name, "cpu", train, dim), fitted(name, None, train, dim)
    assert passes
    assert found.chosen == expected.chosen
    assert found.convergence.converged
    if name == "classes":
        assert (found.predictions == expected.predictions).mean() > 0.99
    else:
        np.testing.assert_allclose(found.predictions, expected.predictions, atol=6e-3)


def test_a_device_gives_the_same_bytes_twice() -> None:
    one, two = (fitted("classes", "cpu") for _ in range(2))
    assert one.predictions.tobytes() == two.predictions.tobytes()
    assert one.tuning == two.tuning


@pytest.mark.parametrize("spread", [0.1, 3.0, 100.0])  # of the logits: unsure, sure, and beyond what float32 tells from 1
@pytest.mark.parametrize("name", ["multinomial", "against the rest"])
def test_a_step_is_that_of_numpy(name: str, spread: float) -> None:
    rng = np.random.default_rng(1)
    logits = (spread * rng.standard_normal((70, 4))).astype(np.float32)
    columns = np.arange(4) if name == "multinomial" else np.array([0, 2])
    targets: NDArray[Any] = rng.choice([0, 1, 3, 4], 70)
    loss: Loss = Multinomial(np.bincount(targets, minlength=6))
    if name != "multinomial":
        targets = rng.random((70, 4)) < 0.3
        loss = OneVersusRest(targets.sum(axis=0), 70, 3.0)
    values, sums = loss.step(logits[:, columns].copy(), targets, columns)
    on_device = loss.step_on_device(
        torch.from_numpy(logits[:, columns].copy()), torch.from_numpy(loss.outputs_of(targets)), torch.from_numpy(columns)
    )
    np.testing.assert_allclose(on_device[0].numpy(), values, rtol=2e-5, atol=1e-30)
    np.testing.assert_allclose(on_device[1].numpy(), sums, rtol=2e-5, atol=1e-5)  # numpy's curvature cancels in float32


def test_small_fits_and_searches_stay_off_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_WORTH", 1 << 28)
    monkeypatch.setattr(knn, "_WORTH_A_DEVICE", 1 << 32)
    assert fitted("classes", "no such device").predictions.tobytes() == fitted("classes", None).predictions.tobytes()
    x, _, rows = problem()
    labels = np.arange(len(x)) % 3
    knn_cosine(x[rows.train], labels[rows.train], x[rows.test], rows.test, "no such device")


@pytest.mark.parametrize("blocks", [(1024, 1 << 16), (7, 13), (64, 4)])
@pytest.mark.parametrize("train", [120, 6])
def test_a_device_finds_the_neighbours_that_scikit_learn_finds(
    monkeypatch: pytest.MonkeyPatch, train: int, blocks: tuple[int, int]
) -> None:
    monkeypatch.setattr(knn, "_QUERIES", blocks[0])
    monkeypatch.setattr(knn, "_SEARCHED", blocks[1])
    x, _, _ = problem()
    labels, examples = np.random.default_rng(2).integers(3, 9, train), np.arange(train, len(x)) // 3
    found, expected = (knn_cosine(x[:train], labels, x[train:], examples, where) for where in ("cpu", None))
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UsageError, match="'abacus' is not a device"):
        fitted("classes", "abacus")
    with pytest.raises(UsageError, match="do not run on 'mps'"):
        torch_device("mps")
    with pytest.raises(MachineError, match="cannot run on 'cuda:97'"):
        fitted("tags", "cuda:97")
    x, _, _ = problem()
    with pytest.raises(UsageError, match="'abacus' is not a device"):
        knn_cosine(x[:50], np.arange(50), x[50:], np.arange(len(x) - 50), "abacus")


def test_frames_are_fitted_on_a_device() -> None:
    from xares_onnx.data.sound_events import Events

    rng = np.random.default_rng(0)
    frames = [rng.standard_normal((20, 6)).astype(np.float16) for _ in range(30)]
    times, seconds = [np.arange(20) / 10 + 0.05] * 30, [2.0] * 30
    events = [Events(at := rng.uniform(0, 1.5, 2), at + 0.4, rng.integers(0, 2, 2)) for _ in range(30)]
    clips = convex_frames.Clips(frames, times, seconds, events, 2)
    rows = FoldRows(np.arange(20), np.arange(20, 25), np.arange(25, 30), held_out=np.arange(20, 25))
    one, two = (
        convex_frames.fit_frames(clips, rows, 2.0, segment_seconds=0.5, average="macro", device=where)
        for where in ("cpu", None)
    )
    for a, b in zip(one.tried, two.tried, strict=True):
        assert a.test == pytest.approx(b.test, abs=0.02)
    assert one.convergence.relative_gradient_norm <= convex.TOLERANCE


@pytest.mark.parametrize(
    ("device", "provider", "where"),
    [("cuda:0", "CPU", None), ("cuda:0", "CUDA", "cuda:0"), ("auto", "CUDA", "cuda"), ("auto", "CPU", None)],
)
def test_heads_run_where_the_encoder_does(device: str, provider: str, where: str | None) -> None:
    assert _heads_device(device, f"{provider}ExecutionProvider") == where


def test_heads_without_the_encoders_device_run_on_the_cpu_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads_in_this_process: None
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(evaluation, "_heads_device", lambda device, provider: "cuda:0")
    write_tones(tmp_path / "data", train=24, valid=12, test=12)
    done = evaluate(
        write_encoder(tmp_path / "m.onnx"),
        [str(write_task(tmp_path, "tones"))],
        data=tmp_path / "data",
        cache=tmp_path / "cache",
        device="cpu",
    )
    said = [note for note in done.result.notes if "heads and kNN run on the CPU, though the encoder runs on CUDA" in note]
    assert len(said) == 1
    assert "PyTorch sees no CUDA devices" in said[0]
    assert [record.status for record in done.result.tasks] == ["ok", "ok"]
