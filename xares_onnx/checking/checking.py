"""The `check` command: resolve a model, then measure one property after another in its process.

Each property is a call of its own. If the model hangs or dies in one, its process is stopped: that property fails, those
before it stand, and those after it are skipped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..encoder.encoder import Encoder, Reach, onnxruntime_distributions, open_encoder
from ..encoder.spec import ModelOptions
from ..encoder.worker import Tell
from ..errors import ContractError, ContradictionError, MachineError, ModelError, ModelLimitError, UsageError
from ..progress import Note, Observer, Progress, ignore
from ..version import __version__
from .facts import read_facts
from .findings import CheckReport, Finding, ModelFacts, Outcome, Profile, failed, passed, shown_name, skipped, unreached
from .model_under_test import Subject, bench_of
from .parity import Reference, compare, read_reference, reference_of_model, sounds
from .profile import measure_profile
from .registry import INPUTS, LOADS, PARITY, PROPERTIES, Property
from .settings import Setting, make_settings

# The property that fails if an error about this key ends the measuring of a contract; for any other key it is `contract`.
_PROPERTY_OF = {
    "input": INPUTS,
    "input_layout": INPUTS,
    "lengths_input": INPUTS,
    "mask_input": INPUTS,
    "output": "output",
    "output_layout": "output",
    "time": "dynamic-time",
    "run": "dynamic-time",
    "process": LOADS,
    "frames": "frame-law",
    "values": "finite",
    "random": "determinism",
    "constant": "varies",
    "min_samples": "min-length",
    "chunk_samples": "max-length",
}
_REMEDIES = {
    LOADS: "export a file that ONNX Runtime loads and runs within the limits",
    INPUTS: "export with one waveform input; fill any other inside the model",
    "contract": "correct what is declared",
    "output": "export one output [batch, frames, dim]",
    "dynamic-time": "export with a dynamic samples axis, and let no operator keep the length of the example",
    "frame-law": "export so that the frame count follows one law",
    "finite": "guard logarithms, divisions and square roots by a small constant",
    "determinism": "export in inference mode, without dropout or random numbers",
    "varies": "look at the last layers: weights lost in the export, or an output that is no embedding",
    "min-length": "declare the shortest input that works by min_samples",
    "max-length": "declare the longest input that works by chunk_samples or max_samples",
}


def check(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    contract: Sequence[str] = (),
    device: str = "auto",
    threads: int | None = None,
    cache: Path | None = None,
    trust: bool = False,
    settings: Mapping[str, Any] | None = None,
    profile: bool = False,
    observer: Observer = ignore,
) -> CheckReport:
    """Measure, without data, whether a model has every property that an encoder needs.

    A faulty or unusable model is reported, not raised.

    Args:
        model: An `.onnx` file, or a folder that holds one.
        reference: Another model to agree with, or a `.npz` of waveforms and embeddings.
        contract: Declarations, as "KEY=VALUE".
        device: `auto`, `cpu`, `cuda`, `cuda:N`, or the name of an ONNX Runtime provider.
        threads: Number of threads; the number of usable cores by default.
        cache: Folder that keeps the measured contract.
        trust: Whether to lift the limits on the model's size, memory and time.
        settings: By property, a severity ("error", "warn", "off"), or a mapping of `severity` and `tolerance`.
        profile: Whether to time the kernels too, by operator and by layer.
        observer: Receives notes and progress.

    Returns:
        The report, with one finding per property.

    Raises:
        UsageError: An argument is invalid, or the reference cannot be used.
        MachineError: This machine cannot run the model.

    Example:
        >>> check("model.onnx").named("fail")
        []
    """
    started = time.perf_counter()
    by_property = make_settings(settings or {}, "settings")
    npz = read_reference(Path(reference)) if reference is not None and Path(reference).suffix == ".npz" else None
    with ExitStack() as stack:
        run = _Check(str(model), by_property, _scratch(stack), observer)
        options = ModelOptions(device=device, threads=threads, contract=tuple(contract), trust=trust)
        subject = run.resolve(stack, options, cache)
        if subject is not None:
            run.measure_all(subject, run.reference(Path(reference), npz) if reference is not None else None)
            if profile:
                run.measure_profile(subject)
    return run.report(time.perf_counter() - started)


def _scratch(stack: ExitStack) -> str:
    """A folder for files of the model's process, which is removed with all that is in it."""
    try:
        return stack.enter_context(TemporaryDirectory(prefix="xares-onnx-", ignore_cleanup_errors=True))
    except OSError as error:
        raise MachineError(f"no temporary folder can be made ({error.strerror}); name one by TMPDIR") from error


