"""The two protocols and what each chooses."""

from __future__ import annotations

from typing import Literal

import msgspec

from ..data.audio import CropSettings
from ..data.task import Task

ProtocolName = Literal["corrected", "xares"]


class Protocol(msgspec.Struct, frozen=True):
    """`corrected`: a sound choice everywhere. `xares`: the choices of X-ARES 0.1.3, to reproduce its published scores."""

    name: ProtocolName

    @property
    def corrected(self) -> bool:
        return self.name == "corrected"

    @property
    def default_seeds(self) -> int:
        """Seeds of every trained head, unless the user sets another number."""
        return 3 if self.corrected else 1

    def crops(self, task: Task) -> CropSettings:
        """How the clips of a task are cut into crops."""
        if self.corrected:
            return CropSettings(task.data.crop_seconds)
        return CropSettings(task.data.crop_seconds, "whole-crops", pad_short_clips=False, keep_padding=True)
