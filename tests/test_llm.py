"""The llm head against the plainest way to do the same: one utterance at a time, no padding, no cache, torch's own layers.

The language model is a real one, only tiny: a Qwen2 of two layers that was taught, here, to copy what stands before the
separator. Speech is made of one vector a character, and some noise.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor, nn

from xares_onnx.errors import MachineError, ScoreUndefinedError, UsageError
from xares_onnx.models.llm import Adapter, LanguageModel
from xares_onnx.probes import llm
from xares_onnx.probes.llm import train_llm
from xares_onnx.probes.training import HeadResult, Rows

LETTERS = "ABCDEFGHIJK"
DIM, HIDDEN, INNER = 16, 32, 48


@dataclass(frozen=True)
class Head:
    epochs: int = 4
    batch_size: int = 8
    learning_rate: float = 1e-2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a tokenizer of bytes, and a model that copies."""
    return make_folder(tmp_path_factory.mktemp("models") / "tiny-lm")


@pytest.fixture(scope="module")
def untaught_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, its weights as they were drawn: it babbles on and on."""
    return make_folder(tmp_path_factory.mktemp("models") / "untaught-lm", steps=0)


def make_folder(folder: Path, *, separator: bool = True, steps: int = 600, **special: str) -> Path:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    bytes_alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(bytes_alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if "bos_token" in special:  # as Llama's, which begins every text with it
        begin = special["bos_token"]
        tokenizer.add_special_tokens([begin])
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|vision_end|>"] if separator else [],
        **special,
    )
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=260,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.1,
        attention_dropout=0.2,  # which no encoder's score may meet
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    if steps:
        teach_to_copy(model, fast, steps)
    # What a model brings along for sampling must not reach the head.
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=3, max_new_tokens=3, repetition_penalty=2.0)
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    transformers.logging.enable_progress_bar()
    return folder


def teach_to_copy(model: Any, tokenizer: Any, steps: int) -> None:
    rng = np.random.default_rng(0)
    adam = torch.optim.Adam(model.parameters())
    rates = torch.optim.lr_scheduler.OneCycleLR(adam, 1e-2, total_steps=steps)
    separator = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    for step in range(steps):
        texts = tokenizer(sentences(rng, 24, 2 + step % 4)).input_ids
        ids = torch.tensor([[*text, separator, *text, tokenizer.eos_token_id] for text in texts])
        inputs = model.get_input_embeddings()(ids)
        labels = ids.clone()
        labels[:, : len(texts[0])] = -100
        loss = model(inputs_embeds=inputs, labels=labels, use_cache=False).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        rates.step()


def sentences(rng: np.random.Generator, count: int, length: int | None = None) -> list[str]:
    """`length` letters, none twice, and from 3 on with a space between two of them."""
    found = []
    for _ in range(count):
        letters = rng.permutation(list(LETTERS))[: length or rng.integers(2, 6)].tolist()
        if len(letters) > 2:
            letters[rng.integers(1, len(letters) - 1)] = " "
        found.append("".join(letters))
    return found


@pytest.fixture(scope="module")
def language_model(folder: Path) -> LanguageModel:
    return LanguageModel(folder, "cpu")


@dataclass(frozen=True)
class Speech:
    frames: list[NDArray[Any]]
    transcripts: list[str]
    folds: list[Rows]

    def train(
        self, model: LanguageModel, head: Head = Head(), seeds: Sequence[int] = (0,), **options: Any
    ) -> list[HeadResult]:
        options = {"checkpoints": None, "name": "speech", **options}
        return train_llm(self.frames, self.transcripts, self.folds, head, seeds, language_model=model, **options)


def speech(train: int, valid: int, test: int, *, folds: int = 1, noise: float = 0.1) -> Speech:
    """Clips of a frame a character; the clips of the folds' splits are drawn anew from the same ones."""
    rng = np.random.default_rng(1)
    clips = train + valid + test
    voices = {c: rng.standard_normal(DIM) for c in LETTERS + " "}
    transcripts = sentences(rng, clips)
    frames = [
        (np.stack([voices[c] for c in text]) + noise * rng.standard_normal((len(text), DIM))).astype(np.float32)
        for text in transcripts
    ]
    splits = [np.split(rng.permutation(clips), [train, train + valid]) for _ in range(folds)]
    return Speech(frames, transcripts, [Rows(*split) for split in splits])