class _Check:
    """One check in progress: the findings so far, and why the model is unusable, if it is."""

    def __init__(self, model: str, settings: Mapping[str, Setting], scratch: str, observer: Observer) -> None:
        self.model, self.settings, self.scratch, self.observer = model, settings, scratch, observer
        self.encoder: Encoder | None = None
        self.facts: ModelFacts | None = None
        self.unusable: str | None = None
        self.findings: dict[str, Finding] = {}
        self.profile: Profile | None = None

    # ---------------------------------------------------------------- resolving

    def resolve(self, stack: ExitStack, options: ModelOptions, cache: Path | None) -> Subject | None:
        """The model with its contract; None if it has none, which the findings then explain.

        A declaration that a measurement contradicts is set aside, and the model measured again without it.
        """
        contradicted: dict[str, str] = {}
        reach = Reach(writes=[Path(self.scratch)])
        while True:
            try:
                encoder = open_encoder(
                    self.model, options, without=tuple(contradicted), cache=cache, reach=reach, observer=self.observer
                )
                self.encoder = stack.enter_context(encoder)
                self.facts = self._read_facts(encoder)
            except ContradictionError as error:
                if error.about is None or error.about in contradicted:
                    self._record_refusal(error, contradicted)
                    return None
                contradicted[error.about] = str(error)
            except ModelError as error:
                self._record_refusal(error, contradicted)
                return None
            else:
                return Subject(encoder.spec, self.facts, self.scratch, contradicted)

    def _read_facts(self, encoder: Encoder) -> ModelFacts:
        return encoder.call(read_facts, encoder.info.path, encoder.info.scan, returns=ModelFacts, observer=self.observer)

    def _record_refusal(self, error: ModelError, contradicted: Mapping[str, str]) -> None:
        """Findings on a model without a contract.

        One property fails by the error. The model has loaded if the error is about a part of its contract. Declarations that
        were contradicted before fail too, and everything else is skipped.
        """
        cause = _property_of(error)
        if cause in (LOADS, INPUTS):
            self.unusable = str(error)
        outcomes = {cause: failed(str(error), _REMEDIES[cause])}
        if cause != LOADS and error.about is not None:
            outcomes[LOADS] = passed("read and loaded within the limits of time and memory")
        for key, contradiction in contradicted.items():
            property_name = "hop" if key == "hop_samples" else "declarations"
            outcomes.setdefault(property_name, failed(contradiction, "if the declaration is right, export the model again"))
        rest = unreached(f"not measured, because {cause} failed")
        for item in PROPERTIES.values():
            self._record(item, outcomes.get(item.name, rest), 0.0)

    def reference(self, path: Path, npz: Reference | None) -> Reference:
        """The reference of parity: the embeddings of a file, or those that another model gives for the same sounds."""
        assert self.encoder is not None
        own = self.encoder.contract
        if npz is not None:
            if npz.rate != own.sample_rate:
                raise UsageError(
                    f"reference {npz.name} is at {npz.rate} Hz, but the model takes {own.sample_rate} Hz; write it at the "
                    "model's rate, or declare the rate by --contract sample_rate=N"
                )
            return npz
        try:
            spec = self.encoder.spec
            with open_encoder(path, ModelOptions(device=spec.device, threads=spec.threads, trust=spec.trust)) as other:
                waveforms = sounds(own.sample_rate, own.min_samples, own.chunk_samples)
                return reference_of_model(other, self._read_facts(other).precision, waveforms, own.sample_rate)
        except ModelError as error:
            raise UsageError(f"the reference cannot be used: {error}") from error

    # ---------------------------------------------------------------- measuring

    def measure_all(self, subject: Subject, reference: Reference | None) -> None:
        """Measure every property that is not switched off."""
        stopped_at = ""
        for number, item in enumerate(PROPERTIES.values()):
            self.observer(Progress("check", shown_name(self.model), number, len(PROPERTIES)))
            started = time.perf_counter()
            if self._setting(item).severity == "off":
                outcome = skipped("switched off")
            elif stopped_at:
                outcome = unreached(f"not measured, because {stopped_at} stopped the model's process")
            else:
                try:
                    outcome = self._measure(item, subject, reference)
                except ModelError as error:
                    outcome = failed(str(error), "let the model run on any sound within its limits of time and memory")
                    if item.name == LOADS or isinstance(error, ModelLimitError) or error.about == "process":
                        self.unusable, stopped_at = str(error), item.name
            self._record(item, outcome, time.perf_counter() - started)
        self.observer(Progress("check", shown_name(self.model), len(PROPERTIES), len(PROPERTIES)))

    def measure_profile(self, subject: Subject) -> None:
        """Time the kernels, unless the model cannot be used. A failure is a note."""
        assert self.encoder is not None
        if self.unusable is not None:
            return
        try:
            self.profile = self.encoder.call(measure_profile, subject, returns=Profile, observer=self.observer)
        except ModelError as error:
            self.observer(Note(f"the model could not be profiled: {error}"))

    def _measure(self, item: Property, subject: Subject, reference: Reference | None) -> Outcome:
        assert self.encoder is not None
        tolerance = self._setting(item).tolerance
        if item.name == PARITY:
            if reference is None:
                return skipped("there is no reference; name one by --reference")
            return compare(self.encoder, reference, subject.facts.precision, tolerance)
        return self.encoder.call(measure_property, subject, item.name, tolerance, returns=Outcome, observer=self.observer)

    # ---------------------------------------------------------------- recording

    def _setting(self, item: Property) -> Setting:
        return self.settings.get(item.name, Setting())

    def _record(self, item: Property, outcome: Outcome, seconds: float) -> None:
        outcome = self._setting(item).applied(outcome)
        self.findings[item.name] = Finding(
            property=item.name,
            group=item.group,
            title=item.title,
            status=outcome.status,
            says=outcome.says,
            measured=outcome.measured,
            tolerance=outcome.tolerance,
            unit=outcome.unit,
            remedy=outcome.remedy,
            details=outcome.details,
            reached=outcome.reached,
            seconds=round(seconds, 3),
        )

    def report(self, seconds: float) -> CheckReport:
        info = self.encoder.info if self.encoder is not None else None
        return CheckReport(
            file=self.model,
            model=self.facts,
            contract=info.contract.described() if info is not None else None,
            provider=info.provider if info is not None else None,
            walls=self.encoder.worker.standing if self.encoder is not None else None,
            versions={"xares-onnx": __version__, **onnxruntime_distributions()},
            findings=tuple(self.findings.values()),
            profile=self.profile,
            unusable=self.unusable,
            seconds=round(seconds, 2),
        )


def _property_of(error: ModelError) -> str:
    """The property that an error while resolving a model belongs to."""
    about_contract = isinstance(error, ContractError) or error.about is not None
    if isinstance(error, ModelLimitError) or not about_contract:
        return LOADS
    return _PROPERTY_OF.get(error.about or "", "contract")


def measure_property(subject: Subject, name: str, tolerance: float | None, *, tell: Tell) -> Outcome:
    """Measure one property. Runs in the worker, which keeps the model under test between calls."""
    measure = PROPERTIES[name].measure
    assert measure is not None
    return measure(bench_of(subject, tell), tolerance)
