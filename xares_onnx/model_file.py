"""The model as files: which one is meant, what lies beside it, its content digest.

`scan_model` parses a stranger's protobuf: it runs inside the worker process. It neither checks nor shape-infers the
graph, because either may expand nested functions without end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import msgspec

from .errors import ModelError

if TYPE_CHECKING:
    import onnx

PREPROCESSOR_CONFIG = "preprocessor_config.json"


class ModelScan(msgspec.Struct, frozen=True):
    """What a model's files say without running it. `external` are paths of external data, relative to its folder."""

    sha256: str
    bytes: int
    parameters: int
    external: tuple[str, ...]
    metadata: dict[str, str]
    producer: str
    opset: int


def find_model(path: Path) -> Path:
    """The `.onnx` file that is meant: the path itself, or in a folder the only one, `model.onnx`, or the encoder beside its
    decoders."""
    try:
        str(path).encode()
        return _existing(path)
    except UnicodeEncodeError as error:
        raise ModelError(f"model {str(path)!r} has a name that is not UTF-8; rename it") from error
    except OSError as error:
        raise ModelError(f"model {path} cannot be read ({error.strerror})") from error


def _existing(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("*.onnx"))
        named = [file for file in found if file.name == "model.onnx"]
        if not named:  # a model in parts, as Optimum and sherpa-onnx write them
            parts = [file for file in found if not file.name.startswith(("decoder", "joiner"))]
            named = parts if len(parts) == 1 and parts[0].name.startswith("encoder") else found
        if len(named) != 1:
            what = f"{len(found)} .onnx files and no model.onnx; name one of them" if found else "no .onnx file"
            raise ModelError(f"folder {path} holds {what}")
        path = named[0]
    if not path.exists():
        raise ModelError(f"model {path} does not exist")
    if not path.is_file():
        raise ModelError(f"model {path} is not a regular file")
    if path.stat().st_size == 0:
        raise ModelError(f"model {path} is empty")
    return path


def scan_model(path: Path, beat: Callable[[], None] = lambda: None) -> ModelScan:
    """Parse the protobuf, find external data and hash everything; `beat` is called as it goes on. Runs in the worker."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelError(f"model {path} cannot be read ({error.strerror})") from error
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{path} is not an ONNX file, or a damaged one ({_first_line(error)})") from error
    if not model.graph.node or not model.graph.output:
        raise ModelError(f"{path} is not an ONNX file: it holds no graph")
    external, parameters = set(), 0
    for tensor in list(_tensors(path, model)):  # all are walked, and every text was checked, before one is used
        size = 1
        for dim in tensor.dims:
            size *= max(0, dim)
        parameters += size
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            external.add(_checked_location(path, entries.get("location", "")))
    files = [path, *(path.parent / name for name in sorted(external))]
    size_of_files = sum(file.stat().st_size for file in files)
    if parameters > 8 * size_of_files:
        raise ModelError(f"{path} is damaged: its tensors claim more values than its files can hold")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
                beat()
    return ModelScan(
        sha256=digest.hexdigest(),
        bytes=size_of_files,
        parameters=parameters,
        external=tuple(sorted(external)),
        metadata={entry.key: entry.value for entry in model.metadata_props},
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        opset=max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0),
    )


def _checked_location(model: Path, location: str) -> str:
    """External data must be a regular file inside the model's folder, reached without links."""
    relative = PurePosixPath(location)
    refused = f"{model} keeps weights in {location[:200]!r}, "
    if not location or relative.is_absolute() or ".." in relative.parts or "\\" in location or ":" in location:
        raise ModelError(refused + "outside its folder; put the file beside the model")
    path = model.parent
    for part in relative.parts:
        path = path / part
        if os.path.islink(path):  # unlike Path's, these two refuse no name
            raise ModelError(refused + "which is a link; put the file itself beside the model")
    if not os.path.isfile(path):
        raise ModelError(refused + "which is not there; put the file beside the model")
    if path.stat().st_nlink > 1:
        raise ModelError(refused + "which is a hard link to a file elsewhere; put a copy beside the model")
    return str(relative)


def _tensors(path: Path, model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a model, wherever it is kept: initializers, attributes, inner graphs, functions.

    Raises `ModelError` where a text is not UTF-8: protobuf then gives bytes.
    """
    import onnx
    from google.protobuf.message import Message

    messages: list[Message] = [model]
    while messages:
        message = messages.pop()
        if isinstance(message, onnx.TensorProto):
            yield message
            messages.extend(message.external_data)
            continue
        for field, value in message.ListFields():
            values = [value] if isinstance(value, Message | str | bytes) else value
            if field.message_type is not None:
                messages.extend(values)
            elif field.type == field.TYPE_STRING and any(isinstance(text, bytes) for text in values):
                raise ModelError(f"{path} is damaged: its {field.name} is not UTF-8 text")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
