"""The transcript probe: LayerNorm, then one linear layer, on every frame, trained by connectionist temporal classification.

CTC: Graves et al., "Connectionist Temporal Classification: Labelling Unsegmented Sequence Data with Recurrent Neural
Networks", ICML 2006. Class 0 is the blank, the others are characters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BLANK = 0

Classes = npt.NDArray[np.int64]
Array = npt.NDArray[Any]


class CtcHead:
    """LayerNorm(dim) -> Linear(dim, classes), on frames that `models.linear.normalised` has normalised.

    The affine part of the LayerNorm is folded into the linear layer, forwards and backwards, so that the only work that
    grows with the number of frames is one matrix product each way.
    """

    def __init__(self, dim: int, classes: int, rng: np.random.Generator) -> None:
        """Draw weights, then biases, as torch draws those of an `nn.Linear`: uniform within 1/sqrt(dim)."""
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
        # The small side goes first: so the product of a few classes with many frames takes two thirds of the time.
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
    """float32 tensors that reuse their memory at every step: fresh memory costs more than the work in it."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor with arbitrary content, in the memory of the last one of that name."""
        size = math.prod(shape)
        if name not in self._memory or len(self._memory[name]) < size:
            self._memory[name] = torch.empty(size)
        return self._memory[name][:size].view(shape)


def ctc_gradient(
    logits: Tensor, lengths: Sequence[int], targets: Sequence[Classes], workspace: Workspace
) -> tuple[Tensor, Tensor]:
    """CTC losses of a batch of clips, and the gradient of their mean.

    The gradient is softmax minus the posterior of each class in each frame (equation 16 of the paper). Posteriors come from
    one recursion over time, in logarithms, over the clips as they are and, as backward variables, over the same clips with
    time and characters reversed. A factor that all states of a frame share cancels in them, so the recursion runs on odds
    against the blank: a blank then costs nothing, and a padding frame, which only blanks can pass, leaves every path where
    it is.

    Args:
        logits: (frames, classes), the frames of all clips one after another.
        lengths: Frames of each clip.
        targets: Classes of each clip's characters, at least one per clip.
        workspace: Memory for intermediate results.

    Returns:
        Losses (clips,), each divided by its number of characters, and the gradient (frames, classes) of their mean. A clip
        with fewer frames than its characters need has loss 0 and gradient 0.
    """
    batch = _Batch.of(lengths, targets, logits.shape[1])
    emissions = _emissions(logits - logits[:, BLANK : BLANK + 1], batch, workspace)
    paths, likelihood = _forward_and_backward(emissions, batch, workspace)
    possible = likelihood != -torch.inf
    occupancy = _occupancy(paths, emissions, torch.where(possible, likelihood, 0), batch, workspace)

    log_probabilities = logits.log_softmax(dim=1)
    gradient = log_probabilities.exp()
    losses = -likelihood
    weight = torch.where(possible, 1 / (batch.clips * batch.sizes), 0)
    for n, part in enumerate(batch.parts):
        losses[n] -= log_probabilities[part, BLANK].sum()  # the likelihood is that of odds against the blank
        gradient[part].sub_(occupancy[: lengths[n], n]).mul_(weight[n])
    return torch.where(possible, losses / batch.sizes, 0), gradient


class _Batch(NamedTuple):
    """How the clips of a batch lie side by side, padded to the longest one."""

    clips: int
    classes: int
    frames: int  # of the longest clip
    characters: int  # of the longest target
    sizes: Tensor  # (clips,) characters of each target
    parts: list[slice]  # each clip's rows of the logits
    padded: Tensor  # (characters, clips) classes, blanks behind a target's end

    @classmethod
    def of(cls, lengths: Sequence[int], targets: Sequence[Classes], classes: int) -> _Batch:
        clips, characters = len(lengths), max(map(len, targets))
        ends = np.cumsum(lengths).tolist()
        padded = torch.full((characters, clips), BLANK)
        for n, target in enumerate(targets):
            padded[: len(target), n] = torch.from_numpy(target)
        return cls(
            clips=clips,
            classes=classes,
            frames=max(1, *lengths),
            characters=characters,
            sizes=torch.tensor([len(target) for target in targets]),
            parts=[slice(end - length, end) for end, length in zip(ends, lengths, strict=True)],
            padded=padded,
        )

    @property
    def columns(self) -> Tensor:
        """(characters * clips,) the column of each character in a matrix (frames, clips * classes)."""
        return (self.padded + self.classes * torch.arange(self.clips)).flatten()


