"""Heads and kNN on ESC-50-sized data: 2,000 clips, 50 classes, 5 folds x 10 epochs x 3 seeds.

    python bench/heads.py [--dim N]

The ratio is against the same heads trained one after another with torch's own modules and optimiser.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from xares_onnx.data.task import Head
from xares_onnx.probes.knn import knn_cosine
from xares_onnx.probes.linear import Classification, train_linear
from xares_onnx.probes.training import Rows, learning_rate

CLIPS, CLASSES, FOLDS, SEEDS = 2000, 50, 5, 3
HEAD = Head(epochs=10, batch_size=32, learning_rate=1e-3)


def one_by_one(x: torch.Tensor, y: torch.Tensor, fold: Rows) -> None:
    """One head, as X-ARES's arithmetic reads, in plain torch on one thread, as ours."""
    torch.set_num_threads(1)
    head = torch.nn.Sequential(torch.nn.LayerNorm(x.shape[1]), torch.nn.Linear(x.shape[1], CLASSES))
    adam = torch.optim.Adam(head.parameters())
    for epoch in range(1, HEAD.epochs + 1):
        adam.param_groups[0]["lr"] = learning_rate(epoch, HEAD.epochs, HEAD.learning_rate)
        for batch in torch.from_numpy(np.random.permutation(fold.train)).split(HEAD.batch_size):
            adam.zero_grad()
            torch.autograd.backward(torch.nn.functional.cross_entropy(head(x[batch]), y[batch]))
            adam.step()
        with torch.no_grad():
            (head(x[fold.valid]).argmax(1) == y[fold.valid]).float().mean()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dim", type=int, default=768)
    dim = parser.parse_args().dim
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, CLIPS)
    x = (rng.normal(size=(CLASSES, dim))[labels] * 0.3 + rng.normal(size=(CLIPS, dim))).astype(np.float32)
    fold_of = np.arange(CLIPS) % FOLDS
    folds = []
    for number in range(FOLDS):
        train = np.flatnonzero(fold_of != number)
        folds.append(Rows(train[train % 10 != 3], train[train % 10 == 3], np.flatnonzero(fold_of == number)))
    clips = np.arange(CLIPS)
    objective = Classification(labels, CLASSES)
    train_linear(x, objective, clips, folds, Head(epochs=1), [0])  # warm up
    started = time.perf_counter()
    train_linear(x, objective, clips, folds, HEAD, range(SEEDS))
    batched = time.perf_counter() - started
    started = time.perf_counter()
    one_by_one(torch.from_numpy(x), torch.from_numpy(labels), folds[0])
    plain = (time.perf_counter() - started) * FOLDS * SEEDS
    started = time.perf_counter()
    for fold in folds:
        train = np.concatenate([fold.train, fold.valid])
        knn_cosine(x[train], labels[train], x[fold.test], fold.test)
    searched = time.perf_counter() - started
    print(
        f"heads, {dim} dimensions, 5 folds x 10 epochs x 3 seeds: {batched:.2f} s, {plain / batched:.1f}x as fast as singly"
    )
    print(f"kNN, {dim} dimensions, 5 folds: {searched:.3f} s")


if __name__ == "__main__":
    main()
