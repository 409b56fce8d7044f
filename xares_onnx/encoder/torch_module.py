"""A model file as a torch module, for the benchmarks that take one: X-ARES and XARES-LLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import UsageError
from .encoder import load_encoder

_NO_MASK = object()  # X-ARES gives one argument; XARES-LLM two, of which the second may be None


class OnnxEncoder(torch.nn.Module):
    """An encoder that X-ARES and XARES-LLM accept. The model runs in a process of its own, which ends with this object.

    Attributes:
        sampling_rate: Of the waveforms it takes, in Hz.
        output_dim: Dimension of its frames.
        hop_size_in_ms: From frame to frame, in milliseconds; None for an encoder of one vector per clip.
    """

    def __init__(
        self, model: str | Path, *, device: str = "auto", threads: int | None = None, contract: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self._encoder = load_encoder(model, device=device, threads=threads, contract=contract)
        facts = self._encoder.contract
        self.sampling_rate = facts.sample_rate
        self.output_dim = facts.dim
        self.hop_size_in_ms = None if facts.hop_samples is None else 1000 * facts.hop_samples / facts.sample_rate
        # Callers learn a module's device from its parameters; this one has none to train.
        self.place = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(
        self, audio: torch.Tensor, audio_attention_mask: torch.Tensor | object | None = _NO_MASK
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Frames of waveforms, each embedded alone.

        Args:
            audio: (clips, samples) or (samples,) floats in [-1, 1] at `sampling_rate`.
            audio_attention_mask: (clips, samples), 1 for samples of the clip and 0 for the padding after it. None, if no
                clip is padded: then padding counts as sound.

        Returns:
            (clips, frames, output_dim) on the device of `audio`. If a mask or None is given, a pair: these frames, padded
            with zeros, and their mask (clips, frames), or None for None.

        Raises:
            UsageError: The shapes do not fit, or a clip has no samples.
            ModelError: The model fails.
        """
        waveforms = audio.detach().float().cpu().numpy()
        waveforms = waveforms[None] if waveforms.ndim == 1 else waveforms
        if waveforms.ndim != 2:
            raise UsageError(f"audio must be (clips, samples), not {tuple(audio.shape)}; mix channels down first")
        clips = list(waveforms)
        if isinstance(audio_attention_mask, torch.Tensor):
            clips = _cut(waveforms, audio_attention_mask)
        embedded = [torch.from_numpy(clip.frames) for clip in self._encoder.embed(clips, self.sampling_rate)]
        frames = pad_sequence(embedded, batch_first=True).to(audio.device)
        if audio_attention_mask is _NO_MASK:
            return frames
        if audio_attention_mask is None:
            return frames, None
        counts = torch.tensor([len(clip) for clip in embedded])
        return frames, (torch.arange(frames.shape[1]) < counts[:, None]).long().to(audio.device)

    def close(self) -> None:
        """End the model's process. The next call starts another."""
        self._encoder.close()


def torch_module(
    model: str | Path, *, device: str = "auto", threads: int | None = None, contract: Sequence[str] = ()
) -> OnnxEncoder:
    """A model file as a `torch.nn.Module`, so that X-ARES's own runner and XARES-LLM take it.

    Args:
        model: An `.onnx` file, or a folder that holds one.
        device: `auto`, `cpu`, `cuda`, `cuda:N`, or the name of an ONNX Runtime provider.
        threads: Number of threads; the number of usable cores by default.
        contract: Declarations, as "KEY=VALUE".

    Returns:
        The module, with `sampling_rate`, `output_dim`, `hop_size_in_ms` and `forward(audio[, mask])`. It cannot be trained.

    Raises:
        UsageError, ModelError, MachineError: As `load_encoder`.

    Example:
        >>> encoder = torch_module("model.onnx")
        >>> encoder(torch.zeros(2, 16_000)).shape  # (clips, frames, output_dim)
    """
    return OnnxEncoder(model, device=device, threads=threads, contract=contract)


def _cut(waveforms: np.ndarray, mask: torch.Tensor) -> list[np.ndarray]:
    """Each waveform without its padding."""
    kept = mask.detach().cpu().numpy() != 0
    if kept.shape != waveforms.shape:
        raise UsageError(f"the mask must have the shape of the audio, {waveforms.shape}, not {kept.shape}")
    lengths = kept.sum(axis=1)
    if (kept != (np.arange(kept.shape[1]) < lengths[:, None])).any():
        raise UsageError("the mask must be 1 for the samples of a clip and 0 for the padding after them")
    return [waveform[:length] for waveform, length in zip(waveforms, lengths, strict=True)]
