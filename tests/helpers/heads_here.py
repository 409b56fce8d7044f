"""Heads trained in the process of the tests, so that what a test patches concerns them."""

from __future__ import annotations

from typing import Any

import pytest

from xares_onnx.engine import local


class HeadsHere(local.HeadWorker):
    def call(self, function: Any, *arguments: Any, observer: Any, **options: Any) -> Any:
        return function(*arguments, tell=observer)


def train_heads_here(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(local, "HeadWorker", HeadsHere)
