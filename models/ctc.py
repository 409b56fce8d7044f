"""The transcript probe: LayerNorm, then one linear layer, on every frame, trained by connectionist temporal classification.

CTC: Graves et al., "Connectionist Temporal Classification: Labelling Unsegmented Sequence Data with Recurrent Neural
Networks", ICML 2006. Class 0 is the blank, the others are characters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BLANK = 0

Classes = npt.NDArray[np.int64]


class CtcHead:
    """LayerNorm(dim) -> Linear(dim, classes), for frames that are normalised already by `models.linear.normalised`.

    The affine part of the LayerNorm is folded into the linear layer, forwards and backwards, so that the only work that
    grows with the number of frames is one matrix product each way.
    """

    def __init__(self, dim: int, classes: int, rng: np.random.Generator) -> None:
        """Drawn as torch draws an `nn.Linear`: first the weights, then the biases, uniform within 1/sqrt(dim)."""
        bound = 1 / math.sqrt(dim)
        self.scale = torch.ones(1, dim)
        self.shift = torch.zeros(dim, 1)
        self.weight = torch.from_numpy(rng.uniform(-bound, bound, (classes, dim))).float()
        self.bias = torch.from_numpy(rng.uniform(-bound, bound, (classes, 1))).float()
        self.parameters = (self.scale, self.shift, self.weight, self.bias)
        self.gradients = tuple(torch.zeros_like(parameter) for parameter in self.parameters)

    def logits(self, x: Tensor) -> Tensor:
        """Normalised frames (frames, dim) to logits (frames, classes)."""
        bias = torch.addmm(self.bias, self.weight, self.shift)
        # The small side first: the product of a few classes with many frames takes two thirds of the time that way.
        return torch.addmm(bias, self.scale * self.weight, x.T).T.contiguous()

    def backward(self, x: Tensor, logits_gradient: Tensor) -> None:
        """Fill `gradients`, from the loss's gradient (frames, classes) at the logits of `x`."""
        scale, shift, weight, bias = self.gradients
        product = logits_gradient.T @ x
        torch.sum(logits_gradient.T, dim=1, keepdim=True, out=bias)
        torch.addmm(self.scale * product, bias, self.shift.T, out=weight)
        torch.mm(self.weight.T, bias, out=shift)
        torch.sum(self.weight * product, dim=0, keepdim=True, out=scale)


class Workspace:
    """float32 tensors whose memory is used again at every step: fresh memory costs more than the work that is done in it."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor with any content; it shares its memory with the last one of that name."""
        size = math.prod(shape)
        if name not in self._memory or len(self._memory[name]) < size:
            self._memory[name] = torch.empty(size)
        return self._memory[name][:size].view(shape)


