"""`check`: whether an encoder is what it must be, measured without data, one property after another."""

from .checking import check
from .findings import CheckReport, Finding
from .settings import read_settings

__all__ = ["CheckReport", "Finding", "check", "read_settings"]
