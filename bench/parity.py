"""Scores of converged heads beside those of scikit-learn's logistic regression on the same clips.

    python bench/parity.py DATA MODEL.onnx... [--tasks TASK,TASK] [--cache FOLDER]

Everything else of the evaluation is shared: embeddings, folds, strengths, the rule that chooses one, the fit on training and
held-out clips. Prints a Markdown table; without names, of the tasks with a class per clip. Also says which strengths each
chose.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from patched_heads import heads_here
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from xares_onnx.data.catalog import shipped_tasks
from xares_onnx.evaluation.evaluation import evaluate
from xares_onnx.models.standardised import Head, Pool, Rows, Standardisation
from xares_onnx.probes.convex import Classes, Convergence, Fit, Logistic, OneAgainstTheRest


class Reference:
    """scikit-learn's fits on some rows, from the strongest on, each started at the last."""

    def __init__(self, head: Any, rows: Rows) -> None:
        self._x = np.concatenate([rows.block(number) for number in range(rows.blocks)]).astype(np.float64)
        targets = np.concatenate([rows.targets(number) for number in range(rows.blocks)])
        self._scaler = StandardScaler().fit(self._x)
        self._z = self._scaler.transform(self._x)
        self._outputs = head.outputs
        options: dict[str, Any] = {"tol": 1e-9, "max_iter": 100_000, "warm_start": True}
        # Each problem with the outputs that it is about.
        self._problems: list[tuple[LogisticRegression, NDArray[Any], NDArray[Any]]] = []
        if isinstance(head, Classes):
            self._bias = np.full(head.outputs, -np.inf)
            self._problems = [(LogisticRegression(**options), targets, np.unique(targets))]
        else:
            assert isinstance(head, OneAgainstTheRest)
            self._bias = np.where(targets.any(axis=0), np.inf, -np.inf)
            options["class_weight"] = {False: 1.0, True: head._positive_weight}
            for output in np.flatnonzero(targets.any(axis=0) & ~targets.all(axis=0)):
                self._problems.append((LogisticRegression(**options), targets[:, output], np.array([output])))

    def fit(self, strength: float) -> Fit:
        weight, bias = np.zeros((self._z.shape[1], self._outputs)), self._bias.copy()
        for model, targets, outputs in self._problems:
            model.C = 1 / (strength * len(self._z))
            model.fit(self._z, targets)
            of_outputs, of_bias = model.coef_, model.intercept_
            if (
                len(outputs) == 2
            ):  # scikit-learn fits the second class alone; half the difference each is the multinomial fit
                of_outputs, of_bias = np.concatenate([-of_outputs, of_outputs]) / 2, np.array([-of_bias[0], of_bias[0]]) / 2
            weight[:, outputs], bias[outputs] = of_outputs.T, of_bias
        standardisation = Standardisation(self._scaler.mean_, 1 / self._scaler.scale_)
        return Fit(Head(standardisation, weight, bias), strength, Convergence(0.0, 0, True))


def fits(self: Logistic, rows: Rows, pool: Pool) -> Iterator[Fit]:
    with threadpool_limits(1):
        reference = Reference(self, rows)
        for strength in self.strengths:
            yield reference.fit(strength)


def refit(self: Logistic, rows: Rows, pool: Pool, near: Fit) -> Fit:
    reference = Reference(self, rows)
    return [reference.fit(strength) for strength in self.strengths if strength >= near.strength][-1]


def scores(model: Path, data: Path, tasks: list[str], cache: Path | None) -> dict[str, tuple[float, list[float]]]:
    with heads_here():
        done = evaluate(model, tasks, data=data, cache=cache, methods=["head"])
    return {
        record.title: (record.score, record.tuning.chosen)
        for record in done.result.tasks
        if record.score is not None and record.tuning is not None
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--tasks")
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args()
    classes = [task.name for task in shipped_tasks().values() if task.classifies and task.domain != "synthetic"]
    tasks = options.tasks.split(",") if options.tasks else [name for name in classes if (options.data / name).is_dir()]
    print("| encoder | task | converged head | scikit-learn | difference | strengths | scikit-learn's |")
    print("|---|---|---|---|---|---|---|")
    for model in options.models:
        arguments = model, options.data, tasks, options.cache
        own = scores(*arguments)
        with mock.patch.object(Logistic, "fits", fits), mock.patch.object(Logistic, "refit", refit):
            reference = scores(*arguments)
        for task, (score, chosen) in own.items():
            expected, theirs = reference[task]
            print(
                f"| {model.stem} | {task} | {score:.3f} | {expected:.3f} | {score - expected:+.3f} "
                f"| {', '.join(map('{:g}'.format, chosen))} | {', '.join(map('{:g}'.format, theirs))} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
