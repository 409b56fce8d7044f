"""What a person sees in a terminal: progress while work goes on, and tables at its end."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from types import TracebackType

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as ProgressTask
from rich.table import Table
from rich.text import Text

from .. import events
from ..planning import Plan
from ..results import Average, Result, TaskResult
from ..store import Header
from ..task import Task

_PLAIN_WIDTH = 110
_VERBS = {"prepare": "preparing", "embed": "embedding", "train": "training"}
_UNITS = {"prepare": "files", "embed": "clips", "train": "epochs"}


def stdout_console() -> Console:
    """Colours and line drawing on a terminal; elsewhere plain text of one width."""
    return Console() if sys.stdout.isatty() else Console(width=_PLAIN_WIDTH, no_color=True, highlight=False)


class TerminalObserver:
    """Draws events on stderr: moving bars on a terminal, a line for each finished stage elsewhere, nothing if quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal and not quiet
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        self._bars: dict[tuple[str, str], TaskID] = {}
        self._said: set[str] = set()

    def __enter__(self) -> TerminalObserver:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._progress.stop()

    def __call__(self, event: events.Event) -> None:
        if self._quiet:
            return
        match event:
            case events.Note(text):
                if text not in self._said:
                    self._said.add(text)
                    self._console.print(f"note: {escape(text)}")
            case events.Progress(stage, task, done, total) if self._live:
                self._draw(stage, task, done, total)
            case events.Progress(stage, task, done, total) if done >= total and total and stage != "prepare":
                self._console.print(f"{escape(task)}: {_VERBS[stage]} done, {total} {_UNITS[stage]}")

    def _draw(self, stage: str, task: str, done: int, total: int) -> None:
        key = (stage, task)
        if key not in self._bars:
            for old in self._bars.values():
                self._progress.update(old, visible=False)
            description = f"{_VERBS[stage]} {escape(task)}"
            self._bars[key] = self._progress.add_task(description, total=total, start_done=done, unit=_UNITS[stage])
        self._progress.update(self._bars[key], completed=done, total=total)


class _RateColumn(ProgressColumn):
    """Units a second in this run: what the store already had does not count."""

    def render(self, task: ProgressTask) -> Text:
        fresh = task.completed - task.fields["start_done"]
        rate = fresh / task.elapsed if task.elapsed else 0
        return Text(f"{rate:.1f} {task.fields['unit']}/s" if fresh > 0 else "")


def print_result(result: Result, console: Console, *, saved: str | None = None) -> None:
    """Tasks with their scores and intervals, averages, and whatever went wrong."""
    contract = result.encoder.contract
    console.print(
        Text.assemble(
            (result.encoder.file, "bold"),
            f"  {_size(result.encoder.bytes)}, {result.encoder.parameters / 1e6:.1f} M parameters, "
            f"{contract['dim']['value']} dimensions, {_hop(result)}, "
            f"{result.environment['provider'].removesuffix('ExecutionProvider')}",
        )
    )
    by_task: dict[str, dict[str, TaskResult]] = {}
    for record in result.tasks:
        by_task.setdefault(record.task, {})["knn" if record.method == "knn" else "head"] = record
    table = Table(box=_box(console), header_style="bold")
    for heading in ("task", "domain"):
        table.add_column(heading, no_wrap=True)
    for heading in ("head", "95 %", "knn", "95 %", "test clips", "dropped"):
        table.add_column(heading, justify="right", no_wrap=True)
    reasons = []
    for records in by_task.values():
        first = next(iter(records.values()))
        cells = [*_score_cells(records.get("head")), *_score_cells(records.get("knn"))]
        dropped = len(first.clips.dropped)
        table.add_row(
            escape(first.title),
            first.domain,
            *cells,
            str(first.n_test) if first.n_test else "",
            Text(str(dropped), style="yellow") if dropped else "",
        )
        if first.status != "ok":
            reasons.append(f"{first.task}: {first.status}: {first.reason}")
        elif dropped:
            drop = first.clips.dropped[0]
            reasons.append(
                f"{first.task}: {dropped} of {first.clips.expected} clips dropped, the first {drop.key}: {drop.reason}"
            )
    console.print(table)
    if result.averages:
        console.print(_averages_table(result, console))
    for reason in reasons:
        console.print(Text(reason, style="yellow"), soft_wrap=True)
    settings = result.settings
    limit = f", {settings['limit']} clips a split" if settings["limit"] else ""
    seeds = f"{settings['seeds']} seed{'s' if settings['seeds'] > 1 else ''}"
    console.print(f"protocol {settings['protocol']}, {seeds}{limit}; scores are fractions, higher is better")
    if saved:
        console.print(Text(f"saved {saved}"), soft_wrap=True)


