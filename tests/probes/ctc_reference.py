"""A toy language spoken in frames, and one transcript head trained by torch's own layers, CTC loss and optimiser."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xares_onnx.models.ctc import CtcHead
from xares_onnx.probes.ctc import train_ctc
from xares_onnx.probes.sweep import Sweep
from xares_onnx.probes.training import HeadResult, Rows

DIM = 12
SILENCE = "_"  # the sound of no character
ALPHABET = "abcd "


@dataclass(frozen=True)
class Settings:
    epochs: int
    batch_size: int = 4
    learning_rate: float = 0.03


@dataclass(frozen=True)
class Corpus:
    frames: Sequence[NDArray[Any]]
    transcripts: list[str]
    folds: list[Rows]

    def train(
        self, settings: Settings | Sweep, seeds: Sequence[int] = (0,), folds: int | None = None, **more: Any
    ) -> list[HeadResult]:
        return train_ctc(self.frames, self.transcripts, self.folds[:folds], settings, seeds, **more)


def rows(*parts: Sequence[int]) -> Rows:
    return Rows(*(np.array(part, np.int64) for part in parts))


def spoken(text: str, sounds: dict[str, NDArray[np.float64]], noise: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Each character is one to three frames of its sound; equal neighbours have silence between them, others may."""
    said = [SILENCE]
    for before, character in zip(["", *list(text)], text, strict=False):
        said += [SILENCE] * int(rng.integers(before == character, 3)) + [character] * int(rng.integers(1, 4))
    clean = np.stack([sounds[sound] for sound in said])
    # LayerNorm must matter: scale and offset of each frame are arbitrary.
    scale = rng.uniform(0.5, 20, (len(said), 1))
    return ((clean + noise * rng.standard_normal(clean.shape)) * scale + 3).astype(np.float32)


def corpus(sizes: Sequence[tuple[int, int, int]], *, noise: float = 0.3, seed: int = 0) -> Corpus:
    """Folds of (train, valid, test) clips of a toy language."""
    rng = np.random.default_rng(seed)
    sounds = {character: rng.standard_normal(DIM) for character in ALPHABET + SILENCE}
    transcripts = []
    for _ in range(max(sum(size) for size in sizes)):
        words = ["".join(rng.choice(list("abcd"), rng.integers(1, 5))) for _ in range(rng.integers(1, 4))]
        transcripts.append(" ".join(words))
    folds = []
    for train, valid, test in sizes:
        order = rng.permutation(len(transcripts))
        folds.append(rows(*np.split(order[: train + valid + test], [train, train + valid])))
    return Corpus([spoken(text, sounds, noise, rng) for text in transcripts], transcripts, folds)


# ---------------------------------------------------------------- references


def torch_loss(
    logits: Tensor, lengths: Sequence[int], targets: Sequence[NDArray[np.int64]], reduction: str = "mean"
) -> Tensor:
    """torch's CTC loss of clips whose frames follow each other."""
    padded = nn.utils.rnn.pad_sequence(list(logits.split(list(lengths))))
    return nn.functional.ctc_loss(
        padded.log_softmax(dim=2),
        torch.from_numpy(np.concatenate(targets)),
        torch.tensor(lengths),
        torch.tensor([len(target) for target in targets]),
        reduction=reduction,
        zero_infinity=True,
    )


def spelt(path: Sequence[int]) -> list[int]:
    return [number for number, _ in itertools.groupby(path) if number != 0]


def wrong_words(reference: str, hypothesis: str) -> int:
    wanted, got = reference.split(), hypothesis.split()
    row = list(range(len(got) + 1))
    for i, word in enumerate(wanted, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(got, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
    return row[-1]


def character_accuracy(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Characters are words of a text in which every one stands alone; a space is written as one that is no letter."""

    def spread(text: str) -> str:
        return " ".join("_".join(text.split()))

    wrong = sum(wrong_words(spread(r), spread(h)) for r, h in zip(references, hypotheses, strict=True))
    return 1 - wrong / sum(len(spread(r).split()) for r in references)


def word_accuracy(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    wrong = sum(wrong_words(r, h) for r, h in zip(references, hypotheses, strict=True))
    return 1 - wrong / sum(len(r.split()) for r in references)


Parameters = dict[str, NDArray[np.float32]]


@dataclass
class Reference:
    initial: Parameters
    scores: list[float] = field(default_factory=list)  # of validation, an epoch each
    last: Parameters = field(default_factory=dict)
    best: Parameters = field(default_factory=dict)
    hypotheses: list[str] = field(default_factory=list)


def train_one(c: Corpus, fold: int, seed: int, settings: Settings, *, constant_rate: bool = False) -> Reference:
    """One head, trained by autograd. The draws are the probe's: weights, biases, then a permutation an epoch."""
    part = c.folds[fold]
    alphabet = sorted({character for clip in part.train for character in c.transcripts[clip]})
    rng = np.random.default_rng([seed, fold])
    norm, linear = nn.LayerNorm(DIM), nn.Linear(DIM, len(alphabet) + 1)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(rng.uniform(-(DIM**-0.5), DIM**-0.5, (len(alphabet) + 1, DIM))))
        linear.bias.copy_(torch.tensor(rng.uniform(-(DIM**-0.5), DIM**-0.5, len(alphabet) + 1)))
    model = nn.Sequential(norm, linear)

    def parameters() -> Parameters:
        named = {"scale": norm.weight, "shift": norm.bias, "weight": linear.weight, "bias": linear.bias}
        return {name: value.detach().numpy().copy() for name, value in named.items()}

    def hypothesis(clip: int) -> str:
        with torch.no_grad():
            path = model(torch.from_numpy(c.frames[clip]).float()).argmax(dim=1).tolist()
        return "".join(alphabet[number - 1] for number in spelt(path))

    found = Reference(parameters())
    adam = torch.optim.Adam(model.parameters())
    best = -math.inf
    for epoch in range(settings.epochs):
        for group in adam.param_groups:
            curve = 1 if constant_rate else 0.55 + 0.45 * math.cos(math.pi * epoch / settings.epochs)
            group["lr"] = settings.learning_rate * curve
        order = rng.permutation(part.train)
        for start in range(0, len(order), settings.batch_size):
            batch = order[start : start + settings.batch_size]
            logits = model(torch.from_numpy(np.concatenate([c.frames[clip] for clip in batch])).float())
            targets = [np.array([1 + alphabet.index(character) for character in c.transcripts[clip]]) for clip in batch]
            adam.zero_grad()
            torch_loss(logits, [len(c.frames[clip]) for clip in batch], targets).backward()
            adam.step()
        if len(part.valid):
            found.scores.append(
                character_accuracy([c.transcripts[i] for i in part.valid], [hypothesis(i) for i in part.valid])
            )
        if not found.scores or found.scores[-1] > best:
            best = found.scores[-1] if found.scores else best
            found.best = parameters()
            found.hypotheses = [hypothesis(clip) for clip in sorted(part.test)]
    found.last = parameters()
    return found


def parameters_of(head: CtcHead) -> Parameters:
    return {
        "scale": head.scale[0].numpy(),
        "shift": head.shift[:, 0].numpy(),
        "weight": head.weight.numpy(),
        "bias": head.bias[:, 0].numpy(),
    }


def bytes_of(made: Sequence[CtcHead]) -> list[list[bytes]]:
    return [[parameter.numpy().tobytes() for parameter in head.parameters] for head in made]
