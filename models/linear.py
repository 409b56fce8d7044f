"""The linear probe: LayerNorm, then one linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

_LARGE = 1e15  # the sum of the squares of a few thousand such values is near the largest number of float32


class LinearHeads:
    """`heads` independent copies of LayerNorm(dim) -> Linear(dim, classes), run as one batched product.

    The embeddings are frozen, so their normalisation to zero mean and unit variance is the same in every epoch: `normalised`
    does it once, and this class holds only the learnt parameters. The gradients are written out, into buffers that are
    allocated once: autograd's fresh tensors cost three times as much as the arithmetic.
    """

    def __init__(self, dim: int, classes: int, generators: Sequence[np.random.Generator]) -> None:
        """Draw each head from its own generator, as torch draws an `nn.Linear`: uniform within 1/sqrt(dim)."""
        heads, bound = len(generators), 1 / math.sqrt(dim)
        weight = np.stack([rng.uniform(-bound, bound, (dim, classes)) for rng in generators])
        bias = np.stack([rng.uniform(-bound, bound, (1, classes)) for rng in generators])
        self.scale = torch.ones(heads, 1, dim)
        self.shift = torch.zeros(heads, 1, dim)
        self.weight = torch.from_numpy(weight).float()
        self.bias = torch.from_numpy(bias).float()
        self.parameters = (self.scale, self.shift, self.weight, self.bias)
        self.gradients = tuple(torch.zeros_like(parameter) for parameter in self.parameters)

    def logits(self, x: Tensor) -> Tensor:
        """Normalised embeddings (n, batch, dim) to logits (n, batch, classes), for the first n heads."""
        n = len(x)
        return torch.baddbmm(self.bias[:n], torch.addcmul(self.shift[:n], x, self.scale[:n]), self.weight[:n])

    def backward(self, x: Tensor, logits_gradient: Tensor) -> None:
        """Fill `gradients` of the first n heads, from the loss's gradient (n, batch, classes) at the logits of `x`."""
        n = len(x)
        scale, shift, weight, bias = (gradient[:n] for gradient in self.gradients)
        affine = torch.addcmul(self.shift[:n], x, self.scale[:n])
        torch.bmm(affine.transpose(1, 2), logits_gradient, out=weight)
        torch.sum(logits_gradient, dim=1, keepdim=True, out=bias)
        affine_gradient = torch.bmm(logits_gradient, self.weight[:n].transpose(1, 2))
        torch.sum(affine_gradient, dim=1, keepdim=True, out=shift)
        torch.sum(affine_gradient.mul_(x), dim=1, keepdim=True, out=scale)

    def logits_of(self, head: int, x: Tensor) -> Tensor:
        """Normalised embeddings (examples, dim) to one head's logits (examples, classes)."""
        return torch.addmm(self.bias[head], torch.addcmul(self.shift[head], x, self.scale[head]), self.weight[head])


def normalised(embeddings: Tensor) -> Tensor:
    """LayerNorm without its affine part, over the last axis. Embeddings whose squares overflow are normalised in float64."""
    if embeddings.numel() and embeddings.abs().max() > _LARGE:
        return nn.functional.layer_norm(embeddings.double(), embeddings.shape[-1:]).to(embeddings.dtype)
    return nn.functional.layer_norm(embeddings, embeddings.shape[-1:])


def cross_entropy_gradient(logits: Tensor, classes: Tensor, weight: Tensor) -> Tensor:
    """Gradient at the logits (n, batch, classes) of the sum of cross-entropies, each times its `weight` (n, batch)."""
    gradient = logits.softmax(dim=2)
    gradient.scatter_add_(2, classes[:, :, None], torch.full((1, 1, 1), -1.0).expand(*classes.shape, 1))
    return gradient.mul_(weight[:, :, None])


def binary_cross_entropy_gradient(logits: Tensor, targets: Tensor, weight: Tensor, positive_weight: float = 1.0) -> Tensor:
    """Gradient at the logits (n, batch, classes) of binary cross-entropies: their means over classes, times `weight`.

    `targets` are 0 or 1; the loss of a 1 counts `positive_weight` times, as in torch's `BCEWithLogitsLoss(pos_weight)`.
    """
    positive = targets.to(logits.dtype) * positive_weight
    gradient = logits.sigmoid().mul_(positive + (1 - targets.to(logits.dtype))).sub_(positive)
    return gradient.mul_(weight[:, :, None] / logits.shape[-1])
