"""Results side by side: who is best, what is within noise, averages over common tasks, what cannot be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from report_results import predictions, record, result, right, save

from xares_onnx.data.catalog import shipped_tasks
from xares_onnx.errors import DataError, UsageError
from xares_onnx.evaluation.differences import Side
from xares_onnx.report.board import Board, Verdict, make_board

ESC, VOX, SPEECH = "esc50", "voxlingua33", "speechocean762"


def board(*paths: Path) -> Board:
    return make_board([Side.read(path) for path in paths])


def verdicts(compared: Board, row: int = 0) -> dict[str, Verdict | None]:
    cells = compared.rows[row].cells
    return {m.label: c.verdict if c else None for m, c in zip(compared.models, cells, strict=True)}


def standings(compared: Board, row: int = 0) -> dict[str, str | None]:
    return {label: verdict.standing if verdict else None for label, verdict in verdicts(compared, row).items()}


def test_a_single_result_has_no_verdicts(tmp_path: Path) -> None:
    compared = board(save(tmp_path, "one", {ESC: right(range(60))}))
    assert standings(compared) == {"one": None}
    assert compared.averages[0].cells[0].verdict is None


def test_clips_that_are_hard_for_both_do_not_widen_a_difference(tmp_path: Path) -> None:
    """66 and 60 of 100 right: their intervals overlap, but B is right wherever A is, and on six more."""
    a, b = (save(tmp_path, name, {ESC: right(range(n))}) for name, n in (("a", 60), ("b", 66)))
    verdict = verdicts(board(a, b))["a"]
    assert verdict is not None
    assert (verdict.standing, verdict.basis) == ("behind", "paired")
    assert verdict.behind is not None
    assert 0 < verdict.behind[0] < 0.06 < verdict.behind[1] < 0.12
    assert standings(board(a, b))["b"] == "best"


def test_the_same_distance_on_other_clips_is_within_noise(tmp_path: Path) -> None:
    a, b = save(tmp_path, "a", {ESC: right(range(60))}), save(tmp_path, "b", {ESC: right(range(34, 100))})
    assert standings(board(a, b)) == {"b": "best", "a": "within_noise"}


def test_without_predictions_intervals_are_compared_with_a_note(tmp_path: Path) -> None:
    paths = [save(tmp_path, name, {ESC: right(range(n))}) for name, n in (("a", 60), ("b", 66), ("c", 20))]
    shutil.rmtree(tmp_path / "a.predictions")
    shutil.rmtree(tmp_path / "c.predictions")
    compared = board(*paths)
    assert standings(compared) == {"b": "best", "a": "within_noise", "c": "behind"}
    assert all(v is not None and v.basis == "intervals" for label, v in verdicts(compared).items() if label != "b")
    assert [note.split(":")[0] for note in compared.notes] == ["a", "c"]
    assert "a.predictions" in compared.notes[0]


def test_without_intervals_the_verdict_is_unclear(tmp_path: Path) -> None:
    results = [result([record(ESC, right(range(n)), ci95=None)], name) for name, n in (("a", 60), ("b", 90))]
    compared = make_board([Side.of_result(r.encoder.file, r) for r in results])
    assert standings(compared) == {"b": "best", "a": "unclear"}


def test_the_lowest_error_is_best(tmp_path: Path) -> None:
    truth = np.linspace(0, 10, 50)
    near, far = (
        save(tmp_path, name, {SPEECH: predictions(truth, [truth + by])}) for name, by in (("near", 0.5), ("far", 2.0))
    )
    compared = board(far, near)
    assert standings(compared) == {"near": "best", "far": "behind"}
    behind = verdicts(compared)["far"]
    assert behind is not None
    assert behind.behind == pytest.approx((3.75, 3.75))
    assert compared.averages == ()  # an error is never averaged


def test_equal_scores_are_both_best(tmp_path: Path) -> None:
    a, b = save(tmp_path, "a", {ESC: right(range(60))}), save(tmp_path, "b", {ESC: right(range(40, 100))})
    assert standings(board(a, b)) == {"a": "best", "b": "best"}


def test_a_difference_leaves_out_clips_that_one_model_dropped(tmp_path: Path) -> None:
    a = save(tmp_path, "a", {ESC: right(range(60))})
    fewer = right(range(66))
    kept = np.arange(100) != 99
    b = save(tmp_path, "b", {ESC: {name: array[kept] for name, array in fewer.items()}})
    verdict = verdicts(board(a, b))["a"]
    assert verdict is not None
    assert (verdict.standing, verdict.basis) == ("behind", "paired")


def test_the_first_tap_represents_a_model(tmp_path: Path) -> None:
    """A layer is better than the output: the curve shows it, and the model is still what it gives out."""
    deep = save(
        tmp_path,
        "deep",
        {ESC: right(range(50))},
        taps={"layer.0": {ESC: right(range(90))}, "layer.1": {ESC: right(range(70))}},
    )
    plain = save(tmp_path, "plain", {ESC: right(range(60))})
    compared = board(deep, plain)
    assert [cell.score for cell in compared.rows[0].cells if cell] == [0.6, 0.5]
    assert [model.label for model in compared.models] == ["plain", "deep"]
    verdict = verdicts(compared)["deep"]
    assert verdict is not None
    assert (verdict.standing, verdict.basis) == ("behind", "paired")
    (curve,) = compared.curves
    assert (curve.model, curve.steps, curve.scores) == (1, ("layer.0", "layer.1", "embeddings"), (0.9, 0.7, 0.5))


def test_averages_are_over_the_tasks_that_every_model_has(tmp_path: Path) -> None:
    wide = save(tmp_path, "wide", {ESC: right(range(40)), VOX: right(range(80)), "fsd50k": tags()})
    narrow = save(tmp_path, "narrow", {ESC: right(range(60)), VOX: right(range(90))})
    compared = board(wide, narrow)
    public = compared.averages[0]
    esc, vox = (shipped_tasks()[name].weight or 0 for name in (ESC, VOX))
    assert (public.group, public.method, public.tasks, public.group_size) == ("public", "head", (ESC, VOX), 22)
    by_label = {m.label: c for m, c in zip(compared.models, public.cells, strict=True)}
    assert by_label["narrow"].weighted == pytest.approx((0.6 * esc + 0.9 * vox) / (esc + vox))
    assert by_label["wide"].weighted == pytest.approx((0.4 * esc + 0.8 * vox) / (esc + vox))
    assert by_label["narrow"].mean == pytest.approx(0.75)
    assert compared.models[0].label == "narrow"
    assert any("narrow has no head score for fsd50k" in note for note in compared.notes)
    shipped = shipped_tasks()
    for encoder in ("dasheng", "wav2vec2", "whisper", "data2vec"):
        a, b = (shipped[name].published.linear[encoder] for name in (ESC, VOX))  # type: ignore[union-attr]
        assert public.published[encoder] == pytest.approx((a * esc + b * vox) / (esc + vox))


def tags() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    present = rng.random((20, 200)) < 0.1
    arrays = predictions(present, [(present + rng.normal(0, 0.5, present.shape)).astype(np.float32)])
    return dict(arrays)


def test_an_average_has_the_interval_of_its_replicates(tmp_path: Path) -> None:
    """Of one task it is the task's own, whoever draws it; and a model alone has the one of its result."""
    paths = [save(tmp_path, name, {ESC: right(range(n))}) for name, n in (("a", 60), ("b", 66))]
    compared = board(*paths)
    for model, cell, own in zip(compared.models, compared.averages[0].cells, compared.rows[0].cells, strict=True):
        assert own is not None
        assert cell.ci95 == pytest.approx(own.record.ci95), model.label
    assert compared.averages[0].cells[1].verdict == verdicts(compared)["a"]


