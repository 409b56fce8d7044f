"""Which input of a model takes the waveform or its features, and which others can be filled: lengths, a mask, constants.

Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from ...errors import ContractError, ContradictionError, foreign, quoted
from ..adapter import FLOAT_TYPES, LENGTH_TYPES, MASK_TYPES
from ..contract.constants import PREFIX as CONSTANT
from ..contract.constants import Constant, constant_of
from ..contract.contract import AnyFrontend, FrontendModel
from ..contract.declarations import Declarations, declared_frontend, declared_windows
from ..contract.frontend import MODEL_KEYS, PREFIX
from ..contract.windows import Windows, make_windows
from .layouts import bins_fit, bins_shown, feature_layouts, input_layout, looks_like_features
from .probe import HOW

if TYPE_CHECKING:
    import onnxruntime

_LENGTH_NAMES = ("length", "lens", "num_samples", "n_samples")
_MASK_NAMES = {"mask", "attention_mask", "input_mask", "audio_mask"}
_WAVEFORM_NAMES = {"audio", "waveform", "input_values"}
_FEATURE_NAMES = {"input_features", "input_values", "features", "feats", "speech", "x"}
_LISTED = 12  # names in a sentence
_SHORTEST_WINDOW = 400  # samples; a fixed axis of fewer holds features or a state, not audio


class Inputs(msgspec.Struct, frozen=True):
    """The inputs that are filled, and what the graph fixes of them."""

    audio: str
    """The input for the waveform, or for the features that `frontend` makes of it."""
    layouts: tuple[str, ...]
    """Those that its shape allows; only features may have more than one."""
    shape: tuple[int | str | None, ...]
    """Its shape in the graph."""
    lengths: str | None
    mask: str | None
    frontend: AnyFrontend | None = None
    windows: Windows | None = None
    constants: dict[str, Constant] = {}
    sources: dict[str, str] = {}
    """Where the fields of the front end, the windows and the constants are from."""

    @property
    def time(self) -> int | str | None:
        """The axis of samples, or of frames of features."""
        return self.shape[self.layouts[0].index("T")]

    @property
    def window(self) -> int | None:
        """The only number of samples that it takes, if the graph fixes one."""
        if not isinstance(self.time, int):
            return None
        return self.frontend.samples_for(self.time) if self.frontend else self.time

    @property
    def fixed_batch(self) -> int | None:
        size = self.shape[self.layouts[0].index("B")] if "B" in self.layouts[0] else None
        return size if isinstance(size, int) else None


def choose_inputs(
    nodes: list[onnxruntime.NodeArg],
    outputs: list[onnxruntime.NodeArg],
    declared: Declarations,
    front: FrontendModel | None = None,
) -> Inputs:
    """Choose the input for the audio, and those for lengths and a mask.

    Args:
        nodes: The graph's inputs.
        outputs: The graph's outputs, which show whether an input is a state.
        declared: What is declared of the model, by contract key.
        front: The graph that makes the features.

    Raises:
        ContradictionError: A declared input or layout is not the graph's.
        ContractError: No input, or any of several, could take the audio; or nothing here can fill another input.
    """
    by_name = {node.name: node for node in nodes}
    for key in ("input", "lengths_input", "mask_input"):
        if key in declared and declared[key].value not in by_name:
            raise ContradictionError(
                f"{declared[key].source}: the model has no input {quoted(declared[key].value)}; it has {listed(by_name)}",
                about=key,
            )
    constants = _constants(by_name, declared)
    nodes = [node for node in nodes if node.name not in constants]
    features = "input_kind" in declared and declared["input_kind"].value == "features"
    if "input" in declared:
        audio = by_name[str(declared["input"].value)]
    else:
        audio = _features(nodes, outputs, declared) if features else _waveform(nodes, outputs, declared)
    if audio.type not in FLOAT_TYPES:
        what = "an input of features" if features else "a waveform input"
        raise ContractError(f"input {quoted(audio.name)} is {audio.type}; {what} must be float")
    frontend, sources = _frontend(audio, declared, front) if features else (None, {})
    layouts = _feature_layouts(audio, frontend, declared) if frontend else (_layout(audio, declared),)
    lengths, mask = None, None
    for node in nodes:
        if node.name == audio.name:
            continue
        if mask is None and _is_mask(node, declared):
            mask = node.name
        elif lengths is None and _is_lengths(node, declared):
            lengths = node.name
        else:
            _refuse_state([other for other in nodes if other.name != audio.name], outputs)
            raise ContractError(
                f"the model needs input {quoted(node.name)} ({node.type}, shape {foreign(str(node.shape))}) beside the "
                f"{'features' if features else 'waveform'}, which nothing here can fill; {_cure(node)}"
            )
    sources |= {CONSTANT + name: declared[CONSTANT + name].source for name in constants}
    inputs = Inputs(audio.name, layouts, tuple(audio.shape), lengths, mask, frontend, None, constants, sources)
    return _with_windows(inputs, declared)


def _with_windows(inputs: Inputs, declared: Declarations) -> Inputs:
    windows, sources = make_windows(
        *declared_windows(declared),
        name=inputs.audio,
        axis=inputs.time if isinstance(inputs.time, int) else None,
        batch=inputs.fixed_batch if "B" in inputs.layouts[0] else 1,
        features=inputs.frontend is not None,
        preset=inputs.frontend.preset if inputs.frontend else None,
    )
    return msgspec.structs.replace(inputs, windows=windows, sources=inputs.sources | sources)


def _constants(nodes: dict[str, onnxruntime.NodeArg], declared: Declarations) -> dict[str, Constant]:
    """The declared inputs that carry no audio."""
    constants = {}
    for key, declaration in declared.items():
        if not key.startswith(CONSTANT):
            continue
        name = key.removeprefix(CONSTANT)
        if name not in nodes:
            raise ContradictionError(
                f"{declaration.source}: the model has no input {quoted(name)}; it has {listed(nodes)}", about="input"
            )
        node = nodes[name]
        constants[name] = constant_of(name, node.type, node.shape, str(declaration.value), declaration.source)
    return constants


def listed(items: Iterable[Any]) -> str:
    """The first names in quotes, and how many more there are."""
    names = [str(item) for item in items]
    rest = len(names) - _LISTED
    quoted = ", ".join(repr(name[:40]) for name in names[:_LISTED])
    return f"{quoted} and {rest} more" if rest > 0 else quoted or "none"


def _refuse_state(nodes: list[onnxruntime.NodeArg], outputs: list[onnxruntime.NodeArg]) -> None:
    """Raise `ContractError` if one of these inputs takes an output of the previous call: the two share a name or a shape."""
    for node in nodes:
        for output in outputs:
            same_rank = output.type == node.type and len(output.shape) == len(node.shape)
            same_shape = len(node.shape) >= 3 and isinstance(node.shape[-1], int) and list(output.shape) == list(node.shape)
            if same_rank and (node.name.lower() in output.name.lower() or same_shape):
                raise ContractError(
                    f"the model keeps a state: input {quoted(node.name)} takes output {quoted(output.name)} of the "
                    "previous call, but each clip is embedded by itself; export it with the state inside, starting at zero"
                )


def _waveform(
    nodes: list[onnxruntime.NodeArg], outputs: list[onnxruntime.NodeArg], declared: Declarations
) -> onnxruntime.NodeArg:
    floats = [node for node in nodes if node.type in FLOAT_TYPES and not _is_mask(node, declared)]
    if len(floats) > 1:  # a state has another shape
        floats = [
            node for node in floats if (layout := input_layout(node.shape)) and _is_audio(node.shape, layout)
        ] or floats
    if not floats:
        raise ContractError(f"the model has no float input for a waveform; it has {listed(node.name for node in nodes)}")
    return _only_or_named(floats, _WAVEFORM_NAMES, "be the waveform", outputs)


def _features(
    nodes: list[onnxruntime.NodeArg], outputs: list[onnxruntime.NodeArg], declared: Declarations
) -> onnxruntime.NodeArg:
    floats = [node for node in nodes if node.type in FLOAT_TYPES and not _is_mask(node, declared)]
    if not floats:
        raise ContractError(f"the model has no float input for features; it has {listed(node.name for node in nodes)}")
    return _only_or_named(floats, _FEATURE_NAMES, "take the features", outputs)


def _only_or_named(
    nodes: list[onnxruntime.NodeArg], usual: set[str], role: str, outputs: list[onnxruntime.NodeArg]
) -> onnxruntime.NodeArg:
    """The only one of several inputs, or the only one with a usual name."""
    if len(nodes) == 1:
        return nodes[0]
    named = [node for node in nodes if node.name.lower() in usual]
    if len(named) != 1:
        _refuse_state(nodes, outputs)
        names = listed(node.name for node in nodes)
        raise ContractError(f"any of {names} could {role}; name it by --contract input=NAME")
    return named[0]


def _waveform_error(audio: onnxruntime.NodeArg, declared: Declarations) -> ContractError:
    axes = "; if its axes are frames and bins, --contract input_layout=TF" if len(audio.shape) == 2 else ""
    return ContractError(
        f"{declared['input_kind'].source} says that the model takes features, but input {quoted(audio.name)} has the "
        f"shape of a waveform, {foreign(str(list(audio.shape)))}; if its front end is inside, set --contract "
        f"input_kind=waveform{axes}"
    )


def _frontend(
    audio: onnxruntime.NodeArg, declared: Declarations, front: FrontendModel | None
) -> tuple[AnyFrontend, dict[str, str]]:
    """The declared front end, and where its fields are from. Undeclared bands are those that the input's shape shows."""
    kind = declared["input_kind"]
    if front is not None:
        sources = {key: declared[key].source if key in declared else "default" for key in MODEL_KEYS}
        return front, sources | {f"{PREFIX}model_sha256": "the file", "input_kind": kind.source}
    if not any(key.startswith(PREFIX) for key in declared):
        if input_layout(audio.shape) and not any(isinstance(size, int) and size > 1 for size in audio.shape[-2:]):
            raise _waveform_error(audio, declared)
        raise ContractError(
            f"{kind.source} says that input {quoted(audio.name)} takes features, but not how to make them; {HOW}"
        )
    frontend, sources = declared_frontend(declared, None)
    shown = None if PREFIX + "mels" in declared else bins_shown(audio.shape, frontend.bins)
    if shown and shown % frontend.stack_frames == 0:
        frontend, sources = declared_frontend(declared, shown // frontend.stack_frames)
    return frontend, sources | {"input_kind": kind.source}


def _feature_layouts(audio: onnxruntime.NodeArg, frontend: AnyFrontend, declared: Declarations) -> tuple[str, ...]:
    shape, declaration = list(audio.shape), declared.get("input_layout")
    if declaration:
        layout = str(declaration.value)
        if "F" not in layout:
            raise ContractError(
                f"{declaration.source} declares input_layout={layout}, which has no axis F for the bins of features"
            )
        sizes = dict(zip(layout, shape, strict=False))
        singles = [size for axis, size in zip(layout, shape, strict=False) if axis == "1"]
        fits = len(layout) == len(shape) and bins_fit(sizes["F"], sizes["T"], frontend.bins)
        if not fits or any(isinstance(size, int) and size != 1 for size in singles):
            raise ContractError(
                f"{declaration.source} declares input_layout={layout}, but input {quoted(audio.name)} has shape "
                f"{foreign(str(shape))}, and a frame has {frontend.bins} bins"
            )
        return (layout,)
    if input_layout(shape) and frontend.bins not in shape:
        raise _waveform_error(audio, declared)
    layouts = feature_layouts(shape, frontend.bins)
    if not layouts:
        bands = "name the front end of this model" if frontend.preset == "model" else "set the number of bands"
        raise ContractError(
            f"input {quoted(audio.name)} has shape {foreign(str(shape))}, and the front end gives {frontend.bins} bins "
            f"per frame; {bands} by --contract frontend.{'model=FILE.onnx' if frontend.preset == 'model' else 'mels=N'}, or "
            "the axes by --contract input_layout=BTF or BFT"
        )
    return tuple(layouts)


def _layout(audio: onnxruntime.NodeArg, declared: Declarations) -> str:
    shape = list(audio.shape)
    layout = input_layout(shape)
    if layout is None and looks_like_features(shape):
        raise ContractError(
            f"input {quoted(audio.name)} has the shape of features, {foreign(str(shape))}, and nothing declares how to "
            f"make them; {HOW}"
        )
    if layout is None:
        raise ContractError(
            f"input {quoted(audio.name)} has shape {foreign(str(shape))}; a waveform input is [batch, samples], [batch, "
            "1, samples], [batch, samples, 1] or [samples]"
        )
    declaration = declared.get("input_layout")
    if declaration and declaration.value != layout:
        raise ContradictionError(
            f"{declaration.source} declares input_layout={declaration.value}, but input {quoted(audio.name)} has shape "
            f"{foreign(str(shape))}",
            about="input_layout",
        )
    if not declaration and not _is_audio(shape, layout):
        raise ContractError(
            f"input {quoted(audio.name)} takes exactly {shape[layout.index('T')]} values, too few for a window of audio; "
            f"export it with a dynamic samples axis, or declare that they are samples by --contract input_layout={layout}"
        )
    return layout


def _is_audio(shape: list[Any], layout: str) -> bool:
    samples = shape[layout.index("T")]
    return not isinstance(samples, int) or samples >= _SHORTEST_WINDOW


def _is_mask(node: onnxruntime.NodeArg, declared: Declarations) -> bool:
    named = declared["mask_input"].value == node.name if "mask_input" in declared else node.name.lower() in _MASK_NAMES
    return named and node.type in MASK_TYPES and len(node.shape) == 2


def _is_lengths(node: onnxruntime.NodeArg, declared: Declarations) -> bool:
    declares = "lengths_input" in declared and declared["lengths_input"].value == node.name
    named = any(part in node.name.lower() for part in _LENGTH_NAMES)
    return node.type in LENGTH_TYPES and len(node.shape) == 1 and (declares or named)


def _cure(node: onnxruntime.NodeArg) -> str:
    constant = f"if it carries no audio, {CONSTANT}{foreign(node.name)}=VALUE; else export it without that input"
    if node.type in MASK_TYPES and len(node.shape) == 2:
        return f"if it is a mask with ones for samples, set --contract mask_input={foreign(node.name)}; {constant}"
    return constant.replace(", ", ", set --contract ", 1)
