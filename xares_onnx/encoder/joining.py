"""`annotate --frontend`: a model and the graph that makes its features as one file, which takes waveforms.

Both are a stranger's, so a worker process reads and writes them. The file is kept only if it gives what the two give.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ..errors import ContractError, ModelError, UsageError, foreign, quoted
from ..files import check_target, made_aside, solid_bytes, write_aside
from ..progress import Doing, Observer, ignore
from .contract.constants import PREFIX as CONSTANT
from .contract.contract import Contract
from .contract.declarations import Declaration, Declarations, metadata_with
from .encoder import Encoder, load_encoder
from .limits import memory_bytes, silence_seconds
from .model_file import check_unchanged, find_model, scan_model
from .worker import Beat, Tell, Worker, limit_memory

if TYPE_CHECKING:
    import onnx

_TOLERANCE = 1e-4  # of the largest value: kernels may be fused otherwise
_SECONDS = (0.31, 1.003, 2.77, 12.345)  # of the clips that both embed
_OPSET = 13  # the oldest of the operators between the two graphs
_FRONT = "front/"  # before the names of the front end, if the model uses some of them
_FED, _ITEMS = "bridge/model/", "row/items"  # before the names of what the model is fed; the number of items
_KEPT = ("sample_rate", "amplitude", "normalize", "chunk_samples", "first_frame_center_samples", "license", "source")
_ASSUMED = ("default", "measured", "graph")


class Joined(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was written, and how it compares with the two that it was made from."""

    path: str
    written: dict[str, str]
    """Its metadata."""
    difference: float
    """The largest difference of its embeddings, as a share of the largest value."""
    lengths: tuple[int, ...]
    """The samples of the clips that were compared."""


def join(
    model: str | Path,
    front: str | Path,
    contract: Iterable[str],
    output: str | Path,
    *,
    trust: bool = False,
    observer: Observer = ignore,
) -> Joined:
    """Write a model and its front end as one file. After an error nothing is left of it.

    Args:
        model: The `.onnx` file, or its folder.
        front: The graph that makes its features, in the model's folder or below.
        contract: KEY=VALUE declarations of the pair, such as `frontend.scale=0.1`.
        output: The file to write, in a folder that exists; neither of the two.
        trust: Lifts the limits on the models' size, memory and time.
        observer: Called with progress and notes.

    Raises:
        UsageError: A declaration or the output is impossible.
        ModelError: The pair cannot be used, or not be joined, or the file does not give what the two give.

    Example:
        join("embedding_model.onnx", "melspectrogram.onnx", ["window.hop_frames=8"], "whole.onnx")
    """
    source, target = find_model(Path(model)).absolute(), Path(output).absolute()
    file = _beside(source, Path(front).absolute())
    if target in (source, source.parent / file) or target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"{target} cannot be written: name a new file in a folder that exists")
    check_target(target)
    if target.with_suffix(".toml").exists():
        raise UsageError(f"{target.with_suffix('.toml')} would change what {target.name} declares; choose another output")
    pairs = [*contract, f"frontend.model={file}"]
    with load_encoder(source, contract=pairs, trust=trust, observer=observer) as pair, made_aside(target) as aside:
        metadata = metadata_with({}, _declared(pair.contract))
        with Worker() as worker:
            worker.call(
                _write,
                str(source),
                str(aside),
                pair.contract,
                metadata,
                trust,
                returns=bool,
                silence_limit=silence_seconds(pair.info.scan.solid_bytes, trust),
                observer=observer,
            )
        try:
            with load_encoder(aside, trust=trust, observer=observer) as whole:
                difference, lengths = _compare(pair, whole)
        except ModelError as error:  # named as the user named the output
            raise type(error)(str(error).replace(aside.name, target.name), about=error.about) from error
        if not difference <= _TOLERANCE:
            raise ContractError(
                f"the joined file differs from the two by {difference:.1e} of the largest value, so it was not kept; use "
                f"the two by --contract frontend.model={foreign(file)}"
            )
    return Joined(path=str(output), written=metadata, difference=difference, lengths=lengths)


def _beside(model: Path, front: Path) -> str:
    try:
        return front.relative_to(model.parent).as_posix()
    except ValueError:
        raise UsageError(f"--frontend {front} is not in the folder of {model}; put it there, or below") from None


