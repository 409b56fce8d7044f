"""What a continuous-integration system reads: JUnit XML, and the annotations and step summary of GitHub Actions.

A `Case` is one thing that was tested, whichever verb tested it. Texts may hold a stranger's names: they are escaped here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import msgspec

from ..errors import MachineError, UsageError, escaped, foreign, sentences

Status = Literal["pass", "warn", "fail", "skip"]

_LEVELS: dict[Status, str] = {"fail": "error", "warn": "warning"}
# A runner takes these in a log for commands: `::` at the start of a line, `##[` anywhere.
_COMMAND = re.compile(r"^(\s*):(?=:)|##(?=\[)", re.MULTILINE)


_MAX_TEXT = 20_000  # characters of the details of a case


class Case(msgspec.Struct, frozen=True):
    """`name` of `suite` was tested: `message` says in one sentence what came out, `details` more of it in any lines."""

    suite: str
    name: str
    status: Status
    message: str
    details: str = ""
    seconds: float = 0.0


def junit(title: str, cases: Sequence[Case]) -> str:
    """JUnit XML, a testsuite a suite. A `warn` is a passed case whose text is in `system-out`."""
    root = ElementTree.Element("testsuites", {"name": foreign(title), **_counts(cases)})
    for suite in dict.fromkeys(case.suite for case in cases):
        of_suite = [case for case in cases if case.suite == suite]
        element = ElementTree.SubElement(root, "testsuite", {"name": foreign(suite), **_counts(of_suite)})
        for case in of_suite:
            attributes = {"classname": foreign(suite), "name": foreign(case.name), "time": f"{case.seconds:.3f}"}
            _add_outcome(ElementTree.SubElement(element, "testcase", attributes), case)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{_harmless(ElementTree.tostring(root, encoding="unicode"))}\n'


def github(title: str, cases: Sequence[Case], *, file: str | None, summary: str) -> str:
    """Workflow commands of GitHub Actions, `::error` for a `fail` and `::warning` for a `warn`, then the lines of `summary`.

    `file` is what the annotations are shown at, a path in the repository.
    """
    lines = []
    for case in cases:
        if level := _LEVELS.get(case.status):
            where = {"file": file, "title": f"{foreign(title)}: {foreign(case.name)}"}
            properties = ",".join(f"{key}={_property(value)}" for key, value in where.items() if value)
            text = "\n".join(part for part in (case.message, case.details) if part)
            lines.append(f"::{level} {properties}::{_data(text)}")
    return "\n".join([*lines, *(_harmless(escaped(line)) for line in summary.splitlines())]).rstrip("\n") + "\n"


def write_step_summary(markdown: str) -> bool:
    """Append to the step summary of GitHub Actions; False outside GitHub Actions."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return False
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise MachineError(f"the step summary {foreign(path)} is no regular file; unset GITHUB_STEP_SUMMARY")
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(markdown.rstrip("\n") + "\n")
    except OSError as error:
        raise MachineError(f"the step summary {path} cannot be written ({error.strerror})") from error
    except ValueError as error:  # a null byte
        raise UsageError(f"GITHUB_STEP_SUMMARY={path!r} is not a path") from error
    return True


def markdown_cell(text: str) -> str:
    """A stranger's text in a cell of a Markdown table: no markup, no HTML, no further cell, no control characters."""
    text = sentences(" ".join(text.split()))
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _counts(cases: Sequence[Case]) -> dict[str, str]:
    statuses = [case.status for case in cases]
    return {
        "tests": str(len(cases)),
        "failures": str(statuses.count("fail")),
        "errors": "0",
        "skipped": str(statuses.count("skip")),
        "time": f"{sum(case.seconds for case in cases):.3f}",
    }


def _add_outcome(element: ElementTree.Element, case: Case) -> None:
    match case.status:
        case "fail":
            failure = ElementTree.SubElement(element, "failure", {"message": _xml(case.message), "type": "failure"})
            failure.text = _xml(case.details or case.message)
        case "skip":
            ElementTree.SubElement(element, "skipped", {"message": _xml(case.message)})
        case _:
            text = "\n".join(part for part in (case.message, case.details) if part)
            if text:
                output = f"warning: {text}" if case.status == "warn" else text
                ElementTree.SubElement(element, "system-out").text = _xml(output)


def _xml(text: str) -> str:
    """Lines with what is not printable escaped, which holds all that XML 1.0 has no way to write."""
    return "".join(part if part in "\t\r\n" else escaped(part) for part in re.split(r"([\t\r\n])", text[:_MAX_TEXT]))


def _data(text: str) -> str:
    return _xml(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _harmless(text: str) -> str:
    return _COMMAND.sub(lambda match: _spaced(match[0]), text)


def _spaced(command: str) -> str:
    return f"{command} " if command.endswith(":") else "# #"
