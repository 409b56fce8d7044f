"""Where frames lie in time, from what was measured of them. Every time is in samples.

An encoder of features sees the waveform through its front end, so its frames lie where the front end's frames lie.
"""

from __future__ import annotations

from ..contract.contract import AnyFrontend
from ..contract.frame_law import FrameLaw

WINDOW_HOP = "default (window / frames)"
"""The contract's words for a hop from `even_hop`."""


def law_in_samples(law: FrameLaw, frontend: AnyFrontend | None) -> FrameLaw:
    """A law that was measured in samples, or in frames of features if the model has a front end."""
    if frontend is None:
        return law
    shift = (law.receptive_field - 1) * frontend.frame_samples
    return FrameLaw(law.hop * frontend.frame_samples, frontend.receptive_samples + shift)


def first_center(law: FrameLaw, frontend: AnyFrontend | None) -> tuple[float, str]:
    """The centre of the first frame, and the contract's words for where that number is from.

    It is half of the law's constant. A front end's own first frame is added in, because what a front end drops at the end of
    a clip is part of its constant and moves no frame.
    """
    if frontend is None:
        return law.receptive_field / 2, "default (receptive field / 2)"
    center = frontend.first_center_samples + (law.receptive_field - frontend.receptive_samples) / 2
    return center, "default (receptive field / 2, from the front end's first frame)"


def even_hop(samples: int, frames: int, frontend: AnyFrontend | None) -> int | float:
    """The hop of frames that are spread evenly over a window of samples, or over the frames of features in it."""
    span = samples if frontend is None else frontend.frames(samples) * frontend.frame_samples
    return span // frames if span % frames == 0 else span / frames


def first_center_in_window(samples: int, frames: int, hop: float, frontend: AnyFrontend | None) -> tuple[float, str]:
    """The centre of a window's first frame if no measurement shows it, and the contract's words for that assumption."""
    if frontend is None:
        return (samples - (frames - 1) * hop) / 2, "default (frames in the middle of the window)"
    features = frontend.frames(samples)
    if frontend.preset == "whisper" and hop == 2 * frontend.frame_samples and features == 2 * frames:
        return frontend.first_center_samples, "default (as Whisper's encoder takes every other frame of features)"
    span = (features - 1) * frontend.frame_samples - (frames - 1) * hop
    return frontend.first_center_samples + span / 2, "default (frames in the middle of the features)"
