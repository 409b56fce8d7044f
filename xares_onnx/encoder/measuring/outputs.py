"""Which output of a model is the embedding, in which layout; and whether what passes for frames are patches of a grid."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ...errors import ContractError, ContradictionError, ModelError, ModelLimitError, quoted
from ..contract.tokens import Tokens
from . import patch_grid
from .batches import COUPLING_TOLERANCE, may_take_pairs
from .inputs import listed
from .layouts import batch_axis, growing_axis, output_layout
from .probe import Probe
from .windows import Window

_MOVES_AS_FRAMES = 0.5  # of the axis of frames, for a change that moves 0.75 of the window


def choose_output(probe: Probe, low: int, high: int) -> Window | None:
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
    if not may_take_pairs(probe.contract):
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


# ---------------------------------------------------------------- patches


def _refuse_patches(probe: Probe, window: Window | None, samples: int) -> None:
    """Raise `ContractError` if what would pass for frames are patches, several bands at every time."""
    contract = probe.contract
    if contract.tokens or contract.windows or not contract.has_frames:
        return
    grid = None
    # Bands that lie one after the other hold a change of one time apart, so that it seems to move little.
    if window and window.movement(contract.output, contract.output_layout.index("T")) < _MOVES_AS_FRAMES:
        grid = patch_grid.find_grid(token_changes(probe, samples), has_bins=contract.features is not None)
    elif contract.features is not None:
        grid = patch_grid.find_bands_within_times(token_changes(probe, samples))
    if grid:
        raise ContractError(
            f"output {quoted(contract.output)} has shape {_shape(probe, samples)}: {_looks_like(grid)}", about="output"
        )


def token_changes(probe: Probe, samples: int) -> patch_grid.Changes:
    """How the output's tokens, as the model gives them, change with parts of an input of noise."""
    adapter = probe.session.adapter(msgspec.structs.replace(probe.contract, tokens=msgspec.UNSET))

    def tokenise(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        (result,) = probe.run_values([probe.contract.output], values)
        tokens: npt.NDArray[np.float32] = adapter.frames(result, 1)[0]
        return tokens

    return patch_grid.Changes(tokenise, adapter.values(probe.noise(samples)))


def _with_grid(probe: Probe, name: str, samples: int, layout: str, problem: ContractError) -> ContractError:
    """The error of an output whose axes no measurement tells, with the options that declare its grid if it shows one."""
    probe.update(output=name, output_layout=layout)
    grid = patch_grid.find_grid(token_changes(probe, samples), has_bins=probe.contract.features is not None)
    if grid is None:
        return problem
    return ContractError(_looks_like(grid), about=problem.about)


def _looks_like(grid: Tokens) -> str:
    leading = f" after {grid.prefix} leading tokens" if grid.prefix else ""
    return (
        f"its tokens look like patches of a spectrogram, {grid.bands} bands at every time{leading}; if they are, set "
        f"{patch_grid.flags(grid)}, and if each is a frame, --contract tokens.grid=1xT"
    )


def _shape(probe: Probe, samples: int) -> list[int]:
    (result,) = probe.run_outputs([probe.contract.output], probe.noise(samples))
    return list(result.shape)
