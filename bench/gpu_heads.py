"""Heads and kNN at VoxCeleb1's size: ours on the CPU, and what a GPU would take for the same. For bench/gpu.py."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch

from xares_onnx.data.task import Head
from xares_onnx.probes.knn import NEIGHBOURS, TEMPERATURE, knn_cosine
from xares_onnx.probes.linear import Classification, train_linear
from xares_onnx.probes.training import Rows

Matrix = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

L2 = 1e-4
TOLERANCE = 1e-5  # of the largest component of the gradient of the mean loss


def linear_head(x: Matrix, labels: Indices, test: Mask, classes: int) -> str:
    """Today's head: Adam, batches of 32, one torch thread."""
    train = np.flatnonzero(~test)
    held = Rows(train[train % 10 != 3], train[train % 10 == 3], np.flatnonzero(test))
    begun = time.perf_counter()
    (found,) = train_linear(x, Classification(labels, classes), np.arange(len(x)), [held], Head(epochs=1), [0])
    seconds = time.perf_counter() - begun
    accuracy = (np.asarray(found.predictions) == labels[found.examples]).mean()
    return f"{seconds:.1f} s an epoch, accuracy {accuracy:.3f}"


def knn(x: Matrix, labels: Indices, test: Mask, classes: int, device: str | None, queries: int | None = None) -> str:
    """Ten nearest neighbours by cosine, by torch on a device, or by the project's own on the CPU where that is None."""
    train, asked = np.flatnonzero(~test), np.flatnonzero(test)[:queries]
    if device is None:
        begun = time.perf_counter()
        _, predicted = knn_cosine(x[train], labels[train], x[asked], asked)
        seconds = time.perf_counter() - begun
        return f"{seconds:.1f} s, accuracy {(predicted == labels[asked]).mean():.3f}"
    torch.zeros(1, device=device)  # starts CUDA
    begun = time.perf_counter()
    rows = torch.nn.functional.normalize(torch.from_numpy(x[train]).to(device))
    of_rows = torch.from_numpy(labels[train]).to(device)
    parts = []
    for block in torch.from_numpy(x[asked]).to(device).split(1024):
        nearest = (torch.nn.functional.normalize(block) @ rows.T).topk(min(NEIGHBOURS, len(rows)), dim=1)
        weights = ((nearest.values - nearest.values[:, :1]) / TEMPERATURE).exp()
        votes = torch.zeros(len(block), classes, device=device).scatter_add_(1, of_rows[nearest.indices], weights)
        parts.append(votes.argmax(dim=1).cpu())
    predictions = torch.cat(parts).numpy()
    seconds = time.perf_counter() - begun
    few = asked[:300]
    _, expected = knn_cosine(x[train], labels[train], x[few], few)
    agree = (predictions[: len(few)] == expected).mean()
    accuracy = (predictions == labels[asked]).mean()
    return f"{seconds:.2f} s, accuracy {accuracy:.3f}, as on the CPU for {agree:.1%} of {len(few)} clips"


def logistic_regression(x: Matrix, labels: Indices, test: Mask, classes: int, device: str, *, double: bool = False) -> str:
    """Multinomial, all clips in one batch, L2 on the weights, features standardised; until the gradient is small.

    In single precision the line search may find no descent before that. L-BFGS with a strong Wolfe line search: Nocedal and
    Wright, Numerical Optimization, 2006, chapter 7.2.
    """
    torch.zeros(1, device=device)
    begun = time.perf_counter()
    dtype = torch.float64 if double else torch.float32
    whole = torch.from_numpy(x).to(device, dtype)
    known = torch.from_numpy(~test).to(device)
    train, y = whole[known], torch.from_numpy(labels[~test]).to(device)
    mean, scale = train.mean(dim=0), train.std(dim=0).clamp_min(1e-6)
    train = (train - mean) / scale
    weight = torch.zeros(x.shape[1], classes, device=device, dtype=dtype, requires_grad=True)
    bias = torch.zeros(classes, device=device, dtype=dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=300, tolerance_grad=TOLERANCE, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )
    evaluations = 0

    def closure() -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(train @ weight + bias, y) + L2 / 2 * weight.square().sum()
        torch.autograd.backward(loss)
        return loss

    solver.step(closure)
    loss = float(closure().detach())
    gradient = max(float(parameter.grad.abs().max()) for parameter in (weight, bias) if parameter.grad is not None)
    with torch.no_grad():
        predicted = (((whole[~known] - mean) / scale) @ weight + bias).argmax(dim=1).cpu().numpy()
    seconds = time.perf_counter() - begun
    return (
        f"{seconds:.1f} s, {evaluations} gradients of all clips to a largest component of {gradient:.1e} ({TOLERANCE:g} "
        f"wanted), L2 {L2:g}, loss {loss:.4f}, accuracy {(predicted == labels[test]).mean():.3f}"
    )
