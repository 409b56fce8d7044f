"""A front end that is a graph, measured as an encoder is: its frames are the features. Runs in the worker process."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ...errors import ContractError, ModelError, foreign
from ..contract.contract import FrontendModel
from ..contract.declarations import Declarations
from ..contract.frontend import MAX_BINS
from ..session import Session
from .measure import measure_contract


def measure_front_model(
    session: Session, file: str, sha256: str, declared: Declarations, beat: Callable[[], None]
) -> FrontendModel:
    """Measure a graph that makes features of waveforms.

    Args:
        session: The loaded graph.
        file: Its path, relative to the model's folder.
        sha256: Of its content.
        declared: What is declared of the model, by contract key.
        beat: Called after every run, as a sign of life.

    Raises:
        ContractError: It makes no frames, or takes one length alone.
        ModelError: It fails on noise.
    """
    shared = {key: declared[key] for key in ("sample_rate",) if key in declared}
    try:
        contract = measure_contract(session, shared, beat, max_dim=MAX_BINS)
        if contract.law is None or contract.fixed_window:
            takes = f"takes exactly {contract.chunk_samples} samples" if contract.fixed_window else "gives no frames"
            raise ContractError(f"it {takes}; export it with a dynamic samples axis")
    except ModelError as error:
        raise type(error)(f"front end {foreign(file)}: {error}", about=error.about) from error
    numbers = {key: float(declared[f"frontend.{key}"].value) for key in ("scale", "offset") if f"frontend.{key}" in declared}
    return FrontendModel(file=file, sha256=sha256, contract=msgspec.structs.replace(contract, sources={}), **numbers)
