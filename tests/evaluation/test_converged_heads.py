"""Heads of whole evaluations: scikit-learn's on the same clips, unmoved by offsets and scales, with notes on what is odd."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundfile
from corpus import CLASSES, DIM, Clips, tones, write_encoder, write_task
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from shard_makers import RATE, write_shard
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from xares_onnx.encoder.encoder import load_encoder
from xares_onnx.evaluation.evaluation import Evaluation, evaluate
from xares_onnx.evaluation.record import TaskResult
from xares_onnx.probes import convex
from xares_onnx.probes.tuning import Convergence, Trial, Tuning, remarks
from xares_onnx.scoring.folds import hold_out

pytestmark = pytest.mark.usefixtures("shared_process")

SIZES = {
    "official": {"train": 96, "valid": 60, "test": 200},
    "held_out": {"train": 120, "test": 200},
    "folds": {"fold0": 70, "fold1": 60, "fold2": 70},
}
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def shards_of(name: str) -> dict[str, Clips]:
    return {part: tones(n, 7 * i + len(name), noise=4, prefix=part) for i, (part, n) in enumerate(SIZES[name].items())}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    write_encoder(folder / "bank.onnx")
    for name, sizes in SIZES.items():
        for part, clips in shards_of(name).items():
            write_shard(folder / "data" / name / f"{part}-0.tar", clips)
        write_task(folder, name, **({"folds": 3} if "fold0" in sizes else {"splits": sizes}))
    return folder


def run(world: Path, *names: str, model: Path | None = None, **options: Any) -> Evaluation:
    tasks = [str(world / f"{name}.toml") for name in names]
    arguments: dict[str, Any] = {"data": world / "data", "cache": world / "cache", **options}
    return evaluate(model or world / "bank.onnx", tasks, **arguments)


def heads(done: Evaluation) -> list[TaskResult]:
    return [record for record in done.result.tasks if record.method == "linear"]


# ---------------------------------------------------------------- scikit-learn


def embedded(world: Path, name: str) -> tuple[Floats, Indices, list[str], dict[str, Indices]]:
    """Means over frames, classes, keys, and the clips of each part."""
    waveforms, labels, keys, parts = [], [], [], {}
    for part, clips in shards_of(name).items():
        parts[part] = np.arange(len(keys), len(keys) + len(clips))
        for key, (audio, label) in clips.items():
            waveforms.append(soundfile.read(io.BytesIO(audio), dtype="float32")[0])
            labels.append(CLASSES.index(label["label"]))
            keys.append(f"{part}-0.tar/{key}")
    with load_encoder(world / "bank.onnx") as encoder:
        frames = [embedding.frames for embedding in encoder.embed(waveforms, RATE)]
    return np.stack([clip.mean(axis=0, dtype=np.float64) for clip in frames]), np.array(labels), keys, parts


def fit(x: Floats, labels: Indices, clips: Indices, strength: float) -> Callable[[Indices], Floats]:
    """Probabilities by scikit-learn's head."""
    scaler = StandardScaler().fit(x[clips])
    model = LogisticRegression(C=1 / (strength * len(clips)), tol=1e-8, max_iter=1000, solver="newton-cholesky")
    model.fit(scaler.transform(x[clips]), labels[clips])
    return lambda chosen: np.asarray(model.predict_proba(scaler.transform(x[chosen])))


def reference(x: Floats, labels: Indices, train: Indices, valid: Indices, held: Indices, test: Indices) -> float:
    """Accuracy; the strength has the best accuracy on the selection clips, of equal ones the lower log loss."""

    def merit(strength: float) -> tuple[float, float]:
        found = fit(x, labels, train, strength)(valid)
        return float(np.mean(found.argmax(axis=1) == labels[valid])), -log_loss(labels[valid], found)

    best = max(convex.LOGISTIC_STRENGTHS, key=merit)
    return float(np.mean(fit(x, labels, np.concatenate([train, held]), best)(test).argmax(axis=1) == labels[test]))


@pytest.mark.parametrize("name", SIZES)
def test_every_class_task_scores_as_with_scikit_learn(world: Path, name: str) -> None:
    (record,) = heads(run(world, name))
    x, labels, keys, parts = embedded(world, name)
    expected = []
    for test in ("fold0", "fold1", "fold2") if name == "folds" else ("test",):
        others = np.concatenate([clips for part, clips in parts.items() if part not in (test, "valid")])
        train, valid = (others, parts["valid"]) if name == "official" else hold_out(others, keys, labels)
        held = valid[:0] if name == "official" else valid
        expected.append(reference(x, labels, train, valid, held, parts[test]))
    assert record.score == pytest.approx(np.mean(expected), abs=0.02)
    assert 0.4 < np.mean(expected) < 0.95
    assert record.per_seed == [record.score]


# ---------------------------------------------------------------- offsets and scales


