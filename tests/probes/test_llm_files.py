"""What the llm head keeps on disk, and what it reads: checkpoints, and folders of language models."""

import hashlib
import json
import logging
import math
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file
from tiny_lm import (
    DIM,
    HIDDEN,
    INNER,
    Head,
    Speech,
    adapted_noise,
    make_folder,
    same,
    speech,
    word_error_rate,
)

from xares_onnx.errors import MachineError, UsageError
from xares_onnx.models.llm import LanguageModel
from xares_onnx.probes import llm
from xares_onnx.probes.sweep import Sweep


@pytest.fixture(scope="module")
def folder(taught_lm: Path) -> Path:
    return taught_lm


@pytest.fixture(scope="module")
def language_model(folder: Path) -> LanguageModel:
    return LanguageModel(folder, "cpu")


# -- checkpoints ------------------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def kill_after(last: int, heard: list[int]) -> Callable[[int], None]:
    def on_epoch(epoch: int) -> None:
        heard.append(epoch)
        if epoch == last:
            raise KilledError

    return on_epoch


@pytest.mark.parametrize("valid", [13, 0])
@pytest.mark.parametrize("last", [1, 3, 4])
def test_a_killed_training_resumes_to_the_same_result(
    language_model: LanguageModel, tmp_path: Path, last: int, valid: int
) -> None:
    task, head = speech(24, valid, 6), Head(epochs=4, learning_rate=3e-2)
    undisturbed = task.train(language_model, head, checkpoints=tmp_path / "undisturbed")
    before, after = [], []
    with pytest.raises(KilledError):
        task.train(language_model, head, checkpoints=tmp_path / "killed", on_epoch=kill_after(last, before))
    resumed = task.train(language_model, head, checkpoints=tmp_path / "killed", on_epoch=after.append)
    assert before + after == [1, 2, 3, 4]
    assert len(before) == last
    assert repr(resumed) == repr(undisturbed)
    ends = [load_file(next((tmp_path / run).iterdir())) for run in ("undisturbed", "killed")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


@pytest.mark.parametrize("last", [2, 5, 9])
def test_a_killed_sweep_resumes_at_its_unfinished_rate(
    language_model: LanguageModel, tmp_path: Path, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, plan = speech(24, 8, 6), Sweep((1e-3, 1e-2, 5e-2), 8, epochs=4, patience=2)
    trained: list[tuple[float, int, int]] = []
    train = llm._Training.train

    def watched(training: Any) -> None:
        trained.append((training._rate, training._seed, training.epoch))
        if len(trained) == last + 1 and not resuming:
            raise KilledError
        train(training)

    resuming = True
    monkeypatch.setattr(llm._Training, "train", watched)
    undisturbed = task.train(language_model, plan, [0, 1], checkpoints=tmp_path / "undisturbed")
    every_epoch = trained.copy()
    assert last < len(every_epoch)
    trained.clear()
    resuming = False
    with pytest.raises(KilledError):
        task.train(language_model, plan, [0, 1], checkpoints=tmp_path / "killed")
    trained.clear()
    resuming = True
    steps: list[int] = []
    resumed = task.train(language_model, plan, [0, 1], checkpoints=tmp_path / "killed", on_epoch=steps.append)
    assert trained == every_epoch[last:]
    assert repr(resumed) == repr(undisturbed)
    assert steps[-1] == plan.steps


def test_a_checkpoint_holds_the_adapter_and_adams_moments_alone(language_model: LanguageModel, tmp_path: Path) -> None:
    (result,) = speech(12, 4, 4).train(language_model, Head(epochs=2), checkpoints=tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".safetensors"
    shapes = {"gate.weight": (INNER, DIM), "value.weight": (INNER, DIM), "output.weight": (HIDDEN, INNER)}
    shapes |= {"gate.bias": (INNER,), "value.bias": (INNER,), "output.bias": (HIDDEN,)}
    expected: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        expected |= {f"adapter.{key}": shape, f"best.{key}": shape, f"adam.{key}.step": ()}
        expected |= {f"adam.{key}.exp_avg": shape, f"adam.{key}.exp_avg_sq": shape}
    with safe_open(path, framework="pt") as file:
        assert {key: tuple(file.get_tensor(key).shape) for key in file.keys()} == expected  # noqa: SIM118
        state = file.metadata()
    assert (state["epoch"], state["best_epoch"]) == ("2", str(result.best_epoch))
    assert float(state["score"]) == result.valid_score
    assert path.stat().st_size < 4 * 4 * sum(math.prod(shape) for shape in shapes.values()) + 8192


def truncated(path: Path, _: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def one_bit_flipped(path: Path, _: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def of_another_training(path: Path, other: Path) -> None:
    shutil.copy(other, path)


def of_no_training(path: Path, _: Path) -> None:
    save_file({"adapter.gate.weight": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [truncated, emptied, one_bit_flipped, of_another_training, of_no_training])
def test_a_damaged_or_foreign_checkpoint_is_ignored(
    language_model: LanguageModel, tmp_path: Path, damage: Callable[[Path, Path], None]
) -> None:
    task, head, heard = speech(12, 4, 4), Head(epochs=2), []
    undisturbed = task.train(language_model, head, checkpoints=tmp_path / "kept")
    task.train(language_model, head, [1], checkpoints=tmp_path / "other")
    (path,), (other,) = (tmp_path / "kept").iterdir(), (tmp_path / "other").iterdir()
    damage(path, other)
    again = task.train(language_model, head, checkpoints=tmp_path / "kept", on_epoch=heard.append)
    assert heard == [1, 2]
    assert same(again, undisturbed)
    task.train(language_model, head, checkpoints=tmp_path / "kept", on_epoch=heard.append)
    assert heard == [1, 2]  # it was written anew


def test_whatever_shapes_the_training_names_the_checkpoint(
    language_model: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    task, head = speech(8, 2, 2), Head(epochs=1)
    (rows,) = task.folds
    elsewhere = tmp_path / "another name"
    shutil.copytree(folder, elsewhere)
    other_folder = tmp_path / "other"
    shutil.copytree(folder, other_folder)
    weights = load_file(other_folder / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, other_folder / "model.safetensors", {"format": "pt"})
    changed_text = task.transcripts.copy()
    changed_text[rows.train[0]] += "A"
    changed_valid = task.transcripts.copy()
    changed_valid[rows.valid[0]] += "A"
    changed_test = task.transcripts.copy()
    changed_test[rows.test[0]] += "A"
    longer = task.frames.copy()
    longer[rows.train[0]] = np.repeat(longer[rows.train[0]], 2, axis=0)

    def names(task: Speech = task, head: Head = head, model: LanguageModel = language_model, **options: Any) -> set[str]:
        task.train(model, head, checkpoints=tmp_path / "kept", **options)
        return {path.name for path in (tmp_path / "kept").iterdir()}

    known = names()
    assert names() == known
    assert names(model=LanguageModel(elsewhere, "cpu")) == known  # the same files
    assert names(replace(task, transcripts=changed_test)) == known  # nothing is learnt from them
    for count, change in enumerate(
        [
            {"name": "another encoder"},
            {"seeds": [1]},
            {"head": replace(head, epochs=2)},
            {"head": replace(head, batch_size=3)},
            {"head": replace(head, learning_rate=2e-2)},
            {"model": LanguageModel(other_folder, "cpu")},
            {"task": replace(task, transcripts=changed_text)},
            {"task": replace(task, transcripts=changed_valid)},
            {"task": replace(task, frames=longer)},
            {"task": replace(task, folds=[replace(rows, train=rows.train[::-1])])},
            {"task": replace(task, folds=[replace(rows, valid=rows.test)])},
            {"task": replace(task, folds=[rows, rows])},
        ],
        start=2,
    ):
        known = names(**change)
        assert len(known) == count, change
    assert all(len(name.removesuffix(".safetensors")) == 64 for name in known)


# -- what is loaded, and what is refused ------------------------------------------------------------------------------


def test_what_a_record_says(folder: Path, language_model: LanguageModel) -> None:
    said = language_model.described()
    assert said | {"digest": ""} == {
        "name": "tiny-lm",
        "digest": "",
        "separator": "<|vision_end|>",
        "dtype": "float32",
        "device": "cpu",
    }
    read = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in read}
    assert said["digest"] == hashlib.sha256(json.dumps(sums).encode()).hexdigest()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_the_digest_is_of_every_file_that_is_read(
    folder: Path, language_model: LanguageModel, tmp_path: Path, name: str
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    (copied / "README.md").write_text("a model card")
    assert LanguageModel(copied, "cpu").digest == language_model.digest
    if name == "model.safetensors":
        save_file(load_file(copied / name), copied / name, {"format": "pt", "saved": "again"})
    else:
        (copied / name).write_text((copied / name).read_text() + "\n")
    assert LanguageModel(copied, "cpu").digest != language_model.digest


@pytest.mark.parametrize(("special", "separator"), [({}, "<|endoftext|>"), ({"bos_token": "<|begin|>"}, "<|begin|>")])
def test_the_separator_where_the_tokenizer_has_not_qwens(tmp_path: Path, special: dict[str, str], separator: str) -> None:
    model = LanguageModel(make_folder(tmp_path / "lm", separator=False, taught=False, **special), "cpu")
    assert model.described()["separator"] == separator
    assert len(model.tokenizer("AB").input_ids) == 2 + ("bos_token" in special)
    assert model.losses(adapted_noise([3]), ["AB"]).shape == (4,)
    assert "<|" not in "".join(model.generate(adapted_noise([3, 4])) + model.teacher_forced(adapted_noise([3]), ["AB"]))


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content) and None


def configured(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def lacking(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without_an_end(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None, "pad_token": None}))


def smaller(folder: Path) -> None:
    """Fewer tokens in the model than in the tokenizer."""
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:200].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    configured(vocab_size=200)(folder)


CUSTOM_CODE = {"AutoConfig": "harm.Config", "AutoModelForCausalLM": "harm.Model"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("config.json"), "has no config.json, so it is not a language model"),
        (without("tokenizer.json"), "has no tokenizer beside it"),
        (without("model.safetensors"), "there are no safetensors weights in"),
        (pickled, "others are pickles, which are never read"),
        (lacking, "lack model.norm.weight, so the language model is incomplete"),
        (written("config.json", "{"), "cannot be loaded"),
        (written("tokenizer.json", "{"), "cannot be loaded"),
        (written("model.safetensors", b"garbage"), "cannot be loaded"),
        (configured(model_type="t5"), "cannot be loaded"),
        (configured(model_type="harm", auto_map=CUSTOM_CODE), "cannot be loaded"),
        (configured(hidden_size=64), "cannot be loaded"),
        (without_an_end, "has no end token"),
        (smaller, "has more tokens than the language model beside it"),
    ],
)
def test_a_wrong_folder_is_refused_in_one_sentence(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    (copied / "harm.py").write_text("raise SystemExit('stranger code has run')")
    change(copied)
    with logged() as records, pytest.raises(UsageError, match=sentence) as refusal:
        LanguageModel(copied, "cpu")
    assert str(copied) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not records
    assert capfd.readouterr() == ("", "")


@contextmanager
def logged() -> Iterator[list[logging.LogRecord]]:
    """What transformers logs, whatever pytest does with its streams."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)


def test_loading_and_writing_are_quiet_and_leave_transformers_settings(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = pytest.importorskip("transformers").logging
    before = log.get_verbosity()
    log.set_verbosity(logging.WARNING)
    try:
        with logged() as records:
            LanguageModel(folder, "cpu").generate(adapted_noise([2]))
        assert (log.get_verbosity(), log.is_progress_bar_enabled()) == (logging.WARNING, True)
    finally:
        log.set_verbosity(before)
    assert not records
    assert capfd.readouterr() == ("", "")


def test_nothing_is_fetched(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("Qwen/Qwen2.5-0.5B", "no such folder", str(tmp_path / "nowhere")):
        with pytest.raises(UsageError, match="neither a folder nor a model in the local Hugging Face cache"):
            LanguageModel(name)
    cached = tmp_path / "models--maker--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    model = LanguageModel("maker/tiny", "cpu")
    assert model.name == "maker/tiny"
    assert model.digest == LanguageModel(folder, "cpu").digest


def test_devices(folder: Path) -> None:
    assert LanguageModel(folder, "auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(MachineError, match="heads cannot run on 'cuda:99'"):
        LanguageModel(folder, "cuda:99")
    for device in ("gpu", "meta", "cuda:first"):
        with pytest.raises(UsageError, match="choose cpu, cuda or cuda:N"):
            LanguageModel(folder, device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_adapter_learns_on_cuda(folder: Path, tmp_path: Path) -> None:
    task, heard = speech(300, 30, 60), []
    model = LanguageModel(folder, "cuda")
    with pytest.raises(KilledError):
        task.train(model, checkpoints=tmp_path, on_epoch=kill_after(2, heard))
    (result,) = task.train(model, checkpoints=tmp_path, on_epoch=heard.append)
    assert heard == [1, 2, 3, 4]
    assert 1 - word_error_rate([task.transcripts[clip] for clip in result.examples], result.predictions) > 0.8


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"pip install 'xares-onnx\[llm\]'"):
        LanguageModel(tmp_path)


def test_importing_the_modules_imports_no_transformers() -> None:
    check = "import sys, xares_onnx.probes.llm, xares_onnx.models.llm; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2])
