"""A model while it is measured: run on seeded noise, with the contract as far as it is known."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ...errors import ContractError, ContradictionError, ModelError, ModelLimitError
from ..adapter import FLOAT_TYPES, Adapter
from ..contract.contract import Contract
from ..contract.declarations import Declarations
from ..session import Session

HOW = (
    "declare --contract frontend.preset=kaldi or another (docs/vendors.md), or the graph that makes them by --contract "
    "frontend.model=FILE.onnx, or export the model with its front end"
)
"""What to do about an input of features."""
_KEPT = 4  # inputs whose outputs are remembered


class Probe:
    """A model while it is measured.

    `contract` is what is known of it so far, and `sources` where each field is from. `declared` is never changed.
    """

    contract: Contract
    max_dim: int

    def __init__(self, session: Session, declared: Declarations, beat: Callable[[], None]) -> None:
        self.session = session
        self.declared = declared
        self.sources: dict[str, str] = {}
        self._beat = beat
        self._results: dict[str, dict[str, npt.NDArray[Any]]] = {}  # outputs by the digest of the input

    @property
    def adapter(self) -> Adapter:
        return self.session.adapter(self.contract)

    def update(self, **fields: Any) -> None:
        self.contract = msgspec.structs.replace(self.contract, **fields)

    def choose(self, key: str, default: Any, default_source: str = "default") -> Any:
        """The declared value, or the default; records where it is from."""
        if key in self.declared:
            self.sources[key] = self.declared[key].source
            return self.declared[key].value
        if default is not None:
            self.sources[key] = default_source
        return default

    def agree(self, key: str, measured: int) -> int:
        """The measured value; records where it is from.

        Raises:
            ContradictionError: Another value is declared.
        """
        declaration = self.declared.get(key)
        if declaration and declaration.value != measured:
            raise ContradictionError(
                f"{declaration.source} declares {key}={declaration.value}, but {measured} was measured; correct the "
                "declaration",
                about=key,
            )
        self.sources[key] = f"measured, as declared in {declaration.source}" if declaration else "measured"
        return measured

    def float_outputs(self) -> list[str]:
        names = [node.name for node in self.session.outputs if node.type in FLOAT_TYPES]
        if not names:
            raise ContractError("no output is a float tensor, so none can be an embedding", about="output")
        return names

    def noise(self, samples: int, batch: int = 1, seed: int = 0) -> npt.NDArray[np.float32]:
        signal = np.random.default_rng(seed).standard_normal((batch, samples)).astype(np.float32)
        noise: npt.NDArray[np.float32] = np.clip(signal * np.float32(0.1), -1, 1)
        return noise

    def run_outputs(self, names: list[str], batch: npt.NDArray[np.float32]) -> list[npt.NDArray[Any]]:
        """The named outputs for waveforms (items, samples); those of the last few inputs are remembered."""
        return self.run_values(names, self.adapter.values(batch))

    def run_again(self, names: list[str], samples: int) -> list[npt.NDArray[Any]]:
        """The named outputs for noise, from a new run."""
        self._results.clear()
        return self.run_outputs(names, self.noise(samples))

    def run_values(self, names: list[str], values: npt.NDArray[np.float32]) -> list[npt.NDArray[Any]]:
        """The named outputs for what `Adapter.values` gives: waveforms, or features (items, frames, bins)."""
        contract = self.contract  # while its layouts are not known, the same values are fed in several ways
        fed = f"{values.shape} {contract.input_layout} {contract.fixed_batch}".encode()
        digest = hashlib.sha256(fed + values.tobytes()).hexdigest()
        results = self._results.pop(digest, {})
        try:
            if not results.keys() >= set(names):
                results = dict(zip(names, self.adapter.results_of(self.session.run_raw, names, values), strict=True))
        finally:  # a model that fails is alive too
            self._beat()
        self._results[digest] = results
        if len(self._results) > _KEPT:
            del self._results[next(iter(self._results))]
        return [results[name] for name in names]

    def run(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        (result,) = self.run_outputs([self.contract.output], batch)
        return self.adapter.frames(result, len(batch))

    def embed(self, samples: int) -> npt.NDArray[np.float32]:
        frames = self.run(self.noise(samples))
        if not np.isfinite(frames).all():
            raise ModelError(f"the model gives NaN or infinity for {samples} samples of quiet noise", about="values")
        return frames

    def frames(self, samples: int) -> int:
        return int(self.embed(samples).shape[1])

    def shortest_probe(self) -> int:
        """Samples of about a second, or of the first longer input that the model takes; at most a third of its maximum."""
        shortest = int(self.declared["min_samples"].value) if "min_samples" in self.declared else 0
        longest = self.contract.max_samples
        lengths = [max(shortest, seconds * self.contract.sample_rate) for seconds in (1, 2, 4, 10, 30)]
        if longest is not None:
            lengths = [samples for samples in lengths if 3 * samples <= longest] or [max(shortest, longest // 3)]
        names = self.float_outputs()
        last_error: ModelError | None = None
        for samples in lengths:
            try:
                self.run_outputs(names, self.noise(samples))
                return samples
            except (ContractError, ModelLimitError):
                raise
            except ModelError as error:
                last_error = error
        tried = ", ".join(f"{samples / self.contract.sample_rate:g}" for samples in lengths)
        hint = "" if self.contract.features or len(self.contract.input_layout) != 2 else f"; if it takes features, {HOW}"
        raise ContractError(f"the model fails on inputs of {tried} s: {last_error}{hint}", about="time")
