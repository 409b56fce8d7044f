"""A check for people and for pipelines: a table, Markdown, and the cases of `ci`."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console
from rich.text import Text

from ..checking import CheckReport, Finding
from ..checking.contracts import shown
from ..checking.findings import STATUSES, Profile
from ..encoder.walls import WALLS
from ..errors import foreign, printable
from .ci import Case, markdown_cell
from .tables import empty_table
from .units import data_size

_MOST_OPERATORS = 12  # in a table
_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def print_check(report: CheckReport, console: Console) -> None:
    """What the model is, a line per property, and what to do about each that is not well.

    Of a check that ended early, the failure comes first, and only the properties that were reached have a line.
    """
    console.print(Text.assemble("encoder ", (foreign(report.name), "bold"), f"  {_described(report)}"))
    ended_early = bool(_unreached(report))
    if ended_early:
        _print_remedies(report, console)
    table = empty_table(console, ("property", "result"), ("measured", "tolerance"), ("found",))
    table.columns[-1].no_wrap = False
    for finding in report.findings:
        if not finding.reached:
            continue
        table.add_row(
            finding.property,
            Text(finding.status, style=_STYLES[finding.status]),
            _measured(finding),
            _tolerance(finding),
            printable(finding.says),
        )
    console.print(table, soft_wrap=False)
    if report.contract is not None:
        fields = (
            f"{name}={shown(entry['value'])} ({entry['source']})"
            for name, entry in report.contract.items()
            if entry["value"] is not None
        )
        console.print(f"contract: {printable(', '.join(fields))}")
    if report.walls is not None:
        console.print(f"walls: {_walls(report.walls)}")
    if not ended_early:
        _print_remedies(report, console)
    if report.profile is not None:
        _print_profile(report.profile, console)
    console.print(summary(report))


def _print_remedies(report: CheckReport, console: Console) -> None:
    for finding in (*_having(report, "fail"), *_having(report, "warn")):
        console.print(
            Text.assemble(
                (f"{finding.status} {finding.property}", _STYLES[finding.status]),
                f": {printable(finding.says)}" + (f"; {printable(finding.remedy)}" if finding.remedy else ""),
            )
        )


def _print_profile(profile: Profile, console: Console) -> None:
    """Where the time goes, by operator and by layer."""
    console.print(profile_heading(profile))
    for heading, parts in profile_tables(profile):
        table = empty_table(console, (heading,), ("kernels", "ms", "share"))
        for cells in parts:
            table.add_row(*cells)
        console.print(table, soft_wrap=False)


def summary(report: CheckReport) -> str:
    """One line: how many properties came to what, and in which time."""
    unreached = _unreached(report)
    counts = [f"{len(found)} {status}" for status in STATUSES if (found := _reached(report, status))]
    if unreached:
        properties = "property was" if unreached == 1 else "properties were"
        counts.append(f"{unreached} {properties} not reached")
    return f"{', '.join(counts)} in {report.seconds:.1f} s"


def profile_heading(profile: Profile) -> str:
    provider = profile.provider.removesuffix("ExecutionProvider")
    heading = (
        f"profile: {profile.milliseconds:.4g} ms in the kernels of {provider} for {profile.seconds:g} s of audio with one "
        f"thread, the median of {profile.runs} runs"
    )
    return printable(f"{heading}; {profile.note}" if profile.note else heading)


def profile_tables(profile: Profile) -> list[tuple[str, list[tuple[str, str, str, str]]]]:
    """By its heading a table of operators, and one of layers if there are any: name, kernels, milliseconds, share."""
    large = profile.operators[:_MOST_OPERATORS]
    rows = [_part(part.name, part.kernels, part.milliseconds, part.share) for part in large]
    if rest := profile.operators[_MOST_OPERATORS:]:
        sums = (
            sum(part.kernels for part in rest),
            sum(part.milliseconds for part in rest),
            sum(part.share for part in rest),
        )
        rows.append(_part(f"{len(rest)} others", *sums))
    layers = [_part(part.name, part.kernels, part.milliseconds, part.share) for part in profile.layers]
    return [("operator", rows), *([("layer", layers)] if layers else [])]


def _part(name: str, kernels: int, milliseconds: float, share: float) -> tuple[str, str, str, str]:
    return foreign(name), str(kernels), f"{milliseconds:.2f}", f"{100 * share:.1f} %"


def cases(report: CheckReport) -> list[Case]:
    """A case a property."""
    return [
        Case(
            suite=finding.group,
            name=finding.property,
            status=finding.status,
            message=printable(finding.says) if finding.status in ("pass", "skip") else printable(_sentence(finding)),
            details="\n".join(printable(line) for line in (*_figure(finding), *finding.details)),
            seconds=finding.seconds,
        )
        for finding in report.findings
    ]


def markdown(report: CheckReport) -> str:
    """A table for a step summary, failures and warnings first."""
    lines = [
        f"### {markdown_cell(report.name)}: {markdown_cell(summary(report))}",
        "",
        markdown_cell(_described(report)),
        "",
        "| property | result | measured | tolerance | found |",
        "|---|---|---|---|---|",
    ]
    if report.unusable is not None:
        lines.insert(2, f"**cannot be used**: {markdown_cell(report.unusable)}\n")
    for finding in (finding for status in STATUSES for finding in _reached(report, status)):
        what = _sentence(finding) if finding.status in ("fail", "warn") else finding.says
        result = f"**{finding.status}**" if finding.status == "fail" else finding.status
        cells = [markdown_cell(cell) for cell in (_measured(finding), _tolerance(finding), what)]
        lines.append(f"| {finding.property} | {result} | {' | '.join(cells)} |")
    if report.profile is not None:
        lines += ["", markdown_cell(profile_heading(report.profile))]
        for heading, rows in profile_tables(report.profile):
            lines += ["", f"| {heading} | kernels | ms | share |", "|---|---:|---:|---:|"]
            lines += [f"| {' | '.join(markdown_cell(cell) for cell in cells)} |" for cells in rows]
    return "\n".join(lines) + "\n"


def _unreached(report: CheckReport) -> int:
    return sum(not finding.reached for finding in report.findings)


def _reached(report: CheckReport, status: str) -> list[Finding]:
    return [finding for finding in _having(report, status) if finding.reached]


def _having(report: CheckReport, status: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.status == status]


def _described(report: CheckReport) -> str:
    if report.model is None:
        return "could not be read"
    facts = [data_size(report.model.bytes), f"{report.model.parameters / 1e6:.1f} M parameters", report.model.precision]
    if report.contract is not None:
        dim, hop, rate = (report.contract[name]["value"] for name in ("dim", "hop_samples", "sample_rate"))
        facts += [f"{dim} dimensions", f"a frame every {1000 * hop / rate:g} ms" if hop else "clip-only", f"{rate} Hz"]
    if report.provider is not None:
        facts.append(report.provider.removesuffix("ExecutionProvider"))
    return ", ".join(facts)


def _walls(standing: Collection[str]) -> str:
    """What holds of the model's process, and what does not."""
    parts = [what if name in standing else f"missing: {what}" for name, what in WALLS.items()]
    return "; ".join(parts)


def _measured(finding: Finding) -> str:
    if finding.measured is None:
        return ""
    value = f"{finding.measured:g}" if isinstance(finding.measured, float) else f"{finding.measured}"
    return printable(f"{value} {finding.unit}".rstrip())


def _tolerance(finding: Finding) -> str:
    if finding.tolerance is None:
        return ""
    if isinstance(finding.tolerance, str):
        return finding.tolerance
    return f"<= {finding.tolerance:g}" if finding.tolerance else "0"


def _figure(finding: Finding) -> list[str]:
    measured, tolerance = _measured(finding), _tolerance(finding)
    return [f"measured {measured}" + (f", tolerance {tolerance}" if tolerance else "")] if measured else []


def _sentence(finding: Finding) -> str:
    return f"{finding.says}; {finding.remedy}" if finding.remedy else finding.says
