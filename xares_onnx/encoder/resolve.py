"""From a model's file to its contract, and to the open session. Runs in the worker process."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from ..errors import ContractError, ModelLimitError, foreign
from ..files import solid_bytes
from ..progress import Doing
from .contract.contract import remarks
from .contract.declarations import Declarations, declared_frontend_model, declared_in_metadata, merge
from .exposure import Exposure
from .limits import limits, measuring_seconds, memory_bytes, silence_seconds
from .model_file import ModelScan, check_unchanged, scan_model, with_front
from .model_guard import check_beside
from .session import CPU, Session, cuda_may_work
from .spec import EncoderInfo, ModelSpec, Tap
from .worker import Beat, Tell, limit_memory

_CUDA_SECONDS = 90.0  # longest first load: CUDA's and cuDNN's libraries are gigabytes, perhaps on a cold disk


def resolve(
    model: str,
    device: str,
    declared: Declarations,
    beside: Declarations,
    taps: Sequence[str] = (),
    ignored: Sequence[str] = (),
    trust: bool = False,
    *,
    tell: Tell,
) -> EncoderInfo:
    """Scan, load and measure a model. `beside` holds the declarations of a preprocessor file beside it; declarations of
    `ignored` keys are left out. Raises `ModelError`.
    """
    from .measuring.front_model import measure_front_model
    from .measuring.taps import measure_taps

    path = Path(model)
    tell(Doing("reading the model's file"))
    on_cpu = device == "cpu" or (device == "auto" and not cuda_may_work())
    size = solid_bytes(path.stat())
    if on_cpu:
        device = "cpu"  # the name under which `open_session` finds the session again
        limit_memory(memory_bytes(size, trust))
    scan = scan_model(path, lambda: tell(Beat()), trust=trust)
    declarations = merge(declared, declared_in_metadata(scan.metadata), beside)
    declarations = {key: declaration for key, declaration in declarations.items() if key not in ignored}
    front_file, front_scan = declared_frontend_model(declarations), None
    if front_file is not None:
        front_scan = _scan_front(path, front_file, declarations["frontend.model"].source, tell, trust)
        scan = with_front(scan, front_file, front_scan)
    if on_cpu:
        limit_memory(memory_bytes(scan.solid_bytes, trust))
    patience = silence_seconds(scan.solid_bytes, trust) - silence_seconds(size, trust)  # for weights beside the file
    patience += 0.0 if on_cpu else _CUDA_SECONDS
    tell(Doing("loading the model", patience))
    session = _session(model, device, None, front_file)
    check_unchanged(path, scan.stamps)
    tell(Doing("measuring the model", patience))
    budget = measuring_seconds(scan.solid_bytes, trust) * (2 if taps else 1) + (0.0 if on_cpu else _CUDA_SECONDS)
    beat = _Budget(budget, tell).beat
    front = None
    if session.front is not None and front_scan is not None:
        front = measure_front_model(session.front, front_file or "", front_scan.sha256, declarations, beat)

    def open_exposing(exposure: Exposure | None) -> Session:
        return _session(model, device, exposure, front_file)  # by position, as everywhere: one key of its cache

    measured = measure_taps(path, open_exposing, declarations, taps, beat, max_dim=limits(trust).dim, front=front)
    check_unchanged(path, scan.stamps)  # taps were read from the file again
    info = EncoderInfo(
        path=model,
        scan=scan,
        contract=measured.contract,
        provider=session.provider,
        onnxruntime=_runtime_version(),
        notes=(*([session.note] if session.note else []), *remarks(measured.contract), *measured.notes),
        more_taps=tuple(Tap(name, contract) for name, contract in measured.more.items()),
        exposure=measured.exposure,
    )
    return _with_batch_difference(info, lambda: open_exposing(measured.exposure), beat)


def _scan_front(model: Path, file: str, source: str, tell: Tell, trust: bool) -> ModelScan:
    """Scan the graph that makes the features, in the model's folder or below: a stranger's metadata may name it."""
    where = check_beside(model, file, f"{source} declares frontend.model={foreign(file)}, ")
    return scan_model(model.parent / where, lambda: tell(Beat()), trust=trust)


def _with_batch_difference(info: EncoderInfo, open_measured: Callable[[], Session], beat: Callable[[], None]) -> EncoderInfo:
    """`info` with the effect of sharing a call on an embedding, if calls are shared; measured on a full call of noise."""
    contract = info.contract
    items = len(info.batching.groups([contract.chunk_samples] * info.batching.items)[0])
    if items == 1:
        return info
    session = open_measured()
    noise = np.random.default_rng(2).standard_normal((items, contract.chunk_samples)).astype(np.float32) * np.float32(0.1)
    together = session.run(noise, contract)
    beat()
    worst = 0.0
    for number in (0, items - 1):
        alone = session.run(noise[number : number + 1], contract)[0]
        beat()
        worst = max(worst, float(np.abs(together[number] - alone).max()) / (float(np.abs(alone).max()) or 1.0))
    note = (
        f"up to {items} chunks of equal length share a call; an embedding then differs from that of a chunk alone by up to "
        f"{worst:.1e} of the largest value"
    )
    return msgspec.structs.replace(info, batch_difference=worst, notes=(*info.notes, note))


class _Budget:
    """A limit on the processor time of measuring: every call may be short, and all of them together long."""

    def __init__(self, seconds: float, tell: Tell) -> None:
        self._seconds, self._tell = seconds, tell
        self._end = time.process_time() + seconds

    def beat(self) -> None:
        if time.process_time() > self._end:
            raise ModelLimitError(f"the model was still being measured after {self._seconds:.0f} s of processor time")
        self._tell(Beat())


@functools.lru_cache(maxsize=1)
def _session(model: str, device: str, exposure: Exposure | None, front: str | None) -> Session:
    """The worker's only session, loaded at its first use. `front` is a path relative to the model's folder."""
    return Session(Path(model), device, exposure, front=Path(model).parent / front if front else None)


def open_session(spec: ModelSpec, tell: Tell) -> Session:
    """The session of a spec, in the worker.

    Raises `ModelError` if the file changed since it was measured, `ContractError` if the provider did.
    """
    if spec.info.provider == CPU:
        limit_memory(memory_bytes(spec.info.scan.solid_bytes, spec.trust, spec.threads))
    check_unchanged(Path(spec.info.path), spec.info.scan.stamps)
    tell(Doing("loading the model", 0.0 if spec.info.provider == CPU else _CUDA_SECONDS))
    # A spec that was measured on the CPU must not run on a GPU that appeared since.
    device = "cpu" if spec.device == "auto" and spec.info.provider == CPU else spec.device
    front = spec.info.contract.frontend_model
    session = _session(spec.info.path, device, spec.info.exposure, front.file if front else None)
    check_unchanged(Path(spec.info.path), spec.info.scan.stamps)
    if session.provider != spec.info.provider:
        remedy = session.note or "run again"
        raise ContractError(f"the model was measured on {spec.info.provider}, but now runs on {session.provider}; {remedy}")
    tell(Doing("running the model"))
    return session


def _runtime_version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)
