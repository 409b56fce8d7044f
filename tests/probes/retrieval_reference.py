"""Clips with captions, a retrieval head of torch's own layers on every token of a padded batch, and recalls by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from xares_onnx.models import retrieval as towers
from xares_onnx.probes.retrieval import train_retrieval
from xares_onnx.probes.sweep import Sweep
from xares_onnx.probes.training import HeadResult, Rows
from xares_onnx.probes.wordpiece import WordPiece

DIM = 6
ARITHMETICS = ["corrected", "xares"]
ANIMALS = ["dog", "cat", "bird", "horse", "frog"]
SOUNDS = ["barking", "singing", "walking", "eating", "snoring"]


@dataclass(frozen=True)
class Settings:
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Problem:
    embeddings: NDArray[np.float32]
    captions: list[list[str]]
    clip_of_crop: NDArray[np.int64]
    folds: list[Rows]

    def train(
        self,
        arithmetic: Any,
        settings: Settings | Sweep,
        seeds: Sequence[int] = (0,),
        folds: int | None = None,
        **options: Any,
    ) -> list[HeadResult]:
        given = {"vocabulary": None} | options
        data = self.embeddings, self.captions, self.clip_of_crop, self.folds[:folds]
        return train_retrieval(*data, settings, seeds, arithmetic=arithmetic, **given)


def problem(sizes: Sequence[tuple[int, int, int]], *, captions: int | tuple[int, int] = (1, 4), seed: int = 0) -> Problem:
    """Folds of (train, valid, test) clips of 1 to 3 crops; what a caption names shows in the embedding, beside noise."""
    rng = np.random.default_rng(seed)
    clips = max(sum(size) for size in sizes)
    animals, sounds = rng.integers(0, len(ANIMALS), clips), rng.integers(0, len(SOUNDS), clips)
    low, high = (captions, captions) if isinstance(captions, int) else captions
    texts = [
        [
            f"{rng.choice(['A', 'the', 'one old', 'some'])} {ANIMALS[animal]} {rng.choice(['is', 'was'])} {SOUNDS[sound]}."
            for _ in range(rng.integers(low, high + 1))
        ]
        for animal, sound in zip(animals, sounds, strict=True)
    ]
    clip_of_crop = np.repeat(np.arange(clips), rng.integers(1, 4, clips))
    features = np.concatenate([rng.standard_normal((5, DIM))[animals], rng.standard_normal((5, DIM))[sounds]]).reshape(
        2, -1, DIM
    )
    embeddings = features.sum(axis=0)[clip_of_crop] + 0.5 * rng.standard_normal((len(clip_of_crop), DIM))
    embeddings = embeddings * rng.uniform(0.5, 20, (len(clip_of_crop), 1)) + 3  # LayerNorm must matter
    folds = []
    for train, valid, test in sizes:
        parts = np.split(rng.permutation(clips)[: train + valid + test], [train, train + valid])
        folds.append(Rows(*(np.flatnonzero(np.isin(clip_of_crop, part)) for part in parts)))
    return Problem(embeddings.astype(np.float32), texts, clip_of_crop, folds)


# ---------------------------------------------------------------- the reference


class Towers(nn.Module):
    """Torch's own layers over every token of a padded batch."""

    def __init__(self, vocabulary: int, rng: np.random.Generator) -> None:
        super().__init__()
        width = towers.WIDTH
        self.norm = nn.LayerNorm(DIM)
        self.audio_mlp = nn.Sequential(nn.Linear(DIM, width), nn.GELU(), nn.Linear(width, width))
        self.embedding = nn.Embedding(vocabulary, width)
        self.text_mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.log_temperature = nn.Parameter(torch.tensor(1 / 0.07).log())
        with torch.no_grad():
            self._draw(self.audio_mlp, rng)
            self.embedding.weight.copy_(torch.from_numpy(rng.standard_normal((vocabulary, width), np.float32)))
            self._draw(self.text_mlp, rng)

    @staticmethod
    def _draw(layers: nn.Sequential, rng: np.random.Generator) -> None:
        for layer in layers:
            if isinstance(layer, nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                layer.weight.copy_(torch.from_numpy(rng.uniform(-bound, bound, layer.weight.T.shape).T))
                layer.bias.copy_(torch.from_numpy(rng.uniform(-bound, bound, len(layer.bias))))

    def audio(self, x: Tensor) -> Tensor:
        output: Tensor = self.audio_mlp(self.norm(x))
        return output

    def text(self, encoded: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, encoded))
        padded = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in encoded])
        mask = torch.tensor([[1.0] * len(tokens) + [0.0] * (longest - len(tokens)) for tokens in encoded])[:, :, None]
        output: Tensor = (self.text_mlp(self.embedding(padded)) * mask).sum(1) / mask.sum(1)
        return output

    def named(self) -> dict[str, NDArray[np.float32]]:
        """By the names of `RetrievalHead`."""
        linears = {"audio_hidden": self.audio_mlp[0], "audio_output": self.audio_mlp[2]}
        linears |= {"text_hidden": self.text_mlp[0], "text_output": self.text_mlp[2]}
        found = {"scale": self.norm.weight, "shift": self.norm.bias, "embedding": self.embedding.weight}
        found["log_temperature"] = self.log_temperature
        for name, layer in linears.items():
            found |= {f"{name}.weight": layer.weight.T, f"{name}.bias": layer.bias}
        return {name: value.detach().numpy().copy() for name, value in found.items()}


