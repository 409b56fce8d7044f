"""Measure a model: layouts, dimension, the law of its frames, batches. Runs in the worker process.

Names and declarations may lie, so everything that can be measured is measured; a declaration that contradicts a measurement
is an error. The probe signal is seeded noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ...errors import ContractError, ContradictionError, ModelError, ModelLimitError, concerning, quoted
from ..contract.contract import DEFAULT_SAMPLE_RATE, Contract, FrontendModel, hop_key
from ..contract.declarations import Declarations, declared_tokens
from ..contract.frame_law import FrameLaw, fit_frame_law, frames_of_dimension, law_holds
from ..contract.frontend import AMPLITUDES
from ..contract.tokens import PREFIX as TOKENS
from ..contract.tokens import Tokens
from ..contract.windows import PREFIX as WINDOW
from ..contract.windows import Windows
from ..limits import UNTRUSTED
from ..session import Session
from . import patch_grid
from .chunk_lengths import check_long_input, choose_chunk, choose_overlap
from .frame_times import WINDOW_HOP, even_hop, first_center, first_center_in_window
from .inputs import Inputs, choose_inputs, listed
from .layouts import batch_axis, growing_axis, output_layout
from .probe import Probe
from .windows import Window

COUPLING_TOLERANCE = 1e-3  # times the largest embedding value; float32 kernels differ by about 1e-6 between batch sizes
_MOVES_AS_FRAMES = 0.5  # of the axis of frames, for a change that moves 0.75 of the window
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
    _choose_output(probe, low, high)
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
    window = _choose_output(probe, samples, samples)
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
        changes = _changes(probe, samples)
        measured = patch_grid.times(*changes.in_time(), tokens)
        if measured is not None and measured.explained > patch_grid.SURE:
            hop, center = patch_grid.times_in_samples(measured, frames, frontend, probe.contract.sample_rate)
            return probe.choose("hop_samples", hop, patch_grid.MEASURED), center, patch_grid.MEASURED
    hop = probe.choose("hop_samples", even_hop(samples, frames, frontend), WINDOW_HOP)
    return hop, *first_center_in_window(samples, frames, hop, frontend)


def _changes(probe: Probe, samples: int) -> patch_grid.Changes:
    """How the output's tokens, as the model gives them, change with parts of an input of noise."""
    adapter = probe.session.adapter(msgspec.structs.replace(probe.contract, tokens=msgspec.UNSET))

    def tokenise(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        (result,) = probe.run_values([probe.contract.output], values)
        tokens: npt.NDArray[np.float32] = adapter.frames(result, 1)[0]
        return tokens

    return patch_grid.Changes(tokenise, adapter.values(probe.noise(samples)))


def _refuse_patches(probe: Probe, window: Window | None, samples: int) -> None:
    """Raise `ContractError` if what would pass for frames are patches, several bands at every time."""
    contract = probe.contract
    if contract.tokens or contract.windows or not contract.has_frames:
        return
    grid = None
    # Bands that lie one after the other hold a change of one time apart, so that it seems to move little.
    if window and window.movement(contract.output, contract.output_layout.index("T")) < _MOVES_AS_FRAMES:
        grid = patch_grid.find_grid(_changes(probe, samples), has_bins=contract.features is not None)
    elif contract.features is not None:
        grid = patch_grid.find_bands_within_times(_changes(probe, samples))
    if grid:
        raise ContractError(
            f"output {quoted(contract.output)} has shape {_shape(probe, samples)}: {_looks_like(grid)}", about="output"
        )


def _shape(probe: Probe, samples: int) -> list[int]:
    (result,) = probe.run_outputs([probe.contract.output], probe.noise(samples))
    return list(result.shape)


def _looks_like(grid: Tokens) -> str:
    leading = f" after {grid.prefix} leading tokens" if grid.prefix else ""
    return (
        f"its tokens look like patches of a spectrogram, {grid.bands} bands at every time{leading}; if they are, set "
        f"{patch_grid.flags(grid)}, and if each is a frame, --contract tokens.grid=1xT"
    )


def _with_grid(probe: Probe, name: str, samples: int, layout: str, problem: ContractError) -> ContractError:
    """The error of an output whose axes no measurement tells, with the options that declare its grid if it shows one."""
    probe.update(output=name, output_layout=layout)
    grid = patch_grid.find_grid(_changes(probe, samples), has_bins=probe.contract.features is not None)
    if grid is None:
        return problem
    return ContractError(_looks_like(grid), about=problem.about)


# ---------------------------------------------------------------- outputs


def _choose_output(probe: Probe, low: int, high: int) -> Window | None:
    """Set the embedding output, its layout and its dimension. Returns the `Window` if the input is one (`low` is `high`)."""
    names = probe.float_outputs()
    if "output" in probe.declared:
        output = probe.declared["output"]
        if output.value not in names:
            problem = f"{output.source}: the model has no float output {quoted(output.value)}; it has {listed(names)}"
            raise ContradictionError(problem, about="output")
        names = [str(output.value)]
    layouts, problems, window = find_layouts(probe, names, low, high)
    if not layouts:
        raise next(iter(problems.values()))
    framed = [name for name in layouts if "T" in layouts[name]] or list(layouts)
    preferred = [name for name in framed if name in ("embeddings", "last_hidden_state")] or framed
    if len(preferred) > 1:
        problem = f"any of outputs {listed(preferred)} could be the embedding; name it by --contract output=NAME"
        raise ContractError(problem, about="output")
    name = preferred[0]
    if len(names) > 1:
        probe.sources["output"] = "measured (the only one with frames)" if len(framed) == 1 else "graph (by name)"
    layout = probe.declared.get("output_layout")
    if layout and layout.value != layouts[name]:
        problem = f"{layout.source} declares output_layout={layout.value}, but {layouts[name]} was measured"
        raise ContradictionError(problem, about="output_layout")
    probe.update(output=name, output_layout=layouts[name])
    _refuse_patches(probe, window, low)
    dim = probe.embed(low).shape[2]
    if dim < 2:
        unit = "frame" if probe.contract.has_frames else "clip"
        problem = f"output {quoted(name)} gives {dim} value per {unit}; an embedding needs a dimension of 2 or more"
        raise ContractError(problem, about="output")
    if dim > probe.max_dim:
        raise too_wide(name, dim, probe.max_dim)
    probe.update(dim=probe.agree("output_dim", dim))
    if np.array_equal(probe.run(probe.noise(low)), probe.run(probe.noise(low, seed=1))):
        problem = f"output {quoted(name)} is the same for any input; name another by --contract output=NAME"
        raise ContractError(problem, about="constant")
    return window


def too_wide(output: str, dim: int, max_dim: int) -> ContractError:
    return ContractError(
        f"output {quoted(output)} has a dimension of {dim}, more than {max_dim}; --trust lifts the limit", about="output"
    )


def find_layouts(
    probe: Probe, names: list[str], low: int, high: int
) -> tuple[dict[str, str], dict[str, ContractError], Window | None]:
    """Find the layouts of outputs.

    The frames are along the axis that is longer for `high` samples than for `low`. If both are the same, the input is a
    fixed window, and they are along the axis on which a change in the window moves.

    Returns:
        The layout of each output that can be an embedding, the problem of each other one, and the `Window`, if it is one.
    """
    window = Window(probe, names, low) if low == high else None
    short = window.plain if window else dict(zip(names, probe.run_outputs(names, probe.noise(low)), strict=True))
    long = short if window else _longer(probe, names, low, high)
    pair = _pair(probe, names, low)
    again = dict(zip(names, probe.run_again(names, low), strict=True))
    layouts: dict[str, str] = {}
    problems: dict[str, ContractError] = {}
    for name in names:
        try:
            if 0 in short[name].shape:
                raise ContractError("it is empty")
            if not _same(short[name], again[name]):
                raise ContractError(
                    "its values for one input differ from run to run, so scores would too; export it in inference mode, "
                    "without dropout or random numbers",
                    about="random",
                )
            batch = batch_axis(short[name], pair.get(name), probe.contract.fixed_batch)
            time = _window_time(probe, window, name, batch) if window else growing_axis(short[name].shape, long[name].shape)
            layouts[name] = output_layout(short[name].shape, batch, time)
        except ContractError as error:
            lengths = f"{list(short[name].shape)} for {low} samples" + (
                "" if window else f" and {list(long[name].shape)} for {high}"
            )
            frozen = window is None and short[name].ndim > 2 and short[name].shape == long[name].shape
            problem = f"output {quoted(name)} has shape {lengths}: {error}"
            problems[name] = ContractError(problem, about=error.about or ("time" if frozen else "output"))
    return layouts, problems, window


def _longer(probe: Probe, names: list[str], low: int, high: int) -> dict[str, npt.NDArray[Any]]:
    """The outputs for `high` samples, of a model that took `low`."""
    try:
        return dict(zip(names, probe.run_outputs(names, probe.noise(high)), strict=True))
    except ModelLimitError:
        raise
    except ModelError as error:
        raise ContractError(
            f"the model takes {low} samples but not {high}, as if its export had frozen a length; export it with a dynamic "
            f"samples axis, or declare the longest input by --contract max_samples=N ({error})",
            about="time",
        ) from error


def _same(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> bool:
    """Whether two runs agree, except for what the order of a GPU's sums may change."""
    if first.shape != second.shape:
        return False
    with np.errstate(invalid="ignore", over="ignore"):
        scale = float(np.abs(first).max(initial=0))
        return bool(np.allclose(first, second, rtol=0, atol=COUPLING_TOLERANCE * scale, equal_nan=True))


def _pair(probe: Probe, names: list[str], samples: int) -> dict[str, npt.NDArray[Any]]:
    """The outputs for a batch of two, which show the batch axis; none if the model takes no such batch."""
    if not _may_take_pairs(probe.contract):
        return {}
    try:
        return dict(zip(names, probe.run_outputs(names, probe.noise(samples, batch=2)), strict=True))
    except ModelError:
        return {}


def _window_time(probe: Probe, window: Window, name: str, batch: int | None) -> int | None:
    """The axis of the frames in a window: as measured, or as declared if no measurement shows it."""
    shape = window.plain[name].shape
    if probe.contract.tokens and "output_layout" not in probe.declared and len(shape) == 3 and batch == 0:
        probe.sources["output_layout"] = (
            "default (of tokens)"  # a change moves within every band, and so little along the axis
        )
        return 1
    try:
        return window.time_axis(name, batch)
    except ContractError as error:
        declaration = probe.declared.get("output_layout")
        layout = str(declaration.value) if declaration else ""
        if not declaration and len(shape) == 3 and batch == 0:
            raise _with_grid(probe, name, probe.contract.chunk_samples, "BTD", error) from None
        if not declaration or "T" not in layout or len(layout) != len(shape):
            raise
        probe.sources["output_layout"] = declaration.source
        return layout.index("T")


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
    if not _may_take_pairs(contract) or "B" not in contract.output_layout:
        return {"dynamic_batch": False, "batch_coupled": False}
    pair = loud_pair(probe, samples)
    try:
        together = probe.run(pair)
    except ModelError:
        return {"dynamic_batch": False, "batch_coupled": False}
    return batching(together, probe.run(pair[:1]))


def _may_take_pairs(contract: Contract) -> bool:
    """Windows of several items are cut into as many calls as the model needs."""
    return bool(contract.windows) or (contract.fixed_batch is None and "B" in contract.input_layout)


def loud_pair(probe: Probe, samples: int) -> npt.NDArray[np.float32]:
    """(2, samples): noise and a neighbour nine times as loud."""
    pair = probe.noise(samples, batch=2)
    pair[1] = np.clip(pair[1] * 9, -1, 1)
    return pair


def batching(together: npt.NDArray[np.float32], alone: npt.NDArray[np.float32]) -> dict[str, bool]:
    """The contract's fields on batches.

    Args:
        together: The embeddings of a `loud_pair`, (2, frames, dim).
        alone: Those of its first item by itself, (1, frames, dim).
    """
    if together.shape != (2, *alone.shape[1:]):
        return {"dynamic_batch": False, "batch_coupled": False}
    scale = float(np.abs(alone).max()) or 1.0
    coupled = not bool(np.abs(together[:1] - alone).max() <= COUPLING_TOLERANCE * scale)
    return {"dynamic_batch": True, "batch_coupled": coupled}