def _declared(contract: Contract) -> Declarations:
    """What the joined file has to declare: what was declared of the pair and still holds."""
    values: dict[str, Any] = {
        key: getattr(contract, key) for key in _KEPT if not contract.sources.get(key, "default").startswith(_ASSUMED)
    }
    values |= {"input_kind": "waveform", "sample_rate": contract.sample_rate}
    if contract.fixed_window:
        values |= dict.fromkeys(("min_samples", "max_samples", "chunk_samples"), contract.chunk_samples)
    if contract.chunk_overlap:
        values["chunk_overlap"] = contract.chunk_overlap
    if contract.tokens:
        tokens = contract.tokens
        values |= {"tokens.prefix": tokens.prefix, "tokens.grid": tokens.grid}
        values |= {"tokens.bands": tokens.join, "tokens.use": tokens.use}
    for name, constant in (contract.constants or {}).items():
        shaped = np.array(constant.values, dtype=object).reshape(constant.values_shape)
        values[CONSTANT + name] = json.dumps(shaped.tolist())
    return {key: Declaration(value, "joined") for key, value in values.items() if value is not None}


def _compare(pair: Encoder, whole: Encoder) -> tuple[float, tuple[int, ...]]:
    """The largest difference of embeddings as a share of the largest value, infinite for other frames; and the lengths."""
    rate = pair.contract.sample_rate
    lengths = tuple(round(seconds * rate) | 1 for seconds in _SECONDS)
    rng = np.random.default_rng(0)
    clips = [np.clip(0.1 * rng.standard_normal(samples), -1, 1).astype(np.float32) for samples in lengths]
    worst = 0.0
    for of_pair, of_whole in zip(pair.embed(clips, rate), whole.embed(clips, rate), strict=True):
        if of_pair.frames.shape != of_whole.frames.shape or not np.allclose(of_pair.times, of_whole.times):
            return float("inf"), lengths
        scale = float(np.abs(of_pair.frames).max()) or 1.0
        worst = max(worst, float(np.abs(of_pair.frames - of_whole.frames).max()) / scale)
    return worst, lengths


def _write(source: str, target: str, contract: Contract, metadata: dict[str, str], trust: bool, *, tell: Tell) -> bool:
    """Scan both graphs, join them and write the file. Runs in the worker."""
    import onnx
    from google.protobuf.message import EncodeError

    front = contract.frontend_model
    assert front
    paths = [Path(source).parent / front.file, Path(source)]
    tell(Doing("reading the models' files"))
    limit_memory(memory_bytes(sum(solid_bytes(path.stat()) for path in paths), trust))
    graphs = []
    for path in paths:
        scan = scan_model(path, lambda: tell(Beat()), trust=trust)
        graphs.append(onnx.load_model(path, format="protobuf", load_external_data=False))
        onnx.load_external_data_for_model(graphs[-1], str(path.parent))
        check_unchanged(path, scan.stamps)
        tell(Beat())
    tell(Doing("joining the graphs"))
    try:
        whole = _joined(graphs[0], graphs[1], contract)
        onnx.helper.set_model_props(whole, metadata)
        write_aside(Path(target), whole.SerializeToString())
    except EncodeError as error:
        raise ModelError("the two together exceed the 2 GB of an ONNX file; use them as two") from error
    except (ValueError, RuntimeError, onnx.checker.ValidationError) as error:  # onnx has no class of its own for the rest
        raise ModelError(
            f"the two graphs cannot be joined ({foreign(' '.join(str(error).split())[:200])}); use them as two, by "
            f"--contract frontend.model={foreign(front.file)}"
        ) from error
    return True


# ---------------------------------------------------------------- graphs


