"""The retrieval head: an audio and a text tower into one space, and the contrastive losses that train them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, embedding_bag, gelu, normalize

WIDTH = 1024
_TEMPERATURE = 0.07  # initial


class RetrievalHead(nn.Module):
    """Audio: LayerNorm(dim) -> Linear(dim, 1024) -> GELU -> Linear(1024, 1024).
    Text: Embedding(vocabulary, 1024) -> Linear(1024, 1024) -> GELU -> Linear(1024, 1024), then the mean over the tokens.

    The audio embeddings are frozen, so they come normalised (`models.linear.normalised`) and this class has only the
    affine part of LayerNorm. The text tower's output for a token does not depend on its neighbours, so each token of a batch
    goes through it once; and its last layer commutes with the mean, so it runs once per caption.
    """

    def __init__(self, dim: int, vocabulary: int, tokens: Tensor, rng: np.random.Generator) -> None:
        """Keep only the embeddings of `tokens`, numbers below `vocabulary`: captions hold positions in `tokens`.

        A token that no caption has is never read, nor moved, because its gradient is always 0. Layers are drawn as torch
        draws them, each as (inputs, outputs) and weight before bias: both layers of the audio tower, the embedding of
        the whole vocabulary (normal, float32), both layers of the text tower (uniform within 1/sqrt(inputs)).
        """
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.audio_hidden, self.audio_output = _Linear(dim, rng), _Linear(WIDTH, rng)
        drawn = torch.from_numpy(rng.standard_normal((vocabulary, WIDTH), np.float32))
        self.embedding = nn.Parameter(drawn[tokens])
        self.text_hidden, self.text_output = _Linear(WIDTH, rng), _Linear(WIDTH, rng)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / _TEMPERATURE)))

    def audio(self, x: Tensor) -> Tensor:
        """Normalised embeddings (clips, dim) to (clips, 1024)."""
        hidden: Tensor = self.audio_hidden(torch.addcmul(self.shift, x, self.scale))
        output: Tensor = self.audio_output(gelu(hidden))
        return output

    def text(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """Captions to (captions, 1024): their tokens (tokens,) one after another, and the start of each (captions,)."""
        unique, places = torch.unique(tokens, return_inverse=True)
        hidden: Tensor = gelu(self.text_hidden(embedding(unique, self.embedding)))
        output: Tensor = self.text_output(embedding_bag(places, hidden, starts, mode="mean"))
        return output


class _Linear(nn.Module):
    def __init__(self, inputs: int, rng: np.random.Generator) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight, self.bias = (nn.Parameter(_uniform(rng, shape, bound)) for shape in ((inputs, WIDTH), (WIDTH,)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], bound: float) -> Tensor:
    return torch.from_numpy(rng.uniform(-bound, bound, shape)).float()


def cosine_loss(audio: Tensor, text: Tensor, log_temperature: Tensor, clips: Tensor) -> Tensor:
    """Symmetric InfoNCE of cosines, over pairs (n, 1024) and (n, 1024); `clips` (n,) is the clip of each pair.

    Pairs of the same clip are not each other's negatives: each caption of a clip describes all its crops.
    """
    logits = log_temperature.exp() * (normalize(audio) @ normalize(text).T)
    same = clips[:, None] == clips
    return _symmetric_cross_entropy(logits.masked_fill(same.fill_diagonal_(False), -math.inf))


def product_loss(audio: Tensor, text: Tensor, log_temperature: Tensor) -> Tensor:
    """X-ARES's loss: symmetric InfoNCE of dot products, of pairs (n, 1024) and (n, 1024), plus mean |E| / ||E|| of both."""
    loss = _symmetric_cross_entropy(log_temperature.exp() * (audio @ text.T))
    for matrix in (audio, text):
        loss = loss + matrix.abs().mean() / torch.linalg.vector_norm(matrix)
    return loss


def _symmetric_cross_entropy(logits: Tensor) -> Tensor:
    diagonal = torch.arange(len(logits))
    return (cross_entropy(logits, diagonal) + cross_entropy(logits.T, diagonal)) / 2