def test_averages_leave_out_scores_that_are_not_comparable(tmp_path: Path) -> None:
    a = save(tmp_path, "a", {ESC: right(range(60)), VOX: right(range(60))}, records={VOX: {"comparable": False}})
    (public,) = (row for row in board(a).averages if row.group == "public")
    assert public.tasks == (ESC,)


def test_a_score_that_is_not_comparable_is_never_best(tmp_path: Path) -> None:
    lossy = save(tmp_path, "lossy", {ESC: right(range(90))}, records={ESC: {"comparable": False}})
    others = [save(tmp_path, name, {ESC: right(range(n))}) for name, n in (("a", 60), ("b", 66))]
    assert standings(board(lossy, *others)) == {"lossy": None, "b": "best", "a": "behind"}
    also = save(tmp_path, "also", {ESC: right(range(60))}, records={ESC: {"comparable": False}})
    assert standings(board(lossy, also)) == {"lossy": "best", "also": "behind"}  # as after --limit


@pytest.mark.parametrize(
    "records",
    [{"weight": -1.0}, {"weight": 1e300}, {"ci95": (0.0, 1e300)}, {"published": {"x": 1e300}}, {"per_seed": [1e300]}],
)
def test_impossible_numbers_are_refused(tmp_path: Path, records: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"a\.json .*holds an impossible number for esc50"):
        board(save(tmp_path, "a", {ESC: right(range(60))}, records={ESC: records}))


