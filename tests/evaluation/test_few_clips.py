"""`--shots`: in the record, from the store alone, refused where it means nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from corpus import tones, write_encoder, write_task
from shard_makers import write_shard

from xares_onnx.encoder.encoder import Encoder
from xares_onnx.errors import UsageError
from xares_onnx.evaluation.evaluation import Evaluation, evaluate
from xares_onnx.progress import Event, Note, Progress, ignore

pytestmark = pytest.mark.usefixtures("shared_process")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    write_encoder(folder / "bank.onnx")
    for number, (part, count) in enumerate({"train": 40, "valid": 12, "test": 40}.items()):
        write_shard(folder / "data" / "tones" / f"{part}-0.tar", tones(count, number, noise=2, prefix=part))
    write_task(folder, "tones")
    return folder


def run(folder: Path, **options: Any) -> Evaluation:
    arguments: dict[str, Any] = {"data": folder / "data", "cache": folder / "cache", "seeds": 1, **options}
    return evaluate(folder / "bank.onnx", [str(folder / "tones.toml")], **arguments)


def test_the_head_has_scores_of_few_clips_from_the_store_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(folder)
    assert [record.shots for record in before.result.tasks] == [[], []]

    def fails(*arguments: Any) -> None:
        raise AssertionError("the model is called again")

    monkeypatch.setattr(Encoder, "call", fails)
    told: list[Event] = []
    done = run(folder, shots=(4, 1, 10, 900), observer=told.append)
    head, knn = done.result.tasks
    assert [row.clips_per_class for row in head.shots] == [1, 4, 10, 900]
    assert knn.shots == []
    assert [len(row.draws) for row in head.shots] == [10, 10, 10, 0]
    scores = [row.score or 0.0 for row in head.shots[:3]]
    assert scores == sorted(scores)
    assert scores[2] > scores[0] + 0.1
    assert head.score == before.result.tasks[0].score  # and nothing else changes
    assert head.rtf is None
    assert done.result.settings["shots"] == [1, 4, 10, 900]
    note = "tones, 900 clips per class: no class has 900 training clips; the largest has 10"
    assert note in done.result.notes
    assert Note(note) in told
    assert [event.done for event in told if isinstance(event, Progress) and event.stage == "shots"] == list(range(1, 31))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": (0,)}, "--shots 0 must lie between 1 and 1000 clips per class"),
        ({"shots": (1,), "protocol": "xares"}, "--shots is not part of protocol xares"),
        ({"shots": (1,), "methods": ["knn"]}, "--shots trains heads"),
    ],
)
def test_what_means_nothing_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(folder, observer=ignore, **options)
