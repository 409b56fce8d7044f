"""The CTC loss, its gradient and the head's own, against torch, autograd and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from ctc_reference import DIM, spelt, torch_loss
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from xares_onnx.models.ctc import CtcHead, Workspace, collapse, ctc_gradient

clips_of_a_batch = st.lists(
    st.tuples(st.integers(0, 14), st.lists(st.integers(1, 3), min_size=1, max_size=6)), min_size=1, max_size=4
)


@given(clips_of_a_batch, st.integers(0, 99), st.sampled_from([0.1, 1, 8]))
def test_losses_and_gradient_are_torchs(clips: list[tuple[int, list[int]]], seed: int, spread: float) -> None:
    lengths, targets = [length for length, _ in clips], [np.array(target) for _, target in clips]
    lengths[-1] += sum(lengths) == 0  # torch wants a frame
    logits = spread * torch.from_numpy(np.random.default_rng(seed).standard_normal((sum(lengths), 4)))
    logits.requires_grad_()
    losses, gradient = ctc_gradient(logits.detach().float(), lengths, targets, Workspace())
    expected = torch_loss(logits, lengths, targets, "none") / torch.tensor([len(target) for target in targets])
    torch.testing.assert_close(losses.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    mean = torch_loss(logits, lengths, targets)
    torch.testing.assert_close(losses.mean().double(), mean.detach(), atol=1e-5, rtol=1e-5)
    mean.backward()
    torch.testing.assert_close(gradient.double(), logits.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", [[1], [1, 2], [2, 2], [1, 2, 1], [1, 1, 1], [2, 2, 1]])
@pytest.mark.parametrize("frames", [1, 3, 5, 6])
def test_the_likelihood_is_the_sum_over_every_path_that_spells_the_text(target: list[int], frames: int) -> None:
    probabilities = np.random.default_rng(frames).dirichlet([1, 1, 1], frames)
    paths = [path for path in itertools.product(range(3), repeat=frames) if spelt(path) == target]
    logits = torch.from_numpy(np.log(probabilities)).float() + 5  # logits need not be normalised
    losses, gradient = ctc_gradient(logits, [frames], [np.array(target)], Workspace())
    if not paths:
        assert losses.tolist() == [0]
        assert not gradient.any()
        return
    weights = np.array([math.prod(probabilities[t, number] for t, number in enumerate(path)) for path in paths])
    assert float(losses[0]) == pytest.approx(-math.log(weights.sum()) / len(target), abs=1e-5)
    posterior = np.zeros((frames, 3))
    for path, weight in zip(paths, weights / weights.sum(), strict=True):
        posterior[np.arange(frames), path] += weight
    np.testing.assert_allclose(gradient, (probabilities - posterior) / len(target), atol=1e-5)


def test_long_clips_lose_no_more_precision_than_torchs() -> None:
    rng = np.random.default_rng(2)
    lengths, targets = [1500, 900], [rng.integers(1, 29, 210), rng.integers(1, 29, 160)]
    exact = torch.from_numpy(rng.standard_normal((2400, 29)))
    exact[:, 0] += 6  # mostly blank, as early in a training: what fits the text is unlikely from where most paths are
    single = exact.float().requires_grad_()
    exact.requires_grad_()
    torch_loss(exact, lengths, targets).backward()
    torch_loss(single, lengths, targets).backward()
    assert exact.grad is not None
    assert single.grad is not None
    losses, gradient = ctc_gradient(single.detach(), lengths, targets, Workspace())
    torch.testing.assert_close(losses.mean().double(), torch_loss(exact, lengths, targets).detach(), atol=0, rtol=1e-5)
    assert (gradient - exact.grad).abs().max() < 3 * (single.grad - exact.grad).abs().max()


def test_a_batch_is_its_clips_one_by_one_whatever_was_in_the_workspace() -> None:
    rng = np.random.default_rng(1)
    workspace = Workspace()
    for lengths, sizes in (([30, 7, 19], [9, 2, 5]), ([4], [3]), ([11, 40, 3, 25], [4, 1, 7, 12]), ([6, 6], [2, 2])):
        logits = torch.from_numpy(rng.standard_normal((sum(lengths), 5))).float()
        targets = [rng.integers(1, 5, size) for size in sizes]
        losses, gradient = ctc_gradient(logits, lengths, targets, workspace)
        alone = [
            ctc_gradient(part, [length], [target], Workspace())
            for part, length, target in zip(logits.split(lengths), lengths, targets, strict=True)
        ]
        torch.testing.assert_close(losses, torch.cat([loss for loss, _ in alone]))
        torch.testing.assert_close(gradient, torch.cat([part for _, part in alone]) / len(lengths), atol=1e-6, rtol=1e-5)


def test_clips_without_frames_have_neither_loss_nor_gradient() -> None:
    losses, gradient = ctc_gradient(torch.empty(0, 3), [0, 0], [np.array([1]), np.array([2, 1])], Workspace())
    assert losses.tolist() == [0, 0]
    assert gradient.shape == (0, 3)


def test_huge_logits_are_no_trouble() -> None:
    logits = torch.tensor([[9e9, 0.0, -9e9], [0.0, 9e9, 1.0], [-9e9, 1.0, 9e9], [9e9, 7e9, 8e9]])
    losses, gradient = ctc_gradient(logits, [4], [np.array([1, 2])], Workspace())
    assert losses.tolist() == [0]
    assert torch.isfinite(gradient).all()


def test_what_is_not_a_number_does_not_pass_for_a_clip_that_is_too_short() -> None:
    logits = torch.zeros(5, 3)
    logits[2] = torch.nan
    losses, gradient = ctc_gradient(logits, [5], [np.array([1, 2])], Workspace())
    assert losses.isnan().all()
    assert gradient.isnan().any()


def test_backward_is_autograd() -> None:
    rng = np.random.default_rng(3)
    head = CtcHead(DIM, 5, rng)
    for parameter in (head.scale, head.shift):
        parameter += torch.from_numpy(rng.normal(0, 0.3, parameter.shape)).float()
    for gradient in head.gradients:
        gradient.fill_(9)
    norm, linear = nn.LayerNorm(DIM), nn.Linear(DIM, 5)
    with torch.no_grad():
        norm.weight.copy_(head.scale[0])
        norm.bias.copy_(head.shift[:, 0])
        linear.weight.copy_(head.weight)
        linear.bias.copy_(head.bias[:, 0])
    raw = torch.from_numpy(rng.normal(1, 4, (31, DIM))).float()
    at_logits = torch.from_numpy(rng.standard_normal((31, 5))).float()
    x = nn.functional.layer_norm(raw, (DIM,))
    logits = linear(norm(raw))
    torch.testing.assert_close(head.logits(x), logits, atol=1e-5, rtol=1e-5)
    head.backward(x, at_logits)
    logits.backward(at_logits)
    expected = (norm.weight.grad, norm.bias.grad, linear.weight.grad, linear.bias.grad)
    for got, reference in zip(head.gradients, expected, strict=True):
        assert reference is not None
        torch.testing.assert_close(got.view_as(reference), reference, atol=1e-5, rtol=1e-4)


@given(st.lists(st.integers(0, 3), max_size=12))
def test_paths_collapse(path: list[int]) -> None:
    assert collapse(np.array(path, np.int64)).tolist() == spelt(path)