# -- the plainest way -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """The head with a model and a tokenizer of its own, one utterance at a time."""

    model: Any
    tokenizer: Any

    def ids(self, text: str) -> list[int]:
        separator = self.tokenizer.convert_tokens_to_ids("<|vision_end|>")
        return [separator, *self.tokenizer(text).input_ids, self.tokenizer.eos_token_id]

    def logits(self, adapted: Tensor, ids: Sequence[int]) -> Tensor:
        """(frames + tokens, vocabulary)."""
        inputs = torch.cat((adapted, self.model.get_input_embeddings()(torch.tensor(ids))))
        return self.model(inputs_embeds=inputs[None], use_cache=False).logits[0]

    def loss(self, adapted: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
        """Token by token, from the definition."""
        losses = []
        for frames, text in zip(adapted, texts, strict=True):
            ids = self.ids(text)
            logits = self.logits(frames, ids)
            for place, token in enumerate(ids):
                row = logits[len(frames) + place - 1]
                losses.append(torch.logsumexp(row, 0) - row[token])
        return torch.stack(losses).mean()

    @torch.no_grad()
    def teacher_forced(self, adapted: Tensor, text: str) -> str:
        logits = self.logits(adapted, self.ids(text))[len(adapted) : -1]
        return self.tokenizer.decode([int(row.argmax()) for row in logits], skip_special_tokens=True)

    @torch.no_grad()
    def tokens(self, adapted: Tensor, penalty: float) -> list[int]:
        start = self.ids("")[:1]
        written: list[int] = []
        while len(written) < 200:
            logits = self.logits(adapted, start + written)[-1].tolist()
            for token in set(written):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            token = max(range(len(logits)), key=logits.__getitem__)
            if token == self.tokenizer.eos_token_id:
                break
            written.append(token)
        return written

    def generate(self, adapted: Tensor) -> str:
        return self.tokenizer.decode(self.tokens(adapted, 1.1), skip_special_tokens=True)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Plain:
    return plain_from(folder)


def plain_from(folder: Path) -> Plain:
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    transformers.logging.enable_progress_bar()
    return Plain(model, transformers.AutoTokenizer.from_pretrained(folder))


class PlainAdapter(nn.Module):
    def __init__(self, seed: int, fold: int) -> None:
        super().__init__()
        rng = np.random.default_rng([seed, fold])
        self.gate, self.value, self.output = nn.Linear(DIM, INNER), nn.Linear(DIM, INNER), nn.Linear(INNER, HIDDEN)
        with torch.no_grad():
            for layer in (self.gate, self.value, self.output):
                for parameter in (layer.weight, layer.bias):
                    drawn = rng.uniform(-1, 1, tuple(parameter.shape)) / math.sqrt(layer.in_features)
                    parameter.copy_(torch.from_numpy(drawn))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return self.output(gate * torch.sigmoid(gate) * self.value(x))


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Levenshtein over words, over the words of all references."""
    errors = 0
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        r, h = reference.split(), hypothesis.split()
        row = list(range(len(h) + 1))
        for i in range(1, len(r) + 1):
            row, above = [i], row
            for j in range(1, len(h) + 1):
                row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (r[i - 1] != h[j - 1])))
        errors += row[-1]
    return errors / sum(len(reference.split()) for reference in references)


def adapted_noise(lengths: Sequence[int], seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(length, HIDDEN, generator=noise) for length in lengths]


# -- what it is for ---------------------------------------------------------------------------------------------------


def test_the_adapter_learns_to_transcribe(language_model: LanguageModel) -> None:
    task = speech(300, 30, 60)
    (result,) = task.train(language_model)
    references = [task.transcripts[clip] for clip in result.examples]
    assert not {task.transcripts[clip] for clip in task.folds[0].train} >= set(references)
    assert 1 - word_error_rate(references, result.predictions) > 0.8
    assert result.valid_score > 0.8
    np.testing.assert_array_equal(result.examples, np.sort(task.folds[0].test))


def test_shuffled_transcripts_teach_nothing(language_model: LanguageModel) -> None:
    task = speech(300, 30, 60)
    train = task.folds[0].train
    shuffled = np.array(task.transcripts, object)
    shuffled[train] = np.random.default_rng(0).permutation(shuffled[train])
    (result,) = replace(task, transcripts=shuffled.tolist()).train(language_model)
    assert 1 - word_error_rate([task.transcripts[clip] for clip in result.examples], result.predictions) < 0.2


def test_training_leaves_the_language_model_as_it_is(language_model: LanguageModel) -> None:
    before = {key: tensor.clone() for key, tensor in language_model.model.state_dict().items()}
    speech(12, 4, 4).train(language_model, Head(epochs=1))
    after = language_model.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(not p.requires_grad and p.grad is None for p in language_model.model.parameters())


# -- sequences: loss, teacher forcing, generation ---------------------------------------------------------------------

utterances = st.lists(st.tuples(st.integers(1, 12), st.text("ABC d'é", max_size=9)), min_size=1, max_size=5)


@given(utterances, st.integers(0, 99))
@settings(max_examples=25)
def test_the_loss_is_the_mean_over_tokens_one_utterance_at_a_time(
    language_model: LanguageModel, plain: Plain, batch: list[tuple[int, str]], seed: int
) -> None:
    adapted, texts = adapted_noise([length for length, _ in batch], seed), [text for _, text in batch]
    loss = language_model.losses(adapted, texts).mean()
    torch.testing.assert_close(loss, plain.loss(adapted, texts), atol=1e-4, rtol=1e-5)


def test_the_gradient_reaches_every_frame_as_without_padding(language_model: LanguageModel, plain: Plain) -> None:
    texts = ["AB", "CD EFG", "H"]
    adapted = [frames.requires_grad_() for frames in adapted_noise([3, 11, 7])]
    gradients = torch.autograd.grad(language_model.losses(adapted, texts).mean(), adapted)
    expected = torch.autograd.grad(plain.loss(adapted, texts), adapted)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert bool((reference != 0).any(dim=1).all())
        torch.testing.assert_close(gradient, reference, atol=1e-5, rtol=1e-4)


@given(utterances, st.integers(0, 99))
@settings(max_examples=15)
def test_teacher_forcing_reads_the_likeliest_token_after_each_true_one(
    language_model: LanguageModel, plain: Plain, batch: list[tuple[int, str]], seed: int
) -> None:
    adapted, texts = adapted_noise([length for length, _ in batch], seed), [text for _, text in batch]
    expected = [plain.teacher_forced(frames, text) for frames, text in zip(adapted, texts, strict=True)]
    assert language_model.teacher_forced(adapted, texts) == expected


def spoken(plain: Plain, text: str) -> Tensor:
    """What the language model copies: the embeddings of the text's own tokens."""
    return plain.model.get_input_embeddings()(torch.tensor(plain.tokenizer(text).input_ids)).detach()


def test_generation_is_the_plain_loop_alone_and_in_a_batch(language_model: LanguageModel, plain: Plain) -> None:
    texts = ["AB", "DC E", "GH KA"]
    adapted = [spoken(plain, text) for text in texts] + adapted_noise([1, 5, 14], scale=0.5)
    expected = [plain.generate(frames) for frames in adapted]
    assert expected[:3] == texts
    assert language_model.generate(adapted) == expected
    assert [language_model.generate([frames])[0] for frames in adapted] == expected
    assert language_model.generate(adapted[::-1]) == expected[::-1]


@pytest.mark.parametrize("shift", [0.0, -8.0])
def test_the_repetition_penalty_and_the_limit_of_tokens_matter(untaught_folder: Path, shift: float) -> None:
    """With logits of either sign."""
    plain, language_model = plain_from(untaught_folder), LanguageModel(untaught_folder, "cpu")
    for model in (plain.model, language_model.model):
        model.lm_head.register_forward_hook(lambda _, __, logits: logits + shift)
    (adapted,) = adapted_noise([9], scale=2.0)
    tokens = plain.tokens(adapted, 1.1)
    assert len(tokens) == 200
    assert tokens not in [plain.tokens(adapted, penalty) for penalty in (1.0, 1.2)]
    assert language_model.generate([adapted]) == [plain.tokenizer.decode(tokens, skip_special_tokens=True)]


def test_padding_goes_to_the_longest_and_logits_are_those_of_the_text(language_model: LanguageModel) -> None:
    shapes: list[tuple[tuple[int, ...], int]] = []
    positions: list[list[list[int]]] = []

    def note(_: nn.Module, __: Any, inputs: dict[str, Any], output: Any) -> None:
        shapes.append((tuple(inputs["inputs_embeds"].shape), output.logits.shape[1]))
        positions.append(inputs["position_ids"].tolist())

    hook = language_model.model.register_forward_hook(note, with_kwargs=True)
    try:
        language_model.losses(adapted_noise([1750, 30, 400, 5]), ["A", "ABCDEFGH", "", "AB"])
        language_model.generate([torch.zeros(1, HIDDEN), torch.zeros(40, HIDDEN)])
    finally:
        hook.remove()
    assert shapes[0] == ((4, 1750 + 3, HIDDEN), len("ABCDEFGH") + 3)  # separator, end, and one position before
    assert shapes[1] == ((2, 40 + 1, HIDDEN), 1)
    assert {shape for shape, _ in shapes[2:]} <= {(2, 1, HIDDEN)}
    # Every utterance counts from its own first frame, whatever stands before it.
    assert [row[-length:] for row, length in zip(positions[0], (1753, 40, 402, 9), strict=True)] == [
        list(range(length)) for length in (1753, 40, 402, 9)
    ]
    assert [row[-1] for row in positions[1]] == [1, 40]
    assert all(step == [[2 + number], [41 + number]] for number, step in enumerate(positions[2:]))


# -- training ---------------------------------------------------------------------------------------------------------


def kept_weights(path: Path, part: str = "adapter.") -> dict[str, Tensor]:
    return {key.removeprefix(part): tensor for key, tensor in load_file(path).items() if key.startswith(part)}


@pytest.mark.parametrize("frames_at_once", [4096, 6, 1])
def test_training_is_torchs_own_adam_on_plain_losses(
    language_model: LanguageModel, plain: Plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames_at_once: int
) -> None:
    """However many pieces a batch is computed in."""
    largest = 0

    def note(_: nn.Module, __: Any, inputs: dict[str, Any], ___: Any) -> None:
        nonlocal largest
        if torch.is_grad_enabled():
            largest = max(largest, len(inputs["inputs_embeds"]))

    monkeypatch.setattr(llm, "_FRAMES_AT_ONCE", frames_at_once)
    task = speech(21, 3, 3, folds=2)
    head = Head(epochs=3, batch_size=4, learning_rate=3e-3)
    fold, seed = 1, 5
    adapter = PlainAdapter(seed, fold)
    adam = torch.optim.Adam(adapter.parameters())
    for epoch in range(1, 4):
        adam.param_groups[0]["lr"] = 3e-3 * (0.55 + 0.45 * math.cos(math.pi * (epoch - 1) / 3))
        order = np.random.default_rng([seed, fold, epoch]).permutation(task.folds[fold].train)
        for batch in (order[i : i + 4] for i in range(0, 21, 4)):
            adam.zero_grad()
            adapted = [adapter(torch.from_numpy(task.frames[clip])) for clip in batch]
            plain.loss(adapted, [task.transcripts[clip] for clip in batch]).backward()
            adam.step()
    hook = language_model.model.register_forward_hook(note, with_kwargs=True)
    task.train(language_model, head, [seed], checkpoints=tmp_path)
    hook.remove()
    assert largest == {4096: 4, 6: 3, 1: 1}[frames_at_once]
    expected = adapter.state_dict()
    kept = [kept_weights(path) for path in tmp_path.iterdir()]
    (weights,) = [weights for weights in kept if torch.allclose(weights["gate.bias"], expected["gate.bias"], atol=1e-2)]
    for key, weight in weights.items():
        torch.testing.assert_close(weight, expected[key], atol=2e-4, rtol=1e-3)


def test_a_fresh_adapter_is_drawn_as_torch_draws_layers(language_model: LanguageModel) -> None:
    adapter = language_model.adapter(DIM, np.random.default_rng([3, 4]))
    reference = PlainAdapter(3, 4)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((9, DIM)).astype(np.float32))
    torch.testing.assert_close(adapter(x), reference(x), atol=1e-6, rtol=1e-5)
    assert sum(p.numel() for p in adapter.parameters()) == 2 * (DIM + 1) * INNER + (INNER + 1) * HIDDEN
    torch_draws, ours = nn.Linear(200, 300).weight.detach(), Adapter(200, 300, 7, np.random.default_rng(0)).gate
    assert ours.weight.std().item() == pytest.approx(torch_draws.std().item(), rel=0.02)
    assert ours.bias.abs().max().item() == pytest.approx(torch_draws.abs().max().item(), rel=0.02)