def ctc_gradient(
    logits: Tensor, lengths: Sequence[int], targets: Sequence[Classes], workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """CTC losses (clips,), each divided by its number of characters, and the gradient (frames, classes) of their mean.

    `logits` (frames, classes) has the frames of all clips one after another, `lengths` of them each; `targets` the classes
    of each clip's characters, at least one. A clip with too few frames for its characters has loss 0 and gradient 0.

    The gradient is softmax minus the posterior of each class in each frame (equation 16 of the paper). Posteriors come from
    one recursion over time, in logarithms, over the clips as they are and, as backward variables, over the same clips with
    time and characters reversed. What all states of a frame share cancels in them, so it runs on odds against the blank:
    a blank then costs nothing, and a padding frame, which only blanks can pass, leaves every path where it is.
    """
    clips, classes = len(lengths), logits.shape[1]
    frames, characters = max(1, *lengths), max(map(len, targets))
    sizes = torch.tensor([len(target) for target in targets])
    ends = np.cumsum(lengths)
    parts = [slice(end - length, end) for end, length in zip(ends.tolist(), lengths, strict=True)]
    padded = torch.full((characters, clips), BLANK)
    for n, target in enumerate(targets):
        padded[: len(target), n] = torch.from_numpy(target)
    column = (padded + classes * torch.arange(clips)).flatten()  # of each character, in (frames, clips * classes)

    odds = logits - logits[:, BLANK : BLANK + 1]
    by_time = workspace.take("by time", frames, clips, classes)
    for n, (length, part) in enumerate(zip(lengths, parts, strict=True)):
        by_time[:length, n] = odds[part]
    emissions = workspace.take("emissions", frames, characters * clips)
    torch.index_select(by_time.view(frames, -1), 1, column, out=emissions)
    for n, length in enumerate(lengths):
        emissions[length:, n::clips] = -torch.inf

    labels = workspace.take("labels", frames, 2, (characters + 1) * clips)
    labels[:, :, :clips] = -torch.inf
    labels[:, 0, clips:] = emissions
    labels.numpy()[:, 1, clips:] = emissions.numpy()[::-1, ::-1]  # torch has no view that is reversed
    blanks = torch.full((2, characters + 1, clips), -torch.inf)
    blanks[0, 0] = 0
    blanks[1, characters - sizes.flip(0), torch.arange(clips)] = 0
    both = torch.stack([padded, padded.flip(0, 1)])
    differs = torch.ones_like(blanks, dtype=torch.bool)
    differs[:, 1:-1] = both[:, 1:] != both[:, :-1]
    last = _advance(blanks.view(-1), labels.view(frames, -1), differs.view(-1), clips).view_as(blanks)
    likelihood = last[0, sizes, torch.arange(clips)]
    possible = likelihood != -torch.inf

    posterior = workspace.take("posterior", frames, characters * clips)
    alpha, beta = labels[:, 0, clips:].numpy(), labels[:, 1, clips:].numpy()[::-1, ::-1]
    np.add(alpha, beta, out=posterior.numpy())
    posterior.sub_(emissions).sub_(torch.where(possible, likelihood, 0).repeat(characters)).clamp_(max=0)
    np.exp(posterior.numpy(), out=posterior.numpy())  # torch's takes 20 times as long where the result is tiny
    occupancy = workspace.take("occupancy", frames, clips * classes).zero_()
    occupancy.index_add_(1, column, posterior)
    occupancy = occupancy.view(frames, clips, classes)
    occupancy[:, :, BLANK] = 1 - occupancy[:, :, BLANK + 1 :].sum(dim=2)

    log_probabilities = logits.log_softmax(dim=1)
    gradient = log_probabilities.exp()
    losses = -likelihood
    weight = torch.where(possible, 1 / (clips * sizes), 0)
    for n, (length, part) in enumerate(zip(lengths, parts, strict=True)):
        losses[n] -= log_probabilities[part, BLANK].sum()
        gradient[part].sub_(occupancy[:length, n]).mul_(weight[n])
    return torch.where(possible, losses / sizes, 0), gradient


def _advance(blanks: Tensor, labels: Tensor, differs: Tensor, clips: int) -> Tensor:
    """Turn the emissions `labels` into forward variables, in place, and give those of the blanks behind the last frame.

    All are logarithms, in flat vectors of (2 directions, characters + 1, clips). Row i of `blanks` is the blank before
    character i; row i of a frame of `labels` is character i - 1, so that row i of both precedes character i, and row 0 is
    never reached. `differs`: character i is not character i - 1, so it may follow without a blank. The shift by one row runs
    from the last row of one direction into row 0 of the other, which stays at log 0.
    """
    previous = torch.full_like(blanks, -torch.inf)
    previous_labels = previous[clips:]
    reached, source, arriving = torch.empty_like(blanks), torch.empty_like(blanks), torch.empty_like(previous_labels)
    source_before = source[:-clips]
    for frame, frame_labels in zip(labels.unbind(), labels[:, clips:].unbind(), strict=True):
        torch.logaddexp(blanks, previous, out=reached)
        torch.where(differs, reached, blanks, out=source)
        torch.logaddexp(previous_labels, source_before, out=arriving)
        frame_labels += arriving
        previous, previous_labels = frame, frame_labels
        blanks, reached = reached, blanks
    return torch.logaddexp(blanks, previous)


def collapse(path: Classes) -> Classes:
    """The characters that a path, one class a frame (frames,), spells: repeats collapsed, then blanks dropped."""
    kept: Classes = path[(path != BLANK) & (np.diff(path, prepend=BLANK) != 0)]
    return kept
