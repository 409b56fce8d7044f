"""The model as files: which one is meant, what lies beside it, its content digest.

`scan_model` parses a stranger's protobuf, so it runs inside the worker process; `model_guard` says what is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from ..errors import ModelError
from .integer_products import computes_in_integers
from .limits import Limits, limits
from .model_guard import check_model

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
    integers: bool = False
    """Whether activations are quantised, so that numbers depend on how the processor multiplies bytes."""


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


def scan_model(path: Path, beat: Callable[[], None] = lambda: None, *, trust: bool = False) -> ModelScan:
    """Parse the protobuf, check what it holds, find external data and hash everything; `beat` is called as it goes on.

    Runs in the worker. `trust` lifts limits on size and number (`limits`). Raises `ModelError`.
    """
    import onnx
    from google.protobuf.message import DecodeError

    allowed = limits(trust)
    _check_size(path, [path], allowed)
    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelError(f"model {path} cannot be read ({error.strerror})") from error
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{path} is not an ONNX file, or a damaged one ({_first_line(error)})") from error
    beat()
    values, external = check_model(path, model, allowed)
    files = [path, *(path.parent / name for name in external)]
    size_of_files = _check_size(path, files, allowed)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
                beat()
    return ModelScan(
        sha256=digest.hexdigest(),
        bytes=size_of_files,
        parameters=values,
        external=external,
        metadata={entry.key: entry.value for entry in model.metadata_props},
        producer=f"{model.producer_name} {model.producer_version}".strip()[:200],
        opset=max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0),
        integers=computes_in_integers(model),
    )


def _check_size(path: Path, files: Sequence[Path], allowed: Limits) -> int:
    """Bytes of a model's files together."""
    size = sum(file.stat().st_size for file in files)
    if size > allowed.file_bytes:
        raise ModelError(
            f"{path} has {size / 1e9:.1f} GB with its weights, and a model that is not trusted may have "
            f"{allowed.file_bytes / 1e9:.1f} GB; if you trust it, --trust lifts the limit"
        )
    return size


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
