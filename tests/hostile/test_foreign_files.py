"""Pipes, devices and texts without a bound, where a small file is read: each costs one sentence, little time and memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import onnx_models as models
import pytest
from bounds import Outcome, bounded, refused
from corpus import write_encoder, write_task, write_tones

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks, and needs pipes")

MANY_PARTS = "it has a dotted key of more than 16 parts"
TOO_LONG = "it has a key or a number of more than 200 characters"
WHISPER = {"feature_extractor_type": "WhisperFeatureExtractor"}


def scored(model: Path) -> Outcome:
    """What `evaluate` says of a model that cannot be used: it is refused before any data are looked for."""
    arguments = ("evaluate", model, "--tasks", "synthetic_vowel", "--cache", model.parent / "cache", "--quiet")
    return bounded(*arguments, seconds=20, memory=1 << 29)


def dotted(parts: int) -> str:
    return ".".join(["a"] * parts)


# ---------------------------------------------------------------- beside a model


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (f"{dotted(1_500)} = 1", 3, MANY_PARTS),
        (f"{dotted(16_000)} = 1", 3, MANY_PARTS),
        (f"{dotted(500_000)} = 1", 3, "it is larger than 64 kB"),
        (f"[{dotted(30_000)}]", 3, MANY_PARTS),
        (f'x = {{ a = """q"""", {dotted(16_000)} = 1 }}', 3, MANY_PARTS),  # behind a text that ends in four quotes
        ("[" + "k" * 60_000 + "]", 3, TOO_LONG),
        (f'"{"k" * 60_000}" = 1', 2, "there is no contract key 'kkkk"),
        (f'input = "{"k" * 60_000}"', 3, "input has 60000 characters; the most is 1000"),
        (f'output_layout = "{"BT" * 20_000}"', 3, "output_layout has 40000 characters; the most is 1000"),
        (f"sample_rate = {'9' * 5_000}", 3, TOO_LONG),
        ("x = " + "[" * 20_000, 3, "it is nested deeper than 32"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else None,
)
def test_a_sidecar(text: str, code: int, says: str, tmp_path: Path) -> None:
    models.save(models.encoder(), tmp_path / "model.onnx")
    (tmp_path / "model.toml").write_text(text)
    refused(scored(tmp_path / "model.onnx"), code, says)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {**WHISPER, "chunk_length": "x", "sampling_rate": 3_000_000_000},
            "sample_rate=3000000000 must be from 1 to 2147483647",
        ),
        ({**WHISPER, "chunk_length": "x"}, "chunk_length='x' is no number"),
        ({**WHISPER, "chunk_length": 1e15}, "chunk_length=1000000000000000.0 is no number, or too large"),
        (
            {"feature_extractor_type": "ClapFeatureExtractor", "truncation": "rand_trunc", "max_length_s": "x"},
            "max_length_s='x' is no number",
        ),
    ],
)
def test_a_text_where_a_preprocessor_should_have_a_number(config: dict[str, object], says: str, tmp_path: Path) -> None:
    models.save(models.images(), tmp_path / "model.onnx")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    refused(scored(tmp_path / "model.onnx"), 3, says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"feature_extractor_type": "\\ud800"}', "is not valid json"),
        ('{"sampling_rate": ' + "9" * 5_000 + "}", TOO_LONG),
        ('{"a":' * 5_000, "it is nested deeper than 32"),
    ],
)
def test_a_preprocessor_that_is_no_json(text: str, says: str, tmp_path: Path) -> None:
    models.save(models.encoder(), tmp_path / "model.onnx")
    (tmp_path / "preprocessor_config.json").write_text(text)
    refused(scored(tmp_path / "model.onnx"), 3, says)


@pytest.mark.parametrize(
    ("text", "says"), [(f"a = {'9' * 5_000}", TOO_LONG), (f"{dotted(30_000)} = 1", MANY_PARTS), (None, "not a regular file")]
)
def test_settings(text: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.save(models.encoder(), tmp_path / "model.onnx")
    if text is None:  # what was a file when it was looked for
        os.mkfifo(tmp_path / "pyproject.toml")
        monkeypatch.setattr(Path, "is_file", lambda path: True)
    else:
        (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    refused(bounded("check", "model.onnx", seconds=20, memory=1 << 29), 2, says)


# ---------------------------------------------------------------- tasks and their data

TASK = """
name = "mine"
title = "Mine"
domain = "speech"
[data]
splits = {{ train = "{glob}", test = "test.tar" }}
[target]
kind = "class"
key = "label"
classes = ["a", "b"]
[score]
metric = "{metric}"
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{dotted(30_000)} = 1", MANY_PARTS),
        (f'"{"k" * 3_000_000}" = 1', "unknown key kkkk"),
        ("k" * 3_000_000 + " = 1", TOO_LONG),
        (TASK.format(glob="train.tar", metric="m" * 3_000_000), "score.metric is 'mmmm"),
        (TASK.format(glob="**/" * 20 + "[" * 20, metric="accuracy"), "must be a plain pattern inside the task's folder"),
        (TASK.format(glob="[" * 3_000_000, metric="accuracy"), "must be a plain pattern inside the task's folder"),
    ],
    ids=["dotted", "key", "bare key", "metric", "nested glob", "long glob"],
)
def test_a_task_file(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    refused(bounded("tasks", tmp_path / "mine.toml", seconds=20, memory=1 << 29), 2, says)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def giant_sizes(path: Path) -> None:
    path.write_text(f'{{"record": "14614287", "wanted": {{"a.tar": {"9" * 4_000}}}}}')


@pytest.mark.parametrize("make", [pipe, device, giant_sizes])
def test_a_manifest(make: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "esc50").mkdir()
    make(tmp_path / "esc50/.xares-onnx.json")
    outcome = bounded("tasks", "--data", tmp_path, seconds=20, memory=1 << 29)
    assert (outcome.code, outcome.err) == (0, "")
    assert "esc50" in outcome.out


@pytest.mark.parametrize("make", [pipe, device])
def test_a_manifest_beside_data_that_are_scored(make: Callable[[Path], None], tmp_path: Path) -> None:
    model, task = write_encoder(tmp_path / "bank.onnx"), write_task(tmp_path, "good")
    write_tones(tmp_path / "data", "good", train=8, valid=4, test=4)
    make(tmp_path / "data/good/.xares-onnx.json")
    arguments = ("evaluate", model, "--tasks", task, "--data", tmp_path / "data", "--cache", tmp_path / "cache")
    outcome = bounded(*arguments, "--plan", seconds=50)
    assert outcome.code == 0


# ---------------------------------------------------------------- files that the user names


@pytest.mark.parametrize("make", [pipe, device])
def test_a_table_of_labels(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "labels.csv")
    outcome = bounded("pack", tmp_path, tmp_path / "labels.csv", "--check", seconds=20, memory=1 << 29)
    refused(outcome, 4, "labels.csv cannot be read (it is not a regular file)")


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_table_of_any_kind_that_is_a_pipe(ending: str, tmp_path: Path) -> None:
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    pipe(tmp_path / f"labels{ending}")
    outcome = bounded("pack", tmp_path, tmp_path / f"labels{ending}", "--check", seconds=20)
    refused(outcome, 4, f"labels{ending} cannot be read (it is not a regular file)")


def test_a_vocabulary(tmp_path: Path) -> None:
    from xares_onnx.errors import UsageError
    from xares_onnx.probes.wordpiece import WordPiece

    pipe(tmp_path / "vocab.txt")
    with pytest.raises(UsageError, match=r"vocab\.txt cannot be read \(it is not a regular file\)"):
        WordPiece.from_file(tmp_path / "vocab.txt")


def test_a_reference(tmp_path: Path) -> None:
    models.save(models.encoder(), tmp_path / "model.onnx")
    pipe(tmp_path / "reference.npz")
    outcome = bounded("check", tmp_path / "model.onnx", "--reference", tmp_path / "reference.npz", seconds=40)
    refused(outcome, 2, "reference.npz cannot be read (it is not a regular file)")


@pytest.mark.parametrize("make", [pipe, device])
def test_a_result(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "result.json")
    outcome = bounded("report", tmp_path / "result.json", seconds=20, memory=1 << 29)
    refused(outcome, 2, "result.json cannot be read (it is not a regular file)")


# ---------------------------------------------------------------- texts in a model


def with_dimension(text: str, rank: int) -> models.ModelProto:
    model = models.encoder()
    dims = model.graph.input[0].type.tensor_type.shape.dim
    for _ in range(rank - len(dims)):
        dims.add(dim_value=1)
    dims[1].dim_param = text
    return model


def self_call(name: str) -> models.ModelProto:
    model = models.nested_functions(1)
    model.functions[0].name = name
    for node in (*model.functions[0].node, *model.graph.node):
        if node.domain:
            node.op_type = name
    return model


TEXTS: dict[str, tuple[Callable[[], models.ModelProto], str]] = {
    "a dimension of 2 MB": (lambda: with_dimension("d" * 2_000_000, 2), "has a dim_param of more than 10000 characters"),
    "one of a rank-4 input": (lambda: with_dimension("d" * 9_000, 4), "has shape ['batch', 'dddd"),
    "30,000 dimensions": (lambda: with_dimension("d", 30_000), "has an input or output of more than 100 dimensions"),
    "an operator of 2 MB": (lambda: self_call("f" * 2_000_000), "of more than 10000 characters"),
    "a declared input of 1 MB": (
        lambda: models.encoder(metadata={"xares.input": "i" * 1_000_000}),
        "input has 1000000 characters; the most is 1000",
    ),
    "a declared licence of 1 MB": (
        lambda: models.encoder(metadata={"xares.license": "i" * 1_000_000}),
        "license has 1000000 characters; the most is 1000",
    ),
    "an unknown key of 1 MB": (
        lambda: models.encoder(metadata={"xares.frontend." + "i" * 1_000_000: "1"}),
        "there is no contract key 'frontend.iiii",
    ),
    "a layout of 1 MB": (
        lambda: models.encoder(metadata={"xares.input_layout": "BT" * 500_000}),
        "input_layout has 1000000 characters",
    ),
    "a choice of 1 MB": (
        lambda: models.encoder(metadata={"xares.normalize": "n" * 1_000_000}),
        "normalize has 1000000 characters",
    ),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_in_a_model(text: str, tmp_path: Path) -> None:
    make, says = TEXTS[text]
    models.save(make(), tmp_path / "model.onnx")
    outcome = bounded("annotate", tmp_path / "model.onnx", "--contract", "source=x", "-o", tmp_path / "out.onnx", seconds=40)
    refused(outcome, 3, says)
    assert not (tmp_path / "out.onnx").exists()


def test_a_name_in_a_folder_that_is_not_utf_8(tmp_path: Path) -> None:
    models.save(models.encoder(), tmp_path / "mod\udce9l.onnx")
    refused(scored(tmp_path), 3, "has a name that is not UTF-8; rename it")
