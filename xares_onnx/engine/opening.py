"""Which engine a run gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..encoder.encoder import Encoder
from ..encoder.spec import ModelOptions
from ..errors import UsageError
from . import local
from .cluster import check_address
from .local import LocalEngine
from .ray import RayEngine, open_ray


def check_engine(option: str) -> None:
    """Raise `UsageError` if `--engine` names none, or one that is not installed."""
    name, _, address = option.partition(":")
    if option != "local" and (name != "ray" or option == "ray:"):
        raise UsageError(f"--engine {option!r} must be local, ray, ray:auto or ray:HOST:PORT")
    if name == "ray":
        check_address(address)


def open_engine(encoder: Encoder, options: ModelOptions, cache: Path, paths: Sequence[Path]) -> LocalEngine | RayEngine:
    """The engine that the options ask for.

    Args:
        encoder: The measured encoder.
        options: `engine`, `workers`, `threads` and `device` matter here.
        cache: The folder that holds the store.
        paths: The folders of the shards.

    Raises:
        UsageError: An option is invalid.
        MachineError: A device, a cluster or what a node of it needs is not there.
    """
    check_engine(options.engine)
    if options.engine == "local":
        return local.open_engine(encoder, options)
    return open_ray(encoder, options, cache, paths)
