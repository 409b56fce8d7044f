"""A model as files: the `.onnx` file, what lies beside it, the digest of its content.

`scan_model` parses a stranger's protobuf, so it runs in the worker process; `model_guard` says what is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

import msgspec

from ..errors import DataMissingError, ModelError, foreign, quoted
from ..files import Stamp, solid_bytes, stamp
from .integer_products import computes_in_integers
from .limits import Limits, limits
from .model_guard import check_model

_ORT_MAGIC = b"ORTM"  # at byte 4 of ONNX Runtime's own format, which the guard cannot read


class ModelScan(msgspec.Struct, frozen=True):
    """What a model's files say without running it."""

    sha256: str
    bytes: int
    """Of all files."""
    solid_bytes: int
    """Of all files, without holes: what limits may grow with."""
    parameters: int
    external: tuple[str, ...]
    """Paths of external data, relative to the model's folder."""
    stamps: dict[str, Stamp]
    """Of all files by that path, the model's own under "", from before they were read: what is loaded must have the same."""
    metadata: dict[str, str]
    producer: str
    opset: int
    integers: bool = False
    """Whether activations are quantised, so that embeddings depend on how the processor multiplies bytes."""


def find_model(path: Path) -> Path:
    """The `.onnx` file of a path: itself, or in a folder the only one, `model.onnx`, or the encoder beside its decoders.

    Raises:
        ModelError: There is no such file, or it cannot be read.
    """
    try:
        str(path).encode()
        file = _existing(path)
        str(file).encode()  # in a folder, a stranger gave the name
        return file
    except UnicodeEncodeError as error:
        raise ModelError(f"model {quoted(str(path))} has a name that is not UTF-8; rename it") from error
    except OSError as error:
        raise ModelError(f"model {path} cannot be read ({error.strerror})") from error


def _existing(path: Path) -> Path:
    if path.is_dir():
        files = sorted(path.glob("*.onnx"))
        candidates = [file for file in files if file.name == "model.onnx"]
        if not candidates:  # a model in parts, as Optimum and sherpa-onnx write them
            encoders = [file for file in files if not file.name.startswith(("decoder", "joiner"))]
            candidates = encoders if len(encoders) == 1 and encoders[0].name.startswith("encoder") else files
        if len(candidates) != 1:
            content = f"{len(files)} .onnx files and no model.onnx; name one of them" if files else "no .onnx file"
            raise ModelError(f"folder {path} holds {content}")
        path = candidates[0]
    if not path.exists():
        raise ModelError(f"model {path} does not exist")
    if not path.is_file():
        raise ModelError(f"model {path} is not a regular file")
    if path.stat().st_size == 0:
        raise ModelError(f"model {path} is empty")
    return path


def scan_model(path: Path, beat: Callable[[], None] = lambda: None, *, trust: bool = False) -> ModelScan:
    """Parse a model, check it, find its external data and hash all files. Runs in the worker.

    Args:
        path: The `.onnx` file.
        beat: Called now and then, as a sign of life.
        trust: Lifts the limits on size and number.

    Raises:
        ModelError: A file cannot be read, is damaged, or holds what is refused.
    """
    import onnx
    from google.protobuf.message import DecodeError

    allowed = limits(trust)
    stamps = {"": stamp(path)}
    _check_size(path, stamps, allowed)
    try:
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelError(f"model {path} cannot be read ({error.strerror})") from error
    except (DecodeError, ValueError) as error:
        raise ModelError(
            f"{path} is in ONNX Runtime's own format; name the .onnx file that it was made from"
            if _has_ort_magic(path)
            else f"{path} is not an ONNX file, or a damaged one ({_first_line(error)})"
        ) from error
    beat()
    values, external = check_model(path, model, allowed)
    stamps |= {name: stamp(path.parent / name) for name in external}
    size_of_files = _check_size(path, stamps, allowed)
    digest, solid = hashlib.sha256(), 0
    for file in files_of(path, external):
        with file.open("rb") as stream:
            solid += solid_bytes(os.fstat(stream.fileno()))
            while block := stream.read(1 << 22):
                digest.update(block)
                beat()
    return ModelScan(
        sha256=digest.hexdigest(),
        bytes=size_of_files,
        solid_bytes=solid,
        parameters=values,
        external=external,
        stamps=stamps,
        metadata={entry.key: entry.value for entry in model.metadata_props},
        producer=f"{model.producer_name} {model.producer_version}".strip()[:200],
        opset=max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0),
        integers=computes_in_integers(model),
    )


def with_front(scan: ModelScan, file: str, front: ModelScan) -> ModelScan:
    """The scan of a model and the graph `file` that makes its features, which also must not change. Its digest stays."""
    folder = PurePosixPath(file).parent
    stamps = {str(folder / name) if name else str(PurePosixPath(file)): of_file for name, of_file in front.stamps.items()}
    return msgspec.structs.replace(
        scan,
        bytes=scan.bytes + front.bytes,
        solid_bytes=scan.solid_bytes + front.solid_bytes,
        parameters=scan.parameters + front.parameters,
        stamps=scan.stamps | stamps,
        integers=scan.integers or front.integers,
    )


def files_of(path: Path, external: Iterable[str]) -> list[Path]:
    """The model's file, then its external data."""
    return [path, *(path.parent / name for name in external)]


def check_unchanged(path: Path, stamps: Mapping[str, Stamp]) -> None:
    """Raise `ModelError` if a file of a model is not the one that was scanned."""
    for name, then in stamps.items():
        try:
            now = stamp(path.parent / name if name else path)
        except DataMissingError as error:
            raise ModelError(f"a file of {path} was removed while it was in use; run again") from error
        if now != then:
            what = f"{quoted(name)}, weights of {path}," if name else path
            raise ModelError(f"{what} was replaced while it was in use; run again")


def _check_size(path: Path, stamps: Mapping[str, Stamp], allowed: Limits) -> int:
    """The bytes of all files."""
    size = sum(size for _, size, *_ in stamps.values())
    if size > allowed.file_bytes:
        raise ModelError(
            f"{path} has {size / 1e9:.1f} GB with its weights, and without trust the limit is "
            f"{allowed.file_bytes / 1e9:.1f} GB; if you trust the model, --trust lifts the limit"
        )
    return size


def _has_ort_magic(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8)[4:] == _ORT_MAGIC


def _first_line(error: Exception) -> str:
    return foreign((str(error).strip().splitlines() or [type(error).__name__])[0])
