"""Score an audio encoder exported to ONNX on the X-ARES tasks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

__all__ = ["__version__", "check", "compare", "evaluate", "load_encoder", "read_result", "table", "torch_module"]

if TYPE_CHECKING:
    from .checking import check
    from .encoder.encoder import load_encoder
    from .encoder.torch_module import torch_module
    from .evaluation.comparison import compare
    from .evaluation.evaluation import evaluate
    from .evaluation.record import read_result
    from .report.table import table

_HOMES = {
    "check": "checking",
    "compare": "evaluation.comparison",
    "evaluate": "evaluation.evaluation",
    "load_encoder": "encoder.encoder",
    "read_result": "evaluation.record",
    "table": "report.table",
    "torch_module": "encoder.torch_module",
}


def __getattr__(name: str) -> Any:
    """Nothing heavy is imported before it is asked for."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
