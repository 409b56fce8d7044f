"""The severity and tolerance of each property: `[tool.xares-onnx.check]` of the user's pyproject.toml.

[tool.xares-onnx.check]
metadata = "error"                                    # error | warn | off
latency = { severity = "warn", tolerance = 50 }
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from ..errors import UsageError, foreign, nearest, quoted
from ..foreign import ForeignFileError, parse_toml, read_small
from .findings import Outcome
from .registry import PROPERTIES

Severity = Literal["error", "warn", "off"]
_MAX_BYTES = 1_000_000  # a project's settings of every tool
_SECTION = "tool.xares-onnx.check"


class Setting(msgspec.Struct, frozen=True):
    """`severity` None leaves an outcome as measured; `tolerance` None means the property's own."""

    severity: Severity | None = None
    tolerance: float | None = None

    def applied(self, outcome: Outcome) -> Outcome:
        """The outcome under this severity: `error` turns a warning into a failure, `warn` a failure into a warning."""
        if outcome.status in ("warn", "fail") and self.severity is not None:
            return msgspec.structs.replace(outcome, status="fail" if self.severity == "error" else "warn")
        return outcome


Settings = Mapping[str, Setting]


def read_settings(start: Path) -> dict[str, Setting]:
    """Settings of the nearest pyproject.toml from `start` upward, if any. Raises `UsageError` for an invalid file."""
    for folder in (start, *start.parents):
        path = folder / "pyproject.toml"
        if path.is_file():
            break
    else:
        return {}
    try:
        raw = parse_toml(read_small(path, _MAX_BYTES))
    except ForeignFileError as error:
        raise UsageError(f"{path} cannot be read ({error})") from error
    tool = raw.get("tool")
    section = tool.get("xares-onnx", {}) if isinstance(tool, dict) else {}
    if not isinstance(section, dict):
        raise UsageError(f"{path}: [tool.xares-onnx] must be a table")
    for key in section:  # an unknown key may be another program's, but not a misspelled `check`
        if key != "check" and (close := nearest(key, ["check"])):
            raise UsageError(f"{path}: [tool.xares-onnx] has no {quoted(key)}{close}")
    return make_settings(section.get("check", {}), f"{path}, [{_SECTION}]")


def make_settings(raw: Any, where: str) -> dict[str, Setting]:
    """Settings from a table of property to severity, or to {severity, tolerance}.

    Raises `UsageError` for an invalid table; `where` says in the message where it stands.
    """
    if not isinstance(raw, Mapping):
        raise UsageError(f"{where} must be a table of properties")
    return {name: _setting(name, value, where) for name, value in raw.items()}


def _setting(name: str, value: Any, where: str) -> Setting:
    if name not in PROPERTIES:
        raise UsageError(f"{where}: there is no property {quoted(name)}{nearest(name, PROPERTIES)}")
    if isinstance(value, Setting):
        value = {key: part for key, part in msgspec.structs.asdict(value).items() if part is not None}
    table = {"severity": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping):
        raise UsageError(f'{where}: {name} must be "error", "warn" or "off", or a table of severity and tolerance')
    for key in table:
        if key not in Setting.__struct_fields__:
            raise UsageError(f"{where}: {name} has no {quoted(str(key))}{nearest(str(key), Setting.__struct_fields__)}")
    severity: Any = table.get("severity")
    tolerance: Any = table.get("tolerance")
    if severity is not None and severity not in get_args(Severity):
        raise UsageError(f"{where}: {name} = {foreign(repr(severity))} must be one of {', '.join(get_args(Severity))}")
    if tolerance is not None:
        if not PROPERTIES[name].tolerance:
            raise UsageError(f"{where}: {name} takes no tolerance; set its severity")
        if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not math.isfinite(tolerance):
            raise UsageError(f"{where}: the tolerance of {name} must be a number, not {foreign(repr(tolerance))}")
    return Setting(severity, None if tolerance is None else float(tolerance))
