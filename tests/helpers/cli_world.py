"""A model, tasks and their data that the tests of the command line share, and how they call it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corpus import write_encoder, write_task, write_tones
from typer.testing import CliRunner

from xares_onnx import cli

ROOT = Path(__file__).parents[2]
# Ctrl-C is ignored by what a background job starts, and the tests may be one.
START = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from xares_onnx.cli import main; main()"


class World:
    """A model, two tasks that can be scored and one that cannot, and what `run` leaves on both streams."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.cache = folder, folder / "data", folder / "cache"
        self.model = str(write_encoder(folder / "bank.onnx"))
        self.good, self.other, self.cut = (str(write_task(folder, name)) for name in ("good", "other", "cut"))
        for number, name in enumerate(("good", "other", "cut")):
            write_tones(self.data, name, train=24, valid=8, test=12 if name == "good" else 16, seed=10 * number)
        shard = self.data / "cut/test-0.tar"
        shard.write_bytes(shard.read_bytes()[:20_000])
        self.environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("XARES_", "FORCE_COLOR", "COLUMNS"))
            },
            "XARES_ONNX_DATA": str(self.data),
            "XARES_ONNX_CACHE": str(self.cache),
            "PYTHONPATH": str(ROOT),
        }
        # Embedded once, so that what a test sees on stderr does not depend on the tests before it.
        tasks = ["--tasks", f"{self.good},{self.other},{self.cut}", "--data", str(self.data), "--cache", str(self.cache)]
        assert run(*self.evaluate(*tasks, "--method", "knn", "--quiet"))[0] == 4

    def evaluate(self, *arguments: str) -> list[str]:
        return ["evaluate", self.model, "--output", str(self.folder / "out.json"), *arguments]

    def start(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        environment = {**self.environment, **options.pop("env", {})}
        command = [sys.executable, "-c", START, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen(command, env=environment, cwd=self.folder, **pipes)

    def real(self, *arguments: str, **options: Any) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a process of its own."""
        process = self.start(arguments, **options)
        out, err = process.communicate(timeout=200)
        return process.returncode, out.decode(), err.decode()


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, in this process."""
    done = CliRunner().invoke(cli.app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def said(stderr: str) -> str:
    """The one line that an error leaves."""
    assert stderr.startswith("xares-onnx: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1
    return stderr.removeprefix("xares-onnx: ").strip()


def table(out: str) -> list[list[str]]:
    """The cells of a plain table, without its head."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    return rows[1:]
