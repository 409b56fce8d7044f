"""This machine's processor: the instruction sets on which the numbers of an 8-bit model depend."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

__all__ = ["PairSums", "instruction_sets", "pair_sums"]

PairSums = Literal["exact", "saturating", "unknown"]

_CPUINFO = Path("/proc/cpuinfo")
# Linux's names of the sets by which ONNX Runtime (MLAS, platform.cpp) chooses the kernels of its products.
_RELEVANT_SETS = (
    "avx",
    "fma",
    "avx2",
    "avx_vnni",
    "avx_vnni_int8",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "amx_int8",
    "asimd",  # ARM's from here on
    "asimddp",
    "i8mm",
    "sve",
    "svei8mm",
)
_IN_32_BITS = {"avx_vnni", "avx512_vnni", "amx_int8"}


@functools.cache
def instruction_sets() -> tuple[str, ...] | None:
    """This processor's instruction sets that matter to ONNX Runtime, by Linux's names; None if it lists none."""
    try:
        lines = _CPUINFO.read_text("ascii", "replace").splitlines()
    except OSError:
        return None
    for line in lines:  # each core has the same
        name, _, listed = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            flags = set(listed.split())
            return tuple(name for name in _RELEVANT_SETS if name in flags)
    return None


def pair_sums() -> PairSums:
    """How this processor adds two products of an unsigned and a signed byte: in 32 bits, or in 16 that saturate.

    ONNX Runtime uses vpmaddubsw, which saturates, on x86-64 with AVX2 or AVX-512 and without VNNI; ARM is exact
    (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html, "When and why do I need to try U8U8?").
    """
    sets = instruction_sets()
    if sets is None:
        return "unknown"
    return "saturating" if "avx2" in sets and not _IN_32_BITS & set(sets) else "exact"
