"""A tiny causal language model on disk, speech for it, and the plainest way to train and ask it.

`python tests/helpers/tiny_lm.py` teaches the language model anew and writes its weights beside this file. They are kept, and
not taught in each run, because 4,000 steps of Adam end in other weights on another kind of CPU.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xares_onnx.models.llm import LanguageModel
from xares_onnx.probes.llm import train_llm
from xares_onnx.probes.sweep import Sweep
from xares_onnx.probes.training import HeadResult, Rows

LETTERS = "ABCDEFGHIJK"
DIM, HIDDEN, INNER = 16, 32, 48
TAUGHT = Path(__file__).with_suffix(".safetensors")  # in half precision
NEAR = 1e-3  # two logits as near as this may change places where another kernel sums a product in another order


@dataclass(frozen=True)
class Head:
    epochs: int = 4
    batch_size: int = 8
    learning_rate: float = 1e-2


def make_folder(folder: Path, *, separator: bool = True, taught: bool = True, **special: str) -> Path:
    """`taught`: with the weights in `TAUGHT`, which copy what stands before the separator; else with those drawn."""
    transformers = pytest.importorskip("transformers")
    tokenizer, model = fresh_model(separator=separator, **special)
    if taught:
        weights = {key: tensor.float() for key, tensor in load_file(TAUGHT).items()}
        model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    # What a model brings along for sampling must not reach the head.
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=3, max_new_tokens=3, repetition_penalty=2.0)
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.logging.enable_progress_bar()
    return folder


def fresh_model(*, separator: bool = True, **special: str) -> tuple[Any, Any]:
    """(tokenizer, model), the weights drawn."""
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
    return fast, transformers.Qwen2ForCausalLM(config).eval()


def teach_to_copy(model: Any, tokenizer: Any, steps: int = 4000) -> None:
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


@dataclass(frozen=True)
class Speech:
    frames: list[NDArray[Any]]
    transcripts: list[str]
    folds: list[Rows]

    def train(
        self, model: LanguageModel, head: Head | Sweep = Head(), seeds: Sequence[int] = (0,), **options: Any
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
    def teacher_forced(self, adapted: Tensor, text: str) -> set[str]:
        """Every text of likeliest tokens: more than one where two tokens are equally likely, up to rounding."""
        logits = self.logits(adapted, self.ids(text))[len(adapted) : -1]
        return {self.decoded(tokens) for tokens in itertools.product(*(likeliest(row.tolist()) for row in logits))}

    @torch.no_grad()
    def tokens(self, adapted: Tensor, penalty: float) -> list[list[int]]:
        """Every sequence of likeliest tokens, one unless two tokens are equally likely, up to rounding."""
        start = self.ids("")[:1]
        unfinished: list[list[int]] = [[]]
        finished = []
        while unfinished:
            written = unfinished.pop()
            logits = self.logits(adapted, start + written)[-1].tolist()
            for token in set(written):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            for token in likeliest(logits):
                if token == self.tokenizer.eos_token_id:
                    finished.append(written)
                else:
                    (finished if len(written) == 199 else unfinished).append([*written, token])
        return finished

    def generate(self, adapted: Tensor) -> set[str]:
        return {self.decoded(tokens) for tokens in self.tokens(adapted, 1.1)}

    def decoded(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def likeliest(logits: Sequence[float]) -> list[int]:
    best = max(logits)
    return [token for token, logit in enumerate(logits) if logit >= best - NEAR]


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


def same(one: Sequence[HeadResult], other: Sequence[HeadResult]) -> bool:
    assert [len(result.predictions) for result in one] == [len(result.examples) for result in one]
    return [(r.fold, r.seed, r.examples.tolist(), r.predictions, r.best_epoch, r.valid_score) for r in one] == [
        (r.fold, r.seed, r.examples.tolist(), r.predictions, r.best_epoch, r.valid_score) for r in other
    ]


if __name__ == "__main__":
    tokenizer, model = fresh_model()
    torch.set_num_threads(1)
    teach_to_copy(model, tokenizer)
    save_file({key: tensor.half() for key, tensor in model.state_dict().items() if key != "lm_head.weight"}, TAUGHT)
