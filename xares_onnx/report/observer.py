"""Progress as bars on a terminal or as plain lines elsewhere, and the console that prints tables."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as ProgressTask
from rich.text import Text

from .. import progress as events
from ..errors import printable
from .units import amount, data_size, duration

_PLAIN_WIDTH = 10_000  # outside a terminal, nothing is wrapped or cut
# What a stage does, and the unit of its counts.
_STAGES = {
    "prepare": ("preparing", "files"),
    "embed": ("embedding", "clips"),
    "train": ("training", "steps"),
    "shots": ("training on few clips", "heads"),
    "measure": ("measuring", "rounds"),
    "check": ("checking", "properties"),
    "inspect": ("inspecting", "files"),
    "write": ("packing", "clips"),
    "download": ("downloading", "bytes"),
    "verify": ("verifying", "bytes"),
}
_SILENT_STAGES = ("prepare", "check")  # their end prints no line
_MOST_BARS = 3  # at once: a task is embedded while the head of another is trained
_PLAIN_SECONDS = 30  # between lines about a long download outside a terminal


class _Console(Console):
    """Colours and line drawing on a terminal, plain text elsewhere. Strings are printed as they are, not read as markup."""

    def __init__(self, stream: IO[str]) -> None:
        live = stream.isatty()
        super().__init__(
            file=stream,
            force_terminal=None if live else False,
            width=None if live else _PLAIN_WIDTH,
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
        )

    def on_broken_pipe(self) -> None:
        """Keep working when the reader is gone: the exit code does not depend on it."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def stdout_console() -> Console:
    """The console for results and tables."""
    return _Console(sys.stdout)


class TerminalObserver:
    """Draws events on stderr: moving bars on a terminal, a line for each finished stage elsewhere, nothing if quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = _Console(sys.stderr)
        self._live = self._console.is_terminal and not quiet
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            _CountColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        self._bars: dict[tuple[str, str], TaskID] = {}
        self._started: dict[tuple[str, str], _Start] = {}
        self._printed_notes: set[str] = set()

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
                if text not in self._printed_notes:
                    self._printed_notes.add(text)
                    self._console.print(f"note: {printable(text)}")
            case events.Progress(stage, task, done, total) if self._live:
                self._draw(stage, task, done, total)
            case events.Progress(stage, task, done, total) if done < total:
                start = self._started.setdefault((stage, task), _Start(done, time.monotonic()))
                if stage == "download" and (line := start.line(done, total)):
                    self._console.print(f"{task}: {line}")
            case events.Progress(stage, task, _, total) if (stage, task) in self._started and stage not in _SILENT_STAGES:
                del self._started[(stage, task)]
                verb, unit = _STAGES[stage]
                self._console.print(f"{task}: {verb} done, {amount(total, unit)}")

    def _draw(self, stage: str, task: str, done: int, total: int) -> None:
        key = (stage, task)
        if key not in self._bars:
            for task_id in self._past_bars():
                self._progress.update(task_id, visible=False)
            description = f"{_STAGES[stage][0]} {task}"
            self._bars[key] = self._progress.add_task(description, total=total, start_done=done, unit=_STAGES[stage][1])
        self._progress.update(self._bars[key], completed=done, total=total)

    def _past_bars(self) -> list[TaskID]:
        """The bars that make room for a new one: those that ended, and all but the last of the others, which may go on."""
        ended = {bar.id for bar in self._progress.tasks if bar.finished}
        going_on = [bar for bar in self._bars.values() if bar not in ended]
        return [*ended, *going_on[: 1 - _MOST_BARS]]


@dataclass
class _Start:
    """What was done when a stage first reported, with the times of that and of the last line, in seconds of a clock."""

    done: int
    at: float
    written_at: float = 0

    def line(self, done: int, total: int) -> str | None:
        """How far a download is, how fast, and how long it will take; None if the last line is recent."""
        now = time.monotonic()
        if now - max(self.at, self.written_at) < _PLAIN_SECONDS:
            return None
        self.written_at = now
        rate = (done - self.done) / (now - self.at)
        left = f", {duration((total - done) / rate)} left" if rate > 0 else ""
        return f"{data_size(done)} of {data_size(total)}, {data_size(max(rate, 0))}/s{left}"


class _CountColumn(ProgressColumn):
    """Units done and in total; bytes as sizes."""

    def render(self, task: ProgressTask) -> Text:
        if task.fields["unit"] == "bytes":
            return Text(f"{data_size(task.completed)}/{data_size(task.total or 0)}")
        return Text(f"{task.completed:.0f}/{task.total or 0:.0f}")


class _RateColumn(ProgressColumn):
    """Units per second in this run, without those that were done before it."""

    def render(self, task: ProgressTask) -> Text:
        done = task.completed - task.fields["start_done"]
        rate = done / task.elapsed if task.elapsed else 0
        if done <= 0:
            return Text("")
        return Text(f"{data_size(rate)}/s" if task.fields["unit"] == "bytes" else f"{rate:.1f} {task.fields['unit']}/s")
