"""`annotate`: a copy of a model that declares its contract in its own metadata. Graph and weights stay the same.

The model is a stranger's, so a worker process reads and writes it. The copy is loaded and measured before it is kept, so a
declaration that the model contradicts is not written.
"""

from __future__ import annotations

import filecmp
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ..errors import ModelError, UsageError, XaresError
from ..files import copy_aside, made_aside, write_aside
from ..progress import Doing, Observer, ignore
from .contract.declarations import (
    Declarations,
    declared_by_preprocessor,
    declared_in_metadata,
    declared_in_sidecar,
    declared_on_command_line,
    merge,
    metadata_with,
)
from .encoder import load_encoder
from .limits import memory_bytes, silence_seconds
from .model_file import PREPROCESSOR_CONFIG, ModelScan, find_model, scan_model
from .worker import Beat, Tell, Worker, limit_memory


class Annotation(msgspec.Struct, frozen=True, kw_only=True):
    """A copy that was written, and what it declares."""

    path: str
    written: dict[str, str]
    """The metadata that is new or changed."""
    replaced: dict[str, str]
    """The old values of metadata that was replaced or dropped."""
    kept: tuple[str, ...]
    """The keys of metadata that stayed."""
    copied: tuple[str, ...]
    """Weights files that were copied too, relative to the folder of the copy."""


def annotate(
    model: str | Path, contract: Iterable[str], output: str | Path, *, trust: bool = False, observer: Observer = ignore
) -> Annotation:
    """Write a copy of a model that declares its contract in its metadata. Other metadata stays.

    Weights files that the model names are copied beside the output, unless they are there already. After an error nothing is
    left of the copy.

    Args:
        model: The `.onnx` file, or its folder.
        contract: KEY=VALUE declarations, such as `sample_rate=16000`.
        output: The file to write, in a folder that exists; never the model itself.
        trust: Lifts the limits on the model's size, memory and time.
        observer: Called with progress and notes.

    Raises:
        UsageError: A declaration or the output is impossible.
        ModelError: The copy could not be used.

    Example:
        annotate("encoder.onnx", ["sample_rate=16000", "license=MIT"], "annotated.onnx")
    """
    declared = declared_on_command_line(contract)
    if not declared:
        raise UsageError("there is nothing to write; declare something by --contract KEY=VALUE, such as sample_rate=16000")
    source, target = find_model(Path(model)).absolute(), Path(output).absolute()
    _check_target(source, target)
    with _removed_on_failure() as copied, made_aside(target) as aside:
        with Worker() as worker:
            scan = worker.call(
                _write,
                str(source),
                str(aside),
                declared,
                trust,
                returns=ModelScan,
                silence_limit=silence_seconds(source.stat().st_size, trust),
                observer=observer,
            )
        metadata = metadata_with(scan.metadata, declared)
        _check_surroundings(source, target, declared, declared_in_metadata(metadata))
        _copy_weights(source, target, scan.external, copied)
        try:
            load_encoder(aside, trust=trust, observer=observer).close()
        except XaresError as error:  # named as the user named the output
            raise type(error)(str(error).replace(aside.name, target.name)) from error
    old = scan.metadata
    return Annotation(
        path=str(output),
        written={key: value for key, value in metadata.items() if old.get(key) != value},
        replaced={key: value for key, value in old.items() if metadata.get(key) != value},
        kept=tuple(key for key, value in old.items() if metadata.get(key) == value),
        copied=tuple(str(path.relative_to(target.parent)) for path in copied),
    )


def _write(source: str, target: str, declared: Declarations, trust: bool, *, tell: Tell) -> ModelScan:
    """Scan the model and write a copy with the declarations. Runs in the worker."""
    import onnx
    from google.protobuf.message import EncodeError

    path = Path(source)
    tell(Doing("reading the model's file"))
    limit_memory(memory_bytes(path.stat().st_size, trust))
    scan = scan_model(path, lambda: tell(Beat()), trust=trust)
    model = onnx.load_model(path, format="protobuf", load_external_data=False)
    onnx.helper.set_model_props(model, metadata_with(scan.metadata, declared))
    tell(Doing("writing the copy"))
    try:
        write_aside(Path(target), model.SerializeToString())
    except (EncodeError, ValueError) as error:
        raise ModelError(
            f"{path} with more metadata exceeds the 2 GB of an ONNX file; keep its weights in another file"
        ) from error
    return scan


def _check_target(source: Path, target: Path) -> None:
    try:
        str(target).encode()
        if target.is_dir() or not target.parent.is_dir():
            raise UsageError(f"{target} cannot be written: name a file in a folder that exists")
        if target.exists() and target.samefile(source):
            raise UsageError(f"{target} is the model itself, which is never changed in place; name another file")
    except UnicodeEncodeError as error:
        raise UsageError(f"output {str(target)!r} has a name that is not UTF-8; choose another") from error
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}); choose another place") from error


def _check_surroundings(source: Path, target: Path, declared: Declarations, in_metadata: Declarations) -> None:
    """Raise `UsageError` if declarations beside the model would be lost, or if others beside the output would count too."""
    expected = merge(
        declared,
        declared_in_sidecar(source.with_suffix(".toml")),
        in_metadata,
        declared_by_preprocessor(source.parent / PREPROCESSOR_CONFIG),
    )
    actual = merge(
        declared_in_sidecar(target.with_suffix(".toml")),
        in_metadata,
        declared_by_preprocessor(target.parent / PREPROCESSOR_CONFIG),
    )
    lost = [
        (key, declaration)
        for key, declaration in sorted(expected.items())
        if key not in declared and (key not in actual or actual[key].value != declaration.value)
    ]
    if lost:
        files = " and ".join(sorted({declaration.source for _, declaration in lost}))
        flags = " ".join(f"--contract {shlex.quote(f'{key}={declaration.value}')}" for key, declaration in lost)
        raise UsageError(f"{target.name} would lose the declarations beside the model in {files}; add {flags}")
    for key, declaration in actual.items():
        if key not in expected or expected[key].value != declaration.value:
            raise UsageError(
                f"{declaration.source} beside {target} declares {key}={declaration.value}, which would add to or override "
                "the copy's own; remove it, or choose an output elsewhere"
            )


def _copy_weights(source: Path, target: Path, names: Iterable[str], copied: list[Path]) -> None:
    """Copy each weights file beside `target`; in the model's own folder both models share the files."""
    if target in {target.parent / name for name in names}:
        raise UsageError(f"the model keeps weights in a file named {target.name}; choose another name for the output")
    if target.parent.samefile(source.parent):
        return
    for name in names:
        original, copy = source.parent / name, target.parent / name
        if not copy.exists():
            copy_aside(original, copy)
            copied.append(copy)
        elif not (copy.is_file() and filecmp.cmp(original, copy, shallow=False)):
            raise UsageError(f"{copy} exists and is not the model's weights file; choose another folder")


@contextmanager
def _removed_on_failure() -> Iterator[list[Path]]:
    """A list for files that are removed if the block fails."""
    files: list[Path] = []
    try:
        yield files
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise
