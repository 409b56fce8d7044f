"""`annotate`: a copy of a model that declares its contract in its own metadata. Graph and weights stay as they are.

The model is a stranger's, so it is read and written in a worker process. The copy is loaded and measured before it is
kept: a declaration that its graph contradicts is not written.
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
    """A file that was written: the metadata set, old values of what was replaced or dropped, keys that stayed,
    weights files copied."""

    path: str
    written: dict[str, str]
    replaced: dict[str, str]
    kept: tuple[str, ...]
    copied: tuple[str, ...]


def annotate(
    model: str | Path, contract: Iterable[str], output: str | Path, *, trust: bool = False, observer: Observer = ignore
) -> Annotation:
    """Write `output`: `model` with the KEY=VALUE declarations of `contract` in its metadata, which is kept otherwise.

    Weights files that the model names are copied to beside `output`, unless they lie there already. `trust` lifts the limits
    on the model's size, memory and time. Raises `UsageError` for
    a declaration or an output that cannot be, `ModelError` where the result could not be used; then nothing is left.
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
        except XaresError as error:  # by the name that was asked for
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
    """Scan the model and write it anew with what is declared. Runs in the worker."""
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
        raise ModelError(f"{path} with more metadata is past the 2 GB of an ONNX file; keep its weights outside") from error
    return scan


def _check_target(source: Path, target: Path) -> None:
    try:
        str(target).encode()
        if target.is_dir() or not target.parent.is_dir():
            raise UsageError(f"{target} cannot be written: name a file in a folder that exists")
        if target.exists() and target.samefile(source):
            raise UsageError(f"{target} is the model itself; name another file, since a model is never changed in place")
    except UnicodeEncodeError as error:
        raise UsageError(f"output {str(target)!r} has a name that is not UTF-8; choose another") from error
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}); choose another place") from error


def _check_surroundings(source: Path, target: Path, declared: Declarations, in_metadata: Declarations) -> None:
    """What is declared beside a model stays behind, and what lies beside the output joins it: neither unseen."""
    wanted = merge(
        declared,
        declared_in_sidecar(source.with_suffix(".toml")),
        in_metadata,
        declared_by_preprocessor(source.parent / PREPROCESSOR_CONFIG),
    )
    found = merge(
        declared_in_sidecar(target.with_suffix(".toml")),
        in_metadata,
        declared_by_preprocessor(target.parent / PREPROCESSOR_CONFIG),
    )
    lost = [
        (key, wish)
        for key, wish in sorted(wanted.items())
        if key not in declared and (key not in found or found[key].value != wish.value)
    ]
    if lost:
        files = " and ".join(sorted({wish.source for _, wish in lost}))
        flags = " ".join(f"--contract {shlex.quote(f'{key}={wish.value}')}" for key, wish in lost)
        raise UsageError(f"{target.name} would lose what lies beside the model in {files}; add {flags}")
    for key, other in found.items():
        if key not in wanted or wanted[key].value != other.value:
            raise UsageError(
                f"{other.source} beside {target} declares {key}={other.value}, which would join or outdo what is written; "
                "remove it, or name an output elsewhere"
            )


def _copy_weights(source: Path, target: Path, names: Iterable[str], copied: list[Path]) -> None:
    """Each weights file to its place beside `target`; in the model's own folder both models share the files."""
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
            raise UsageError(f"{copy} is there already and is not the model's weights file; choose another folder")


@contextmanager
def _removed_on_failure() -> Iterator[list[Path]]:
    """A list of files, to be filled; they are removed where the block fails."""
    files: list[Path] = []
    try:
        yield files
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise
