"""`pack`: from a folder of audio and a table of labels to shards and a task file for `evaluate`."""

from __future__ import annotations

from .packing import LEAKS, Packed, pack

__all__ = ["LEAKS", "Packed", "pack"]