def test_an_impossible_encoder_size_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "a", {ESC: right(range(60))})
    content = json.loads(path.read_text())
    content["encoder"]["bytes"] = 1 << 62
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="holds an impossible encoder size"):
        board(path)


def test_predictions_of_another_run_are_an_error(tmp_path: Path) -> None:
    a, b = (save(tmp_path, name, {ESC: right(range(n))}) for name, n in (("a", 60), ("b", 66)))
    other = save(tmp_path / "other", "a", {ESC: right(range(50))})
    shutil.copy(other.parent / "a.predictions/esc50.linear.npz", tmp_path / "a.predictions/esc50.linear.npz")
    with pytest.raises(DataError, match=r"a\.json records 0\.6 for esc50, but its predictions give 0\.5"):
        board(a, b)


@pytest.mark.parametrize(
    ("changes", "records", "error", "sentence"),
    [
        (
            {"settings": {"protocol": "xares", "seeds": 1, "limit": None}},
            {},
            UsageError,
            "--protocol corrected and b.json with xares",
        ),
        ({"settings": {"protocol": "corrected", "seeds": 1, "limit": 50}}, {}, UsageError, "--limit None"),
        ({}, {ESC: {"data_digest": "e" * 64}}, DataError, "other data of esc50"),
        ({}, {ESC: {"definition_digest": "e" * 64}}, UsageError, "esc50 is defined differently"),
        ({}, {ESC: {"score": 1e300}}, UsageError, "an impossible number for esc50"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(
    tmp_path: Path, changes: dict[str, Any], records: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    """Also where the two are not the first ones named."""
    paths = [save(tmp_path, "a", {VOX: right(range(50))}), save(tmp_path, "c", {ESC: right(range(60))})]
    odd = save(tmp_path, "b", {ESC: right(range(60))}, records=records, **changes)
    with pytest.raises(error, match=sentence):
        board(*paths, odd)


def test_labels_are_unique(tmp_path: Path) -> None:
    same = [record(ESC, right(range(60)))]
    first, second = result(same, "model"), result(same, "model")
    other = msgspec.structs.replace(second, encoder=msgspec.structs.replace(second.encoder, sha256="f" * 64))
    sides = [Side.of_result(name, r) for name, r in (("x.json", first), ("y.json", second), ("z.json", other))]
    labels = [model.label for model in make_board(sides).models]
    digest = first.encoder.sha256[:8]
    assert sorted(labels) == sorted([f"model {digest} (x.json)", f"model {digest} (y.json)", "model ffffffff"])
    assert [model.label for model in make_board([sides[0]]).models] == ["model"]
