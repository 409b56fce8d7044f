"""Every command, in the order of `--help`: each module adds its own."""

# ruff: noqa: I001

import sys

from . import evaluate, embed, check, compare, report, data, download, pack, models  # noqa: F401
from .app import app

# `xares_onnx.cli.app` is the program, and not the module in which it is made.
sys.modules[__name__.rpartition(".")[0]].__dict__["app"] = app
