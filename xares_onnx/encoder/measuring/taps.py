"""Taps: several outputs or inner tensors of a model, each with its own contract. Runs in the worker process.

What concerns the input is measured once, and every run gives all outputs, so that many taps take few runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from ...errors import ContractError, ModelError, quoted
from ..contract.contract import Contract, FrontendModel
from ..contract.declarations import Declaration, Declarations
from ..contract.frame_law import FrameLaw, fit_frame_law, law_holds
from ..exposure import ALL_LAYERS, Exposure
from ..limits import UNTRUSTED
from ..session import Session
from .batches import batching, loud_pair
from .frame_times import WINDOW_HOP, even_hop, first_center, first_center_in_window
from .layers import layers_of
from .measure import measure_contract
from .outputs import find_layouts, too_wide
from .probe import Probe


class Measured(NamedTuple):
    """What was measured of a model and its taps."""

    contract: Contract
    """Of the first tap."""
    more: dict[str, Contract]
    """Of the other taps, by name."""
    exposure: Exposure | None
    """The inner tensors that had to become outputs."""
    notes: list[str]


def measure_taps(
    model: Path,
    open_session: Callable[[Exposure | None], Session],
    declared: Declarations,
    taps: Sequence[str],
    beat: Callable[[], None],
    *,
    max_dim: int = UNTRUSTED.dim,
    front: FrontendModel | None = None,
) -> Measured:
    """Measure the contracts of all taps.

    Args:
        model: The model's file, which is read to find layers.
        open_session: Loads the model, with inner tensors as further outputs.
        declared: What is declared of the model, by contract key.
        taps: Names of outputs and inner tensors, or `all-layers`; none for the model's output.
        beat: Called after every run, as a sign of life.
        max_dim: The largest dimension that an embedding may have.
        front: The graph that makes the features, which every session has loaded too.

    Raises:
        ContradictionError: A declaration and a measurement differ.
        ContractError: An output cannot be scored, or there are no layers.
        ModelError: The model fails on noise.
    """
    if tuple(taps) == (ALL_LAYERS,):
        return _measure_layers(model, open_session, declared, beat, max_dim, front)
    session, exposure = open_session(None), None
    if inner := [name for name in taps if name not in {output.name for output in session.outputs}]:
        exposure = Exposure(tuple(inner))
        session = open_session(exposure)
    if taps:
        declared = {**declared, "output": Declaration(taps[0], "--taps")}
    contract = measure_contract(session, declared, beat, max_dim=max_dim, front=front)
    if len(taps) < 2:
        return Measured(contract, {}, exposure, [])
    more = _more(session, contract, declared, {name: name for name in taps[1:]}, beat, max_dim)
    return Measured(*more, exposure, [])


def _measure_layers(
    model: Path,
    open_session: Callable[[Exposure | None], Session],
    declared: Declarations,
    beat: Callable[[], None],
    max_dim: int,
    front: FrontendModel | None,
) -> Measured:
    import onnx

    contract = measure_contract(open_session(None), declared, beat, max_dim=max_dim, front=front)
    exposure = layers_of(onnx.load_model(model, format="protobuf", load_external_data=False), contract.output)
    names = {f"layer.{i}": output for i, output in enumerate(exposure.outputs)}
    notes = []
    if exposure.tensors[-1] == contract.output:
        last, _ = names.popitem()
        notes.append(f"{last} is the model's output {quoted(contract.output)} and is listed under that name")
        exposure = Exposure(exposure.tensors[:-1])
    return Measured(*_more(open_session(exposure), contract, declared, names, beat, max_dim), exposure, notes)


def _more(
    session: Session,
    contract: Contract,
    declared: Declarations,
    names: Mapping[str, str],
    beat: Callable[[], None],
    max_dim: int,
) -> tuple[Contract, dict[str, Contract]]:
    """The first contract, and those of the outputs in `names`.

    All share their batches: if one output needs single items, all get them.
    """
    outputs = _Outputs(session, contract, declared, beat)
    more = outputs.contracts(list(names.values()))
    if wide := [tap for tap in more if tap.dim > max_dim]:
        raise too_wide(wide[0].output, wide[0].dim, max_dim)
    every = [contract, *more]
    shared = {
        "dynamic_batch": all(tap.dynamic_batch for tap in every),
        "batch_coupled": any(tap.batch_coupled for tap in every),
    }
    contract, *more = (msgspec.structs.replace(tap, **shared) for tap in every)
    return contract, dict(zip(names, more, strict=True))


class _Outputs:
    """Outputs beside that of the contract `main`, which says what holds for the input."""

    def __init__(self, session: Session, main: Contract, declared: Declarations, beat: Callable[[], None]) -> None:
        shortest = {key: declaration for key, declaration in declared.items() if key == "min_samples"}
        self._probe = Probe(session, shortest, beat)
        self._probe.contract = self._main = main
        self._drafts: list[Contract] = []
        self._laws = [main.law] if main.law and not main.fixed_window else []
        self._counts: dict[int, list[int]] = {}

    def contracts(self, names: list[str]) -> list[Contract]:
        """A contract per output.

        Raises:
            ContractError: One cannot be scored.
            ModelError: The model fails on noise.
        """
        main, floats = self._main, self._probe.float_outputs()
        if others := [name for name in names if name not in floats]:
            raise ContractError(
                f"output {quoted(others[0])} is not a float tensor, so it cannot be scored; leave it out of --taps"
            )
        low = main.chunk_samples if main.fixed_window else self._probe.shortest_probe()
        high = low if main.fixed_window else min(3 * low + 1, main.max_samples or 3 * low + 1)
        layouts, problems, window = find_layouts(self._probe, names, low, high)
        if problems:
            raise ContractError(f"{next(iter(problems.values()))}; leave it out of --taps")
        sources = {**main.sources, "output": "--taps", "output_layout": "measured", "dim": "measured"}
        self._drafts = [
            msgspec.structs.replace(main, output=name, output_layout=layouts[name], window_frames=None, sources=sources)
            for name in names
        ]
        framed = [draft for draft in self._drafts if draft.has_frames] if window else []
        laws = dict(zip((draft.output for draft in framed), window.measure_laws(framed) if window else (), strict=True))
        measured = []
        runs = zip(self._values(low), self._values(low, seed=1), self._batching(low), strict=True)
        for i, (draft, (values, other_values, batches)) in enumerate(zip(self._drafts, runs, strict=True)):
            if not np.isfinite(values).all():
                raise ModelError(f"output {quoted(draft.output)} gives NaN or infinity for {low} samples of quiet noise")
            if np.array_equal(values, other_values):
                raise ContractError(f"output {quoted(draft.output)} is the same for any input; leave it out of --taps")
            measured.append(
                msgspec.structs.replace(
                    draft,
                    dim=values.shape[2],
                    **batches,
                    **self._frames(i, low, high, values.shape[1], laws.get(draft.output)),
                )
            )
        return measured

    def _frames(self, i: int, low: int, high: int, at_low: int, window_law: FrameLaw | None) -> dict[str, Any]:
        """The contract's fields on the frames of output number `i`, which has `at_low` of them for `low` samples."""
        draft, main = self._drafts[i], self._main
        if not draft.has_frames:
            return {"hop_samples": None, "receptive_field_samples": None, "first_frame_center_samples": None}
        if main.fixed_window:
            return {"window_frames": at_low} | self._frames_of_window(draft, window_law, low, at_low)
        law = self._growing_law(i, low, high)
        if self._counted(main.chunk_samples)[i] != law.frames(main.chunk_samples):
            raise ContractError(
                f"output {quoted(draft.output)} does not follow the law of shorter inputs at {main.chunk_samples} samples; "
                "declare a shorter --contract chunk_samples=N"
            )
        return self._frames_of_law(draft, law)

    def _frames_of_law(self, draft: Contract, law: FrameLaw) -> dict[str, Any]:
        """An output that follows the main output's law has its declared first centre too."""
        if law == self._main.law:
            return {}
        center, center_source = first_center(law, self._main.features)
        sources = dict.fromkeys(("hop_samples", "receptive_field_samples"), "measured")
        return {
            "hop_samples": law.hop,
            "receptive_field_samples": law.receptive_field,
            "first_frame_center_samples": center,
            "sources": {**draft.sources, **sources, "first_frame_center_samples": center_source},
        }

    def _frames_of_window(self, draft: Contract, law: FrameLaw | None, samples: int, frames: int) -> dict[str, Any]:
        if law is not None:
            return self._frames_of_law(draft, law)
        if frames == self._main.window_frames:
            return {}
        frontend = self._main.features
        hop = even_hop(samples, frames, frontend)
        center, center_source = first_center_in_window(samples, frames, hop, frontend)
        return {
            "hop_samples": hop,
            "receptive_field_samples": None,
            "first_frame_center_samples": center,
            "sources": {**draft.sources, "hop_samples": WINDOW_HOP, "first_frame_center_samples": center_source},
        }

    def _growing_law(self, i: int, low: int, high: int) -> FrameLaw:
        """The frame law of output number `i`: one that another output follows too, else found by bisection."""

        def counted(samples: int) -> int:
            return self._counted(samples)[i]

        for law in self._laws:
            if law_holds(law, counted, low, high):
                return law
        fitted = fit_frame_law(counted, low, high)
        if fitted is None or not law_holds(fitted, counted, low, high):
            raise ContractError(
                f"the frame count of output {quoted(self._drafts[i].output)} follows no law, so its frames have no times; "
                "leave it out of --taps"
            )
        self._laws.append(fitted)
        return fitted

    def _counted(self, samples: int) -> list[int]:
        """How many frames each output has; each length is run once."""
        if samples not in self._counts:
            self._counts[samples] = [values.shape[1] for values in self._values(samples)]
        return self._counts[samples]

    def _values(self, samples: int, seed: int = 0) -> list[npt.NDArray[np.float32]]:
        return self._run(self._probe.noise(samples, seed=seed))

    def _run(self, batch: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
        results = self._probe.run_outputs([draft.output for draft in self._drafts], batch)
        adapter = self._probe.session.adapter
        return [adapter(draft).frames(result, len(batch)) for draft, result in zip(self._drafts, results, strict=True)]

    def _batching(self, samples: int) -> list[dict[str, bool]]:
        """`dynamic_batch` and `batch_coupled` of every output."""
        if not self._main.dynamic_batch:
            return [{"dynamic_batch": False, "batch_coupled": self._main.batch_coupled}] * len(self._drafts)
        pair = loud_pair(self._probe, samples)
        return [batching(*both) for both in zip(self._run(pair), self._run(pair[:1]), strict=True)]