def print_tasks(rows: Iterable[tuple[Task, str]], console: Console) -> None:
    """Tasks with kind, metric and weight; the second of each pair is what lies on disk."""
    table = Table(box=_box(console), header_style="bold")
    for heading in ("name", "title", "domain", "kind", "metric"):
        table.add_column(heading, no_wrap=True)
    table.add_column("weight", justify="right")
    table.add_column("on disk")
    for task, on_disk in rows:
        domain = f"{task.domain}, private" if task.private else task.domain
        weight = f"{task.weight:g}" if task.weight is not None else "-"
        table.add_row(task.name, escape(task.title), domain, task.kind, task.score.metric, weight, escape(on_disk))
    console.print(table)


def print_plan(plan: Plan, console: Console) -> None:
    """What an evaluation would read, write and take."""
    table = Table(box=_box(console), header_style="bold")
    table.add_column("task", no_wrap=True)
    for heading in ("clips", "hours", "to embed", "disk", "embedding", "heads"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in plan.rows:
        table.add_row(
            row.task,
            str(row.clips),
            f"{row.hours:.2f}",
            str(row.clips_to_embed),
            _size(row.disk_bytes),
            _duration(row.embed_seconds),
            _duration(row.train_seconds),
        )
    total = plan.total
    table.add_section()
    table.add_row(
        "total",
        str(total.clips),
        f"{total.hours:.2f}",
        str(total.clips_to_embed),
        _size(total.disk_bytes),
        _duration(total.embed_seconds),
        _duration(total.train_seconds),
    )
    console.print(table)
    console.print(
        f"about {_duration(total.embed_seconds + total.train_seconds)} on this machine: the model takes {plan.rtf:.4f} s a "
        "second of audio; hours are estimated from a sample of the clips"
    )


def print_cache(entries: Sequence[tuple[str, Header, int, float]], root: str, console: Console) -> None:
    """Stored embeddings by model and task."""
    groups: dict[tuple[str, str, str], list[tuple[Header, int, float]]] = {}
    for _, header, size, used in entries:
        groups.setdefault((header.model, header.model_sha256[:8], header.task), []).append((header, size, used))
    table = Table(box=_box(console), header_style="bold")
    for heading in ("model", "sha256", "task"):
        table.add_column(heading, no_wrap=True)
    for heading in ("shards", "hours", "size", "last used"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (model, sha256, task), shards in sorted(groups.items()):
        hours = sum(header.audio_seconds for header, *_ in shards) / 3600
        last = max(used for *_, used in shards)
        table.add_row(
            escape(model),
            sha256,
            escape(task),
            str(len(shards)),
            f"{hours:.2f}",
            _size(sum(size for _, size, _ in shards)),
            f"{datetime.fromtimestamp(last, UTC):%Y-%m-%d}",
        )
    console.print(table)
    console.print(Text(f"{_size(sum(size for *_, size, _ in entries))} in {root}"), soft_wrap=True)


def _averages_table(result: Result, console: Console) -> Table:
    table = Table(box=_box(console), header_style="bold")
    table.add_column("average", no_wrap=True)
    for heading in ("head", "95 %", "plain mean", "tasks", "knn", "95 %", "plain mean", "tasks"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group, methods in result.averages.items():
        table.add_row(group, *_average_cells(methods.get("head")), *_average_cells(methods.get("knn")))
    return table


def _average_cells(average: Average | None) -> list[str]:
    if average is None:
        return ["", "", "", ""]
    of = f"{average.tasks}" if average.complete else f"{average.tasks} of {average.tasks + len(average.missing)}"
    return [f"{average.weighted:.3f}", _interval(average.ci95), f"{average.mean:.3f}", of]


def _score_cells(record: TaskResult | None) -> tuple[Text | str, str]:
    if record is None:
        return "", ""
    if record.score is None:
        return Text(record.status.replace("_", " "), style="yellow"), ""
    return Text(f"{record.score:.3f}", style="bold"), _interval(record.ci95)


def _interval(ci95: tuple[float, float] | None) -> str:
    return f"{ci95[0]:.3f}-{ci95[1]:.3f}" if ci95 else ""


def _hop(result: Result) -> str:
    hop, rate = result.encoder.contract["hop_samples"]["value"], result.encoder.contract["sample_rate"]["value"]
    return f"a frame every {1000 * hop / rate:g} ms" if hop else "clip-only"


def _box(console: Console) -> box.Box | None:
    return box.SIMPLE_HEAD if console.is_terminal else box.ASCII2


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