def loss_by_hand(audio: Tensor, text: Tensor, log_temperature: Tensor, clips: Sequence[int], arithmetic: str) -> Tensor:
    """Softmax by softmax."""
    if arithmetic == "corrected":
        audio, text = audio / audio.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)
    terms = []
    for ours, theirs in ((audio, text), (text, audio)):
        logits = log_temperature.exp() * ours @ theirs.T
        for i in range(len(clips)):
            negatives = [j for j in range(len(clips)) if j != i and (arithmetic == "xares" or clips[j] != clips[i])]
            terms.append(logits[i, [i, *negatives]].logsumexp(0) - logits[i, i])
    loss = torch.stack(terms).mean()
    if arithmetic == "xares":
        loss = loss + sum(e.abs().mean() / (e**2).sum().sqrt() for e in (audio, text))
    return loss


def ranks_by_hand(similarities: NDArray[Any]) -> NDArray[np.int64]:
    """The rank of each column in its row, from 0, the larger first and of equal ones the earlier."""
    return np.array(
        [[sorted(range(len(row)), key=lambda j: (-row[j], j)).index(k) for k in range(len(row))] for row in similarities]
    )


def recalls_by_hand(audio: NDArray[Any], texts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """`recalls` for the vectors of each clip's captions, (captions, dim) a clip."""
    # One by one, as a matrix product may round equal ones differently.
    similarities = np.array([[(a * t).sum() for t in np.concatenate(texts)] for a in audio])
    owners = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
    found = []
    for clip in range(len(texts)):
        own = np.flatnonzero(owners == clip)
        to_audio = np.array([ranks_by_hand(similarities.T[[caption]])[0, clip] for caption in own])
        to_text = ranks_by_hand(similarities[[clip]])[0, own]
        row = [int((to_audio < 1).sum()), len(own), int((to_text < 1).any())]
        for rank in (5, 10):
            row += [int((to_audio < rank).sum()), int((to_text < rank).any())]
        found.append(row)
    return np.array(found)


def recall_at_1_of_xares(audio: NDArray[Any], text: NDArray[Any], captions: int) -> float:
    """Its definition, on an audio and a text vector for each caption: an audio is repeated for each of its captions.

    From an audio the best rank among its captions counts; from a caption, its audio's rank among the audios.
    """
    similarities = audio @ text.T
    order = np.argsort(-similarities[::captions], axis=1, kind="stable")
    best = [min(np.flatnonzero(row // captions == clip)) for clip, row in enumerate(order)]
    order = np.argsort(-similarities.T[:, ::captions], axis=1, kind="stable")
    ranks = [list(row).index(caption // captions) for caption, row in enumerate(order)]
    return float((np.mean(np.array(best) < 1) + np.mean(np.array(ranks) < 1)) / 2)


def score(predictions: NDArray[np.int64]) -> float:
    return float(predictions[:, 0].sum() / predictions[:, 1].sum() + predictions[:, 2].mean()) / 2


@dataclass
class Reference:
    initial: dict[str, NDArray[np.float32]]
    scores: list[float] = field(default_factory=list)  # of validation, an epoch each
    best: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    examples: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    predictions: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def train_one(
    p: Problem,
    fold: int,
    seed: int,
    settings: Settings,
    arithmetic: str,
    vocabulary: WordPiece,
    *,
    constant_rate: bool = False,
) -> Reference:
    rows = p.folds[fold]
    rng = np.random.default_rng([seed, fold])
    towers = Towers(vocabulary.size, rng)
    pairs = [(crop, caption) for crop in rows.train for caption in p.captions[p.clip_of_crop[crop]]]
    x = torch.from_numpy(p.embeddings)

    def predict(crops: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        owners = p.clip_of_crop if arithmetic == "corrected" else np.arange(len(p.clip_of_crop))
        examples = np.unique(owners[crops])
        vectors, texts = [], []
        with torch.no_grad():
            for example in examples:
                mine = crops[owners[crops] == example]
                mean = normalize(towers.audio(x[mine])).mean(0)
                vectors.append((mean / mean.norm()).numpy())
                encoded = [vocabulary.encode(caption) for caption in p.captions[p.clip_of_crop[mine[0]]]]
                texts.append(np.concatenate([normalize(towers.text([tokens])).numpy() for tokens in encoded]))
        return examples, recalls_by_hand(np.stack(vectors), texts)

    found = Reference(towers.named())
    adam = torch.optim.Adam(towers.parameters())
    for epoch in range(settings.epochs):
        for group in adam.param_groups:
            curve = 1 if constant_rate else 0.55 + 0.45 * np.cos(np.pi * epoch / settings.epochs)
            group["lr"] = settings.learning_rate * curve
        order = rng.permutation(len(pairs))
        for start in range(0, len(order), settings.batch_size):
            batch = [pairs[i] for i in order[start : start + settings.batch_size]]
            audio = towers.audio(x[[crop for crop, _ in batch]])
            text = towers.text([vocabulary.encode(caption) for _, caption in batch])
            clips = [int(p.clip_of_crop[crop]) for crop, _ in batch]
            adam.zero_grad()
            loss_by_hand(audio, text, towers.log_temperature, clips, arithmetic).backward()
            adam.step()
        if len(rows.valid):
            found.scores.append(score(predict(rows.valid)[1]))
        if not len(rows.valid) or found.scores[-1] > max(found.scores[:-1], default=-1):
            found.best = towers.named()
            found.examples, found.predictions = predict(rows.test)
    return found


def training_captions(p: Problem, fold: int) -> list[str]:
    return [caption for clip in np.unique(p.clip_of_crop[p.folds[fold].train]) for caption in p.captions[clip]]
