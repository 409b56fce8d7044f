"""Measure a model against the contract: layouts, dimension, the law of its frames, batch. Runs in the worker process.

Names and declarations may lie, so everything that can be measured is; a declaration that contradicts a measurement is
a `ContractError`. The probe signal is seeded noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .contract import (
    DEFAULT_CHUNK_SECONDS,
    DEFAULT_SAMPLE_RATE,
    Contract,
    Declarations,
    FrameLaw,
    InputLayout,
    OutputLayout,
    fit_frame_law,
    frames_of_dimension,
    law_holds,
)
from .errors import ContractError, ModelError
from .session import FLOAT_TYPES, Session, as_frames, feeds_for

if TYPE_CHECKING:
    import onnxruntime

_LENGTH_TYPES = {"tensor(int64)", "tensor(int32)"}
_LENGTH_NAMES = ("length", "lens", "num_samples", "n_samples")
_COUPLING_TOLERANCE = 1e-3  # of the largest embedding value; float32 kernels differ by about 1e-6 between batch sizes


def measure_contract(session: Session, declared: Declarations, beat: Callable[[], None]) -> Contract:
    """The full contract of a loaded model. `beat` is called after every run: a sign of life."""
    probe = _Probe(session, declared, beat)
    audio, lengths = _choose_inputs(session, declared)
    probe.contract = Contract(
        input=audio.name,
        input_layout=_input_layout(audio, declared),
        lengths_input=lengths,
        output="",
        output_layout="BTD",
        dim=0,
        sample_rate=probe.choose("sample_rate", DEFAULT_SAMPLE_RATE),
        hop_samples=None,
        receptive_field_samples=None,
        first_frame_center_samples=None,
        min_samples=1,
        max_samples=probe.choose("max_samples", None),
        chunk_samples=0,
        amplitude=probe.choose("amplitude", "unit"),
        normalize=probe.choose("normalize", "none"),
        dynamic_batch=False,
        batch_coupled=False,
        license=probe.choose("license", None),
        source=probe.choose("source", None),
    )
    low = probe.shortest_probe()
    high = 3 * low + 1
    if probe.contract.max_samples:
        high = min(high, probe.contract.max_samples)
    name, layout = _choose_output(probe, low, high)
    probe.update(output=name, output_layout=layout)
    dim = probe.embed(low).shape[2]
    if dim < 2:
        raise ContractError(f"output {name!r} gives {dim} value a frame; an embedding needs a dimension of 2 or more")
    probe.update(dim=probe.agree("output_dim", dim))
    if layout != "BD":
        law = _measure_law(probe, audio, low, high)
        probe.update(
            hop_samples=probe.agree("hop_samples", law.hop),
            receptive_field_samples=probe.agree("receptive_field_samples", law.receptive_field),
            first_frame_center_samples=probe.choose("first_frame_center_samples", law.receptive_field / 2),
        )
        if "first_frame_center_samples" not in declared:
            probe.sources["first_frame_center_samples"] = "default (receptive field / 2)"
    elif contradicted := declared.keys() & {"hop_samples", "receptive_field_samples", "first_frame_center_samples"}:
        key = min(contradicted)
        raise ContractError(
            f"{declared[key].source} declares {key}={declared[key].value}, but output {name!r} gives one vector a clip, "
            "which has no frames"
        )
    probe.update(min_samples=_measure_minimum(probe, low))
    probe.update(chunk_samples=_choose_chunk(probe))
    probe.check_long_input()
    probe.update(**_measure_batch(probe, audio, low))
    sources = {**probe.sources, "dim": "measured"}
    for field, key in (("input", "input"), ("input_layout", "input_layout"), ("lengths_input", "lengths_input")):
        sources[field] = declared[key].source if key in declared else "graph"
    sources["output"] = declared["output"].source if "output" in declared else sources.get("output", "graph")
    sources["output_layout"] = "measured"
    probe.update(sources=sources)
    return probe.contract


class _Probe:
    """The model under probing, with the contract as far as it is known."""

    contract: Contract

    def __init__(self, session: Session, declared: Declarations, beat: Callable[[], None]) -> None:
        self.session = session
        self.declared = declared
        self.sources: dict[str, str] = {}
        self._beat = beat
        self._types = {node.name: node.type for node in session.inputs}

    def update(self, **fields: Any) -> None:
        import msgspec

        self.contract = msgspec.structs.replace(self.contract, **fields)

    def choose(self, key: str, default: Any) -> Any:
        """A declared value, or the default; says which it was."""
        if key in self.declared:
            self.sources[key] = self.declared[key].source
            return self.declared[key].value
        if default is not None:
            self.sources[key] = "default"
        return default

    def agree(self, key: str, measured: int) -> int:
        """The measured value, which a declaration must not contradict."""
        if key in self.declared and self.declared[key].value != measured:
            by = self.declared[key]
            raise ContractError(
                f"{by.source} declares {key}={by.value}, but {measured} was measured; correct the declaration"
            )
        self.sources[key] = f"measured, as declared in {self.declared[key].source}" if key in self.declared else "measured"
        return measured

    def noise(self, samples: int, batch: int = 1) -> npt.NDArray[np.float32]:
        signal = np.random.default_rng(0).standard_normal((batch, samples)).astype(np.float32)
        noise: npt.NDArray[np.float32] = np.clip(signal * np.float32(0.1), -1, 1)
        return noise

    def run_outputs(self, names: list[str], batch: npt.NDArray[np.float32]) -> list[npt.NDArray[Any]]:
        results = self.session.run_raw(names, feeds_for(batch, self.contract, self._types))
        self._beat()
        return results

    def run(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        (result,) = self.run_outputs([self.contract.output], batch)
        expected = {"BTD": 3, "BDT": 3, "TD": 2, "BD": 2}[self.contract.output_layout]
        if result.ndim != expected:
            raise ContractError(f"output {self.contract.output!r} changes its rank from {expected} to {result.ndim}")
        return as_frames(result, self.contract)

    def embed(self, samples: int) -> npt.NDArray[np.float32]:
        frames = self.run(self.noise(samples))
        if not np.isfinite(frames).all():
            raise ModelError(f"the model gives NaN or infinity for {samples} samples of quiet noise")
        return frames

    def frames(self, samples: int) -> int:
        return int(self.embed(samples).shape[1])

    def shortest_probe(self) -> int:
        """About one second, or the first longer input that the model takes; a third of the most that it may take."""
        least = int(self.declared["min_samples"].value) if "min_samples" in self.declared else 0
        most = self.contract.max_samples
        lengths = [max(least, seconds * self.contract.sample_rate) for seconds in (1, 2, 4, 10, 30)]
        if most is not None:
            lengths = [samples for samples in lengths if 3 * samples <= most] or [max(least, most // 3)]
        names = [node.name for node in self.session.outputs if node.type in FLOAT_TYPES]
        if not names:
            raise ContractError("no output is a float tensor, so none can be an embedding")
        last_error: ModelError | None = None
        for samples in lengths:
            try:
                self.run_outputs(names, self.noise(samples))
                return samples
            except ContractError:
                raise
            except ModelError as error:
                last_error = error
        tried = ", ".join(f"{samples / self.contract.sample_rate:g}" for samples in lengths)
        raise ContractError(f"the model takes no input of {tried} s: {last_error}")

    def check_long_input(self) -> None:
        """The law must hold at the chunk length too: an export may have frozen a maximum."""
        contract = self.contract
        try:
            frames = self.frames(contract.chunk_samples)
        except ContractError:
            raise
        except ModelError as error:
            raise ContractError(
                f"the model fails on a chunk of {contract.chunk_samples / contract.sample_rate:g} s; declare a shorter "
                f"one by --contract chunk_samples=N ({error})"
            ) from error
        if frames != (foretold := contract.frames_of(contract.chunk_samples)):
            raise ContractError(
                f"{contract.chunk_samples} samples give {frames} frames where shorter inputs foretell {foretold}; "
                "declare a shorter --contract chunk_samples=N"
            )


def _choose_inputs(session: Session, declared: Declarations) -> tuple[onnxruntime.NodeArg, str | None]:
    """The audio input and the lengths input; every other input is one that nobody can fill."""
    inputs = session.inputs
    by_name = {node.name: node for node in inputs}
    for key in ("input", "lengths_input"):
        if key in declared and declared[key].value not in by_name:
            raise ContractError(
                f"{declared[key].source}: the model has no input {declared[key].value!r}; it has {_list(by_name)}"
            )
    floats = [node for node in inputs if node.type in FLOAT_TYPES]
    if "input" in declared:
        audio = by_name[str(declared["input"].value)]
    elif len(floats) == 1:
        audio = floats[0]
    elif not floats:
        raise ContractError(f"the model has no float input for a waveform; it has {_list(by_name)}")
    else:
        named = [node for node in floats if node.name in ("audio", "waveform", "input_values")]
        if len(named) != 1:
            _refuse_state(session, floats)
            raise ContractError(f"any of {_list(by_name)} could be the waveform; name it by --contract input=NAME")
        audio = named[0]
    if audio.type not in FLOAT_TYPES:
        raise ContractError(f"input {audio.name!r} is {audio.type}; a waveform input must be float")
    others = [node for node in inputs if node.name != audio.name]
    lengths = None
    for node in others:
        is_lengths = (
            node.type in _LENGTH_TYPES
            and len(node.shape) == 1
            and (
                ("lengths_input" in declared and declared["lengths_input"].value == node.name)
                or any(part in node.name.lower() for part in _LENGTH_NAMES)
            )
        )
        if not is_lengths or lengths is not None:
            _refuse_state(session, others)
            raise ContractError(
                f"the model wants input {node.name!r} ({node.type}, shape {node.shape}) beside the waveform, "
                "which nothing here can fill; export it without that input"
            )
        lengths = node.name
    return audio, lengths


def _refuse_state(session: Session, inputs: list[onnxruntime.NodeArg]) -> None:
    """Raise `ContractError` where one of these wants an output of the call before: such a pair shares a name or a shape."""
    for node in inputs:
        stem = node.name.lower().rstrip("0123456789_") or node.name  # `h0` is given back as `hn`
        for output in session.outputs:
            alike = output.type == node.type and len(output.shape) == len(node.shape)
            same = len(node.shape) >= 3 and isinstance(node.shape[-1], int) and list(output.shape) == list(node.shape)
            if alike and (stem in output.name.lower() or same):
                raise ContractError(
                    f"the model keeps a state: input {node.name!r} wants output {output.name!r} of the call before, but "
                    "every clip is embedded by itself; export it with the state inside, starting at zero"
                )


def _input_layout(audio: onnxruntime.NodeArg, declared: Declarations) -> InputLayout:
    shape = list(audio.shape)
    layouts: dict[int, InputLayout] = {1: "T", 2: "BT", 3: "B1T"}
    if len(shape) not in layouts or (len(shape) == 3 and shape[1] != 1):
        raise ContractError(
            f"input {audio.name!r} has shape {shape}; a waveform input is [batch, samples], [batch, 1, samples] or [samples]"
        )
    layout = layouts[len(shape)]
    if "input_layout" in declared and declared["input_layout"].value != layout:
        by = declared["input_layout"]
        raise ContractError(f"{by.source} declares input_layout={by.value}, but input {audio.name!r} has shape {shape}")
    if isinstance(shape[-1], int):
        raise ContractError(f"input {audio.name!r} takes exactly {shape[-1]} samples; export it with a dynamic samples axis")
    if len(shape) > 1 and isinstance(shape[0], int) and shape[0] != 1:
        raise ContractError(f"input {audio.name!r} takes batches of exactly {shape[0]}; export it with a dynamic batch axis")
    return layout


def _choose_output(probe: _Probe, low: int, high: int) -> tuple[str, OutputLayout]:
    """The embedding output and its layout, from which axis grows with the input."""
    names = [node.name for node in probe.session.outputs if node.type in FLOAT_TYPES]
    if "output" in probe.declared:
        wanted = probe.declared["output"]
        if wanted.value not in names:
            raise ContractError(f"{wanted.source}: the model has no float output {wanted.value!r}; it has {_list(names)}")
        names = [str(wanted.value)]
    short = probe.run_outputs(names, probe.noise(low))
    long = probe.run_outputs(names, probe.noise(high))
    layouts: dict[str, OutputLayout] = {}
    problems = []
    for name, a, b in zip(names, short, long, strict=True):
        layout = _layout(a.shape, b.shape)
        if layout is None:
            problems.append(f"output {name!r} has shape {list(a.shape)} for {low} samples and {list(b.shape)} for {high}")
        else:
            layouts[name] = layout
    if not layouts:
        raise ContractError(
            f"{problems[0]}: no axis holds frames that follow the input's length; an encoder gives [batch, frames, dim]"
        )
    framed = [name for name in layouts if layouts[name] != "BD"] or list(layouts)
    preferred = [name for name in framed if name in ("embeddings", "last_hidden_state")] or framed
    if len(preferred) > 1:
        raise ContractError(f"any of outputs {_list(preferred)} could be the embedding; name it by --contract output=NAME")
    if len(names) > 1:
        probe.sources["output"] = (
            "measured (the one whose frames follow the length)" if len(framed) == 1 else "graph (by name)"
        )
    name = preferred[0]
    layout = layouts[name]
    if "output_layout" in probe.declared and probe.declared["output_layout"].value != layout:
        by = probe.declared["output_layout"]
        raise ContractError(f"{by.source} declares output_layout={by.value}, but {layout} was measured")
    return name, layout


def _layout(short: tuple[int, ...], long: tuple[int, ...]) -> OutputLayout | None:
    """Which axis is frames, from the output's shape for a short and a longer input (batch 1)."""
    if len(short) != len(long) or 0 in short:
        return None
    grows = [axis for axis in range(len(short)) if long[axis] > short[axis]]
    if len(short) == 3 and short[0] == 1 and len(grows) == 1:
        return {1: "BTD", 2: "BDT"}.get(grows[0])  # type: ignore[return-value]
    if len(short) == 2 and grows == [0]:
        return "TD"
    if len(short) == 2 and not grows and short == long and short[0] == 1:
        return "BD"
    return None


