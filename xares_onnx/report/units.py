"""Bytes, counts and times as text."""

from __future__ import annotations


def amount(number: int, unit: str) -> str:
    """A number with its unit: `12 clips`; bytes as a size."""
    return data_size(number) if unit == "bytes" else f"{number} {unit}"


def data_size(count: float) -> str:
    """A number of bytes with a decimal prefix: `1.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds as text: `12 s`, `5 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
