"""The command line: parse, call, print."""

# Each module adds its commands; `--help` lists them in this order.
from . import evaluate, embed, check, compare, diagnose, report, data, download, pack, models  # noqa: F401, I001
from .app import app, main

__all__ = ["app", "main"]
