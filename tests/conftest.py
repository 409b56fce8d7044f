"""Settings and fixtures of every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from xares_onnx.encoder.worker import Worker

# One thread per process, in processes that tests start as well: pytest-xdist runs a process per core, and threads of torch
# or a BLAS that wait for each other made a test of 13 s take 300. Set before anything imports numpy, which reads it once.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

# The same examples in every run, and no limit on the time of one: other work may share the machine.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    """A model's process may be silent for minutes, because it takes long to start on a busy machine."""
    from xares_onnx.encoder import limits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "SILENCE_SECONDS", 200.0)
        yield


@pytest.fixture(scope="session")
def _shared_worker() -> Iterator[Worker]:
    from xares_onnx.encoder.worker import Worker

    with Worker() as worker:
        yield worker


@pytest.fixture
def shared_process(_shared_worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders of many tests share one process, so that a test costs milliseconds and not the start of one.

    The process keeps the last model that it loaded from a path.
    """
    from xares_onnx.encoder import encoder
    from xares_onnx.encoder.worker import Worker

    class Borrowed(Worker):
        def call(self, *arguments: Any, **options: Any) -> Any:
            return _shared_worker.call(*arguments, **options)

    monkeypatch.setattr(encoder, "Worker", Borrowed)


@pytest.fixture(scope="session")
def head_process() -> Iterator[Worker]:
    """The process that trains the heads of all tests."""
    from xares_onnx.engine.local import HeadWorker

    with HeadWorker() as worker:
        yield worker


@pytest.fixture(autouse=True)
def _heads_share_a_process(head_process: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of all tests are trained in one process, since torch takes seconds to import."""
    from xares_onnx.engine import local

    owner = os.getpid()

    class Borrowed(local.HeadWorker):
        def call(self, *arguments: Any, **options: Any) -> Any:
            # A fork of this process has no thread that reads what the shared one says.
            return head_process.call(*arguments, **options) if os.getpid() == owner else super().call(*arguments, **options)

    monkeypatch.setattr(local, "HeadWorker", Borrowed)


@pytest.fixture
def heads_in_this_process(monkeypatch: pytest.MonkeyPatch, _heads_share_a_process: None) -> None:
    """Heads are trained here, so that what a test patches concerns them."""
    from heads_here import train_heads_here

    train_heads_here(monkeypatch)


@pytest.fixture(scope="session")
def taught_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny language model that writes what it is told, one for all tests."""
    from tiny_lm import make_folder

    return make_folder(tmp_path_factory.mktemp("models") / "tiny-lm")


@pytest.fixture(scope="session")
def _decoding_process() -> Iterator[Worker]:
    from xares_onnx.encoder.worker import Worker

    with Worker() as worker:
        yield worker


@pytest.fixture(autouse=True)
def _decoders_share_a_process(_decoding_process: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Audio of all packings is decoded in one process, so that a test costs no start of one."""
    from xares_onnx.encoder import decoding
    from xares_onnx.packing import packing

    owner = os.getpid()

    class Borrowed(decoding.Decoder):
        def begin(self) -> None:
            pass

        def call(self, *arguments: Any, **options: Any) -> Any:
            mine = os.getpid() == owner
            return _decoding_process.call(*arguments, **options) if mine else super().call(*arguments, **options)

    monkeypatch.setattr(packing, "Decoder", Borrowed)
