"""Any bytes at all to every reader of strangers' files: mutations of honest ones, and what the fuzzer once found."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
from fuzz_targets import TARGETS
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

EXAMPLES = {"audio": 300, "shard": 200, "task": 200, "dimension": 300, "declared": 300, "model": 200, "table": 150}
EXAMPLES |= {"result": 100, "arrays": 150, "stored": 150}


@functools.cache
def seeds(name: str) -> Sequence[bytes]:
    return TARGETS[name].seeds()


@st.composite
def mutations(draw: st.DrawFn, name: str) -> bytes:
    """An honest file, changed, cut, spliced with another one or stretched in a few places; now and then it is only noise."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(draw(st.sampled_from(seeds(name))))
    for _ in range(draw(st.integers(1, 4))):
        spot = draw(st.integers(0, max(0, min(len(data), draw(st.sampled_from([64, 1 << 30]))) - 1)))  # headers more often
        match draw(st.sampled_from(["set", "cut", "drop", "insert", "splice", "repeat"])):
            case "set":
                data[spot : spot + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del data[spot:]
            case "drop":
                del data[spot : spot + draw(st.integers(1, 64))]
            case "insert":
                data[spot:spot] = draw(
                    st.binary(max_size=16) | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"9" * 400, b"(" * 200])
                )
            case "splice":
                other = draw(st.sampled_from(seeds(name)))
                data[spot:] = other[draw(st.integers(0, len(other))) :]
            case _:
                data[spot:spot] = data[spot : spot + draw(st.integers(1, 64))] * draw(st.integers(1, 8))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_honest_files_pass(name: str) -> None:
    for seed in seeds(name):
        TARGETS[name].check(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes(name: str) -> None:
    @settings(max_examples=EXAMPLES[name], suppress_health_check=list(HealthCheck), deadline=None)
    @given(mutations(name))
    @example(b"")
    def check(data: bytes) -> None:
        TARGETS[name].check(data)

    check()