def _joined(front: onnx.ModelProto, model: onnx.ModelProto, contract: Contract) -> onnx.ModelProto:
    """One graph: the front end, what arranges its frames as the model takes them, the model, and its windows in a row."""
    from onnx import compose

    record = contract.frontend_model
    assert record
    if why := _why_not(contract):
        raise ModelError(f"{why}, or use the two files by --contract frontend.model={foreign(record.file)}")
    opset = max(_opset(front), _opset(model), _OPSET)
    front, model = _at(front, opset), _at(model, opset)
    front.ir_version = model.ir_version = max(front.ir_version, model.ir_version)
    _align(front, model)
    output = record.contract.output
    if taken := _names(front) & _names(model):
        front = compose.add_prefix(front, _FRONT, rename_inputs=False)
        output = _FRONT + output
        for value in front.graph.input:
            if value.name in taken:
                _rename_input(front.graph, value.name, _FRONT + value.name)
    kept = next(value for value in front.graph.output if value.name == output)
    del front.graph.output[:]
    front.graph.output.append(kept)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    bridge = _bridge(contract, types, opset, front.ir_version)
    if contract.windows:
        _put_windows_in_a_row(model, contract)
    else:
        _shape_outputs(model, contract)
    both = _merged(front, bridge, [(output, "bridge/frames")])
    return _merged(both, model, [(value.name, value.name.removeprefix(_FED)) for value in bridge.graph.output])


def _why_not(contract: Contract) -> str | None:
    """Why one graph cannot do what the two do, and what to change of the model."""
    if contract.mask_input:
        return (
            f"input {quoted(contract.mask_input)} tells which frames are padding, and a waveform does not; export the model "
            "without it"
        )
    if contract.windows and contract.windows.batch is not None:
        return (
            f"the model takes {contract.windows.batch} windows per call, so that one graph cannot give all windows of a "
            "clip; export it with a dynamic batch axis"
        )
    if contract.windows and contract.constants:
        name = next(iter(contract.constants))
        return f"input {quoted(name)} would need an item for each window; export the model without it"
    return None


def _shape_outputs(model: onnx.ModelProto, contract: Contract) -> None:
    """Give the output of embeddings axes, as onnx demands, and drop others without."""
    kept = [value for value in model.graph.output if value.type.tensor_type.HasField("shape")]
    for value in model.graph.output:
        if value.name == contract.output and value not in kept:
            for _ in contract.output_layout:
                value.type.tensor_type.shape.dim.add()
            kept.append(value)
    del model.graph.output[:]
    model.graph.output.extend(kept)


def _names(model: onnx.ModelProto) -> set[str]:
    """Every name that two graphs cannot both use."""
    graph = model.graph
    names = {name for node in graph.node for name in (node.name, *node.input, *node.output)}
    names |= {value.name for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info)}
    names |= {tensor.values.name for tensor in graph.sparse_initializer}
    return names - {""}


