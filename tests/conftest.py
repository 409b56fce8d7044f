"""Settings and fixtures of every test."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from xares_onnx.encoder import encoder
from xares_onnx.encoder.worker import Worker

# The same examples in every run, and no limit on the time of one: other work may share the machine.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="module")
def _shared_worker() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


@pytest.fixture
def shared_process(_shared_worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders of a module's tests share one process, so that a test costs milliseconds.

    The process keeps the last model that it loaded from a path.
    """

    class Borrowed(Worker):
        def call(self, *arguments: Any, **options: Any) -> Any:
            return _shared_worker.call(*arguments, **options)

    monkeypatch.setattr(encoder, "Worker", Borrowed)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small products on a busy machine are much slower with several threads of torch."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def taught_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny language model that writes what it is told, one for all tests: it takes seconds to teach."""
    from tiny_lm import make_folder

    return make_folder(tmp_path_factory.mktemp("models") / "tiny-lm")
