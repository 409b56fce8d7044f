"""The encoder contract: how a model is fed and read, and where each fact about it is from.

Nothing here runs a model; `measuring` does, and fills a `Contract` from declarations and measurements.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

from ...errors import foreign
from . import frontend as frontends
from .constants import PREFIX as CONSTANT
from .constants import Constant
from .frame_law import FrameLaw
from .frontend import Frontend
from .tokens import PREFIX as TOKENS
from .tokens import Tokens
from .windows import PREFIX as WINDOW
from .windows import Windows

DEFAULT_SAMPLE_RATE = 16_000
DEFAULT_CHUNK_SECONDS = 10.0
_MOST = 1 << 40  # of anything that is counted


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """How to feed a model and read it. Lengths are in samples at `sample_rate`.

    `input_layout` and `output_layout` name each axis: B the batch, T the samples or frames, F the bins of features, D the
    dimension, 1 an axis of size one. A clip-only encoder (no T) has no hop and no frame centre.

    A model that takes features has a `frontend`, which makes them from waveforms, or a `frontend_model`, a graph that does;
    its lengths here are in samples too, and only the lengths and masks that it is fed count frames. If the graph fixes the
    batch, `fixed_batch` is its size. If it fixes the samples, every chunk is a window of `chunk_samples` that gives
    `window_frames` frames, and the hop may be a fraction; but if there are `windows`, a chunk is cut into these, each gives
    a frame, and `output_layout` is that of all together. `constants` are inputs that take the same numbers in every call,
    and `tokens` says how an output's tokens make frames. With `chunk_overlap`, a chunk begins where the next frame of the
    one before would. What is unset, a model does not have, so that models without it keep their names in the store.
    `sources` says where each field is from.
    """

    input: str
    input_layout: str
    lengths_input: str | None
    output: str
    output_layout: str
    dim: int
    sample_rate: int
    hop_samples: int | float | None
    receptive_field_samples: int | None
    first_frame_center_samples: float | None
    min_samples: int
    max_samples: int | None
    chunk_samples: int
    amplitude: Literal["unit", "int16"]
    normalize: Literal["none", "zscore"]
    dynamic_batch: bool
    batch_coupled: bool
    mask_input: str | None = None
    fixed_batch: int | None = None
    window_frames: int | None = None
    frontend: Frontend | None = None
    constants: dict[str, Constant] | msgspec.UnsetType = msgspec.UNSET
    tokens: Tokens | msgspec.UnsetType = msgspec.UNSET
    frontend_model: FrontendModel | msgspec.UnsetType = msgspec.UNSET
    windows: Windows | msgspec.UnsetType = msgspec.UNSET
    chunk_overlap: Literal["window"] | msgspec.UnsetType = msgspec.UNSET
    license: str | None = None
    source: str | None = None
    sources: dict[str, str] = {}

    @property
    def features(self) -> AnyFrontend | None:
        """What makes the features of a model that takes them."""
        return self.frontend_model or self.frontend

    @property
    def is_plausible(self) -> bool:
        """Whether its numbers can be those of a model; a remembered contract may have been changed."""
        counts = [self.dim, self.sample_rate, self.chunk_samples, *(self.fixed_batch, self.window_frames, self.max_samples)]
        if any(count is not None and not 1 <= count <= _MOST for count in counts):
            return False
        lengths = (self.min_samples, self.receptive_field_samples, self.first_frame_center_samples)
        if any(length is not None and not abs(length) <= _MOST for length in lengths):
            return False
        return self.hop_samples is None or 1e-3 <= self.hop_samples <= _MOST

    @property
    def clip_only(self) -> bool:
        return self.hop_samples is None

    @property
    def has_frames(self) -> bool:
        """Whether the output's layout and tokens hold frames, and not one vector per clip."""
        return "T" in self.output_layout and not (self.tokens and self.tokens.use == "prefix")

    @property
    def fixed_window(self) -> bool:
        """Whether every chunk has the one length that the model takes."""
        return self.min_samples == self.max_samples

    @property
    def law(self) -> FrameLaw | None:
        """The law of its frames; None for a clip-only encoder, and for a window whose frames follow none."""
        if self.hop_samples is None or self.receptive_field_samples is None:
            return None
        return FrameLaw(int(self.hop_samples), self.receptive_field_samples)

    def frames_of(self, samples: int) -> int:
        """How many frames the model gives for an input of samples; a clip-only encoder gives one vector."""
        if self.window_frames is not None:
            return self.window_frames
        return 1 if self.law is None else self.law.frames(samples)

    def described(self) -> dict[str, dict[str, Any]]:
        """Each field as {"value": …, "source": …}, for the record."""
        apart = ("sources", "frontend", "frontend_model", "constants", "tokens", "windows", "chunk_overlap")
        values = {name: getattr(self, name) for name in self.__struct_fields__ if name not in apart}
        values |= {CONSTANT + name: constant.values for name, constant in (self.constants or {}).items()}
        if self.tokens:
            values |= {f"{TOKENS}prefix": self.tokens.prefix, f"{TOKENS}grid": self.tokens.grid}
            values |= {f"{TOKENS}bands": self.tokens.join, f"{TOKENS}use": self.tokens.use}
        if self.windows:
            unit = "samples" if self.features is None else "frames"
            values |= {f"{WINDOW}{unit}": self.windows.length, hop_key(self): self.windows.hop}
        if self.chunk_overlap:
            values["chunk_overlap"] = self.chunk_overlap
        values["input_kind"] = "waveform" if self.features is None else "features"
        if self.frontend_model:
            values |= {frontends.PREFIX + name: value for name, value in self.frontend_model.facts().items()}
        for name in self.frontend.__struct_fields__ if self.frontend else ():
            if name != "sample_rate":  # the contract's own
                value = getattr(self.frontend, name)
                values[frontends.PREFIX + name] = "window" if value is msgspec.UNSET else value
        return {
            name: {"value": value, "source": self.sources.get(name, "not declared" if value is None else "measured")}
            for name, value in values.items()
        }


