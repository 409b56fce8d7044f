"""Which input of a model takes the waveform, and which others can be filled: lengths and a mask. No model runs here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from .adapter import FLOAT_TYPES, LENGTH_TYPES, MASK_TYPES
from .contract import Declarations, InputLayout
from .errors import ContractError
from .layouts import input_layout

if TYPE_CHECKING:
    import onnxruntime

_LENGTH_NAMES = ("length", "lens", "num_samples", "n_samples")
_MASK_NAMES = {"mask", "attention_mask", "input_mask", "audio_mask"}
_LISTED = 12  # names in a sentence
_SHORTEST_WINDOW = 400  # samples; a fixed axis of fewer holds features or a state, not audio


class Inputs(msgspec.Struct, frozen=True):
    """The waveform input with its layout, the size of its batch and of its window where the graph fixes them, and the
    names of the inputs that are filled beside it."""

    audio: str
    layout: InputLayout
    samples: int | str | None
    fixed_batch: int | None
    lengths: str | None
    mask: str | None

    @property
    def window(self) -> int | None:
        return self.samples if isinstance(self.samples, int) else None


def choose_inputs(nodes: list[onnxruntime.NodeArg], outputs: list[onnxruntime.NodeArg], declared: Declarations) -> Inputs:
    """Raises `ContractError` where no input, or any of several, could take the waveform, and for one nobody can fill."""
    by_name = {node.name: node for node in nodes}
    for key in ("input", "lengths_input", "mask_input"):
        if key in declared and declared[key].value not in by_name:
            raise ContractError(
                f"{declared[key].source}: the model has no input {declared[key].value!r}; it has {listed(by_name)}"
            )
    audio = by_name[str(declared["input"].value)] if "input" in declared else _waveform(nodes, outputs, declared)
    if audio.type not in FLOAT_TYPES:
        raise ContractError(f"input {audio.name!r} is {audio.type}; a waveform input must be float")
    shape = list(audio.shape)
    layout = _layout(audio, declared)
    batch = shape[0] if layout != "T" and isinstance(shape[0], int) else None
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
                f"the model wants input {node.name!r} ({node.type}, shape {node.shape}) beside the waveform, "
                f"which nothing here can fill; {_cure(node)}"
            )
    return Inputs(audio.name, layout, shape[layout.index("T")], batch, lengths, mask)


def listed(found: Iterable[Any]) -> str:
    names = [str(name) for name in found]
    first, rest = names[:_LISTED], len(names) - _LISTED
    quoted = ", ".join(repr(name[:40]) for name in first)
    return f"{quoted} and {rest} more" if rest > 0 else quoted or "none"


def _refuse_state(nodes: list[onnxruntime.NodeArg], outputs: list[onnxruntime.NodeArg]) -> None:
    """Raise `ContractError` where one of these wants an output of the call before: such a pair shares a name or a shape."""
    for node in nodes:
        for output in outputs:
            alike = output.type == node.type and len(output.shape) == len(node.shape)
            same = len(node.shape) >= 3 and isinstance(node.shape[-1], int) and list(output.shape) == list(node.shape)
            if alike and (node.name.lower() in output.name.lower() or same):
                raise ContractError(
                    f"the model keeps a state: input {node.name!r} wants output {output.name!r} of the call before, but "
                    "every clip is embedded by itself; export it with the state inside, starting at zero"
                )


def _waveform(
    nodes: list[onnxruntime.NodeArg], outputs: list[onnxruntime.NodeArg], declared: Declarations
) -> onnxruntime.NodeArg:
    floats = [node for node in nodes if node.type in FLOAT_TYPES and not _is_mask(node, declared)]
    if len(floats) > 1:  # a state has a shape of its own
        floats = [
            node for node in floats if (layout := input_layout(node.shape)) and _is_audio(node.shape, layout)
        ] or floats
    if not floats:
        raise ContractError(f"the model has no float input for a waveform; it has {listed(node.name for node in nodes)}")
    if len(floats) > 1:
        named = [node for node in floats if node.name in ("audio", "waveform", "input_values")]
        if len(named) != 1:
            _refuse_state(floats, outputs)
            names = listed(node.name for node in floats)
            raise ContractError(f"any of {names} could be the waveform; name it by --contract input=NAME")
        return named[0]
    return floats[0]


def _layout(audio: onnxruntime.NodeArg, declared: Declarations) -> InputLayout:
    shape = list(audio.shape)
    layout = input_layout(shape)
    if layout is None:
        raise ContractError(
            f"input {audio.name!r} has shape {shape}; a waveform input is [batch, samples], [batch, 1, samples], "
            "[batch, samples, 1] or [samples]"
        )
    by = declared.get("input_layout")
    if by and by.value != layout:
        raise ContractError(f"{by.source} declares input_layout={by.value}, but input {audio.name!r} has shape {shape}")
    if not by and not _is_audio(shape, layout):
        raise ContractError(
            f"input {audio.name!r} takes exactly {shape[layout.index('T')]} values, too few for a window of audio; export "
            f"it with a dynamic samples axis, or say that they are samples by --contract input_layout={layout}"
        )
    return layout


def _is_audio(shape: list[Any], layout: InputLayout) -> bool:
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
    if node.type in MASK_TYPES and len(node.shape) == 2:
        return f"if it is a mask with ones for samples, say --contract mask_input={node.name}, else export it without"
    return "export it without that input"