def _emissions(odds: Tensor, batch: _Batch, workspace: Workspace) -> Tensor:
    """Odds (frames, classes) to those of each clip's characters, (frames, characters * clips); log 0 in padding frames."""
    by_time = workspace.take("by time", batch.frames, batch.clips, batch.classes)
    for n, part in enumerate(batch.parts):
        by_time[: part.stop - part.start, n] = odds[part]
    emissions = workspace.take("emissions", batch.frames, batch.characters * batch.clips)
    torch.index_select(by_time.view(batch.frames, -1), 1, batch.columns, out=emissions)
    for n, part in enumerate(batch.parts):
        emissions[part.stop - part.start :, n :: batch.clips] = -torch.inf
    return emissions


def _forward_and_backward(emissions: Tensor, batch: _Batch, workspace: Workspace) -> tuple[tuple[Array, Array], Tensor]:
    """Forward and backward variables of the characters, each (frames, characters * clips), and log likelihoods (clips,).

    Both directions advance in one recursion. Direction 0 is the batch as it is. Direction 1 is reversed in time, characters
    and clips, which a flat array reverses all at once. There a shorter target has its padding in front, so its paths start
    at the blank behind the padding.
    """
    clips, characters = batch.clips, batch.characters
    labels = workspace.take("labels", batch.frames, 2, (characters + 1) * clips)
    labels[:, :, :clips] = -torch.inf  # row 0 precedes the first character
    labels[:, 0, clips:] = emissions
    labels.numpy()[:, 1, clips:] = emissions.numpy()[::-1, ::-1]  # torch has no reversed views

    blanks = torch.full((2, characters + 1, clips), -torch.inf)
    blanks[0, 0] = 0
    blanks[1, characters - batch.sizes.flip(0), torch.arange(clips)] = 0

    both = torch.stack([batch.padded, batch.padded.flip(0, 1)])
    differs = torch.ones_like(blanks, dtype=torch.bool)
    differs[:, 1:-1] = both[:, 1:] != both[:, :-1]

    last = _advance(blanks.view(-1), labels.view(batch.frames, -1), differs.view(-1), clips).view_as(blanks)
    forward, backward = labels[:, 0, clips:].numpy(), labels[:, 1, clips:].numpy()[::-1, ::-1]
    return (forward, backward), last[0, batch.sizes, torch.arange(clips)]


def _occupancy(
    paths: tuple[Array, Array], emissions: Tensor, likelihood: Tensor, batch: _Batch, workspace: Workspace
) -> Tensor:
    """The posterior (frames, clips, classes) of each class in each frame, from forward and backward variables."""
    forward, backward = paths
    posterior = workspace.take("posterior", batch.frames, batch.characters * batch.clips)
    np.add(forward, backward, out=posterior.numpy())
    posterior.sub_(emissions)  # which both directions have counted
    posterior.sub_(likelihood.repeat(batch.characters)).clamp_(max=0)
    np.exp(posterior.numpy(), out=posterior.numpy())  # torch's takes 20 times as long if the result is tiny

    occupancy = workspace.take("occupancy", batch.frames, batch.clips * batch.classes).zero_()
    occupancy.index_add_(1, batch.columns, posterior)
    occupancy = occupancy.view(batch.frames, batch.clips, batch.classes)
    occupancy[:, :, BLANK] = 1 - occupancy[:, :, BLANK + 1 :].sum(dim=2)
    return occupancy


def _advance(blanks: Tensor, labels: Tensor, differs: Tensor, clips: int) -> Tensor:
    """Turn emissions into forward variables, in place, and return those of the blanks behind the last frame.

    All are logarithms, in flat vectors of (2 directions, characters + 1, clips). Row i of `blanks` is the blank before
    character i; row i of a frame of `labels` is character i - 1, so that row i of both precedes character i, and no path
    reaches row 0. The shift by one row runs from the last row of one direction into row 0 of the other; it stays at log 0.

    Args:
        blanks: Log probability of a path that starts at each blank; overwritten.
        labels: (frames, states) emissions of the characters, to be turned into their forward variables.
        differs: Whether character i differs from character i - 1, so that it may follow without a blank.
        clips: Clips per row.
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
    """The characters that a path spells, one class per frame (frames,): repeats collapsed, then blanks dropped."""
    kept: Classes = path[(path != BLANK) & (np.diff(path, prepend=BLANK) != 0)]
    return kept
