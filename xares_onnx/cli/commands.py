"""Every command: each module adds its own, and `--help` lists them in the order of this import."""

import sys  # noqa: I001

from . import evaluate, embed, check, compare, diagnose, report, data, download, pack, models  # noqa: F401
from .app import app

# `xares_onnx.cli.app` is the program, and not the module in which it is made.
sys.modules[__name__.rpartition(".")[0]].__dict__["app"] = app
