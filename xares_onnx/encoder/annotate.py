"""`annotate`: a copy of a model that declares its contract in its own metadata. Graph and weights stay the same.

The model is a stranger's, so a worker process reads and writes it. The copy is loaded and measured before it is kept, so a
declaration that the model contradicts is not written.
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import msgspec

from ..errors import ModelError, UsageError, XaresError, quoted
from ..files import check_target, disk_error, made_aside, solid_bytes
from ..foreign import ForeignFileError, open_regular
from ..progress import Doing, Observer, ignore
from .contract.declarations import (
    Declarations,
    declared_beside,
    declared_in_metadata,
    declared_in_sidecar,
    declared_on_command_line,
    merge,
    metadata_with,
)
from .encoder import load_encoder
from .limits import limits, memory_bytes, silence_seconds
from .model_file import ModelScan, check_unchanged, find_model, scan_model
from .model_guard import messages
from .walls import Walls
from .worker import Beat, Tell, Worker, limit_memory

if TYPE_CHECKING:
    import onnx

_ALIGNED = 1 << 16  # so that each file's weights can be mapped as before
_BLOCK = 1 << 22


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
    """The file of weights that was written too, relative to the folder of the copy."""


class _Written(msgspec.Struct, frozen=True):
    """A model that was scanned, and where each file of its weights starts in the one file of the copy's."""

    scan: ModelScan
    starts: dict[str, int]


def annotate(
    model: str | Path, contract: Iterable[str], output: str | Path, *, trust: bool = False, observer: Observer = ignore
) -> Annotation:
    """Write a copy of a model that declares its contract in its metadata. Other metadata stays.

    If the output is not in the model's own folder, weights in other files are copied to one, `<output>.data`, unless it is
    there already with the same content: no file is ever written under a name that a model gives. After an error nothing is
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
    data = target.with_name(f"{target.name}.data")
    shared = target.parent.samefile(source.parent)
    with _removed_on_failure() as copied, made_aside(target) as aside:
        aside.touch()  # the process may write to this file, and to no other
        with Worker(Walls(model=str(source), reads=(), writes=(str(aside),))) as worker:
            written = worker.call(
                _write,
                str(source),
                str(aside),
                None if shared else data.name,
                declared,
                trust,
                returns=_Written,
                silence_limit=silence_seconds(solid_bytes(source.stat()), trust),
                observer=observer,
            )
        scan = written.scan
        metadata = metadata_with(scan.metadata, declared)
        _check_surroundings(source, target, declared, declared_in_metadata(metadata))
        if target in {target.parent / name for name in scan.external}:
            raise UsageError(f"the model keeps weights in a file named {target.name}; choose another name for the output")
        if written.starts:
            _copy_weights(source, data, written, copied)
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


def _write(source: str, target: str, data: str | None, declared: Declarations, trust: bool, *, tell: Tell) -> _Written:
    """Scan the model and write a copy with the declarations, whose weights in other files are in the file `data`, if that is
    not None. Runs in the worker.
    """
    import onnx
    from google.protobuf.message import EncodeError

    path = Path(source)
    tell(Doing("reading the model's file"))
    limit_memory(memory_bytes(solid_bytes(path.stat()), trust))
    scan = scan_model(path, lambda: tell(Beat()), trust=trust)
    model = onnx.load_model(path, format="protobuf", load_external_data=False)
    check_unchanged(path, scan.stamps)
    onnx.helper.set_model_props(model, metadata_with(scan.metadata, declared))
    starts = {} if data is None else _starts(scan)
    if data is not None:
        for message in messages(path, model, limits(trust)):
            if isinstance(message, onnx.TensorProto) and message.data_location == message.EXTERNAL:
                _move(message, data, starts)
    tell(Doing("writing the copy"))
    try:
        content = model.SerializeToString()
        with Path(target).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(error, Path(target)) from error
    except (EncodeError, ValueError) as error:
        raise ModelError(
            f"{path} with more metadata exceeds the 2 GB of an ONNX file; keep its weights in another file"
        ) from error
    return _Written(scan, starts)


def _starts(scan: ModelScan) -> dict[str, int]:
    """Where each file of a model's weights starts if they are joined, in bytes."""
    lengths = [-(-scan.stamps[name][1] // _ALIGNED) * _ALIGNED for name in scan.external]
    return dict(zip(scan.external, itertools.accumulate([0, *lengths]), strict=False))


def _move(tensor: onnx.TensorProto, data: str, starts: Mapping[str, int]) -> None:
    """Let a tensor's values be in the joined file."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    start = starts[str(PurePosixPath(entries["location"]))]
    entries |= {"location": data, "offset": str(start + int(entries.get("offset", "0")))}
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)


def _check_target(source: Path, target: Path) -> None:
    try:
        str(target).encode()
        if target.is_dir() or not target.parent.is_dir():
            raise UsageError(f"{target} cannot be written: name a file in a folder that exists")
        if target.exists() and target.samefile(source):
            raise UsageError(f"{target} is the model itself, which is never changed in place; name another file")
    except UnicodeEncodeError as error:
        raise UsageError(f"output {quoted(str(target))} has a name that is not UTF-8; choose another") from error
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}); choose another place") from error
    check_target(target)


def _check_surroundings(source: Path, target: Path, declared: Declarations, in_metadata: Declarations) -> None:
    """Raise `UsageError` if declarations beside the model would be lost, or if others beside the output would count too."""
    expected = merge(
        declared,
        declared_in_sidecar(source.with_suffix(".toml")),
        in_metadata,
        declared_beside(source.parent),
    )
    actual = merge(
        declared_in_sidecar(target.with_suffix(".toml")),
        in_metadata,
        declared_beside(target.parent),
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


def _copy_weights(source: Path, data: Path, written: _Written, copied: list[Path]) -> None:
    """Write the joined file of weights. One that is there must be the same; it is never overwritten."""
    blocks = _joined(source, written)
    check_target(data)
    if data.exists():
        with open_regular(data, links=False) as there:
            if not all(there.read(len(block)) == block for block in blocks) or there.read(1):
                raise UsageError(f"{data} exists and is not the model's weights file; choose another output")
        return
    with made_aside(data) as aside, aside.open("xb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    copied.append(data)


def _joined(source: Path, written: _Written) -> Iterator[bytes]:
    """The bytes of all files of weights, each from its start on, with zeros before it."""
    position = 0
    for name, start in written.starts.items():
        yield bytes(start - position)
        position = start
        try:
            with open_regular(source.parent / name, links=False) as file:
                while block := file.read(_BLOCK):
                    position += len(block)
                    yield block
        except ForeignFileError as error:
            raise ModelError(f"weights of {source} cannot be read ({error})") from error
    check_unchanged(source, written.scan.stamps)


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