def _measure_law(probe: _Probe, audio: onnxruntime.NodeArg, low: int, high: int) -> FrameLaw:
    """The frame law: guessed from the symbolic dimension or the declarations, and confirmed; else found by bisection."""
    guesses: list[FrameLaw | None] = []
    hop, receptive = probe.declared.get("hop_samples"), probe.declared.get("receptive_field_samples")
    if hop and receptive:
        guesses.append(FrameLaw(int(hop.value), int(receptive.value)))
    if counted := _symbolic_frames(probe, audio):
        guesses.append(fit_frame_law(counted, low, high))
    for guess in guesses:
        if guess and law_holds(guess, probe.frames, low, high):
            return guess
    law = fit_frame_law(probe.frames, low, high)
    if law is None or not law_holds(law, probe.frames, low, high):
        counts = ", ".join(f"{n} -> {probe.frames(n)}" for n in (low, (low + high) // 2, high))
        raise ContractError(
            f"the frame count of output {probe.contract.output!r} follows no law floor((samples - receptive) / hop) + 1 "
            f"(samples -> frames: {counts}), so frames have no time"
        )
    return law


def _symbolic_frames(probe: _Probe, audio: onnxruntime.NodeArg) -> Callable[[int], int] | None:
    axis = {"BTD": 1, "BDT": 2, "TD": 0}[probe.contract.output_layout]
    shape = next(node.shape for node in probe.session.outputs if node.name == probe.contract.output)
    samples, frames = audio.shape[-1], shape[axis] if axis < len(shape) else None
    return frames_of_dimension(frames, samples) if isinstance(samples, str) and isinstance(frames, str) else None


def _measure_minimum(probe: _Probe, low: int) -> int:
    """The shortest input that gives a frame: as declared, by the law, else the shortest of a few that works."""
    if declared := probe.choose("min_samples", None):
        try:
            if probe.frames(declared) >= 1:
                return int(declared)
            problem = "it gives no frame"
        except ModelError as error:
            problem = str(error)
        raise ContractError(
            f"{probe.sources['min_samples']} declares min_samples={declared}, but with that many samples {problem}"
        )
    probe.sources["min_samples"] = "measured"
    by_law = max(probe.contract.receptive_field_samples or 1, 1)
    for samples in (by_law, math.ceil(low / 16), math.ceil(low / 4), math.ceil(low / 2)):
        if by_law <= samples < low:
            try:
                if probe.frames(samples) >= 1:
                    return samples
            except ModelError:
                continue
    return low


def _choose_chunk(probe: _Probe) -> int:
    contract = probe.contract
    chunk = int(probe.choose("chunk_samples", round(DEFAULT_CHUNK_SECONDS * contract.sample_rate)))
    if contract.max_samples is not None and chunk > contract.max_samples:
        if "chunk_samples" in probe.declared:
            raise ContractError(f"chunk_samples={chunk} is more than max_samples={contract.max_samples}")
        chunk = contract.max_samples
    if chunk < contract.min_samples:
        raise ContractError(f"chunk_samples={chunk} is less than the {contract.min_samples} samples that the model needs")
    return chunk


def _measure_batch(probe: _Probe, audio: onnxruntime.NodeArg, samples: int) -> dict[str, bool]:
    """Whether batches work, and whether an item's embedding depends on a loud neighbour."""
    probe.sources["dynamic_batch"] = probe.sources["batch_coupled"] = "measured"
    fixed = probe.contract.input_layout == "T" or probe.contract.output_layout == "TD" or isinstance(audio.shape[0], int)
    if fixed:
        return {"dynamic_batch": False, "batch_coupled": False}
    pair = probe.noise(samples, batch=2)
    pair[1] = np.clip(pair[1] * 9, -1, 1)
    try:
        together = probe.run(pair)
    except ModelError:
        return {"dynamic_batch": False, "batch_coupled": False}
    alone = probe.run(pair[:1])
    if together.shape != (2, *alone.shape[1:]):
        return {"dynamic_batch": False, "batch_coupled": False}
    scale = float(np.abs(alone).max()) or 1.0
    coupled = not bool(np.abs(together[:1] - alone).max() <= _COUPLING_TOLERANCE * scale)
    return {"dynamic_batch": True, "batch_coupled": coupled}


def _list(names: Any) -> str:
    return ", ".join(repr(str(name)) for name in names) or "none"