class FrontendModel(msgspec.Struct, frozen=True, kw_only=True):
    """A graph that makes features of waveforms: what it was measured to take and give, as if it were an encoder.

    `file` is its path, relative to the model's folder. Its frames, times `scale` plus `offset`, are the features.
    """

    file: str
    sha256: str
    contract: Contract
    scale: float = 1.0
    offset: float = 0.0

    preset: ClassVar[str] = "model"
    fill: ClassVar[str] = "silence"
    stack_frames: ClassVar[int] = 1

    @property
    def bins(self) -> int:
        return self.contract.dim

    @property
    def law(self) -> FrameLaw:
        law = self.contract.law
        if law is None:
            raise ValueError("a front end without frames")
        return law

    @property
    def frame_samples(self) -> int:
        return self.law.hop

    @property
    def receptive_samples(self) -> int:
        return self.law.receptive_field

    @property
    def first_center_samples(self) -> float:
        return self.contract.first_frame_center_samples or 0.0

    def frames(self, samples: int) -> int:
        return self.law.frames(samples)

    def frames_held(self, samples: int) -> int:
        return max(1, self.frames(samples))

    def samples_for(self, frames: int) -> int:
        return max(1, self.law.first_length_with(frames))

    def described(self) -> str:
        law = self.law
        scaled = "" if (self.scale, self.offset) == (1.0, 0.0) else f", times {self.scale:g} plus {self.offset:g}"
        return f"{self.bins} bins every {law.hop} samples{scaled}"

    def facts(self) -> dict[str, str | int | float]:
        """For the record, by key without `frontend.`."""
        law = self.law
        return {
            "model": self.file,
            "model_sha256": self.sha256,
            "scale": self.scale,
            "offset": self.offset,
            "bins": self.bins,
            "hop_samples": law.hop,
            "receptive_field_samples": law.receptive_field,
        }


AnyFrontend = Frontend | FrontendModel


def hop_key(contract: Contract) -> str:
    """The key that declares the hop of the windows that a model takes."""
    return f"{WINDOW}hop_{'samples' if contract.features is None else 'frames'}"


def remarks(contract: Contract) -> list[str]:
    """Notes for the user: what was assumed, and what the model's limits cost."""
    notes = []
    if assumed := [
        f"{name}={value:g}" if isinstance(value := getattr(contract, name), int | float) else f"{name}={value}"
        for name in ("sample_rate", "amplitude", "normalize", "hop_samples")
        if contract.sources.get(name, "").startswith("default")
    ]:
        notes.append(f"assumed, because the model does not declare it: {', '.join(assumed)} (--contract changes it)")
    if contract.frontend:
        notes.append(
            f"the model takes features, computed here by the preset {contract.frontend.preset}: "
            f"{contract.frontend.described()} (--contract frontend.KEY=VALUE changes undeclared values)"
        )
    if contract.frontend_model:
        front = contract.frontend_model
        notes.append(f"the model takes features, made by {foreign(front.file)}: {front.described()}")
    if contract.windows:
        unit = "samples" if contract.features is None else "frames"
        notes.append(
            f"the model gives one vector per window of {contract.windows.length} {unit}, every {contract.windows.hop}: a "
            f"frame every {contract.hop_samples} samples"
        )
    if contract.fixed_window:
        filling = "copies of itself" if contract.frontend and contract.frontend.fill == "repeat" else "zeros"
        notes.append(
            f"the model takes windows of exactly {contract.chunk_samples} samples, so clips are cut into these, and "
            f"the last one is filled up with {filling}"
            + (f"; --contract {hop_key(contract)}=N makes a frame of each, N apart" if contract.clip_only else "")
        )
    if contract.fixed_batch is not None and contract.fixed_batch > 1:
        notes.append(
            f"the model takes batches of exactly {contract.fixed_batch}, so each batch is one chunk repeated, at "
            f"{contract.fixed_batch} times the cost; export it with a dynamic batch axis to avoid that"
        )
    if contract.batch_coupled:
        notes.append("an item's embedding depends on its neighbours in a batch, so the model runs one item at a time")
    return notes
