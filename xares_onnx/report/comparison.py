"""A comparison, and the gates of an evaluation, for people: tables in a terminal, Markdown, and cases for a build server."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from ..embedding.drift import Drift
from ..encoder.speed import factor
from ..errors import printable
from ..evaluation.differences import AverageDifference, Difference, gate_of, signed
from ..evaluation.gates import loss
from ..evaluation.record import Gate, Interval
from ..evaluation.verdict import Comparison
from .ci import Case, markdown_cell
from .tables import METRIC_NAMES, empty_table
from .units import data_size

_WORDS = {"better": "better", "worse": "worse", "same": "same", "unclear": "too few clips"}
_STYLES = {"better": "green", "worse": "red", "fail": "red", "warn": "yellow", "unclear": "yellow"}
_DIRECTION = "B - A is positive where B is better, also where the score is an error"
_SCORES = ("score", "metric"), ("clips", "A", "B", "B - A", "95 %", "could show", "only A : B right", "p"), ("verdict",)
_DRIFT = ("task",), ("clips", "mean cosine", "5 % below", "least", "CKA"), ()
_COSTS = ("cost",), ("A", "B", "B / A"), ()

Headings = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
Rows = list[tuple[str, ...]]


def print_comparison(found: Comparison, console: Console) -> None:
    """What failed first, then the verdict, every score, drift and costs."""
    if found.failed:
        console.print(Text("worse by more than the tolerance for certain", style="bold red"))
        console.print(_terminal_table(console, _SCORES, _score_rows(found.failed)), soft_wrap=False)
    console.print(Text(printable(found.verdict), style="bold"))
    console.print(f"A {printable(found.a.file)} {found.a.sha256[:8]}, B {printable(found.b.file)} {found.b.sha256[:8]}")
    for headings, rows in _tables(found):
        console.print(_terminal_table(console, headings, rows), soft_wrap=False)
    for line in _remarks(found):
        console.print(Text(printable(line)))


def print_gates(gates: Sequence[Gate], console: Console) -> None:
    """The gates of an evaluation, what failed first."""
    table = empty_table(console, ("gate", "score"), (), ("outcome", "what was found"))
    table.columns[-1].no_wrap = False
    for gate in gates:
        name, _, outcome, message = _gate_cells(gate)
        table.add_row(
            name, printable(_gate_score(gate)), Text(outcome, style=_STYLES.get(gate.status, "")), printable(message)
        )
    console.print(table, soft_wrap=False)


def markdown(found: Comparison) -> str:
    """For a step summary or a comment."""
    parts = [f"### {markdown_cell(found.verdict)}"]
    if found.failed:
        parts += ["**Worse by more than the tolerance for certain**", _markdown_table(_SCORES, _score_rows(found.failed))]
    parts += [_markdown_table(headings, rows) for headings, rows in _tables(found)]
    parts += ["\n".join(f"- {markdown_cell(line)}" for line in _remarks(found))]
    return "\n\n".join(parts) + "\n"


def cases(found: Comparison) -> list[Case]:
    """A case a score: failed where B is worse by more than the tolerance, a warning where the clips cannot exclude that."""
    made = []
    both: list[Difference | AverageDifference] = [*found.tasks, *found.averages]
    for difference in both:
        suite = "scores" if isinstance(difference, Difference) else "averages"
        status = gate_of(difference.ci95, difference.tolerance)
        made.append(Case(suite, score_name(difference), status, loss(difference, status)))
    for lost in found.unpaired:
        made.append(Case("scores", f"{lost.task} {lost.method}", "skip", lost.reason))
    made += [Case("models", failure.model, "fail", failure.message) for failure in found.failures]
    return sorted(made, key=lambda case: ("fail", "warn", "pass", "skip").index(case.status))


def _tables(found: Comparison) -> Iterable[tuple[Headings, Rows]]:
    if found.tasks:
        yield _SCORES, _score_rows([*found.tasks, *found.averages])
    if found.drift:
        yield _DRIFT, [_drift_cells(drift) for drift in found.drift]
    yield _COSTS, _cost_rows(found)


def _score_rows(found: Iterable[Difference | AverageDifference]) -> Rows:
    return [_score_cells(difference) for difference in found]


def _score_cells(found: Difference | AverageDifference) -> tuple[str, ...]:
    metric, clips, discordant, p = "", f"{len(found.tasks)} tasks" if isinstance(found, AverageDifference) else "", "", ""
    if isinstance(found, Difference):
        metric, clips = METRIC_NAMES.get(found.metric, found.metric), str(found.clips)
        if found.mcnemar is not None:
            discordant, p = f"{found.mcnemar.only_a} : {found.mcnemar.only_b}", _p(found.mcnemar.p)
    scores = f"{found.a:.3f}", f"{found.b:.3f}", signed(found.difference), _signed(found.ci95)
    shows = "" if found.detectable is None else f"{found.detectable:.3f}"
    return score_name(found), metric, clips, *scores, shows, discordant, p, _WORDS[found.verdict]


def score_name(found: Difference | AverageDifference) -> str:
    tap = f" at {found.tap}" if found.tap else ""
    if isinstance(found, AverageDifference):
        return f"average {found.group} {found.method}{tap}"
    return f"{found.task} {found.method}{tap}"


def _drift_cells(drift: Drift) -> tuple[str, ...]:
    values = (drift.cosine_mean, drift.cosine_p05, drift.cosine_min, drift.cka)
    return drift.task, str(drift.clips), *("" if value is None else f"{value:.4f}" for value in values)


def _cost_rows(found: Comparison) -> Rows:
    rows: Rows = [("size", data_size(found.a.bytes), data_size(found.b.bytes), _factor(found.size_ratio))]
    if found.speed is not None:
        speed = found.speed
        spread = f" ({1 / speed.high:.2f}-{1 / speed.low:.2f})" if speed.low and speed.high else ""
        label = "seconds a second of audio" + ("" if speed.together else ", as recorded, not together")
        rows.append((label, f"{speed.rtf_a:.4f}", f"{speed.rtf_b:.4f}", f"{_factor(1 / speed.ratio)}{spread}"))
    if found.memory is not None:
        a, b = found.memory.bytes_a, found.memory.bytes_b
        rows.append(("peak memory of its process", data_size(a), data_size(b), _factor(b / a)))
    return rows


def _remarks(found: Comparison) -> list[str]:
    seeds, protocol = found.settings["seeds"], found.settings["protocol"]
    remarks = [
        f"protocol {protocol}, {seeds} seed{'' if seeds == 1 else 's'}; {_DIRECTION}; 95 %: paired bootstrap over the test "
        "clips, and what seeds differ by; could show: the smallest difference that these clips find in four cases of "
        "five; better, worse: also after Benjamini and Hochberg's correction for all scores; p: McNemar's exact test; "
        f"same: within {found.tolerance:g}, of an error that share"
    ]
    if found.drift and all(drift.cosine_mean is None for drift in found.drift):
        remarks.append(f"no cosine: A has {found.a.dim} dimensions and B {found.b.dim}")
    for difference in found.tasks:
        if difference.only_in_a or difference.only_in_b:
            alone = f"{difference.only_in_a} clips that A alone has and {difference.only_in_b} that B alone has"
            remarks.append(f"{score_name(difference)}: {alone} are left out")
    remarks += [f"{lost.task} {lost.method}: {lost.reason}" for lost in found.unpaired]
    return [*remarks, *found.notes]


def _gate_cells(gate: Gate) -> tuple[str, ...]:
    return gate.gate.replace("_", "-"), _gate_score(gate), gate.status, gate.message


def _gate_score(gate: Gate) -> str:
    return f"{gate.task} {gate.method}" + (f" at {gate.tap}" if gate.tap else "")


def _terminal_table(console: Console, headings: Headings, rows: Rows) -> object:
    table = empty_table(console, *headings)
    for row in rows:
        *cells, last = map(printable, row)
        style = next((_STYLES[word] for word, said in _WORDS.items() if said == last and word in _STYLES), "")
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
