"""How long the chunks of a model that takes many lengths are, and whether they overlap. Runs in the worker process."""

from __future__ import annotations

from ...errors import ContractError, ContradictionError, ModelError, ModelLimitError, quoted
from ..contract.contract import DEFAULT_CHUNK_SECONDS
from .probe import Probe


def choose_chunk(probe: Probe) -> int:
    contract = probe.contract
    usual = round(DEFAULT_CHUNK_SECONDS * contract.sample_rate)
    if contract.windows:
        usual = max(usual, contract.min_samples)
    chunk = int(probe.choose("chunk_samples", usual))
    if contract.max_samples is not None and chunk > contract.max_samples:
        if "chunk_samples" in probe.declared:
            problem = f"chunk_samples={chunk} is more than max_samples={contract.max_samples}"
            raise ContradictionError(problem, about="chunk_samples")
        chunk = contract.max_samples
    if chunk < contract.min_samples:
        raise _chunk_error(
            probe, f"chunk_samples={chunk} is less than the {contract.min_samples} samples that the model needs"
        )
    return chunk


def check_long_input(probe: Probe) -> None:
    """The law must hold at the chunk length too: an export may have frozen a maximum."""
    contract = probe.contract
    try:
        frames = probe.frames(contract.chunk_samples)
    except (ContractError, ModelLimitError):
        raise
    except ModelError as error:
        raise _chunk_error(
            probe,
            f"the model fails on a chunk of {contract.chunk_samples / contract.sample_rate:g} s; declare a shorter "
            f"one by --contract chunk_samples=N ({error})",
        ) from error
    if frames != (expected := contract.frames_of(contract.chunk_samples)):
        raise _chunk_error(
            probe,
            f"{contract.chunk_samples} samples give {frames} frames, and by the law of shorter inputs {expected}; declare a "
            "shorter --contract chunk_samples=N",
        )


def choose_overlap(probe: Probe) -> None:
    """Set whether chunks overlap, so that windows go on across their borders."""
    contract = probe.contract
    default = ("window", "default (of windows)") if contract.windows else (None, "default")
    if probe.choose("chunk_overlap", *default) == "window":
        if contract.law is None:
            raise ContradictionError(
                f"{probe.sources['chunk_overlap']} declares chunk_overlap=window, but output {quoted(contract.output)} "
                "gives one vector per clip, without frames; drop it",
                about="chunk_overlap",
            )
        probe.update(chunk_overlap="window")


def _chunk_error(probe: Probe, message: str) -> ContractError:
    kind = ContradictionError if "chunk_samples" in probe.declared else ContractError
    return kind(message, about="chunk_samples")
