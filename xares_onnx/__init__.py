"""Score an audio encoder exported to ONNX on the X-ARES tasks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

__all__ = ["__version__", "check", "compare", "evaluate", "load_encoder", "read_result", "table"]

if TYPE_CHECKING:
    from .checking import check
    from .comparison import compare
    from .encoder import load_encoder
    from .evaluation import evaluate
    from .report.table import table
    from .results import read_result

_HOMES = {
    "check": "checking",
    "compare": "comparison",
    "evaluate": "evaluation",
    "load_encoder": "encoder",
    "read_result": "results",
    "table": "report.table",
}


def __getattr__(name: str) -> Any:
    """Nothing heavy is imported before it is asked for."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