def adapter_of(weights: dict[str, Tensor]) -> PlainAdapter:
    adapter = PlainAdapter(0, 0)
    adapter.load_state_dict(weights)
    return adapter.requires_grad_(False)


def teacher_forced(task: Speech, plain: Plain, weights: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """(references, what is written) of the validation clips."""
    references = [task.transcripts[clip] for clip in task.folds[0].valid]
    adapted = [adapter_of(weights)(torch.from_numpy(task.frames[clip])) for clip in task.folds[0].valid]
    return references, [plain.teacher_forced(x, text) for x, text in zip(adapted, references, strict=True)]


def test_the_first_best_epoch_by_teacher_forcing_is_chosen(
    language_model: LanguageModel, plain: Plain, tmp_path: Path
) -> None:
    """Scores of every epoch recomputed from the weights kept after it."""
    task = speech(100, 12, 30)
    adapters: list[dict[str, Tensor]] = []

    def note(_: int) -> None:
        adapters.append(kept_weights(*tmp_path.iterdir()))

    (result,) = task.train(language_model, Head(epochs=6, learning_rate=2e-2), checkpoints=tmp_path, on_epoch=note)
    scores = []
    for weights in adapters:
        references, written = teacher_forced(task, plain, weights)
        cut = [text[: len(reference)].lower() for reference, text in zip(references, written, strict=True)]
        scores.append(1 - word_error_rate([reference.lower() for reference in references], cut))
    assert result.best_epoch == scores.index(max(scores)) + 1
    assert 1 < result.best_epoch < 6
    assert result.valid_score == pytest.approx(max(scores))
    best = kept_weights(*tmp_path.iterdir(), "best.")
    assert all(torch.equal(best[key], adapters[result.best_epoch - 1][key]) for key in best)
    expected, last = (
        [plain.generate(adapter_of(weights)(torch.from_numpy(task.frames[clip]))) for clip in result.examples]
        for weights in (best, adapters[-1])
    )
    assert expected != last
    assert result.predictions == expected


def test_selection_cuts_to_the_reference_and_lowers_case(
    language_model: LanguageModel, plain: Plain, tmp_path: Path
) -> None:
    """What follows the text, where its end is not seen, costs nothing: here the last letter said is in no reference."""
    task = speech(300, 30, 2)
    texts = task.transcripts.copy()
    for clip in task.folds[0].valid:
        texts[clip] = texts[clip][0].lower() + texts[clip][1:-1]
    task = replace(task, transcripts=texts)
    (result,) = task.train(language_model, Head(epochs=2), checkpoints=tmp_path)
    references, written = teacher_forced(task, plain, kept_weights(*tmp_path.iterdir(), "best."))
    cut = [text[: len(reference)] for reference, text in zip(references, written, strict=True)]
    lower = [reference.lower() for reference in references]
    expected = 1 - word_error_rate(lower, [text.lower() for text in cut])
    assert result.valid_score == pytest.approx(expected)
    assert expected not in (
        pytest.approx(1 - word_error_rate(references, cut)),
        pytest.approx(1 - word_error_rate(lower, [text.lower() for text in written])),
    )


def test_without_validation_clips_the_last_epoch_is_taken(language_model: LanguageModel) -> None:
    (result,) = speech(12, 0, 4).train(language_model, Head(epochs=2))
    assert result.best_epoch == 2
    assert math.isnan(result.valid_score)


def same(one: Sequence[HeadResult], other: Sequence[HeadResult]) -> bool:
    assert [len(result.predictions) for result in one] == [len(result.examples) for result in one]
    return [(r.fold, r.seed, r.examples.tolist(), r.predictions, r.best_epoch, r.valid_score) for r in one] == [
        (r.fold, r.seed, r.examples.tolist(), r.predictions, r.best_epoch, r.valid_score) for r in other
    ]


def test_heads_are_the_same_alone_and_beside_others(language_model: LanguageModel, tmp_path: Path) -> None:
    task, head = speech(16, 6, 6, folds=2), Head(epochs=2)
    torch.manual_seed(1)
    together = task.train(language_model, head, [7, 3], checkpoints=tmp_path / "together")
    assert [(result.fold, result.seed) for result in together] == [(0, 3), (0, 7), (1, 3), (1, 7)]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    alone = [replace(task, folds=task.folds[:1]).train(language_model, head, [seed])[0] for seed in (3, 7)]
    assert same(together[:2], alone)
    assert torch.equal(state, torch.get_rng_state())
    again = task.train(language_model, head, [3, 7], checkpoints=tmp_path / "again")
    assert same(together, again)
    kept = [{path.name: load_file(path) for path in (tmp_path / run).iterdir()} for run in ("together", "again")]
    assert kept[0].keys() == kept[1].keys()
    assert len(kept[0]) == 4
    for name, tensors in kept[0].items():
        assert all(torch.equal(tensor, kept[1][name][key]) for key, tensor in tensors.items())


def test_float16_and_memory_mapped_frames_are_read_as_they_are(language_model: LanguageModel, tmp_path: Path) -> None:
    task, head = speech(12, 4, 4), Head(epochs=2)
    half = [clip.astype(np.float16) for clip in task.frames]
    np.concatenate(half).tofile(tmp_path / "frames")
    mapped = np.memmap(tmp_path / "frames", np.float16, "r").reshape(-1, DIM)
    views = np.split(mapped, np.cumsum([len(clip) for clip in half])[:-1])
    expected = replace(task, frames=[clip.astype(np.float32) for clip in half]).train(language_model, head)
    assert same(replace(task, frames=views).train(language_model, head), expected)


def test_frames_that_are_not_finite_give_no_score(language_model: LanguageModel) -> None:
    task = speech(8, 0, 4)
    task.frames[task.folds[0].test[0]][:] = np.inf
    with pytest.raises(ScoreUndefinedError, match="NaN or infinity"):
        task.train(language_model, Head(epochs=1))


def test_a_clip_beyond_the_models_positions_gives_no_score(language_model: LanguageModel) -> None:
    task = speech(8, 0, 4)
    clip = task.folds[0].test[0]
    task.frames[clip] = np.zeros((2048 - 201, DIM), np.float32)
    task.train(language_model, Head(epochs=1))
    task.frames[clip] = np.zeros((2048 - 200, DIM), np.float32)
    with pytest.raises(ScoreUndefinedError, match="the longest clip has 1848 frames, and the language model 2048 positions"):
        task.train(language_model, Head(epochs=1))


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
    model = LanguageModel(make_folder(tmp_path / "lm", separator=False, steps=0, **special), "cpu")
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
        (without("config.json"), "holds no language model: there is no config.json in it"),
        (without("tokenizer.json"), "has no tokenizer beside it"),
        (without("model.safetensors"), "there are no safetensors weights in"),
        (pickled, "others are pickles, which are never read"),
        (lacking, "lack model.norm.weight, so they are not all of its language model"),
        (written("config.json", "{"), "cannot be loaded"),
        (written("tokenizer.json", "{"), "cannot be loaded"),
        (written("model.safetensors", b"garbage"), "cannot be loaded"),
        (configured(model_type="t5"), "cannot be loaded"),
        (configured(model_type="harm", auto_map=CUSTOM_CODE), "cannot be loaded"),
        (configured(hidden_size=64), "cannot be loaded"),
        (without_an_end, "has no end token"),
        (smaller, "has more tokens than the language model beside it knows"),
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
    with pytest.raises(MachineError, match="torch finds no device 'cuda:99'"):
        LanguageModel(folder, "cuda:99")
    for device in ("gpu", "meta", "cuda:first"):
        with pytest.raises(UsageError, match="choose auto, cpu, cuda or cuda:N"):
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
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[1])
