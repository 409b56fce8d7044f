"""Properties of the file and its contract: whether it loads, what it declares, and whether that is true."""

from __future__ import annotations

from ..encoder.contract.contract import Contract
from ..errors import quoted
from .findings import Outcome, failed, passed, skipped, warned
from .model_under_test import Bench

# Only those who ship a model know these; no measurement can tell them.
SHIPPED_WITH = ("sample_rate", "amplitude", "normalize", "license", "source")
_OUTPUT_KEYS = ("output", "output_layout", "output_dim")
_OLDEST_OPSET = 7  # the oldest that ONNX Runtime promises to run


def check_loads(bench: Bench, tolerance: float | None) -> Outcome:
    return passed(f"read, loaded and run on {bench.session.provider} within the limits of time and memory")


def check_inputs(bench: Bench, tolerance: float | None) -> Outcome:
    contract = bench.contract
    beside = [name for name in (contract.lengths_input, contract.mask_input, *(contract.constants or ())) if name]
    filled = f"; {' and '.join(repr(name) for name in beside)} filled beside it" if beside else ""
    return passed(
        f"{quoted(contract.input)} takes the waveform as {contract.input_layout}{filled}", measured=contract.input_layout
    )


def check_contract(bench: Bench, tolerance: float | None) -> Outcome:
    fields = bench.contract.described()
    details = tuple(f"{name} = {shown(entry['value'])} ({entry['source']})" for name, entry in fields.items())
    return passed(
        f"{len(fields)} fields resolved, each with its source", measured=len(fields), unit="fields", details=details
    )


def check_output(bench: Bench, tolerance: float | None) -> Outcome:
    contract = bench.contract
    return passed(
        f"{quoted(contract.output)} gives {contract.output_layout} with {contract.dim} dimensions",
        measured=contract.dim,
        unit="dimensions",
    )


def check_declarations(bench: Bench, tolerance: float | None) -> Outcome:
    contradicted = {key: message for key, message in bench.subject.contradicted.items() if key != "hop_samples"}
    if contradicted:
        return failed(
            "; ".join(contradicted.values()),
            "if the declaration is right, export the model again",
            measured=len(contradicted),
            tolerance=0,
            unit="contradicted",
        )
    agreeing = [name for name, source in bench.contract.sources.items() if "as declared" in source]
    agreeing = [name for name in agreeing if name != "hop_samples"]
    return passed(
        f"{', '.join(agreeing)} as declared" if agreeing else "no declaration contradicts the measurements",
        measured=0,
        tolerance=0,
        unit="contradicted",
    )


def check_hop(bench: Bench, tolerance: float | None) -> Outcome:
    contract = bench.contract
    hop = contract.hop_samples
    if hop is None:
        if against := bench.subject.contradicted.get("hop_samples"):
            return failed(against, "remove the declaration of hop_samples")
        return skipped("the model gives one vector per clip, which has no hop")
    length = f"{hop:g} samples, {1000 * hop / contract.sample_rate:g} ms"
    if against := bench.subject.contradicted.get("hop_samples"):
        return failed(
            against,
            "with a wrong hop every frame label is at a wrong time; if the declared hop is right, export the model again",
            measured=hop,
            tolerance="as declared",
            unit="samples",
        )
    source = contract.sources.get("hop_samples", "measured")
    return passed(f"{length} ({source})", measured=hop, tolerance="as declared", unit="samples")


def check_metadata(bench: Bench, tolerance: float | None) -> Outcome:
    contract = bench.contract
    missing = [key for key in SHIPPED_WITH if not _declared(contract, key)]
    count = len(SHIPPED_WITH) - len(missing)
    figure = {"measured": count, "tolerance": f"{len(SHIPPED_WITH)}", "unit": "declared"}
    if not missing:
        return passed(f"{', '.join(SHIPPED_WITH)} declared", **figure)
    assumed = [f"{key}={shown(getattr(contract, key))}" for key in missing if getattr(contract, key) is not None]
    flags = " ".join(f"--contract {key}=…" for key in missing)
    return warned(
        f"{', '.join(missing)} not declared" + (f"; assumed {', '.join(assumed)}" if assumed else ""),
        f"write it into the file by `xares-onnx annotate MODEL {flags} -o OUT.onnx`",
        **figure,
    )


def check_opset(bench: Bench, tolerance: float | None) -> Outcome:
    facts = bench.facts
    opset = facts.opsets.get("ai.onnx", 0)
    others = [f"{domain} {version}" for domain, version in facts.opsets.items() if domain != "ai.onnx"]
    says = f"opset {opset}, IR {facts.ir_version}" + (f", {', '.join(others)}" if others else "")
    least = _OLDEST_OPSET if tolerance is None else tolerance
    figure = {"measured": opset, "tolerance": f">= {least:g}", "unit": "opset"}
    if opset < least:
        return warned(
            f"{says}; ONNX Runtime promises to run opset {_OLDEST_OPSET} and later", "export to a later opset", **figure
        )
    return passed(says, **figure)


def shown(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else f"{value}"


def _declared(contract: Contract, key: str) -> bool:
    source = contract.sources.get(key, "")
    return bool(source) and not source.startswith("default")
