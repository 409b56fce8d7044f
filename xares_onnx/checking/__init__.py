"""`check`: whether an encoder is what it must be, measured without data, one property after another."""

from .records import CheckReport, Finding
from .run import check
from .settings import read_settings

__all__ = ["CheckReport", "Finding", "check", "read_settings"]
