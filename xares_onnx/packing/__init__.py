"""`pack`: a folder of audio and a table of labels to shards and a task file that `evaluate` runs as it is."""

from __future__ import annotations

from .packing import LEAKS, Packed, pack

__all__ = ["LEAKS", "Packed", "pack"]
