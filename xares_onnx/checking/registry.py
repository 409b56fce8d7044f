"""Every property in order, with its stable name. docs/check.md describes each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import batches, contracts, eight_bits, figures, heads, lengths, providers, saturation, values
from .findings import Outcome
from .model_under_test import Bench

PARITY = "parity"
LOADS, INPUTS = "loads", "inputs"


@dataclass(frozen=True)
class Property:
    """A property. `measure` runs the model, in the worker; `tolerance` is whether a user may set one."""

    name: str
    group: str
    title: str
    measure: Callable[[Bench, float | None], Outcome] | None
    tolerance: bool = False


_FILE, _TIME, _BATCH, _VALUES, _AGREES, _COST = "file and contract", "time", "batch", "values", "agreement", "cost"

PROPERTIES: dict[str, Property] = {
    item.name: item
    for item in (
        Property(LOADS, _FILE, "loads within limits", contracts.check_loads),
        Property(INPUTS, _FILE, "every input can be filled", contracts.check_inputs),
        Property("contract", _FILE, "the contract is resolved", contracts.check_contract),
        Property("output", _FILE, "one output is the embedding", contracts.check_output),
        Property("declarations", _FILE, "what is declared is so", contracts.check_declarations),
        Property("metadata", _FILE, "what cannot be measured is declared", contracts.check_metadata),
        Property("opset", _FILE, "opset and IR", contracts.check_opset, tolerance=True),
        Property("dynamic-time", _TIME, "any length works", lengths.check_dynamic_time),
        Property("frame-law", _TIME, "frames follow one law", lengths.check_frame_law),
        Property("hop", _TIME, "the hop is the declared one", contracts.check_hop),
        Property("min-length", _TIME, "the shortest input", lengths.check_min_length, tolerance=True),
        Property("max-length", _TIME, "the longest input", lengths.check_max_length),
        Property("dynamic-batch", _BATCH, "any batch works", batches.check_dynamic_batch),
        Property("batch-invariance", _BATCH, "neighbours do not matter", batches.check_batch_invariance, tolerance=True),
        Property("determinism", _BATCH, "the same twice", batches.check_determinism, tolerance=True),
        Property("finite", _VALUES, "finite on any sound", values.check_finite),
        Property("varies", _VALUES, "not constant", values.check_varies, tolerance=True),
        Property("head", _VALUES, "no classifier's output", heads.check_head),
        Property("rank", _VALUES, "not collapsed", values.check_rank, tolerance=True),
        Property("padding", _VALUES, "zeros behind a clip", lengths.check_padding, tolerance=True),
        Property("chunking", _VALUES, "chunks against the whole", lengths.check_chunking, tolerance=True),
        Property("gain", _VALUES, "quieter and louder", values.check_gain, tolerance=True),
        Property(PARITY, _AGREES, "as the reference", None, tolerance=True),
        Property("devices", _AGREES, "CPU and GPU agree", providers.check_devices, tolerance=True),
        Property(
            "int8-saturation",
            _AGREES,
            "8-bit weights that saturate without VNNI",
            saturation.check_saturation,
            tolerance=True,
        ),
        Property("int8-scales", _AGREES, "scales of what is quantised", eight_bits.check_scales, tolerance=True),
        Property("arithmetic", _COST, "as small in arithmetic as in the file", eight_bits.check_arithmetic, tolerance=True),
        Property("placement", _COST, "nodes that fell to the CPU", providers.check_placement, tolerance=True),
        Property("size", _COST, "size", figures.check_size, tolerance=True),
        Property("latency", _COST, "latency", figures.check_latency, tolerance=True),
        Property("real-time-factor", _COST, "real-time factor", figures.check_real_time_factor, tolerance=True),
        Property("memory", _COST, "peak memory", figures.check_memory, tolerance=True),
    )
}
