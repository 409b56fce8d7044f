"""A comparison, and the gates of an evaluation, for people: tables in a terminal, Markdown, and cases for a build server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from ..embedding.drift import Drift
from ..encoder.speed import factor
from ..errors import foreign, printable
from ..evaluation.differences import AverageDifference, Difference, gate_of, signed
from ..evaluation.gates import loss
from ..evaluation.record import Gate, Interval
from ..evaluation.verdict import Comparison
from .ci import Case, markdown_cell
from .tables import METRIC_NAMES, empty_table
from .units import data_size

_WORDS = {"better": "better", "worse": "worse", "same": "same", "unclear": "too few clips"}
_STYLES = {"better": "green", "worse": "red", "fail": "red", "warn": "yellow", "unclear": "yellow"}
_DIRECTION = "B - A is positive if B is better, also if the score is an error"
_SCORES = ("score", "metric"), ("clips", "A", "B", "B - A", "95 %", "could show", "only A : B right", "p"), ("verdict",)
_DRIFT = ("task",), ("clips", "mean cosine", "5 % below", "least", "CKA"), ()
_COSTS = ("cost",), ("A", "B", "B / A"), ()

Headings = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
Rows = list[tuple[str, ...]]


def print_comparison(comparison: Comparison, console: Console) -> None:
    """What failed first, then the verdict, every score, drift and costs."""
    if comparison.failed:
        console.print(Text("worse by more than the tolerance for certain", style="bold red"))
        console.print(_terminal_table(console, _SCORES, _score_rows(comparison.failed)), soft_wrap=False)
    console.print(Text(printable(comparison.verdict), style="bold"))
    a, b = comparison.a, comparison.b
    console.print(f"A {foreign(a.file)} {foreign(a.sha256[:8])}, B {foreign(b.file)} {foreign(b.sha256[:8])}")
    for headings, rows in _tables(comparison):
        console.print(_terminal_table(console, headings, rows), soft_wrap=False)
    for line in _remarks(comparison):
        console.print(Text(printable(line)))


def print_gates(gates: Sequence[Gate], console: Console) -> None:
    """The gates of an evaluation, what failed first."""
    table = empty_table(console, ("gate", "score"), (), ("outcome", "finding"))
    table.columns[-1].no_wrap = False
    for gate in gates:
        name, _, outcome, message = _gate_cells(gate)
        table.add_row(
            name, printable(_gate_score(gate)), Text(outcome, style=_STYLES.get(gate.status, "")), printable(message)
        )
    console.print(table, soft_wrap=False)


def markdown(comparison: Comparison) -> str:
    """For a step summary or a comment."""
    parts = [f"### {markdown_cell(comparison.verdict)}"]
    if comparison.failed:
        parts += [
            "**Worse by more than the tolerance for certain**",
            _markdown_table(_SCORES, _score_rows(comparison.failed)),
        ]
    parts += [_markdown_table(headings, rows) for headings, rows in _tables(comparison)]
    parts += ["\n".join(f"- {markdown_cell(line)}" for line in _remarks(comparison))]
    return "\n\n".join(parts) + "\n"


def cases(comparison: Comparison) -> list[Case]:
    """A case per score: failed if B is worse by more than the tolerance, a warning if the clips cannot exclude that."""
    listed = []
    both: list[Difference | AverageDifference] = [*comparison.tasks, *comparison.averages]
    for difference in both:
        suite = "scores" if isinstance(difference, Difference) else "averages"
        status = gate_of(difference.ci95, difference.tolerance)
        listed.append(Case(suite, score_name(difference), status, loss(difference, status)))
    for lost in comparison.unpaired:
        listed.append(Case("scores", f"{foreign(lost.task)} {foreign(lost.method)}", "skip", lost.reason))
    listed += [Case("models", failure.model, "fail", failure.message) for failure in comparison.failures]
    return sorted(listed, key=lambda case: ("fail", "warn", "pass", "skip").index(case.status))


def _tables(comparison: Comparison) -> Iterable[tuple[Headings, Rows]]:
    if comparison.tasks:
        yield _SCORES, _score_rows([*comparison.tasks, *comparison.averages])
    if comparison.drift:
        yield _DRIFT, [_drift_cells(drift) for drift in comparison.drift]
    yield _COSTS, _cost_rows(comparison)


def _score_rows(differences: Iterable[Difference | AverageDifference]) -> Rows:
    return [_score_cells(difference) for difference in differences]


def _score_cells(difference: Difference | AverageDifference) -> tuple[str, ...]:
    metric, discordant, p = "", "", ""
    if isinstance(difference, AverageDifference):
        clips = f"{len(difference.tasks)} tasks"
    else:
        metric, clips = METRIC_NAMES.get(difference.metric, foreign(difference.metric)), str(difference.clips)
        if difference.mcnemar is not None:
            discordant, p = f"{difference.mcnemar.only_a} : {difference.mcnemar.only_b}", _p(difference.mcnemar.p)
    scores = f"{difference.a:.3f}", f"{difference.b:.3f}", signed(difference.difference), _signed(difference.ci95)
    shows = "" if difference.detectable is None else f"{difference.detectable:.3f}"
    return score_name(difference), metric, clips, *scores, shows, discordant, p, _WORDS[difference.verdict]


def score_name(difference: Difference | AverageDifference) -> str:
    tap = f" at {foreign(difference.tap)}" if difference.tap else ""
    if isinstance(difference, AverageDifference):
        return f"average {difference.group} {difference.method}{tap}"
    return f"{foreign(difference.task)} {foreign(difference.method)}{tap}"


def _drift_cells(drift: Drift) -> tuple[str, ...]:
    values = (drift.cosine_mean, drift.cosine_p05, drift.cosine_min, drift.cka)
    return foreign(drift.task), str(drift.clips), *("" if value is None else f"{value:.4f}" for value in values)


def _cost_rows(comparison: Comparison) -> Rows:
    rows: Rows = [("size", data_size(comparison.a.bytes), data_size(comparison.b.bytes), _factor(comparison.size_ratio))]
    if comparison.speed is not None:
        speed = comparison.speed
        spread = f" ({1 / speed.high:.2f}-{1 / speed.low:.2f})" if speed.low and speed.high else ""
        label = "seconds per second of audio" + ("" if speed.together else ", as recorded, not together")
        rows.append((label, f"{speed.rtf_a:.4f}", f"{speed.rtf_b:.4f}", f"{_factor(1 / speed.ratio)}{spread}"))
    if comparison.memory is not None:
        a, b = comparison.memory.bytes_a, comparison.memory.bytes_b
        rows.append(("peak memory of its process", data_size(a), data_size(b), _factor(b / a)))
    return rows


def _remarks(comparison: Comparison) -> list[str]:
    seeds, protocol = (foreign(str(comparison.settings[name])) for name in ("seeds", "protocol"))
    remarks = [
        f"protocol {protocol}, {seeds} seed{'' if seeds == '1' else 's'}; {_DIRECTION}; 95 %: paired bootstrap over the "
        "test clips, and what seeds differ by; could show: the smallest difference that these clips find in four cases of "
        "five; better, worse: also after Benjamini and Hochberg's correction for all scores; p: McNemar's exact test; "
        f"same: within {comparison.tolerance:g}, of an error that share"
    ]
    if comparison.drift and all(drift.cosine_mean is None for drift in comparison.drift):
        remarks.append(f"no cosine: A has {comparison.a.dim} dimensions and B {comparison.b.dim}")
    for difference in comparison.tasks:
        if difference.only_in_a or difference.only_in_b:
            alone = f"{difference.only_in_a} clips that A alone has and {difference.only_in_b} that B alone has"
            remarks.append(f"{score_name(difference)}: {alone} are left out")
    remarks += [f"{foreign(lost.task)} {foreign(lost.method)}: {foreign(lost.reason)}" for lost in comparison.unpaired]
    return [*remarks, *comparison.notes]


def _gate_cells(gate: Gate) -> tuple[str, ...]:
    return gate.gate.replace("_", "-"), _gate_score(gate), gate.status, gate.message


def _gate_score(gate: Gate) -> str:
    return f"{foreign(gate.task)} {foreign(gate.method)}" + (f" at {foreign(gate.tap)}" if gate.tap else "")


def _terminal_table(console: Console, headings: Headings, rows: Rows) -> object:
    table = empty_table(console, *headings)
    for row in rows:
        *cells, last = map(printable, row)
        style = next((_STYLES[word] for word, text in _WORDS.items() if text == last and word in _STYLES), "")
        table.add_row(*cells, Text(last, style=style))
    return table


def _markdown_table(headings: Headings, rows: Rows) -> str:
    words, numbers, more = headings
    aligned = ["---"] * len(words) + ["---:"] * len(numbers) + ["---"] * len(more)
    lines = [[*words, *numbers, *more], aligned, *([markdown_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _signed(ci95: Interval | None) -> str:
    return f"{signed(ci95[0])} to {signed(ci95[1])}" if ci95 else ""


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _factor(ratio: float | None) -> str:
    return "" if ratio is None else factor(ratio)
