"""Audio encoders as ONNX files that follow the encoder contract: one family a module, `core` shared by all.

A family is a module with `build(checkpoint) -> (torch module, Spec)`. To add one, write that module and its
name in `FAMILIES`; `core` exports it, writes its metadata and checks the file against the torch module.

Importing this package loads neither torch nor onnx; they come with the `export` extra.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from xares_onnx.errors import UsageError, nearest

if TYPE_CHECKING:
    from xares_onnx.exporters.core import ExportReport

__all__ = ["FAMILIES", "export"]

FAMILIES = ("logmel", "resemblyzer")


def export(family: str, checkpoint: str | None, output: Path) -> ExportReport:
    """Write the encoder `family` as an ONNX file; `checkpoint` is a path for the families that have weights.

    Raises `UsageError` for an unknown family, an unusable checkpoint or output path, or where torch or the
    weights are not installed; `ModelError` where the exported file does not agree with the torch module. Then
    the output path is left as it was.
    """
    if family not in FAMILIES:
        raise UsageError(f"there is no encoder family {family!r}{nearest(family, FAMILIES)}; known: {', '.join(FAMILIES)}")
    try:
        core = import_module(f"{__name__}.core")
    except ModuleNotFoundError as error:
        raise UsageError(f"exporting needs {error.name}; run: pip install 'xares-onnx[export]'") from error
    encoder, spec = import_module(f"{__name__}.{family}").build(checkpoint)
    report: ExportReport = core.export_encoder(encoder, spec, output)
    return report
