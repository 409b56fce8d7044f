"""The server that the tests of downloads ask, and what they put beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from download_world import Place
from http_faults import Zenodo, serving


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("XARES_ONNX_OFFLINE", raising=False)
    with serving(Zenodo()) as zenodo:
        yield Place(tmp_path, zenodo)