def _opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def _at(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    from onnx import version_converter

    return model if _opset(model) == opset else version_converter.convert_version(model, opset)


def _align(front: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Let both declare the same version of every other set of operators. Their own metadata is not joined."""
    versions: dict[str, int] = {}
    for part in (front, model):
        for entry in part.opset_import:
            domain = "" if entry.domain == "ai.onnx" else entry.domain
            if versions.setdefault(domain, entry.version) != entry.version:
                raise ModelError(
                    f"the two graphs use different versions of the operators of {quoted(domain)}; use them as two"
                )
    for part in (front, model):
        del part.metadata_props[:], part.opset_import[:]
        for domain, version in versions.items():
            part.opset_import.add(domain=domain, version=version)


def _merged(first: onnx.ModelProto, second: onnx.ModelProto, pairs: list[tuple[str, str]]) -> onnx.ModelProto:
    from onnx import compose

    whole = compose.merge_models(first, second, io_map=pairs)
    versions = {entry.domain: entry.version for entry in whole.opset_import}
    del whole.opset_import[:]
    for domain, version in versions.items():
        whole.opset_import.add(domain=domain, version=version)
    return whole


def _rename_input(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
    for value in graph.input:
        if value.name == old:
            value.name = new


class _Nodes:
    """Nodes of a graph that is written step by step; the result of each step goes into the next."""

    def __init__(self, prefix: str, source: str) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.last = source
        self._prefix = prefix

    def constant(self, values: Any) -> str:
        from onnx import numpy_helper

        name = f"{self._prefix}constant{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def add(self, operator: str, *more: str, source: str | None = None, output: str = "", **attributes: Any) -> str:
        from onnx import helper

        inputs = [self.last if source is None else source, *more]
        self.last = output or f"{self._prefix}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [self.last], name=self.last, **attributes))
        return self.last


def _bridge(contract: Contract, types: dict[str, int], opset: int, ir_version: int) -> onnx.ModelProto:
    """From the front end's frames to all that the model is fed."""
    from onnx import TensorProto, helper

    front = contract.frontend_model
    assert front
    steps = _Nodes("bridge/", "bridge/frames")
    steps.add("Cast", to=TensorProto.FLOAT)
    axes = _without_singles(steps, front.contract.output_layout)
    steps.add("Transpose", perm=[axes.index(axis) for axis in "BTD"])
    if (front.scale, front.offset) != (1.0, 0.0):
        steps.add("Mul", steps.constant(np.float32(front.scale)))
        steps.add("Add", steps.constant(np.float32(front.offset)))
    features = steps.last
    items = steps.add("Slice", steps.constant([0]), steps.constant([1]), source=steps.add("Shape"))
    if contract.windows:
        length, hop = contract.windows.length, contract.windows.hop
        frames = steps.add("Gather", steps.constant(1), source=steps.add("Shape", source=features), axis=0)
        past = steps.add("Sub", steps.constant(length - hop), source=frames)
        count = steps.add("Div", steps.constant(hop), source=past)
        end = steps.add("Mul", steps.constant(hop), source=count)
        starts = steps.add("Range", end, steps.constant(hop), source=steps.constant(0))
        places = steps.add("Unsqueeze", steps.constant([1]), source=starts)
        steps.add("Add", steps.constant(np.arange(length)[None]), source=places)
        steps.add("Gather", steps.last, source=features, axis=1)
        features = steps.add("Reshape", steps.constant([-1, length, front.bins]))
    outputs = []
    letters = contract.input_layout.replace("1", "")
    alone = features if "B" in letters else steps.add("Squeeze", steps.constant([0]), source=features)
    order = [axis for axis in "BTF" if axis in letters]
    steps.add("Transpose", perm=[order.index(axis) for axis in letters], source=alone)
    if singles := [i for i, axis in enumerate(contract.input_layout) if axis == "1"]:
        steps.add("Unsqueeze", steps.constant(singles))
    outputs.append((contract.input, steps.add("Cast", output=f"{_FED}{contract.input}", to=types[contract.input])))
    shape = steps.add("Shape", source=features)
    if name := contract.lengths_input:
        frames = steps.add("Gather", steps.constant(1), source=shape, axis=0)
        batch = steps.add("Slice", steps.constant([0]), steps.constant([1]), source=shape)
        steps.add("Expand", batch, source=frames)
        outputs.append((name, steps.add("Cast", output=f"{_FED}{name}", to=types[name])))
    ranks = {contract.input: len(contract.input_layout), contract.lengths_input: 1}
    values = [helper.make_tensor_value_info(tensor, types[name], [None] * ranks[name]) for name, tensor in outputs]
    if contract.windows:
        steps.add("Identity", source=items, output=f"{_FED}{_ITEMS}")
        values.append(helper.make_tensor_value_info(f"{_FED}{_ITEMS}", TensorProto.INT64, [1]))
    rank = len(front.contract.output_layout)
    frames_in = helper.make_tensor_value_info("bridge/frames", TensorProto.FLOAT, [None] * rank)
    graph = helper.make_graph(steps.nodes, "bridge", [frames_in], values, steps.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def _without_singles(steps: _Nodes, layout: str) -> str:
    """Squeeze the axes of size one away, and add a batch of one if there is none; the axes that are left."""
    if singles := [i for i, axis in enumerate(layout) if axis == "1"]:
        steps.add("Squeeze", steps.constant(singles))
    axes = layout.replace("1", "")
    if "B" not in axes:
        steps.add("Unsqueeze", steps.constant([0]))
        axes = "B" + axes
    return axes


def _put_windows_in_a_row(model: onnx.ModelProto, contract: Contract) -> None:
    """Let the only output be [batch, windows, dim], by a further input: how many items there are."""
    from onnx import TensorProto, helper

    steps = _Nodes("row/", contract.output)
    rest = steps.constant([-1, contract.dim])
    shape = steps.add("Concat", rest, source=_ITEMS, axis=0)
    steps.add("Cast", source=contract.output, to=TensorProto.FLOAT)
    name = "embeddings" if contract.output != "embeddings" else "embeddings.frames"
    steps.add("Reshape", shape, source=steps.last, output=name)
    model.graph.node.extend(steps.nodes)
    model.graph.initializer.extend(steps.initializers)
    model.graph.input.append(helper.make_tensor_value_info(_ITEMS, TensorProto.INT64, [1]))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "frames", contract.dim]))