def moved(model: Path, path: Path, scale: Floats, offset: Floats) -> Path:
    """The same encoder whose dimensions are multiplied and moved."""
    proto = onnx.load(model)
    for node in proto.graph.node:
        if node.output[0] == "embeddings":
            node.output[0] = "unmoved"
    values = {"scale": scale.astype(np.float32), "offset": offset.astype(np.float32)}
    proto.graph.initializer.extend([numpy_helper.from_array(value, name) for name, value in values.items()])
    proto.graph.node.append(helper.make_node("Mul", ["unmoved", "scale"], ["scaled"]))
    proto.graph.node.append(helper.make_node("Add", ["scaled", "offset"], ["embeddings"]))
    onnx.save(proto, path)
    return path


def test_offsets_and_scales_of_dimensions_move_no_score(world: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scale = 10 ** rng.uniform(-2, 2, DIM)
    plain = heads(run(world, *SIZES))
    size = np.abs(embedded(world, "official")[0]).mean()
    for name, (factor, offset) in {
        "scaled": (scale, np.zeros(DIM)),
        "both": (scale, scale * 30 * size * rng.standard_normal(DIM)),
    }.items():
        model = moved(world / "bank.onnx", tmp_path / f"{name}.onnx", factor, offset)
        other = heads(run(world, *SIZES, model=model, methods=["head"]))
        assert [record.score for record in other] == pytest.approx([record.score for record in plain], abs=0.01)


# ---------------------------------------------------------------- record and notes


def test_the_record_says_how_the_strength_was_chosen(world: Path) -> None:
    done = run(world, "folds", seeds=5)
    (record,) = heads(done)
    tuning = record.tuning
    assert tuning is not None
    assert [trial.setting for trial in tuning.tried] == list(convex.LOGISTIC_STRENGTHS)
    assert all(trial.selection is not None and trial.test is not None for trial in tuning.tried)
    assert len(tuning.chosen) == 3
    assert (tuning.setting, tuning.thresholds) == ("L2 strength", None)
    assert tuning.convergence.relative_gradient_norm is not None
    assert tuning.convergence.relative_gradient_norm <= convex.TOLERANCE
    assert not tuning.convergence.limit_reached
    assert tuning.train is not None
    assert record.score is not None
    assert tuning.train > record.score
    assert [r.tuning for r in done.result.tasks if r.method == "knn"] == [None]
    assert [r.tuning for r in run(world, "folds", protocol="xares").result.tasks] == [None, None]


def tuning_of(chosen: list[float], *, inner: float = 0.5, limit_reached: bool = False, norm: float | None = 1e-5) -> Tuning:
    return Tuning(
        setting="L2 strength",
        tried=[Trial(setting=s, selection=score, test=0.5) for s, score in ((10.0, 0.6), (1.0, inner), (0.1, 0.7))],
        chosen=chosen,
        convergence=Convergence(iterations=5, limit_reached=limit_reached, relative_gradient_norm=norm),
        train=None,
    )


def test_what_is_remarked_of_a_choice() -> None:
    assert remarks(tuning_of([1.0, 1.0])) == []
    assert remarks(tuning_of([1.0, 0.1, 10.0])) == [
        "0.1 and 10, at the end of the grid, is the L2 strength that 2 of 3 heads chose, so a better one may lie beyond it"
    ]
    assert remarks(tuning_of([0.1], inner=0.7)) == []  # no better than one within
    (limit,) = remarks(tuning_of([1.0], limit_reached=True, norm=0.02))
    assert limit.startswith("a fit stopped before it had converged (relative gradient norm 0.02 at the end)")
    (epochs,) = remarks(tuning_of([1.0], limit_reached=True, norm=None))
    assert epochs.startswith("a head had no epochs left")


@pytest.mark.usefixtures("heads_in_this_process")
def test_an_iteration_limit_is_a_note(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convex, "MAX_ITERATIONS", 1)
    done = run(world, "official")
    (record,) = heads(done)
    assert any(note.startswith("a fit stopped before it had converged") for note in record.notes)
    assert any(note.startswith("official: a fit stopped before it had converged") for note in done.result.notes)


@pytest.mark.usefixtures("heads_in_this_process")
def test_a_head_below_its_own_neighbours_is_a_note(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that always says the same is; one that is as good is not."""
    assert not [note for record in heads(run(world, "official")) for note in record.notes if "below the kNN" in note]
    monkeypatch.setattr(convex.Classes, "decide", lambda self, means: np.zeros(len(means), np.int64))
    done = run(world, "official")
    (record,) = heads(done)
    knn = next(r for r in done.result.tasks if r.method == "knn")
    assert any("below the kNN on the same clips" in note for note in record.notes)
    assert not any("below the kNN" in note for note in knn.notes)
    assert any(note.startswith("official: the head scores") for note in done.result.notes)
