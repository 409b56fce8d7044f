"""Measure a model: layouts, dimension, the law of its frames, batches. Runs in the worker process.

Names and declarations may lie, so everything that can be measured is measured; a declaration that contradicts a measurement
is an error. The probe signal is seeded noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from ...errors import ContractError, ContradictionError, ModelError, concerning, quoted
from ..contract.contract import DEFAULT_SAMPLE_RATE, Contract, FrontendModel, hop_key
from ..contract.declarations import Declarations, declared_tokens
from ..contract.frame_law import FrameLaw, fit_frame_law, frames_of_dimension, law_holds
from ..contract.frontend import AMPLITUDES
from ..contract.tokens import PREFIX as TOKENS
from ..contract.windows import PREFIX as WINDOW
from ..contract.windows import Windows
from ..limits import UNTRUSTED
from ..session import Session
from . import patch_grid
from .batches import batching, loud_pair, may_take_pairs
from .chunk_lengths import check_long_input, choose_chunk, choose_overlap
from .frame_times import WINDOW_HOP, even_hop, first_center, first_center_in_window
from .inputs import Inputs, choose_inputs
from .outputs import choose_output, token_changes
from .probe import Probe

_FRAME_KEYS = {"hop_samples", "receptive_field_samples", "first_frame_center_samples"}


def measure_contract(
    session: Session,
    declared: Declarations,
    beat: Callable[[], None],
    *,
    max_dim: int = UNTRUSTED.dim,
    front: FrontendModel | None = None,
) -> Contract:
    """Measure the contract of a loaded model.

    Args:
        session: The loaded model.
        declared: What is declared of it, by contract key.
        beat: Called after every run, as a sign of life.
        max_dim: The largest dimension that an embedding may have.
        front: The graph that makes the features, which the session has loaded too.

    Returns:
        The contract, with the source of each field.

    Raises:
        ContradictionError: A declaration and a measurement differ.
        ContractError: No contract fits the model; `about` says which property it lacks.
        ModelError: The model fails on noise.
    """
    probe = Probe(session, declared, beat)
    probe.max_dim = max_dim
    with concerning("input"):
        inputs = choose_inputs(session.inputs, session.outputs, declared, front)
    tokens = declared_tokens(declared)
    if inputs.windows and tokens:
        raise ContractError(
            f"a model of windows gives one vector per window, and so has no grid of tokens; drop {TOKENS}* or {WINDOW}*"
        )
    probe.contract = Contract(
        input=inputs.audio,
        input_layout=inputs.layouts[0],
        lengths_input=inputs.lengths,
        mask_input=inputs.mask,
        output="",
        output_layout="BTD",
        dim=0,
        sample_rate=probe.choose("sample_rate", DEFAULT_SAMPLE_RATE),
        hop_samples=None,
        receptive_field_samples=None,
        first_frame_center_samples=None,
        min_samples=1,
        max_samples=None if inputs.windows else probe.choose("max_samples", None),
        chunk_samples=0,
        amplitude=probe.choose("amplitude", *_usual_amplitude(inputs)),
        normalize=probe.choose("normalize", "none"),
        dynamic_batch=False,
        batch_coupled=False,
        fixed_batch=None if inputs.windows else inputs.fixed_batch,
        frontend=None if isinstance(inputs.frontend, FrontendModel) else inputs.frontend,
        constants=inputs.constants or msgspec.UNSET,
        tokens=tokens or msgspec.UNSET,
        frontend_model=front or msgspec.UNSET,
        windows=inputs.windows or msgspec.UNSET,
        license=probe.choose("license", None),
        source=probe.choose("source", None),
    )
    samples = None if inputs.windows else _fixed_samples(probe, inputs)
    if len(inputs.layouts) > 1:
        _choose_input_layout(probe, inputs, samples)
    if samples is None:
        samples = _measure_growing(probe, inputs)
    else:
        _measure_window(probe, samples)
    probe.update(**_measure_batch(probe, samples))
    if probe.contract.windows and probe.contract.batch_coupled:  # those of one clip would depend on each other
        probe.update(windows=msgspec.structs.replace(probe.contract.windows, per_call=1))
    probe.update(sources=_sources(probe, inputs))
    return probe.contract


def _usual_amplitude(inputs: Inputs) -> tuple[str, str]:
    preset = inputs.frontend.preset if inputs.frontend else ""
    return (AMPLITUDES[preset], f"preset {preset}") if preset in AMPLITUDES else ("unit", "default")


def _sources(probe: Probe, inputs: Inputs) -> dict[str, str]:
    """Where each field of the contract is from: what no measurement recorded is declared, or from the graph."""
    sources = {"input_kind": "graph", **inputs.sources, **probe.sources, "dim": "measured"}
    for field in ("input", "input_layout", "lengths_input", "mask_input"):
        if field not in probe.sources and getattr(probe.contract, field) is not None:
            sources[field] = probe.declared[field].source if field in probe.declared else "graph"
    if probe.contract.fixed_batch is not None:
        sources["fixed_batch"] = "graph"
    if "output" in probe.declared:
        sources["output"] = probe.declared["output"].source
    if probe.contract.tokens:
        keys = ("prefix", "grid", "bands", "use")
        sources |= {
            key: probe.declared[key].source if key in probe.declared else "default" for key in map(TOKENS.__add__, keys)
        }
    sources.setdefault("output", "graph")
    sources.setdefault("output_layout", "measured")
    return sources


def _choose_input_layout(probe: Probe, inputs: Inputs, samples: int | None) -> None:
    """Set the only layout that the model accepts of those that the shape of its features allows."""
    accepted, problem = [], ""
    for layout in inputs.layouts:
        probe.update(input_layout=layout)
        try:
            if samples is None:
                probe.shortest_probe()
            else:
                probe.run_outputs(probe.float_outputs(), probe.noise(samples))
            accepted.append(layout)
        except ModelError as error:
            problem = problem or str(error)
    if not accepted:
        bins = inputs.frontend.bins if inputs.frontend else 0
        raise ContractError(f"the model fails on {bins} bins per frame, whatever the order of its axes: {problem}")
    if len(accepted) > 1:
        flags = " or ".join(f"--contract input_layout={layout}" for layout in accepted)
        raise ContractError(
            f"input {quoted(inputs.audio)} has shape {list(inputs.shape)}, and the model accepts features in any order; set "
            f"{flags} (B batch, T frames, F bins)"
        )
    probe.update(input_layout=accepted[0])
    probe.sources["input_layout"] = "measured"


def _measure_growing(probe: Probe, inputs: Inputs) -> int:
    """Measure a model that takes inputs of many lengths. Returns the samples of the shortest probe."""
    low = probe.shortest_probe()
    high = 3 * low + 1
    if probe.contract.max_samples:
        high = min(high, probe.contract.max_samples)
    choose_output(probe, low, high)
    if probe.contract.has_frames:
        law = _measure_law(probe, inputs, low, high)
        center, center_source = first_center(law, inputs.frontend)
        probe.update(
            hop_samples=probe.agree("hop_samples", law.hop),
            receptive_field_samples=probe.agree("receptive_field_samples", law.receptive_field),
            first_frame_center_samples=probe.choose("first_frame_center_samples", center, center_source),
        )
    else:
        _refuse_frames_of_a_clip(probe)
    probe.update(min_samples=_measure_minimum(probe, low))
    probe.update(chunk_samples=choose_chunk(probe))
    check_long_input(probe)
    choose_overlap(probe)
    return low


# ---------------------------------------------------------------- fixed windows


def _fixed_samples(probe: Probe, inputs: Inputs) -> int | None:
    """The only length that the model takes: by its graph, or declared as both its minimum and its maximum."""
    declared = {key: probe.declared[key] for key in ("min_samples", "max_samples", "chunk_samples") if key in probe.declared}
    if inputs.window is None:
        shortest, longest = declared.get("min_samples"), declared.get("max_samples")
        if not shortest or not longest or shortest.value != longest.value:
            return None
        window, source = int(longest.value), longest.source
    else:
        window, source = inputs.window, "graph (the input's axis is fixed)"
    for key, declaration in declared.items():
        if declaration.value != window:
            raise ContradictionError(
                f"{declaration.source} declares {key}={declaration.value}, but input {quoted(inputs.audio)} takes exactly "
                f"{window} samples{f' ({inputs.time} frames)' if inputs.frontend else ''}; correct the declaration",
                about=key,
            )
    lengths = ("min_samples", "max_samples", "chunk_samples")
    probe.sources.update({key: declared[key].source if key in declared else source for key in lengths})
    probe.update(min_samples=window, max_samples=window, chunk_samples=window)
    return window


def _measure_window(probe: Probe, samples: int) -> None:
    """Measure a model whose input is a fixed window: output, and the times of the frames in it."""
    window = choose_output(probe, samples, samples)
    if not probe.contract.has_frames:
        _refuse_frames_of_a_clip(probe)
        return
    frames = probe.frames(samples)
    if frames > samples:
        raise ContractError(
            f"the model gives {frames} frames for {samples} samples; more frames than samples have no times of their own"
        )
    probe.update(window_frames=frames)
    assert window is not None
    frontend = probe.contract.features
    (law,) = window.measure_laws([probe.contract])
    if law is not None:
        hop: float = probe.agree("hop_samples", law.hop)
        receptive: int | None = probe.agree("receptive_field_samples", law.receptive_field)
        center, center_source = first_center(law, frontend)
    else:
        hop, center, center_source = _times_in_window(probe, samples, frames)
        receptive = probe.choose("receptive_field_samples", None)
        if center < 0 or (center == 0 and frontend is None):
            raise ContradictionError(
                f"{probe.sources['hop_samples']} declares hop_samples={hop}, but {frames} frames at that hop do not fit "
                f"into the window of {samples} samples; correct the declaration",
                about="hop_samples",
            )
        if receptive is not None:
            center, center_source = first_center(FrameLaw(1, int(receptive)), frontend)
    probe.update(
        hop_samples=hop,
        receptive_field_samples=receptive,
        first_frame_center_samples=probe.choose("first_frame_center_samples", center, center_source),
    )


def _times_in_window(probe: Probe, samples: int, frames: int) -> tuple[float, float, str]:
    """The hop, and the first frame's centre with where it is from, of frames that see the whole window."""
    frontend, tokens = probe.contract.features, probe.contract.tokens
    if tokens and "hop_samples" not in probe.declared:
        changes = token_changes(probe, samples)
        measured = patch_grid.times(*changes.in_time(), tokens)
        if measured is not None and measured.explained > patch_grid.SURE:
            hop, center = patch_grid.times_in_samples(measured, frames, frontend, probe.contract.sample_rate)
            return probe.choose("hop_samples", hop, patch_grid.MEASURED), center, patch_grid.MEASURED
    hop = probe.choose("hop_samples", even_hop(samples, frames, frontend), WINDOW_HOP)
    return hop, *first_center_in_window(samples, frames, hop, frontend)


