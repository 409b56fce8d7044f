"""The base of kinds of task with a linear head on pooled embeddings.

`corrected` fits a convex head until it converges; X-ARES trains one by Adam, for the number of epochs in the task.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from .kind import Kind, Outcome, outcomes_of

if TYPE_CHECKING:  # torch takes seconds to import: only to train
    from ...probes import convex, linear


class PooledKind(Kind):
    mixes = True

    @abstractmethod
    def converged(self) -> convex.Objective:
        """The objective of the head under `corrected`."""

    @abstractmethod
    def trained(self) -> linear.Objective:
        """The objective of the head under `xares`."""

    def steps(self) -> int:
        if not self.protocol.corrected:
            return super().steps()
        from ...probes.convex import fits

        return fits(self.converged().strengths, len(self.folds))

    def train(self, seeds: int, on_step: Callable[[int], None]) -> list[Outcome]:
        embeddings, examples = self.dataset.embeddings, self.examples_of_crops
        if self.protocol.corrected:
            from ...probes.convex import train_convex

            objective = self.converged()
            if self.tools.layers:
                from ...probes.mix import mixed

                objective = mixed(objective, self.tools.layers)
            results = train_convex(
                embeddings,
                objective,
                examples,
                self.convex_rows(),
                threads=self.tools.threads,
                device=self.tools.device,
                on_fit=on_step,
            )
            return outcomes_of(results)
        from ...probes.linear import train_linear

        crops, head = self.crop_rows(), self.task.head
        trained = train_linear(embeddings, self.trained(), examples, crops, head, range(seeds), on_epoch=on_step)
        return outcomes_of(trained)
