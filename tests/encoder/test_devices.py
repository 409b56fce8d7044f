"""What `--device` names."""

from __future__ import annotations

import pytest

from xares_onnx.encoder.devices import chosen_devices
from xares_onnx.errors import MachineError, UsageError


@pytest.mark.parametrize("option", ["auto", "cpu", "cuda", "cuda:0", "cuda:7", "DmlExecutionProvider", "nonsense"])
def test_one_device_is_taken_as_it_is(option: str) -> None:
    assert chosen_devices(option, lambda: 1) == (option,)


@pytest.mark.parametrize(
    ("option", "count", "devices"),
    [
        ("cuda:0,cuda:1", 2, ["cuda:0", "cuda:1"]),
        ("cuda:3, cuda:1", 4, ["cuda:3", "cuda:1"]),
        ("cuda:0,cuda:1", None, ["cuda:0", "cuda:1"]),  # a driver that cannot count: the worker will tell
        ("cuda:all", 3, ["cuda:0", "cuda:1", "cuda:2"]),
    ],
)
def test_several_devices(option: str, count: int | None, devices: list[str]) -> None:
    assert chosen_devices(option, lambda: count) == tuple(devices)


@pytest.mark.parametrize(
    ("option", "count", "error", "message"),
    [
        ("cuda:0,cuda:2", 2, MachineError, "cuda:2 is not there: this machine has only cuda:0, cuda:1"),
        ("cuda:0,cuda:1", 0, MachineError, "cuda:0 is not there: this machine has no CUDA device"),
        ("cuda:all", 0, MachineError, "finds no CUDA device"),
        ("cuda:all", None, MachineError, "finds no CUDA device"),
        ("cuda:0,cpu", 2, UsageError, "'cpu' is no CUDA device by its number"),
        ("cuda,cuda:1", 2, UsageError, "'cuda' is no CUDA device by its number"),
        ("cuda:all,cuda:1", 2, UsageError, "'cuda:all' is no CUDA device by its number"),
        ("cuda:0,", 2, UsageError, "'' is no CUDA device by its number"),
        ("cuda:1,cuda:1", 2, UsageError, "names a device twice"),
    ],
)
def test_refused_lists(option: str, count: int | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        chosen_devices(option, lambda: count)