def _refuse_frames_of_a_clip(probe: Probe) -> None:
    if contradicted := probe.declared.keys() & _FRAME_KEYS:
        key = min(contradicted)
        cure = (
            f"; for a frame per window, declare --contract {hop_key(probe.contract)}=N"
            if probe.contract.fixed_window
            else ""
        )
        raise ContradictionError(
            f"{probe.declared[key].source} declares {key}={probe.declared[key].value}, but output "
            f"{quoted(probe.contract.output)} gives one vector per clip, without frames{cure}",
            about=key,
        )


# ---------------------------------------------------------------- frames, lengths and batches


def _measure_law(probe: Probe, inputs: Inputs, low: int, high: int) -> FrameLaw:
    """The frame law: of the declarations or the symbolic dimension if the model follows it, else found by bisection."""
    guesses: list[FrameLaw | None] = []
    hop, receptive = probe.declared.get("hop_samples"), probe.declared.get("receptive_field_samples")
    if hop and receptive:
        guesses.append(FrameLaw(int(hop.value), int(receptive.value)))
    if windows := inputs.windows:
        guesses.append(_law_of_windows(windows, inputs))
    elif symbolic := _symbolic_frames(probe, inputs):
        guesses.append(fit_frame_law(symbolic, low, high))
    for guess in guesses:
        if guess and law_holds(guess, probe.frames, low, high):
            return guess
    law = fit_frame_law(probe.frames, low, high)
    if law is None or not law_holds(law, probe.frames, low, high):
        counts = ", ".join(f"{n} -> {probe.frames(n)}" for n in (low, (low + high) // 2, high))
        raise ContractError(
            f"the frame count of output {quoted(probe.contract.output)} follows no law floor((samples - receptive) / hop) "
            "+ 1 "
            f"(samples -> frames: {counts}), so its frames have no times",
            about="frames",
        )
    return law


def _law_of_windows(windows: Windows, inputs: Inputs) -> FrameLaw:
    front = inputs.frontend
    if front is None:
        return FrameLaw(windows.hop, windows.length)
    return FrameLaw(windows.hop * front.frame_samples, front.law.first_length_with(windows.length))


def _symbolic_frames(probe: Probe, inputs: Inputs) -> Callable[[int], int] | None:
    """The frame count that the graph's symbolic dimensions promise, if they promise one."""
    axis = probe.contract.output_layout.index("T")
    shape = next(node.shape for node in probe.session.outputs if node.name == probe.contract.output)
    time, frames = inputs.time, shape[axis] if axis < len(shape) else None
    count = frames_of_dimension(frames, time) if isinstance(time, str) and isinstance(frames, str) else None
    frontend = inputs.frontend
    return count if count is None or frontend is None else lambda samples: count(frontend.frames(samples))


def _measure_minimum(probe: Probe, low: int) -> int:
    """The shortest input that gives a frame: as declared, by the law, or the shortest of a few that works."""
    if declared := probe.choose("min_samples", None):
        try:
            if probe.frames(declared) >= 1:
                return int(declared)
            problem = "it gives no frame"
        except ModelError as error:
            problem = str(error)
        raise ContradictionError(
            f"{probe.sources['min_samples']} declares min_samples={declared}, but with that many samples {problem}",
            about="min_samples",
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


def _measure_batch(probe: Probe, samples: int) -> dict[str, bool]:
    """Whether batches work, and whether an item's embedding depends on a loud neighbour."""
    probe.sources["dynamic_batch"] = probe.sources["batch_coupled"] = "measured"
    contract = probe.contract
    if not may_take_pairs(contract) or "B" not in contract.output_layout:
        return {"dynamic_batch": False, "batch_coupled": False}
    pair = loud_pair(probe, samples)
    try:
        together = probe.run(pair)
    except ModelError:
        return {"dynamic_batch": False, "batch_coupled": False}
    return batching(together, probe.run(pair[:1]))
