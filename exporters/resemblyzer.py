"""Resemblyzer's pretrained speaker encoder (GE2E), one embedding per 10 ms frame.

Wan et al., Generalized End-to-End Loss for Speaker Verification (2018), https://arxiv.org/abs/1710.10467;
weights from the `resemblyzer` wheel, Apache-2.0. Resemblyzer embeds partials of 160 frames (1.6 s) and keeps
the last state of each. Here the state at every frame goes through the same projection, so frame 159 is
Resemblyzer's embedding of the partial that starts with the audio.

Its `preprocess_wav` (raises quiet clips to -30 dBFS, cuts long silences) works on whole clips and is not in the file.
The mel powers are not logarithmic, so loudness matters.
"""

from __future__ import annotations

import pickle
from importlib import util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from xares_onnx.errors import UsageError
from xares_onnx.exporters.core import Spec
from xares_onnx.exporters.logmel import HOP_SAMPLES, SAMPLE_RATE, MelPower

__all__ = ["SpeakerEncoder", "build"]

BANDS = 40
DIM = 256
LAYERS = 3

# Raised when another file is read as a checkpoint: by torch.load, for a missing name, for a tensor of another shape.
NOT_A_CHECKPOINT = (pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError, AttributeError)


class SpeakerEncoder(nn.Module):
    """float32 [batch, samples] -> speaker embeddings [batch, frames, 256], each of unit length or zero."""

    def __init__(self) -> None:
        super().__init__()
        self.mel = MelPower(BANDS, centred=True)
        self.lstm = nn.LSTM(BANDS, DIM, LAYERS, batch_first=True)
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, audio: Tensor) -> Tensor:
        states, _ = self.lstm(self.mel(audio))
        # `normalize` divides by at least 1e-12: a frame whose projection is all negative is zero, not NaN.
        return functional.normalize(self.linear(states).relu(), dim=-1)


def build(family: str, checkpoint: str | None) -> tuple[nn.Module, Spec]:
    """The encoder with Resemblyzer's own weights, or with another checkpoint in its format; and what it declares.

    Raises:
        UsageError: The weights are missing or of another format.
    """
    encoder = SpeakerEncoder()
    _load(encoder, _pretrained() if checkpoint is None else Path(checkpoint))
    spec = Spec(
        model_type=family,
        sample_rate=SAMPLE_RATE,
        hop_samples=HOP_SAMPLES,
        receptive_field_samples=0,  # centred: samples // hop + 1 frames
        first_frame_center_samples=0,
        min_samples=1,
        license="Apache-2.0",
        source="https://github.com/resemble-ai/Resemblyzer",
        comment="GE2E speaker encoder, one embedding a frame; volume and silence are not preprocessed",
    )
    return encoder, spec


def _pretrained() -> Path:
    """The installed wheel's weights. It is not imported, because that needs webrtcvad and an old scipy."""
    package = util.find_spec("resemblyzer")
    for folder in (package.submodule_search_locations or ()) if package else ():
        if (weights := Path(folder, "pretrained.pt")).is_file():
            return weights
    raise UsageError("the resemblyzer weights are not installed; run: pip install --no-deps resemblyzer")


def _load(encoder: SpeakerEncoder, path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
        # The two `similarity_` scalars belong to the training loss; the `mel.` tensors exist here alone.
        learned = {name: tensor for name, tensor in state.items() if not name.startswith("similarity_")}
        front_end = {name: tensor for name, tensor in encoder.state_dict().items() if name.startswith("mel.")}
        encoder.load_state_dict(front_end | learned)
    except NOT_A_CHECKPOINT as error:
        raise UsageError(
            f"{path} is not a Resemblyzer checkpoint: it should be a torch file whose 'model_state' holds "
            "the lstm (3 layers of 256, from 40 bands) and linear weights of its VoiceEncoder"
        ) from error
