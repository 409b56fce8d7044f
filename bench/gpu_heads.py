"""Heads and kNN at VoxCeleb1's size, on a GPU and on the CPU. For bench/gpu.py."""

from __future__ import annotations

import os
import time

import numpy as np
import numpy.typing as npt
import torch

from xares_onnx.data.task import Head
from xares_onnx.probes.convex import Classes, FoldRows, fit_fold
from xares_onnx.probes.knn import knn_cosine
from xares_onnx.probes.linear import Classification, train_linear
from xares_onnx.probes.training import Rows

Matrix = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def linear_head(x: Matrix, labels: Indices, test: Mask, classes: int) -> str:
    """Today's head: Adam, batches of 32, one torch thread."""
    train = np.flatnonzero(~test)
    held = Rows(train[train % 10 != 3], train[train % 10 == 3], np.flatnonzero(test))
    begun = time.perf_counter()
    (found,) = train_linear(x, Classification(labels, classes), np.arange(len(x)), [held], Head(epochs=1), [0])
    seconds = time.perf_counter() - begun
    accuracy = (np.asarray(found.predictions) == labels[found.examples]).mean()
    return f"{seconds:.1f} s an epoch, accuracy {accuracy:.3f}"


def knn(x: Matrix, labels: Indices, test: Mask, device: str | None, queries: int | None = None) -> str:
    """Ten nearest neighbours by cosine, on a device, or on the CPU for None."""
    train, asked = np.flatnonzero(~test), np.flatnonzero(test)[:queries]
    if device is not None:
        torch.zeros(1, device=device)  # starts CUDA
    begun = time.perf_counter()
    _, predicted = knn_cosine(x[train], labels[train], x[asked], asked, device)
    seconds = time.perf_counter() - begun
    few = asked[:300]
    agreement = ""
    if device is not None:
        _, expected = knn_cosine(x[train], labels[train], x[few], few)
        agreement = f", as on the CPU for {(predicted[: len(few)] == expected).mean():.1%} of {len(few)} clips"
    return f"{seconds:.2f} s, accuracy {(predicted == labels[asked]).mean():.3f}{agreement}"


def converged(x: Matrix, labels: Indices, test: Mask, classes: int, device: str | None) -> str:
    """The converged head: every strength of the grid, and the last fit on training and held-out clips."""
    train = np.flatnonzero(~test)
    held_out = train[3::20]
    rows = FoldRows(np.setdiff1d(train, held_out), held_out, np.flatnonzero(test), held_out=held_out)
    if device is not None:
        torch.zeros(1, device=device)
    begun = time.perf_counter()
    threads = len(os.sched_getaffinity(0)) if device is None else 4
    result = fit_fold(x, Classes(labels, classes), np.arange(len(x)), rows, threads=threads, device=device)
    seconds = time.perf_counter() - begun
    accuracy = (result.predictions == labels[result.examples]).mean()
    norm = result.convergence.relative_gradient_norm
    return (
        f"{seconds:.1f} s for {len(result.tried)} strengths and the last fit, relative gradient norm {norm:.1e}, strength "
        f"{result.tried[result.chosen].strength:g}, accuracy {accuracy:.3f}"
    )


def same_choice(x: Matrix, labels: Indices, test: Mask, classes: int, device: str) -> str:
    """On few enough clips for the CPU, and on enough for the device to pay."""
    few = np.flatnonzero(labels < min(classes, 100))
    part = x[few], labels[few], test[few], min(classes, 100)
    return f"device: {converged(*part, device)}; CPU: {converged(*part, None)}"
